"""What a kind of trainer is: one record each. A further kind is one more record here, and nothing elsewhere."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from trl import (
    DPOConfig,
    DPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

from ..data.demo.corpus import demo_completions, demo_judged, demo_preferences
from ..data.lengths import list_lengths
from ..data.rows import Layout, Rows
from ..signals.batch import ROW_LENGTHS, Batch, LossSettings
from ..signals.kto_batch import KTOBatch
from ..signals.pair_batch import PairBatch, RewardBatch
from ..signals.sequence_batch import SequenceBatch
from ..signals.tap import Reading
from .kto import Collator, kl_labels, kl_term, paired_anew

EXAMPLE_ID = "example_id"
COLUMNS = "example_columns"
# What of a collated batch is no input of a model.
NOT_FOR_THE_MODEL = {"completion_mask", "labels", "label", EXAMPLE_ID, ROW_LENGTHS}


@dataclass(frozen=True)
class Measure:
    """What a held-out set says of a run: the trainer's own metric, its name in a table, and how it is written."""

    key: str
    name: str
    form: str


@dataclass(frozen=True)
class TrainerKind:
    """
    All that differs between the trainers.

    Attributes:
        name (`str`):
            What users write: `dsel dpo`, `trainers = ("dpo", ...)`.
        what (`str`):
            One line for the command line's help.
        trainer, config (`type`):
            TRL's classes.
        batch (`type[Batch]`):
            A micro-batch of its examples.
        layout ([`~dsel_trl.data.rows.Layout`]):
            Where its prepared rows hold their responses.
        columns (`tuple[tuple[str, ...], ...]`):
            What a row of the user's must hold: one of these sets of columns.
        demo (`Callable`):
            The built-in corpus in its form.
        measure ([`Measure`]):
            What its evaluation says.
        settings (`Callable[[Any], LossSettings]`):
            What decides an example's loss, as the trainer holds it now.
        labels (`Callable[[dict], Tensor]`):
            Labels of a collated batch, -100 where there is no loss.
        other_labels (`Callable[[dict], Tensor | None]`):
            Labels of the rows of a collated batch that are no examples, where there are such rows.
        margin (`bool`):
            Whether an example has an implicit margin.
        heads (`bool`):
            Whether the model gives one number per row instead of a token distribution.
        token_mean (`bool`):
            Whether its loss is a mean over the trained tokens of a batch, instead of one over the examples.
        inner_loss (`bool`):
            Whether a model without the fused head computes the loss in its own forward.
        references (`tuple[str, ...]`):
            Columns of reference log-probabilities that a prepared dataset may hold.
        reference (`Callable[[Any], bool]`):
            Whether a training step runs a reference model.
        kl (`Callable[[Any], bool]`):
            Whether a training step has a KL term of its own, which `kl_term` reads.
        regrouped (`Callable[[Any, Collator], Collator]`):
            The collator of batches that are not those of the dataset's own order.
        kept (`Callable[[Rows], np.ndarray]`):
            Which rows the trainer keeps when it prepares a dataset, `(N,)` bool.
        prepare_arguments (`Callable[[Any], list]`):
            What the trainer's `_prepare_dataset` takes between its arguments and the dataset's name.
    """

    name: str
    what: str
    trainer: type
    config: type
    batch: type[Batch]
    layout: Layout
    columns: tuple[tuple[str, ...], ...]
    demo: Callable[..., Any]
    measure: Measure
    settings: Callable[[Any], LossSettings]
    labels: Callable[[dict[str, Any]], Tensor]
    kept: Callable[[Rows], np.ndarray]
    other_labels: Callable[[dict[str, Any]], Tensor | None] = lambda inputs: None
    margin: bool = True
    heads: bool = False
    token_mean: bool = False
    inner_loss: bool = False
    references: tuple[str, ...] = ()
    reference: Callable[[Any], bool] = lambda trainer: False
    kl: Callable[[Any], bool] = lambda trainer: False
    kl_term: Callable[[Any, dict[str, Any], Reading], Tensor] = kl_term
    regrouped: Callable[[Any, Collator], Collator] = lambda trainer, collator: collator
    prepare_arguments: Callable[[Any], list[Any]] = lambda trainer: []

    def forwards_without_gradient(self, trainer: Any) -> int:
        """How many forwards without gradient belong to a training step: of the reference, and of a KL term."""
        reference = int(self.reference(trainer))
        return 2 * reference + 1 if self.kl(trainer) else reference


def _completion_labels(inputs: dict[str, Any]) -> Tensor:
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def _room_for_completions(rows: Rows) -> np.ndarray:
    """Where the prompt leaves room: a trainer drops a pair or response whose prompt fills `max_length`."""
    prompts = list_lengths(rows.dataset, "prompt_ids")
    if rows.max_length is None or rows.truncation != "keep_start":
        return np.ones(len(prompts), dtype=bool)
    return prompts < rows.max_length


def _whole_pairs(rows: Rows) -> np.ndarray:
    """Where both sequences fit: a reward model's pair that is longer than `max_length` is dropped."""
    longest = np.max([list_lengths(rows.dataset, f"{side}_ids") for side in rows.layout.sides], axis=0)
    return np.ones(len(longest), dtype=bool) if rows.max_length is None else longest <= rows.max_length


