"""
Time and memory of the planners that read texts, embeddings, losses and scores, at 1 million examples on one core.

Each runs in a process of its own on made-up inputs: texts of 8 to 60 words, vectors of 64 numbers. Prints a table and
writes JSON; `benchmarks/scale.py` adds the rows to its own.

    OMP_NUM_THREADS=1 python -m benchmarks.scale_plans --examples 1000000 --output scale_plans.json
"""

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from dsel_trl.core.composition import Composition
from dsel_trl.core.data_passes import Passes
from dsel_trl.core.ledger import Ledger
from dsel_trl.core.registry import create_method
from dsel_trl.core.run import Run
from dsel_trl.functional.bandits import draw_in_rounds
from dsel_trl.functional.influence.adapt_inf import (
    choose_in_clusters,
    most_entropic,
    similarity_in_clusters,
    without_duplicates,
)
from dsel_trl.functional.kmeans import spherical_kmeans, unit_rows
from dsel_trl.functional.pacing import unigram_rarity
from dsel_trl.functional.ranking import top_k
from dsel_trl.functional.target.cosine_relevance import cosine_relevance
from dsel_trl.functional.target.gotd import target_gradient
from dsel_trl.functional.target.jsd_relevance import jensen_shannon
from dsel_trl.functional.target.knn_shapley import knn_shapley
from dsel_trl.functional.target.seal import (
    Moments,
    adam_update,
    selector_gradient,
    selector_weights,
    sparse_update,
)
from dsel_trl.functional.text.d4 import d4_select
from dsel_trl.functional.text.deita import diversity_filter
from dsel_trl.functional.text.dsir import bucket_distribution, dsir_select, hash_ngrams, log_importance_weights
from dsel_trl.functional.text.edge import edge_scores, guideline_effect
from dsel_trl.functional.text.ifd import drop_misled, ifd_from_perplexities
from dsel_trl.functional.text.perplexity import perplexity, perplexity_band
from dsel_trl.functional.text.semdedup import max_similarity, rank_clusters
from dsel_trl.functional.text.zip import zip_select
from dsel_trl.methods.influence.quad import MOST_CLUSTERS
from tests.runs import make_run

# The pool of a stage that is pruned at once: the time grows with the square of its clusters.
MOST_PRUNED = 100_000

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("n", "rt", "sta", "lem", "go", "vi", "tor")]


def texts_of(examples: int) -> list[str]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(8, 60, examples)
    words = np.array(WORDS)[np.minimum(rng.zipf(1.3, int(lengths.sum())), len(WORDS)) - 1].tolist()
    ends = np.cumsum(lengths).tolist()
    return [" ".join(words[end - length : end]) for end, length in zip(ends, lengths.tolist(), strict=True)]


