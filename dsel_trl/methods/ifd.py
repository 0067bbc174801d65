"""IFD: how little the instruction helps the model with the answer."""

from dataclasses import dataclass, field

import numpy as np

from ..functional.ifd import ifd_loss_ratio, ifd_perplexity_ratio
from ..language_model import LanguageModel, sequence_losses
from ..method import Run, check_choice, check_range, register
from ..prescored import Prescored
from ..sequences import IGNORED, Sequences, answer_alone, start_tokens
from ..tap import Signal
from ..texts import example_messages, prompt_and_answer, text_columns

FORMS = ("superfiltering", "cherry")
ALONE_PREFIX = "### Response:"


@register("ifd")
@dataclass
class Ifd(Prescored):
    """
    Keeps examples whose instruction helps the model least with their answer, but does help.

    What: the loss of the answer given the instruction, against the loss of the same answer tokens alone.
    `form: superfiltering` is the ratio of perplexities (hf.co/papers/2402.00530), usually under a small `model`;
    `form: cherry` the ratio of mean losses (hf.co/papers/2308.12032), the answer alone standing behind
    "### Response:". High = difficult and worth training; at `limit` (1) and above the instruction misleads, and the
    example is dropped; so is one without an answer. Without `model` the policy itself is asked, and `renew` asks it
    again while it learns (an adaptation). Cherry's policy should have been trained briefly before: start from such a
    checkpoint. Of a pair the chosen response is the answer.
    When: instruction data with much that the model can do already. When not: plain texts without an instruction;
    very short answers, whose ratio is mostly noise.
    Plan of 1,000,000 examples, losses known: 0.1 s and 40 MB.
    """

    keep: float | None = field(default=0.1, metadata={"help": "fraction to keep, in (0, 1]"})
    form: str = field(default="superfiltering", metadata={"help": f"one of {', '.join(FORMS)}"})
    model: str | None = field(default=None, metadata={"help": "another causal model to ask (such as gpt2), by path"})
    limit: float = field(default=1.0, metadata={"help": "ratio from which an example is dropped; above 0"})

    signals = (Signal.TOKEN_LOGPS,)
    paper = "hf.co/papers/2402.00530, hf.co/papers/2308.12032"
    family = "indicator"
    criterion = "internal"
    selector = "threshold, top_k"
    cost = "two forwards per example, once (or per renewal)"
    state = "three columns (24 bytes per example)"
    renewable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        check_range("limit", self.limit, 0, float("inf"), open_low=True)
        if self.renew and self.model is not None:
            raise ValueError(
                f"renew={self.renew!r} measures the policy again, but model={self.model!r} never changes."
            )

    def check(self, run: Run) -> None:
        super().check(run)
        if self.model is not None:
            text_columns(run)
        elif run.trainer == "sft":
            tokens, trained = Sequences(run).scan()
            if len(tokens) and (trained >= tokens - 1).all():
                raise ValueError(
                    "ifd compares an answer with and without its instruction, but every token of this dataset is "
                    "trained: give prompts and completions, or set assistant_only_loss / completion_only_loss."
                )

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        conditioned, alone = self._with_model(run) if self.model is not None else self._with_policy(run)
        ratio = (ifd_perplexity_ratio if self.form == "superfiltering" else ifd_loss_ratio)(conditioned, alone)
        # The published scripts differ at exactly the limit: Cherry still keeps it.
        fit = ratio < self.limit if self.form == "superfiltering" else ratio <= self.limit
        return {
            "ifd_conditioned": conditioned,
            "ifd_alone": alone,
            self.name: np.where(fit, ratio, -np.inf),
        }

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return np.maximum(scores, 0.0)

    def _prefix(self, tokenizer: object) -> list[int]:
        start = start_tokens(tokenizer)
        if self.form == "cherry":
            start = start + tokenizer(ALONE_PREFIX, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        return start

    def _with_policy(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        assert run.passes is not None
        sequences = Sequences(run)
        tokens, trained = sequences.scan()
        prefix = self._prefix(run.processing_class)
        given = run.passes.measure(
            lambda batch: batch.loss,
            rows=sequences.collate(),
            lengths=tokens,
            description="Answers given instructions",
        )
        alone = run.passes.measure(
            lambda batch: batch.loss,
            rows=sequences.collate(answer_alone(prefix)),
            lengths=trained + len(prefix),
            description="Answers alone",
        )
        return np.where(trained > 0, given, np.nan), np.where(trained > 0, alone, np.nan)

    def _with_model(self, run: Run) -> tuple[np.ndarray, np.ndarray]:
        assert self.model is not None
        model = LanguageModel(self.model, run.model.device)
        prefix = self._prefix(model.tokenizer)
        given = [model.encode(*prompt_and_answer(messages)) for messages in example_messages(run)]
        alone = []
        for _, labels in given:
            answer = [label for label in labels if label != IGNORED]
            alone.append((prefix + answer, [IGNORED] * len(prefix) + answer))
        return (
            sequence_losses(run, given, model, "Answers given instructions"),
            sequence_losses(run, alone, model, "Answers alone"),
        )
