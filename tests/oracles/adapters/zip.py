"""Oracle adapter for ZIP.

The published code breaks ties as `torch.topk` happens to, which another version may do differently: finalists of
(nearly) equal ratio may stand in any order.
"""

import itertools
import warnings
import zlib
from collections import Counter

import numpy as np
import pytest

from dsel_trl.functional.text.zip import serialize, zip_rounds, zip_select
from dsel_trl.functional.text.zip_engine import CompressionEngine


def in_tie_order(ids, ratio_of):
    """Ids with those of equal ratio (within 1e-6) put in ascending order."""
    groups, last = [], None
    for example_id in map(int, ids):
        ratio = ratio_of.get(example_id)
        if last is None or ratio is None or abs(ratio - last) > 1e-6:
            groups.append([])
        groups[-1].append(example_id)
        last = ratio
    return list(itertools.chain.from_iterable(map(sorted, groups)))


def evaluate(oracle):
    written_with = oracle.get("zlib_runtime", zlib.ZLIB_RUNTIME_VERSION)
    if written_with != zlib.ZLIB_RUNTIME_VERSION:
        pytest.skip(f"written with zlib {written_with}, this is {zlib.ZLIB_RUNTIME_VERSION}: byte counts may differ")
    data = oracle["data"]
    pieces, frame = serialize(data, "repr")
    with CompressionEngine(pieces, frame) as engine:
        initial = engine.ratios("single", [], list(range(len(data))))
        yield "initial_ratio", initial, oracle["initial_ratio"]
        if "min_gap_initial" in oracle:
            yield "min_gap_initial", np.diff(np.sort(initial)).min(), oracle["min_gap_initial"]
        for i, case in enumerate(oracle.get("group_ratio_examples", [])):
            got = engine.ratios("all", case["anchor"], [case["candidate"]])[0]
            yield f"group_ratio_examples[{i}]", got, case["ratio"]
    for i, case in enumerate(oracle["cases"]):
        sizes = {key: case[key] for key in ("budget", "k1", "k2", "k3")}
        yield from evaluate_reference(f"cases[{i}].reference", data, sizes, case)
        for unchosen in ("burn", "restore"):
            expected = case.get(f"independent_{unchosen}_rejected")
            if expected:
                yield from evaluate_independent(f"cases[{i}].{unchosen}", data, sizes, unchosen, expected)


def run(function, *args, **kwargs):
    """A pool that runs empty is part of some cases, and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **kwargs)


def rounds_of(data, **options):
    return run(lambda: list(zip_rounds(data, **options)))


def evaluate_reference(label, data, sizes, case):
    reference = case["reference"]
    rounds = rounds_of(data, as_published=True, **sizes)
    comparable = case.get("rounds_comparable", len(reference["rounds"]))
    for r, expected in enumerate(reference["rounds"][:comparable]):
        yield from compare_round(f"{label}.rounds[{r}]", rounds[r], expected)
    selected = np.concatenate([step.chosen for step in rounds])
    known = sum(len(step.chosen) for step in rounds[:comparable])
    yield f"{label}.selected_indices", selected[:known], reference["selected_indices"][:known]
    yield f"{label}.n_selected", len(selected), reference["n_selected"]
    if comparable >= len(reference["rounds"]):
        repeated = max(Counter(selected.tolist()).values()) > 1
        yield f"{label}.has_duplicates", repeated, reference["has_duplicates"]


def evaluate_independent(label, data, sizes, unchosen, expected):
    rounds = rounds_of(data, unchosen=unchosen, **sizes)
    selected = run(zip_select, data, unchosen=unchosen, truncate=False, **sizes)
    yield f"{label}.selected_indices", selected, expected["selected_indices"]
    listed = expected.get("rounds")
    if listed is not None:
        yield f"{label}.rounds", len(rounds), len(listed)
        for r, step in enumerate(listed):
            yield from compare_round(f"{label}.rounds[{r}]", rounds[r], step)


def compare_round(label, step, expected):
    ratio_of = dict(zip(step.finalists.tolist(), step.ratios.tolist(), strict=True))
    want = in_tie_order(expected["stage2_indices"], ratio_of)
    yield f"{label}.stage2_indices", in_tie_order(step.finalists, ratio_of), want
    yield f"{label}.stage3_indices", step.chosen, expected["stage3_indices"]
    if "state_after" in expected:
        yield f"{label}.state_after", step.state, expected["state_after"]
