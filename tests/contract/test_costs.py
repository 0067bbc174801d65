"""A method's card says what it costs: the counter of a whole run agrees."""

import pytest

from dsel_trl.core.costs import WORK
from tests.contract.cases import EVERYWHERE


@pytest.mark.parametrize(("name", "kind"), EVERYWHERE)
def test_the_card_says_what_the_run_adds(bench, name, kind):
    selection = bench.whole(name, kind).trainer.selection
    method, run = selection.methods.methods[0], selection.run
    candidates = selection.metrics_window.candidates
    expected = method.expected_cost(run, candidate=candidates)
    counted = {what: selection.costs.counts[what] for what in WORK if what != "prompts"}
    for what, count in counted.items():
        least, most = expected.get(what, (0.0, 0.0))
        assert least <= count <= most, f"{what}: the card says {least:g} to {most:g}, the run counted {count}"
        assert (selection.costs.counts[WORK[what]] > 0) == (count > 0 and what != "rewards"), WORK[what]
    if candidates:
        trained = selection.metrics_window.trained
        # The last candidates of an epoch are too few for a whole batch.
        rest = run.epochs * run.arguments.per_device_train_batch_size * method.candidates
        assert method.candidates * trained - rest <= candidates <= method.candidates * trained
