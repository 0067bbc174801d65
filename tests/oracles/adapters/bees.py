"""Reads the BeeS oracle: the replication's values, and those of the paper's rule with clamped probabilities."""

import numpy as np

from dsel_trl.functional.preference.bees import (
    EXTERNAL_DIVISOR,
    IMPLICIT_DIVISOR,
    fuse_margins,
    fuse_probabilities,
    margin_probability,
    select_fused,
    unclipped_evidence,
    upper_bound,
)


def evaluate(oracle):
    inputs, expected = oracle["inputs"], oracle["expected"]
    lower, num = inputs["M1"], inputs["num"]
    implicit, external = inputs["implicit_margin"], inputs["external_margin"]
    margins = [implicit, external]
    uppers = [upper_bound(implicit, IMPLICIT_DIVISOR), upper_bound(external, EXTERNAL_DIVISOR)]
    replicated = [
        margin_probability(margin, lower, upper, scale="observed", missing="zero")
        for margin, upper in zip(margins, uppers, strict=True)
    ]
    ours = [
        margin_probability(margin, lower, upper, missing="zero") for margin, upper in zip(margins, uppers, strict=True)
    ]
    fused = {how: fuse_margins(margins, how) for how in ("add", "max", "min")}
    fused["mul"] = fuse_probabilities(replicated, clamp=0.0)
    spec = fuse_probabilities(ours)
    got = {
        "M2_implicit": uppers[0],
        "M2_external": uppers[1],
        "p_implicit": replicated[0],
        "p_external": replicated[1],
        "fused_mul_spec": spec,
        "reference_nan_rows": np.flatnonzero(np.isnan(fused["mul"])),
        **{f"fused_{how}": values for how, values in fused.items()},
    }
    if "third_margin" in inputs:
        third = margin_probability(inputs["third_margin"], lower, inputs["third_M2"], missing="zero")
        got["fused_three_sources"] = fuse_probabilities([*ours, third])
    for name, value in expected.items():
        if name.endswith("_indices_worst_to_best"):
            # The file asks to compare by fused value: the replication orders ties by an unstable sort.
            for how, ids in value.items():
                picked = select_fused(fused[how], num, nan_wins=True)[::-1]
                yield f"{name}.{how}", fused[how][picked], fused[how][ids].tolist()
        elif name.endswith("_mul_spec_best_first"):
            yield name, select_fused(spec, num, unclipped_evidence(margins, lower, uppers)), value
        else:
            yield name, got[name], value
