"""Every family, every kind of structure: saved, reloaded in a fresh process with and without hf_cka, and trained."""

from __future__ import annotations

import json

import pytest
import torch

from hf_cka.modeling.checkpoint import save_pruned
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.probe import first_output
from hf_cka.modeling.surgery import apply_plan
from hf_cka.modeling.verification import probe_inputs, verify_many
from tests.tiny import ENCODERS, SETTINGS, tiny_batch, tiny_model

FIXED_HEADS = ("gpt2", "gpt_neox", "opt", *ENCODERS)
STRUCTURES = {
    "layers": {"removed_layers": (1, 2)},
    "attention": {"removed_attention": (0, 2)},
    "mlp": {"removed_mlp": (3,)},
    "units": {"kept_units": {2: range(1, 48, 2)}},
    "groups": {"kept_groups": {3: (1,)}},
    "mixed": {
        "removed_layers": (1,),
        "removed_attention": (0,),
        "removed_mlp": (3,),
        "kept_units": {2: range(1, 48, 2)},
        "kept_groups": {3: (1,)},
    },
    "uniform": {
        "kept_units": {i: range(i % 3, 48, 3) for i in range(4)},
        "kept_groups": {i: (i % 2,) for i in range(4)},
    },
}


def pruned(model_type, structure, **changes):
    plan = PruningPlan(num_layers=4, model_type=model_type, **STRUCTURES[structure])
    return apply_plan(tiny_model(model_type, **changes), plan)


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    """All checkpoints, saved here and checked together in one fresh process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the fresh process takes the number over; tiny matrices only wait for more
    root = tmp_path_factory.mktemp("matrix")
    folders, expected, rungs = {}, {}, {}
    for model_type in SETTINGS:
        for structure in STRUCTURES:
            model = pruned(model_type, structure)
            folder = root / model_type / structure
            rungs[model_type, structure] = save_pruned(model, folder, verify=False).rung.name
            expected[len(folders)] = first_output(model, probe_inputs(json.loads((folder / "config.json").read_text())))
            folders[model_type, structure] = folder
    results = verify_many(list(folders.values()), expected=expected)
    torch.set_num_threads(threads)
    return dict(zip(folders, results, strict=True)), rungs


@pytest.mark.slow
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_reloads_and_computes_the_same(reloaded, model_type, structure):
    results, rungs = reloaded
    result = results[model_type, structure]
    assert result.passed, str(result)
    names = [check.name for check in result.checks]
    stock = structure == "layers" or (structure == "uniform" and model_type not in FIXED_HEADS)
    assert rungs[model_type, structure] == ("stock" if stock else "hf_cka")
    ways = 1 if stock else 2
    assert sum("last bit" in name for name in names) == ways
    assert sum("static = uncached" in name for name in names) == (0 if model_type in ENCODERS else ways)


@pytest.mark.parametrize("model_type", sorted(SETTINGS))
def test_an_adapter_trains_saves_and_loads(model_type, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    model = get_peft_model(pruned(model_type, "mixed"), LoraConfig(target_modules="all-linear", r=2))
    batch = tiny_batch()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(**batch, labels=batch["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        trained = model(**batch).logits
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(pruned(model_type, "mixed"), tmp_path).eval()
        assert torch.equal(again(**batch).logits, trained)
        merged = again.merge_and_unload()(**batch).logits
    assert torch.allclose(merged, trained, rtol=1e-3, atol=1e-3 * float(trained.abs().max()))


@pytest.mark.parametrize("types", [("full_attention",), ("sliding_attention",)])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma2", "gemma3_text"])
def test_generation_when_one_kind_of_attention_is_gone(model_type, types):
    """Masks are made per kind of layer, and caches look for the first layer of a kind."""
    model = tiny_model(model_type)
    gone = [i for i, kind in enumerate(model.config.layer_types) if kind in types]
    apply_plan(model, PruningPlan(num_layers=4, model_type=model_type, removed_attention=gone))
    batch = tiny_batch(pad="left")
    common = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}
    plain = model.generate(**batch, **common, use_cache=False)
    assert torch.equal(plain, model.generate(**batch, **common))
    assert torch.equal(plain, model.generate(**batch, **common, cache_implementation="static", disable_compile=True))
