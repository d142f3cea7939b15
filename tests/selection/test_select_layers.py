import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import XLMConfig, XLMModel

from hf_cka import LayerSelection, select_layers
from hf_cka.data import calibration
from hf_cka.representations import collect
from hf_cka.selection.record import ranking
from tests.tiny import DECODERS, ENCODERS, tiny_batch, tiny_model

ROOT = Path(__file__).parents[2]


def _batches(count: int = 4, **kwargs):
    return [tiny_batch(4, seed=seed, **kwargs) for seed in range(count)]


def _stories(assets, count: int = 48) -> list[str]:
    from hf_cka.data import load_rows

    rows = load_rows(str(assets / "lm" / "tinystories_a.jsonl"))
    # cut at different lengths: whole stories all end with a full stop, a constant readout
    chooser = random.Random(0)
    return [row["text"][: chooser.randint(60, 160)] for row in rows.select(range(count))]


def _biased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """The published formula, in float64."""
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_every_family_gives_a_selection_and_stays_as_it_was(model_type):
    model = tiny_model(model_type).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    selection = select_layers(model, _batches(), 0.5, progress=False)
    assert len(selection.layers) == 2
    assert selection.status == ("ok",) * 4
    assert model.training
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    modules = dict(model.named_modules())
    assert all(name in modules for name in selection.module_names())


def test_a_layer_that_changes_nothing_is_chosen_last_and_one_that_changes_all_first():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        for layer, size in enumerate((0.01, 0.0, 3.0, 0.01)):  # layer 1 is the identity
            for name in ("self_attn.o_proj", "mlp.down_proj"):
                model.model.layers[layer].get_submodule(name).weight.mul_(size)
    for criterion in ("cka", "block_influence"):
        selection = select_layers(model, _batches(), 0.25, criterion=criterion, progress=False)
        assert selection.layers == (2,)
        assert selection.scores[1] == min(selection.scores) == pytest.approx(0, abs=1e-6)
    assert 1 not in select_layers(model, _batches(), 0.75, progress=False).layers


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_paper_mode_is_the_published_rule(model_type):
    """arXiv 2602.05988: biased linear CKA at one token, floor(ratio * L), ties low, encoders never layer 0."""
    model = tiny_model(model_type, num_hidden_layers=5)
    batches = _batches()
    selection = select_layers(model, batches, 0.5, paper=True, progress=False)
    kind = "cls" if model_type == "bert" else "last"
    readouts = collect(model, batches, pooling=kind, progress=False)
    scores = [1 - _biased_cka(a, b) for a, b in zip(readouts.inputs, readouts.outputs, strict=True)]
    np.testing.assert_allclose([s for s in selection.scores if s is not None], scores[-len(scores) :], atol=1e-9)
    allowed = [i for i in range(5) if not (model_type == "bert" and i == 0)]
    assert selection.layers == tuple(sorted(sorted(allowed, key=lambda i: (-scores[i], i))[:2]))
    assert selection.settings["estimator"] == "biased"


def test_a_constant_readout_is_reported_and_never_first():
    """Every text ends with the same token: the first layer's input has no variance, and no CKA."""
    model = tiny_model("llama")
    batches = _batches()
    for batch in batches:
        for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            row[mask.nonzero()[-1]] = 7
    selection = select_layers(model, batches, 0.75, progress=False)
    assert selection.undefined == {0: "constant"}
    assert selection.layers == (1, 2, 3)
    assert "undefined: constant" in selection.table()
    assert select_layers(model, batches, 1.0, progress=False).layers == (0, 1, 2, 3)


def test_controls_need_no_data_and_share_the_interface():
    model = tiny_model("llama", num_hidden_layers=6)
    assert select_layers(model, keep_ratio=0.5, criterion="first").layers == (0, 1, 2)
    assert select_layers(model, keep_ratio=0.5, criterion="last").layers == (3, 4, 5)
    assert select_layers(model, keep_ratio=0.5, criterion="all").layers == tuple(range(6))
    drawn = {select_layers(model, keep_ratio=0.5, criterion="random", seed=seed).layers for seed in range(8)}
    assert len(drawn) > 2
    again = select_layers(model, keep_ratio=0.5, criterion="random", seed=3)
    assert again.layers == select_layers(model, keep_ratio=0.5, criterion="random", seed=3).layers
    assert again.settings["seed"] == 3


@pytest.mark.parametrize("count", [29, 30, 100])
def test_the_number_of_layers_is_the_floor_in_exact_arithmetic(count):
    model = tiny_model("llama", num_hidden_layers=count, hidden_size=8, intermediate_size=8, num_attention_heads=2)
    for percent in (10, 29, 50, 70, 100):
        chosen = select_layers(model, keep_ratio=percent / 100, criterion="first").layers
        assert len(chosen) == percent * count // 100


def test_ties_keep_the_lower_layer():
    assert ranking([0.5, None, 0.5 + 1e-9, 0.7, 0.1]) == [3, 0, 2, 4]


def test_excluded_layers_are_never_chosen():
    selection = select_layers(tiny_model("llama"), _batches(), 1.0, exclude=[3, 0], progress=False)
    assert selection.layers == (1, 2)


