import pytest
import torch

from hf_cka.representations import Pooling, collect, stream_cka
from hf_cka.similarity import pairwise_similarity
from tests.tiny import DECODERS, ENCODERS, tiny_batch, tiny_model


def _hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
def test_every_layer_of_every_family_is_read(model_type):
    model = tiny_model(model_type)
    batch = tiny_batch(4)
    readouts = collect(model, [batch], pooling="mean", progress=False)
    assert len(readouts.inputs) == len(readouts.outputs) == 4
    assert all(matrix.shape == (4, 32) for matrix in readouts.outputs)
    # a layer's input is the very output of the layer before: stored once
    assert all(readouts.inputs[i + 1] is readouts.outputs[i] for i in range(3))
    features, pairs = readouts.distinct()
    assert len(features) == 5
    assert pairs == [(0, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2"])
def test_the_last_output_is_before_the_final_norm(model_type):
    model = tiny_model(model_type)
    batch = {"input_ids": tiny_batch(4)["input_ids"]}
    readouts = collect(model, [batch], pooling="last", progress=False)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    for layer in range(3):
        torch.testing.assert_close(readouts.outputs[layer], states[layer + 1][:, -1])
    assert not torch.allclose(readouts.outputs[3], states[4][:, -1])


def test_padding_side_and_batch_size_do_not_matter():
    model = tiny_model("llama")
    rows = [tiny_batch(1, length=length, seed=length) for length in (5, 7, 9, 12)]
    single = collect(model, rows, progress=False)

    def together(side: str) -> dict[str, torch.Tensor]:
        ids, mask = torch.zeros(4, 12, dtype=torch.long), torch.zeros(4, 12, dtype=torch.long)
        for i, row in enumerate(rows):
            n = row["input_ids"].shape[1]
            where = slice(0, n) if side == "right" else slice(12 - n, 12)
            ids[i, where], mask[i, where] = row["input_ids"][0], 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}

    for side in ("left", "right"):
        both = collect(model, [together(side)], progress=False)
        assert both.info.hash == single.info.hash
        for one, other in zip(single.outputs, both.outputs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_modes_come_back_and_hooks_go_even_after_an_error():
    model = tiny_model("llama").train()
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]

    def broken():
        yield tiny_batch(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(model, broken(), progress=False)
    assert [module.training for module in model.modules()] == before
    assert _hooks(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradient_checkpointing_is_read_once_per_layer():
    model = tiny_model("llama").train()
    plain = collect(model, [tiny_batch(4)], progress=False)
    model.gradient_checkpointing_enable()
    again = collect(model, [tiny_batch(4)], progress=False)
    assert all(torch.equal(a, b) for a, b in zip(plain.outputs, again.outputs, strict=True))
    assert model.is_gradient_checkpointing


def test_nothing_depends_on_the_class_of_a_projection():
    class Quantized(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner = [linear]  # hidden from the module tree, as packed weights are

        def forward(self, x):
            return self.inner[0](x)

    model = tiny_model("llama")
    plain = collect(model, [tiny_batch(4)], progress=False)
    for layer in model.model.layers:
        layer.mlp.down_proj = Quantized(layer.mlp.down_proj)
    again = collect(model, [tiny_batch(4)], progress=False)
    assert torch.equal(plain.outputs[3], again.outputs[3])


def test_a_device_map_with_offloading_works(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    plain = collect(model, [tiny_batch(4)], progress=False)
    model.save_pretrained(tmp_path)
    places = {f"model.layers.{i}": "disk" if i % 2 else "cpu" for i in range(4)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        device_map={"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        | places,
        offload_folder=tmp_path / "offload",
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    assert torch.equal(plain.outputs[3], collect(offloaded, [tiny_batch(4)], progress=False).outputs[3])


def test_half_precision_readouts_stay_small():
    model = tiny_model("llama").to(torch.bfloat16)
    assert collect(model, [tiny_batch(4)], progress=False).outputs[0].dtype == torch.bfloat16


def test_inputs_embeds_and_extra_labels_are_taken():
    model = tiny_model("llama")
    batch = tiny_batch(4)
    plain = collect(model, [batch], progress=False)
    embedded = {
        "inputs_embeds": model.model.embed_tokens(batch["input_ids"]).detach(),
        "attention_mask": batch["attention_mask"],
        "labels": batch["input_ids"],
    }
    assert torch.equal(plain.outputs[3], collect(model, [embedded], progress=False).outputs[3])


def test_streamed_tokens_equal_stored_tokens():
    model = tiny_model("llama")
    batches = [tiny_batch(4, length=20, seed=seed, pad=pad) for seed, pad in ((0, "left"), (1, "right"))]
    result, info = stream_cka(model, batches, pooling=Pooling("tokens"), progress=False)

    points: list[list[torch.Tensor]] = [[] for _ in range(5)]
    for batch in batches:
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        last = []
        handle = model.model.layers[3].register_forward_hook(
            lambda module, args, output, last=last: last.append(output)
        )
        with torch.no_grad():
            model(**batch)
        handle.remove()
        for point, state in zip(points, [*states[:4], last[0]], strict=True):
            point.append(state[batch["attention_mask"].bool()])
    features = [torch.cat(point) for point in points]
    expected = pairwise_similarity(features, pairs="consecutive", precision="fp64")
    assert result.n == expected.n == info.num_tokens == 2 * (4 * 20 - 4)
    assert info.num_samples == 8
    torch.testing.assert_close(torch.tensor(result.debiased), torch.tensor(expected.debiased), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "Calibration is empty"),
        ([tiny_batch(1)], "at least 2 samples, got 1"),
        (
            [{"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}],
            r"Batch 0 has rows that are all padding: \[1\]",
        ),
        ([["not a dict"]], "Batch 0 is a list"),
        ([{"text": "not tokenized"}], "its keys are: text"),
    ],
)
def test_bad_batches_are_named(batches, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        collect(model, batches, progress=False)
    assert _hooks(model) == 0


def test_nan_activations_name_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="output of layer 2 holds NaN or infinite"):
        collect(model, [tiny_batch(4)], progress=False)


def test_meta_weights_are_refused_with_the_fix():
    with torch.device("meta"):
        model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"meta device \(first: model.embed_tokens.weight\)"):
        collect(model, [tiny_batch(4)], progress=False)


def test_zero3_is_refused_with_the_command(monkeypatch):
    import transformers.integrations.deepspeed as integration

    monkeypatch.setattr(integration, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="hf-cka select"):
        collect(tiny_model("llama"), [tiny_batch(4)], progress=False)


def test_tokens_are_not_stored():
    with pytest.raises(ValueError, match="use stream_cka"):
        collect(tiny_model("llama"), [tiny_batch(4)], pooling="tokens", progress=False)
