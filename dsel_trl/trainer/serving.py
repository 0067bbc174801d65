"""Serving the methods' plans through the trainer's own loader."""

from typing import Any

import numpy as np

from ..core.composition import Composition
from ..core.metrics import Metrics
from ..core.run import Run
from ..sampling.batch_sampler import BatchPlanSampler
from ..sampling.plan_sampler import PlanSampler
from .checkpoints import SavedSelection
from .checks import drops_last


class Serving:
    """
    Which examples come next: plans of the methods, through the sampler that the training iterates.

    A loader may be made at any time, by a callback that only asks for its length too: each gets a sampler of its own,
    and only that of the training's loader serves.

    Args:
        trainer:
            The re-typed trainer.
        methods ([`Composition`]):
            The methods of the run.
        run ([`Run`]):
            The run they see.
        metrics ([`Metrics`]):
            Is told of every plan.
        saved ([`~dsel_trl.trainer.checkpoints.SavedSelection`], *optional*):
            The checkpoint that is continued.
        anew (`bool`, *optional*, defaults to `False`):
            Whether it is continued with other batches, at the start of its next epoch.
    """

    def __init__(
        self,
        trainer: Any,
        methods: Composition,
        run: Run,
        metrics: Metrics,
        saved: SavedSelection | None,
        anew: bool = False,
    ) -> None:
        self.trainer, self.methods, self.run, self.metrics, self.saved = trainer, methods, run, metrics, saved
        self.anew = anew
        self.sampler: PlanSampler | BatchPlanSampler | None = None
        # Of the run that is continued: measured anew, live scores would give another length.
        self._length = (
            None
            if saved is None or "sampler" not in saved.values or (anew and methods.using("batch"))
            else int(saved.values["sampler"]["length"])
        )

    @property
    def batch_examples(self) -> int:
        """Examples of one micro-batch over all ranks, candidates included."""
        return self.trainer._train_batch_size * self.trainer.args.world_size * self.methods.candidates

    @property
    def served(self) -> int:
        """Examples handed out in this epoch, prefetched ones included."""
        return 0 if self.sampler is None else len(self.sampler.history)

    @property
    def through(self) -> bool:
        """Whether as many passes as there are epochs are trained, where a method takes the one for the other."""
        arguments = self.trainer.args
        if not self.methods.epochs_are_passes or self.sampler is None or arguments.max_steps > 0:
            return False
        trained = int(self.run.ledger.visits.sum(dtype=np.int64))
        return trained >= self.sampler.passes.after(arguments.num_train_epochs)

    def make_sampler(self) -> PlanSampler | BatchPlanSampler | None:
        """A sampler of the methods' plans, or `None` where no method plans."""
        if not self.methods.plans:
            return None
        sampler = self._batch_sampler() if self.methods.using("batch") else self._id_sampler()
        if self.saved is None:
            return sampler
        if self.anew and isinstance(sampler, BatchPlanSampler):
            # Batches formed for another shape cannot be served.
            sampler.plans_made = int(self.saved.values["sampler"]["plans_made"])
            return sampler
        replay = not self.anew and not self.trainer.args.ignore_data_skip
        sampler.load_state_dict(self.saved.part("sampler"), self.saved.values["sampler"], replay=replay)
        return sampler

    def serve(self, loader: Any) -> None:
        """The loader that the training iterates: its sampler is the one that counts."""
        self.sampler = getattr(getattr(loader, "dataset", None), "sampler", None)

    def step_done(self) -> None:
        """After an optimizer step: asks for a new plan where one is due."""
        if self.sampler is not None and self.methods.due(self.run):
            self.sampler.due = True

    def _batch_sampler(self) -> BatchPlanSampler:
        if self._length is None:
            # The epoch is as long as its first plan, or its share of it where a method says that it will need less.
            with self.run.costs.clock():
                batches = self.methods.plan_batches(self.run)[0]
            planned, wanted = sum(map(len, batches)), self.methods.epoch_size(self.run)
            self._length = -(-len(batches) * min(wanted, planned) // (planned * self.run.world))
        sampler = BatchPlanSampler(
            lambda served, made: self._plan_batches(served, made, sampler),
            self._length,
            self.trainer.accelerator.process_index,
            self.run.world,
            self.trainer.args.gradient_accumulation_steps,
        )
        return sampler

    def _id_sampler(self) -> PlanSampler:
        if self._length is None:
            with self.run.costs.clock():
                self._length = self.methods.epoch_size(self.run)
        if self._length < self.batch_examples and drops_last(self.trainer.args, self.methods):
            raise ValueError(
                f"Only {self._length} of {self.run.size} examples would be kept per epoch, fewer than one batch of "
                f"{self.batch_examples}, and dataloader_drop_last=True drops it: an epoch has no step. Set it to "
                "False, keep more, or use a smaller batch."
            )
        sampler = PlanSampler(
            lambda served, made: self._plan(served, made, sampler),
            self._length,
            self.batch_examples,
            self.methods.carry_over,
        )
        return sampler

    def _asked(self, served: np.ndarray, plans_made: int, sampler: PlanSampler | BatchPlanSampler) -> None:
        self.run.served, self.run.plans_made = served, plans_made
        self.run.passes_begun = sampler.passes.begun + (not len(served))

    def _plan(self, served: np.ndarray, plans_made: int, sampler: PlanSampler) -> np.ndarray:
        self._asked(served, plans_made, sampler)
        with self.run.costs.clock():
            ids, kept = self.methods.plan(self.run)
        self._planned(kept)
        return ids

    def _plan_batches(self, served: np.ndarray, plans_made: int, sampler: BatchPlanSampler) -> list[np.ndarray]:
        self._asked(served, plans_made, sampler)
        with self.run.costs.clock():
            batches, kept = self.methods.plan_batches(self.run)
        self._planned(kept)
        return batches

    def _planned(self, kept: np.ndarray) -> None:
        self.metrics.planned(kept, self.run.lengths if self.run.rows.tokenized else None)
