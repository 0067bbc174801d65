"""Oracle adapter for InfoBatch; the stored numbers were drawn with numpy's legacy generator."""

import numpy as np

from dsel_trl.core.ledger import Ledger
from dsel_trl.functional.loss.infobatch import (
    INITIAL_SCORE,
    infobatch_epoch,
    infobatch_prune,
    is_pruned_epoch,
    kept_share,
    well_learned,
)


def evaluate(oracle):
    for i, case in enumerate(oracle.get("prune_cases", [])):
        mean, mask = well_learned(case["scores"], as_published=True)
        rng = np.random.RandomState(case["np_random_seed"])
        ids, weights = infobatch_prune(case["scores"], rng, prune_ratio=case["prune_ratio"], as_published=True)
        got = {
            "keep_ratio": kept_share(case["prune_ratio"]),
            "threshold_mean": mean,
            "below_mean_indices": np.flatnonzero(mask),
            "n_kept_below": int(mask[ids].sum()),
            "kept_indices_shuffled": ids,
            "weights": weights,
            "num_pruned": len(mask) - len(ids),
            "unbiasedness_check": {"sum_weights_over_kept": float(weights[ids].sum()), "dataset_size": len(mask)},
        }
        for key, value in got.items():
            if key in case:
                yield f"prune_cases[{i}].{key}", value, case[key]

    for i, entry in enumerate(oracle.get("training_traces", [])):
        yield from evaluate_trace(f"training_traces[{i}]", entry["trace"])


def evaluate_trace(label, trace):
    ledger = Ledger(trace["n"])
    ledger.write("loss", None, np.full(trace["n"], INITIAL_SCORE), step=0)
    # The published code resets its weights only where the pruned epochs end with an epoch.
    resets = float(trace.get("stop_prune", trace["delta"] * trace["num_epochs"])).is_integer()
    weights = np.ones(trace["n"], dtype=np.float32)
    total_pruned = 0
    for epoch in trace["epochs"]:
        rng = np.random.RandomState(epoch["sampler_iterations_counter_at_reset"])
        ids, weights = infobatch_epoch(
            ledger["loss"],
            rng,
            pruned=is_pruned_epoch(epoch["epoch"], trace["num_epochs"], trace["delta"]),
            prune_ratio=trace["prune_ratio"],
            as_published=True,
            stale_weights=None if resets else weights,
        )
        total_pruned += trace["n"] - len(ids)
        where = f"{label}.epochs[{epoch['epoch']}]"
        yield f"{where}.order", ids, epoch["order"]
        yield f"{where}.weights_in_use", weights, epoch["weights_in_use"]
        yield f"{where}.pruned_this_epoch", trace["n"] - len(ids), epoch["pruned_this_epoch"]
        batches = [ids[start : start + trace["batch_size"]] for start in range(0, len(ids), trace["batch_size"])]
        yield f"{where}.batches", len(batches), len(epoch["batches"])
        for batch, expected in zip(batches, epoch["batches"], strict=True):
            losses = np.asarray(expected["raw_losses"], dtype=np.float32)
            yield f"{where}.indices", batch, expected["indices"]
            yield f"{where}.weighted_mean_loss", (weights[batch] * losses).mean(), expected["weighted_mean_loss"]
            ledger.write("loss", batch, losses, step=1)
        yield f"{where}.scores_after", ledger["loss"], epoch["scores_after"]
    if "total_pruned" in trace:
        yield f"{label}.total_pruned", total_pruned, trace["total_pruned"]
