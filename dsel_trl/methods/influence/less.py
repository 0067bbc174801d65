"""LESS: the examples whose Adam updates point where a target's gradients do."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.influence import LAYERS
from ...bases.scored import ByScore
from ...bases.target import Targeted
from ...core.cache import model_fingerprint, run_fingerprint
from ...core.charges import Charge
from ...core.method import Run, Step
from ...core.parameters import Reads, check_choice, check_range, check_whole, when
from ...core.registry import register
from ...data.columns import codes
from ...functional.influence.less import (
    adam_update,
    by_subtask,
    influence,
    less_scores,
    over_checkpoints,
    unit,
)
from ...functional.projection import projected, stream_of
from ...scorers.feature_store import DTYPES, FeatureStore
from ...signals.batch import Signal
from ...signals.ghost import GradientRequest

PROJECTIONS = ("factored", "rademacher")


@register("less")
@dataclass
class Less(Targeted, ByScore):
    """
    Keeps the examples whose updates under Adam point where the gradients of a target do.

    What: the first share `warm_up` of the run is the warm-up, on examples drawn at random. At `checkpoints` moments in
    it every example's gradient is turned into the update that Adam would make of it alone, projected to `features`
    numbers, and compared by its cosine with the plain gradients of the target's examples; the moments are weighted by
    their learning rates (hf.co/papers/2402.04333). The score is the greatest mean over a subtask of the target
    (`subtask_column`); from the end of the warm-up on the top share is kept. Features are under
    `output_dir/selection/less`, a file per process that numpy reads; a pass that was cut off goes on.
    (The paper warms up a copy of the model for four epochs on 5% of the data, and starts anew with the chosen 5%.)
    When: a few examples of the task that counts, and a large mixed pool. When not: without a target, or where the pool
    is small: the passes cost as much as `checkpoints` epochs of training.
    A sequence has a cosine whatever its length, and one without any gradient that of Adam's momentum.
    Disk: `2 * features` bytes per example and checkpoint. Lag: the plan in flight is served to its end.
    Memory: measured (`benchmarks/influence.py`, SFT of 8 x 256 tokens, a Llama of 6 million parameters, one core): at
    a checkpoint 1.5 stock steps for every batch of examples, 1.01 times a step's peak memory.
    """

    warm_up: float = field(default=0.25, metadata={"help": "share of the run after which is chosen, in (0, 1)"})
    checkpoints: int = field(default=4, metadata={"help": "moments in the warm-up at which all examples are measured"})
    features: int = field(default=1024, metadata={"help": "numbers per example; with factored a square; paper 8192"})
    projection: str = field(
        default="factored",
        metadata={"help": "factored: weights from both sides; rademacher: all entries, as the paper"},
    )
    dtype: str = field(default="float16", metadata={"help": "of the features on disk: float16 or float32"})
    layers: str | Sequence[str] = field(default="linear", metadata={"help": LAYERS})
    subtask_column: str | None = field(default=None, metadata={"help": "column of the target that names subtasks"})
    refresh: int | str = field(default="never", metadata={"help": '"never": chosen once, when the warm-up ends'})

    signals = (Signal.INFLUENCE,)
    paper = "hf.co/papers/2402.04333"
    family = "reduction"
    criterion = "external_continuous"
    selector = "top_k"
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "band")
    default_keep: ClassVar[float] = 0.5
    refreshes: ClassVar[tuple[str, ...]] = ("never",)
    reads: ClassVar[Reads] = {"keep": (when("action", "keep_top"),)}
    charges = (
        Charge("gradients", per="example and checkpoint", reference=True),
        Charge("gradients", per="target example and checkpoint", reference=True),
    )
    state = "its score, and the influence on each subtask (4 bytes per example and subtask)"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("warm_up", self.warm_up, 0, 1, open_low=True, open_high=True)
        check_whole("checkpoints", self.checkpoints, 1, 1000)
        check_whole("features", self.features, 1, 2**24)
        check_choice("projection", self.projection, PROJECTIONS)
        if self.projection == "factored" and round(self.features**0.5) ** 2 != self.features:
            raise ValueError(f"features={self.features!r} is no square, which projection='factored' needs.")
        check_choice("dtype", self.dtype, DTYPES)
        self._influences: list[np.ndarray] = []
        self._rates: list[float] = []

    def moments_of(self, run: Run) -> list[int]:
        """Optimizer steps after which all examples are measured."""
        last = max(1, round(self.warm_up * run.max_steps))
        found = {max(1, round(last * (k + 1) / self.checkpoints)) for k in range(self.checkpoints)}
        # After the last step nothing is chosen any more.
        return sorted(step for step in found if step < run.max_steps)

    def _chosen(self, run: Run) -> bool:
        """Whether the warm-up has ended."""
        return bool(self._rates) and run.step >= self.moments_of(run)[-1]

    def units(self, run: Run) -> dict[str, float]:
        found, times = super().units(run), len(self.moments_of(run))
        return {
            **found,
            "example and checkpoint": times * run.size,
            "target example and checkpoint": times * found["target example"],
        }

    def check(self, run: Run) -> None:
        super().check(run)
        run.gradients.layers(self.layers)
        run.gradients.check_second_moments()
        self._subtasks(run)

    def begin(self, run: Run) -> None:
        if len(self.moments_of(run)) < self.checkpoints:
            run.tell(
                f"{self.name}:room",
                f"{self.name!r}: warm_up={self.warm_up!r} of {run.max_steps} steps has room for only "
                f"{len(self.moments_of(run))} of checkpoints={self.checkpoints!r} before the last step.",
                logging.WARNING,
            )

    def _subtasks(self, run: Run) -> np.ndarray:
        dataset = self.target_rows(run).dataset
        if self.subtask_column is None:
            return np.zeros(len(dataset), dtype=np.int64)
        found = codes(dataset, self.subtask_column)
        return np.unique(found, return_inverse=True)[1].astype(np.int64)

    def due(self, run: Run) -> bool:
        return run.step in self.moments_of(run)[-1:]

    def select(self, run: Run) -> np.ndarray:
        # Before the warm-up has ended the draw of each plan; from then on one choice.
        if not self._chosen(run):
            self._mask = None
        return super().select(run)

    def observe(self, run: Run, step: Step) -> None:
        if run.step not in self.moments_of(run):
            return
        self._influences.append(self._measured(run))
        self._rates.append(step.learning_rate)
        tables = [torch.from_numpy(table) for table in self._influences]
        scores = less_scores(over_checkpoints(tables, self._rates))
        run.ledger.write(self.name, None, scores.numpy(), run.step)
        self._mask = None
        run.tell(
            f"{self.name}:{run.step}",
            f"{self.name!r}: influences measured after step {run.step} (learning rate {step.learning_rate:g}).",
            logging.INFO,
        )

    # ---- One checkpoint ----

    def _measured(self, run: Run) -> np.ndarray:
        """Influence of every example on each subtask, `(N, S)` float32, at the model as it is."""
        moments = run.gradients.moments(self.layers)
        target = self._target_features(run)
        subtasks = torch.from_numpy(self._subtasks(run))
        store = self._store(run)
        todo = store.missing
        request = GradientRequest(self.layers, features=partial(self._update_features, run, moments))
        # Every rank goes through as many examples, whatever it has on disk.
        where = {int(i): place for place, i in enumerate(store.ids.tolist())}
        ids = self._in_turn(run, store.ids[todo])
        for positions, found in run.gradients.each(run.rows, ids, request):
            values = unit(found.features).cpu().numpy()
            store.write(np.array([where[i] for i in ids[positions].tolist()]), values)
        result = np.zeros((run.size, int(subtasks.max()) + 1), dtype=np.float32)
        for start in range(0, len(store.ids), 4096):
            rows = torch.from_numpy(np.array(store.rows[start : start + 4096], dtype=np.float32))
            result[store.ids[start : start + 4096]] = by_subtask(influence(rows, target), subtasks).numpy()
        return run.passes.total(torch.from_numpy(result)).cpu().numpy() if run.world > 1 else result

    def _in_turn(self, run: Run, own: np.ndarray) -> np.ndarray:
        """The examples that are still to be measured, dealt out so that each rank meets its own."""
        if run.world == 1:
            return own
        waiting = np.zeros(run.size, dtype=np.float32)
        waiting[own] = 1.0
        left = np.flatnonzero(run.passes.total(torch.from_numpy(waiting)).cpu().numpy() > 0)
        ranks = [left[left % run.world == rank] for rank in range(run.world)]
        size = max(map(len, ranks))
        if not size:
            return left
        # A rank that has fewer left repeats one of its own, or of the first's where it has none.
        full = [
            np.resize(ids, size) if len(ids) else np.resize(own_ids(run, rank), size) for rank, ids in enumerate(ranks)
        ]
        return np.stack(full, axis=1).ravel()

    def _store(self, run: Run) -> FeatureStore:
        number = self.moments_of(run).index(run.step)
        about = {
            "projection": {"kind": self.projection, "features": self.features, "seed": self._seed(run)},
            "of": run_fingerprint(run, self.describe(), run.step),
            "model": model_fingerprint(run.model) if not run.sharded else "",
        }
        folder = Path(run.output_dir) / "selection" / self.name
        ids = own_ids(run, run.passes.rank)
        return FeatureStore(folder, f"checkpoint-{number}", ids, self.features, about, run.passes.rank, self.dtype)

    def _target_features(self, run: Run) -> Tensor:
        """Features of the target's plain gradients, `(m, K)`."""
        rows = self.target_rows(run)
        result = np.zeros((len(rows), self.features), dtype=np.float32)
        request = GradientRequest(self.layers, features=partial(self._projected, run))
        for positions, found in run.gradients.each(rows, np.arange(len(rows)), request):
            result[positions] = found.features.cpu().numpy()
        whole = torch.from_numpy(result)
        return run.passes.total(whole).cpu() if run.world > 1 else whole

    def _seed(self, run: Run) -> int:
        return run.stream_seed("less/projection")

    def _projected(self, run: Run, name: str, gradients: Tensor) -> Tensor:
        return projected(gradients, self.features, stream_of(self._seed(run), name), self.projection)

    def _update_features(self, run: Run, moments: dict[str, Any], name: str, gradients: Tensor) -> Tensor:
        return self._projected(run, name, adam_update(gradients, *moments[name]))

    # ---- Checkpoints ----

    def state_dict(self) -> dict[str, Any]:
        tables = {f"influence/{k}": table for k, table in enumerate(self._influences)}
        return {**super().state_dict(), "rates": self._rates, **tables}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._rates = list(state["rates"])
        self._influences = [state[f"influence/{k}"] for k in range(len(self._rates))]


def own_ids(run: Run, rank: int) -> np.ndarray:
    """The examples whose features a rank keeps."""
    return np.arange(rank, run.size, run.world)
