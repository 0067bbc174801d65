"""Oracle adapter for perplexity bands."""

import numpy as np

from dsel_trl.functional.text.perplexity import perplexity_band
from tests.oracles.ties import first_of_equals


def evaluate(oracle):
    values = oracle["perplexity"]
    for i, case in enumerate(oracle["cases"]):
        for band in ("low", "mid", "high"):
            if band in case:
                ids, expected = perplexity_band(values, case["keep_fraction"], band), case[band]
                if band == "high":
                    # The end of an ascending order and the start of a descending one differ in their ties.
                    ids, expected = (np.sort(first_of_equals(part, values)) for part in (ids, expected))
                yield f"cases[{i}].{band}", ids, list(expected)
                if "k" in case:
                    yield f"cases[{i}].k ({band})", len(ids), case["k"]
