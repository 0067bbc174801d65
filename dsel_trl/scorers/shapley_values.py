"""Shapley values of a game, kept on disk while they are estimated, and the test that says whether to trust them."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from ..core.randomness import stream
from ..data.files import save_arrays
from ..functional.influence.data_shapley import drift, exact_shapley, marginals, mean_marginals, subsets
from ..functional.influence.mtm_fit import (
    LEAST_CORRELATION,
    MOST_RESIDUAL,
    modular_fit,
    spearman_by_size,
    trusted,
)
from ..functional.ranking import keep_count

# Orders, and sets of the test, between two saves: what a kill loses at most.
ORDERS, SETS = 10, 500
# Sets that the test values at least, and sets held out without which it says nothing.
FEWEST_SETS, FEWEST_HELD = 300, 5


class Game(Protocol):
    """Players who are worth something together; nobody is worth 0."""

    def __len__(self) -> int: ...

    def worth(self, members: np.ndarray) -> float: ...

    def growing(self, order: np.ndarray) -> Iterator[float]: ...


@dataclass(frozen=True)
class ShapleySettings:
    """
    How values are estimated.

    Attributes:
        exact_up_to (`int`): so many players or fewer: all their sets are valued.
        permutations (`int`): most orders that are walked for more players.
        error (`float`): mean relative movement of the estimates over 100 orders at which to stop.
        tolerance (`float`): share of all players' worth within which a set is as good as all; 0 never truncates.
        patience (`int`): so many such sets in a row end the walk.
        keep (`float`): share of the players that is to be kept: the size of set that the test is about.
        seed (`int`): seed of the orders and of the test.
    """

    exact_up_to: int = 10
    permutations: int = 500
    error: float = 0.05
    tolerance: float = 0.01
    patience: int = 5
    keep: float = 0.5
    seed: int = 0


@dataclass(frozen=True)
class Trust:
    """
    Whether the best set can be told by the players' values (hf.co/papers/2405.03875).

    Attributes:
        size (`int`): players to keep.
        sets (`int`): sets that were valued for it.
        residual (`float`): share of the held-out variance that a monotone function of a sum leaves.
        by_weights, by_values (`float`): rank correlation, among sets of that size, of their worth with the sum of the
            fitted weights (of sets held out) and of the Shapley values.
        verdict (`bool | None`): whether a selection by the values can be trusted; None: too few players to say.
    """

    size: int
    sets: int
    residual: float
    by_weights: float
    by_values: float
    verdict: bool | None

    def __str__(self) -> str:
        told = (
            f"residual {self.residual:.3f} (at most {MOST_RESIDUAL:g}), rank correlation of sets of {self.size} "
            f"{self.by_weights:.2f} by fitted weights, {self.by_values:.2f} by Shapley values (at least "
            f"{LEAST_CORRELATION:g} both); {self.sets} sets"
        )
        if self.verdict is None:
            return f"cannot be told: too few sets to hold some out ({self.sets})"
        if self.verdict:
            return f"yes: {told}"
        return f"no, choose at random or for diversity instead: {told}"


@dataclass(frozen=True)
class ShapleyValues:
    """Values of the players `(n,)`, how they were found, and whether to trust a selection by them."""

    values: np.ndarray
    full: float
    exact: bool
    orders: int
    valued: int
    moved: float
    trust: Trust


def shapley_values(game: Game, settings: ShapleySettings, folder: Path, fingerprint: str) -> ShapleyValues:
    """
    Values all players of a game: exactly if they are few, else by truncated walks through random orders.

    Args:
        game ([`Game`]):
            The players.
        settings ([`ShapleySettings`]):
            How.
        folder (`Path`):
            Where finished parts are kept; a further call with the same settings goes on from them.
        fingerprint (`str`):
            What the game's worth depends on.

    Raises:
        `ValueError`: for fewer than two players, or if no order could be walked to its end.
    """
    players = len(game)
    if players < 2:
        raise ValueError(f"{players} player: a value is a comparison, which takes two or more.")
    told = json.dumps([fingerprint, asdict(settings), players])
    parts = _Parts(folder / hashlib.sha256(told.encode()).hexdigest()[:16])
    everybody = np.ones(players, dtype=bool)
    if players <= settings.exact_up_to:
        members = subsets(players)
        worth = parts.valued(game, members, "Sets")
        values = exact_shapley(worth)
        trust = _trust(members, worth, values, settings)
        return ShapleyValues(values, worth[-1], True, 0, len(worth), 0.0, trust)
    full = game.worth(everybody)
    rows, count = _walk(game, full, settings, parts)
    values = mean_marginals(rows)
    if not np.isfinite(values).all():
        raise ValueError(f"None of {len(rows)} orders of the players could be walked: their worth is not finite.")
    members = _near(players, settings)
    trust = _trust(members, parts.valued(game, members, "Test of trust"), values, settings)
    return ShapleyValues(values, full, False, len(rows), count + len(members), drift(rows), trust)


class _Parts:
    """Finished parts of a game, by what and number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, name: str, number: int, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        file = self.folder / f"{name}-{number:06d}.safetensors"
        if file.is_file():
            return load_file(file)
        made = make()
        save_arrays(file, made)
        return made

    def valued(self, game: Game, members: np.ndarray, what: str) -> np.ndarray:
        def block(start: int) -> dict[str, np.ndarray]:
            return {"worth": np.array([game.worth(row) for row in members[start : start + SETS]])}

        found = []
        with tqdm(total=len(members), desc=what, unit="set") as bar:
            for number, start in enumerate(range(0, len(members), SETS)):
                found.append(self.get("sets", number, partial(block, start))["worth"])
                bar.update(len(found[-1]))
        return np.concatenate(found)


