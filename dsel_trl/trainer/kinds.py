"""What the kinds of trainers are: one record each."""

from typing import TYPE_CHECKING, Any

from datasets import Dataset
from torch import Tensor
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from ..signals.batch import ROW_LENGTHS, LossSettings
from ..signals.kto_batch import KTOBatch
from ..signals.pair_batch import PairBatch, RewardBatch
from ..signals.sequence_batch import SequenceBatch

if TYPE_CHECKING:
    _Trainer = Any
else:
    _Trainer = object


EXAMPLE_ID = "example_id"


COLUMNS = "example_columns"


KINDS = {"dpo": DPOTrainer, "sft": SFTTrainer, "kto": KTOTrainer, "reward": RewardTrainer}


# Reference log-probabilities that a prepared dataset may hold: of a pair, and of KTO's responses.
REFERENCES = {"ref_chosen_logps", "ref_rejected_logps", "ref_logps", "ref_KL_logps"}


# What else of a collated batch is no input of a model.
NOT_FOR_THE_MODEL = {"completion_mask", "labels", "label", EXAMPLE_ID, ROW_LENGTHS}


def trainer_kind(trainer: Any) -> str:
    """One of `KINDS`; `TypeError` for trainers whose signals are not known."""
    for kind, cls in KINDS.items():
        if isinstance(trainer, cls):
            return kind
    known = ", ".join(cls.__name__ for cls in KINDS.values())
    raise TypeError(f"{type(trainer).__name__} is not supported: use one of {known}.")


def loss_settings(trainer: Any) -> LossSettings:
    """What decides an example's loss, as the trainer holds it now (`beta` may change while it trains)."""
    kind = trainer_kind(trainer)
    if kind == "sft":
        return LossSettings()
    if kind == "reward":
        return LossSettings(center_rewards=trainer.args.center_rewards_coefficient or 0.0)
    if kind == "kto":
        return LossSettings(
            beta=trainer.beta,
            loss_types=(trainer.loss_type,),
            desirable_weight=trainer.desirable_weight,
            undesirable_weight=trainer.undesirable_weight,
        )
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


BATCHES = {"dpo": PairBatch, "sft": SequenceBatch, "kto": KTOBatch, "reward": RewardBatch}


def is_sequences(trainer: Any, inputs: dict[str, Any]) -> bool:
    """Whether a batch holds single sequences: always for SFT, and in passes over one side of the pairs."""
    return trainer_kind(trainer) == "sft" or "labels" in inputs


def labels_of(trainer: Any, inputs: dict[str, Any]) -> Tensor:
    """Labels of a collated batch, -100 where there is no loss."""
    if is_sequences(trainer, inputs):
        return inputs["labels"]
    if trainer_kind(trainer) == "reward":
        return inputs["input_ids"]  # no token has a loss of its own, but none is hidden either
    return inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)


def forwards_without_gradient(trainer: Any) -> int:
    """How many forwards without gradient belong to a training step: those of the reference, and of KTO's KL term."""
    kind = trainer_kind(trainer)
    reference = int(kind in ("dpo", "kto") and not trainer.precompute_ref_logps)
    return 2 * reference + 1 if kind == "kto" and trainer.calculate_KL else reference


def is_map_style(trainer: Any) -> bool:
    return isinstance(trainer.train_dataset, Dataset)
