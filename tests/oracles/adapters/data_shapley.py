"""Oracle adapter for Data Shapley: exact, by permutations, and truncated."""

import itertools

from dsel_trl.functional.influence.data_shapley import exact_shapley, marginals, mean_marginals, subsets


def worth_of(table, members):
    return table[",".join(map(str, sorted(members)))]


def by_position(table, players):
    """Worth of all sets in the order of `exact_shapley`."""
    return [worth_of(table, row.nonzero()[0].tolist()) for row in subsets(players)]


def estimate(table, orders, tolerance=None, patience=1):
    empty, full = worth_of(table, ()), worth_of(table, range(len(orders[0])))
    found = [
        marginals(
            order,
            (worth_of(table, order[: i + 1]) for i in range(len(order))),
            empty,
            full,
            tolerance=tolerance,
            patience=patience,
        )
        for order in orders
    ]
    return mean_marginals([row for row, _ in found]), sum(count for _, count in found)


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        given, expected, at = case["inputs"], case["expected"], f"cases[{i}]"
        table, players = given["utility_table"], given["n"]
        worth = by_position(table, players)
        values = exact_shapley(worth)
        yield f"{at}.shapley", values, expected["shapley"]
        yield f"{at}.efficiency_sum", float(values.sum()), expected["efficiency_sum"]
        yield f"{at}.v_full_minus_v_empty", worth[-1] - worth[0], expected["v_full_minus_v_empty"]
        mean, count = estimate(table, given["permutations"])
        yield f"{at}.permutation_estimate", mean, expected["permutation_estimate"]
        yield f"{at}.permutation_evaluations", count, expected["permutation_evaluations"]
        mean, count = estimate(
            table, given["permutations"], given["truncation_tolerance"], given["truncation_patience"]
        )
        yield f"{at}.tmc_estimate", mean, expected["tmc_estimate"]
        yield f"{at}.tmc_evaluations", count, expected["tmc_evaluations"]
        # Equal values may differ in their last bit: the lower number goes first.
        rounded = values.round(10)
        for size, wanted in expected["shapley_topk"].items():
            kept = sorted(sorted(range(players), key=lambda p, v=rounded: (-v[p], p))[: int(size)])
            yield f"{at}.shapley_topk.{size}", kept, wanted
            sets = itertools.combinations(range(players), int(size))
            best = max(sets, key=lambda members, t=table: round(worth_of(t, members), 10))
            yield f"{at}.best_subset.{size}", list(best), expected["best_subset"][size]
            optimal = abs(worth_of(table, kept) - worth_of(table, best)) < 1e-9
            yield f"{at}.topk_is_optimal.{size}", optimal, expected["topk_is_optimal"][size]
