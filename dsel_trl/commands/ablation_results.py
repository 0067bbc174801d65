"""The results of an ablation's cells, and the cells run anew until something else than their steps is equal."""

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .ablation_cells import Cell
from .ablation_workers import Pool, result_of

logger = logging.getLogger(__name__)

# Trainings of one cell until its tokens or its computation are those of stock: the steps differ in size.
TRIES = 6

Place = tuple[str, float | None, int]


class Results:
    """
    What came of the cells that were run.

    Args:
        pool ([`~dsel_trl.commands.ablation_workers.Pool`]):
            The processes.
        folder (`Path`):
            Folder of the ablation.

    Attributes:
        found (`dict`):
            Results by variant, share of turned labels, and seed.
        failures (`dict[str, str]`):
            How cells failed, by their names.
    """

    def __init__(self, pool: Pool, folder: Path) -> None:
        self.pool, self.folder = pool, folder
        self.found: dict[Place, dict[str, Any]] = {}
        self.failures: dict[str, str] = {}

    def run(self, cells: Sequence[Cell], what: str) -> None:
        """Runs those of the cells that are not finished."""
        if not cells:
            return
        for cell, why in zip(cells, self.pool.run(cells, what), strict=True):
            own = self.folder / "cells" / cell.folder_name
            result = result_of(own)
            if why or result is None:
                self._failed(cell, why)
            else:
                self.found[_place(cell)] = {**result, **_seconds(own)}

    def run_at_equal(self, cells: Sequence[Cell], equal: str, what: str) -> None:
        """
        Runs cells with the steps of stock; where something else is to be equal, again with other steps, until it is
        so to the nearest step.
        """
        ready = []
        for cell in cells:
            stock = self.found.get(("stock", cell.flip, cell.seed))
            if stock is None:
                self.failures[cell.name] = "stock failed, so its steps are not known"
            else:
                ready.append(replace(cell, steps=stock["steps"]))
        self.run(ready, what)
        if equal == "steps":
            return
        tried: dict[Place, dict[int, dict[str, Any]]] = {}
        for number in range(TRIES):
            again = []
            for cell in ready:
                place = _place(cell)
                if place not in self.found:
                    continue
                result = self.found[place]
                tried.setdefault(place, {})[result["steps"]] = result
                try:
                    steps = next_steps(tried[place], self._stock(place), equal)
                except ValueError as error:
                    self._failed(cell, str(error))
                    continue
                if steps not in tried[place]:
                    again.append(replace(cell, steps=steps))
            if not again or number == TRIES - 1:
                break
            self.run(again, f"{what}, equal {equal}")
        for place in tried.keys() & self.found.keys():
            self.found[place] = self._nearest(place, tried[place], equal)

    def _nearest(self, place: Place, tried: dict[int, dict[str, Any]], equal: str) -> dict[str, Any]:
        """The training that came nearest to stock; one that is more than a step away is told of."""
        stock = self._stock(place)
        best = min(tried.values(), key=lambda result: abs(steps_off(result, stock, equal)))
        off = steps_off(best, stock, equal)
        if abs(off) > 1:
            logger.warning("%s, seed %d: %.1f steps away from equal %s.", place[0], place[2], off, equal)
        return {**best, "steps_off": round(off, 4)}

    def _stock(self, place: Place) -> dict[str, Any]:
        return self.found["stock", place[1], place[2]]

    def _failed(self, cell: Cell, why: str) -> None:
        self.failures[cell.name] = why
        self.found.pop(_place(cell), None)


def _place(cell: Cell) -> Place:
    return cell.variant, cell.flip, cell.seed


def _seconds(folder: Path) -> dict[str, float]:
    file = folder / "seconds.json"
    found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


def steps_off(result: dict[str, Any], stock: dict[str, Any], equal: str) -> float:
    """
    How many of its own steps a training took beyond what makes it equal to stock; negative for too few.

    Args:
        result, stock (`dict`):
            What came of a cell, and of stock.
        equal (`str`):
            `"tokens"` or `"flops"`; these hold the training and all that selection adds, of which the part before the
            first step does not grow with the steps.
    """
    spent = result["tokens"] if equal == "tokens" else result["training_flops"] + result["selection_flops"]
    return float((spent - stock["tokens" if equal == "tokens" else "training_flops"]) / _step(result, equal))


def _step(result: dict[str, Any], equal: str) -> float:
    """What a step of a training takes on average."""
    if equal == "tokens":
        return float(result["tokens"] / result["steps"])
    spent = result["training_flops"] + result["selection_flops"] - result["selection_flops_at_start"]
    return float(spent / result["steps"])


def equal_steps(result: dict[str, Any], stock: dict[str, Any], equal: str) -> int:
    """
    Optimizer steps with which a method takes as many trained tokens, or as much computation, as stock.

    Args:
        result, stock, equal:
            As in [`steps_off`].

    Raises:
        `ValueError`: if selection alone, before the first step, costs as much as stock's training.
    """
    if equal == "flops" and result["selection_flops_at_start"] >= stock["training_flops"]:
        raise ValueError(
            f"before its first step it costs {result['selection_flops_at_start'] / stock['training_flops']:.1f} times "
            "what the whole stock training does: at equal flops nothing is left to train with"
        )
    return max(1, round(result["steps"] - steps_off(result, stock, equal)))


def next_steps(tried: dict[int, dict[str, Any]], stock: dict[str, Any], equal: str) -> int:
    """
    Optimizer steps to try next, one of those that were tried where none is nearer.

    Args:
        tried (`dict[int, dict]`):
            What came of the trainings so far, by their steps.
        stock, equal:
            As in [`steps_off`].

    Raises:
        `ValueError`: as [`equal_steps`].
    """
    off = {steps: steps_off(result, stock, equal) for steps, result in tried.items()}
    nearest = min(off, key=lambda steps: abs(off[steps]))
    few, many = [s for s, value in off.items() if value < 0], [s for s, value in off.items() if value > 0]
    if not few or not many:
        return equal_steps(tried[nearest], stock, equal)
    low, high = max(few), min(many)
    if abs(off[nearest]) <= 0.5 or high - low <= 1:
        return nearest
    # Steps are of uneven size: between two trainings their own mean says more than that of all before.
    mean = sum(off[steps] * _step(tried[steps], equal) * sign for steps, sign in ((high, 1), (low, -1))) / (high - low)
    return min(max(low + round(-off[low] * _step(tried[low], equal) / mean), low + 1), high - 1)
