"""What a method is, and where methods are registered."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from ..data.rows import UnreadableError
from ..signals.batch import Batch, Signal
from ..signals.ghost import ExampleGradients, GradientRequest
from .charges import Charge, charged, described
from .parameters import Reads
from .run import Run, Step

HOOKS = (
    "rebuild",
    "setup",
    "begin",
    "select",
    "order",
    "plan",
    "batch",
    "pick",
    "score",
    "weigh",
    "adjust",
    "extra_loss",
    "after_backward",
    "observe",
)


class Method:
    """
    A named algorithm: what it measures, and what it does about it.

    A subclass is a dataclass of parameters registered with [`register`]; its docstring is its card. It overrides the
    few hooks it needs; each default does nothing.

    Class attributes:
        signals (`tuple[Signal, ...]`): what it measures.
        trainers (`tuple[str, ...]`): which trainers it supports, of `"dpo"`, `"sft"`, `"kto"` and `"reward"`.
        columns: dataset columns it reads, as a property of its parameters.
        normalize (`str`): `"mean1"` divides its weights by their mean over the optimizer step, `"none"` leaves them;
            `"batch"` is for factors that undo the loss's mean over a batch: they are not written down as weights.
        packed_rows (`bool`): whether a packed row can stand for an example.
        carry_over (`bool`): whether an unfinished plan continues in the next epoch.
        epochs_are_passes (`bool`): whether training ends after as many passes over what is kept as there are epochs,
            however short the passes become; it needs `carry_over`.
        couples (`bool`): whether what it does to an example depends on the others of its micro-batch.
        own_loss (`bool`): whether it trains another loss than the trainer's; two such methods cannot go together.
        reads (`Reads`): conditions under which parameters are read ([`~dsel_trl.core.parameters.when`]); one that is
            set but not read is an error. Those of base classes count as well.
        renamed (`dict[str, str]`): earlier names of parameters, each with the present one and, where the meaning is
            another, how the one follows from the other in brackets; those of base classes count as well.
        paper, family, criterion, selector: entries of the card.
        charges (`tuple[Charge, ...]`): what it adds to a run, in figures.
        cost (`str`): the same in words, made of the figures; a class may say more, which then comes first.
    """

    name: ClassVar[str] = ""
    signals: ClassVar[tuple[Signal, ...]] = ()
    trainers: ClassVar[tuple[str, ...]] = ("dpo", "sft")
    packed_rows: ClassVar[bool] = False
    carry_over: ClassVar[bool] = False
    epochs_are_passes: ClassVar[bool] = False
    couples: ClassVar[bool] = False
    outputs: ClassVar[tuple[str, ...]] = ()
    paper: ClassVar[str] = ""
    family: ClassVar[str] = "indicator"
    criterion: ClassVar[str] = "internal"
    selector: ClassVar[str] = ""
    charges: ClassVar[tuple[Charge, ...]] = ()
    cost: ClassVar[str] = "no extra forward"
    state: ClassVar[str] = "its score column (8 bytes per example)"
    reads: ClassVar[Reads] = {}
    renamed: ClassVar[dict[str, str]] = {}

    normalize: str = "mean1"
    refresh: int | str | None = "epoch"
    own_loss: bool = False
    rebuilds_each_epoch: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__dict__.keys() & {"charges", "cost"}:
            cls.cost = described(cls.charges, cls.__dict__.get("cost", ""))

    def __post_init__(self) -> None:
        """Checks the parameters; [`register`] adds what all methods have in common."""

    @property
    def hooks(self) -> frozenset[str]:
        """The hooks this object uses: those its class overrides, less those its parameters switch off."""
        return frozenset(hook for hook in HOOKS if getattr(type(self), hook) is not getattr(Method, hook))

    @property
    def columns(self) -> tuple[str, ...]:
        """Numeric dataset columns that must be there."""
        return ()

    @property
    def list_columns(self) -> tuple[str, ...]:
        """Those of `columns` that may hold lists of numbers: the method checks them itself."""
        return ()

    @property
    def reads_batches(self) -> bool:
        """Whether the method looks at the batches at all; what reads nothing never fails."""
        return True

    @property
    def candidates(self) -> int:
        """How many candidates are drawn for one trained example (`pick`)."""
        return 1

    @property
    def references(self) -> bool:
        """Whether the reference model's log-probabilities are needed when candidates are scored."""
        return bool({Signal.REF_LOGPS, Signal.IMPLICIT_MARGIN, Signal.LOSS} & set(self.signals))

    @property
    def scores_candidates(self) -> bool:
        """Whether candidates go through the model before `pick`; where only their ids count, they need not."""
        return True

    def epoch_size(self, run: Run) -> int | None:
        """Examples per epoch, said before training starts; `None` = as many as are kept at the first plan."""
        return None

    def due(self, run: Run) -> bool:
        """Whether a new plan is wanted after the step that was just done."""
        return isinstance(self.refresh, int) and run.step % self.refresh == 0

    def units(self, run: Run) -> dict[str, float]:
        """How many there are in this run of what its `charges` are per."""
        arguments = run.arguments
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * run.world
        return {"run": 1, "example": run.size, "candidate": run.max_steps * step * self.candidates}

    def expected_cost(self, run: Run, **known: float) -> dict[str, tuple[float, float]]:
        """
        What its `charges` come to in this run, the least and the most examples by name of the counter
        ([`~dsel_trl.core.costs.Costs`]). `known` are units that are known better by now.
        """
        referred = run.trainer in ("dpo", "kto")
        has_reference = referred and not getattr(run.arguments, "precompute_ref_log_probs", False)
        return charged(self.charges, self, {**self.units(run), **known}, has_reference, referred)

    def reset(self) -> None:
        """Called when a run begins: forgets what an earlier run of the same trainer, or a failed attempt, has left."""
        if not dataclasses.is_dataclass(self):
            return
        for f in dataclasses.fields(self):
            if f.init:
                continue
            if f.default is not dataclasses.MISSING:
                setattr(self, f.name, f.default)
            elif f.default_factory is not dataclasses.MISSING:
                setattr(self, f.name, f.default_factory())
        if hasattr(self, "__post_init__"):
            self.__post_init__()

    def check(self, run: Run) -> None:
        """Called when the run is about to start: raises `ValueError` for what this dataset or trainer cannot serve."""

    def rebuild(self, run: Run, dataset: Any) -> Any:
        """
        Before training, and after each epoch where `rebuilds_each_epoch`: another dataset to train on, or `None`.

        The result has the user's columns; the trainer prepares it as it prepared the first one. After an epoch it must
        have as many rows as before.
        """
        return None

    def rebuild_evaluation(self, run: Run, dataset: Any) -> Any:
        """With `rebuild`, once: another dataset to evaluate on, or `None`."""
        return None

    def setup(self, run: Run) -> None:
        """Once, before the model is in place; may make passes over the data where it is not sharded."""

    def begin(self, run: Run) -> None:
        """
        When training begins and the model is in place, sharded too: passes made here work everywhere.

        Called after `setup`, and on a resume after `load_state_dict`; all ranks call it and must make the same passes.
        Every plan that is served is made after it. `epoch_size` (for a method that gives none, `select`; for one that
        batches, a first plan that is thrown away) is asked before it: it must not hang on what is measured here.
        """

    def select(self, run: Run) -> np.ndarray | None:
        """Which examples may be trained on, `(N,)` bool, at epoch start and every `refresh` steps."""
        return None

    def order(self, run: Run, ids: np.ndarray) -> np.ndarray:
        """`ids`, the kept examples not yet served in this epoch, in the order they shall be served."""
        return ids

    def plan(self, run: Run, epoch: int) -> np.ndarray | None:
        """Ids that come next, in order: for methods that keep and order in one. May repeat ids."""
        return None

    def batch(self, run: Run, ids: np.ndarray) -> list[np.ndarray]:
        """
        The planned `ids` as micro-batches of varying size: `run.world` consecutive ones make one micro-step.

        Batches of one micro-step should be of like length; their number must be a multiple of `run.world`
        ([`~dsel_trl.sampling.batch_sampler.over_ranks`]). Where `run.ordered`, batches should keep to the order of
        `ids` at large.
        """
        raise NotImplementedError

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        """Positions to train on out of an oversized candidate batch (all ranks'), best first."""
        raise NotImplementedError

    def score(self, batch: Batch) -> Tensor | dict[str, Tensor]:
        """
        One score per example, `(B,)`; higher = train on it first. Written to the ledger under the method's name.

        A mapping writes further columns, each under its key.
        """
        raise NotImplementedError

    def weigh(self, batch: Batch) -> Tensor | None:
        """Weights of this batch's gradients: `(B,)`, `(rows,)`, or `(rows, T)` per token; `None` = untouched."""
        return None

    def adjust(self, run: Run, batch: Batch) -> dict[str, float] | None:
        """After the forwards, before the loss: attributes of the trainer to hold other values for it (`beta`)."""
        return None

    def extra_loss(self, run: Run, batch: Batch) -> Tensor | None:
        """A scalar to be added to the loss."""
        return None

    def gradients(self, run: Run) -> GradientRequest | None:
        """
        Before the forwards of an optimizer step, on all ranks: what `after_backward` wants of the examples' gradients.

        `None` = nothing in this step: then nothing is recorded and `after_backward` is not called. The model is in
        place and holds no gradients, so that passes with gradient (`run.gradients.of`) can be made here. Wants of a
        micro-batch that is picked from are for `pick`.
        """
        return None

    def after_backward(self, run: Run, batch: Batch, gradients: ExampleGradients) -> dict[str, Tensor]:
        """
        Before the optimizer moves: `(B,)` values by name, written to the ledger like scores.

        Called for each micro-batch of this rank when all of them have been back-propagated: the parameters then hold
        the gradient of the whole step (`run.gradients.of_step`), before it is clipped.
        """
        return {}

    def collect(self, run: Run) -> None:
        """Before a checkpoint, on all ranks: brings together what `state_dict` gives of values that are sharded."""

    def observe(self, run: Run, step: Step) -> None:
        """After the optimizer step."""

    def survivors(self, run: Run) -> np.ndarray | None:
        """
        When a stage of a stream of datasets has ended: which examples later stages may see again, `(N,)` bool.

        `None` = all of them. All ranks call it and must make the same passes.
        """
        return None

    def state_dict(self) -> dict[str, Any]:
        """Arrays and JSON values for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""

    def parameters(self) -> dict[str, Any]:
        """The parameters as the user set them."""
        if not dataclasses.is_dataclass(self):
            return {}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}

    def describe(self) -> dict[str, Any]:
        """Name and parameters, as JSON can hold them."""
        return {"name": self.name, **{key: _plain(value) for key, value in self.parameters().items()}}


@contextlib.contextmanager
def naming(method: Method) -> Iterator[None]:
    """Around a hook that reads rows: what cannot be read is an error that names the method that needs it."""
    try:
        yield
    except UnreadableError as error:
        raise UnreadableError(f"{method.name!r} cannot be used here: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return type(value).__name__
