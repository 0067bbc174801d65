"""Oracle adapter for length-grouped order."""

from dsel_trl.functional.order.length_grouped import length_grouped_order, mega_batch_multiplier


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        given = case.get("mega_batch_mult")
        if "effective_mult" in case:
            multiplier = mega_batch_multiplier(len(case["lengths"]), case["batch_size"]) if given is None else given
            yield f"cases[{i}].effective_mult", multiplier, case["effective_mult"]
        got = length_grouped_order(case["lengths"], case["batch_size"], case["randperm"], given)
        yield f"cases[{i}].indices", got, case["indices"]
