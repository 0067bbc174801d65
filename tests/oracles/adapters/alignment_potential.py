"""Reads the alignment-potential oracle."""

import numpy as np
import torch

from dsel_trl.functional.margins import average_logps, implicit_margin, simpo_margin
from dsel_trl.functional.preference.alignment_potential import alignment_potential, reward_spread
from dsel_trl.functional.ranking import keep_count, selectable, top_k, zscore


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]

    def column(name):
        return torch.tensor(inputs[name], dtype=torch.float64)

    explicit = reward_spread(inputs["all_rm_scores"])
    averages = [average_logps(column(f"{side}_logp_sum"), column(f"{side}_len")) for side in ("chosen", "rejected")]
    dpo = implicit_margin(
        *(column(f"{name}_logp_sum") for name in ("chosen", "rejected", "ref_chosen", "ref_rejected")),
        beta=inputs["beta_dpo"],
    ).numpy()
    implicit = np.abs(simpo_margin(*averages, beta=1.0).numpy())
    weight = inputs["logp_weight"]
    scores = {
        "rm_margin": zscore(explicit),
        "logp_margin_norm_abs": -zscore(implicit),
        "rm-logp": alignment_potential(explicit, implicit),
        "rm-xlogp": alignment_potential(explicit, implicit, weight=weight),
    }
    k = keep_count(inputs["select_ratio"], int(selectable(scores["rm-logp"]).sum()))
    got = {
        "rm_margin": explicit,
        "logp_margin_norm_abs": implicit,
        "z_rm": zscore(explicit),
        "z_logp": zscore(implicit),
        "score_rm_logp": scores["rm-logp"],
        "k": k,
        "selected_indices_worst_to_best": {name: top_k(score, k)[::-1] for name, score in scores.items()},
        "raw_M_AP_dpo": alignment_potential(explicit, dpo, normalize="none"),
        "raw_M_AP_simpo": alignment_potential(
            explicit, simpo_margin(*averages, beta=inputs["beta_simpo"]).numpy(), normalize="none"
        ),
    }
    for name, value in expected.items():
        yield name, got[name], value
