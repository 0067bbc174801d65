"""ZIP: the examples that together are hardest to compress."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ...bases.offline import Prescored
from ...core.method import Run
from ...core.parameters import Reads, check_choice, check_whole, reads_of, when
from ...core.registry import register
from ...data.conversations import example_messages, joined, text_columns
from ...functional.ranking import keep_count, rank_order
from ...functional.text.zip import canonical_example, serialize, zip_select
from ...functional.text.zip_engine import CompressionEngine
from ...signals.batch import Batch, Signal

FORMS = ("offline", "online")
OFFLINE = when("form", "offline")
SERIALIZERS = ("repr", "text")
# What DEFLATE sees of the text before: a longer window would change nothing but the time.
WINDOW = 32_768


@register("zip")
@dataclass
class Zip(Prescored):
    """
    Keeps the examples that together compress worst: the least redundant subset of the data, by its text alone.

    What: a greedy choice in three stages by zlib's compression ratio (hf.co/papers/2407.06645): the `k1` examples of
    least known redundancy are measured behind the selection so far, the `k2` best go to a final in which `k3` are
    chosen that are unlike each other. The order of the choice is a score: `action: curriculum` with `pacing: none`
    trains the most novel first. `refresh: epoch` chooses anew each epoch, with all that was chosen before as anchor,
    so that an epoch complements those before it. Of a pair, prompt and both responses count.
    `form: online` (an adaptation) instead draws `factor` candidates for each trained example and takes those that
    compress worst behind the last 32 KiB of text that was trained; it needs no setup and follows the run.
    When: large pools with much repetition, no quality labels, no GPU time to spare.
    When not: DEFLATE sees back 32 KiB, so redundancy with anything farther away is invisible; noise and typing errors
    compress badly too and are preferred; on small, clean data there is little to gain.
    Plan of 1,000,000 texts of 8 to 60 words, on a core: 77 s and 0.3 GB for the start and the first round of 100; with
    the defaults a further round takes 2 to 4 s, so a budget of 10,000 takes minutes and one of 200,000 is out of reach
    without many `workers`.
    """

    keep: float | None = field(default=0.2, metadata={"help": "fraction to choose, in (0, 1]"})
    form: str = field(default="offline", metadata={"help": '"offline" (before training) or "online" (per batch)'})
    k1: int = field(
        default=10_000, metadata={"help": "offline: examples of least known redundancy measured per round"}
    )
    k2: int = field(default=200, metadata={"help": "offline: finalists of a round"})
    k3: int = field(default=100, metadata={"help": "offline: examples chosen per round"})
    serializer: str = field(
        default="repr", metadata={"help": '"repr" (as the published code writes examples) or "text" (plain lines)'}
    )
    unchosen: str = field(
        default="burn", metadata={"help": '"burn": finalists not chosen are gone for good; "restore": they stay'}
    )
    workers: int = field(default=0, metadata={"help": "offline: processes that compress; 0 = all cores"})
    factor: int = field(default=4, metadata={"help": "online: candidates drawn for one trained example, at least 2"})

    signals = (Signal.TEXT,)
    trainers = ("dpo", "sft", "kto")
    paper = "hf.co/papers/2407.06645"
    reads: ClassVar[Reads] = {
        # Nothing of what is done with scores is done by the online form, which has none.
        **{name: (OFFLINE, *conditions) for name, conditions in reads_of(Prescored).items()},
        **dict.fromkeys(("action", "k1", "k2", "k3", "unchosen", "workers"), (OFFLINE,)),
        "factor": (when("form", "online"),),
    }
    family = "raw"
    renamed: ClassVar[dict[str, str]] = {"rejected": "unchosen"}
    criterion = "internal"
    selector = "greedy (multi-stage)"
    cost = (
        "no GPU; offline: N compressions and k1 + k2 k3 more per k3 chosen (benchmarks/zip_speed.py); online: factor "
        "compressions per trained example of a batch, squared over the batch"
    )
    state = "its score column (8 bytes per example); online: the ids of the last 32 KiB"
    refreshes = ("never", "epoch")
    chooses = True
    actions: ClassVar[tuple[str, ...]] = ("keep_top", "curriculum", "sample")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        check_choice("serializer", self.serializer, SERIALIZERS)
        check_choice("unchosen", self.unchosen, ("burn", "restore"))
        for name, low in (("k1", 1), ("k2", 1), ("k3", 1), ("workers", 0), ("factor", 2)):
            check_whole(name, getattr(self, name), low)
        self._pieces: list[bytes] = []
        self._engine: CompressionEngine | None = None
        self._window: list[int] = []
        self._anchor = np.empty(0, dtype=np.int64)

    @property
    def hooks(self) -> frozenset[str]:
        if self.form == "online":
            return frozenset({"setup", "pick"})
        return super().hooks - {"pick"}

    @property
    def candidates(self) -> int:
        return self.factor if self.form == "online" else 1

    @property
    def scores_candidates(self) -> bool:
        return False

    def check(self, run: Run) -> None:
        super().check(run)
        text_columns(run.rows)
        used = self._budget(run) * self._spent
        if self.form == "offline" and used > run.size:
            raise ValueError(
                f"keep={self.keep!r} cannot be reached: with unchosen='burn' each round uses up k2={self.k2} examples "
                f"to choose k3={self.k3}, {used:.0f} of {run.size} in all. Set unchosen='restore', a smaller keep, or "
                "k2 nearer to k3."
            )

    def _budget(self, run: Run) -> int:
        return keep_count(1.0 if self.keep is None else self.keep, run.size)

    @property
    def _spent(self) -> float:
        """Examples used up per chosen one."""
        finalists = min(self.k1, self.k2)
        return 1.0 if self.unchosen == "restore" else finalists / min(finalists, self.k3)

    def _examples(self, run: Run) -> list[Any]:
        conversations = example_messages(run.rows)
        if self.serializer == "text":
            return [joined(messages) for messages in conversations]
        return [canonical_example(i, messages) for i, messages in enumerate(conversations)]

    # ---- Offline ----

    def setup(self, run: Run) -> None:
        if self.form == "offline":
            super().setup(run)
            return
        self._pieces, frame = serialize(self._examples(run), self.serializer)
        self._engine = CompressionEngine(self._pieces, frame)

    @property
    def uses(self) -> tuple[str, ...]:
        return ()

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        size = self._budget(run)
        needed = size * self._spent
        before = run.ledger[self.name]
        latest = rank_order(before)[: int(np.isfinite(before).sum())]
        self._anchor = np.concatenate([self._anchor, latest])
        if run.size - len(self._anchor) < needed:
            # Everything has been served: what the epoch before chose is all that a new round must differ from.
            self._anchor = latest if run.size - len(latest) >= needed else np.empty(0, dtype=np.int64)
        return {self.name: run.passes.from_first(run.size, lambda: self._choose(run, size))}

    def _choose(self, run: Run, size: int) -> np.ndarray:
        """`size`, `size - 1`, ... for the chosen examples in the order of the choice, -inf for the others."""
        with tqdm(total=size, desc="Choosing by compression") as bar:
            ids = zip_select(
                self._examples(run),
                size,
                k1=self.k1,
                k2=self.k2,
                k3=self.k3,
                serializer=self.serializer,
                unchosen=self.unchosen,
                anchor_ids=self._anchor.tolist(),
                workers=self.workers or os.cpu_count() or 1,
                watch=lambda step: bar.update(min(len(step.chosen), size - bar.n)),
            )
        scores = np.full(run.size, -np.inf)
        scores[ids] = size - np.arange(len(ids))
        return scores

    # ---- Online ----

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        assert self._engine is not None
        ids, _ = candidates.gather(candidates.ids)
        left = ids.cpu().numpy().astype(np.int64)
        positions, scores = np.arange(len(left)), np.zeros(len(left))
        count = max(1, len(left) // self.factor)
        picked: list[int] = []
        for _ in range(count):
            # What was picked just now counts as trained: two candidates that are alike are not both taken.
            ratios = self._engine.ratios("trained", self._window, left[positions].tolist())
            scores[positions] = -ratios
            best = int(np.lexsort((left[positions], ratios))[0])
            picked.append(int(positions[best]))
            self._window.append(int(left[positions[best]]))
            positions = np.delete(positions, best)
        rule = "not picked among its candidates (minus the ratio to which it compresses behind what was trained)"
        run.ledger.decide(self.name, left, scores, run.step, rule, picks=True)
        self._shorten()
        return torch.tensor(picked)

    def _shorten(self) -> None:
        """Forgets the oldest texts while the window is longer than what the compressor sees."""
        sizes = np.array([len(self._pieces[i]) for i in self._window], dtype=np.int64)
        behind = np.cumsum(sizes[::-1])[::-1]
        self._window = [i for i, size, rest in zip(self._window, sizes, behind, strict=True) if rest - size < WINDOW]

    def state_dict(self) -> dict[str, Any]:
        window = np.array(self._window, dtype=np.int64)
        return {**super().state_dict(), "window": window, "anchor": self._anchor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._window, self._anchor = state["window"].tolist(), state["anchor"].astype(np.int64)
