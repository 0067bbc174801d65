"""What to do about a score: keep, weigh, sample or order by it. Written once, shared by all methods."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.method import Method, Run
from ..core.parameters import REFRESHES, Reads, check_choice, check_range, check_refresh, unless, when
from ..functional.pacing import competence, difficulty_cdf, eligible_by_competence, pacing_size
from ..functional.ranking import band_ranks, gumbel_top_k, keep_count, rank_order, selectable, top_k
from ..signals.batch import Batch
from .unseen import is_constant, stand_ins, with_unseen

# Steps in which a pacing function is read: fine enough that no share is off by more than 1e-6.
PACE = 1_000_000
# Scores that are looked at for equal ones.
LOOKED_AT = 1_000_000


def known_scores(run: Run, name: str) -> np.ndarray:
    """The ledger's scores under `name`, all NaN before anything was written."""
    run.ledger.add(name)
    return run.ledger[name]


def shared(ordered: np.ndarray) -> np.ndarray:
    """Which of some scores in their order, `(n,)`, are equal to another one."""
    equal = ordered[1:] == ordered[:-1]
    return (np.append(equal, False) | np.insert(equal, 0, False))[: len(ordered)]


def untied(scores: np.ndarray, rng: np.random.Generator, second: np.ndarray | None = None) -> np.ndarray:
    """
    Scores of which no two are equal: those that are follow a `second` score, and then a draw.

    Without ties they are given back as they are; else as places in their order, lowest first (infinite and unknown
    ones stay what they are). The order of the file decides nothing.
    """
    known = np.flatnonzero(selectable(scores))
    values = scores[known]
    order = np.argsort(values)
    # Only those that are equal to a neighbour are sorted again: of millions of live scores they are few.
    tied = shared(values[order])
    if not tied.any():
        return scores
    among = order[tied]
    keys = [rng.random(len(scores))[known[among]]]
    if second is not None:
        keys.append(np.nan_to_num(second[known[among]].astype(np.float64), nan=-np.inf))
    order[tied] = among[np.lexsort([*keys, values[among]])]
    result = scores.astype(np.float64)
    result[known[order]] = np.arange(len(values))
    return result


def tie_rng(run: Run, name: str) -> np.random.Generator:
    """The generator that decides between equal scores: the same for every plan, so that a choice does not flicker."""
    return run.rng(f"{name}/ties")


def tell_ties(run: Run, name: str, scores: np.ndarray, second: str | None = None) -> None:
    """Says that scores do not tell examples apart: all of them (a warning), or some."""
    values = scores[selectable(scores)]
    if len(values) < 2:
        return
    if second is None and is_constant(values):
        run.tell(
            f"{name}:constant",
            f"{name!r}: all {len(values)} known scores are {values[0]:g}, so they say nothing of which example to "
            f"prefer: it is drawn at random (seed {run.seed}).",
            logging.WARNING,
        )
        return
    # Enough to tell whether scores are shared, without sorting tens of millions of them for a line in the log.
    values = values[:LOOKED_AT]
    tied = int(np.count_nonzero(shared(np.sort(values))))
    run.log({f"{name}_tied": tied})
    if tied:
        decides = f"a draw (seed {run.seed})" if second is None else f"{second}, then a draw (seed {run.seed}),"
        run.tell(
            f"{name}:ties",
            f"{name!r}: {tied} of {len(values)} known scores are shared by several examples: {decides} decides "
            "between equal ones.",
            logging.INFO,
        )


def keep_top(
    scores: np.ndarray, fraction: float, count: int | None = None, ties: np.random.Generator | None = None
) -> np.ndarray:
    """
    Mask of the best `fraction` of the selectable scores (or of `count` examples), `(N,)` bool.

    Where more examples have the lowest score that is kept than there is room for, `ties` draws among them; without it
    the lower ids stay.
    """
    valid = selectable(scores)
    size = keep_count(fraction, int(valid.sum())) if count is None else count
    mask = np.zeros(len(scores), dtype=bool)
    values = scores[valid]
    if ties is not None and 0 < size < len(values):
        cut = np.partition(values, len(values) - size)[len(values) - size]
        mask[valid] = values > cut
        at = np.flatnonzero(scores == cut)
        room = size - int(np.count_nonzero(mask))
        if room < len(at):
            at = at[np.argsort(ties.random(len(scores))[at])]
        mask[at[:room]] = True
        return mask
    mask[top_k(scores, size)] = True
    return mask


