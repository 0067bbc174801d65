"""Oracle adapter for the survey's comparison measures."""

import re

from dsel_trl.functional.evidence import (
    dense_rank,
    efficiency,
    feasibility_ranks,
    flexibility_penalty,
    improvement_ratio,
    simplicity_penalty,
)


def evaluate(oracle):
    for i, case in enumerate(oracle.get("pir_cases", [])):
        out = case["out"]
        try:
            got = improvement_ratio(case["SEM"], case["BLM"], case["type"])
        except ValueError:
            # The page gives a message there, or no number where it divides by nothing.
            yield f"pir_cases[{i}] is refused", True, out.get("result") is None
        else:
            yield f"pir_cases[{i}]", got, out.get("result", "a refusal")

    points = oracle.get("efficiency_ranked_best_first", [])
    if points:
        residual = efficiency([point["sdf"] for point in points], [point["pir"] for point in points])
        ranks = dense_rank(residual, descending=True)
        for point, height, rank in zip(points, residual, ranks, strict=True):
            yield f"efficiency.{point['method']}.rank", rank, point["rank"]
            if "residual_above_baseline" in point:
                yield f"efficiency.{point['method']}.residual", height, point["residual_above_baseline"]

    methods = oracle.get("feasibility_ranked_best_first", [])
    if methods:
        yield from evaluate_feasibility(methods)


def evaluate_feasibility(methods):
    simplicity = [
        simplicity_penalty(
            float(re.sub(r"[^0-9.]", "", row["llmCount"])),
            float(re.match(r"\d*", row["steps"]).group() or 0),
            row["rep"],
            # The survey counts the small model of this one method, and of no other, at a lower price.
            model_weight=1.5 if row["method"] == "Superfiltering" else 2.0,
        )
        for row in methods
    ]
    flexibility = [flexibility_penalty(row["modelFree"], row["datasetFree"], row["chatGPTFree"]) for row in methods]
    simple, flexible, feasible = feasibility_ranks(simplicity, flexibility)
    order = sorted(range(len(methods)), key=lambda i: (feasible[i], simple[i], flexible[i]))
    yield "feasibility.order", order, list(range(len(methods)))
    for i, row in enumerate(methods):
        got = {
            "simplicity_penalty": simplicity[i],
            "flexibility_penalty": flexibility[i],
            "simplicity_rank": simple[i],
            "flexibility_rank": flexible[i],
            "feasibility_rank": feasible[i],
        }
        for key, value in got.items():
            if key in row:
                yield f"feasibility.{row['method']}.{key}", value, row[key]
