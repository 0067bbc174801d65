"""Sequences of one power-of-two length per step, in a curriculum of lengths."""

import dataclasses
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from ...bases.batch_forming import Batched
from ...core.parameters import Reads, check_choice, check_whole, when
from ...core.registry import register
from ...core.run import Run
from ...data.build.documents import cut_documents, document_tokens
from ...functional.order.dataset_decomposition import BucketBatch, bucket_of_length, decomposition_plan, even_buckets
from ...functional.order.length_curriculum import SCHEDULES, curriculum_odds, subcycle_odds
from ...sampling.batch_sampler import over_ranks

logger = logging.getLogger(__name__)

MODES = ("bucket", "decompose")
CURRICULA = ("uniform", "grow_linear", "grow_p2", "grow_p100", "shrink_p100")
# Tails are padded at most to twice their length, down to pieces of this many tokens.
SHORTEST_TAIL_LOG2 = 5
LONGEST_LOG2 = 13
# Share of the steps in one bucket from which there is nothing to order.
ONE_LENGTH = 0.9


@register("dataset_decomposition")
@dataclass
class DatasetDecomposition(Batched):
    """
    Trains on sequences of one power-of-two length bucket per step, with as many tokens in every step.

    What: `mode: decompose` (language-modelling SFT) cuts every document, its end-of-text token included, from the
    front into pieces of `2**k + 1` tokens (hf.co/papers/2405.13226): no padding, and no token sees another document.
    What exceeds the longest bucket is cut at random places, as in the authors' code, so that it gives every bucket as
    many tokens (`random_cut: false`: into the longest pieces, which leaves little of a curriculum where documents are
    long). Set `max_length` to None or `2**max_log2`; the text is read whole where TRL truncated the tokens.
    What is left of a document is kept as a shorter, padded piece (`keep_tail: false` drops it, as published). Rows
    carry `document_id`. `mode: bucket` (prompt-completion SFT, DPO pairs) cuts nothing: an example is in the bucket of
    the next power of two (this package's adaptation). Which bucket comes next follows the curriculum: short buckets
    with large odds run out first, so lengths grow within each of the `cycles` of an epoch. Every rank and every
    accumulated batch of a step is in the same bucket. Nothing is dropped: the last step of a bucket is a smaller one,
    and where it has fewer examples than there are devices x accumulation steps, shorter examples fill it up.
    The curriculum cannot act where all steps are of one bucket: that of short examples under a large `min_log2`, or of
    examples as long as `max_length`; a run in which nine steps of ten are of one length says so.
    When: pre-training or continued pre-training on documents; a growing context; `grow_p2` with 8 cycles.
    When not: pairs, for speed alone: a power of two pads up to half (57-63% real tokens in batches of 8, against
    78-90% with `token_budget`). A growing curriculum is an order of its own, so it cannot be combined with another.
    Published: >4x data efficiency for a 410M model with an 8k context.
    Weights: as in `token_budget`, every pair counts the same (`weighting`). Many pairs in a short step then make a
    large gradient: with clipping (`max_grad_norm`) prefer `weighting: batch`.
    Cost of a plan of 1,000,000 examples on one core (`benchmarks/scale.py`): 2-3 seconds and 57 MB.
    """

    mode: str = field(default="bucket", metadata={"help": f"one of {', '.join(MODES)}"})
    tokens: int | None = field(
        default=None,
        metadata={"help": "tokens per optimizer step, over all devices; default the user's batch at full length"},
    )
    min_log2: int = field(default=8, metadata={"help": "shortest bucket: 2**min_log2 tokens"})
    max_log2: int | None = field(
        default=None, metadata={"help": "longest bucket; default from max_length (without it: 13, or the longest)"}
    )
    curriculum: str = field(default="grow_p2", metadata={"help": f"one of {', '.join(CURRICULA)}"})
    cycles: int = field(default=8, metadata={"help": "times that the curriculum is run through per epoch"})
    construction: str = field(
        default="odds", metadata={"help": "odds: draws each step's bucket; subcycle: fixed counts per part of a cycle"}
    )
    keep_tail: bool = field(default=True, metadata={"help": "decompose: train on the rest of a document, too"})
    random_cut: bool = field(
        default=True,
        metadata={"help": "decompose: cut what exceeds the longest bucket at random, equal tokens per bucket"},
    )
    drop_last: bool = field(default=False, metadata={"help": "drop the smaller last batch of each bucket"})
    drop_long: bool = field(default=False, metadata={"help": "bucket: drop examples longer than the longest bucket"})

    reads: ClassVar[Reads] = {
        "keep_tail": (when("mode", "decompose"),),
        "random_cut": (when("mode", "decompose"),),
        "drop_long": (when("mode", "bucket"),),
    }
    paper = "hf.co/papers/2405.13226"
    selector = "all, one length per step; curriculum"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, MODES)
        check_choice("curriculum", self.curriculum, CURRICULA)
        check_choice("construction", self.construction, SCHEDULES)
        check_whole("min_log2", self.min_log2, 0, 40)
        check_whole("cycles", self.cycles, 1)
        if self.max_log2 is not None:
            check_whole("max_log2", self.max_log2, self.min_log2, 40)
        if self.tokens is not None:
            check_whole("tokens", self.tokens, 1, 2**62)
        if self.construction == "subcycle":
            subcycle_odds(self.curriculum, 2)
        curriculum_odds(self.curriculum, 2)
        self._lengths, self._rows = np.empty(0, dtype=np.int32), 1
        self._longest, self._budget = 0, 0
        self._buckets = np.empty(0, dtype=np.int64)

    @property
    def hooks(self) -> frozenset[str]:
        off = set() if self.mode == "decompose" else {"rebuild"}
        return super().hooks - off - (set() if self.drop_long else {"select"})

    # ---- Buckets ----

    def _longest_bucket(self, run: Run, longest: int | None = None) -> int:
        """The longest bucket: the user's, else what fits `max_length`, else what holds the `longest` example."""
        if self.max_log2 is not None:
            return self.max_log2
        limit = run.arguments.max_length or longest
        if limit is None:
            found = LONGEST_LOG2
        else:
            found = limit.bit_length() - 1 if self.mode == "decompose" else (limit - 1).bit_length()
        if found < self.min_log2:
            raise ValueError(
                f"min_log2={self.min_log2} is longer than the longest bucket, 2**{found} tokens for "
                f"max_length={run.arguments.max_length}: set min_log2 to at most {found}."
            )
        return found

    def rebuild(self, run: Run, dataset: Any) -> Any:
        if run.trainer != "sft":
            raise ValueError('mode="decompose" cuts documents of SFT; for pairs use mode="bucket".')
        arguments = run.arguments
        longest = self._longest_bucket(run)
        positions = getattr(run.model.config, "max_position_embeddings", None)
        if positions is not None and 2**longest > positions:
            raise ValueError(
                f"A piece of 2**{longest} tokens is longer than the model's {positions} positions: set "
                f"max_log2={positions.bit_length() - 1}, or max_length."
            )
        flat, lengths = document_tokens(
            dataset, run.processing_class, arguments.dataset_text_field, arguments.max_length
        )
        pieces = cut_documents(
            dataset,
            flat,
            lengths,
            min_log2=self.min_log2,
            max_log2=longest,
            keep_tail=self.keep_tail,
            rng=run.rng("dataset_decomposition/cut") if self.random_cut else None,
            positions=dataclasses.replace(run.rows, dataset=dataset).positions,
        )
        logger.info("%d documents (%d tokens) cut into %d pieces", len(lengths), len(flat), len(pieces))
        return pieces

    def check(self, run: Run) -> None:
        self._lengths, self._rows = run.rows.padded_lengths, run.rows.layout.sequences
        # The last token of a piece is only predicted.
        extra = 1 if self.mode == "decompose" else 0
        self._longest = self._longest_bucket(run, int(self._lengths.max()))
        too_long = int((self._lengths - extra > 2**self._longest).sum())
        if too_long and not self.drop_long:
            raise ValueError(
                f"{too_long} examples are longer than the longest bucket, 2**{self._longest} tokens: set "
                f"max_length={2**self._longest} to truncate them, drop_long=True, or a larger max_log2."
            )
        shortest = min(SHORTEST_TAIL_LOG2, self.min_log2) if extra and self.keep_tail else self.min_log2
        self._buckets = bucket_of_length(self._lengths - extra, min_log2=shortest, max_log2=self._longest)
        arguments, parts = run.arguments, self._parts(run)
        longest_batch = parts * self._rows * 2**self._longest
        if self.tokens is not None and self.tokens < longest_batch:
            raise ValueError(
                f"tokens={self.tokens} holds fewer than {parts} examples of 2**{self._longest} tokens, one for each "
                f"of {run.world} devices x {arguments.gradient_accumulation_steps} accumulation steps: set it to at "
                f"least {longest_batch}."
            )
        # Whole examples of every bucket for every micro-batch.
        per_device = arguments.per_device_train_batch_size if self.tokens is None else self.tokens // longest_batch
        self._budget = per_device * longest_batch

    @staticmethod
    def _parts(run: Run) -> int:
        """Micro-batches of an optimizer step over all ranks."""
        return run.world * run.arguments.gradient_accumulation_steps

    def select(self, run: Run) -> np.ndarray:
        run.decide(self._lengths.astype(np.float32), "tokens")
        return self._lengths <= 2**self._longest

    # ---- Batches ----

    def batch(self, run: Run, ids: np.ndarray) -> list[np.ndarray]:
        if run.ordered:
            raise ValueError(
                "dataset_decomposition is an order of lengths, and another method orders the examples: use "
                "token_budget with it, or only one of the two."
            )
        ids, parts = np.sort(ids), self._parts(run)
        if len(ids) < parts:
            raise ValueError(f"Only {len(ids)} examples are left for the {parts} micro-batches of a step: keep more.")
        plan = decomposition_plan(
            even_buckets(self._buckets[ids], self._lengths[ids], self._budget // (self._rows * 2**self._longest)),
            self._budget,
            seed=run.stream_seed("dataset_decomposition/plan", run.plans_made),
            curriculum=self.curriculum,
            cycles=self.cycles,
            rows_per_example=self._rows,
            drop_last=self.drop_last,
            construction=self.construction,
        )
        steps = fill_up([ids[step.ids] for step in plan], run.world, parts)
        accumulation = run.arguments.gradient_accumulation_steps
        batches = []
        for step in steps:
            # Long to short, so that the batches of a micro-step are alike.
            rows = step[np.argsort(-self._lengths[step], kind="stable")].reshape(-1, run.world)
            batches += over_ranks([part.ravel() for part in np.array_split(rows, accumulation)], run.world)
        self._tell_lengths(run, plan)
        self.mean_size = sum(map(len, batches)) / max(1, len(batches))
        return batches

    def _tell_lengths(self, run: Run, plan: list[BucketBatch]) -> None:
        """Says where a curriculum of lengths has hardly any lengths to order."""
        steps = np.bincount([step.bucket for step in plan])
        bucket = int(steps.argmax())
        if steps[bucket] > ONE_LENGTH * steps.sum():
            run.tell(
                f"{self.name}:lengths",
                f"{self.name!r}: {steps[bucket]} of {steps.sum()} steps are of 2**{bucket} tokens, so that curriculum="
                f"{self.curriculum!r} orders next to nothing. Lower min_log2={self.min_log2}, or raise max_length.",
                logging.WARNING,
            )


def fill_up(steps: list[np.ndarray], ranks: int, least: int) -> list[np.ndarray]:
    """
    Gives every step at least `least` ids (one for each of its micro-batches), and a multiple of `ranks`.

    What a step lacks comes from the step with the most to spare: it then has one example per micro-batch, which fits
    whatever its length. What is not to be had, and what does not go evenly over the ranks, is repeated.
    """
    sizes = np.array([len(ids) for ids in steps], dtype=np.int64)
    for short in np.flatnonzero((sizes < least) | (sizes % ranks > 0)).tolist():
        steps[short] = np.resize(steps[short], -(-sizes[short] // ranks) * ranks)
        missing, giver = least - len(steps[short]), int(np.argmax(sizes))
        if missing > 0 and sizes[giver] >= least + missing:
            steps[short] = np.append(steps[short], steps[giver][-missing:])
            steps[giver] = steps[giver][:-missing]
            sizes[giver] -= missing
        elif missing > 0:
            steps[short] = np.resize(steps[short], least)
    return steps
