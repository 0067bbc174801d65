"""Oracle adapter for GOT-D."""

from importlib.util import find_spec

import torch

from dsel_trl.functional.ranking import bottom_k, top_k
from dsel_trl.functional.sinkhorn import cost_matrix, exact_transport, potentials, sinkhorn
from dsel_trl.functional.target.gotd import calibrated_gradient


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        given, expected = case["inputs"], case["expected"]
        sets = [torch.tensor(given[name], dtype=torch.float64) for name in ("candidates", "targets")]
        metric, budget = given["metric"], given["budget"]
        yield f"cases[{i}].cost_matrix", cost_matrix(*sets, metric), expected["cost_matrix"]
        # The exact potentials are POT's own: what follows from them is this package's.
        gradient = calibrated_gradient(expected["dual_f_exact_up_to_constant"])
        for key in ("calibrated_gradient", "finite_difference"):
            yield f"cases[{i}].{key}", gradient, expected[key]
        yield f"cases[{i}].negative", bottom_k(gradient, budget), expected["selected_most_negative"]
        yield f"cases[{i}].positive", top_k(gradient, budget), expected["selected_contrast_most_positive"]
        if find_spec("ot"):
            exact = exact_transport(*sets, metric=metric)
            yield (
                f"cases[{i}].exact.calibrated_gradient",
                calibrated_gradient(exact.f),
                expected["calibrated_gradient"],
            )
            yield f"cases[{i}].exact.ot_cost", exact.cost, expected["ot_cost"]
        wanted = expected["sinkhorn"]
        for anneal in (False, True):
            found = sinkhorn(
                *sets, metric=metric, eps=given["sinkhorn_eps"], tolerance=1e-12, max_iterations=20_000, anneal=anneal
            )
            own = f"cases[{i}].sinkhorn[anneal={anneal}]"
            yield f"{own}.f_minus_mean", found.f, wanted["f_minus_mean"]
            yield f"{own}.calibrated", calibrated_gradient(found.f), wanted["calibrated"]
            yield f"{own}.transport_cost", found.cost, wanted["transport_cost"]
            selected = bottom_k(calibrated_gradient(found.f), budget)
            yield f"{own}.selected_most_negative", selected, wanted["selected_most_negative"]
            later, _ = potentials(*sets, torch.from_numpy(found.g), metric=metric, eps=given["sinkhorn_eps"])
            yield f"{own}.potentials", later.numpy(), found.f.tolist()
