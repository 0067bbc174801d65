"""Checkpoints: which are complete, and the selection's part of them."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.ledger import Ledger
from ..core.method import Method
from ..core.metrics import Metrics
from ..core.run import Run
from ..core.sidecar import part, read_sidecar, versions, write_sidecar
from ..data.rows import Rows
from ..sampling.batch_sampler import BatchPlanSampler
from ..sampling.plan_sampler import PlanSampler
from .batches import CHECKPOINT, Batches


def last_complete_checkpoint(output_dir: str) -> str:
    """
    The newest checkpoint that was written to its end: one in the making when its run was killed does not count.

    Raises:
        `ValueError`: if there is none.
    """
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.match(path.name)]
    problems = []
    for folder in sorted(folders, key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            check_finished(folder)
        except ValueError as error:
            problems.append(str(error))
            continue
        return str(folder)
    raise ValueError(f"No complete checkpoint found in output directory ({output_dir}). {' '.join(problems)}".strip())


def check_finished(folder: str | os.PathLike) -> None:
    """Raises `ValueError` if the last file of a checkpoint, by which it is complete, is missing or cut short."""
    state = Path(folder) / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is incomplete: {state.name} cannot be read ({error}).") from error


def saved_batch_size(folder: str | os.PathLike) -> int | None:
    """Examples per device and micro-batch of the run that saved a checkpoint, if it says so."""
    check_finished(folder)
    state = json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))
    return state.get("train_batch_size")


@dataclass
class SavedSelection:
    """The selection's part of a checkpoint, as it was read."""

    folder: str
    arrays: dict[str, np.ndarray]
    values: dict[str, Any]

    @property
    def batches(self) -> Batches:
        """The batches of the run that saved it."""
        if "batches" not in self.values:
            raise ValueError(
                f"{self.folder} does not say which batches it was made with: an earlier version saved it."
            )
        return Batches(**self.values["batches"])

    def part(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of one of its parts."""
        return part(self.arrays, name)

    def restore(self, run: Run, ledger: Ledger, metrics: Metrics) -> None:
        """Puts ledger, counters, costs and the place in the run back."""
        ledger.load_state_dict(self.part("ledger"), self.values["ledger"])
        run.resumed = True
        run.step, run.epoch = self.values["step"], self.values["epoch"]
        metrics.load_state_dict(self.values["metrics"])
        run.costs.load_state_dict(self.values["costs"])

    def restore_methods(self, methods: Sequence[Method]) -> None:
        """Puts the methods' own state back."""
        for index, method in enumerate(methods):
            method.load_state_dict({**self.values["methods"][index], **self.part(f"method{index}")})


def read_selection(folder: str | os.PathLike) -> SavedSelection:
    """The selection state of a complete checkpoint; `ValueError` says what is missing or broken."""
    check_finished(folder)
    return SavedSelection(str(folder), *read_sidecar(Path(folder) / "selection"))


def write_selection(
    folder: str | os.PathLike,
    *,
    fingerprint: dict[str, Any],
    run: Run,
    ledger: Ledger,
    metrics: Metrics,
    methods: Sequence[Method],
    sampler: PlanSampler | BatchPlanSampler | None,
    mid_epoch: bool,
    kl: float,
    batches: Batches,
) -> None:
    """Writes the state of a selection into the checkpoint `folder`."""
    arrays, ledger_values = ledger.state_dict()
    arrays = {f"ledger/{name}": array for name, array in arrays.items()}
    values: dict[str, Any] = {
        "fingerprint": fingerprint,
        "step": run.step,
        "epoch": run.epoch,
        "kl": kl,
        "batches": batches.state_dict(),
        "ledger": ledger_values,
        "metrics": metrics.state_dict(),
        "costs": run.costs.state_dict(),
        "methods": [],
    }
    if sampler is not None:
        sampler_arrays, values["sampler"] = sampler.state_dict(mid_epoch)
        arrays.update({f"sampler/{name}": array for name, array in sampler_arrays.items()})
    for index, method in enumerate(methods):
        state = method.state_dict()
        arrays.update(
            {f"method{index}/{name}": value for name, value in state.items() if isinstance(value, np.ndarray)}
        )
        values["methods"].append({k: v for k, v in state.items() if not isinstance(v, np.ndarray)})
    write_sidecar(Path(folder) / "selection", arrays, values)


def selection_fingerprint(
    run: Run, methods: Sequence[Method], columns: Sequence[str], user_rows: Rows | None
) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued."""
    dataset = "stream" if run.streaming else run.rows.fingerprint(columns)
    if user_rows is not None:
        dataset = f"{dataset} of {user_rows.fingerprint(columns)}"
    return {
        "dataset": dataset,
        "methods": [method.describe() for method in methods],
        "seed": run.seed,
        "versions": versions(),
    }
