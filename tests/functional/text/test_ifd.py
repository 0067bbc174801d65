import math

import numpy as np
import pytest

from dsel_trl.functional.ranking import top_k
from dsel_trl.functional.text.ifd import drop_misled, ifd_from_perplexities, ifd_loss_ratio, pre_experienced_ids

CONDITIONED = np.array([1.0, 2.0, 3.0, np.nan, 0.5])
DIRECT = np.array([2.0, 2.0, 2.0, 1.0, 0.0])


def test_loss_ratio_by_hand():
    np.testing.assert_allclose(ifd_loss_ratio(CONDITIONED, DIRECT), [0.5, 1.0, 1.5, np.nan, np.nan])


def test_loss_ratio_does_not_depend_on_the_unit():
    np.testing.assert_allclose(
        ifd_loss_ratio(CONDITIONED / math.log(2), DIRECT / math.log(2)), ifd_loss_ratio(CONDITIONED, DIRECT)
    )


def test_perplexity_ratio_by_hand():
    expected = [math.exp(-1), 1.0, math.exp(1), np.nan, math.exp(0.5)]
    np.testing.assert_allclose(ifd_from_perplexities(np.exp(CONDITIONED), np.exp(DIRECT)), expected)


def test_an_instruction_that_changes_nothing_gives_one():
    losses = np.array([0.3, 5.0])
    assert ifd_loss_ratio(losses, losses).tolist() == [1, 1]
    assert ifd_from_perplexities(np.exp(losses), np.exp(losses)).tolist() == [1, 1]


def test_failed_forward():
    assert math.isnan(ifd_from_perplexities([0.0], [0.0])[0])
    assert ifd_from_perplexities([0.0], [0.0], failed=0.0).tolist() == [0.0]
    assert np.isnan(ifd_from_perplexities([2.0, math.inf, math.inf], [math.inf, 2.0, math.inf])).all()


def test_selection_and_thresholds():
    ifd = np.array([0.2, 1.0, 0.9, np.nan, 1.2, 0.9])
    dropped = -math.inf
    assert drop_misled(ifd).tolist() == [0.2, dropped, 0.9, dropped, dropped, 0.9]
    assert drop_misled(ifd, at_threshold=True).tolist() == [0.2, 1.0, 0.9, dropped, dropped, 0.9]
    assert drop_misled(ifd, 0.5).tolist() == [0.2, *[dropped] * 5]
    assert top_k(drop_misled(ifd), 10).tolist() == [2, 5, 0]
    assert top_k(drop_misled([np.nan, 2.0]), 1).tolist() == []


def test_pre_experienced_covers_every_cluster():
    perplexity = np.arange(30.0)
    labels = np.repeat([0, 1, 2], 10)
    ids = pre_experienced_ids(perplexity, labels, per_cluster=4, low=0, high=100)
    assert ids.tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert pre_experienced_ids(perplexity, labels, per_cluster=10).tolist() == [
        i for i in range(30) if i % 10 not in (0, 9)
    ]
    assert pre_experienced_ids([np.nan], [0]).tolist() == []


def test_a_cluster_with_fewer_members_than_wanted_gives_all():
    assert pre_experienced_ids([5.0, 1.0, 9.0, np.nan], [0, 0, 0, 0], per_cluster=4).tolist() == [0, 1, 2]


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"\(2,\) and \(1,\)"):
        ifd_loss_ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="per_cluster"):
        pre_experienced_ids([1.0], [0], per_cluster=0)
    with pytest.raises(ValueError, match="low=5"):
        pre_experienced_ids([1.0], [0], low=5, high=5)
