"""The batches of a run, and what another shape of them means to a run that is continued."""

import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from ..core.composition import Composition
from ..core.method import Method
from .checks import drops_last

# A checkpoint's folder, as the trainer names it.
CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
# Orders of the trainer's own that do not depend on the batches.
FREE_ORDERS = ("random", "sequential")


@dataclass(frozen=True)
class Batches:
    """How the examples of an optimizer step come together."""

    per_device: int
    processes: int
    accumulation: int

    @classmethod
    def of(cls, trainer: Any) -> "Batches":
        args = trainer.args
        return cls(trainer._train_batch_size, args.world_size, args.gradient_accumulation_steps)

    @property
    def micro(self) -> int:
        """Examples of one micro-batch over all processes."""
        return self.per_device * self.processes

    @property
    def step(self) -> int:
        """Examples of one optimizer step."""
        return self.micro * self.accumulation

    def __str__(self) -> str:
        return (
            f"{self.step} examples per optimizer step (per_device_train_batch_size={self.per_device} x "
            f"{self.processes} processes x gradient_accumulation_steps={self.accumulation})"
        )

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def served(self, size: int, drop_last: bool) -> int:
        """Examples of an epoch over `size` of them."""
        return size // self.micro * self.micro if drop_last else size

    def shares_evenly(self, count: int) -> bool:
        """Whether a short last step of `count` examples counts each of them once and alike."""
        return count % self.micro == 0 or (self.processes == 1 and count < self.micro)


def difference(saved: Batches, now: Batches, trainer: Any, methods: Composition, size: int | None) -> str | None:
    """
    Why a run of the batches `saved` cannot be continued exactly with the batches `now`; `None` where it can.

    With as many examples per optimizer step the same examples are skipped and the same ones follow, and a mean over
    the step is the same mean; `size` is the number of examples per epoch, `None` of a stream.
    """
    if saved == now:
        return None
    if saved.step != now.step:
        return "the steps have other examples"
    if methods.using("batch"):
        return "the method forms its batches for one shape"
    if methods.candidates > 1:
        return "examples are picked out of each micro-batch"
    live = [m.name for m in methods.using("select", "order", "plan") if _plans_within_epochs(m)]
    if live:
        return f"{live[0]!r} plans within an epoch, as many examples ahead as the loader fetches"
    if coupled := [m.name for m in methods.methods if m.couples or "extra_loss" in m.hooks]:
        return f"{coupled[0]!r} looks at a micro-batch as a whole"
    if getattr(trainer, "calculate_KL", False):
        return "KTO's KL term is a mean over a micro-batch"
    if size is None:
        return "where a stream ends, and so its last step, is not known"
    order = getattr(trainer.args, "train_sampling_strategy", "random")
    if not methods.plans and order not in FREE_ORDERS:
        return f"train_sampling_strategy={order!r} depends on the batches"
    drop_last = drops_last(trainer.args, methods)
    if saved.served(size, drop_last) != now.served(size, drop_last):
        return f"dataloader_drop_last=True would drop others of the {size} examples of an epoch"
    last = now.served(size, drop_last) % now.step
    if not (saved.shares_evenly(last) and now.shares_evenly(last)):
        return f"the last step of an epoch has {last} examples, which would be dealt and averaged otherwise"
    return None


def _plans_within_epochs(method: Method) -> bool:
    return isinstance(method.refresh, int) or type(method).due is not Method.due


def trained_share(folder: str) -> float:
    """The epochs that the run of a checkpoint has trained."""
    return float(json.loads((Path(folder) / "trainer_state.json").read_text(encoding="utf-8"))["epoch"] or 0.0)


def restart_notice(folder: str, saved: Batches, now: Batches, reason: str, epochs: float, size: int | None) -> str:
    """What is said of a run that goes on with other batches at its next epoch, `epochs` having been trained."""
    following, text = math.ceil(epochs), ""
    if rest := following - epochs:
        text = f"The last {rest:.1%} of epoch {following} are left out"
        if size is not None:
            left = max(0, size - round((epochs % 1) * -(-size // saved.micro)) * saved.micro)
            text += f", {left} of {size} examples: those of the dataset that the ledger has not seen visited in it"
        text += ". "
    return (
        f"{folder} was trained with {saved}, this run has {now}, and {reason}. {text}Training goes on at the start of "
        f"epoch {following + 1}, and steps are counted anew in the new batches."
    )


def check_restart(output_dir: str, epoch: int, step: int, max_steps: int) -> None:
    """Refuses to go on at a step behind which there is nothing, or whose checkpoints would pass for old ones."""
    if step >= max_steps:
        raise ValueError(
            f"With other batches the run would go on at the start of epoch {epoch + 1}, which is step {step} of "
            f"{max_steps}: nothing is left to train. Resume with the batches of the checkpoint, or train for more "
            "epochs."
        )
    folders = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT.match(path.name)]
    newest = max((int(path.name.split("-")[1]) for path in folders), default=0)
    if newest > step:
        raise ValueError(
            f"With other batches the run would go on at step {step}, and checkpoint-{newest} in {output_dir!r} would "
            "pass for newer than what it saves: give another output_dir."
        )


def move_schedule(scheduler: Any, step: int) -> None:
    """Sets a learning-rate schedule that is a function of the step to `step`; one that looks at metrics stays."""
    scheduler = getattr(scheduler, "scheduler", scheduler)
    if not isinstance(scheduler, LambdaLR):
        return
    rates = [base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_last_lr": rates})
