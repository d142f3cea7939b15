"""Streaming is exact: any split, any order of merging, any process."""

from __future__ import annotations

import functools
import io
import itertools
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_cka.similarity import StreamingCKA, pairwise_similarity


def features(n: int = 700, seed: int = 0) -> list[torch.Tensor]:
    """Four layers of different width, mean and scale."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 12, generator=g)
    y = torch.tanh(x @ torch.randn(12, 7, generator=g))
    return [x + 50, 1e-3 * y, 1e3 * (x[:, :5] + 0.3 * torch.randn(n, 5, generator=g)), torch.cat([x, y], 1)]


def same(result, reference, atol=1e-11):
    assert result.pairs == reference.pairs
    assert result.status == reference.status
    assert result.n == reference.n
    np.testing.assert_allclose(result.biased, reference.biased, atol=atol)
    np.testing.assert_allclose(result.debiased, reference.debiased, atol=atol)
    for ours, theirs in zip(result.diagnostics, reference.diagnostics, strict=True):
        share, exact = ours["top_sample_share"], theirs["top_sample_share"]
        if exact < 0.5:  # rows are not kept, so a lower bound, see StreamingCKA
            assert share <= exact * (1 + 1e-9)
            ours, theirs = {**ours, "top_sample_share": 0}, {**theirs, "top_sample_share": 0}
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-8)


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.integers(0, 700), max_size=12),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
    st.sampled_from(["all", "consecutive", [(3, 0), (1, 1)]]),
)
def test_streaming_equals_in_memory_for_any_split_and_merge_order(cuts, parts, random, pairs):
    layers = features()
    bounds = [0, *sorted(cuts), 700]
    batches = [[x[a:b] for x in layers] for a, b in itertools.pairwise(bounds)]
    random.shuffle(batches)
    streams = [StreamingCKA(4, pairs) for _ in range(parts)]
    for batch in batches:
        random.choice(streams).update(batch)
    while len(streams) > 1:
        random.shuffle(streams)
        streams.append(streams.pop().merge(streams.pop()))
    same(streams[0].result(), pairwise_similarity(layers, pairs=pairs, precision="fp64", standard_error=False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(dtype):
    layers = [x.to(dtype) for x in features()]
    stream = StreamingCKA(4)
    for batch in zip(*(x.split(100) for x in layers), strict=True):
        stream.update(batch)
    same(stream.result(), pairwise_similarity(layers, pairs="consecutive", precision="fp64"))


def test_a_first_batch_far_from_the_rest_does_no_harm():
    """Sums about a fixed point chosen from the first batch would lose all digits here."""
    layers = [torch.cat([1e6 + x[:3], x]) for x in features()]
    stream = StreamingCKA(4, "all")
    for rows in (slice(0, 3), slice(3, 600), slice(600, 703)):
        part = StreamingCKA(4, "all")
        part.update([x[rows] for x in layers])
        stream.merge(part)
    same(stream.result(), pairwise_similarity(layers, precision="fp64", standard_error=False), atol=1e-8)


@pytest.mark.parametrize("send", ["pickle", "state_dict", "torch.save"])
def test_parts_travel_between_processes(send):
    layers = features()
    parts = []
    for start in range(0, 700, 250):
        part = StreamingCKA(4)
        part.update([x[start : start + 250] for x in layers])
        parts.append(part)
    parts.append(StreamingCKA(4))  # a rank that saw nothing

    def travel(part):
        if send == "pickle":
            return pickle.loads(pickle.dumps(part))
        state = part.state_dict()
        if send == "torch.save":
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        return StreamingCKA.from_state_dict(state)

    merged = functools.reduce(StreamingCKA.merge, map(travel, parts), StreamingCKA(4))
    assert merged.n == 700
    same(merged.result(), pairwise_similarity(layers, pairs="consecutive", precision="fp64"))


def test_results_can_be_read_while_streaming_goes_on():
    layers = features()
    stream = StreamingCKA(4)
    other = StreamingCKA(4)
    other.update([x[300:500] for x in layers])
    stream.update([x[:300] for x in layers])
    same(stream.result(), pairwise_similarity([x[:300] for x in layers], pairs="consecutive", precision="fp64"))
    stream.merge(other)
    stream.update([x[500:] for x in layers])
    same(stream.result(), pairwise_similarity(layers, pairs="consecutive", precision="fp64"))
    # the part that was merged is unchanged
    part = [x[300:500] for x in layers]
    same(other.result(), pairwise_similarity(part, pairs="consecutive", precision="fp64"))


def test_memory_does_not_grow_with_the_batches():
    def held(stream: StreamingCKA) -> int:
        return len(pickle.dumps(stream))

    layers = features(512)
    stream = StreamingCKA(4)
    stream.update(layers)
    once = held(stream)
    for _ in range(20):
        stream.update(layers)
    assert stream.n == 21 * 512
    assert held(stream) == pytest.approx(once, rel=0.01)


def test_batches_may_reuse_their_buffers():
    layers = features(60)
    stream = StreamingCKA(4)
    buffers = [torch.empty(20, x.shape[1]) for x in layers]
    for start in range(0, 60, 20):
        for buffer, x in zip(buffers, layers, strict=True):
            buffer.copy_(x[start : start + 20])
        stream.update(buffers)
    same(stream.result(), pairwise_similarity(layers, pairs="consecutive", precision="fp64"))


def test_degenerate_layers_have_the_same_status_as_in_memory():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(90, 5, generator=g)
    outlier = x.clone()
    outlier[40] *= 300
    layers = [x, torch.full((90, 3), 0.1), (10 + 0.01 * x).bfloat16(), outlier]
    stream = StreamingCKA(4)
    for batch in zip(*(x.split(7) for x in layers), strict=True):
        stream.update(batch)
    result = stream.result()
    assert result.status == ("ok", "constant", "low_signal", "outlier_dominated")
    assert np.isnan(result.values).all()
    same(result, pairwise_similarity(layers, pairs="consecutive", precision="fp64"))


def test_biased_from_two_samples():
    layers = features(2)
    stream = StreamingCKA(4)
    stream.update(layers)
    with pytest.raises(ValueError, match="2 samples so far: the debiased estimator needs at least 4"):
        stream.result()
    np.testing.assert_allclose(stream.result("biased").values, 1, atol=1e-9)


def test_bad_updates_are_named_and_add_nothing():
    layers = features(50)
    stream = StreamingCKA(4)
    stream.update(layers)
    bad = [x.clone() for x in layers]
    bad[2][3, 1] = float("inf")
    with pytest.raises(ValueError, match=r"features\[2\] holds 1 NaN or infinite value\."):
        stream.update(bad)
    with pytest.raises(ValueError, match="Got 3 feature matrices; this StreamingCKA was made for 4"):
        stream.update(layers[:3])
    with pytest.raises(ValueError, match=r"features\[1\] has width 6; it was 7 before"):
        stream.update([layers[0], layers[1][:, :6], *layers[2:]])
    with pytest.raises(ValueError, match=r"features\[3\] has 9 samples and features\[0\] has 50"):
        stream.update([*layers[:3], layers[3][:9]])
    with pytest.raises(ValueError, match="Cannot merge: 4 layers with 3 pairs, and 4 layers with 6 pairs"):
        stream.merge(StreamingCKA(4, "all"))
    with pytest.raises(ValueError, match="version None"):
        StreamingCKA.from_state_dict({})
    assert stream.n == 50
    same(stream.result(), pairwise_similarity(layers, pairs="consecutive", precision="fp64"))


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="0 samples so far"):
        StreamingCKA(3).result()
    with pytest.raises(ValueError, match="needs at least 2 feature matrices; got 1"):
        StreamingCKA(1)
