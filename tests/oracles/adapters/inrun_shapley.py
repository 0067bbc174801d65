"""Oracle adapter for in-run data Shapley."""

import torch

from dsel_trl.functional.influence.inrun_shapley import inrun_shapley


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        inputs, expected = case["inputs"], case["expected"]
        total = {}
        for t, (step, wanted) in enumerate(zip(inputs["steps"], expected["steps"], strict=True)):
            eta = step.get("eta", inputs.get("eta"))
            each = torch.tensor(step["per_sample_grads"], dtype=torch.float64)
            products = each @ torch.tensor(step["val_grad_sum"], dtype=torch.float64)
            bent = torch.tensor(step["val_hessian_sum"], dtype=torch.float64) @ each.sum(dim=0)
            second = inrun_shapley(products, eta, each @ bent * eta)
            label = f"cases[{i}].steps[{t}]"
            yield f"{label}.first_order", inrun_shapley(products, eta), wanted["first_order"]
            yield f"{label}.second_order", second, wanted["second_order"]
            for example, value in zip(step["sample_ids"], second.tolist(), strict=True):
                total[str(example)] = total.get(str(example), 0.0) + value
        if "accumulated_second_order_by_sample_id" in expected:
            yield f"cases[{i}].accumulated", total, expected["accumulated_second_order_by_sample_id"]