def _walk(game: Game, full: float, settings: ShapleySettings, parts: _Parts) -> tuple[np.ndarray, int]:
    """What each player added in each order `(T, n)`, and how many sets were valued."""

    def block(start: int) -> dict[str, np.ndarray]:
        rows, valued = [], 0
        for number in range(start, min(start + ORDERS, settings.permutations)):
            order = stream(settings.seed, "data_shapley/order", number).permutation(len(game))
            row, count = marginals(
                order,
                game.growing(order),
                0.0,
                full,
                tolerance=settings.tolerance or None,
                patience=settings.patience,
            )
            rows.append(row)
            valued += count
        return {"rows": np.stack(rows), "valued": np.array([valued])}

    found: list[dict[str, np.ndarray]] = []
    with tqdm(total=settings.permutations, desc="Orders", unit="order") as bar:
        for number, start in enumerate(range(0, settings.permutations, ORDERS)):
            found.append(parts.get("orders", number, partial(block, start)))
            bar.update(len(found[-1]["rows"]))
            rows = np.concatenate([part["rows"] for part in found])
            moved = drift(rows)
            if math.isfinite(moved):
                bar.set_postfix(moved=f"{moved:.3f}")
            if moved < settings.error:
                break
    return rows, int(sum(part["valued"][0] for part in found))


def _near(players: int, settings: ShapleySettings) -> np.ndarray:
    """Random sets of the size to keep, one more or one less, `(m, n)` bool."""
    count = max(5 * players, FEWEST_SETS)
    rng, size = stream(settings.seed, "data_shapley/sets"), keep_count(settings.keep, players)
    members = np.zeros((count, players), dtype=bool)
    for row, taken in zip(members, np.clip(size + np.arange(count) % 3 - 1, 1, players - 1), strict=True):
        row[rng.choice(players, size=taken, replace=False)] = True
    return members


def _trust(members: np.ndarray, worth: np.ndarray, values: np.ndarray, settings: ShapleySettings) -> Trust:
    players = members.shape[1]
    size = min(keep_count(settings.keep, players), players - 1)
    held = stream(settings.seed, "data_shapley/held_out").permutation(len(members)) < len(members) // 5
    fit = modular_fit(members, worth, held)
    at = members.sum(axis=1) == size
    # The weights were fitted to the others; of a small game too few of one size are held out to rank them.
    judged = at & held if (at & held).sum() >= FEWEST_HELD else at
    by_weights = spearman_by_size(members[judged], fit.weights, worth[judged])[size]
    by_values = spearman_by_size(members[at], values, worth[at])[size]
    verdict = trusted(fit.residual, [by_weights, by_values]) if held.sum() >= FEWEST_HELD else None
    return Trust(size, len(members), fit.residual, by_weights, by_values, verdict)
