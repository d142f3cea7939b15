"""Rows and batches: where data comes from, how it is read, and what a model takes of it.

No model is touched here, and nothing is decided.
"""

from hf_cka.data.batches import (
    MAIN_INPUTS,
    Batch,
    CalibrationBatches,
    CalibrationInfo,
    Row,
    batch_digests,
    batch_rows,
    decoder_inputs,
    pad,
    sample_digests,
)
from hf_cka.data.calibrating import calibration
from hf_cka.data.inputs import Readable, alike, hear, see
from hf_cka.data.labels import class_names, label_ids
from hf_cka.data.media import AUDIO, IMAGE, Unreadable, media_column, read_audio, read_image, undecoded
from hf_cka.data.processors import Parts, decoder_start, load_processor, parts_of
from hf_cka.data.sources import file_builder, is_collection, load_rows, public_name
from hf_cka.data.text import caption, row_pair, row_text

__all__ = [
    "AUDIO",
    "IMAGE",
    "MAIN_INPUTS",
    "Batch",
    "CalibrationBatches",
    "CalibrationInfo",
    "Parts",
    "Readable",
    "Row",
    "Unreadable",
    "alike",
    "batch_digests",
    "batch_rows",
    "calibration",
    "caption",
    "class_names",
    "decoder_inputs",
    "decoder_start",
    "file_builder",
    "hear",
    "is_collection",
    "label_ids",
    "load_processor",
    "load_rows",
    "media_column",
    "pad",
    "parts_of",
    "public_name",
    "read_audio",
    "read_image",
    "row_pair",
    "row_text",
    "sample_digests",
    "see",
    "undecoded",
]
