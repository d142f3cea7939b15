"""A pruned model in the tools that its users have."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_cka.modeling import save_pruned
from hf_cka.modeling.plan import PruningPlan
from hf_cka.modeling.probe import align
from hf_cka.modeling.surgery import apply_plan
from tests.tiny import tiny_batch, tiny_model

MIXED = {"removed_attention": (0,), "removed_mlp": (3,), "kept_units": {1: range(7)}, "kept_groups": {2: (1,)}}
FAMILIES = ("llama", "gemma2", "phi3", "gpt2")
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


def pruned(model_type="llama", **changes):
    plan = PruningPlan(num_layers=4, model_type=model_type, **MIXED)
    return apply_plan(tiny_model(model_type, **changes), plan)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_beam_and_assisted_generation(model_type):
    model, batch = pruned(model_type), tiny_batch(batch=1)
    plain = model.generate(**batch, **GREEDY, use_cache=False)
    beams = model.generate(**batch, **GREEDY, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **GREEDY, num_beams=3, use_cache=False))
    # the pruned model drafts for the dense one, and the other way round: the text is that of the main model
    dense = tiny_model(model_type)
    assert torch.equal(model.generate(**batch, **GREEDY, assistant_model=dense), plain)
    expected = dense.generate(**batch, **GREEDY)
    assert torch.equal(dense.generate(**batch, **GREEDY, assistant_model=model), expected)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_left_padding_changes_nothing(model_type):
    model = pruned(model_type)
    ids = tiny_batch(batch=1, length=6)["input_ids"]
    padded = {
        "input_ids": torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1),
        "attention_mask": torch.tensor([[0] * 3 + [1] * 6]),
    }
    alone = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0, 6:]
    assert torch.equal(model.generate(**padded, **GREEDY)[0, 9:], alone)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(model_type):
    gradients = []
    for switch in (False, True):
        model = pruned(model_type).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if switch:
            model.gradient_checkpointing_enable()
        model(**tiny_batch(), labels=tiny_batch()["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("model_type", [*FAMILIES, "bert"])
def test_attention_implementations_can_be_switched(model_type):
    model = pruned(model_type)
    with torch.no_grad():
        sdpa = model(**tiny_batch(pad="left")).logits
        model.set_attn_implementation("eager")
        assert model.config._attn_implementation == "eager"
        eager = model(**tiny_batch(pad="left"), output_attentions=True)
    real = tiny_batch(pad="left")["attention_mask"].bool()
    assert torch.allclose(eager.logits[real], sdpa[real], atol=1e-4 * float(sdpa.abs().max()))
    # one per layer that has attention
    assert len([a for a in eager.attentions if a is not None]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_compiles_without_a_graph_break(model_type):
    model, batch = pruned(model_type), tiny_batch()
    with torch.no_grad():
        expected = model(**batch, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = compiled(**batch, use_cache=False).logits
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))


def test_device_map_auto_and_bfloat16(tmp_path):
    model = pruned()
    save_pruned(model, tmp_path / "out", verify=False)
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="auto")
    align(spread)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    with torch.no_grad():
        expected = model(**tiny_batch()).logits
        assert torch.equal(spread(**tiny_batch()).logits.cpu(), expected)
        assert (half(**tiny_batch()).logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_resize_token_embeddings(tmp_path):
    model = pruned()
    model.resize_token_embeddings(100)
    save_pruned(model, tmp_path / "out", verify=False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] == loaded.config.vocab_size == 100


def test_trainer_trains_saves_and_resumes(tmp_path):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            ids = tiny_batch(batch=1, seed=index)["input_ids"][0]
            return {"input_ids": ids, "labels": ids}

    def train(model, steps, resume=None):
        arguments = TrainingArguments(
            tmp_path / f"run{steps}{bool(resume)}",
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Rows())
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = train(pruned(), 4)
    checkpoint = tmp_path / "run4False" / "checkpoint-2"
    resumed = train(AutoModelForCausalLM.from_pretrained(checkpoint), 4, resume=str(checkpoint))
    assert type(resumed).__name__ == "PrunedLlamaForCausalLM"
    for one, two in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.allclose(one, two, atol=1e-6)


def test_named_targets_of_an_adapter():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(pruned(), LoraConfig(target_modules=["q_proj", "down_proj"], r=2))
    names = model.targeted_module_names
    assert sum("q_proj" in n for n in names) == 3
    assert sum("down_proj" in n for n in names) == 3


def test_a_config_survives_copy_and_pickle(tmp_path):
    import copy
    import pickle

    model = pruned()
    again = pickle.loads(pickle.dumps(model.config))
    assert again.to_dict() == copy.deepcopy(model.config).to_dict() == model.config.to_dict()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(**tiny_batch()).logits, model(**tiny_batch()).logits)
