"""IFD: how little the instruction helps the model with the answer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, ClassVar

import numpy as np

from ...bases.helper_model import helper_settings
from ...bases.offline import Prescored
from ...core.charges import Charge
from ...core.method import Run
from ...core.parameters import REFRESHES, Reads, check_choice, check_range, check_whole, given, when, without
from ...core.registry import register
from ...data.conversations import example_messages, prompt_and_answer, text_columns
from ...data.tokens import IGNORED, Sequences, answer_alone, instruction_alone, start_tokens
from ...functional.facility_location import facility_location
from ...functional.kmeans import kmeans, require_backend, unit_rows
from ...functional.ranking import keep_count, top_k
from ...functional.text.ifd import drop_misled, ifd_from_perplexities, ifd_loss_ratio, pre_experienced_ids
from ...functional.text.perplexity import perplexity
from ...scorers.embeddings import SOURCE_HELP, check_embeddings, check_source, contents, embeddings, policy_states
from ...scorers.language_model import LanguageModel, sequence_losses
from ...signals.batch import Signal

FORMS = ("superfiltering", "cherry")
ALONE_PREFIX = "### Response:"
# Actions that serve what was kept; the others go by the whole range of scores.
SPREAD_ACTIONS = ("keep_top", "curriculum", "sample")


@register("ifd")
@dataclass
class Ifd(Prescored):
    """
    Keeps examples whose instruction helps the model least with their answer, but does help.

    What: the loss of the answer given the instruction, against the loss of the same answer tokens alone.
    `form: superfiltering` is the ratio of perplexities (hf.co/papers/2402.00530), usually under a small `model`;
    `form: cherry` the ratio of mean losses (hf.co/papers/2308.12032), the answer alone standing behind
    "### Response:". High = difficult and worth training; at `limit` (1) and above the instruction misleads, and the
    example is dropped; so is one without an answer. Under another `model` a line break stands between instruction and
    answer, as in the authors' template, unless the texts bring white space. Without `model` the policy itself is
    asked, and `refresh` asks it again while it learns (an adaptation). Of a pair the chosen response is the answer.
    Cherry's `warm_up`: before measuring, a helper that starts as the policy is trained briefly, by the run's own loss,
    on that many examples from each of `warm_up_clusters` clusters of instructions, and is asked instead of the policy,
    which stays as it is. The authors take 10 from each of 100.
    Superfiltering's `diverse`: of what `keep` leaves, the share of the data that covers the rest best (greedy facility
    location on `embedding`); the authors take `keep: 0.2`, `diverse: 0.02` and sentence embeddings of the whole text,
    `model:sentence-transformers/all-MiniLM-L6-v2`.
    When: instruction data with much that the model can do already. When not: plain texts without an instruction;
    very short answers, whose ratio is mostly noise.
    Plan of 1,000,000 examples, losses known: 0.1 s and 40 MB. `diverse` grows with the square of what `keep` leaves:
    1,040 of 10,400 vectors of 384 take 19 s on a core and 64 MB.
    """

    keep: float | None = field(default=0.1, metadata={"help": "fraction to keep, in (0, 1]"})
    form: str = field(default="superfiltering", metadata={"help": f"one of {', '.join(FORMS)}"})
    model: str | None = field(default=None, metadata={"help": "another causal model to ask (such as gpt2), by path"})
    limit: float = field(default=1.0, metadata={"help": "ratio from which an example is dropped; above 0"})
    warm_up: int = field(
        default=0, metadata={"help": "cherry: examples per cluster to train a helper on before measuring; 0 = off"}
    )
    warm_up_clusters: int = field(default=100, metadata={"help": "warm_up: clusters of instructions"})
    warm_up_low: float = field(default=1.0, metadata={"help": "warm_up: lowest percentile of perplexity in a cluster"})
    warm_up_high: float = field(default=99.0, metadata={"help": "warm_up: highest percentile of perplexity"})
    helper_epochs: float = field(default=1.0, metadata={"help": "warm_up: epochs of the helper"})
    helper_learning_rate: float | None = field(
        default=None, metadata={"help": "warm_up: default 3e-4, or without LoRA the run's own"}
    )
    helper_lora: bool = field(default=True, metadata={"help": "warm_up: LoRA (r 16) or a full helper model"})
    diverse: float | None = field(
        default=None, metadata={"help": "share that is left in the end, chosen for diversity; at most `keep`"}
    )
    embedding: str = field(default="policy", metadata={"help": f"diverse: {SOURCE_HELP}"})
    pooling: str = field(default="mean", metadata={"help": 'diverse, policy: "last" token or "mean" of all tokens'})

    signals = (Signal.TOKEN_LOGPS,)
    paper = "hf.co/papers/2402.00530, hf.co/papers/2308.12032"
    reads: ClassVar[Reads] = {
        "temperature": (when("action", "sample"),),
        "warm_up": (when("form", "cherry"), without("model")),
        **{
            name: (given("warm_up"),)
            for name in (
                "warm_up_clusters",
                "warm_up_low",
                "warm_up_high",
                "helper_epochs",
                "helper_learning_rate",
                "helper_lora",
            )
        },
        "diverse": (when("action", *SPREAD_ACTIONS),),
        "embedding": (given("diverse"),),
        "pooling": (given("diverse"), when("embedding", "policy")),
    }
    family = "indicator"
    criterion = "internal"
    selector = "threshold, top_k; diverse: greedy_diverse"
    charges = (
        Charge("forwards", "2", per="example and measurement", when="no model and no warm_up"),
        Charge("scorer_forwards", "2", when="model"),
        Charge("forwards", "2", when="warm_up", at_most=True),
        Charge(
            "helper_trainings",
            "warm_up * warm_up_clusters * helper_epochs",
            per="run",
            when="warm_up",
            reference=True,
            at_most=True,
        ),
        Charge("helper_forwards", "2", when="warm_up"),
        Charge("forwards", per="example and measurement", when="diverse and embedding: policy"),
        Charge("scorer_forwards", when="diverse and embedding: model"),
    )
    state = "three columns (24 bytes per example)"
    refreshes = REFRESHES

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("form", self.form, FORMS)
        check_range("limit", self.limit, 0, float("inf"), open_low=True)
        if self.refresh != "never" and self.model is not None:
            raise ValueError(
                f"refresh={self.refresh!r} measures the policy again, but model={self.model!r} never changes."
            )
        self._check_warm_up()
        check_source(self.embedding, self.pooling)
        if self.diverse is not None:
            check_range("diverse", self.diverse, 0, 1, open_low=True)
            check_choice("action", self.action, SPREAD_ACTIONS)
            if self.diverse > self._wide_share:
                raise ValueError(f"diverse={self.diverse!r} is more than what keep={self._wide_share!r} leaves.")

    def _check_warm_up(self) -> None:
        for name, least in (("warm_up", 0), ("warm_up_clusters", 1)):
            check_whole(name, getattr(self, name), least)
        check_range("warm_up_low", self.warm_up_low, 0, 100)
        check_range("warm_up_high", self.warm_up_high, 0, 100)
        if self.warm_up_low >= self.warm_up_high:
            raise ValueError(f"warm_up_low={self.warm_up_low!r} is not below warm_up_high={self.warm_up_high!r}.")
        check_range("helper_epochs", self.helper_epochs, 0, 1000, open_low=True)
        if not self.warm_up:
            return
        if self.refresh != "never":
            raise ValueError(f"refresh={self.refresh!r} asks the policy, which has then been trained: set warm_up=0.")

    @property
    def _wide_share(self) -> float:
        """What `keep` leaves, before `diverse`."""
        return super().keep_share

    @property
    def keep_share(self) -> float:
        # With `diverse`, what is measured is the choice already: everything with a score is kept.
        return self._wide_share if self.diverse is None else 1.0

    def check(self, run: Run) -> None:
        super().check(run)
        if self.warm_up:
            require_backend("sklearn")
        if self.diverse is not None:
            check_embeddings(run, self.embedding)
        if self.model is not None:
            text_columns(run.rows)
        elif run.trainer == "sft":
            tokens, trained = Sequences(run.rows.side("chosen")).scan()
            if len(tokens) and (trained >= tokens - 1).all():
                raise ValueError(
                    "ifd compares an answer with and without its instruction, but every token of this dataset is "
                    "trained: give prompts and completions, or set assistant_only_loss / completion_only_loss."
                )

    def depends_on(self, run: Run) -> list[Any]:
        return [] if self.diverse is None else [contents(run.rows, self.embedding)]

    @property
    def uses(self) -> tuple[str, ...]:
        policy = self.model is None or (self.diverse is not None and self.embedding == "policy")
        return (*(("policy",) if policy else ()), *(("seed",) if self.warm_up else ()))

    def helpers(self, run: Run) -> list[dict[str, Any]]:
        return [helper_settings(self, run.stream_seed("ifd/helper"))] if self.warm_up else []

    def measure(self, run: Run) -> dict[str, np.ndarray]:
        if self.model is not None:
            conditioned, alone = self._with_model(run)
        else:
            conditioned, alone = self._warmed_up(run) if self.warm_up else self._with_policy(run)
        cherry = self.form == "cherry"
        if cherry:
            ratio = ifd_loss_ratio(conditioned, alone)
        else:
            ratio = ifd_from_perplexities(perplexity(conditioned), perplexity(alone))
        # The published scripts differ at exactly the limit.
        scores = drop_misled(ratio, self.limit, at_threshold=cherry)
        return {
            "ifd_conditioned": conditioned,
            "ifd_alone": alone,
            self.name: scores if self.diverse is None else self._spread(run, scores, self.diverse),
        }

    def _spread(self, run: Run, scores: np.ndarray, share: float) -> np.ndarray:
        """The scores of the examples that cover best what `keep` leaves; -inf elsewhere."""
        known = int(np.isfinite(scores).sum())
        wide = np.sort(top_k(scores, keep_count(self._wide_share, known)))
        live = run.step > 0 and self.embedding == "policy"
        vectors = embeddings(run, self.embedding, self.pooling, live=live)

        def choose() -> np.ndarray:
            chosen = np.zeros(run.size)
            if known:
                chosen[wide[facility_location(unit_rows(vectors)[wide], keep_count(share, known))]] = 1.0
            return chosen

        return np.where(run.passes.from_first(run.size, choose) > 0, scores, -np.inf)

    def weights(self, scores: np.ndarray) -> np.ndarray:
        return np.maximum(scores, 0.0)

    def _prefix(self, tokenizer: object) -> list[int]:
        start = start_tokens(tokenizer)
        if self.form == "cherry":
            start = start + tokenizer(ALONE_PREFIX, add_special_tokens=False)["input_ids"]  # type: ignore[operator]
        return start

    def _warmed_up(self, run: Run) -> np.ndarray:
        """Both losses under a helper that has trained on a few examples of every cluster of instructions."""
        return run.train_helper(
            self._pre_experienced(run),
            np.arange(run.size),
            attrgetter("loss"),
            evaluations=1,
            evaluate=partial(self._with_policy, run),
            **self.helpers(run)[0],
        )[-1]

    def _pre_experienced(self, run: Run) -> np.ndarray:
        """Ids that the helper trains on."""
        sequences = Sequences(run.rows.side("chosen"))
        lengths = sequences.instruction_lengths()
        # The first token has nothing before it: what is shorter than two has no perplexity.
        known = np.flatnonzero(lengths > 1)
        if not len(known):
            raise ValueError(f"warm_up={self.warm_up!r} clusters instructions, but no example has one.")
        inputs = sequences.collate(instruction_alone)
        losses = run.passes.measure(
            attrgetter("loss"), known, inputs=inputs, lengths=lengths, description="Instructions alone"
        )
        vectors = policy_states(run, "mean", ids=known, inputs=inputs, lengths=lengths)
        labels = run.passes.from_first(
            len(known),
            lambda: kmeans(vectors, self.warm_up_clusters, seed=run.stream_seed("ifd/clusters"))[0].astype(np.float64),
        )
        band = {"low": self.warm_up_low, "high": self.warm_up_high}
        return known[pre_experienced_ids(perplexity(losses), labels, per_cluster=self.warm_up, **band)]

    def _with_policy(self, run: Run, forward: Callable[..., Any] | None = None) -> np.ndarray:
        """Both losses under the policy, or under the model of another forward, `(2, N)`."""
        sequences = Sequences(run.rows.side("chosen"))
        tokens, trained = sequences.scan()
        prefix = self._prefix(run.processing_class)
        given = run.passes.measure(
            lambda batch: batch.loss,
            inputs=sequences.collate(),
            lengths=tokens,
            forward=forward,
            description="Answers given instructions",
        )
        alone = run.passes.measure(
            lambda batch: batch.loss,
            inputs=sequences.collate(answer_alone(prefix)),
            lengths=trained + len(prefix),
            forward=forward,
            description="Answers alone",
        )
        return np.where(trained > 0, np.stack([given, alone]), np.nan)

    def _with_model(self, run: Run) -> np.ndarray:
        assert self.model is not None
        model = LanguageModel(self.model, run.model.device)
        prefix = self._prefix(model.tokenizer)
        given = [model.encode(*prompt_and_answer(messages)) for messages in example_messages(run.rows.side("chosen"))]
        alone = []
        for _, labels in given:
            answer = [label for label in labels if label != IGNORED]
            alone.append((prefix + answer, [IGNORED] * len(prefix) + answer))
        return np.stack(
            [
                sequence_losses(run, given, model, "Answers given instructions"),
                sequence_losses(run, alone, model, "Answers alone"),
            ]
        )
