"""
What a method needs to act on the tiny data, where its defaults do not do.

A method that is not in `CASES` runs with its defaults: registering it is enough to be in the suite.
"""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dsel_trl import create_method, get_method, list_methods
from tests import tiny

SIZE = 17
# For methods that train helpers on a part of the data: two processes would fill up the short last batch of a helper.
EVEN = 20


def fewest_words(prompts: list[Any], responses: list[str]) -> list[float]:
    """A reward for methods that write: the fewer words, the better, and no two texts of equal reward."""
    return [-len(text.split()) - (sum(map(ord, text)) % 997) / 1000 for text in responses]


@dataclass(frozen=True)
class Case:
    """
    One method in the suite.

    Attributes:
        parameters: parameters with which it acts on so few rows within two epochs.
        neutral: parameters with which it is stock TRL bit for bit; `None` where it has none.
        config: trainer arguments it needs.
        size: rows of its dataset.
        repeats: whether it surely trains an example twice that comes twice; `False` where avoiding that is what it is
            for, or where chance decides.
        idle: why it is meant to change nothing; empty where it has to act.
        untold: why examples that cannot be measured are trained all the same; empty where they never displace others.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
    neutral: dict[str, Any] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    size: int = SIZE
    repeats: bool = True
    idle: str = ""
    untold: str = ""


NEVER_PRUNED = "it prunes what is known to be learned; an example that is not known to be has the weight 1"
REWARD = f"{__name__}:fewest_words"


# Gone with the process; other processes are told the path.
FILES = TemporaryDirectory(prefix="dsel-contract-")


def target(size: int = 6) -> str:
    """A file with a set to follow, in the format of every trainer of the suite."""
    path, pairs = Path(FILES.name) / f"target-{size}.parquet", tiny.preferences(size, seed=5)
    rows = tiny.completions(size, seed=5).add_column("chosen", pairs["chosen"][:])
    rows.add_column("rejected", pairs["rejected"][:]).to_parquet(str(path))
    return str(path)


CASES: dict[str, Case] = {
    "uniform": Case(neutral={}, idle="the control: it measures, and leaves the run as it is"),
    "random": Case({"keep": 0.6, "refresh": "epoch"}),
    "weight_column": Case(neutral={"column": "one"}),
    "margin": Case({"action": "sample", "keep": 0.7, "refresh": 2}),
    "el2n": Case({"keep": 0.6, "refresh": 2}),
    "adapt_inf": Case({"keep": 0.6, "clusters": 3, "directions": 3, "bins": 4}),
    "data_shapley": Case({"target": target(), "permutations": 20, "features": 8, "keep": 0.6}),
    "less": Case({"target": target(), "warm_up": 0.4, "checkpoints": 2, "features": 64, "keep": 0.6}),
    "greats": Case({"target": target(), "target_refresh": 2, "scale": "cosine"}, repeats=False),
    "grand": Case({"keep": 0.6, "refresh": 2, "layers": "last-1"}),
    "quad": Case(
        {"target": target(), "target_refresh": 3, "calibration": 5, "clusters": 3, "draws": 2, "arms": 1, "refresh": 1}
    ),
    "alignment_potential": Case({"form": "dpo", "keep": 0.6, "refresh": 2}),
    "robust_dpo": Case({"eps": 0.2, "warmup": 0.0}, neutral={"eps": 0.0, "warmup": 0.0}),
    # Statistics of an example are lost with its texts only: nothing that is measured of it can be missing.
    "audit": Case({"trees": 10, "folds": 4}, size=24, untold="it judges texts and responses by passes of its own"),
    "dr_dpo": Case(neutral={"beta_prime": float("inf")}),
    "infobatch": Case({"keep_learned": 0.6, "delta": 1.0}, untold=NEVER_PRUNED),
    "dataset_decomposition": Case({"min_log2": 2, "max_log2": 6, "cycles": 2}),
    "bees": Case({"sources": ["explicit", "implicit"], "refresh": 3, "keep": 0.6}),
    "beta_dpo": Case(neutral={"a": 0.0, "keep": 1.0}),
    "rho_loss": Case({"factor": 2, "helper_lora": False}, size=EVEN),
    "s2l": Case({"clusters": 3, "checkpoints": 2, "helper_learning_rate": 5e-3, "helper_epochs": 1.0, "keep": 0.6}),
    "curry_dpo": Case({"stages": 2}),
    "reward_augmented": Case({"template": "w1 {g}"}),
    "uni_dpo": Case(untold="a pair without scores counts as one of equal scores, and its margin goes on to count"),
    "filtered_dpo": Case({"reward": REWARD, "max_new_tokens": 4, "threshold": 4.0}),
    "inco_dpo": Case({"reward": REWARD, "samples": 1, "continuations": 1, "max_new_tokens": 4, "unfinished": "keep"}),
    "zip": Case({"keep": 0.6, "k1": 12, "k2": 4, "k3": 2, "workers": 1, "refresh": "epoch", "unchosen": "restore"}),
    "deita": Case({"complexity_column": "difficulty", "quality_column": "weight", "keep": 0.6, "threshold": 0.99}),
    "ifd": Case({"keep": 0.7, "limit": 2.0, "refresh": "epoch"}),
    "perplexity": Case({"keep": 0.6, "refresh": 2}),
    "rho1": Case(
        {"clean_column": "difficulty", "clean_above": 0.3, "helper_lora": False},
        {"clean_column": "one", "keep": 1.0},
        untold="the column says what a helper learns from; it then knows the tokens of every example",
    ),
    # Its draws are by chance: a row that comes twice need not be drawn twice.
    "jest": Case({"loss_column": "difficulty", "factor": 2}, repeats=False),
    "edge": Case({"guideline": "w1 w2", "keep": 0.6, "max_new_tokens": 4}),
    "dsir": Case({"target_column": "difficulty", "target_above": 0.4, "keep": 0.6, "smoothing": 1.0}),
    "gotd": Case({"target": target(), "keep": 0.6, "refresh": "epoch"}),
    "inrun_shapley": Case({"target": target(), "target_refresh": 2, "keep": 0.6, "refresh": 2}),
    "cosine_relevance": Case({"target": target(), "keep": 0.6, "over": "max"}),
    "jsd_relevance": Case({"target": target(), "keep": 0.6}),
    "knn_shapley": Case({"target": target(), "keep": 0.6, "neighbours": 3, "refresh": 3}),
    "seal": Case({"target": target(), "upper": 0.6, "selector_learning_rate": 5.0, "keep": 0.6}, repeats=False),
    "selective_dpo": Case({"source": "online", "refresh": 2, "keep": 0.7}),
}
# One method in two guises: what its other parameters do is a different algorithm.
FURTHER: dict[str, Case] = {
    "zip:online": Case({"form": "online", "factor": 2}, repeats=False),
    "zip:order": Case({"action": "curriculum", "pacing": "none", "keep": 0.6, "k1": 12, "k2": 3, "k3": 3}),
    "deita:weight": Case({"complexity_column": "difficulty", "quality_column": "weight", "action": "weight"}),
    "ifd:warm_up": Case(
        {"form": "cherry", "warm_up": 2, "warm_up_clusters": 2, "helper_lora": False, "limit": 5.0, "keep": 0.7}
    ),
    "ifd:diverse": Case({"keep": 0.9, "limit": 5.0, "diverse": 0.6, "refresh": "epoch"}),
    "edge:dataset": Case({"guideline": "w1 w2", "keep": 0.6, "unfold": "dataset"}),
    "edge:weight": Case({"guideline": "w1 w2", "action": "weight", "refresh": 2, "unfold": "dataset"}),
    "jest:diverse": Case(
        {"loss_column": "difficulty", "factor": 2, "diversity": 1.0},
        repeats=False,
    ),
    "infobatch:steps": Case({"refresh": 1, "prescore": True, "keep_learned": 0.4}, untold=NEVER_PRUNED),
    "curriculum:sample": Case({"action": "sample", "by": "loss", "unbiased": True, "refresh": 2}),
    "gotd:negative": Case({"target": target(), "negative": target(3), "action": "weight", "temperature": 0.1}),
    "inrun_shapley:second": Case({"target": target(), "taylor": 2, "action": "curriculum", "pacing": "none"}),
    "inrun_shapley:cosine": Case(
        {"target": target(), "scale": "cosine", "layers": "norms", "keep": 0.6, "refresh": 2}
    ),
    "inrun_shapley:weight": Case({"target": target(), "precondition": "adam", "action": "weight"}),
    "seal:value": Case(
        {"target": target(), "upper": 0.6, "selector_learning_rate": 5.0, "value": "helper", "helper_lora": False},
        size=EVEN,
        repeats=False,
        untold="while it learns it trains all examples in any order; what it learned nothing of is then left out",
    ),
    "seal:adam": Case({"target": target(), "update": "adam", "activation": "sigmoid", "target_batch": 3}),
    "margin:weight": Case({"action": "weight"}),
    "el2n:weight": Case({"action": "weight"}),
    "greats:adam": Case(
        {"target": target(), "precondition": "adam", "scale": "mean", "layers": "last-1"}, repeats=False
    ),
    "adapt_inf:gradients": Case({"keep": 0.6, "clusters": 3, "features": "gradients", "directions": 4, "bins": 4}),
    "adapt_inf:epoch": Case({"budget": 9, "clusters": 2, "directions": 2, "refresh": "epoch", "scorers": ["el2n"]}),
    "margin:explicit": Case({"source": "explicit", "action": "curriculum"}),
    "margin:disagreement": Case({"source": "disagreement", "action": "band", "refresh": 3}),
    "alignment_potential:simpo": Case({"keep": 0.8}),
    "bees:helper": Case({"sources": ["helper"], "helper_lora": False, "keep": 0.6}),
    "rho_loss:holdout": Case({"source": "holdout", "factor": 2, "helper_lora": False}, size=EVEN),
    "selective_dpo:column": Case({"source": "column", "keep": 0.6}),
    "selective_dpo:cross_fit": Case({"helpers": 2, "evaluations": 1, "keep": 0.65}, size=EVEN),
    "audit:keep": Case({"sources": ["texts", "statistics"], "action": "keep_top", "keep": 0.6}, size=24),
    "robust_dpo:estimate": Case({"estimate": True, "warmup": 0.0}),
    "weight_column:plain": Case({"normalize": "none"}),
    "select_k_of_b:gumbel": Case({"mode": "gumbel_top_k"}, repeats=False),
}


if find_spec("faiss"):
    FURTHER["semdedup:faiss"] = Case({"backend": "faiss", "keep": 0.6, "clusters": 3, "refresh": "epoch"})
    FURTHER["d4:faiss"] = Case({"backend": "faiss", "clusters": 3, "dedup": 0.9, "diversify": 0.8})


def case(name: str) -> Case:
    return FURTHER[name] if name in FURTHER else CASES.get(name, Case())


def make(name: str, parameters: dict[str, Any] | None = None) -> Any:
    """The method of a case, with its parameters or the given ones."""
    return create_method(name.split(":")[0], **(case(name).parameters if parameters is None else parameters))


METHODS = list_methods()
GUISES = [*METHODS, *(name for name in FURTHER if name.split(":")[0] in METHODS)]


def kinds(name: str) -> list[str]:
    """Kinds of trainers of the suite that the method supports."""
    return [kind for kind in ("dpo", "sft") if kind in get_method(name.split(":")[0]).trainers]


def first_kind(name: str) -> str:
    return kinds(name)[0]


# KTO has a light pass of its own: what is particular about it is in `tests/test_kto.py`.
LABELLED = [name for name in METHODS if "kto" in get_method(name).trainers]
EVERYWHERE = [(name, kind) for name in GUISES for kind in kinds(name)]
NEUTRAL = [(name, kind) for name, kind in EVERYWHERE if case(name).neutral is not None]
NEUTRAL += [(name, "kto") for name in LABELLED if case(name).neutral is not None]
