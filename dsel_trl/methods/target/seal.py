"""SEAL: examples that go with a trusted set get weight, and then stay."""

from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.helper_model import SETTINGS, helper_settings
from ...bases.scored import known_scores
from ...bases.target import Targeted
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Run, Step
from ...core.parameters import Reads, check_choice, check_range, check_whole, when
from ...core.registry import register
from ...functional.ranking import keep_count, top_k
from ...functional.target.seal import (
    ACTIVATIONS,
    Moments,
    adam_update,
    selector_gradient,
    selector_weights,
    sparse_update,
    upper_weight,
)
from ...signals.batch import Batch, Signal

UPDATES = ("sparse", "adam", "sgd")
VALUES = ("none", "helper")


@register("seal")
@dataclass
class Seal(Targeted):
    """
    Learns a weight for each example by a trusted set trained beside the data, and then keeps the best.

    What: while it learns (`burn_in` passes), a step trains on `u` of the loss of some examples of `target`, the
    trusted set, and `1 - u` of the weighted loss of the batch; the logits behind the weights then go down where the
    loss is high under a model that is held to the trusted set (hf.co/papers/2410.07471, Algorithm 2). `u` begins at
    `upper` and falls by `decay` with each pass. After `burn_in` passes only the share `keep` of the largest logits is
    trained, without weights and without the trusted set. With `upper: 1`, the paper's start, the first pass learns
    from the trusted set alone. `update` says how the logits move: `sparse` by the distance to the step's mean loss,
    `adam` and `sgd` as in the paper (Adam loses how large a loss is where visits are rare).
    With `value: none` (the authors' code, Algorithm 2) the logits see the losses as they are, in which how hard an
    example is weighs more than how it goes with the trusted set. With `value: helper` they see them less those of a
    helper model trained on the data alone, the value function of Algorithm 1 at equal weights: what is high under the
    trusted set although it can be learned.
    With `anew` the model then starts again from where the run began, without what the optimizer has gathered: the two
    stages of the paper in one run (the learning rate's schedule goes on; the paper's is constant).
    SFT's batch loss is TRL's mean over tokens, the trusted loss and the logits' is a mean over examples.
    Steps: an epoch has as many as the passes of the run have on average. Lag: what is kept is chosen while the last
    batches of the burn-in are on their way.
    Time of the logits: 1 ms a step for 100,000 examples, 18 ms for 1,000,000 (with `update: adam` 28), on one core.
    When: fine-tuning an aligned model on data that may hurt it. When not: a trusted set that is unlike all of the data
    says nothing of it; less than a pass of burn-in leaves logits that were never moved; with `value: none`, data whose
    unwanted rows are easy: held to refusals, it ranks short empty compliance no lower than the rest.
    """

    target_batch: int = field(default=0, metadata={"help": "trusted examples per micro-batch; 0: as many as examples"})
    keep: float = field(default=0.8, metadata={"help": "fraction to keep after the burn-in, in (0, 1]"})
    burn_in: int = field(default=1, metadata={"help": "passes over the data that learn the logits"})
    anew: bool = field(
        default=False, metadata={"help": "after the burn-in the policy starts again from its first weights"}
    )
    upper: float = field(default=1.0, metadata={"help": "share of the trusted loss at the start, in [0, 1]"})
    decay: float = field(default=0.03, metadata={"help": "by how much that share falls with each pass"})
    value: str = field(
        default="none", metadata={"help": "none; helper: logits learn from losses less a helper model's"}
    )
    helper_model: str | None = field(
        default=None, metadata={"help": "another (smaller) model with the same tokenizer; default the policy as it is"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "helper model: LoRA (r 16) or full fine-tuning"})
    helper_epochs: float = field(default=1.0, metadata={"help": "helper model: epochs"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "helper model: default 3e-4, or without LoRA the run's own"}
    )
    activation: str = field(default="softmax", metadata={"help": f"one of {', '.join(ACTIVATIONS)}"})
    update: str = field(default="sparse", metadata={"help": f"one of {', '.join(UPDATES)}"})
    selector_learning_rate: float | None = field(
        default=None, metadata={"help": "of the logits; default 0.1, with update: adam 0.005"}
    )

    signals = (Signal.LOSS,)
    trainers = ("dpo", "sft")
    paper = "hf.co/papers/2410.07471"
    criterion = "external_discrete"
    selector = "top_k after learned weights"
    carry_over = True
    normalize = "none"
    refresh = "epoch"
    reads: ClassVar[Reads] = {name: (when("value", "helper"),) for name in SETTINGS}
    charges = (
        Charge("extra_losses", per="trusted example of the burn-in", reference=True, at_most=True),
        Charge("helper_trainings", "helper_epochs", when="value: helper", reference=True),
        Charge("helper_forwards", when="value: helper", reference=True),
    )
    state = "8 bytes per example; with update: adam 24; with value: helper 8 more"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_range("upper", self.upper, 0, 1)
        check_range("decay", self.decay, 0, 1)
        check_whole("burn_in", self.burn_in, 1)
        check_whole("target_batch", self.target_batch, 0)
        check_choice("value", self.value, VALUES)
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        check_choice("activation", self.activation, ACTIVATIONS)
        check_choice("update", self.update, UPDATES)
        if self.selector_learning_rate is not None:
            check_range("selector_learning_rate", self.selector_learning_rate, 0, float("inf"))
        self._logits = np.empty(0)
        self._moments = Moments(np.empty(0), np.empty(0), 0)
        self._weights, self._value = np.empty(0), np.empty(0)
        # Examples trained so far, and trusted micro-batches of the step that is going on.
        self._seen, self._micro = 0, 0
        self._planned: tuple[tuple[int, int], np.ndarray] | None = None

    @property
    def learning_rate(self) -> float:
        if self.selector_learning_rate is not None:
            return self.selector_learning_rate
        return 0.005 if self.update == "adam" else 0.1

    def check(self, run: Run) -> None:
        if run.size == 0:
            raise ValueError(f"{self.name!r} keeps a logit for each example, and those of a stream are not known.")
        super().check(run)

    def setup(self, run: Run) -> None:
        run.ledger.add(self.name)
        self._logits = np.zeros(run.size)
        self._moments = Moments(np.zeros(run.size), np.zeros(run.size), 0)
        self._weights = selector_weights(self._logits, self.activation)
        self._value = self._values(run)
        passes = max(1, int(np.ceil(run.epochs)))
        if self.burn_in >= passes and self.keep < 1 and not run.resumed:
            run.tell("seal", f"seal: burn_in={self.burn_in} is all of {passes} epochs: nothing is left out.", 30)

    def _values(self, run: Run) -> np.ndarray:
        """What is taken off the losses that the logits learn from, `(N,)`."""
        if self.value == "none":
            return np.zeros(run.size)
        name = f"{self.name}_value"
        if not run.resumed:
            run.ledger.write(name, None, self._helper_losses(run), 0)
        return known_scores(run, name).astype(np.float64)

    def _helper_losses(self, run: Run) -> np.ndarray:
        helper, ids = helper_settings(self, run.stream_seed(f"{self.name}/helper")), np.arange(run.size)

        def measure() -> dict[str, np.ndarray]:
            how = {"evaluations": 1, "description": "Helper model, evaluation", **helper}
            return {"loss": run.train_helper(ids, ids, attrgetter("loss"), **how)[-1]}

        return cached(run, "value-loss", [], measure, uses=("seed",), helpers=[helper])["loss"]

    def begin(self, run: Run) -> None:
        # A resumed run finds the first weights where the one before has kept them.
        if self.anew and self.learning and not run.resumed:
            run.restart(self._start(run), False)

    def _start(self, run: Run) -> Path:
        return Path(run.output_dir) / "selection" / "seal-start.safetensors"

    def units(self, run: Run) -> dict[str, float]:
        arguments, units = run.arguments, super().units(run)
        step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * run.world
        steps = -(-self.burn_in * run.size // step) + int(np.ceil(run.epochs))
        trusted = (self.target_batch or arguments.per_device_train_batch_size) * run.world
        return {
            **units,
            "trusted example of the burn-in": min(steps, run.max_steps or steps)
            * trusted
            * arguments.gradient_accumulation_steps,
        }

    # ---- What is trained ----

    def epoch_size(self, run: Run) -> int:
        passes = max(1, int(np.ceil(run.epochs)))
        first = min(self.burn_in, passes)
        return round((first * run.size + (passes - first) * keep_count(self.keep, run.size)) / passes)

    def due(self, run: Run) -> bool:
        # A pass is served to its end.
        return False

    def plan(self, run: Run, epoch: int) -> np.ndarray:
        plan = (run.epoch, run.plans_made)
        if self._planned is None or self._planned[0] != plan:
            ids = np.arange(run.size)
            if run.plans_made >= self.burn_in and self.keep < 1:
                # The logit of an example without a value has never moved, which says nothing of it.
                known = np.where(np.isfinite(self._value), self._logits, np.nan)
                ids = np.sort(top_k(known, keep_count(self.keep, run.size)))
                run.ledger.drop(~np.isin(np.arange(run.size), ids), self.name)
                rule = f"logits from {self._logits[ids].min():.6g} up are kept, a share of {self.keep:g}"
                run.ledger.decide(self.name, None, self._logits, run.step, rule)
            self._planned = plan, run.plan_rng("seal/order").permutation(ids)
        return self._planned[1]

    # ---- How it is learned ----

    @property
    def _pass(self) -> int:
        return self._seen // max(len(self._logits), 1)

    @property
    def learning(self) -> bool:
        """Whether the logits are still being learned."""
        return self._pass < self.burn_in

    @property
    def trusted_share(self) -> float:
        """Share of the trusted loss now, in [0, 1]."""
        return upper_weight(self.upper, self.decay, self._pass) if self.learning else 0.0

    def weigh(self, batch: Batch) -> Tensor | None:
        if not self.learning:
            return None
        weights = (1 - self.trusted_share) * self._weights[batch.ids.cpu().numpy()]
        return torch.from_numpy(weights.astype(np.float32)).to(batch.ids.device)

    def extra_loss(self, run: Run, batch: Batch) -> Tensor | None:
        share = self.trusted_share
        if share == 0:
            return None
        ids = self._trusted(run)
        self._micro += 1
        return share * run.loss(self.target_rows(run), ids).mean()

    def _trusted(self, run: Run) -> np.ndarray:
        """The trusted examples of this process's next micro-batch: pass after pass, each in its own order."""
        size = self.target_batch or run.arguments.per_device_train_batch_size
        per_step = size * run.world * run.arguments.gradient_accumulation_steps
        first = run.step * per_step + (self._micro * run.world + run.passes.rank) * size
        places, count = np.arange(first, first + size), len(self.target_rows(run))
        orders = {turn: run.rng("seal/target", int(turn)).permutation(count) for turn in np.unique(places // count)}
        return np.array([orders[place // count][place % count] for place in places])

    def observe(self, run: Run, step: Step) -> None:
        self._micro = 0
        if self.learning:
            run.log({"seal/upper": self.trusted_share})
            self._learn(step.ids, step.values["loss"] - self._value[step.ids])
            self._weights = selector_weights(self._logits, self.activation)
            run.ledger.write(self.name, step.ids, self._logits[step.ids], run.step)
        learning = self.learning
        self._seen += len(step.ids)
        if self.anew and learning and not self.learning:
            run.restart(self._start(run), True)

    def _learn(self, ids: np.ndarray, losses: np.ndarray) -> None:
        if self.update == "sparse":
            self._logits = sparse_update(self._logits, ids, losses, self.learning_rate, self.activation)
            return
        gradient = selector_gradient(self._logits, ids, losses, self.activation)
        if self.update == "sgd":
            self._logits = self._logits - self.learning_rate * gradient
        else:
            self._logits, self._moments = adam_update(self._logits, gradient, self._moments, self.learning_rate)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"logits": self._logits, "seen": self._seen}
        if self.update == "adam":
            state |= {"mean": self._moments.mean, "square": self._moments.square, "steps": self._moments.steps}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._logits, self._seen = state["logits"].copy(), int(state["seen"])
        self._weights = selector_weights(self._logits, self.activation)
        if self.update == "adam":
            self._moments = Moments(state["mean"].copy(), state["square"].copy(), int(state["steps"]))
