"""What a method may see of the run it is attached to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.rows import Rows, UnreadableError
from .costs import Costs
from .data_passes import Passes
from .ledger import Ledger
from .randomness import stream, stream_seed


@dataclass
class Step:
    """
    What happened in one optimizer step, the same on every rank.

    Attributes:
        ids (`np.ndarray` of shape `(n,)`, int64):
            Examples trained, over all ranks and micro-batches.
        values (`dict[str, np.ndarray]`):
            Per-example values by name: the scores of the methods, `loss`, `implicit_margin` for preferences, `weight`.
        learning_rate (`float`):
            Of the step (of the first parameter group); NaN where it was not seen.
        clip_factor (`float`):
            What clipping has multiplied the gradient by.
        skipped (`bool`):
            Whether the optimizer left the step out, as it does when gradients in half precision overflow.
    """

    ids: np.ndarray
    values: dict[str, np.ndarray]
    learning_rate: float = float("nan")
    clip_factor: float = 1.0
    skipped: bool = False


@dataclass(frozen=True)
class Decision:
    """
    By which scores a method has just chosen what to keep.

    Attributes:
        scores (`np.ndarray` of shape `(N,)`):
            The score of every example; NaN for one that was decided on without a score.
        how (`str`):
            What was done about them, such as `"keep_top, keep=0.5"`.
    """

    scores: np.ndarray
    how: str = ""

    def rule(self, kept: np.ndarray) -> str:
        """What became of the scores in words, with the cut; `kept` `(N,)` bool."""
        how = f" ({self.how})" if self.how else ""
        inside, outside = self.scores[kept & np.isfinite(self.scores)], self.scores[~kept & np.isfinite(self.scores)]
        if not len(inside) or not len(outside):
            return f"only what has a score is kept{how}"
        low, high = inside.min(), inside.max()
        if outside.max() <= low:
            return f"scores from {low:.6g} up are kept{how}"
        if outside.min() >= high:
            return f"scores up to {high:.6g} are kept{how}"
        if not ((outside > low) & (outside < high)).any():
            return f"scores from {low:.6g} to {high:.6g} are kept{how}"
        return f"drawn by their scores{how}"


@dataclass
class Run:
    """
    What a method may use of the run it is attached to.

    Attributes:
        trainer (`str`):
            Kind of trainer: `"dpo"`, `"sft"`, `"kto"` or `"reward"`.
        ledger ([`Ledger`]):
            What is known of every example.
        training_rows ([`~dsel_trl.data.rows.Rows`], *optional*):
            The training set, to be asked for as `rows`; `None` for a stream.
        arguments:
            The trainer's own arguments (`DPOConfig`, `SFTConfig`, ...), to read only.
        output_dir (`str`):
            Where the run writes; caches belong under it.
        processing_class:
            The trainer's tokenizer or processor.
        model:
            The policy, to read only.
        reference:
            The separate reference model of the trainer, to read only; `None` where it has none.
        passes ([`Passes`]):
            Extra forwards over rows.
        prepare (`Callable[[Dataset, str], Rows]`):
            Other rows than the training set: a dataset, prepared as the trainer prepares its own, and its name.
        load (`Callable[[str, str, str], Dataset]`):
            A dataset of the user's by its name (a file, a folder, a hub id, or `demo` in this trainer's form), its
            split, and the parameter that says the split, for the error.
        loss (`Callable[[Rows, np.ndarray], Tensor]`):
            Loss of each of some examples of any rows with gradient, for `extra_loss`: a term of this step's own loss.
            Every process must ask for as many.
        train_helper (`Callable`):
            Trains a model beside the run: see [`~dsel_trl.trainer.helper_run.train_helper`], without its first
            argument.
        generate (`Callable`):
            Samples from the policy: see [`~dsel_trl.trainer.generation.generate`], without its first argument.
        refer (`Callable[[Path, bool], None]`):
            Makes the reference model a copy of the policy, kept in a file, or of that file: see
            [`~dsel_trl.trainer.forwards.refer`], without its first argument.
        gradients ([`~dsel_trl.trainer.gradients.ModelGradients`]):
            Gradients of other examples than the batch's, of the step, and what the optimizer knows of them.
        restart_rate (`Callable[[Sequence[int]], None]`):
            Runs the schedule of the learning rate through once from each of some steps to the next: see
            [`~dsel_trl.trainer.schedule.restart_rate`], without its first argument; to be called in `begin`.
        restart (`Callable[[Path, bool], None]`):
            Keeps the policy's trained parameters in a file, or starts it again from that file with an empty optimizer:
            see [`~dsel_trl.trainer.forwards.restart`], without its first argument.
        costs ([`Costs`]):
            What selection has added to the run so far.
        log (`Callable[[dict[str, float]], None]`):
            Adds values to the next row the trainer logs, as `selection/<name>`.
        tell (`Callable[[str, str, int], None]`):
            Says something once, under a key and at a level of `logging`; it is also written to `summary.json`.
        seed (`int`):
            Seed of every draw (TRL's `data_seed`, else `seed`).
        epoch, step, max_steps (`int`):
            Where the run is: epochs and optimizer steps done, steps planned.
        epochs (`float`):
            Epochs planned.
        plans_made (`int`):
            Plans made so far; with `seed` and `epoch` it keys the draws of a plan.
        served (`np.ndarray`):
            Ids handed out so far in this epoch (where batches are planned, or plans carried over: in this pass).
        passes_begun (`int`):
            Number of passes begun before the plan that is being made, its own one included: 1 = the first.
        resumed (`bool`):
            Whether this run continues a checkpoint: what `setup` once computed is in the ledger already.
        world (`int`):
            Number of processes.
        sharded (`bool`):
            Whether FSDP or DeepSpeed holds the model: it is in place only when training begins (`begin`); before that
            it may lie on the CPU, whatever the training device is.
        ordered (`bool`):
            Whether a method orders the examples: batches must then keep to that order at large.
    """

    trainer: str
    ledger: Ledger
    training_rows: Rows | None
    arguments: Any
    output_dir: str
    processing_class: Any
    model: Any
    reference: Any
    passes: Passes
    prepare: Callable[[Any, str], Rows]
    load: Callable[[str, str, str], Any]
    loss: Callable[[Rows, np.ndarray], Any]
    train_helper: Callable[..., Any]
    generate: Callable[..., list[list[str]]]
    refer: Callable[[Path, bool], None]
    gradients: Any
    restart_rate: Callable[[Sequence[int]], None]
    restart: Callable[[Path, bool], None]
    costs: Costs
    log: Callable[[dict[str, float]], None]
    tell: Callable[[str, str, int], None]
    seed: int = 0
    epoch: int = 0
    epochs: float = 1.0
    step: int = 0
    max_steps: int = 0
    plans_made: int = 0
    served: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    passes_begun: int = 1
    resumed: bool = False
    decision: Decision | None = None
    shared: Path | None = None
    world: int = 1
    sharded: bool = False
    ordered: bool = False

    @property
    def streaming(self) -> bool:
        """Whether the examples are known only as they come."""
        return self.training_rows is None

    @property
    def rows(self) -> Rows:
        """
        The training set.

        Raises:
            `UnreadableError`: for a stream, which cannot be read ahead.
        """
        if self.training_rows is None:
            raise UnreadableError(
                "the dataset is a stream: its examples, columns, texts and lengths are not known before they come. "
                "Load it without streaming."
            )
        return self.training_rows

    @property
    def size(self) -> int:
        """Number of examples; 0 for a stream."""
        return 0 if self.training_rows is None else len(self.training_rows)

    @property
    def dataset(self) -> Any:
        """The training set as the trainer holds it: the user's columns and the token columns."""
        return self.rows.dataset

    def plan_steps(self, refresh: int | str | None) -> set[int]:
        """Steps at which a plan that is made anew by `refresh` is made in this run, the first (0) among them."""
        if refresh == "never":
            return {0}
        starts = set(range(0, max(self.max_steps, 1), max(1, round(self.max_steps / max(self.epochs, 1)))))
        return starts | (set(range(0, self.max_steps, refresh)) if isinstance(refresh, int) else set())

    @property
    def progress(self) -> float:
        """Share of the planned steps that are done, in [0, 1]."""
        return min(1.0, self.step / self.max_steps) if self.max_steps else 0.0

    def decide(self, scores: np.ndarray, how: str = "") -> None:
        """Says, inside of `select`, by which scores of all examples `(N,)` it chooses: the ledger keeps them."""
        self.decision = Decision(scores, how)

    def rng(self, name: str, *key: int) -> np.random.Generator:
        """
        The stream of this run with a name such as `"random/keep"` (whose draw, and of what) and a key (which one).

        The same on every rank and after a resume; no two names or keys share one.
        """
        return stream(self.seed, name, *key)

    def stream_seed(self, name: str, *key: int) -> int:
        """A seed in [0, 2**31), named like a stream, for what takes no generator."""
        return stream_seed(self.seed, name, *key)

    def plan_rng(self, name: str = "plan") -> np.random.Generator:
        """The stream of the plan being made, or of a method's own draws for it."""
        return self.rng(name, self.epoch, self.plans_made)

    def column(self, name: str) -> np.ndarray:
        """A numeric dataset column, `(N,)` float64, NaN where null. Columns with the truth of a test are refused."""
        return self.rows.column(name)

    def values(self, name: str, reader: str = "") -> Any:
        """
        A dataset column of any type, as the dataset gives it. Columns with the truth of a test are refused.

        Args:
            name (`str`):
                The column.
            reader (`str`, *optional*):
                Who asks, such as the parameter that named it: the beginning of an error.
        """
        return self.rows.values(name, reader)

    @property
    def completion_lengths(self) -> np.ndarray:
        """Completion tokens per example (both sides of a pair), `(N,)` int32."""
        return self.rows.completion_lengths

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per example as it is trained (both sequences of a pair, prompts included), `(N,)` int32."""
        return self.rows.lengths