def vectors_of(examples: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    centers = rng.standard_normal((1000, 64), dtype=np.float32)
    return centers[rng.integers(0, 1000, examples)] + 0.7 * rng.standard_normal((examples, 64), dtype=np.float32)


def run_dsir(texts: list[str]) -> None:
    hashed = hash_ngrams(texts)
    target = hash_ngrams(texts[:1000])
    weights = log_importance_weights(hashed, bucket_distribution(hashed, 10_000), bucket_distribution(target, 10_000))
    dsir_select(weights, len(texts) // 2, rng=np.random.default_rng(0))


def run_jsd(texts: list[str]) -> None:
    jensen_shannon(hash_ngrams(texts, ngrams=1), bucket_distribution(hash_ngrams(texts[:1000], ngrams=1), 10_000))


def run_semdedup(vectors: np.ndarray) -> None:
    rows = unit_rows(vectors)
    labels, centroids = spherical_kmeans(rows)
    max_similarity(rank_clusters(rows, labels, centroids), len(rows))


def run_quad(vectors: np.ndarray) -> None:
    """The clusters, and the order of an epoch with half of them known."""
    labels, _ = spherical_kmeans(vectors, MOST_CLUSTERS)
    rng, pulls = np.random.default_rng(0), np.repeat([0, 3], MOST_CLUSTERS // 2)
    means = rng.standard_normal(MOST_CLUSTERS)
    draw_in_rounds(
        np.arange(len(labels)), labels, pulls, means, arms=4, draws=16, alpha=1.0, limit=len(labels) // 2, rng=rng
    )


def run_seal(examples: int, update: str) -> None:
    """What ten steps of 64 examples do to the logits and weights."""
    rng, logits = np.random.default_rng(0), np.zeros(examples)
    moments = Moments(np.zeros(examples), np.zeros(examples), 0)
    for _ in range(10):
        ids, losses = rng.integers(0, examples, 64), rng.gamma(4.0, 0.5, 64)
        if update == "sparse":
            logits = sparse_update(logits, ids, losses, 0.1)
        else:
            gradient = selector_gradient(logits, ids, losses)
            logits, moments = adam_update(logits, gradient, moments, 0.005)
        selector_weights(logits)


def run_adapt_inf(given: tuple[np.ndarray, dict[str, np.ndarray]]) -> None:
    """Pseudo-skills, scorers and the choice of a tenth."""
    features, scores = given
    labels, _ = spherical_kmeans(features, 10)
    chosen, _ = most_entropic(scores, labels, 10)
    choose_in_clusters(scores, chosen, labels, len(labels) // 10, np.random.default_rng(0))


def run_pruning(vectors: np.ndarray) -> None:
    """What is left of a stage's pool for the next: half of it, near duplicates out first."""
    labels, _ = spherical_kmeans(vectors, 10)
    without_duplicates(similarity_in_clusters(vectors, labels), labels, len(labels) // 2)


# Methods whose plan comes from columns of the ledger or the dataset alone.
BY_SCORE: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "margin: keep_top": ("margin", {}),
    "margin: band": ("margin", {"action": "band"}),
    "margin: sample": ("margin", {"action": "sample"}),
    "margin: curriculum": ("margin", {"action": "curriculum"}),
    "margin: disagreement": ("margin", {"source": "disagreement"}),
    "length_curriculum": ("length_curriculum", {}),
    "curriculum: length, sample": ("curriculum", {"by": "length", "action": "sample"}),
    "alignment_potential": ("alignment_potential", {"form": "dpo"}),
    "bees: two margins": ("bees", {"sources": ["explicit", "implicit"], "refresh": "epoch"}),
    "selective_dpo: column": ("selective_dpo", {"source": "column"}),
    "curry_dpo": ("curry_dpo", {}),
    "infobatch": ("infobatch", {}),
}


def run_of(examples: int) -> Run:
    """A run over made-up scores, margins, losses and lengths."""
    rng = np.random.default_rng(5)
    ledger = Ledger(examples)
    ledger.write("loss", None, rng.gamma(4.0, 0.5, examples), 1)
    for name in ("implicit_margin", "margin", "alignment_potential_implicit"):
        ledger.write(name, None, rng.standard_normal(examples, dtype=np.float32), 1)
    columns = {name: rng.standard_normal(examples) for name in ("score_chosen", "score_rejected", "difficulty")}
    lengths = rng.integers(16, 2048, examples).astype(np.int32)
    return make_run(
        examples,
        columns=columns,
        lengths=lengths,
        ledger=ledger,
        epochs=8,
        # The forwards are not what is measured here.
        passes=cast(Passes, SimpleNamespace(measure=lambda *args, **kwargs: ledger["margin"].copy())),
    )


def run_plan(run: Run, name: str, parameters: dict[str, Any]) -> None:
    """Set-up and the first plan of a method, as at the start of an epoch."""
    method = create_method(name, **parameters)
    method.check(run)
    method.setup(run)
    Composition([method]).plan(run)


def planners(examples: int) -> dict[str, tuple[Callable[[], object], Callable[..., object]]]:
    """For each planner what makes its input and what is measured."""

    def losses() -> np.ndarray:
        return np.random.default_rng(2).gamma(4.0, 0.5, (2, examples))

    def tokens() -> tuple[np.ndarray, np.ndarray]:
        lengths = np.random.default_rng(3).integers(8, 60, examples)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return np.random.default_rng(4).zipf(1.3, int(offsets[-1])).clip(max=50_000), offsets

    def scored() -> tuple[np.ndarray, np.ndarray]:
        return losses()[0], vectors_of(examples)

    return {
        "zip: start and a round of 100 (k1=10000)": (
            lambda: texts_of(examples),
            lambda texts: zip_select(texts, 100, serializer="text"),
        ),
        "deita: filter to 10,000 of 64 numbers": (scored, lambda pair: diversity_filter(*pair, size=10_000)),
        "ifd": (
            losses,
            lambda pair: top_k(drop_misled(ifd_from_perplexities(*map(perplexity, pair))), examples // 10),
        ),
        "perplexity": (losses, lambda pair: perplexity_band(pair[0], 0.5)),
        "edge: one turn each": (
            losses,
            lambda pair: edge_scores(guideline_effect(*pair), np.arange(examples), examples),
        ),
        "semdedup: 1,000 clusters": (lambda: vectors_of(examples), run_semdedup),
        "d4: 1,000 clusters": (lambda: vectors_of(examples), d4_select),
        "gotd: 1,000 targets of 64 numbers": (
            lambda: (vectors_of(examples), vectors_of(1000)),
            lambda pair: target_gradient(*pair),
        ),
        "gotd: 10,000 targets of 64 numbers": (
            lambda: (vectors_of(examples), vectors_of(10_000)),
            lambda pair: target_gradient(*pair),
        ),
        "knn_shapley: 100 targets of 64 numbers": (
            lambda: (vectors_of(examples), vectors_of(100), np.ones(examples)),
            lambda given: knn_shapley(given[0], given[1], lambda i: given[2], 10),
        ),
        "quad: 256 clusters of 64 numbers, an order": (lambda: vectors_of(examples), run_quad),
        "seal: ten steps of the logits": (lambda: None, lambda given: run_seal(examples, "sparse")),
        "seal: ten steps of the logits, adam": (lambda: None, lambda given: run_seal(examples, "adam")),
        "adapt_inf: 10 clusters of 64 numbers, a choice": (
            lambda: (vectors_of(examples), dict(zip(("perplexity", "el2n"), losses(), strict=True))),
            run_adapt_inf,
        ),
        f"adapt_inf: pruning of {min(examples, MOST_PRUNED):,} with 64 numbers": (
            lambda: vectors_of(min(examples, MOST_PRUNED)),
            run_pruning,
        ),
        "cosine_relevance: 1,000 targets of 64 numbers": (
            lambda: (vectors_of(examples), vectors_of(1000)),
            lambda pair: cosine_relevance(*pair),
        ),
        "jsd_relevance": (lambda: texts_of(examples), run_jsd),
        "dsir": (lambda: texts_of(examples), run_dsir),
        "curriculum: rarity": (tokens, lambda pair: unigram_rarity(*pair)),
    } | {
        name: (lambda: run_of(examples), partial(run_plan, name=method, parameters=parameters))
        for name, (method, parameters) in BY_SCORE.items()
    }


def memory(key: str) -> float:
    """MB of this process, by a key of the kernel's status file."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(float(line.split()[1]) / 1024 for line in status if line.startswith(key))


def measured(make: Callable[[], object], run: Callable[..., object]) -> tuple[float, float]:
    """CPU seconds and additional MB at the peak, in a process of its own."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        warnings.simplefilter("ignore")
        given = make()
        with open("/proc/self/clear_refs", "w", encoding="ascii") as peak:
            peak.write("5")
        before, start = memory("VmRSS"), time.process_time()
        run(given)
        os.write(writing, json.dumps([time.process_time() - start, memory("VmHWM") - before]).encode())
        os._exit(0)
    os.close(writing)
    with open(reading, encoding="ascii") as found:
        text = found.read()
    os.waitpid(pid, 0)
    seconds, megabytes = json.loads(text)
    return seconds, megabytes


def plans(examples: int, only: str = "") -> dict[str, float]:
    """Rows of the table: seconds and MB per planner."""
    rows = {}
    for name, (make, run) in planners(examples).items():
        if only in name:
            seconds, megabytes = measured(make, run)
            print(f"{name:<60}{seconds:>10.2f} s{megabytes:>10.0f} MB", flush=True)
            rows[f"{name}: s"], rows[f"{name}: MB"] = seconds, megabytes
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--only", default="", help="planners whose name contains this")
    parser.add_argument("--output", default="scale_plans.json")
    options = parser.parse_args()
    print(f"{options.examples:,} examples, one core")
    rows = plans(options.examples, options.only)
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump({"examples": options.examples, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
