"""Reads the filtered-DPO oracle."""

import numpy as np

from dsel_trl.functional.filtered_dpo import teaches


def evaluate(oracle):
    inputs = oracle["inputs"]
    kept = teaches(inputs["reward_generated"], inputs["reward_chosen"], inputs["threshold"])
    yield "kept", np.flatnonzero(kept), oracle["expected"]["kept"]
