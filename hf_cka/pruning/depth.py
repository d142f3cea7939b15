"""Depth pruning: remove layers or sub-layers, the least important first, scoring again on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from hf_cka.modeling.surgery import apply_plan
from hf_cka.pruning.criteria.base import CriterionEntry, DepthScores, Structure, check_usable, score
from hf_cka.pruning.criteria.depth import DEPTH
from hf_cka.pruning.criteria.leave_one_out import calls_of, is_chain
from hf_cka.pruning.removable import TooLittleError
from hf_cka.pruning.state import Run, sharing_copy

# A lazy run scores this many structures again in one pass; they share the model's own pass.
LAZY_BATCH = 6
# A structure is scored again while its old score times this is below the best new one. A removal changes the other
# scores in both directions: on SmolLM2, over seven removals, by factors from 0.6 to 2.6 with a median near 1.
LAZY_SLACK = 0.7


def prune_depth(run: Run) -> None:
    """Carry a run of depth pruning to its end.

    Args:
        run: as far as it got; finished steps are not done again.

    Raises:
        ValueError: for an unreachable ratio or count, or what the criterion raises; before the model is changed.
    """
    entry = DEPTH[run.config.criterion or ""]
    check_reachable(run, entry)
    for _ in remaining_steps(run):
        if run.config.contiguous:
            _one_run(run, entry)
        elif run.config.steps is None:
            _one_structure(run, entry)
        else:
            _one_share(run, entry)


def check_reachable(run: Run, entry: CriterionEntry) -> None:
    """Refuse what cannot be reached or scored.

    Raises:
        ValueError: naming the reachable range, or what the criterion lacks.
    """
    if run.history.steps:
        return  # it was checked at the start; the rest of the way is always there
    config = run.config
    pool = run.candidates()
    if not pool:
        raise ValueError(run.removable.why_none(run.kinds, run.protected()))
    check_usable(entry, run.context(), pool)
    for kind in dict.fromkeys(s.kind for s in pool):
        some = [s for s in pool if s.kind == kind][:1]
        apply_plan(sharing_copy(run.model), run.removable.plan(some))  # a trial: is surgery able to do it here?
    all_of_them = run.removable.most(pool)
    if config.num_layers is not None:
        if config.num_layers > len(all_of_them):
            raise ValueError(
                f"num_layers={config.num_layers}: at most {len(all_of_them)} of the model's "
                f"{'layers' if {s.kind for s in pool} == {'layer'} else 'sub-layers'} can be removed."
            )
        return
    smallest = min(run.removable.parameters([s]) for s in pool)
    largest = run.removable.parameters(all_of_them)
    total = run.history.parameters
    if not smallest / 2 <= run.need <= largest + smallest / 2:
        refused = TooLittleError if run.need < smallest / 2 else ValueError
        raise refused(
            f"ratio={config.ratio} cannot be reached by removing {config.structures} here: from {smallest / total:.4f} "
            f"(the smallest of them) to {largest / total:.4f} (all that can go) of {total:,} parameters. Choose a "
            "ratio in that range, another kind of structures, or fewer protected layers."
        )


def remaining_steps(run: Run) -> Iterator[int]:
    """Yield the numbers of the steps that are left to do, until the target is reached."""
    while True:
        done = len(run.history.steps)
        if run.config.steps is not None:
            if done >= run.config.steps:
                return
        elif run.config.num_layers is not None:
            if done >= run.config.num_layers:
                return
        elif not _affordable(run):
            return
        yield done + 1


def _one_structure(run: Run, entry: CriterionEntry) -> None:
    """Score, and remove the least important structure that the need allows."""
    scores = score_structures(run, entry, _affordable(run))
    _remove(run, [scores.weakest()], scores)


def score_structures(run: Run, entry: CriterionEntry, structures: Sequence[Structure]) -> DepthScores:
    """Score structures, lazily where the config and the criterion allow it.

    Args:
        run: as far as it got; its history holds the old scores.
        entry: the criterion.
        structures: by current index.

    Returns:
        Scores of the structures that can be the least important.
    """
    lazy = entry.lazy and run.config.rescore == "lazy" and run.config.order == "normal"
    old = _old_scores(run, structures) if lazy else {}
    return lazily(lambda some: score(entry, run.context(), some, run.config.order), structures, old)


def _affordable(run: Run) -> list[Structure]:
    return run.removable.affordable(run.candidates(), run.need, run.config.reach)


def _one_share(run: Run, entry: CriterionEntry) -> None:
    """Score once, and remove the step's share of the whole."""
    pool = run.candidates()
    scores = score(entry, run.context(), pool, run.config.order)
    chosen = run.removable.take(scores.ranking(), _share(run), run.config.reach, _share_count(run))
    if chosen:
        _remove(run, chosen, scores)
    else:
        run.record("depth", (), None, {})


