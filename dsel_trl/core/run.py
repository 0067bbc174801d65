"""What a method may see of the run it is attached to."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .costs import Costs
from .ledger import Ledger

if TYPE_CHECKING:
    from .data_passes import Passes

TRUTH_PREFIX = "truth_"


@dataclass
class Step:
    """
    What happened in one optimizer step, the same on every rank.

    Attributes:
        ids (`np.ndarray` of shape `(n,)`, int64):
            Examples trained, over all ranks and micro-batches.
        values (`dict[str, np.ndarray]`):
            Per-example values by name: the scores of the methods, `loss`, `implicit_margin` for preferences, `weight`.
    """

    ids: np.ndarray
    values: dict[str, np.ndarray]


@dataclass
class Run:
    """
    What a method may use of the run it is attached to.

    Attributes:
        trainer (`str`):
            Kind of trainer: `"dpo"`, `"sft"`, `"kto"` or `"reward"`.
        size (`int`):
            Number of examples; 0 for a stream.
        ledger ([`Ledger`]):
            What is known of every example.
        seed (`int`):
            Seed of every draw (TRL's `data_seed`, else `seed`).
        epoch, step, max_steps (`int`):
            Where the run is: epochs and optimizer steps done, steps planned.
        epochs (`float`):
            Epochs planned.
        plans_made (`int`):
            Plans made so far; with `seed` and `epoch` it keys the draws of a plan.
        served (`np.ndarray`):
            Ids handed out so far in this epoch (where batches are planned: in this pass).
        resumed (`bool`):
            Whether this run continues a checkpoint: what `setup` once computed is in the ledger already.
        arguments:
            The trainer's own arguments (`DPOConfig`, `SFTConfig`, ...), to read only.
        output_dir (`str`):
            Where the run writes; caches belong under it.
        dataset:
            The dataset as the trainer holds it: the user's columns and the token columns.
        passes ([`Passes`]):
            Extra forwards over the data.
        proxy (`Callable`):
            Trains a helper model: see [`~dsel_trl.trainer.helper_run.train_proxy`], without its first argument.
        generate (`Callable`):
            Samples from the policy: see [`~dsel_trl.trainer.generation.generate`], without its first argument.
        refer (`Callable`):
            Makes the reference model a copy of the policy, kept in a file, or of that file: see
            [`~dsel_trl.trainer.forwards.refer`], without its first argument.
        costs ([`Costs`]):
            What selection has added to the run so far.
        world (`int`):
            Number of processes.
        ordered (`bool`):
            Whether a method orders the examples: batches must then keep to that order at large.
    """

    trainer: str
    size: int
    ledger: Ledger
    seed: int = 0
    epoch: int = 0
    epochs: float = 1.0
    step: int = 0
    max_steps: int = 0
    plans_made: int = 0
    served: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    resumed: bool = False
    arguments: Any = None
    output_dir: str = ""
    processing_class: Any = None
    dataset: Any = None
    passes: "Passes | None" = None
    read_column: Callable[[str], np.ndarray] | None = None
    read_lengths: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    write_log: Callable[[dict[str, float]], None] | None = None
    proxy: Callable[..., Any] | None = None
    model: Any = None
    refer: Callable[[Path, bool], None] | None = None
    generate: Callable[..., list[list[str]]] | None = None
    costs: Costs = field(default_factory=Costs)
    world: int = 1
    ordered: bool = False

    @property
    def progress(self) -> float:
        """Share of the planned steps that are done, in [0, 1]."""
        return min(1.0, self.step / self.max_steps) if self.max_steps else 0.0

    def rng(self, *key: int) -> np.random.Generator:
        """A generator of this run's own, the same on every rank and after a resume for the same `key`."""
        return np.random.default_rng([self.seed, *key])

    def plan_rng(self) -> np.random.Generator:
        """The generator of the plan being made."""
        return self.rng(self.epoch, self.plans_made)

    def column(self, name: str) -> np.ndarray:
        """A numeric dataset column, `(N,)` float64, NaN where null. Columns with the truth of a test are refused."""
        refuse_truth(name)
        if self.read_column is None:
            raise ValueError(f"The column {name!r} cannot be read whole from a stream.")
        return self.read_column(name)

    @property
    def completion_lengths(self) -> np.ndarray:
        """Completion tokens per example (both sides of a pair), `(N,)` int32."""
        if self.read_lengths is None:
            raise ValueError("The lengths of a stream are not known in advance.")
        return self.read_lengths()[0]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example as it is trained (both sequences of a pair, prompts included), `(N,)` int32."""
        if self.read_lengths is None:
            raise ValueError("The lengths of a stream are not known in advance.")
        return self.read_lengths()[1]

    def log(self, values: dict[str, float]) -> None:
        """Adds values to the next row the trainer logs, as `selection/<name>`."""
        if self.write_log is not None:
            self.write_log(values)


def refuse_truth(name: str) -> None:
    if name.startswith(TRUTH_PREFIX):
        raise ValueError(f"Column {name!r} holds the answers a comparison is judged by: no method may read it.")
