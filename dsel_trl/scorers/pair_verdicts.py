"""What is suggested about each pair, and why, in words."""

from dataclasses import dataclass

import numpy as np

from ..core.parameters import check_range
from ..functional.audit.pair_texts import Repeats
from .label_audit import LabelAudit

KEEP, DROP, FLIP, REVIEW = "keep", "drop", "flip", "review"


@dataclass
class Thresholds:
    """
    Probabilities of a wrong label from which something is suggested.

    Attributes:
        flip_above (`float`): from here on, to change the responses' places.
        review_above (`float`): from here on, to look at the pair: the label is as likely wrong as right.
    """

    flip_above: float = 0.6
    review_above: float = 0.4

    def __post_init__(self) -> None:
        check_range("flip_above", self.flip_above, 0.5, 1)
        check_range("review_above", self.review_above, 0, 1)
        if self.review_above > self.flip_above:
            raise ValueError(f"review_above={self.review_above} is above flip_above={self.flip_above}.")


@dataclass
class Verdicts:
    """
    Attributes:
        actions (`list[str]`): `keep`, `drop`, `flip` or `review`.
        reasons (`list[str]`): why, empty for `keep`.
        flags (`dict[str, np.ndarray]`): what was found, `(N,)` bool by name.
    """

    actions: list[str]
    reasons: list[str]
    flags: dict[str, np.ndarray]


def length_confounded(lengths: np.ndarray, opinion: np.ndarray, by_length: float) -> np.ndarray:
    """
    Which labels follow the dataset's liking for length where all else speaks against them, `(N,)` bool.

    Only where length alone foretells the labels (`by_length`, an area under the curve, is 0.55 or more from either
    side) and one response is half as long again as the other.
    """
    longer = np.subtract(*np.log(np.maximum(lengths, 1.0)).T)
    liked = longer if by_length >= 0.5 else -longer
    strong = abs(by_length - 0.5) >= 0.05 and np.isfinite(by_length)
    confounded: np.ndarray = (liked > np.log(1.5)) & (opinion < 0) & strong
    return confounded


def judge(
    audit: LabelAudit | None,
    found: Repeats,
    cut: np.ndarray,
    lengths: np.ndarray | None,
    unread: np.ndarray,
    thresholds: Thresholds,
    disagreement: np.ndarray | None = None,
) -> Verdicts:
    """
    An action and a reason for each pair.

    Args:
        audit ([`LabelAudit`], *optional*):
            The probabilities; without it only the texts decide.
        found ([`~dsel_trl.functional.audit.pair_texts.Repeats`]):
            What the texts repeat.
        cut (`np.ndarray` of bool of shape `(N,)`):
            Pairs whose responses are equal after truncation.
        lengths (`np.ndarray` of shape `(N, 2)`, *optional*):
            Tokens of the responses.
        unread (`np.ndarray` of bool of shape `(N,)`):
            Pairs that the model could not read: truncation left a response without a token.
        thresholds ([`Thresholds`]):
            From which probabilities on something is suggested.
        disagreement (`np.ndarray` of shape `(N,)`, *optional*):
            How far scores of the dataset and the opinion lie apart, in deviations.
    """
    size = len(found.identical)
    chance = np.zeros(size) if audit is None else audit.probability
    confounded = (
        np.zeros(size, dtype=bool)
        if audit is None or lengths is None
        else length_confounded(lengths, audit.opinion, audit.by_length)
    )
    apart = np.zeros(size, dtype=bool) if disagreement is None else np.nan_to_num(disagreement) >= 2.0
    flags = {
        "identical": found.identical,
        "identical_after_truncation": cut & ~found.identical,
        "duplicate": found.duplicate >= 0,
        "contradictory": found.contradicts >= 0,
        "length_confounded": confounded,
        "mislabelled": chance >= thresholds.flip_above,
        "ambiguous": (chance >= thresholds.review_above) & (chance < thresholds.flip_above),
        "unread": unread,
    }
    if disagreement is not None:
        flags["scores_disagree"] = apart
    actions, reasons = [], []
    for i in range(size):
        action, reason = _one(i, chance, found, flags, thresholds)
        notes = [reason] if reason else []
        if flags["length_confounded"][i] and action != DROP:
            notes.append("the label follows length, and all else speaks against it")
        if apart[i] and action != DROP:
            assert disagreement is not None
            notes.append(f"the dataset's scores and this audit lie {disagreement[i]:.1f} deviations apart")
        if flags["unread"][i] and action != DROP:
            notes.append("truncation left a response without a token: only its text was judged")
        if action == KEEP and notes:
            action = REVIEW
        actions.append(action)
        reasons.append("; ".join(notes))
    return Verdicts(actions, reasons, flags)


def _one(
    i: int, chance: np.ndarray, found: Repeats, flags: dict[str, np.ndarray], thresholds: Thresholds
) -> tuple[str, str]:
    if flags["identical"][i]:
        return DROP, "both responses are the same text"
    if flags["identical_after_truncation"][i]:
        return DROP, "both responses are the same after truncation"
    if flags["duplicate"][i]:
        return DROP, f"repeats pair {found.duplicate[i]}"
    wrong = f"the label is wrong with probability {chance[i]:.2f}"
    if flags["contradictory"][i]:
        other = int(found.contradicts[i])
        # Of two pairs that say the opposite of each other, the likelier one stays.
        worse = chance[i] > chance[other] or (chance[i] == chance[other] and i > other)
        text = f"pair {other} has the same texts the other way round"
        return (DROP, f"{text}, and its label is the likelier one") if worse else (REVIEW, text)
    if chance[i] >= thresholds.flip_above:
        return FLIP, wrong
    if chance[i] >= thresholds.review_above:
        return REVIEW, f"{wrong}: as good as undecided"
    return KEEP, ""
