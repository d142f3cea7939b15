import hashlib

import torch

from hf_cka.data import batch_digests, calibration, sample_digests
from tests.tiny import tiny_batch


def test_digests_ignore_padding():
    left = sample_digests(torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]]))
    right = sample_digests(torch.tensor([[5, 6, 0]]), torch.tensor([[1, 1, 0]]))
    assert left == right != sample_digests(torch.tensor([[6, 5, 0]]), torch.tensor([[1, 1, 0]]))


def test_the_digest_of_text_is_the_sha256_of_its_tokens():
    """Records that were written before pictures and sound were known name these."""
    batch = tiny_batch()
    expected = [
        hashlib.sha256(ids[mask.bool()].numpy().tobytes()).hexdigest()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sample_digests(batch["input_ids"], batch["attention_mask"]) == expected
    assert batch_digests(batch, batch["attention_mask"]) == batch_digests(batch) == expected


def test_sound_is_hashed_without_its_padding_whatever_mask_the_frames_have():
    values = torch.rand(1, 6)
    padded = torch.cat([values, torch.zeros(1, 3)], dim=1)
    mask = torch.tensor([[1] * 6 + [0] * 3])
    alone = batch_digests({"input_values": values})
    assert batch_digests({"input_values": padded, "attention_mask": mask}) == alone
    assert batch_digests({"input_values": padded, "attention_mask": mask}, torch.ones(1, 2)) == alone
    assert batch_digests({"input_values": padded}) != alone


def test_what_belongs_together_is_hashed_together():
    ids, pixels = torch.ones(2, 3, dtype=torch.long), torch.rand(2, 3, 4, 4)
    both = batch_digests({"input_ids": ids, "pixel_values": pixels})
    assert both[0] != both[1]
    targets = [batch_digests({"input_ids": ids, "decoder_input_ids": torch.full((2, 2), i)}) for i in (5, 6)]
    assert targets[0] != targets[1]
    assert batch_digests({"unknown": ids}, torch.ones(2, 3)) == ["", ""]


def test_half_precision_is_hashed():
    pixels = torch.rand(2, 3, 4, 4).bfloat16()
    assert batch_digests({"pixel_values": pixels}) == batch_digests({"pixel_values": pixels.float()})


def test_batches_say_how_many_samples_they_hold():
    from tests.tiny import tiny_tokenizer

    assert calibration(["w1", "w2", "w3"], tiny_tokenizer(), batch_size=2).num_samples == 3
