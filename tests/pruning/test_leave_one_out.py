"""Leave-one-out: the shared pass gives the numbers of the plain loop and of a model that was really cut."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from hf_cka.anatomy import find_anatomy
from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria.base import KINDS, ScoringContext, Structure
from hf_cka.pruning.criteria.leave_one_out import leave_one_out
from hf_cka.pruning.removable import Removable
from hf_cka.representations import Pooling
from tests.tiny import SETTINGS, tiny_batch, tiny_model


def context(model, batches=None, pooling="mean"):
    batches = batches or [tiny_batch(3, seed=0), tiny_batch(2, length=9, seed=1, pad="left")]
    return ScoringContext(model, find_anatomy(model), batches, Pooling(pooling))


def everything(anatomy):
    single = [Structure(kind, layer) for layer in range(anatomy.num_layers) for kind in KINDS]
    return [*single, Structure("layer", 1, 2), Structure("layer", 2, 2)]


@pytest.mark.parametrize("family", SETTINGS)
def test_the_shared_pass_equals_the_plain_loop_to_the_last_bit(family):
    given = context(tiny_model(family), [tiny_batch(3, seed=1, pad="left")])
    structures = everything(given.anatomy)
    shared = leave_one_out(given, structures, logits=True)
    plain = leave_one_out(given, structures, logits=True, shared=False)
    for structure, a, b in zip(structures, shared.readouts, plain.readouts, strict=True):
        assert torch.equal(a, b), structure
        assert not torch.equal(a, shared.reference), structure
    assert shared.kl == plain.kl
    assert shared.nll == plain.nll
    assert shared.layer_calls < 0.7 * plain.layer_calls


@pytest.mark.parametrize("family", SETTINGS)
def test_leaving_out_is_what_surgery_does(family):
    model = tiny_model(family, head="base")
    given = context(model)
    some = [*(Structure(kind, layer) for layer in (0, 2) for kind in KINDS), Structure("layer", 1, 2)]
    structures = [s for s in some if not Removable(given.anatomy).why_not([s])]
    left = leave_one_out(given, structures)
    for structure, readouts in zip(structures, left.readouts, strict=True):
        cut = copy.deepcopy(model)
        before = sum(p.numel() for p in cut.parameters())
        expected_savings = Removable(given.anatomy).parameters([structure])
        apply_plan(cut, Removable(given.anatomy).plan([structure]))
        assert before - sum(p.numel() for p in cut.parameters()) == expected_savings, structure
        torch.testing.assert_close(leave_one_out(context(cut), []).reference, readouts, rtol=1e-5, atol=1e-5)


def test_a_model_that_works_between_its_layers_gets_whole_passes():
    """DeBERTa may put a convolution after its first layer, which candidates that fork before it must go through."""
    given = context(tiny_model("deberta-v2", conv_kernel_size=3, conv_act="gelu"))
    structures = [Structure("attention", 0), Structure("mlp", 0), Structure("layer", 2)]
    shared = leave_one_out(given, structures)
    plain = leave_one_out(given, structures, shared=False)
    for a, b in zip(shared.readouts, plain.readouts, strict=True):
        assert torch.equal(a, b)


def test_memory_decides_the_rows_of_a_chunk_and_not_the_numbers():
    given = context(tiny_model("llama"), [tiny_batch(6, seed=s) for s in range(2)])
    structures = everything(given.anatomy)
    whole = leave_one_out(given, structures, logits=True)
    cut = leave_one_out(given, structures, logits=True, memory=1)
    assert cut.layer_calls == 6 * whole.layer_calls
    for a, b in zip(whole.readouts, cut.readouts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.tensor(whole.kl), torch.tensor(cut.kl), rtol=1e-4, atol=1e-6)


def test_an_offloaded_layer_is_fetched_once_for_all_candidates():
    from accelerate import cpu_offload

    model = tiny_model("llama")
    structures = [Structure(kind, layer) for layer in range(4) for kind in KINDS]
    expected = leave_one_out(context(model), structures)
    fetched: dict[str, int] = {}

    class Counting(dict):
        def __getitem__(self, name):
            fetched[name] = fetched.get(name, 0) + 1
            return super().__getitem__(name)

    model.hf_device_map = {"": "cpu"}
    state = Counting({name: value.clone() for name, value in model.state_dict().items()})
    cpu_offload(model, execution_device="cpu", state_dict=state)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    fetched.clear()
    left = leave_one_out(context(model), structures)
    assert max(fetched.values()) == 2  # once per batch
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    for a, b in zip(expected.readouts, left.readouts, strict=True):
        assert torch.equal(a, b)


def test_divergence_and_likelihood_are_the_textbook_ones():
    model = tiny_model("qwen3")
    batch = tiny_batch(2, seed=3)
    left = leave_one_out(context(model, [batch]), [Structure("layer", 1)], logits=True)
    cut = apply_plan(copy.deepcopy(model), Removable(find_anatomy(model)).plan([Structure("layer", 1)]))
    with torch.no_grad():
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (model, cut))
    keep = batch["attention_mask"].bool()
    expected = (p.exp() * (p - q)).sum(-1)[keep].mean()
    both = keep[:, 1:] & keep[:, :-1]
    nll = -q[:, :-1].gather(-1, batch["input_ids"][:, 1:, None])[..., 0][both].mean()
    assert left.kl[0] == pytest.approx(float(expected), rel=1e-5)
    assert left.nll[0] == pytest.approx(float(nll), rel=1e-5)


def test_the_model_is_left_as_it_was():
    model = tiny_model("gemma2").train()
    model.gradient_checkpointing_enable()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    given = context(model)
    leave_one_out(given, everything(given.anatomy), logits=True)
    assert all(module.training for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_nothing_is_left_behind_by_an_interruption():
    model = tiny_model("llama")
    given = context(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        leave_one_out(given, everything(given.anatomy))
    handle.remove()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_bad_input_is_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="layer 4: the model has layers 0 to 3"):
        leave_one_out(context(model), [Structure("layer", 4)])
    with pytest.raises(ValueError, match="no batch came out of it"):
        leave_one_out(ScoringContext(model, find_anatomy(model), [], Pooling("mean")), [Structure("layer", 0)])
    with pytest.raises(ValueError, match="pooling='tokens'"):
        leave_one_out(context(model, pooling="tokens"), [Structure("layer", 0)])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="readouts of the whole model hold NaN or infinite"):
        leave_one_out(context(model), [Structure("layer", 0)])
