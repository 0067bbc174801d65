"""What a run of KTO can measure of an example: one response with the label that it is desirable or not."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..functional.kto_losses import kto_losses
from .batch import Batch, Forward


@dataclass
class KTOBatch(Batch):
    """A micro-batch of labelled responses (KTO): one row each. The rows of its KL term are no examples."""

    @cached_property
    def token_mask(self) -> Tensor:
        """Completion tokens, `(B, T)` bool, aligned with the log-probabilities."""
        return self.inputs["completion_mask"][:, 1:].bool()

    @cached_property
    def desirable(self) -> Tensor:
        """Labels of the responses, `(B,)` bool."""
        return self.inputs["label"].bool()

    def _sums(self, forward: Forward) -> Tensor:
        return (forward.log_probs[:, -self.token_mask.shape[1] :].float() * self.token_mask).sum(dim=1)

    @cached_property
    def policy_logps(self) -> Tensor:
        """Summed log-probabilities of the completions, `(B,)`."""
        return self._sums(self.policy)

    @cached_property
    def ref_logps(self) -> Tensor:
        """Summed reference log-probabilities of the completions, `(B,)`."""
        if "ref_logps" in self.inputs:
            return self.inputs["ref_logps"].float()
        if self.reference is None:
            raise ValueError("This batch was scored without its reference model.")
        return self._sums(self.reference)

    @cached_property
    def rewards(self) -> Tensor:
        """`beta * (policy_logps - ref_logps)`: the reward of each response as TRL logs it, `(B,)`."""
        return self.settings.beta * (self.policy_logps - self.ref_logps)

    @cached_property
    def implicit_margin(self) -> Tensor:
        """
        The reward of a desirable response, minus the reward of an undesirable one, `(B,)`.

        So higher means, as for a pair: the policy already agrees with the label, and by so much.
        """
        return torch.where(self.desirable, self.rewards, -self.rewards)

    @cached_property
    def loss(self) -> Tensor:
        """Loss of each response under the trainer's own loss type, weights and KL term, `(B,)`."""
        s = self.settings
        return kto_losses(
            s.loss_types[0],
            self.policy_logps - self.ref_logps,
            self.desirable,
            s.kl,
            beta=s.beta,
            desirable_weight=s.desirable_weight,
            undesirable_weight=s.undesirable_weight,
        )

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of the prompt and the response, `(B,)`."""
        return self.inputs["attention_mask"].sum(dim=1)

    def row_weights(self, weights: Tensor) -> Tensor:
        return weights

    def example_weights(self, weights: Tensor) -> Tensor:
        if weights.dim() == 1:
            return weights
        return (weights * self.token_mask).sum(dim=1) / self.token_mask.sum(dim=1).clamp(min=1)
