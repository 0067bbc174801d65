"""Oracle adapter for Quad: K-FAC factors, products with the inverse Hessian, influences, and traces of the bandit."""

import numpy as np
import torch

from dsel_trl.functional.bandits import best_arms, pull, ucb_scores
from dsel_trl.functional.ghost import Outer, dot, gradients
from dsel_trl.functional.influence.quad import factored_ihvp, ihvp, kfac_sums


def evaluate(oracle):
    for i, case in enumerate(oracle["kfac"]):
        given, expected = case["inputs"], case["expected"]
        x, delta, reference = (torch.tensor(given[key], dtype=torch.float64) for key in ("x", "delta", "ref_grad"))
        first, second, count = kfac_sums(x, delta)
        factors, own = (first / count, second / count), Outer(x, delta)
        solved = ihvp(reference, *factors, given["lam"])
        got = {
            "S_x": factors[0],
            "S_delta": factors[1],
            "per_sample_grads": gradients(own),
            "ihvp_exact_damping": solved,
            "ihvp_factored_damping": factored_ihvp(reference, *factors, given["lam"]),
            "influence_positive_is_good": dot(own, solved),
            "influence_ghost": dot(own, solved),
        }
        for name, value in expected.items():
            yield f"kfac[{i}].{name}", got[name], value
    for i, case in enumerate(oracle["ucb"]):
        given, expected = case["inputs"], case["expected"]
        pulls, means = np.zeros(given["n_clusters"], dtype=np.int64), np.zeros(given["n_clusters"])
        for r, (rewards, wanted) in enumerate(zip(given["rewards_per_round"], expected["rounds"], strict=True)):
            scores = ucb_scores(pulls, means, given["alpha"])
            picked = best_arms(scores, given["clusters_per_round"])
            yield f"ucb[{i}].rounds[{r}].cluster_scores", scores, [float(s) for s in wanted["cluster_scores"]]
            yield f"ucb[{i}].rounds[{r}].picked", picked, wanted["picked"]
            of = {entry["cluster"]: entry["reward"] for entry in rewards}
            values = np.array([np.nan if of[arm] is None else float(of[arm]) for arm in picked])
            pulls, means = pull(pulls, means, picked, values)
        yield f"ucb[{i}].final_T", pulls, expected["final_T"]
        yield f"ucb[{i}].final_mean", means, expected["final_mean"]
