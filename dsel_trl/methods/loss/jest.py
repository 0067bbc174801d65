"""JEST: the most learnable examples of a super-batch."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...bases.reference_loss import SecondModel
from ...core.cache import cached
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import Reads, check_range, check_whole, given, when
from ...core.registry import register
from ...functional.loss.jest import chunk_size, jest_select, learnability, separable_select, similarity_penalty_matrix
from ...scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, embeddings
from ...signals.batch import Batch, Signal

CHUNKS = 16


@register("jest")
@dataclass
class Jest(SecondModel):
    """
    Draws from a large candidate batch the examples that the policy has not learned but a second model has.

    What: of `factor` candidates per trained example, the batch is drawn in proportion to exp(learnability /
    `temperature`), learnability being the policy's loss minus that of a second model (the reference of
    hf.co/papers/2406.17711). SFT and DPO losses do not couple examples, so the joint choice of the paper is a draw of
    each on its own; `diversity` above 0 couples them again by the cosine similarity of their embeddings. The second
    model's losses are measured once: under `model`, under a helper trained on `clean_column`, or from `loss_column`.
    Of a pair it is the loss that the second model would have in the policy's place.
    When: much more data than can be trained, of mixed quality, with clean data or a good small model at hand.
    When not: it costs `factor` extra forwards per trained example (in DPO as many of the reference model); rows that
    are not drawn count as seen, so an epoch has `1 / factor` of the steps; learnability in nats differs little between
    pairs, so lower the temperature there.
    """

    factor: int = field(default=5, metadata={"help": "candidates drawn for one trained example, at least 2"})
    temperature: float = field(default=1.0, metadata={"help": "of the draw; 0 takes the most learnable"})
    loss_column: str | None = field(default=None, metadata={"help": "instead: column with the second model's loss"})
    diversity: float = field(default=0.0, metadata={"help": "weight of the similarity to what is chosen already"})
    embedding: str = field(default="policy", metadata={"help": f"for diversity: {SOURCE_HELP}"})
    pooling: str = field(default="last", metadata={"help": 'policy: "last" token or "mean" of all tokens'})

    signals = (Signal.LOSS,)
    paper = "hf.co/papers/2406.17711"
    reads: ClassVar[Reads] = {
        "embedding": (given("diversity"),),
        "pooling": (given("diversity"), when("embedding", "policy")),
    }
    family = "indicator"
    renamed: ClassVar[dict[str, str]] = {"reference_column": "loss_column"}
    criterion = "external_continuous"
    selector = "gumbel_top_k of candidates"
    charges = (
        Charge("forwards", per="candidate", reference=True),
        *SecondModel.charges,
        Charge("forwards", when="diversity and embedding: policy"),
        Charge("scorer_forwards", when="diversity and embedding: model"),
    )
    cost = "factor candidates per trained example"
    state = "the second model's losses (8 bytes per example); with diversity 4 d bytes per example"

    def __post_init__(self) -> None:
        check_whole("factor", self.factor, 2, 1024)
        check_range("temperature", self.temperature, 0, float("inf"))
        check_range("diversity", self.diversity, 0, float("inf"))
        check_source(self.embedding, self.pooling)
        self.check_second(also=("loss_column",))
        self._vectors: np.ndarray | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return super().columns if self.loss_column is None else (self.loss_column,)

    @property
    def candidates(self) -> int:
        return self.factor

    def check(self, run: Run) -> None:
        super().check(run)
        if self.diversity:
            check_embeddings(run, self.embedding)

    def setup(self, run: Run) -> None:
        if not run.resumed:
            if self.loss_column is not None:
                losses = run.column(self.loss_column)
            else:
                measure = lambda: {"losses": self.second_losses(run)}  # noqa: E731
                losses = cached(run, "jest", self.second_parts, measure, **self.second_key(run))["losses"]
            run.ledger.write("jest_second_loss", None, losses, step=0)
        self._second_losses = run.ledger["jest_second_loss"]
        if self.diversity:
            self._vectors = embeddings(run, self.embedding, self.pooling)

    def pick(self, run: Run, candidates: Batch) -> Tensor:
        losses, _ = candidates.gather(candidates.loss.float())
        ids = candidates.gather(candidates.ids)[0].cpu().numpy()
        scores = learnability(losses.cpu().numpy(), self._second_losses[ids])
        rule = "not picked among its candidates (learnability)"
        run.ledger.decide(self.name, ids, scores, run.step, rule, picks=True)
        count, rng = max(1, len(ids) // self.factor), run.rng("jest/pick", run.step, len(ids), int(ids[0]))
        known = np.flatnonzero(np.isfinite(scores))
        if self._vectors is None or not len(known):
            picked = separable_select(scores, count, rng, self.temperature) if len(known) else known
        else:
            logits = scores[known] / max(self.temperature, 1e-6)
            matrix = similarity_penalty_matrix(logits, self._vectors[ids[known]], self.diversity)
            chunks = min(CHUNKS, count)
            picked = known[jest_select(matrix, chunks, chunk_size(count, chunks), rng)[:count]]
        # Where too few candidates have a known score, the batch is filled with the others.
        rest = np.setdiff1d(np.arange(len(ids)), picked)
        return torch.as_tensor(np.concatenate([picked, rest])[:count])

    def score(self, batch: Batch) -> Tensor:
        """Learnability of the trained examples."""
        second = self._second_losses[batch.ids.cpu().numpy()]
        return batch.loss - torch.from_numpy(second).to(batch.ids.device)
