"""Per-pair values of the DPO losses that TRL reduces to a mean."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .margins import dpo_loss
from .preference.robust_dpo import robust_loss

# `aot` and `aot_unpaired` sort the batch, so a pair has no loss of its own.
COUPLED_LOSSES = frozenset({"aot", "aot_unpaired"})
SEPARABLE_LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


def f_divergence_scores(log_ratios: Tensor, f_divergence: str = "reverse_kl", alpha: float = 1.0) -> Tensor:
    """
    Score of a response under an f-divergence, `f'(t)` at `log t = log_ratios` (hf.co/papers/2309.16240).

    Args:
        log_ratios (`torch.Tensor`):
            Policy minus reference log-probabilities, any shape.
        f_divergence (`str`, *optional*, defaults to `"reverse_kl"`):
            `"reverse_kl"`, `"forward_kl"`, `"js_divergence"` or `"alpha_divergence"`.
        alpha (`float`, *optional*, defaults to `1.0`):
            Coefficient of the alpha divergence; 1 is the reverse KL.

    Raises:
        `ValueError`: for an unknown divergence.
    """
    if f_divergence == "reverse_kl" or (f_divergence == "alpha_divergence" and abs(alpha - 1.0) < 1e-6):
        return log_ratios
    if f_divergence == "forward_kl":
        return 1 - torch.exp(-log_ratios)
    if f_divergence == "js_divergence":
        return F.logsigmoid(log_ratios) + torch.log(torch.tensor(2.0))
    if f_divergence == "alpha_divergence":
        return (torch.exp(((alpha - 1.0) * log_ratios.float()).clamp(max=80.0)) - 1.0) / (alpha - 1.0)
    raise ValueError(f"Unknown f_divergence {f_divergence!r}.")


def pair_losses(
    loss_type: str,
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    chosen_logps: Tensor | None = None,
    discopop_tau: float = 0.05,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 1.0,
) -> Tensor:
    """
    Loss of each pair for TRL's `loss_type`, before its mean.

    Args:
        loss_type (`str`):
            One of `SEPARABLE_LOSSES`. For `"sft"`, a token mean over the batch in TRL, the value is the mean token
            loss of the pair's chosen response.
        chosen_log_ratios, rejected_log_ratios (`torch.Tensor` of shape `(B,)`):
            Policy minus reference log-probabilities, summed over the completion.
        beta (`float`):
            TRL's `beta`.
        label_smoothing (`float`, *optional*, defaults to `0.0`):
            Used by `"robust"` and `"exo_pair"`.
        chosen_lengths, rejected_lengths (`torch.Tensor` of shape `(B,)`, *optional*):
            Completion tokens; needed by `"ipo"`, `"sigmoid_norm"` and `"sft"`.
        chosen_logps (`torch.Tensor` of shape `(B,)`, *optional*):
            Policy log-probabilities of the chosen responses; needed by `"sft"`.

    Returns:
        `torch.Tensor` of shape `(B,)`.

    Raises:
        `ValueError`: for a loss whose rows are coupled, or an unknown one.
    """
    if loss_type in COUPLED_LOSSES:
        raise ValueError(f"{loss_type!r} sorts the batch: its pairs have no loss of their own.")
    chosen = f_divergence_scores(chosen_log_ratios, f_divergence, f_alpha)
    rejected = f_divergence_scores(rejected_log_ratios, f_divergence, f_alpha)
    reward_chosen, reward_rejected = beta * chosen_log_ratios, beta * rejected_log_ratios
    margin = beta * (chosen - rejected)
    if loss_type == "sigmoid":
        return dpo_loss(margin)
    if loss_type == "hinge":
        return torch.relu(1 - margin)
    if loss_type == "robust":
        return robust_loss(margin, label_smoothing)
    if loss_type == "exo_pair":
        smooth_tensor = torch.as_tensor(label_smoothing, dtype=margin.dtype, device=margin.device)
        return torch.sigmoid(margin) * (F.logsigmoid(margin) - torch.log1p(-smooth_tensor)) + torch.sigmoid(
            -margin
        ) * (F.logsigmoid(-margin) - torch.log(smooth_tensor))
    if loss_type == "nca_pair":
        return -F.logsigmoid(reward_chosen) - 0.5 * F.logsigmoid(-reward_chosen) - 0.5 * F.logsigmoid(-reward_rejected)
    if loss_type == "bco_pair":
        return -F.logsigmoid(reward_chosen) - F.logsigmoid(-reward_rejected)
    if loss_type == "sppo_hard":
        return (chosen_log_ratios - 0.5 / beta) ** 2 + (rejected_log_ratios + 0.5 / beta) ** 2
    if loss_type == "apo_zero":
        return 1 - torch.sigmoid(reward_chosen) + torch.sigmoid(reward_rejected)
    if loss_type == "apo_down":
        return torch.sigmoid(reward_chosen) + 1 - torch.sigmoid(reward_chosen - reward_rejected)
    if loss_type == "discopop":
        mix = torch.sigmoid(margin / discopop_tau)
        return -F.logsigmoid(margin) * (1 - mix) + torch.exp(-margin) * mix
    if loss_type in ("ipo", "sigmoid_norm"):
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(f"{loss_type!r} needs the completion lengths.")
        normalised = chosen / chosen_lengths.clamp(min=1) - rejected / rejected_lengths.clamp(min=1)
        return (normalised - 1 / (2 * beta)) ** 2 if loss_type == "ipo" else -F.logsigmoid(beta * normalised)
    if loss_type == "sft":
        if chosen_logps is None or chosen_lengths is None:
            raise ValueError("'sft' needs the chosen log-probabilities and lengths.")
        return -chosen_logps / chosen_lengths.clamp(min=1)
    raise ValueError(f"Unknown loss type {loss_type!r}; expected one of {SEPARABLE_LOSSES}.")
