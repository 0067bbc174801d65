"""Oracle adapter for the second stage of D4."""

from dsel_trl.functional.d4 import prototype_keep


def evaluate(oracle):
    for i, case in enumerate(oracle["cases"]):
        yield f"cases[{i}].kept", prototype_keep(oracle["dist_to_centroid"], case["R_proto"]), case["kept"]
