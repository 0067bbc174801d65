"""EDGE: the examples that a written guideline does not help with."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.offline import Prescored
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import REFRESHES, Reads, check_choice, check_whole, when
from ...core.registry import register
from ...data.build.guidelines import Guide, contexts_of, unfolded_effectiveness
from ...data.columns import without_truth
from ...data.tokens import IGNORED, Sequences, padded
from ...functional.text.edge import AGGREGATES, FORMS, edge_scores, guideline_effect, mean_turn_nll
from ...scorers.rewards import load_reward
from ...signals.batch import Signal


@register("edge")
@dataclass
class Edge(Prescored):
    """
    Keeps the examples on which a written guideline helps the model least: what it takes to answer is not in there.

    Reconstruction: no code of the paper (hf.co/papers/2502.12494) is public. The definition follows its abstract;
    whether the paper divides or subtracts, and how it averages, is not known, hence `form` and `aggregate`.
    What: in each prompt the policy itself, guided, unfolds its action (`unfold: policy`, greedy, at most
    `max_new_tokens`; no golden answer is read), and the loss of these tokens is measured with and without the
    guideline. The effectiveness is the ratio (or difference) without / with, averaged over the turns of a
    conversation, between which the dataset's messages stand: there is no environment. `unfold: dataset` scores the
    dataset's responses instead (of a pair the chosen one), which costs no generation. The guideline stands in the
    system message, or the user's first where the chat template knows none; a plain prompt or text begins with it.
    The lowest `keep` is trained, or everything weighed by exp(-effectiveness / temperature) (`action: weight`). It is
    measured again with the policy each epoch (`refresh: epoch`): what has been learned no longer profits from the
    guideline. In a run the guideline is fixed and the dataset's responses are trained; that the chosen few teach the
    guideline and are answered anew under it is `dsel build edge`, with functions of your own.
    `guideline` is a text, or 'module:function' (or a function) that gives one for each row. With `action: weight` a
    renewal acts from the second step of an epoch on.
    When: tasks with rules that can be written down, such as tool use and multi-step interaction. When not: a guideline
    that says nothing of the task makes every effectiveness 1.
    Memory of a pass: 8 bytes per response token (2.4 GB for 1,000,000 examples of 300).
    Plan of 1,000,000 examples, losses known: 0.1 s and 64 MB.
    """

    keep: float | None = field(default=0.5, metadata={"help": "fraction to keep, in (0, 1]"})
    guideline: Any = field(default=None, metadata={"help": "required: a text, or 'module:function' of a row"})
    unfold: str = field(
        default="policy", metadata={"help": '"policy": score what the model does; "dataset": the dataset\'s responses'}
    )
    max_new_tokens: int = field(default=64, metadata={"help": "unfold policy: cap on the tokens of an action"})
    form: str = field(default="ratio", metadata={"help": f"one of {', '.join(FORMS)}"})
    aggregate: str = field(default="mean_turn", metadata={"help": f"over the turns: one of {', '.join(AGGREGATES)}"})
    refresh: int | str = field(
        default="epoch", metadata={"help": 'when to measure anew: "epoch", "never" (once, before training), or steps'}
    )

    signals = (Signal.TOKEN_LOGPS, Signal.TEXT, Signal.GENERATION)
    paper = "hf.co/papers/2502.12494 (reconstruction)"
    family = "indicator"
    criterion = "internal"
    selector = "bottom_k"
    reads: ClassVar[Reads] = {"max_new_tokens": (when("unfold", "policy"),)}
    charges = (
        Charge("generated_responses", per="turn and measurement", when="unfold: policy"),
        Charge("forwards", "2", per="turn and measurement", when="unfold: policy"),
        Charge("forwards", "2", per="example and measurement", when="unfold: dataset"),
    )
    state = "its score column (8 bytes per example)"
    refreshes = REFRESHES
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "keep_bottom", "band", "weight", "sample", "curriculum")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        check_choice("aggregate", self.aggregate, AGGREGATES)
        check_choice("unfold", self.unfold, ("policy", "dataset"))
        check_whole("max_new_tokens", self.max_new_tokens, 1, 2**20)
        if not self.guideline or not (isinstance(self.guideline, str) or callable(self.guideline)):
            raise ValueError(f"guideline={self.guideline!r}: a text is needed, or 'module:function' that gives one.")
        self._median: float | None = None

    @property
    def _write_guideline(self) -> Callable[[dict[str, Any]], str]:
        guideline = self.guideline
        if isinstance(guideline, str) and not _names_function(guideline):
            return lambda row: guideline
        function: Any = load_reward(guideline)
        return function

    def check(self, run: Run) -> None:
        super().check(run)
        text = self._write_guideline(without_truth(run.dataset[0]))
        if not isinstance(text, str):
            raise ValueError(f"guideline={self.guideline!r} gave {type(text).__name__} for the first row, not a text.")
        if self.unfold == "policy":
            contexts_of(run.dataset)
            return
        longest = self._positions(run)
        needed = len(self._tokens(run, text)) + int(Sequences(run.rows.side("chosen")).scan()[0].max(initial=0))
        if longest is not None and needed > longest:
            raise ValueError(
                f"The guideline and the longest example take {needed} tokens, but the model holds {longest}: shorten "
                f"the guideline, or lower max_length={run.arguments.max_length}."
            )

    @staticmethod
    def _positions(run: Run) -> int | None:
        """Tokens that the model holds."""
        return getattr(run.model.config.get_text_config(), "max_position_embeddings", None)

    @staticmethod
    def _tokens(run: Run, text: str) -> list[int]:
        return run.processing_class(text + "\n", add_special_tokens=False)["input_ids"]

    @property
    def uses(self) -> tuple[str, ...]:
        return ("policy",)

    def units(self, run: Run) -> dict[str, float]:
        units = super().units(run)
        if self.unfold == "dataset":
            return units
        turns = sum(map(len, contexts_of(run.dataset)))
        return {**units, "turn and measurement": units["example and measurement"] / max(run.size, 1) * turns}

    def _guidelines(self, run: Run) -> list[str]:
        """The guideline of each row."""
        if isinstance(self.guideline, str) and not _names_function(self.guideline):
            return [self.guideline] * run.size
        write = self._write_guideline
        return [write(without_truth(row)) for row in run.dataset]

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        found = self._of_policy(run) if self.unfold == "policy" else self._of_dataset(run)
        return {"edge_effectiveness": found, self.name: -found}

    def _of_policy(self, run: Run) -> np.ndarray:
        tokenizer = run.rows.tokenizer
        pad, device = tokenizer.pad_token_id or 0, run.rows.device

        def mean_losses(rows: Any, what: str) -> np.ndarray:
            return run.passes.measure(
                lambda batch: batch.loss,
                inputs=lambda ids: padded([rows[i] for i in ids], pad, device),
                lengths=np.array([len(tokens) for tokens, _ in rows], dtype=np.int64),
                description=what,
            )

        return unfolded_effectiveness(
            contexts_of(run.dataset),
            self._guidelines(run),
            run.generate,
            mean_losses,
            tokenizer,
            form=self.form,
            aggregate=self.aggregate,
            max_new_tokens=self.max_new_tokens,
            longest=self._positions(run),
        )

    def _of_dataset(self, run: Run) -> np.ndarray:
        sequences, guidelines = Sequences(run.rows.side("chosen")), self._guidelines(run)
        lengths, trained = sequences.scan()
        edits = self._edits(run, guidelines, sequences)

        def guided(i: int, tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
            place, replaced, own = edits[i]
            # The first token has nothing before it without the guideline: it is scored in neither pass.
            hidden = [IGNORED, *labels[1:]]
            return (
                tokens[:place] + own + tokens[place + replaced :],
                hidden[:place] + [IGNORED] * len(own) + hidden[place + replaced :],
            )

        sizes = np.array([len(own) - replaced for _, replaced, own in edits], dtype=np.int64)
        plain = run.passes.measure_tokens(
            trained, inputs=sequences.collate(), lengths=lengths, description="Without the guideline"
        )
        helped = run.passes.measure_tokens(
            trained, inputs=sequences.collate(guided), lengths=lengths + sizes, description="With the guideline"
        )
        starts = sequences.turn_starts(trained)
        turn = np.cumsum(starts) - 1
        without, counts = mean_turn_nll(-plain, turn, int(starts.sum()))
        with_it, _ = mean_turn_nll(-helped, turn, len(counts))
        owner = np.repeat(np.arange(run.size), trained)[starts]
        effect = guideline_effect(without, with_it, self.form)
        return edge_scores(effect, owner, run.size, aggregate=self.aggregate, num_tokens=counts)

    def _edits(self, run: Run, guidelines: list[str], sequences: Sequences) -> list[tuple[int, int, list[int]]]:
        """Where each guideline goes among an example's tokens, how many it replaces, and its own."""
        names, first = run.rows.column_names, run.processing_class.bos_token_id
        if "prompt" not in names and "messages" not in names:
            begins = [bool(tokens) and tokens[0] == first for tokens, _ in sequences[np.arange(run.size)]]
            written = {text: self._tokens(run, text) for text in set(guidelines)}
            return [(int(begin), 0, written[text]) for begin, text in zip(begins, guidelines, strict=True)]
        guide, contexts = Guide(run.rows.tokenizer), contexts_of(run.dataset)
        edits: list[tuple[int, int, list[int]]] = []
        prompts = sequences.instruction_lengths()
        for turns, text, left in zip(contexts, guidelines, prompts.tolist(), strict=True):
            if not turns:
                edits.append((0, 0, []))
                continue
            place, replaced, own = guide.insertion(turns[0], text)
            # Truncation may have taken the beginning of the prompt: the guideline stands before what is left.
            lost = max(len(guide.tokens(turns[0])) - left, 0) if run.rows.truncation == "keep_end" else 0
            edits.append((max(place - lost, 0), replaced if place >= lost else 0, own))
        return edits

    def _write(self, run: Run, arrays: dict[str, np.ndarray]) -> None:
        super()._write(run, arrays)
        self._median = None

    def weights(self, scores: np.ndarray) -> np.ndarray:
        if self._median is None:
            known = self._ledger()
            self._median = float(np.median(known[np.isfinite(known)].astype(np.float64)))
        return np.exp(np.clip((scores - self._median) / self.temperature, -60.0, 60.0))


def _names_function(text: str) -> bool:
    """Whether a text is `module:function` rather than words."""
    module, colon, name = text.partition(":")
    parts = [*module.split("."), *name.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts) and not inspect.cleandoc(text).count(" ")
