"""Reads the GREATS oracle: products of a linear layer's gradients, and the greedy choice."""

import torch

from dsel_trl.functional.ghost import Outer, cut, gram
from dsel_trl.functional.influence.greats import greedy_selection, step_terms


def evaluate(oracle):
    for index, case in enumerate(oracle["cases"]):
        inputs, expected = case["inputs"], case["expected"]
        if "scores" in inputs:
            scores, interaction = (torch.tensor(inputs[name]) for name in ("scores", "interaction"))
            chosen = greedy_selection(scores, interaction, inputs["k"])
            yield f"case {index}: selected_in_order", chosen, expected["selected_in_order"]
            continue
        n, k = inputs["n_train"], inputs["k"]
        rows = Outer(*(torch.tensor(inputs[name]) for name in ("activations", "output_grads")))
        train, validation = cut(rows, 0, n), cut(rows, n, n + inputs["n_val"])
        products, interaction = gram(train, validation), gram(train, train)
        scores = products.mean(dim=1)
        terms = step_terms(scores, interaction, inputs["lr"])
        got = {
            "dot_train_val": products,
            "score_mean_over_val": scores,
            "interaction": interaction,
            "selected_in_order": greedy_selection(*terms, k),
            "top_k_without_interaction": greedy_selection(terms[0], torch.zeros_like(interaction), k),
        }
        for name, value in expected.items():
            yield f"case {index}: {name}", got[name], value
