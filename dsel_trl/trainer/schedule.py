"""The learning rate's schedule, where a run is made of several."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def restart_rate(trainer: Any, starts: Sequence[int]) -> None:
    """
    Runs the trainer's own schedule, its warm-up included, through once from each of `starts` to the next.

    Args:
        trainer:
            A trainer whose scheduler is made and, on a resume, taken up from the checkpoint.
        starts (`Sequence[int]`):
            Optimizer steps, ascending from 0; those behind the end of the run do not count.

    Raises:
        `ValueError`: for a scheduler that is not a function of the step alone.
    """
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    if not isinstance(scheduler, LambdaLR) or scheduler is not trainer.lr_scheduler:
        raise ValueError(
            f"lr_scheduler_type={str(trainer.args.lr_scheduler_type)!r} ({type(trainer.lr_scheduler).__name__}) "
            'cannot be begun anew in each stage. Set schedule="run".'
        )
    args, total = trainer.args, int(trainer.state.max_steps)
    begins = [start for start in starts if start < total]
    parts = []
    for start, end in pairwise([*begins, total]):
        own = get_scheduler(
            args.lr_scheduler_type,
            optimizer=scheduler.optimizer,
            num_warmup_steps=min(args.get_warmup_steps(end - start), end - start),
            num_training_steps=end - start,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        parts.append(own.lr_lambdas[0])

    def rate(step: int) -> float:
        stage = bisect_right(begins, step) - 1
        return parts[stage](step - begins[stage])

    scheduler.lr_lambdas = [rate] * len(scheduler.lr_lambdas)
    # Making a scheduler sets the rate of its own first step.
    for group, base in zip(scheduler.optimizer.param_groups, scheduler.base_lrs, strict=True):
        group["lr"] = base * rate(scheduler.last_epoch)
