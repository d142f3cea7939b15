"""What a user relies on: the values are right for any shape and dtype, and degenerate layers are named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cka.similarity import RBF, SimilarityResult, cka, pairwise_similarity


def agree(features, oracle, atol, **kwargs):
    result = pairwise_similarity(features, **kwargs)
    for estimator in ("biased", "debiased"):
        want = [oracle(features[i], features[j], estimator) for i, j in result.pairs]
        np.testing.assert_allclose(getattr(result, estimator), want, atol=atol, rtol=0, err_msg=estimator)
    return result


SHAPES = [(32, 8), (48, 200), (5, 3), (4, 50), (600, 24), (300, 600)]


@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_match_the_oracle(n, width, dtype, stream, oracle):
    agree([x.to(dtype) for x in stream(n, width, 4)], oracle, 1e-9)


@pytest.mark.parametrize("pairs", ["all", "consecutive"])
@pytest.mark.parametrize(("n", "width"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float32_products_stay_within_1e_5(n, width, pairs, dtype, stream, oracle):
    agree([x.to(dtype) for x in stream(n, width, 4)], oracle, 1e-5, precision="fp32", pairs=pairs)


def with_massive_dimension(layers):
    return [torch.cat([x, 1e4 * x[:, :1] ** 2], dim=1) for x in layers]


def with_large_mean(layers):
    """Centred norm 0.2 % of the total norm, as in the first layers of sentence encoders at the CLS token."""
    out = []
    for x in layers:
        x = x - x.mean(0)
        mean = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(1))
        out.append(x + mean * (500 * x.norm() / len(x) ** 0.5 / mean.norm()))
    return out


def with_sink_token(layers):
    out = [x.clone() for x in layers]
    for x in out:
        x[3] *= 165
    return out


HARD = {
    "massive dimension": with_massive_dimension,
    "large mean": with_large_mean,
    "sink token": with_sink_token,
    "scaled by 1e-3": lambda layers: [1e-3 * x for x in layers],
    "scaled by 1e-20": lambda layers: [1e-20 * x for x in layers],
    "scaled by 1e20": lambda layers: [1e20 * x for x in layers],
}


HARD_CASES = [
    (case, n, width, precision)
    for case in HARD
    for n, width in ((200, 128), (600, 20))
    for precision in ("auto", "fp32")
    # float32 in feature space loses digits beside an outlier: "auto" repeats those in float64
    if (case, n, precision) != ("sink token", 600, "fp32")
]


@pytest.mark.parametrize(("case", "n", "width", "precision"), HARD_CASES)
def test_hard_features_match_the_oracle(case, n, width, precision, stream, oracle):
    layers = HARD[case](stream(n, width, 3))
    result = agree(layers, oracle, 1e-5, precision=precision, pairs="consecutive" if n > 500 else "all")
    assert result.status == (("outlier_dominated" if case == "sink token" else "ok"),) * 3


def test_float16_features_that_overflow_when_squared(oracle):
    x = 3e4 * torch.rand(64, 32, generator=torch.Generator().manual_seed(0)).half()
    y = x.flip(1) + x
    agree([x, y.clamp(max=6e4)], oracle, 1e-5, precision="fp32")


def test_large_sums_repeat_in_float64_when_float32_would_show(stream, oracle, monkeypatch):
    """One sample with nearly all energy leaves float32 nothing to debias; auto notices and starts again."""
    monkeypatch.setattr("hf_cka.similarity.planner._CHEAP", 0)
    layers = stream(200, 16, 4)
    layers[2] = layers[2].clone()
    layers[2][7] *= 3e3
    result = agree(layers, oracle, 1e-5)
    assert result.plan.precision == "fp32"
    assert result.plan.repeated == (2,)
    assert "layers 2 again in fp64" in str(result.plan)


def test_widths_may_differ_and_pairs_be_chosen(stream, oracle):
    narrow, wide = stream(40, 5, 2), stream(40, 70, 2, seed=1)
    result = agree(narrow + wide, oracle, 1e-9, pairs=[(0, 2), (3, 1), (0, 0)])
    assert result.pairs == ((0, 2), (3, 1), (0, 0))
    assert result.values[2] == pytest.approx(1, abs=1e-12)
    matrix = result.matrix()
    assert matrix[1, 3] == matrix[3, 1] == result.values[1]
    assert np.isnan(matrix[0, 1])


@pytest.mark.parametrize("kernel", ["rbf", RBF(0.3)])
@pytest.mark.parametrize(("n", "width"), [(30, 4), (300, 90)])
def test_rbf_matches_the_oracle(kernel, n, width, stream, oracle):
    layers = stream(n, width, 3)
    bandwidth = 0.8 if kernel == "rbf" else kernel.bandwidth
    result = pairwise_similarity(layers, kernel=kernel)
    for estimator in ("biased", "debiased"):
        want = [oracle(layers[i], layers[j], estimator, bandwidth) for i, j in result.pairs]
        np.testing.assert_allclose(getattr(result, estimator), want, atol=1e-7)


def test_a_wide_rbf_kernel_tends_to_the_linear_one(stream):
    x, y = stream(60, 10, 2)
    assert cka(x, y, kernel=RBF(300.0)) == pytest.approx(cka(x, y), abs=1e-4)
    assert cka(x, y, kernel=RBF(0.5)) != pytest.approx(cka(x, y), abs=1e-2)


def test_independent_gaussians_are_unrelated_only_after_debiasing():
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(128, 4096, generator=g), torch.randn(128, 4096, generator=g)
    result = pairwise_similarity([x, y])
    assert abs(result.debiased[0]) < 3 * result.standard_error[0]
    assert result.standard_error[0] < 0.05
    assert result.biased[0] > 0.95


matrices = st.builds(
    lambda n, p, seed: torch.randn(n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64),
    st.integers(4, 60),
    st.integers(1, 40),
    st.integers(0, 2**31),
)


@settings(max_examples=40, deadline=None)
@given(matrices, st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(-1e3, 1e3), st.sampled_from(["linear", "rbf"]))
def test_rotation_scale_shift_and_order_do_not_matter(x, seed, scale, shift, kernel):
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(len(x), 7, generator=g, dtype=torch.float64) + x[:, :1]
    rotation = torch.linalg.qr(torch.randn(x.shape[1], x.shape[1], generator=g, dtype=torch.float64))[0]
    order = torch.randperm(len(x), generator=g)
    changed = (scale * (x @ rotation) + shift)[order]
    for estimator in ("biased", "debiased"):
        before = cka(x, y, estimator=estimator, kernel=kernel)
        assert cka(changed, y[order], estimator=estimator, kernel=kernel) == pytest.approx(before, abs=1e-6)
        assert cka(y[order], changed, estimator=estimator, kernel=kernel) == pytest.approx(before, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(matrices, st.sampled_from(["linear", "rbf"]))
def test_similarity_with_itself_is_one_and_nothing_exceeds_it(x, kernel):
    y = x.flip(0) + x
    for estimator in ("biased", "debiased"):
        assert cka(x, x, estimator=estimator, kernel=kernel) == pytest.approx(1, abs=1e-9)
        assert abs(cka(x, y, estimator=estimator, kernel=kernel)) <= 1 + 1e-9


def test_standard_error_covers_the_truth():
    """95 % intervals from 128 samples hold the value of a very large sample in about 95 % of the draws."""
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 20, generator=g), torch.randn(6, 12, generator=g)

    def draw(n):
        z = torch.randn(n, 6, generator=g)
        left = z @ a + 0.5 * torch.randn(n, 20, generator=g)
        return [left, torch.tanh(z @ b) + 0.7 * torch.randn(n, 12, generator=g)]

    truth = pairwise_similarity(draw(200_000), standard_error=False).values[0]
    results = [pairwise_similarity(draw(128)) for _ in range(300)]
    values, errors = (np.array([getattr(r, k)[0] for r in results]) for k in ("values", "standard_error"))
    assert 0.9 <= np.mean(np.abs(values - truth) < 1.96 * errors) <= 0.985
    assert 0.85 < errors.mean() / values.std() < 1.15


@pytest.mark.parametrize("n", [70, 700])
def test_standard_error_does_not_depend_on_the_way_of_computing(n, stream, monkeypatch):
    layers = stream(n, 12, 4)
    results = []
    for sample_cost, feature_cost in ((0, 1), (1, 0)):
        monkeypatch.setattr("hf_cka.similarity.planner.costs", lambda *_, s=sample_cost, f=feature_cost: (s, f))
        results.append(pairwise_similarity(layers))
        results.append(pairwise_similarity(layers, pairs="consecutive"))
    assert [r.plan.space for r in results] == ["sample", "sample", "feature", "feature"]
    dense, sparse, *feature = results
    for field in ("biased", "debiased", "standard_error"):
        np.testing.assert_allclose(getattr(feature[0], field), getattr(dense, field), atol=1e-10)
        np.testing.assert_allclose(getattr(feature[1], field), getattr(sparse, field), atol=1e-10)
        picked = [dense.pairs.index(pair) for pair in sparse.pairs]
        np.testing.assert_allclose(getattr(sparse, field), getattr(dense, field)[picked], atol=1e-10)


def test_memory_sets_the_tiles_and_not_the_values(stream):
    layers = stream(500, 64, 6)
    plenty = pairwise_similarity(layers)
    little = pairwise_similarity(layers, memory=700_000)
    assert little.plan.tile < plenty.plan.tile
    assert not little.plan.keep_centred
    assert little.plan.memory <= 700_000
    np.testing.assert_allclose(little.values, plenty.values, atol=1e-12)
    np.testing.assert_allclose(little.standard_error, plenty.standard_error, atol=1e-12)
    with pytest.raises(ValueError, match=r"memory=1000 bytes is too little: .* need at least \d+"):
        pairwise_similarity(layers, memory=1000)


def test_peak_memory_stays_within_the_bound():
    """In a fresh process, whose peak resident size nothing else has raised."""
    import subprocess
    import sys

    code = """
