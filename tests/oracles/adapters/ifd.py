"""Oracle adapter for IFD, in the forms of Superfiltering (perplexities) and Cherry (losses)."""

import math

import numpy as np

from dsel_trl.functional.ranking import top_k
from dsel_trl.functional.text.ifd import drop_misled, ifd_from_perplexities, ifd_loss_ratio
from tests.oracles.ties import first_of_equals


def column(rows, key, index):
    """An empty row stands for an example without an answer; its values are unknown."""
    return [row[key][index] if row.get(key) else math.nan for row in rows]


def evaluate(oracle):
    rows = oracle["rows"]
    # Columns of a row: question alone, answer alone, question in context, answer in context. Failed forwards are 0.
    ifd = ifd_from_perplexities(column(rows, "ppl", 3), column(rows, "ppl", 1), failed=0.0)
    yield "ifd_ppl", ifd, oracle["ifd_ppl"]
    for i, case in enumerate(oracle.get("superfiltering_selected_desc", [])):
        got = top_k(drop_misled(ifd, oracle.get("filter_threshold", 1.0)), case["k"])
        yield f"superfiltering_selected_desc[{i}]", got, case["selected"]
    ratio = ifd_loss_ratio(column(rows, "loss", 3), column(rows, "loss", 1))
    if "ifd_loss_ratio" in oracle:
        yield "ifd_loss_ratio", ratio, oracle["ifd_loss_ratio"]
    for key, selected in oracle.get("cherry_selected_sorted_by_index", {}).items():
        # The published script sorts pairs of ratio and id and takes the end: its ties go to the higher id.
        got = top_k(drop_misled(ratio, at_threshold=True), int(key.removeprefix("k=")))
        got, selected = (np.sort(first_of_equals(ids, ratio)).tolist() for ids in (got, selected))
        yield f"cherry.{key}", got, selected
