"""The `selection/*` values of a run: gathered per optimizer step, logged with the trainer's own."""

from typing import Any

import numpy as np
import torch

from ..functional.evidence import selected_fraction
from ..functional.weighting import effective_sample_size
from .groups import Groups
from .ledger import Ledger
from .run import Run, Step

QUANTILES = (0.1, 0.5, 0.9)
OWN_COLUMNS = {"loss", "implicit_margin", "weight", "length"}


class Metrics:
    """
    Sums over the window between two log rows, counters over the run, and the log rows kept for the report.

    The window's values are those of all ranks: they come from the exchanged [`Step`].

    Args:
        groups ([`~dsel_trl.core.groups.Groups`], *optional*):
            Values by which loss, margin, kept share, weight and tokens are logged apart.
    """

    def __init__(self, groups: Groups | None = None) -> None:
        self.groups = groups
        # Of each group, at the last plan or choice.
        self.group_kept: list[float] | None = None
        self.kept_fraction = 1.0
        self.examples_skipped = 0
        # `None` = not known: images, and rows that are tokenized when they are collated.
        self.tokens_skipped: int | None = 0
        self.epoch_trained = 0
        self.trained = 0
        self.candidates = 0
        self.lag = 0
        self.history: list[dict[str, float]] = []
        # Pairs whose two sides are equal; `None` = not counted.
        self.identical: int | None = None
        # What a user should know of the choice, each said once: constant scores, ties, pairs that teach nothing.
        self.notes: dict[str, str] = {}
        self._extra: dict[str, list[float]] = {}
        self._window: list[Step] = []
        self._served_before = 0

    def planned(self, kept: np.ndarray, lengths: np.ndarray | None) -> None:
        """A plan was made from the kept set `(N,)` bool, of rows whose lengths in tokens may not be known."""
        self.kept_fraction = float(kept.mean())
        self.examples_skipped = int((~kept).sum())
        if self.groups is not None:
            self.group_kept = self.groups.shares(kept)
        self.tokens_skipped = None if lengths is None else int(lengths[~kept].sum())

    def picked(self, candidates: np.ndarray, chosen: np.ndarray) -> None:
        """The ids `chosen` of the `candidates` of a batch are trained on."""
        self.candidates += len(candidates)
        self.examples_skipped += len(candidates) - len(chosen)
        self.kept_fraction = len(chosen) / len(candidates)
        if self.groups is not None:
            # A group that had no candidate keeps the share of the batch before.
            before = self.group_kept or [1.0] * len(self.groups.values)
            found = self.groups.chosen(candidates, chosen)
            self.group_kept = [old if np.isnan(new) else new for old, new in zip(before, found, strict=True)]

    def extra(self, values: dict[str, float]) -> None:
        """A method's own values, averaged over the window."""
        for name, value in values.items():
            self._extra.setdefault(name, []).append(float(value))

    def step(self, step: Step, served: int) -> None:
        """An optimizer step is done; `served` examples have been handed out in this epoch."""
        self.trained += len(step.ids)
        if served < self._served_before:
            self.epoch_trained = 0
        self._served_before = served
        self.epoch_trained += len(step.ids)
        self.lag = max(0, served - self.epoch_trained) if served else 0
        self._window.append(step)

    def row(self, ledger: Ledger, run: Run) -> dict[str, float]:
        """The log row of the window that ends now; starts a new window."""
        row = {
            "kept_fraction": self.kept_fraction,
            "examples_skipped": float(self.examples_skipped),
            **({} if self.tokens_skipped is None else {"tokens_skipped": float(self.tokens_skipped)}),
            "sampler_lag": float(self.lag),
            **{name: float(np.mean(values)) for name, values in self._extra.items()},
        }
        if self._window:
            row.update(self._window_values(ledger, run))
        self.history.append({"step": float(run.step), **row, **self._lengths()})
        if self.groups is not None:
            row.update(self._by_group(self.groups))
        self._window, self._extra = [], {}
        return {f"selection/{name}": value for name, value in row.items()}

    def _lengths(self) -> dict[str, float]:
        """Quantiles of the trained examples' tokens: for the report, not for the log."""
        lengths = _joined(self._window, "length") if self._window else None
        if lengths is None or not len(lengths):
            return {}
        found = np.quantile(lengths, QUANTILES)
        return {f"length_q{round(100 * q)}": float(value) for q, value in zip(QUANTILES, found, strict=True)}

    def _by_group(self, groups: Groups) -> dict[str, float]:
        kept = self.group_kept or [1.0] * len(groups.values)
        shares = {f"{name}/kept_fraction": share for name, share in zip(groups.names(), kept, strict=True)}
        return {**shares, **(groups.window(self._window) if self._window else {})}

    def _window_values(self, ledger: Ledger, run: Run) -> dict[str, float]:
        values: dict[str, float] = {}
        losses = _joined(self._window, "loss")
        weights = _joined(self._window, "weight")
        if weights is None:
            weights = np.ones(len(losses) if losses is not None else 1, dtype=np.float32)
        each = [torch.from_numpy(w.astype(np.float64)) for w in _each(self._window, "weight")]
        values["effective_sample_size"] = float(np.mean([effective_sample_size(w).item() for w in each]))
        values["weight_mean"], values["weight_min"], values["weight_max"] = (
            float(weights.mean()),
            float(weights.min()),
            float(weights.max()),
        )
        if losses is not None:
            values["weighted_loss"] = float(np.mean(weights * losses))
        for name in {name for step in self._window for name in step.values} - OWN_COLUMNS:
            scores = _joined(self._window, name)
            assert scores is not None
            finite = scores[np.isfinite(scores)]
            if len(finite):
                for q, value in zip(QUANTILES, np.quantile(finite, QUANTILES), strict=True):
                    values[f"{name}_q{round(100 * q)}"] = float(value)
            steps = ledger.steps(name)
            written = steps[steps >= 0]
            values[f"{name}_age"] = float(run.step - written.mean()) if len(written) else 0.0
        return values

    def summary(self, ledger: Ledger) -> dict[str, Any]:
        """What `summary.json` says of the whole run."""
        visited = int((ledger.visits[: len(ledger)] > 0).sum())
        return {
            "kept_fraction": self.kept_fraction,
            "examples": len(ledger),
            "examples_trained": self.trained,
            "examples_visited": visited,
            # Of a stream nothing may have come.
            "selected_fraction": selected_fraction(visited, len(ledger)) if len(ledger) else 0.0,
            "examples_dropped": int(ledger.dropped.sum()),
            "examples_skipped": self.examples_skipped,
            "tokens_skipped": self.tokens_skipped,
            "candidates_scored": self.candidates,
            **({} if self.identical is None else {"examples_identical": self.identical}),
            "notes": list(self.notes.values()),
            **self._group_totals(ledger),
        }

    def _group_totals(self, ledger: Ledger) -> dict[str, Any]:
        if self.groups is None:
            return {}
        return {"log_by": {self.groups.column: self.groups.totals(ledger.visits[: len(ledger)])}}

    def state_dict(self) -> dict[str, Any]:
        """JSON values for the checkpoint; an unfinished window is left out."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_extra", "_window", "groups")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


def _each(window: list[Step], name: str) -> list[np.ndarray]:
    return [step.values.get(name, np.ones(len(step.ids), dtype=np.float32)) for step in window]


def _joined(window: list[Step], name: str) -> np.ndarray | None:
    # What a method asks of some steps only is not there in the others.
    values = [step.values[name] for step in window if name in step.values]
    return np.concatenate(values) if values else None
