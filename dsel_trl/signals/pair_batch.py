"""A micro-batch of preference pairs."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..functional.dpo_losses import pair_losses
from ..functional.margins import implicit_margin, log_ratio_margin
from ..functional.preference.wpo import aligned_logps, wpo_pair_weight
from .batch import Batch, Forward


@dataclass
class PairBatch(Batch):
    """A micro-batch of preference pairs: 2B rows, the chosen ones first."""

    @cached_property
    def token_mask(self) -> Tensor:
        """Completion tokens, `(2B, T)` bool, aligned with the log-probabilities."""
        return self.inputs["completion_mask"][:, 1:].bool()

    def _sums(self, forward: Forward) -> tuple[Tensor, Tensor]:
        logps = forward.log_probs[:, -self.token_mask.shape[1] :].float()
        if self.settings.ld_alpha is not None:
            position = self.token_mask.cumsum(dim=1)
            shared = torch.minimum(self.chosen_lengths, self.rejected_lengths).repeat(2).unsqueeze(1)
            logps = torch.where(position > shared, logps * self.settings.ld_alpha, logps)
        chosen, rejected = (logps * self.token_mask).sum(dim=1).chunk(2)
        return chosen, rejected

    @cached_property
    def _lengths(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.token_mask.sum(dim=1).chunk(2)
        return chosen, rejected

    chosen_lengths = property(lambda self: self._lengths[0], doc="Completion tokens of the chosen responses, `(B,)`.")
    rejected_lengths = property(lambda self: self._lengths[1], doc="Completion tokens of the rejected ones, `(B,)`.")

    @cached_property
    def _policy_sums(self) -> tuple[Tensor, Tensor]:
        return self._sums(self.policy)

    @cached_property
    def _ref_sums(self) -> tuple[Tensor, Tensor]:
        if "ref_chosen_logps" in self.inputs:
            return self.inputs["ref_chosen_logps"].float(), self.inputs["ref_rejected_logps"].float()
        if self.reference is None:
            raise ValueError("This batch was scored without its reference model.")
        return self._sums(self.reference)

    policy_chosen_logps = property(lambda self: self._policy_sums[0], doc="Summed log-probabilities, `(B,)`.")
    policy_rejected_logps = property(lambda self: self._policy_sums[1], doc="Summed log-probabilities, `(B,)`.")
    ref_chosen_logps = property(lambda self: self._ref_sums[0], doc="Summed reference log-probabilities, `(B,)`.")
    ref_rejected_logps = property(lambda self: self._ref_sums[1], doc="Summed reference log-probabilities, `(B,)`.")

    @property
    def _logps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *self._policy_sums, *self._ref_sums

    @cached_property
    def log_ratio_margin(self) -> Tensor:
        """Policy-minus-reference log-probability of chosen minus that of rejected, `(B,)`, not scaled by beta."""
        return log_ratio_margin(*self._logps)

    @cached_property
    def implicit_margin(self) -> Tensor:
        """`beta * log_ratio_margin`: the reward margin as TRL logs it, `(B,)`."""
        return implicit_margin(*self._logps, beta=self.settings.beta)

    @cached_property
    def loss(self) -> Tensor:
        """Loss of each pair under the trainer's own loss types and weights, `(B,)`."""
        s = self.settings
        total = torch.zeros_like(self.policy_chosen_logps)
        for loss_type, loss_weight in zip(s.loss_types, s.loss_weights, strict=True):
            total = total + loss_weight * pair_losses(
                loss_type,
                self.policy_chosen_logps - self.ref_chosen_logps,
                self.policy_rejected_logps - self.ref_rejected_logps,
                beta=s.beta,
                label_smoothing=s.label_smoothing,
                chosen_lengths=self.chosen_lengths,
                rejected_lengths=self.rejected_lengths,
                chosen_logps=self.policy_chosen_logps,
                discopop_tau=s.discopop_tau,
                f_divergence=s.f_divergence,
                f_alpha=s.f_alpha,
            )
        return total * self._wpo_weight if s.use_weighting else total

    @property
    def _wpo_weight(self) -> Tensor:
        """TRL's own weight of each pair under `use_weighting`."""
        assert self.policy.log_sum_sq_probs is not None
        width = self.token_mask.shape[1]
        expected = self.policy.log_sum_sq_probs[:, -width:]
        aligned = aligned_logps(self.policy.log_probs[:, -width:], expected, self.token_mask)
        chosen, rejected = aligned.chunk(2)
        return wpo_pair_weight(chosen, rejected, None)

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of the pair as it is trained: both sequences with their prompts, `(B,)`."""
        chosen, rejected = self.inputs["attention_mask"].sum(dim=1).chunk(2)
        return chosen + rejected

    def row_weights(self, weights: Tensor) -> Tensor:
        return weights if weights.dim() > 1 or weights.numel() == 2 * self.size else weights.repeat(2)

    def example_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() > 1:
            weights = (weights * self.token_mask).sum(dim=1) / self.token_mask.sum(dim=1).clamp(min=1)
        return weights.view(2, self.size).mean(dim=0)


@dataclass
class RewardBatch(PairBatch):
    """A micro-batch of pairs as a reward model sees them: one reward per row in the place of log-probabilities."""

    @cached_property
    def token_mask(self) -> Tensor:
        return self.inputs["attention_mask"][:, 1:].bool()

    @cached_property
    def _policy_sums(self) -> tuple[Tensor, Tensor]:
        raise ValueError("A reward model gives rewards, no log-probabilities.")

    @cached_property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """Rewards of the chosen and of the rejected responses, `(B,)` each."""
        chosen, rejected = self.policy.log_probs.float().squeeze(-1).chunk(2)
        return chosen, rejected

    @cached_property
    def implicit_margin(self) -> Tensor:
        """Reward of the chosen less that of the rejected response, `(B,)`."""
        return self.rewards[0] - self.rewards[1]

    @cached_property
    def loss(self) -> Tensor:
        """Loss of each pair: Bradley-Terry with the dataset's margin, if it has one, and the centring term."""
        margin = self.implicit_margin - self.inputs.get("margin", 0.0)
        return -torch.nn.functional.logsigmoid(margin) + self.settings.center_rewards * sum(self.rewards) ** 2