import resource, torch
from hf_cka.similarity import pairwise_similarity
torch.set_num_threads(1)
layers = [torch.randn(3000, 64) for _ in range(12)]
pairwise_similarity([x[:64] for x in layers])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
plan = pairwise_similarity(layers, memory=24 << 20).plan
print(plan.memory, peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    planned, used = map(int, run.stdout.split())
    assert planned <= 24 << 20
    # the whole Gram matrices of 12 layers would be 432 MB; allow the allocator some slack
    assert used < (24 << 20) + (24 << 20)


def test_constant_and_noise_layers_get_a_status_instead_of_a_number(stream):
    layers = stream(64, 16, 3)
    layers.insert(1, torch.full((64, 8), 0.1))
    layers.append((100 + 1e-3 * layers[0]).bfloat16())
    # equal in exact arithmetic, apart by float32 rounding of a forward pass
    layers.append(0.1 + 1e-8 * layers[0])
    result = pairwise_similarity(layers)
    assert result.status == ("ok", "constant", "ok", "ok", "constant", "low_signal")
    broken = {1, 4, 5}
    for (i, j), value, biased, error in zip(
        result.pairs, result.values, result.biased, result.standard_error, strict=True
    ):
        expected = bool({i, j} & broken)
        assert np.isnan(value) == np.isnan(biased) == np.isnan(error) == expected
    diagonal = np.diag(result.matrix())
    assert np.isnan(diagonal[list(broken)]).all()
    assert (diagonal[[0, 2, 3]] == 1).all()


def test_low_signal_is_relative_to_the_resolution_of_the_input():
    g = torch.Generator().manual_seed(0)
    x = 1 + 4e-3 * torch.randn(100, 32, generator=g)
    result = pairwise_similarity([x, x.bfloat16()])
    assert result.status == ("ok", "low_signal")
    assert result.diagnostics[0]["signal_ratio"] == pytest.approx(4e-3, rel=0.1)


def test_equidistant_samples_have_nothing_to_debias():
    result = pairwise_similarity([torch.eye(20), torch.randn(20, 5)])
    assert result.status[0] == "low_signal"
    assert np.isnan(result.debiased[0])
    assert 0 < result.biased[0] < 1


def test_diagnostics_say_how_many_dimensions_and_who_dominates(stream):
    g = torch.Generator().manual_seed(0)
    isotropic = torch.randn(5000, 10, generator=g)
    line = torch.randn(5000, 1, generator=g) * torch.ones(10)
    outlier = isotropic.clone()
    outlier[17] *= 1e4
    result = pairwise_similarity([isotropic, line, outlier], pairs="consecutive")
    ratios = [d["participation_ratio"] for d in result.diagnostics]
    assert ratios == pytest.approx([10, 1, 1], rel=0.02)
    assert result.status == ("ok", "ok", "outlier_dominated")
    assert result.diagnostics[2]["top_sample_share"] > 0.99


def test_result_survives_json(stream):
    layers = [*stream(30, 6, 3), torch.ones(30, 2)]
    result = pairwise_similarity(layers, kernel="rbf")
    again = SimilarityResult.from_dict(json.loads(json.dumps(result.to_dict(), allow_nan=False)))
    for field in ("values", "biased", "debiased", "standard_error"):
        np.testing.assert_array_equal(getattr(again, field), getattr(result, field))
    for field in ("pairs", "status", "n", "estimator", "plan"):
        assert getattr(again, field) == getattr(result, field)
    for ours, theirs in zip(again.diagnostics, result.diagnostics, strict=True):
        np.testing.assert_equal(ours, theirs)
    with pytest.raises(ValueError, match="version 2"):
        SimilarityResult.from_dict({**result.to_dict(), "version": 2})


def test_biased_works_from_two_samples(oracle):
    g = torch.Generator().manual_seed(0)
    for n in (2, 3):
        x, y = torch.randn(n, 5, generator=g), torch.randn(n, 4, generator=g)
        assert cka(x, y, estimator="biased") == pytest.approx(oracle(x, y, "biased"), abs=1e-9)
        assert cka(x, y, estimator="biased", kernel="rbf") == pytest.approx(oracle(x, y, "biased", 0.8), abs=1e-6)
        result = pairwise_similarity([x, y], estimator="biased")
        assert np.isnan(result.debiased).all()
        assert np.isnan(result.standard_error).all()


def test_ambient_settings_do_not_change_the_values(stream):
    x, y = stream(300, 400, 2)
    before = pairwise_similarity([x, y], precision="fp32").values
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            after = pairwise_similarity([x.requires_grad_(), y], precision="fp32").values
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(before, after)


def test_features_are_left_as_they_were(stream):
    layers = stream(30, 6, 2)
    copies = [x.clone() for x in layers]
    pairwise_similarity(layers)
    assert all(torch.equal(x, c) for x, c in zip(layers, copies, strict=True))


def test_bf16_products_are_close(stream, oracle):
    agree(stream(300, 64, 3), oracle, 2e-3, precision="bf16")


BAD = [
    ({"x": torch.rand(1, 3), "y": torch.rand(1, 3)}, "1 sample: the debiased estimator needs at least 4"),
    ({"x": torch.rand(3, 3), "y": torch.rand(3, 3)}, "3 samples: .* or estimator='biased'"),
    ({"x": torch.rand(1, 3), "y": torch.rand(1, 3), "estimator": "biased"}, "1 sample: CKA needs at least 2"),
    ({"x": torch.rand(0, 3), "y": torch.rand(0, 3), "estimator": "biased"}, "0 samples"),
    ({"x": torch.rand(9, 3), "y": torch.rand(8, 3)}, r"features\[1\] has 8 samples and features\[0\] has 9"),
    ({"x": torch.rand(9, 3), "y": torch.rand(9, 3) / torch.zeros(3)}, r"features\[1\] holds 27 NaN or infinite values"),
    ({"x": torch.rand(9, 3), "y": torch.full((9, 3), float("nan"))}, r"the first: nan at sample 0, feature 0"),
    ({"x": torch.ones(9, 3), "y": torch.rand(9, 3)}, "x is constant over the 9 samples"),
    ({"x": torch.rand(9, 3), "y": torch.zeros(9, 3)}, "y is constant over the 9 samples"),
    ({"x": torch.eye(9), "y": torch.rand(9, 3)}, "x holds rounding noise only .* or no two"),
    ({"x": torch.rand(9, 3, 2), "y": torch.rand(9, 3)}, r"features\[0\] has shape \(9, 3, 2\)"),
    ({"x": torch.rand(9, 0), "y": torch.rand(9, 3)}, "at least 1 feature"),
    ({"x": torch.ones(9, 3, dtype=torch.long), "y": torch.rand(9, 3)}, r"dtype torch.int64.*x.float\(\)"),
    ({"x": torch.rand(9, 3), "y": torch.rand(9, 3), "kernel": "rbff"}, "Unknown kernel 'rbff'. Did you mean: 'rbf'"),
    ({"x": torch.rand(9, 3), "y": torch.rand(9, 3), "estimator": "unbiased"}, "Unknown estimator 'unbiased'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_is_named_with_its_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        cka(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features": []}, "No features"),
        ({"features": [torch.rand(9, 3)]}, "needs at least 2 feature matrices; got 1"),
        ({"features": [torch.rand(9, 3)] * 2, "pairs": [(0, 2)]}, r"Pair \(0, 2\) is out of range"),
        ({"features": [torch.rand(9, 3)] * 2, "pairs": [(-1, 0)]}, r"Pair \(-1, 0\) is out of range"),
        ({"features": [torch.rand(9, 3)] * 2, "pairs": []}, "No pairs"),
        ({"features": [torch.rand(9, 3)] * 2, "pairs": "some"}, "Unknown pairs 'some'"),
        ({"features": [torch.rand(9, 3)] * 2, "precision": "tf32"}, "Unknown precision 'tf32'"),
        ({"features": [torch.rand(9, 3)] * 2, "precision": "bf16", "kernel": "rbf"}, "linear kernel only"),
        ({"features": [torch.empty(9, 3, device="meta")] * 2}, "meta device"),
    ],
)
def test_bad_lists_are_named_with_their_fix(arguments, message):
    with pytest.raises(ValueError, match=message):
        pairwise_similarity(**arguments)


def test_the_layer_without_spread_is_blamed_not_the_one_with_an_outlier():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    x[4] *= 100
    assert pairwise_similarity([x, x]).status == ("outlier_dominated",) * 2
    with pytest.raises(ValueError, match="y is constant"):
        cka(x, torch.ones(20, 3))


@pytest.mark.parametrize("bandwidth", [0, -1.0, float("inf"), float("nan")])
def test_bandwidth_must_be_positive(bandwidth):
    with pytest.raises(ValueError, match="must be positive"):
        RBF(bandwidth)
