"""Oracle adapter for pacing functions, competence and eligibility."""

import numpy as np

from dsel_trl.bases.scored import keep_top
from dsel_trl.functional.pacing import competence, difficulty_cdf, eligible_by_competence, pacing_size


def evaluate(oracle):
    for i, case in enumerate(oracle.get("pacing", [])):
        whole = case["dataset_size_N"]
        at_end = np.asarray(case["steps"]) >= case["final_fraction_a"] * case["total_steps_T"]
        for name, sizes in case["sizes"].items():
            got = pacing_size(
                name,
                case["steps"],
                case["total_steps_T"],
                whole,
                initial_fraction=case["initial_fraction_b"],
                full_at=case["final_fraction_a"],
                exact_end=False,
            )
            # At the end the rounded arithmetic may fall one short, which depends on the mathematical library.
            got, sizes = (np.where(at_end & (np.asarray(part) == whole - 1), whole, part) for part in (got, sizes))
            yield f"pacing[{i}].{name}", got, sizes.tolist()
    for i, case in enumerate(oracle.get("competence", [])):
        got = competence(case["t"], case["T"], initial=case["c0"], power=case["p"])
        yield f"competence[{i}]", got, case["competence"]
    if "difficulty" in oracle:
        difficulty = np.asarray(oracle["difficulty"], dtype=np.float64)
        cdf = difficulty_cdf(difficulty)
        yield "difficulty_cdf", cdf, oracle["difficulty_cdf"]
        for i, case in enumerate(oracle.get("eligibility", [])):
            level = case["competence"]
            got = {
                "eligible_easy_first": eligible_by_competence(cdf, level, at_least_one=False),
                "eligible_by_rank_topk": np.flatnonzero(keep_top(-difficulty, level)),
                "eligible_anti_curriculum": np.flatnonzero(keep_top(difficulty, level)),
            }
            for key, value in got.items():
                if key in case:
                    yield f"eligibility[{i}].{key}", value, case[key]
