"""Oracle adapter for EDGE."""

import numpy as np

from dsel_trl.functional.ranking import bottom_k
from dsel_trl.functional.text.edge import edge_scores, guideline_effect, mean_turn_nll


def evaluate(oracle):
    samples = oracle["samples"]
    turns = [turn for sample in samples for turn in sample["turns"]]
    owner = np.repeat(np.arange(len(samples)), [len(sample["turns"]) for sample in samples])

    def mean_nll(key):
        losses = [np.asarray(turn[key], dtype=np.float64) for turn in turns]
        token_turn = np.repeat(np.arange(len(turns)), [len(row) for row in losses])
        return mean_turn_nll(np.concatenate(losses), token_turn, len(turns))[0]

    without, guided = mean_nll("nll_without_guideline"), mean_nll("nll_with_guideline")
    ids = [sample["id"] for sample in samples]
    for form in ("ratio", "diff"):
        effect = guideline_effect(without, guided, form)
        scores = edge_scores(effect, owner, len(samples))
        for expected in oracle["expected"]:
            row = ids.index(expected["id"])
            per_turn = effect[owner == row]
            listed = expected.get(f"ge_{form}_per_turn")
            if listed is not None:
                # Turns without an action are either left out of the file or undefined in it.
                per_turn = per_turn if len(listed) == len(per_turn) else per_turn[~np.isnan(per_turn)]
                yield f"{row}.ge_{form}_per_turn", per_turn, listed
            if f"ge_{form}" in expected:
                yield f"{row}.ge_{form}", scores[row], expected[f"ge_{form}"]
        if f"selected_lowest_{form}" in oracle:
            lowest = [ids[row] for row in bottom_k(scores, oracle["k"])]
            yield f"selected_lowest_{form}", lowest, oracle[f"selected_lowest_{form}"]
