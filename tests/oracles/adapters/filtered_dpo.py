"""Reads the filtered-DPO oracle."""

import numpy as np

from dsel_trl.functional.preference.filtered_dpo import teaches


def evaluate(oracle):
    inputs = oracle["inputs"]
    kept = teaches(inputs["reward_generated"], inputs["reward_chosen"], inputs["threshold"])
    got = {"kept": np.flatnonzero(kept)}
    for name, value in oracle["expected"].items():
        yield name, got[name], value
