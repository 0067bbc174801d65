"""
What the contract suite asks of a run: each check is a function of what is left of it.

`test_contract.py` asks it of every registered method, `test_suite.py` of toys that must not pass.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dsel_trl.core.composition import Composition
from tests import tiny
from tests.contract.bench import Baseline, Finished
from tests.contract.decisions import Pick, Plan
from tests.contract.gaps import missing

# How often a plan or a pick is drawn anew, and how many deviations from mere chance are none of chance's doing.
DRAWS, DEVIATIONS = 256, 6.0
# Share of their norm by which parameters differ that were trained differently: rounding alone gives some 1e-7.
CHANGE = 1e-5


def assert_sound(trace: tiny.Trace) -> None:
    """Ids exist, weights are numbers, the model is one, and the ledger counts what was trained."""
    size = len(trace.ledger["visits"])
    visits = np.zeros(size, dtype=np.int64)
    for ids, values in zip(trace.ids, trace.values, strict=True):
        assert min(ids) >= 0
        assert max(ids) < size
        np.add.at(visits, ids, 1)
        assert np.isfinite(values["loss"]).all()
        if "weight" in values:
            assert np.isfinite(values["weight"]).all()
    assert trace.ledger["visits"].tolist() == visits.tolist()
    assert all(torch.isfinite(weight).all() for weight in trace.weights.values())


# ---- It acts ----


def assert_acts(run: Finished, stock: Baseline, shuffled: Baseline) -> None:
    """
    The method has changed what was trained: rows, ids or gradients.

    Args:
        run ([`Finished`]):
            The method's run.
        stock ([`Baseline`]):
            The stock trainer's run with the same arguments.
        shuffled ([`Baseline`]):
            The run of a method that plans and decides nothing: as soon as a method plans, another permutation takes
            the place of the trainer's, which is nothing that the method has done.
    """
    assert acting(run, stock, shuffled), (
        f"{run.method.name!r} does nothing: with the parameters of its case it trains the same examples in the same "
        "way as a run without it. Give it parameters with which it acts on so few rows (tests/contract/cases.py)."
    )


def assert_idle(run: Finished, stock: Baseline) -> None:
    """The method has changed nothing, bit for bit."""
    assert tiny.losses_of(run.trainer) == stock.losses
    tiny.assert_same_weights(run.trace.weights, stock.weights)


def acting(run: Finished, stock: Baseline, shuffled: Baseline) -> str:
    """By what a method has acted; empty where it has not."""
    methods = run.trainer.selection.methods
    given, trained = _rows(run.given), _rows(run.trainer.train_dataset)
    if Counter(given) != Counter(trained):
        return "rows"
    if given == trained and methods.candidates == 1:
        baseline = shuffled if methods.plans else stock
        if not methods.plans or run.trace.ids == baseline.ids:
            return "gradients" if _differ(run.trace.weights, baseline.weights) else ""
    if any("weight" in values and (np.abs(values["weight"] - 1) > 1e-5).any() for values in run.trace.values):
        return "weights"
    if _leaves_out(run):
        return "kept"
    if _orders(run):
        return "order"
    return "picked" if _picks(run) else ""


def _rows(dataset: Any) -> list[str]:
    """What is trained of each row: its tokens, whatever else the row brings along."""
    names = sorted(name for name in dataset.column_names if name.endswith(("input_ids", "_ids", "labels")))
    assert names, f"no tokens among {dataset.column_names}"
    return [repr([row[name] for name in names]) for row in dataset.select_columns(names).to_list()]


def _differ(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether parameters differ by more than rounding."""
    apart = sum(float((mine[name] - theirs[name]).square().sum()) for name in theirs)
    return apart > CHANGE**2 * sum(float(weight.square().sum()) for weight in theirs.values())


