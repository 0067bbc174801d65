"""
Cross-fitted opinions on preference labels: how far a model that never saw a pair agrees with the pair's label.

Each pair is the difference `d` of what is known of its chosen and of its rejected response, so its label is always
"the first is better", and the mirrored pair `-d` has the opposite one. A model that treats both alike can learn
nothing from which response the file names first. Scores are positive where the model agrees with the label.
"""

import heapq
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Strengths of the ridge, as multiples of the features' mean square.
RIDGES = (0.003, 0.03, 0.3, 3.0)
# Rows that one tree is grown on: more make it slower, not better.
TREE_ROWS = 20_000
# Rows whose squares are summed at a time.
BLOCK = 8192
# Fewest rows of a leaf: wrong labels average out in it.
LEAF = 25


def group_folds(groups: NDArray[np.int64], folds: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """
    A fold for each pair; pairs of one group (one prompt) are never in two folds.

    Args:
        groups (`np.ndarray` of int64 of shape `(N,)`):
            Group of each pair, from 0.
        folds (`int`):
            Number of folds.
        rng (`np.random.Generator`):
            Shuffles the groups.

    Returns:
        `np.ndarray` of int64 of shape `(N,)`, in `[0, folds)`. The largest groups are placed first, each into the
        smallest fold; those of one size evenly.

    Raises:
        `ValueError`: if there are fewer than two groups: then nothing can be held out.
    """
    sizes = np.bincount(groups)
    if len(sizes) < 2:
        raise ValueError("All pairs have the same prompt: none can be judged by a model that has not seen it.")
    order = rng.permutation(len(sizes))
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of = np.empty(len(sizes), dtype=np.int64)
    emptiest = [(0, fold) for fold in range(folds)]
    for group in order.tolist():
        held, fold = emptiest[0]
        fold_of[group] = fold
        heapq.heapreplace(emptiest, (held + int(sizes[group]), fold))
    return fold_of[groups]


def scaled(differences: NDArray[Any]) -> NDArray[np.float32]:
    """
    Differences over their root mean square, which no label has a part in; what is not known counts as no difference.

    Args:
        differences (`np.ndarray` of shape `(N, p)`):
            Chosen minus rejected.

    Returns:
        `np.ndarray` of float32 of shape `(N, p)`; a column without any difference stays 0.
    """
    values = np.nan_to_num(np.asarray(differences, dtype=np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    squares = np.zeros(values.shape[1])
    for start in range(0, len(values), BLOCK):
        squares += np.square(values[start : start + BLOCK], dtype=np.float64).sum(axis=0)
    size = np.sqrt(squares / max(1, len(values)))
    return (values / np.where(size > 0, size, 1.0)).astype(np.float32)


def ridge_opinions(
    differences: NDArray[Any], fold: NDArray[np.int64], ridges: Sequence[float] = RIDGES
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """
    Opinions of a linear model without intercept, by least squares towards the labels.

    Args:
        differences (`np.ndarray` of shape `(N, p)`):
            Chosen minus rejected; scaled here ([`scaled`]).
        fold (`np.ndarray` of int64 of shape `(N,)`):
            Fold of each pair.
        ridges (`Sequence[float]`, *optional*):
            Strengths to choose from, by the squared error on held-out pairs, anew for each fold.

    Returns:
        `tuple`: `held_out` `(N,)`, each pair judged by a model without its fold; and `nested` `(folds, N)`, of which
        row `k` comes from models that have seen neither fold `k` nor the pair's own: features for a second model that
        is to be tested on fold `k`. In fold `k` itself, row `k` is `held_out`.

    Time: one product `p x p` over all pairs and `folds^2 / 2` solutions of it; memory `folds` matrices `p x p`.
    """
    values, folds = scaled(differences), int(fold.max()) + 1
    rows = [np.flatnonzero(fold == k) for k in range(folds)]
    parts = [values[own] for own in rows]
    grams = np.stack([(part.T @ part).astype(np.float64) for part in parts])
    sums = np.stack([part.sum(axis=0, dtype=np.float64) for part in parts])
    gram, total, width = grams.sum(axis=0), sums.sum(axis=0), values.shape[1]
    found = np.zeros((len(ridges), folds, len(values)), dtype=np.float32)
    for k in range(folds):
        for j in range(k, folds):
            left_out = [k] if k == j else [k, j]
            rest = gram - grams[left_out].sum(axis=0)
            ridge = np.trace(rest) / width
            solutions = [
                np.linalg.solve(rest + (strength * ridge + 1e-9) * np.eye(width), total - sums[left_out].sum(axis=0))
                for strength in ridges
            ]
            weights = np.stack(solutions, axis=1).astype(np.float32)
            found[:, k, rows[j]] = (parts[j] @ weights).T
            found[:, j, rows[k]] = (parts[k] @ weights).T
    # Which strength is best for fold k is asked of the others alone.
    errors = np.stack([np.square(1.0 - found[:, k][:, fold != k]).mean(axis=1) for k in range(folds)], axis=1)
    nested = found[errors.argmin(axis=0), np.arange(folds)]
    return nested[fold, np.arange(len(values))], nested


def linear_opinions(
    differences: NDArray[Any],
    nested: NDArray[np.float32],
    shared: NDArray[Any],
    fold: NDArray[np.int64],
    ridges: Sequence[float] = RIDGES,
) -> NDArray[np.float32]:
    """
    Opinions of a linear model of differences and of their products with what both responses share.

    A product lets the weight of a difference depend on the pair: between two responses of the same words fluency
    tells, between two of different words what they have to do with the prompt.

    Args:
        differences, nested, shared, fold:
            As in [`tree_opinions`].
        ridges (`Sequence[float]`, *optional*):
            Strengths to choose from, by the error on each training pair left out.

    Returns:
        `np.ndarray` of float32 of shape `(N,)`, of models that have not seen the pair's fold.
    """
    values, known = scaled(differences), np.nan_to_num(np.asarray(shared, dtype=np.float32))
    known = known - known.mean(axis=0)
    known = known / np.maximum(known.std(axis=0), 1e-12)
    products = [scaled(values * known[:, [column]]) for column in range(known.shape[1])]
    opinions = np.zeros(len(values), dtype=np.float32)
    for k in range(int(fold.max()) + 1):
        own, rest = fold == k, fold != k
        odd = np.concatenate([values, scaled(nested[:, k].T), *products], axis=1).astype(np.float64)
        seen = odd[rest]
        size, axes = np.linalg.eigh(seen.T @ seen)
        turned = seen @ axes
        del seen
        total, squares = turned.sum(axis=0), np.square(turned)
        best, error = np.zeros(len(size)), np.inf
        for strength in ridges:
            shrunk = 1.0 / (np.maximum(size, 0.0) + strength * size.mean() + 1e-9)
            leverage = np.minimum(squares @ shrunk, 1 - 1e-6)
            left_out = float(np.mean(np.square((1.0 - turned @ (shrunk * total)) / (1.0 - leverage))))
            if left_out < error:
                best, error = shrunk * total, left_out
        opinions[own] = odd[own] @ (axes @ best)
    return opinions


def tree_opinions(
    differences: NDArray[Any],
    nested: NDArray[np.float32],
    shared: NDArray[Any],
    fold: NDArray[np.int64],
    *,
    seed: int,
    trees: int = 200,
    workers: int = 1,
) -> NDArray[np.float32]:
    """
    Opinions of extremely randomised trees, which see each pair both ways.

    Args:
        differences (`np.ndarray` of shape `(N, p)`):
            Chosen minus rejected.
        nested (`np.ndarray` of shape `(m, folds, N)`):
            Opinions of other models, as [`ridge_opinions`] gives them, that count as differences.
        shared (`np.ndarray` of shape `(N, s)`):
            What is known of a pair whichever response is named first, such as their overlap.
        fold (`np.ndarray` of int64 of shape `(N,)`):
            Fold of each pair.
        seed (`int`):
            Seed of the trees.
        trees (`int`, *optional*, defaults to `200`):
            How many, per fold.
        workers (`int`, *optional*, defaults to `1`):
            Threads that grow them; the result does not depend on it.

    Returns:
        `np.ndarray` of float32 of shape `(N,)`: log-odds that the label is what the model expects, of models that have
        not seen the pair's fold.

    Raises:
        `ImportError`: without scikit-learn.
    """
    try:
        from sklearn.ensemble import ExtraTreesClassifier
    except ImportError as error:
        raise ImportError(
            'The audit\'s trees need scikit-learn: pip install "dsel-trl[audit]", or leave the signal `trees` out.'
        ) from error
    values, known = scaled(differences), np.nan_to_num(np.asarray(shared, dtype=np.float32))
    opinions = np.zeros(len(values), dtype=np.float32)
    for k in range(int(fold.max()) + 1):
        own, rest = np.flatnonzero(fold == k), np.flatnonzero(fold != k)
        odd = np.concatenate([values, nested[:, k].T], axis=1)
        seen = np.concatenate([_faced(odd[rest], known[rest]), _faced(-odd[rest], known[rest])])
        labels = np.repeat([1, 0], len(rest))
        model = ExtraTreesClassifier(
            trees,
            min_samples_leaf=max(2, min(LEAF, len(rest) // LEAF)),
            max_features=0.3,
            bootstrap=len(labels) > TREE_ROWS,
            max_samples=TREE_ROWS if len(labels) > TREE_ROWS else None,
            n_jobs=workers,
            random_state=seed,
        ).fit(seen, labels)
        forth = model.predict_proba(_faced(odd[own], known[own]))[:, 1]
        back = model.predict_proba(_faced(-odd[own], known[own]))[:, 1]
        share = np.clip((forth + 1.0 - back) / 2.0, 1e-3, 1 - 1e-3)
        opinions[own] = np.log(share / (1.0 - share))
    return opinions


def _faced(odd: NDArray[np.float32], even: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([odd, even], axis=1)
