"""What turns text, pictures and recordings into a model's inputs: which one a model folder holds, and its parts."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json"),
    *("spiece.model", "tokenizer.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True)
class Parts:
    """The parts of a processor; None where it has no such part.

    Args:
        tokenizer: for text.
        image_processor: for pictures.
        feature_extractor: for recordings.
    """

    tokenizer: Any = None
    image_processor: Any = None
    feature_extractor: Any = None

    @property
    def color_mode(self) -> str:
        """The mode of the pictures that the image processor takes: "L" where it normalises one channel."""
        mean = getattr(self.image_processor, "image_mean", None)
        return "L" if isinstance(mean, list | tuple) and len(mean) == 1 else "RGB"


def parts_of(processor: Any) -> Parts:
    """Return the parts of a tokenizer, image processor, feature extractor, or processor of several of them.

    Args:
        processor: any of transformers'.

    Example:
        >>> from transformers import Wav2Vec2FeatureExtractor
        >>> parts_of(Wav2Vec2FeatureExtractor()).tokenizer is None
        True
    """
    from transformers.image_processing_base import ImageProcessingMixin

    names = ("tokenizer", "image_processor", "feature_extractor")
    if any(hasattr(processor, name) for name in names):
        return Parts(*(getattr(processor, name, None) for name in names))
    if isinstance(processor, ImageProcessingMixin):
        return Parts(image_processor=processor)
    return Parts(feature_extractor=processor) if hasattr(processor, "sampling_rate") else Parts(tokenizer=processor)


def load_processor(model_folder: str | Path, trust_remote_code: bool = False) -> Any:
    """Load what a model folder holds: a tokenizer, an image processor, a feature extractor, or a processor of several.

    A folder of an image model without one gets a plain image processor, and a warning that says so: the size is the
    config's ``image_size``, pixels are scaled to [-1, 1] (mean and standard deviation 0.5).

    Args:
        model_folder: a folder, or a Hub id.
        trust_remote_code: run the code of a processor that comes with the model.

    Raises:
        OSError: if there is no such model.
        ValueError: if it holds none, and its config does not say what a plain one would need.

    Example:
        >>> type(load_processor("openai/whisper-tiny")).__name__  # doctest: +SKIP
        'WhisperProcessor'
    """
    from transformers import AutoConfig, AutoFeatureExtractor, AutoImageProcessor, AutoProcessor, AutoTokenizer

    name, options = str(model_folder), {"trust_remote_code": trust_remote_code}  # None would ask at the terminal
    described = {file: _json(name, file) for file in ("processor_config.json", "preprocessor_config.json")}
    settings: dict[str, Any] = {}
    for found in described.values():
        settings |= found or {}
    text = any(_held(name, file) for file in _TOKENIZER_FILES)
    if not settings:
        if text:
            return AutoTokenizer.from_pretrained(name, **options)
        plain = _plain_image_processor(name, trust_remote_code)
        # a tokenizer may lie in files of other names; where there is none, transformers says what is missing
        return plain if plain is not None else AutoTokenizer.from_pretrained(name, **options)
    nested = {"image_processor", "feature_extractor"} & settings.keys()
    if text or len(nested) > 1 or (nested and "processor_class" in settings):
        joined = AutoProcessor.from_pretrained(name, **options)
        # where no processor joins the two it is the tokenizer alone, which says nothing to a model without words
        alone = parts_of(joined) == Parts(tokenizer=joined)
        if not alone or hasattr(AutoConfig.from_pretrained(name, **options), "vocab_size"):
            return joined
    sound = "sampling_rate" in settings or "feature_extractor" in nested
    return (AutoFeatureExtractor if sound else AutoImageProcessor).from_pretrained(name, **options)


def decoder_start(config: Any) -> int | None:
    """Return the token with which the decoder of an encoder-decoder starts; None for any other model.

    Args:
        config: of the model.

    Raises:
        ValueError: if it is an encoder-decoder whose config does not say.

    Example:
        >>> from transformers import LlamaConfig, T5Config
        >>> decoder_start(T5Config(decoder_start_token_id=0)), decoder_start(LlamaConfig())
        (0, None)
    """
    if not getattr(config, "is_encoder_decoder", False):
        return None
    inner = getattr(config, "decoder", None)
    for holder in (config, inner):
        for field in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(holder, field, None)
            if value is not None:
                return int(value)
    raise ValueError(
        f"The config of {type(config).__name__} names no decoder_start_token_id: set config.decoder_start_token_id."
    )


def _plain_image_processor(name: str, trust_remote_code: bool) -> Any:
    """Return an image processor made from the config of an image model, or None for a model of another kind."""
    from transformers import AutoConfig, ViTImageProcessor
    from transformers.models.auto import modeling_auto

    config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    kind = getattr(config, "model_type", "")
    if kind in modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES or _hears(config):
        raise ValueError(
            f"{name!r} holds no feature extractor. Save the one of the model it was made from into the folder: "
            f"AutoFeatureExtractor.from_pretrained(ORIGINAL).save_pretrained({name!r})."
        )
    size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    pictures = kind in modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES or size is not None
    if not pictures or hasattr(config, "vocab_size"):
        return None
    if not size or channels not in (1, 3):
        raise ValueError(
            f"{name!r} holds no image processor, and its config has image_size={size} and num_channels={channels}, "
            "from which no plain one can be made. Save the one of the model it was made from into the folder: "
            f"AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained({name!r})."
        )
    height, width = (size, size) if isinstance(size, int) else size
    warnings.warn(
        f"{name!r} holds no image processor: images become {height} x {width} pixels in {channels} channel(s), "
        "scaled to [-1, 1] (mean and standard deviation 0.5). If it was trained with others, save its own image "
        "processor beside it with save_pretrained.",
        stacklevel=3,
    )
    half = [0.5] * channels
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def _hears(config: Any) -> bool:
    return any(hasattr(config, field) for field in ("num_mel_bins", "conv_stride", "num_feat_extract_layers"))


def _held(name: str, file: str) -> str | None:
    """Return where a file of a model is, or None if the model has no such file."""
    if Path(name).expanduser().is_dir():
        path = Path(name).expanduser() / file
        return str(path) if path.is_file() else None
    from transformers.utils import cached_file

    return cached_file(
        name,
        file,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )


def _json(name: str, file: str) -> dict[str, Any] | None:
    path = _held(name, file)
    return None if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
