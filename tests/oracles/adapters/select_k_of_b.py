"""Reads the select-k-of-B oracle."""

from dsel_trl.functional.loss.select_k_of_b import at_or_above
from dsel_trl.functional.ranking import bottom_k, gumbel_top_k, softmax_weights, threshold, top_k


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    scores, k, temperature = inputs["scores"], inputs["k"], inputs["temperature"]
    got = {
        "top_k": top_k(scores, k),
        "bottom_k": bottom_k(scores, k),
        "gumbel_top_k": gumbel_top_k(scores, k, temperature, noise=inputs["gumbel_noise"]),
        "softmax_weights": softmax_weights(scores, temperature),
        "softmax_weights_mean_one": softmax_weights(scores, temperature, normalize="mean1"),
        "quantile_threshold": threshold(scores, inputs["quantile"]),
        "kept_at_or_above_threshold": at_or_above(scores, inputs["quantile"]),
    }
    for name, value in expected.items():
        yield name, got[name], value
