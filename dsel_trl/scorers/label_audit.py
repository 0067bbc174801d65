"""The audit of preference labels: from what is known of each pair to a probability that its label is wrong."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..core.parameters import check_choice, check_range, check_whole
from ..core.randomness import stream, stream_seed
from ..functional.audit.label_noise import (
    agreement_probability,
    agreement_weights,
    area_under_curve,
    expected_calibration_error,
    fit_noise_model,
    noise_rate_bounds,
    reliability,
    wrong_probability,
)
from ..functional.audit.opinions import group_folds, linear_opinions, ridge_opinions, tree_opinions
from ..functional.audit.token_statistics import NAMES

SIGNALS = ("texts", "comparisons", "statistics", "states", "trees")
# Single signals of which the page and the table show a column of their own.
SHOWN = ("sum", "mean", "gain_sum", "gain_mean", "length", "entropy", "top1")
# Of fewer labels nothing can be learned.
FEWEST_PAIRS = 20


@dataclass
class PairFeatures:
    """
    What is known of pairs, as differences: chosen minus rejected.

    Attributes:
        groups (`np.ndarray` of int64 of shape `(N,)`):
            Pairs of one prompt have one number.
        relevance (`np.ndarray` of shape `(N, 5)`), shared (`np.ndarray` of shape `(N, s)`):
            Of the texts: [`~dsel_trl.functional.audit.pair_texts.relevance`].
        compared (`np.ndarray` of shape `(N,)`, *optional*):
            What other comparisons of the same responses say:
            [`~dsel_trl.functional.audit.pair_texts.compared_elsewhere`].
        statistics (`np.ndarray` of shape `(N, len(NAMES))`, *optional*):
            [`~dsel_trl.functional.audit.token_statistics.response_statistics`], where a model was asked.
        lengths (`np.ndarray` of shape `(N, 2)`, *optional*):
            Tokens of both responses.
        states (`dict[int, np.ndarray]`):
            Differences of the pooled hidden states, by layer, `(N, d)` each.
        more (`dict[str, np.ndarray]`):
            Further differences, `(N,)` each: held-out margins of helper models, influence on trusted pairs. Each must
            turn its sign where the two responses change places, and know nothing of the pair's own label.
    """

    groups: np.ndarray
    relevance: np.ndarray
    shared: np.ndarray
    compared: np.ndarray | None = None
    statistics: np.ndarray | None = None
    lengths: np.ndarray | None = None
    states: dict[int, np.ndarray] = field(default_factory=dict)
    more: dict[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def take(self, ids: np.ndarray) -> "PairFeatures":
        """The features of some pairs."""
        return PairFeatures(
            np.unique(self.groups[ids], return_inverse=True)[1].astype(np.int64),
            self.relevance[ids],
            self.shared[ids],
            None if self.compared is None else self.compared[ids],
            None if self.statistics is None else self.statistics[ids],
            None if self.lengths is None else self.lengths[ids],
            {layer: values[ids] for layer, values in self.states.items()},
            {name: values[ids] for name, values in self.more.items()},
        )


@dataclass
class AuditSettings:
    """
    How labels are audited.

    Attributes:
        signals (`Sequence[str]`): any of `texts`, `comparisons` (other pairs of the same responses), `statistics`,
            `states` (a probe on hidden states), `trees`.
        folds (`int`): folds of the cross-fitting.
        noise_rate (`float`, *optional*): share of wrong labels where it is known; else it is estimated.
        trees (`int`): trees per fold.
        seed (`int`): of folds and trees.
        workers (`int`): threads of the trees; the result does not depend on it.
    """

    signals: Sequence[str] = SIGNALS
    folds: int = 10
    noise_rate: float | None = None
    trees: int = 200
    seed: int = 0
    workers: int = 1

    def __post_init__(self) -> None:
        self.signals = tuple(self.signals)
        for signal in self.signals:
            check_choice("signals", signal, SIGNALS)
        if not set(self.signals) - {"trees"}:
            raise ValueError(f"signals={list(self.signals)} hold nothing to judge by: add one of {list(SIGNALS[:4])}.")
        check_whole("folds", self.folds, 2)
        if self.noise_rate is not None:
            check_range("noise_rate", self.noise_rate, 0, 0.5, open_high=True)
        check_whole("trees", self.trees, 1)


@dataclass
class LabelAudit:
    """
    What an audit found.

    Attributes:
        probability (`np.ndarray` of shape `(N,)`): that the label is wrong.
        agreement (`np.ndarray` of shape `(N,)`): that a label of this pair is as it is.
        opinion (`np.ndarray` of shape `(N,)`): the fused held-out opinion, positive where it agrees with the label.
        opinions (`dict[str, np.ndarray]`): those it is fused of, and of each layer's probe.
        noise_rate (`float`): share of wrong labels, given or estimated.
        noise_range (`tuple[float, float]`): between which it lies as far as the opinions tell, or twice the given one.
        calibration_error (`float`): of the agreement on held-out labels.
        plot (`tuple`): points of its reliability plot.
        predicted (`float`): area under the curve with which the opinion foretells held-out labels.
        by_length (`float`): the same of the length alone.
    """

    probability: np.ndarray
    agreement: np.ndarray
    opinion: np.ndarray
    opinions: dict[str, np.ndarray]
    noise_rate: float
    noise_range: tuple[float, float]
    calibration_error: float
    plot: tuple[np.ndarray, np.ndarray, np.ndarray]
    predicted: float
    by_length: float


def audit_labels(features: PairFeatures, settings: AuditSettings) -> LabelAudit:
    """
    Judges each label by models that were fitted to the labels of other prompts.

    Hidden states become one opinion per layer by ridge regression (the inner folds of a second stage never see the
    fold that is judged); these, the statistics and the texts go to a linear model with products and to extremely
    randomised trees. The scaled opinions of both are averaged, each by how far it agrees with held-out labels of other
    folds. The share of wrong labels is the middle of its two bounds, the slope is fitted on the other folds, and
    Bayes' rule gives the probability. How sure a label is foretold is fitted at the lower bound, for labels that are
    wrong in a way that can be learned are foretold as well.

    Args:
        features ([`PairFeatures`]):
            What is known of the pairs.
        settings ([`AuditSettings`]):
            Which of it counts.

    Returns:
        [`LabelAudit`].

    Raises:
        `ValueError`: for fewer than 20 pairs, one prompt only, a signal that was not measured, or signals that are the
            same for both responses of every pair.
        `ImportError`: for `trees` without scikit-learn.
    """
    size = len(features)
    if size < FEWEST_PAIRS:
        raise ValueError(f"{size} pairs are too few to learn from their labels: at least {FEWEST_PAIRS} are needed.")
    folds = min(settings.folds, int(features.groups.max()) + 1)
    fold = group_folds(features.groups, folds, stream(settings.seed, "audit/folds"))
    differences, shared = _inputs(features, settings.signals)
    if "states" not in settings.signals and not np.nan_to_num(differences).any():
        raise ValueError(
            f"signals={list(settings.signals)} tell no two responses apart: nothing can be learned from them here. "
            "`comparisons` needs responses that are compared with a third one; add `texts`, `statistics` or `states`."
        )
    opinions: dict[str, np.ndarray] = {}
    nested = []
    if "states" in settings.signals:
        if not features.states:
            raise ValueError("The signal `states` was not measured: a model is needed for it.")
        for layer, states in features.states.items():
            opinions[f"layer_{layer}"], own = ridge_opinions(states, fold)
            nested.append(own)
    stacked = np.stack(nested) if nested else np.zeros((0, folds, size), dtype=np.float32)
    members = {"linear": linear_opinions(differences, stacked, shared, fold)}
    if "trees" in settings.signals:
        seed = stream_seed(settings.seed, "audit/trees")
        members["trees"] = tree_opinions(
            differences, stacked, shared, fold, seed=seed, trees=settings.trees, workers=settings.workers
        )
    opinions |= members
    # The probes of the layers are inputs of both members: they have their say already.
    units = np.stack([_unit(values) for values in members.values()])
    opinion, agreement, probability = np.empty(size), np.empty(size), np.empty(size)
    for k in range(folds):
        own, rest = fold == k, fold != k
        # What a pair's own fold says of the models and of the share of wrong labels is kept from it as well.
        weights = agreement_weights(units[:, rest])
        others, opinion[own] = weights @ units[:, rest], weights @ units[:, own]
        low, rate, _ = _rates(noise_rate_bounds(others), settings)
        agreement[own] = agreement_probability(opinion[own], fit_noise_model(others, low))
        probability[own] = wrong_probability(opinion[own], fit_noise_model(others, rate))
    rates = _rates(noise_rate_bounds(opinion), settings)
    # Which response is named first is our choice: what is foretold is the response that the model prefers.
    sure, agreed = np.maximum(agreement, 1 - agreement), opinion > 0
    return LabelAudit(
        probability,
        agreement,
        opinion,
        opinions,
        rates[1],
        rates[::2],
        expected_calibration_error(sure, agreed),
        reliability(sure, agreed),
        _sided(opinion),
        float("nan") if features.lengths is None else _sided(np.subtract(*features.lengths.T.astype(np.float64))),
    )


def single_signals(features: PairFeatures) -> dict[str, np.ndarray]:
    """Signals that need no labels, by name: differences of which large ones speak for the label."""
    found = {f"relevance_{i}": features.relevance[:, i] for i in (0, 1)}
    if features.compared is not None:
        found["compared_elsewhere"] = features.compared
    if features.statistics is not None:
        found |= {f"difference_{name}": features.statistics[:, NAMES.index(name)] for name in SHOWN}
    return found | dict(features.more)


def _rates(bounds: tuple[float, float], settings: AuditSettings) -> tuple[float, float, float]:
    """The lowest, the estimated and the highest share of wrong labels."""
    given = settings.noise_rate
    return (bounds[0], sum(bounds) / 2, bounds[1]) if given is None else (given, given, given)


def _inputs(features: PairFeatures, signals: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Differences `(N, p)` and what both responses share `(N, s)`."""
    differences, shared = [np.zeros((len(features), 0), dtype=np.float32)], []
    if "texts" in signals:
        differences.append(features.relevance)
    shared.append(features.shared)
    if "comparisons" in signals:
        if features.compared is None:
            raise ValueError("The signal `comparisons` was not measured.")
        differences.append(features.compared[:, None])
    if "statistics" in signals:
        if features.statistics is None or features.lengths is None:
            raise ValueError("The signal `statistics` was not measured: a model is needed for it.")
        differences.append(features.statistics)
        logs = np.log(np.maximum(features.lengths, 1.0))
        shared.append(np.stack([logs.mean(axis=1), np.abs(np.subtract(*logs.T))], axis=1))
    if features.more:
        differences.append(np.stack(list(features.more.values()), axis=1))
    return np.concatenate(differences, axis=1), np.concatenate(shared, axis=1).astype(np.float32)


def _unit(values: np.ndarray) -> np.ndarray:
    """Opinions of root mean square 1: the sign, which says agree or not, stays."""
    size = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    return values / size if size > 0 else values


def _sided(values: np.ndarray) -> float:
    """Area under the curve of a difference for the labels, each pair seen from both sides."""
    both = np.concatenate([values, -values])
    return area_under_curve(both, np.arange(len(both)) < len(values))
