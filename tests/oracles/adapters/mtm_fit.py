"""Oracle adapter for the modular-fit test of Data Shapley."""

import numpy as np

from dsel_trl.functional.influence.data_shapley import exact_shapley
from dsel_trl.functional.influence.mtm_fit import (
    isotonic,
    linear_weights,
    modular_fit,
    residual,
    spearman_by_size,
)

from .data_shapley import by_position, worth_of


def evaluate(oracle):
    for i, twins in enumerate(oracle["twin_games"]):
        given, expected = twins["inputs"], twins["expected"]
        for game in (1, 2):
            table = given[f"utility_{game}"]
            yield (
                f"twin_games[{i}].shapley_{game}",
                exact_shapley(by_position(table, given["n"])),
                expected[f"shapley_{game}"],
            )
            for name in ("S1", "S2"):
                yield f"twin_games[{i}].v{game}_{name}", worth_of(table, given[name]), expected[f"v{game}_{name}"]
    for i, case in enumerate(oracle["cases"]):
        given, expected, at = case["inputs"], case["expected"], f"cases[{i}]"
        players, worth = given["n"], np.array(given["utilities"])
        members = np.zeros((len(worth), players), dtype=bool)
        for row, inside in zip(members, given["subsets"], strict=True):
            row[inside] = True
        weights = linear_weights(members, worth, ridge=0.0)
        yield f"{at}.linear_weights", weights, expected["linear_weights"]
        sums = members @ weights
        fitted = sums + (worth - sums).mean()
        yield f"{at}.linear_residual", residual(worth, fitted), expected["linear_residual"]
        curve = isotonic(sums, worth)(sums)
        yield f"{at}.isotonic_fit", curve, expected["isotonic_fit"]
        yield f"{at}.isotonic_residual", residual(worth, curve), expected["isotonic_residual"]
        fit = modular_fit(members, worth, np.zeros(len(worth), dtype=bool), ridge=0.0, iterations=0)
        yield f"{at}.modular_fit", fit.residual, expected["isotonic_residual"]
        by_size = spearman_by_size(members, weights, worth)
        yield (
            f"{at}.spearman_per_size",
            {s: by_size[int(s)] for s in expected["spearman_per_size"]},
            expected["spearman_per_size"],
        )
        table = {",".join(map(str, inside)): value for inside, value in zip(given["subsets"], worth, strict=True)}
        if len(table) == 2**players:
            values = exact_shapley(by_position(table, players))
            yield f"{at}.shapley", values, expected["shapley"]
        else:
            values = np.array(expected["shapley"])
        by_size = spearman_by_size(members, values, worth)
        wanted = expected["spearman_shapley_sum_per_size"]
        yield f"{at}.spearman_shapley_sum_per_size", {s: by_size[int(s)] for s in wanted}, wanted