def _trained_tokens(rows: Rows) -> np.ndarray:
    """Where a token is left that carries loss."""
    return rows.completion_lengths > 0


def _runs_reference(trainer: Any) -> bool:
    return not trainer.precompute_ref_logps


def _dpo_settings(trainer: Any) -> LossSettings:
    return LossSettings(
        beta=trainer.beta,
        loss_types=tuple(trainer.loss_types),
        loss_weights=tuple(trainer.loss_weights),
        label_smoothing=trainer.label_smoothing,
        discopop_tau=trainer.args.discopop_tau,
        f_divergence=trainer.f_divergence_type,
        f_alpha=trainer.f_alpha_divergence_coef,
        ld_alpha=trainer.ld_alpha,
        use_weighting=trainer.use_weighting,
    )


def _kto_settings(trainer: Any) -> LossSettings:
    return LossSettings(
        beta=trainer.beta,
        loss_types=(trainer.loss_type,),
        desirable_weight=trainer.desirable_weight,
        undesirable_weight=trainer.undesirable_weight,
    )


KINDS: dict[str, TrainerKind] = {
    kind.name: kind
    for kind in (
        TrainerKind(
            name="dpo",
            what="preference training with selection (TRL's DPOTrainer)",
            trainer=DPOTrainer,
            config=DPOConfig,
            batch=PairBatch,
            layout=Layout(("chosen", "rejected"), prompts=True),
            columns=(("chosen", "rejected"),),
            demo=demo_preferences,
            measure=Measure("eval_rewards/accuracies", "held-out accuracy", "{:.1%}"),
            settings=_dpo_settings,
            labels=_completion_labels,
            kept=_room_for_completions,
            references=("ref_chosen_logps", "ref_rejected_logps"),
            reference=_runs_reference,
        ),
        TrainerKind(
            name="sft",
            what="supervised fine-tuning with selection (TRL's SFTTrainer)",
            trainer=SFTTrainer,
            config=SFTConfig,
            batch=SequenceBatch,
            layout=Layout(beside=("seq_lengths",)),
            columns=(("messages",), ("prompt", "completion"), ("input_ids",), ("conversations",)),
            demo=demo_completions,
            measure=Measure("eval_loss", "held-out loss", "{:.4f}"),
            settings=lambda trainer: LossSettings(),
            labels=lambda inputs: inputs["labels"],
            kept=_trained_tokens,
            margin=False,
            token_mean=True,
            inner_loss=True,
            prepare_arguments=lambda trainer: [trainer.args.packing, trainer._formatting_func],
        ),
        TrainerKind(
            name="kto",
            what="training on responses that are desirable or not, with selection (TRL's KTOTrainer)",
            trainer=KTOTrainer,
            config=KTOConfig,
            batch=KTOBatch,
            layout=Layout(("completion",), prompts=True, beside=("label",)),
            columns=(("completion", "label"), ("chosen", "rejected")),
            demo=demo_judged,
            measure=Measure("eval_loss", "held-out loss", "{:.4f}"),
            settings=_kto_settings,
            labels=_completion_labels,
            other_labels=kl_labels,
            kept=_room_for_completions,
            references=("ref_logps", "ref_KL_logps"),
            reference=_runs_reference,
            kl=lambda trainer: bool(trainer.calculate_KL),
            regrouped=paired_anew,
        ),
        TrainerKind(
            name="reward",
            what="training of a reward model with selection (TRL's RewardTrainer)",
            trainer=RewardTrainer,
            config=RewardConfig,
            batch=RewardBatch,
            layout=Layout(("chosen", "rejected")),
            columns=(
                ("chosen", "rejected"),
                ("chosen_ids", "rejected_ids"),
                ("chosen_input_ids", "rejected_input_ids"),
            ),
            demo=demo_preferences,
            measure=Measure("eval_accuracy", "held-out accuracy", "{:.1%}"),
            settings=lambda trainer: LossSettings(center_rewards=trainer.args.center_rewards_coefficient or 0.0),
            # No token has a loss of its own, but none is hidden either.
            labels=lambda inputs: inputs["input_ids"],
            kept=_whole_pairs,
            heads=True,
        ),
    )
}


def trainer_kind(trainer: Any) -> TrainerKind:
    """The record of a trainer; `TypeError` for trainers whose signals are not known."""
    for kind in KINDS.values():
        if isinstance(trainer, kind.trainer):
            return kind
    known = ", ".join(kind.trainer.__name__ for kind in KINDS.values())
    raise TypeError(f"{type(trainer).__name__} is not supported: use one of {known}.")


def batch_type(kind: TrainerKind, inputs: dict[str, Any]) -> type[Batch]:
    """The batch that collated inputs are: passes over one side of the pairs give sequences, with labels."""
    return SequenceBatch if "labels" in inputs else kind.batch


def labels_of(kind: TrainerKind, inputs: dict[str, Any]) -> Tensor:
    """Labels of a collated batch, -100 where there is no loss."""
    return inputs["labels"] if "labels" in inputs else kind.labels(inputs)


def is_map_style(trainer: Any) -> bool:
    """Whether the training set can be read at any place, as a stream cannot."""
    return isinstance(trainer.train_dataset, Dataset)
