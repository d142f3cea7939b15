import pytest
import torch

from hf_cka.representations import Pooling, default_pooling, pool, resolve_pooling

HIDDEN = torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0))


def _padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same 6 tokens in 9 positions; the padding holds numbers that would show."""
    hidden, mask = torch.full((1, 9, 3), 1e6), torch.zeros(1, 9, dtype=torch.bool)
    where = slice(0, 6) if side == "right" else slice(3, 9)
    hidden[:, where], mask[:, where] = HIDDEN, True
    return hidden, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Pooling("last"), HIDDEN[:, 5]),
        (Pooling("cls"), HIDDEN[:, 0]),
        (Pooling("mean"), HIDDEN.mean(dim=1)),
        (Pooling("mean", skip_first=4), HIDDEN[:, 4:].mean(dim=1)),
        (Pooling("mean", skip_first=6), HIDDEN[:, 5]),
        (Pooling("tokens"), HIDDEN[0]),
        (Pooling("tokens", skip_first=2), HIDDEN[0, 2:]),
    ],
)
def test_padding_on_either_side_changes_nothing(rule, expected, side):
    torch.testing.assert_close(pool(*_padded(side), rule), expected)


def test_readouts_do_not_keep_the_whole_sequence_in_memory():
    for kind in ("last", "cls", "mean", "tokens"):
        readout = pool(HIDDEN, torch.ones(1, 6, dtype=torch.bool), Pooling(kind))
        assert readout.untyped_storage().data_ptr() != HIDDEN.untyped_storage().data_ptr()


def test_a_mean_over_half_precision_is_summed_in_float32():
    hidden = torch.full((1, 4096, 1), 1.0, dtype=torch.bfloat16)
    assert pool(hidden, torch.ones(1, 4096, dtype=torch.bool), Pooling("mean")).item() == 1.0


def test_defaults_follow_the_kind_of_model():
    assert default_pooling("decoder").kind == "last"
    assert default_pooling("encoder").kind == "mean"
    assert resolve_pooling("mean", "decoder").skip_first > 0
    assert resolve_pooling("mean", "encoder").skip_first == 0


def test_bad_rules_are_refused():
    with pytest.raises(ValueError, match=r"Unknown pooling 'lost'. Did you mean: 'last'"):
        Pooling("lost")
    with pytest.raises(ValueError, match="skip_first must not be negative, got -1"):
        Pooling("mean", skip_first=-1)
    with pytest.raises(ValueError, match="has no meaning for pooling 'cls'"):
        Pooling("cls", skip_first=1)
