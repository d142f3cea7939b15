"""When pruning happens: pure numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_cka import PruningSchedule


@given(st.integers(1, 20), st.integers(1, 200), st.sampled_from(["linear", "cubic"]))
def test_steps_ascend_and_all_is_done_at_the_last(events, length, shape):
    schedule = PruningSchedule(start=3, end=3 + length, events=events, shape=shape)
    if length + 1 < events:
        with pytest.raises(ValueError, match=f"events to at most {length + 1}"):
            schedule.points(500)
        return
    steps, shares = zip(*schedule.points(500), strict=True)
    assert steps[0] == 3
    assert list(steps) == sorted(set(steps))
    assert steps[-1] == (3 if events == 1 else 3 + length)
    assert list(shares) == sorted(shares)
    assert shares[-1] == 1.0


def test_units():
    halves = PruningSchedule(start=0.25, end=0.75, events=3, unit="part")
    assert [step for step, _ in halves.points(80)] == [20, 40, 60]
    assert [step for step, _ in PruningSchedule(start=1, end=2, events=2, unit="epochs").points(90, 30)] == [30, 60]
    assert PruningSchedule(events=4).points(100)[-1] == (50, 1.0)


def test_bad_schedules():
    with pytest.raises(ValueError, match="ends at step 120, but training ends at step 100"):
        PruningSchedule(start=2, end=4, events=2, unit="epochs").points(100, 30)
    with pytest.raises(ValueError, match="known length"):
        PruningSchedule(start=1, unit="epochs").points(100)
    with pytest.raises(ValueError, match="Did you mean: 'cubic'"):
        PruningSchedule(shape="cubick")
    with pytest.raises(ValueError, match="in order"):
        PruningSchedule(start=5, end=4)
    with pytest.raises(ValueError, match="events=0"):
        PruningSchedule(events=0)
