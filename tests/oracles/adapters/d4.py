"""Oracle adapter for the second stage of D4."""

import numpy as np

from dsel_trl.functional.text.d4 import prototype_keep
from tests.oracles.ties import first_of_equals


def evaluate(oracle):
    distance = oracle["dist_to_centroid"]
    for i, case in enumerate(oracle["cases"]):
        kept, expected = (
            np.sort(first_of_equals(ids, distance)).tolist()
            for ids in (prototype_keep(distance, case["R_proto"]), case["kept"])
        )
        yield f"cases[{i}].kept", kept, expected