def keep_band(scores: np.ndarray, low: float, high: float, ties: np.random.Generator | None = None) -> np.ndarray:
    """
    Mask of the scores whose rank, counted from the lowest as a share of the selectable ones, is in [low, high).

    Equal scores are ranked as `ties` draws them; without it, by id.
    """
    mask = np.zeros(len(scores), dtype=bool)
    values = scores[selectable(scores)]
    first, last = band_ranks(low, high, len(values))
    if first == last:
        return mask
    # A cut at both ends in place of a sort; which of several equal scores are inside is a question there only.
    cuts = np.partition(values, [first, last - 1])
    bottom, top = cuts[first], cuts[last - 1]
    mask = (scores > bottom) & (scores < top)
    draws = None
    for end in dict.fromkeys((bottom, top)):
        at, below = np.flatnonzero(scores == end), int(np.count_nonzero(values < end))
        start, count = max(first - below, 0), min(last, below + len(at)) - max(first, below)
        if ties is not None and count < len(at):
            draws = ties.random(len(scores)) if draws is None else draws
            at, start = at[np.argsort(draws[at])], 0
        mask[at[start : start + count]] = True
    return mask


def in_order(scores: np.ndarray, ids: np.ndarray, ties: np.random.Generator | None = None) -> np.ndarray:
    """`ids` by descending score, unselectable ones last; equal scores as `ties` draws them, without it by id."""
    # Ties of a ranking stay in the order in which they come.
    ids = np.sort(ids) if ties is None else ids
    ids = ids[rank_order(scores[ids], descending=True)]
    if ties is None:
        return ids
    values = scores[ids]
    known = int(np.count_nonzero(selectable(values)))
    # Only those that are equal to a neighbour, and those without a score, are put in another order.
    tied = np.flatnonzero(shared(values[:known]))
    if len(tied) or known < len(ids):
        draws = ties.random(len(scores))
        among, equal = ids[tied], values[tied]
        # Equal ones stand together: the number of their group before the point, the draw behind it.
        group = np.cumsum(np.append(0, equal[1:] != equal[:-1])[: len(tied)])
        ids[tied] = among[np.argsort(group + draws[among])]
        ids[known:] = ids[known:][np.argsort(draws[ids[known:]])]
    return ids


