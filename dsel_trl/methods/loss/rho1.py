"""Rho-1: only the tokens on which the policy is worse than a second model."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.reference_loss import SecondModel
from ...core.cache import kept, run_fingerprint
from ...core.method import Run
from ...core.parameters import check_choice, check_range
from ...core.registry import register
from ...data.tokens import Sequences
from ...functional.loss.rho1 import SCOPES, excess_loss, select_tokens, selected_token_weights
from ...signals.batch import Batch, Signal
from ...signals.sequence_batch import SequenceBatch


@register("rho1")
@dataclass
class Rho1(SecondModel):
    """
    Trains on the tokens with the highest excess loss: those the policy knows worse than a second model.

    What: of the trained tokens of a micro-batch (or of each sequence, `scope`), the share `keep` with the highest
    excess of the policy's loss over that of a second model keeps its gradient, weighed up so that the loss is their
    mean (hf.co/papers/2404.07965); the other tokens have weight 0. The second model, the paper's reference, is one
    fine-tuned on clean data (`model`), or is trained before the run on rows that `clean_column` marks. Its token
    losses are measured once and kept under `output_dir/selection`; the policy's are those of the training forward.
    When: continued pretraining and SFT on noisy text, with clean data or a clean model at hand. When not: without a
    better second model the excess is noise. Preference pairs are not served: their loss is no sum over tokens.
    """

    keep: float = field(default=0.6, metadata={"help": "share of the tokens to keep, in (0, 1]"})
    scope: str = field(default="batch", metadata={"help": '"batch": rank all tokens together; "sequence": in each'})

    signals = (Signal.TOKEN_LOGPS,)
    trainers = ("sft",)
    couples = True
    paper = "hf.co/papers/2404.07965"
    family = "indicator"
    criterion = "external_continuous"
    selector = "top_k of tokens"
    normalize = "none"
    renamed: ClassVar[dict[str, str]] = {"select_ratio": "keep"}
    state = "4 bytes per trained token (1.2 GB for 1,000,000 examples of 300), on disk and in memory"

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0, 1, open_low=True)
        check_choice("scope", self.scope, SCOPES)
        self.check_second()
        self._key = ""
        self._offsets = np.zeros(1, dtype=np.int64)
        self._tokens = np.empty(0, dtype=np.float32)

    def check(self, run: Run) -> None:
        super().check(run)
        if self.scope == "sequence" and getattr(run.arguments, "padding_free", False):
            raise ValueError("scope='sequence' needs one sequence per row: set padding_free=False or scope='batch'.")

    def setup(self, run: Run) -> None:
        sizes = Sequences(run.rows.side("chosen")).scan()[1]
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._run, self._sizes = run, sizes
        if not run.resumed:
            self._measure(run_fingerprint(run, "rho1", self.second_parts, **self.second_key(run)))

    def _measure(self, key: str) -> None:
        """The second model's tokens: from disk where they have been measured under this key."""
        self._key = key
        measure = lambda: {"tokens": self.second_tokens(self._run, self._sizes)}  # noqa: E731
        self._tokens = kept(self._run, f"rho1-{key}", measure)["tokens"]

    def _excess(self, batch: Batch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, SequenceBatch)
        mask = batch.token_mask
        ids = batch.ids.cpu().numpy()
        found = [self._tokens[self._offsets[i] : self._offsets[i + 1]] for i in ids]
        second = torch.zeros(mask.shape, device=mask.device)
        second[mask] = torch.from_numpy(np.concatenate(found)).to(mask.device)
        return excess_loss(-batch.token_logps, -second), mask

    def score(self, batch: Batch) -> Tensor:
        """Mean excess loss of each example's tokens."""
        return batch.example_weights(self._excess(batch)[0])

    def weigh(self, batch: Batch) -> Tensor:
        excess, mask = self._excess(batch)
        if self.scope == "sequence":
            own = select_tokens(excess, mask, self.keep, self.scope)[mask]
            everywhere, _ = batch.gather(own)
        else:
            # The tokens of all processes are ranked together: what is trained does not depend on their number.
            values, part = batch.gather(excess[mask])
            everywhere = select_tokens(values[None], torch.ones_like(values[None]), self.keep)[0]
            own = everywhere[part]
        weights = torch.zeros(mask.shape, device=mask.device)
        # The trainer divides by all trained tokens: with this factor the loss is a mean over the selected ones.
        weights[mask] = selected_token_weights(own, everywhere.sum(), len(everywhere))
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {"key": self._key}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._measure(state["key"])
