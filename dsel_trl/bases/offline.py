"""Scores that are measured before training: from texts, columns or passes, once or at every `refresh`."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..core.cache import USES, cached
from ..core.parameters import Reads
from ..core.run import Run, Step
from ..functional.ranking import band as rank_band
from ..functional.ranking import keep_count, top_k
from ..signals.batch import Batch
from .scored import ByScore, tell_ties, tie_rng, untied


@dataclass
class Prescored(ByScore):
    """
    A method whose scores are measured before the first step, and then kept, weighed or ordered by.

    A method gives `measure(run)`: arrays of shape `(N,)` by ledger column, of which the one under its own name is the
    score (higher = first; NaN and infinite = never train on it). The result is kept under `output_dir/selection` by a
    fingerprint of the data, the model and the parameters, and a resumed run finds it in its checkpoint.
    """

    refresh: int | str = field(
        default="never",
        metadata={"help": 'when to measure and choose anew: "never" (once, before training), "epoch", or steps'},
    )

    # Scores that cannot change while training goes on are measured once.
    refreshes: ClassVar[tuple[str, ...]] = ("never",)
    live: ClassVar[bool] = False
    reads: ClassVar[Reads] = {"refresh": ()}
    renamed: ClassVar[dict[str, str]] = {"renew": "refresh ('epoch', 'never', or a number of optimizer steps)"}
    # Whether `measure` itself chooses what to keep: then everything with a finite score is.
    chooses: ClassVar[bool] = False
    # Parameters that only say what is done with the scores: runs that differ in nothing else share what was measured.
    acting: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._measured = 0
        self._ledger: Callable[[], np.ndarray] = lambda: np.empty(0, dtype=np.float32)

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        """What is known of all examples, by ledger column; may make passes."""
        raise NotImplementedError

    def units(self, run: Run) -> dict[str, float]:
        again = 0
        if self.refresh == "epoch":
            again = int(np.ceil(run.epochs)) - 1
        elif isinstance(self.refresh, int):
            # What is only read by the next plan is not measured after the last step.
            again = (run.max_steps if self.action == "weight" else run.max_steps - 1) // self.refresh
        return {**super().units(run), "example and measurement": run.size * (1 + max(again, 0))}

    def depends_on(self, run: Run) -> list[Any]:
        """What the scores depend on beside tokens, numeric `columns`, parameters and what `uses` says: JSON values."""
        return []

    @property
    def uses(self) -> tuple[str, ...]:
        """
        What of the run the scores depend on: any of `"policy"`, `"loss"` and `"seed"`. What is not named is no reason
        to measure again: scores without a draw are the same for every seed.
        """
        return USES

    def helpers(self, run: Run) -> list[dict[str, Any]]:
        """The helper runs that the scores come from, as [`~dsel_trl.core.cache.run_fingerprint`] takes them."""
        return []

    def weights(self, scores: np.ndarray) -> np.ndarray:
        """Weights of examples with `scores` (the action `weight`); they are averaged to 1 over each step."""
        return 1.0 / (1.0 + np.exp(-scores / self.temperature))

    @property
    def keep_share(self) -> float:
        return 1.0 if self.chooses else super().keep_share

    @property
    def hooks(self) -> frozenset[str]:
        hooks = super().hooks - {"observe"}
        # What was measured to be unfit is left out whatever the action does with the rest.
        acting = {"weigh"} if self.action == "weight" else {"select"}
        return hooks | acting | ({"observe"} if self.refresh != "never" and self.action == "weight" else set())

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} measures all examples before training, which a stream does not allow.")

    def setup(self, run: Run) -> None:
        run.ledger.add(self.name)
        self._ledger = lambda: run.ledger[self.name]
        if run.resumed:
            return
        own = {f.name for f in dataclasses.fields(ByScore)} - {"keep"} | self.acting
        parts = [{k: v for k, v in self.describe().items() if k not in own}, self.depends_on(run)]
        key: dict[str, Any] = {"uses": self.uses, "helpers": self.helpers(run), "columns": self.columns}
        self._write(run, cached(run, self.name, parts, lambda: self._arrays(run), **key))

    def _arrays(self, run: Run) -> dict[str, np.ndarray]:
        arrays = {name: np.asarray(values, dtype=np.float32) for name, values in self.measure(run).items()}
        if not np.isfinite(arrays[self.name]).any():
            raise ValueError(f"{self.name!r} found no example that it could train on: every score is unknown.")
        return arrays

    def _write(self, run: Run, arrays: dict[str, np.ndarray]) -> None:
        for name, values in arrays.items():
            known = np.where(np.isfinite(values), values, -np.inf) if name == self.name else values
            run.ledger.write(name, None, known, run.step)

    def renew(self, run: Run) -> None:
        """Measures again where `refresh` asks for it: once in every epoch, or in every so many steps."""
        if self.refresh == "never":
            return
        period = run.step // self.refresh if isinstance(self.refresh, int) else run.epoch
        if period != self._measured:
            self._measured = period
            self._write(run, self._arrays(run))

    def chosen(self, run: Run, scores: np.ndarray) -> np.ndarray:
        """Ids to train on; by default what `action` says."""
        if self.action == "band":
            return rank_band(scores, self.low, self.high)
        valid = np.isfinite(scores)
        if not self.action.startswith("keep"):
            return np.flatnonzero(valid)
        size = keep_count(self.keep_share, int(valid.sum()))
        if size < valid.sum():
            tell_ties(run, self.name, scores)
        scores = untied(scores, tie_rng(run, self.name))
        return top_k(scores if self.action == "keep_top" else -scores, size)

    def select(self, run: Run) -> np.ndarray:
        self.renew(run)
        mask, scores = np.zeros(run.size, dtype=bool), self.scores(run)
        chooses = self.action.startswith("keep") or self.action == "band"
        run.decide(scores, f"{self.action}, a share of {self.keep_share:g}" if chooses else "")
        mask[self.chosen(run, scores)] = True
        return mask

    def weigh(self, batch: Batch) -> Tensor:
        scores = self._ledger()[batch.ids.cpu().numpy()].astype(np.float64)
        finite = np.isfinite(scores)
        weights = np.where(finite, self.weights(np.where(finite, scores, 0.0)), 0.0)
        return torch.from_numpy(weights.astype(np.float32)).to(batch.ids.device)

    def observe(self, run: Run, step: Step) -> None:
        self.renew(run)

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._measured = int(state["measured"])