def _leaves_out(run: Finished) -> bool:
    """Whether an example was left out of a plan, or planned more than once."""
    plans: Sequence[Plan] = run.decisions.plans
    if any(not plan.kept.all() for plan in plans):
        return True
    if "plan" not in run.method.hooks or not plans:
        return False
    # A plan may be for the next few examples only: left out is what no plan of an epoch has.
    size = len(plans[0].kept)
    epochs = {plan.epoch for plan in plans}
    planned = {epoch: np.concatenate([plan.ids for plan in plans if plan.epoch == epoch]) for epoch in epochs}
    return any(len(np.unique(ids)) < size for ids in planned.values()) or any(
        len(np.unique(plan.ids)) < len(plan.ids) for plan in plans
    )


def _orders(run: Finished) -> bool:
    """
    Whether an example's place, or its company in a batch, hangs on which example it is.

    Plans are made anew with other seeds: where nothing but chance decides, every example comes early as often as late,
    and any two meet as often as any other two.
    """
    selection, hooks = run.trainer.selection, run.method.hooks
    if not hooks & {"order", "plan", "batch"}:
        return False
    # Of the same methods, but not the one that writes down what it plans.
    methods, state, size = Composition(selection.methods.methods), selection.run, selection.run.size
    before = state.seed, state.epoch, state.plans_made, state.served
    places, together = np.zeros(size), np.zeros((size, size))
    sizes: set[int] = set()
    state.epoch = max(plan.epoch for plan in run.decisions.plans)
    state.served = np.empty(0, dtype=np.int64)
    for draw in range(DRAWS):
        state.seed, state.plans_made = before[0] + 1 + draw, draw
        batches = methods.plan_batches(state)[0] if "batch" in hooks else [methods.plan(state)[0]]
        ids = np.concatenate(batches)
        # What is left out of a plan comes after it.
        place = np.full(size, (len(ids) + size - 1) / 2)
        place[ids] = np.arange(len(ids))
        places += place
        for batch in batches if "batch" in hooks else ():
            together[np.ix_(batch, batch)] += 1
        sizes.update(len(batch) for batch in sorted(batches, key=len)[1:])
    state.seed, state.epoch, state.plans_made, state.served = before
    if "batch" in hooks:
        pairs = together[~np.eye(size, dtype=bool)] / DRAWS
        usual = run.trainer.args.per_device_train_batch_size
        return bool(sizes - {usual}) or _beyond_chance(pairs, np.sqrt(pairs.mean() * (1 - pairs.mean())))
    return _beyond_chance(places / DRAWS, np.sqrt((size**2 - 1) / 12))


def _picks(run: Finished) -> bool:
    """Whether a candidate is picked for what it is: neither for its position nor by chance."""
    picks: Sequence[Pick] = [pick for pick in run.decisions.picks if len(pick.positions) < len(pick.ids)]
    positions: dict[int, set[tuple[int, ...]]] = {}
    for pick in picks:
        positions.setdefault(len(pick.ids), set()).add(tuple(np.sort(pick.positions)))
    if all(len(found) == 1 for found in positions.values()):
        return False
    state = run.trainer.selection.run
    before = state.seed, state.step
    try:
        for pick in picks:
            chosen = np.zeros(len(pick.ids))
            for draw in range(DRAWS):
                state.seed, state.step = before[0] + 1 + draw, draw
                chosen[type(run.method).pick(run.method, state, pick.candidates)] += 1 / DRAWS
            if _beyond_chance(chosen, np.sqrt(chosen.mean() * (1 - chosen.mean()))):
                return True
    finally:
        state.seed, state.step = before
    return False


def _beyond_chance(means: np.ndarray, deviation: float) -> bool:
    """Whether `means` of `DRAWS` draws, each of this standard deviation, differ by more than chance lets them."""
    return bool((np.abs(means - means.mean()) > DEVIATIONS * deviation / np.sqrt(DRAWS)).any())


# ---- It says why ----


