"""Reads the Adapt-infinity oracle: the authors' entropies, budgets and samples, and the corrected ones."""

import numpy as np
import torch

from dsel_trl.functional.influence.adapt_inf import (
    coverage_sample,
    directional_derivative,
    distribution_entropy,
    most_entropic,
    outlier_bounds,
    similarity_in_clusters,
    without_duplicates,
)
from dsel_trl.functional.influence.el2n import token_el2n, token_mean
from dsel_trl.functional.preference.wpo import log_sum_squared_probs, target_logps, token_entropy
from dsel_trl.functional.quotas import water_fill
from dsel_trl.functional.text.perplexity import perplexity


def evaluate(oracle):
    for index, item in enumerate(oracle["selection"]):
        yield from selection(f"selection {index}", item["inputs"], item["expected"])
    for index, item in enumerate(oracle["sequence_scores"]):
        yield from sequence(f"sequence {index}", item["inputs"], item["expected"])
    for index, item in enumerate(oracle["zero_order"]):
        yield from zero_order(f"zero order {index}", item["inputs"], item["expected"])


def selection(label, inputs, expected):
    labels = np.array(inputs["labels"])
    groups = [np.flatnonzero(labels == cluster) for cluster in range(labels.max() + 1)]
    scores = {name: np.array(values) for name, values in inputs["scores"].items()}
    chosen, entropies = most_entropic(scores, labels, len(groups), "repo")
    yield f"{label}: entropies", entropies, expected["entropy_bits"]
    yield f"{label}: scorer", chosen, expected["chosen_scorer"]
    for name, values in scores.items():
        got = [distribution_entropy(values[group]) for group in groups]
        yield f"{label}: scale-free {name}", got, expected["entropy_bits_scale_free"][name]
    budgets = water_fill([len(group) for group in groups], inputs["total_budget"], trim=False)
    yield f"{label}: budgets", budgets, expected["cluster_budgets"]
    strict = []
    for group, name, budget, wanted in zip(groups, chosen, budgets.tolist(), expected["ccs"], strict=True):
        values = np.nan_to_num(scores[name][group])
        low, high = outlier_bounds(values)
        picked = coverage_sample(values, budget, bins=inputs["n_bins_ccs"], strict=False)
        got = {"cluster": wanted["cluster"], "low": low, "high": high}
        yield f"{label}: ccs", {**got, "selected_local": picked, "n_selected": len(picked)}, wanted
        strict.append(coverage_sample(values, budget, bins=inputs["n_bins_ccs"]))
    yield f"{label}: strict", strict, expected["ccs_strict"]
    similarity = similarity_in_clusters(np.array(inputs["embeddings"]), labels)
    in_order = similarity[np.concatenate(groups)]
    yield f"{label}: similarity", in_order, expected["dedup_max_sim_in_cluster_order"]
    keep = inputs["dedup_keep"]
    shares = water_fill([len(group) for group in groups], keep, trim=False)
    yield f"{label}: shares", shares, expected["dedup_cluster_budgets"]
    kept = without_duplicates(similarity, labels, keep, trim=False)
    yield f"{label}: kept", kept, expected["dedup_kept_sorted"]


def sequence(label, inputs, expected):
    logits = torch.tensor(inputs["shift_logits"], dtype=torch.float64)[None]
    labels = torch.tensor(inputs["shift_labels"])[None]
    mask, everywhere = labels != -100, torch.ones_like(labels)
    logps = target_logps(logits, labels.clamp(min=0))
    got = {
        "ppl_repo_mean_of_token_exp": token_mean(torch.exp(-logps), mask)[0],
        "ppl_standard_exp_of_mean": perplexity(token_mean(-logps, mask))[0],
        "el2n_mean_l2": token_mean(token_el2n(logps, log_sum_squared_probs(logits)), mask)[0],
        "entropy_all_positions": token_mean(token_entropy(logits), everywhere)[0],
    }
    for name, value in expected.items():
        yield f"{label}: {name}", got[name], value


def zero_order(label, inputs, expected):
    state = {name: torch.tensor(values, dtype=torch.float64) for name, values in inputs["state"].items()}
    x, y = (torch.tensor(inputs[name], dtype=torch.float64) for name in ("x", "y"))

    def loss(layer, z, step):
        moved, start = dict(state), 0
        for name in (f"l{layer}.weight", f"l{layer}.bias"):
            size = state[name].numel()
            moved[name] = state[name] + step * z[start : start + size].view_as(state[name])
            start += size
        hidden = torch.tanh(x @ moved["l0.weight"].T + moved["l0.bias"])
        return float(((hidden @ moved["l1.weight"].T + moved["l1.bias"] - y) ** 2).mean())

    for layer, wanted in expected.items():
        z = torch.tensor(wanted["direction_z"], dtype=torch.float64)
        got = float(directional_derivative(lambda step, layer=layer, z=z: loss(layer, z, step), inputs["zo_eps"]))
        yield f"{label}: layer {layer}", got, wanted["projected_grad"]
        yield f"{label}: vector of layer {layer}", got * z, wanted["zo_vector"]