def test_one_pass_serves_several_choices():
    model = tiny_model("llama")
    readouts = collect(model, _batches(), progress=False)
    for criterion in ("cka", "block_influence"):
        again = select_layers(model, readouts, 0.5, criterion=criterion)
        assert again == select_layers(model, _batches(), 0.5, criterion=criterion, progress=False)
    with pytest.raises(ValueError, match="pooled by"):
        select_layers(model, readouts, pooling="mean")
    with pytest.raises(ValueError, match="readouts are of 4 layers, the model has 6"):
        select_layers(tiny_model("llama", num_hidden_layers=6), readouts)


def test_token_readouts_are_streamed():
    selection = select_layers(tiny_model("llama"), _batches(), 0.5, pooling="tokens", progress=False)
    assert len(selection.layers) == 2
    assert selection.settings["pooling"]["kind"] == "tokens"
    assert selection.calibration.num_samples == 16


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be above 0 and at most 1, got 0"),
        ({"keep_ratio": 1.5}, "got 1.5"),
        ({"keep_ratio": 0.2}, "of 4 layers keeps none; use at least 0.25"),
        ({"criterion": "ckaa"}, "Unknown criterion 'ckaa'. Did you mean: 'cka'"),
        ({"pooling": "median"}, "Unknown pooling 'median'"),
        ({"exclude": [4]}, r"exclude names layers \[4\], but the model has layers 0 to 3"),
        ({"paper": True, "criterion": "last"}, "paper=True is linear CKA"),
        ({"pooling": "tokens", "kernel": "rbf"}, "linear CKA only"),
    ],
)
def test_bad_settings_are_refused_before_the_data_is_read(kwargs, message):
    def batches():
        raise AssertionError("the data was read")
        yield

    with pytest.raises(ValueError, match=message):
        select_layers(tiny_model("llama"), batches(), **{"keep_ratio": 0.5, **kwargs}, progress=False)


def test_a_measured_criterion_asks_for_data():
    with pytest.raises(ValueError, match="pass calibration batches"):
        select_layers(tiny_model("llama"))


def test_too_few_samples_for_the_debiased_estimator():
    with pytest.raises(ValueError, match="3 samples: the debiased estimator needs at least 4"):
        select_layers(tiny_model("llama"), [tiny_batch(3)], progress=False)
    assert select_layers(tiny_model("llama"), [tiny_batch(3)], estimator="biased", progress=False).layers


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match="Linear has no config; hand in a model of transformers"):
        select_layers(torch.nn.Linear(2, 2), [tiny_batch(4)])
    loop = XLMModel(XLMConfig(emb_dim=8, n_layers=2, n_heads=2, vocab_size=16, max_position_embeddings=16))
    with pytest.raises(ValueError, match="No stack of layers was found in XLMModel"):  # it has no module per layer
        select_layers(loop, [tiny_batch(4, vocab=16)])


@pytest.mark.assets
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_real_model_gives_the_same_layers_for_any_batch_size(assets, stories, pooling):
    model, tokenizer = stories
    texts = _stories(assets)
    chosen = [
        select_layers(model, calibration(texts, tokenizer, batch_size=size), 0.4, pooling=pooling, progress=False)
        for size in (1, 4, 16)
    ]
    assert len({selection.layers for selection in chosen}) == 1
    assert len({selection.calibration.hash for selection in chosen}) == 1
    for other in chosen[1:]:
        np.testing.assert_allclose(chosen[0].scores, other.scores, atol=1e-5)


_WORKER = """
import sys
import torch.distributed as dist
from hf_cka import select_layers
from hf_cka.data import calibration
from transformers import AutoModelForCausalLM, AutoTokenizer
import json, pathlib
folder, texts, rank, mode, out, port = sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text()), *sys.argv[3:]
rank = int(rank)
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.pad_token = "<unk>"
model = AutoModelForCausalLM.from_pretrained(folder)
part = texts[rank::2] if mode == "sharded" else texts
selection = select_layers(model, calibration(part, tokenizer, batch_size=4), 0.4, progress=False)
pathlib.Path(out).write_text(json.dumps(selection.to_dict()))
dist.destroy_process_group()
"""


@pytest.mark.assets
@pytest.mark.parametrize("mode", ["sharded", "same"])
def test_two_processes_choose_what_one_chooses(assets, stories, tmp_path, mode):
    import json
    import socket

    model, tokenizer = stories
    texts = _stories(assets)
    alone = select_layers(model, calibration(texts, tokenizer, batch_size=4), 0.4, progress=False)
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(assets / "models" / "stories260k_hf")
    common = [sys.executable, "-c", _WORKER, folder, str(tmp_path / "texts.json")]
    workers = [
        subprocess.Popen(
            [*common, str(rank), mode, str(tmp_path / f"{rank}.json"), str(port)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    for rank in range(2):
        selection = LayerSelection.from_dict(json.loads((tmp_path / f"{rank}.json").read_text()))
        assert selection.layers == alone.layers
        assert selection.calibration.num_samples == alone.calibration.num_samples == len(texts)
        assert selection.calibration.hash == alone.calibration.hash
        np.testing.assert_allclose(selection.scores, alone.scores, atol=1e-6)