def paced(
    scores: np.ndarray,
    ids: np.ndarray,
    fraction: Callable[[float], float],
    *,
    served: int,
    epoch_length: int,
    rng: np.random.Generator,
    blocks: int = 100,
    ties_together: bool = False,
    ties: np.random.Generator | None = None,
) -> np.ndarray:
    """
    `ids` so that at progress p of the epoch only the best `fraction(p)` of it has been drawn from, in random order.

    Args:
        scores (`np.ndarray` of shape `(N,)`):
            Higher = earlier.
        ids (`np.ndarray`):
            Examples left in this epoch.
        fraction (`Callable[[float], float]`):
            Share of the epoch's examples that is open at progress p in [0, 1]; monotone.
        served (`int`):
            Examples served before in this epoch.
        epoch_length (`int`):
            Examples per epoch.
        blocks (`int`, *optional*, defaults to `100`):
            How often per epoch the open share is looked at.
        ties_together (`bool`, *optional*, defaults to `False`):
            Whether examples of equal score open together, once all of them are within the share; else as `ties` draws
            them.
        ties (`np.random.Generator`, *optional*):
            Draws between equal scores; without it the lower id comes first.
    """
    ranked = in_order(scores, ids, ties)
    size = max(1, -(-epoch_length // blocks))
    starts = np.arange(0, len(ranked), size)
    opened = np.array([fraction((served + start) / epoch_length) * epoch_length for start in starts]) - served
    if ties_together:
        ordered = scores[ranked]
        cdf, known = difficulty_cdf(-ordered), max(1, int(selectable(ordered).sum()))
        opened = np.array([len(eligible_by_competence(cdf, share / known, at_least_one=False)) for share in opened])
    # A block can never be served from fewer examples than it has.
    limits = np.clip(np.maximum(np.ceil(opened).astype(np.int64), starts + size), 0, len(ranked))
    pool, waiting, reached, planned = np.empty_like(ranked), 0, 0, []
    for limit in limits.tolist():
        if limit > reached:
            pool[waiting : waiting + limit - reached] = ranked[reached:limit]
            waiting, reached = waiting + limit - reached, limit
        count = min(size, waiting)
        taken = rng.choice(waiting, count, replace=False)
        planned.append(pool[taken])
        # The places that were drawn are filled from the end of the pool: a block costs what it draws, not the pool.
        waiting -= count
        spare = np.ones(count, dtype=bool)
        spare[taken[taken >= waiting] - waiting] = False
        pool[taken[taken < waiting]] = pool[waiting + np.flatnonzero(spare)]
    return np.concatenate(planned)


ACTIONS = ("keep_top", "keep_bottom", "band", "weight", "sample", "curriculum")
PACINGS = ("linear", "quadratic", "root", "exponential", "log", "step", "competence", "none")


@dataclass
class ByScore(Method):
    """
    The actions every scored method shares: what to do about a live or fixed score of each example.

    A method gives `scores(run)`, the scores of all examples as they are known now, and, for the action `weight`,
    `score(batch)`, the scores of the current batch.
    """

    action: str = field(
        default="keep_top",
        metadata={
            "help": "keep_top, keep_bottom, band (keep), weight (soft weight), sample (weighted sampling without "
            "replacement that follows the live scores), curriculum (order with a pacing function)"
        },
    )
    keep: float | None = field(
        default=None,
        metadata={"help": "fraction to keep, in (0, 1]; default 0.5 for keep_*, 1 for sample, curriculum"},
    )
    low: float = field(
        default=0.25, metadata={"help": "band: lowest rank kept, as a share counted from the lowest score"}
    )
    high: float = field(default=0.75, metadata={"help": "band: rank at which keeping ends"})
    temperature: float = field(
        default=1.0,
        metadata={"help": "weight: w = sigmoid(score / temperature); sample: p = softmax(score / temperature)"},
    )
    pacing: str = field(default="linear", metadata={"help": f"curriculum: one of {', '.join(PACINGS)}"})
    start: float = field(default=0.1, metadata={"help": "curriculum: share of the epoch open at its start, in (0, 1]"})
    full_at: float = field(default=0.8, metadata={"help": "curriculum: progress of the epoch at which all is open"})
    reverse: bool = field(
        default=False, metadata={"help": "curriculum, sample: lowest scores first (anti-curriculum)"}
    )
    refresh: int | str = field(
        default="epoch", metadata={"help": 'when to choose anew: "epoch", "never", or every so many optimizer steps'}
    )

    actions: ClassVar[tuple[str, ...]] = ACTIONS
    default_keep: ClassVar[float] = 0.5
    # Whether an order follows scores that change: such an order cannot be made once for all.
    live: ClassVar[bool] = True
    reads: ClassVar[Reads] = {
        "keep": (when("action", "keep_top", "keep_bottom", "sample", "curriculum"),),
        "low": (when("action", "band"),),
        "high": (when("action", "band"),),
        "temperature": (when("action", "weight", "sample"),),
        "pacing": (when("action", "curriculum"),),
        "start": (when("action", "curriculum"), unless("pacing", "none")),
        "full_at": (when("action", "curriculum"), unless("pacing", "none")),
        "reverse": (when("action", "curriculum", "sample"),),
        "refresh": (when("action", "keep_top", "keep_bottom", "band", "sample", "curriculum"),),
    }
    refreshes: ClassVar[tuple[str, ...]] = REFRESHES

    def __post_init__(self) -> None:
        check_choice("action", self.action, self.actions)
        if self.keep is not None:
            check_range("keep", self.keep, 0, 1, open_low=True)
        check_range("low", self.low, 0, 1)
        check_range("high", self.high, 0, 1)
        if self.low >= self.high:
            raise ValueError(f"low={self.low!r} is not below high={self.high!r}: the band is empty.")
        check_range("temperature", self.temperature, 0, float("inf"), open_low=True)
        check_choice("pacing", self.pacing, PACINGS)
        check_range("start", self.start, 0, 1, open_low=True)
        check_range("full_at", self.full_at, 0, 1)
        check_refresh(self.refresh, self.refreshes)
        if self.refresh == "never" and self.live and self.action in ("sample", "curriculum"):
            raise ValueError(
                f"refresh='never': action={self.action!r} orders each epoch anew. Set 'epoch' or a number of steps."
            )
        self._mask: np.ndarray | None = None

    def scores(self, run: Run) -> np.ndarray:
        """Scores of all examples as they are known now, `(N,)`; NaN = unknown, higher = first."""
        return known_scores(run, self.name)

    def filled(self, run: Run, scores: np.ndarray) -> np.ndarray:
        """The scores with the unknown ones drawn from the known: the same however often one plan asks."""
        return with_unseen(scores, run.plan_rng(f"{self.name}/unseen"), run.ledger.visits > 0)

    @property
    def keep_share(self) -> float:
        if self.action == "band":
            return self.high - self.low
        if self.keep is not None:
            return self.keep
        return self.default_keep if self.action.startswith("keep") else 1.0

    @property
    def hooks(self) -> frozenset[str]:
        acting = {"weight": {"weigh"}, "sample": {"order"}, "curriculum": {"order"}}.get(self.action, {"select"})
        return (super().hooks - {"select", "order", "weigh"}) | acting

    def epoch_size(self, run: Run) -> int | None:
        return None if self.action == "weight" else self.share_of(run, self.scores(run))

    def share_of(self, run: Run, scores: np.ndarray) -> int:
        """Examples per epoch: the share of those that may be chosen at all (an infinite score says never)."""
        return keep_count(self.keep_share, int((~np.isinf(scores)).sum()))

    def select(self, run: Run) -> np.ndarray:
        if self.refresh == "never" and self._mask is not None:
            return self._mask
        known = self.scores(run)
        if self.keep_share < 1:
            tell_ties(run, self.name, known)
        scores, ties = self.filled(run, known), tie_rng(run, self.name)
        run.decide(scores, f"{self.action}, a share of {self.keep_share:g}{stand_ins(known)}")
        if self.action == "band":
            self._mask = keep_band(scores, self.low, self.high, ties)
        else:
            # The share is one of all that may be chosen, those without a score included: an epoch stays as long.
            size = self.share_of(run, scores)
            self._mask = keep_top(scores if self.action == "keep_top" else -scores, self.keep_share, size, ties)
        return self._mask

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        known = self.scores(run)
        tell_ties(run, self.name, known)
        rng, scores = run.plan_rng(f"{self.name}/order"), self.filled(run, known)
        if self.reverse:
            scores = -scores
        if self.action == "sample":
            left = self.share_of(run, scores) - len(run.served)
            drawn = ids[gumbel_top_k(scores[ids], max(left, 1), temperature=self.temperature, rng=rng)]
            # What has no score although it was seen comes when nothing else is left.
            return np.concatenate([drawn, ids[np.isnan(scores[ids])]])[: max(left, 1)]
        ties = tie_rng(run, self.name)
        if self.pacing == "none":
            return in_order(scores, ids, ties)
        length = self.share_of(run, scores)
        # Competence is a share of the difficulties (hf.co/papers/1903.09848, Algorithm 1), a pacing one of the ranks.
        return paced(
            scores,
            ids,
            self.open_share,
            served=len(run.served),
            epoch_length=length,
            rng=rng,
            ties_together=self.pacing == "competence",
            ties=ties,
        )

    def open_share(self, progress: float) -> float:
        """Share of the epoch's examples that the curriculum has opened at `progress` of the epoch."""
        if self.pacing == "competence":
            return float(competence(progress, self.full_at, initial=self.start))
        return float(
            pacing_size(self.pacing, progress * PACE, PACE, PACE, initial_fraction=self.start, full_at=self.full_at)
            / PACE
        )

    def weigh(self, batch: Batch) -> Tensor | None:
        scores = self.score(batch)
        return torch.sigmoid((scores[self.name] if isinstance(scores, dict) else scores) / self.temperature)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._mask is None else {"mask": self._mask}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if "mask" in state:
            self._mask = state["mask"].astype(bool)