def assert_says_why(run: Finished) -> None:
    """
    Whatever a run has left out has, in the ledger, the score by which that was decided, the method and the rule.

    Args:
        run ([`Finished`]):
            A run in which everything can be measured.
    """
    ledger, own = run.trainer.selection.ledger, run.method.name
    table = ledger.to_dataset().with_format("numpy")[:]
    left_out = table["reason"] != ""
    dropped = table["dropped_by"] != ""
    assert (left_out | ~dropped).all()
    plans, picks = run.decisions.plans, run.decisions.picks
    if plans and not plans[-1].kept.all():
        # Seal and the like drop inside of `plan`; all others leave it to the kept set.
        assert (dropped | plans[-1].kept).all()
    for pick in picks:
        # Candidates that are taken as they come were not decided about.
        if pick.positions.tolist() != list(range(len(pick.positions))):
            assert (table["decided_by"][pick.ids] == own).all(), "candidates were passed over without a score"
    assert (table["decided_by"][left_out] == own).all()
    numbers = table["decision_score"][left_out]
    # An example may have had its turn before there was a score: then the rule says so.
    told = ~np.isnan(numbers) | (table["visits"][left_out] > 0) & np.char.endswith(
        table["reason"][left_out].astype(str), "before it was scored has none)"
    )
    assert told.all(), f"nothing says why {np.flatnonzero(left_out)[~told]} were left out"
    assert (table["decision_step"][left_out] >= 0).all()
    rules = {reason.removeprefix(f"{own}: ") for reason in table["reason"][left_out]}
    assert rules.isdisjoint({"", "left out"}), rules


# ---- What is unknown never displaces what is known ----


def assert_unknown_displaces_nothing(run: Finished) -> None:
    """
    Where examples were measured without a result, none of them was served instead of one with a result.

    A plan has an unknown example only if it has every known one that was not served before, and not at the beginning
    if the method orders; a pick has one only if all known candidates are picked; and no weight of one exceeds the 1
    of the stock trainer. An example that has not been measured yet is not unknown in this sense: it may be tried.

    Args:
        run ([`Finished`]):
            A run with gaps ([`Bench.gappy`]).
    """
    trace, decisions = run.trace, run.decisions
    # Something to decide on: the last plan is made when every kind of measurement has been.
    assert not decisions.plans or (decisions.plans[-1].unknown.any() and decisions.plans[-1].known.any())
    gap = missing(np.arange(len(trace.ledger["visits"])))
    for number, plan in enumerate(decisions.plans):
        planned = np.isin(np.arange(len(gap)), plan.ids)
        served = np.isin(np.arange(len(gap)), plan.served)
        unknown, left = np.flatnonzero(planned & plan.unknown), np.flatnonzero(plan.known & ~planned & ~served)
        assert not (len(unknown) and len(left)), (
            f"plan {number} has the examples {unknown.tolist()}, of which nothing is known, and not {left.tolist()}, "
            "of which everything is"
        )
        if run.method.hooks & {"order", "plan"}:
            first = plan.ids[: min(len(plan.ids) // 3, int((planned & ~plan.unknown).sum()))]
            early = first[plan.unknown[first]]
            assert not len(early), f"plan {number} begins with {early.tolist()}, of which nothing is known"
    for number, pick in enumerate(decisions.picks):
        known = ~gap[pick.ids]
        picked = np.isin(np.arange(len(pick.ids)), pick.positions)
        assert not ((picked & ~known).any() and (known & ~picked).any()), (
            f"pick {number} takes {pick.ids[picked & ~known].tolist()}, of which nothing is known, and not "
            f"{pick.ids[known & ~picked].tolist()}, of which everything is"
        )
    for number, (ids, values) in enumerate(zip(trace.ids, trace.values, strict=True)):
        if "weight" in values:
            heavy = gap[ids] & (values["weight"] > 1 + 1e-6)
            assert not heavy.any(), (
                f"step {number} weighs {np.asarray(ids)[heavy].tolist()}, of which nothing is known, with "
                f"{values['weight'][heavy].tolist()}"
            )
