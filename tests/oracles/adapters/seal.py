"""Oracle adapter for SEAL: a bigram model trained by torch, the selector by the package."""

import numpy as np
import torch

from dsel_trl.functional.ranking import top_k
from dsel_trl.functional.target.seal import Moments, adam_update, selector_gradient, selector_weights, upper_weight


def losses(model, ids, mask, starts):
    """Mean loss of each sequence's labels under the bigram model."""
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    trained = (mask == 1) & (torch.arange(ids.shape[1]) >= torch.tensor(starts)[:, None])
    logps = (model[0][ids[:, :-1]] @ model[1]).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    return -(logps * trained[:, 1:]).sum(1) / trained[:, 1:].sum(1)


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        given, expected = case["inputs"], case["expected"]
        model = [torch.tensor(given[name], requires_grad=True) for name in ("E", "W")]
        betas, decay = given["adamw_betas"], given["adamw_weight_decay"]
        adam = given["optimizer"] == "adamw"
        optimizer = (
            torch.optim.AdamW(model, lr=given["model_lr"], betas=betas, weight_decay=decay)
            if adam
            else torch.optim.SGD(model, lr=given["model_lr"])
        )
        size = len(given["task_ids"])
        logits, moments = np.full(size, given["init_logit"]), Moments(np.zeros(size), np.zeros(size), 0)
        activation, rate, told = given["activation"], given["selector_lr"], []
        for epoch in range(given["epochs"]):
            upper = upper_weight(given["upper_weight"], given["upper_weight_decay_per_epoch"], epoch)
            for ids in given["micro_batches_of_indices"]:
                safe, task = (
                    losses(model, *([given[f"{name}_{key}"][j] for j in ids] for key in ("ids", "mask", "prompt_len")))
                    for name in ("safe", "task")
                )
                weights = selector_weights(logits, activation)[ids]
                total = upper * safe.mean() + (1 - upper) * (torch.from_numpy(weights) * task).mean()
                optimizer.zero_grad()
                total.backward()
                optimizer.step()
                told += [float(total.detach()), float((weights * task.detach().numpy()).mean())]
                gradient = selector_gradient(logits, ids, task.detach().numpy(), activation)
                if adam:
                    logits, moments = adam_update(logits, gradient, moments, rate, tuple(betas))
                else:
                    logits = logits - rate * gradient
        own = f"cases[{i}]"
        yield f"{own}.losses", told, expected["losses_model_then_selector_per_step"]
        yield f"{own}.logits", logits, expected["final_selector_logits"]
        yield f"{own}.weights", selector_weights(logits, activation), expected["final_weights"]
        yield f"{own}.E", model[0], expected["final_E"]
        yield f"{own}.W", model[1], expected["final_W"]
        for share, chosen in expected["topp_selected"].items():
            yield f"{own}.top[{share}]", np.sort(top_k(logits, int(float(share) * size))), chosen