def _one_run(run: Run, entry: CriterionEntry) -> None:
    """Remove the step's share of layers as the run of neighbours that matters least together."""
    count = _share_count(run)
    if count is None:
        single = run.candidates()
        size = sum(run.removable.parameters([s]) for s in single) / len(single)
        exact = _share(run) / size
        count = {"nearest": round(exact), "at_least": math.ceil(exact), "at_most": math.floor(exact)}[run.config.reach]
    if count < 1:
        run.record("depth", (), None, {})
        return
    pool = run.candidates(count)
    if not pool:
        raise ValueError(f"There is no run of {count} layers left. Give more steps, or a smaller ratio.")
    scores = score(entry, run.context(), pool, run.config.order)
    _remove(run, [scores.weakest()], scores)


def _share(run: Run) -> float:
    """Parameters that should be gone after this step and are not."""
    if run.config.ratio is None:
        return math.inf
    assert run.config.steps is not None
    done = (len(run.history.steps) + 1) / run.config.steps
    return run.config.ratio * run.history.parameters * done - run.removed


def _share_count(run: Run) -> int | None:
    """Structures to remove in this step, where the config counts them."""
    if run.config.num_layers is None:
        return None
    assert run.config.steps is not None
    gone = sum(len(step.removed) for step in run.history.steps)
    return round(run.config.num_layers * (len(run.history.steps) + 1) / run.config.steps) - gone


def lazily(
    scorer: Callable[[Sequence[Structure]], DepthScores],
    structures: Sequence[Structure],
    old: Mapping[Structure, float],
) -> DepthScores:
    """Score only the structures that can still be the least important, going by their old scores.

    Args:
        scorer: scores any of them.
        structures: all of them.
        old: scores from before; structures without one are always scored.

    Returns:
        The scores of those that were scored; the least important of all is among them, if no importance fell below
        ``LAZY_SLACK`` times the old one.

    Source: the lazy evaluation of greedy algorithms of Minoux (1978), with slack, because an importance measured
        against a changing reference need not grow.

    Example:
        >>> new = {Structure("layer", i): float(abs(i - 7)) for i in range(20)}
        >>> scored = lazily(lambda some: DepthScores(tuple(some), tuple(new[s] for s in some)), list(new), new)
        >>> str(scored.weakest()), len(scored.structures)
        ('layer 7', 6)
    """
    fresh: DepthScores | None = None
    waiting = sorted(structures, key=lambda s: (old.get(s, -math.inf), s.layer))
    while waiting:
        bound = old.get(waiting[0], -math.inf)
        if fresh is not None and min(fresh.importance) <= bound * LAZY_SLACK:
            break
        unknown = sum(s not in old for s in waiting)
        now, waiting = waiting[: max(LAZY_BATCH, unknown)], waiting[max(LAZY_BATCH, unknown) :]
        fresh = scorer(now) if fresh is None else fresh.joined(scorer(now))
    assert fresh is not None
    return fresh


def _old_scores(run: Run, structures: Sequence[Structure]) -> dict[Structure, float]:
    """The last score of structures that had one, by current index."""
    by_name: dict[str, float] = {}
    for step in run.history.steps:
        if step.branch == "width":
            by_name.clear()  # it changed every layer
        by_name.update(step.scores)
    names = {s: run.in_words([s])[0] for s in structures}
    return {s: by_name[name] for s, name in names.items() if name in by_name}


def _remove(run: Run, chosen: Sequence[Structure], scores: DepthScores) -> None:
    value = decisive(run, chosen, scores)
    names, table, calls = run.in_words(chosen), named(run, scores), counted(run, scores)
    notes, details = notes_of(run, scores), details_of(run, scores)
    run.remove(chosen)
    run.record("depth", names, value, table, notes=notes, layer_calls=calls, details=details)


def decisive(run: Run, chosen: Sequence[Structure], scores: DepthScores) -> float:
    """Return the highest importance of what was chosen.

    Raises:
        ValueError: if it is undefined, so that nothing is left to remove.
    """
    value = max(scores.of(s) for s in chosen)
    if math.isinf(value):
        raise ValueError(
            f"Nothing is left that {run.config.criterion!r} would remove after {len(run.history.steps)} steps "
            f"({'; '.join(notes_of(run, scores)[:3])}). Choose a smaller ratio or another criterion."
        )
    return value


def counted(run: Run, scores: DepthScores) -> tuple[int, int]:
    """Return the layer calls that scoring took, and what all candidates would have taken, in one pass."""
    length = scores.structures[0].length
    in_full = calls_of(run.anatomy.num_layers, run.candidates(length), is_chain(run.anatomy)) * scores.chunks
    return scores.layer_calls, in_full


def named(run: Run, scores: DepthScores) -> dict[str, float]:
    """Return the scores by original name; a run of layers goes by its first."""
    return {run.in_words([s])[0]: v for s, v in zip(scores.structures, scores.importance, strict=True)}


def details_of(run: Run, scores: DepthScores) -> dict[str, dict[str, float]]:
    """Return the further numbers by original name, without those that are undefined."""
    names = [run.in_words([s])[0] for s in scores.structures]
    return {
        what: {name: v for name, v in zip(names, values, strict=True) if not math.isnan(v)}
        for what, values in scores.details.items()
    }


def notes_of(run: Run, scores: DepthScores) -> list[str]:
    """Return the notes with original names."""
    return [f"{run.in_words([s])[0] if isinstance(s, Structure) else s}: {note}" for s, note in scores.notes.items()]
