"""DEITA: complexity times quality, then only what is unlike all that was kept before."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.offline import Prescored
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import REFRESHES, Reads, check_range, given, unless, when, without
from ...core.registry import register
from ...data.conversations import example_messages, text_columns, turns
from ...data.fingerprints import column_hash
from ...functional.ranking import keep_count
from ...functional.text.deita import conversation_scores, digit_logits, diversity_filter, expected_digit
from ...scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, contents, embeddings
from ...scorers.language_model import LanguageModel
from ...signals.batch import Signal

COMPLEXITY = (
    "Rate how demanding the following instruction is to fulfil, from 1 (trivial) to 6 (very demanding). Answer with "
    "one digit.\n\nInstruction:\n{instruction}\n\nRating: "
)
QUALITY = (
    "Rate how good the following answer to the instruction is, from 1 (useless) to 6 (excellent). Answer with one "
    "digit.\n\nInstruction:\n{instruction}\n\nAnswer:\n{output}\n\nRating: "
)
DIGITS = "123456"


@register("deita")
@dataclass
class Deita(Prescored):
    """
    Keeps complex, well answered and diverse examples: score first, then a filter for diversity.

    What: each turn has a complexity and a quality in [1, 6]; their product, summed over the turns, ranks the examples
    (hf.co/papers/2312.15685). Going down that ranking, an example is kept if its cosine similarity to all kept before
    is at most `threshold`, until `keep` of the data is reached. `action: weight` trains on everything, weighed by the
    score, without the filter. Of a pair, the prompt is rated for complexity and the chosen response for quality.
    The scores are dataset columns (a number per example, or a list of one per turn), or come from `complexity_model`
    and `quality_model`: any causal language model, asked once per turn for a digit; the score is the expected digit
    under its next-token probabilities. A scorer wants the prompt it was trained with: give its template, with the
    slots {instruction} and {output}. `refresh` runs the filter again with the policy's embeddings of the moment.
    When: large instruction pools of mixed quality. When not: without a trained scorer the digit of a small general
    model says little; long conversations score higher by construction.
    Plan of 1,000,000 examples: the filter holds the kept vectors only; down to 10,000 of 64 numbers it takes a second
    and 54 MB on a core, where few are alike; time grows with examples looked at times examples kept.
    """

    keep: float | None = field(default=0.1, metadata={"help": "fraction to keep, in (0, 1]"})
    complexity_column: str = field(default="complexity", metadata={"help": "column: a number, or one per turn"})
    quality_column: str = field(default="quality", metadata={"help": "column: a number, or one per turn"})
    complexity_model: str | None = field(default=None, metadata={"help": "instead of a column: a causal model's path"})
    quality_model: str | None = field(default=None, metadata={"help": "instead of a column: a causal model's path"})
    complexity_template: str = field(default=COMPLEXITY, metadata={"help": "prompt of the scorer: {instruction}"})
    quality_template: str = field(default=QUALITY, metadata={"help": "prompt of the scorer: {instruction}, {output}"})
    threshold: float = field(default=0.9, metadata={"help": "largest cosine similarity to a kept example, in [-1, 1]"})
    embedding: str = field(default="policy", metadata={"help": SOURCE_HELP})
    pooling: str = field(default="last", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    signals = (Signal.TEXT, Signal.EMBEDDING)
    paper = "hf.co/papers/2312.15685"
    reads: ClassVar[Reads] = {
        "keep": (unless("action", "weight"),),
        "complexity_column": (without("complexity_model"),),
        "complexity_template": (given("complexity_model"),),
        "quality_column": (without("quality_model"),),
        "quality_template": (given("quality_model"),),
        "threshold": (unless("action", "weight"),),
        "embedding": (unless("action", "weight"),),
        "pooling": (unless("action", "weight"), when("embedding", "policy")),
        "temperature": (when("action", "sample"),),
        "refresh": (unless("action", "weight"),),
    }
    family = "indicator and reduction"
    criterion = "external_discrete"
    selector = "greedy_diverse"
    charges = (
        Charge("forwards", per="example and measurement", when="embeds and embedding: policy"),
        Charge("scorer_forwards", when="embeds and embedding: model"),
        Charge("scorer_forwards", per="turn", when="complexity_model"),
        Charge("scorer_forwards", per="turn", when="quality_model"),
    )
    state = "its score column (8 bytes per example)"
    refreshes = REFRESHES
    chooses = True
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "weight", "curriculum", "sample")
    SCORE: ClassVar[str] = "deita_score"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threshold", self.threshold, -1, 1)
        check_source(self.embedding, self.pooling, self.refresh)
        for name, slots in (("complexity_template", ["instruction"]), ("quality_template", ["instruction", "output"])):
            missing = [slot for slot in slots if f"{{{slot}}}" not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name}={getattr(self, name)!r} has no slot {{{missing[0]}}}.")

    def check(self, run: Run) -> None:
        super().check(run)
        if self.action != "weight":
            check_embeddings(run, self.embedding)
        for kind in ("complexity", "quality"):
            model, column = getattr(self, f"{kind}_model"), getattr(self, f"{kind}_column")
            if model is not None:
                text_columns(run.rows)
            else:
                who = f"{kind}_column={column!r} (another one, or {kind}_model, would do)"
                _turn_scores(run.values(column, who), column)

    def depends_on(self, run: Run) -> list[Any]:
        columns = [
            getattr(self, f"{kind}_column")
            for kind in ("complexity", "quality")
            if getattr(self, f"{kind}_model") is None
        ]
        hashes = [column_hash(run.dataset, name) for name in columns]
        return hashes if self.action == "weight" else [*hashes, contents(run.rows, self.embedding)]

    @property
    def embeds(self) -> bool:
        """Whether the filter for diversity is used."""
        return self.action != "weight"

    def units(self, run: Run) -> dict[str, float]:
        return {**super().units(run), "turn": sum(map(len, map(turns, example_messages(run.rows))))}

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy",) if self.action != "weight" and self.embedding == "policy" else ()

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        known = run.ledger[self.SCORE] if self.SCORE in run.ledger.names else self._rate(run)
        kept = np.full(run.size, -np.inf)
        if self.action == "weight":
            kept = known
        else:
            vectors = embeddings(run, self.embedding, self.pooling, live=run.step > 0)
            size = keep_count(1.0 if self.keep is None else self.keep, run.size)
            ids = diversity_filter(known, vectors, threshold=self.threshold, size=size)
            kept[ids] = known[ids]
            if len(ids) < size:
                run.tell(
                    f"{self.name}:fewer",
                    f"{self.name!r} keeps {len(ids)} of the {size} examples that keep={self.keep!r} asks for: all "
                    f"others are closer than threshold={self.threshold!r} to one that is kept, or have no score. "
                    "Raise the threshold to keep more.",
                    logging.WARNING,
                )
        return {self.SCORE: known, self.name: kept}

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return np.maximum(scores, 0.0)

    def _rate(self, run: Run) -> np.ndarray:
        conversations = (
            [turns(messages) for messages in example_messages(run.rows.side("chosen"))] if self._uses_models else []
        )
        rated = [
            _turn_scores(run.values(self.complexity_column), self.complexity_column)
            if self.complexity_model is None
            else self._ask(run, self.complexity_model, self.complexity_template, conversations, "complexity"),
            _turn_scores(run.values(self.quality_column), self.quality_column)
            if self.quality_model is None
            else self._ask(run, self.quality_model, self.quality_template, conversations, "quality"),
        ]
        return conversation_scores(*rated)

    @property
    def _uses_models(self) -> bool:
        return self.complexity_model is not None or self.quality_model is not None

    def _ask(
        self, run: Run, path: str, template: str, conversations: list[list[tuple[str, str]]], kind: str
    ) -> list[list[float]]:
        """Expected digit of every turn, each asked for on its own."""
        scorer = LanguageModel(path, run.model.device, f"{kind}_model")
        digits = digit_tokens(scorer.tokenizer, path)
        prompts = [
            # Not `str.format`: braces in the texts or the template are none of our slots.
            template.replace("{instruction}", instruction).replace("{output}", answer)
            for conversation in conversations
            for instruction, answer in conversation
        ]
        rows = [scorer.tokenizer(prompt)["input_ids"][-scorer.max_length + 1 :] for prompt in prompts]
        logits = run.passes.measure(
            lambda logits: digit_logits(logits, digits),
            inputs=lambda ids: [rows[i] for i in ids],
            lengths=np.array([len(row) for row in rows], dtype=np.int64),
            forward=lambda batch, ids: scorer.next_logits(batch),
            description=f"Rating {kind}",
        )
        scores = iter(expected_digit(logits.reshape(len(rows), len(DIGITS))).tolist())
        return [[next(scores) for _ in conversation] for conversation in conversations]


def digit_tokens(tokenizer: Any, path: str) -> list[int]:
    """
    Token ids of the digits 1 to 6, looked up by digit: the ids are in no order.

    Raises:
        `ValueError`: if two digits share their last token.
    """
    ids = [tokenizer.encode(digit, add_special_tokens=False)[-1:] for digit in DIGITS]
    flat = [row[0] for row in ids if row]
    if len(set(flat)) != len(DIGITS):
        raise ValueError(f"The tokenizer of {path!r} has no token of its own for each of the digits {DIGITS}: {ids}.")
    return flat


def _turn_scores(values: Any, column: str) -> list[list[float]]:
    """A column of numbers, or of lists of numbers, as scores per turn; null is NaN."""
    rows = [[value] if value is None or isinstance(value, int | float) else value for value in values]
    try:
        return [[float("nan") if value is None else float(value) for value in row] for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Column {column!r} must hold a number per row, or a list of one per turn: {error}"
        ) from error
