"""Pairs that are equal after truncation, against the trainer's own collator."""

import numpy as np
import pytest
from datasets import Dataset
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dsel_trl.data.identical import identical_pairs

PAIRS = [
    ([1, 2], [3, 4], [3, 4]),
    ([1, 2], [3, 4, 5], [3, 4, 6]),
    ([1, 2], [3, 4, 5, 6], [3, 4, 5, 7]),
    ([1], [3, 4, 5], [9, 4, 5]),
    ([1, 2, 3, 4], [5, 6], [5, 7]),
    ([1, 2], [3], [3, 3]),
    ([], [3, 4, 5, 6, 7], [3, 4, 5, 6, 8]),
    ([1], [8, 3, 4, 5, 6, 7], [9, 3, 4, 5, 6, 7]),
    ([1], [5, 6, 7, 8], [4, 5, 6, 7, 8]),
    ([1, 2], [3, 4, 9, 5], [3, 4, 8, 5]),
]


def expected(pair, max_length, mode):
    """Whether the two sequences, with what of them is trained, are equal as the trainer collates them."""
    row = dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), pair, strict=True))
    batch = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=mode)([row])
    return all((batch[name][0] == batch[name][1]).all() for name in ("input_ids", "attention_mask", "completion_mask"))


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [None, 1, 2, 3, 4, 5, 6, 7])
def test_as_the_trainer_collates_them(mode, max_length):
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict({name: [pair[i] for pair in PAIRS] for i, name in enumerate(names)})
    found = identical_pairs(dataset, ("chosen", "rejected"), True, max_length, mode == "keep_end")
    assert found.tolist() == [expected(pair, max_length, mode) for pair in PAIRS]
    # In any order of the rows, as a view has it.
    order = np.random.default_rng(0).permutation(len(PAIRS))
    view = identical_pairs(dataset.select(order), ("chosen", "rejected"), True, max_length, mode == "keep_end")
    assert view.tolist() == found[order].tolist()


def test_random_pairs_agree_with_the_collator():
    rng = np.random.default_rng(1)
    pairs = [tuple(rng.integers(1, 3, rng.integers(1, 6)).tolist() for _ in range(3)) for _ in range(300)]
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    dataset = Dataset.from_dict({name: [pair[i] for pair in pairs] for i, name in enumerate(names)})
    for mode in ("keep_start", "keep_end"):
        found = identical_pairs(dataset, ("chosen", "rejected"), True, 5, mode == "keep_end")
        assert found.tolist() == [expected(pair, 5, mode) for pair in pairs]
        assert 0 < found.sum() < 300
