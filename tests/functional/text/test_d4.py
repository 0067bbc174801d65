import numpy as np
import pytest

from dsel_trl.functional.text.d4 import d4_select, prototype_keep


def test_prototypes_by_hand():
    distance = [0.3, 0.9, 0.1, 0.9, 0.5]
    assert prototype_keep(distance, 0.4).tolist() == [1, 3]
    assert prototype_keep(distance, 0.2).tolist() == [1]
    assert prototype_keep(distance, 0.01).tolist() == [1]
    assert prototype_keep(distance, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_unknown_distance_is_not_kept():
    assert prototype_keep([np.nan, 0.1], 1.0).tolist() == [1]


def test_both_stages():
    rng = np.random.default_rng(0)
    distinct = rng.standard_normal((60, 8))
    embeddings = np.concatenate([distinct, distinct[:20] + 1e-4 * rng.standard_normal((20, 8))])
    kept = d4_select(embeddings, dedup_ratio=0.75, proto_ratio=0.5, num_clusters=4)
    assert len(kept) == 30
    assert len(set(kept.tolist())) == 30
    assert sum(i < 20 and i + 60 in set(kept.tolist()) for i in kept.tolist()) == 0
    assert kept.tolist() == d4_select(embeddings, dedup_ratio=0.75, proto_ratio=0.5, num_clusters=4).tolist()


@pytest.mark.parametrize("ratio", [0.0, 1.2])
def test_errors_name_the_value(ratio):
    with pytest.raises(ValueError, match=str(ratio)):
        prototype_keep([0.1], ratio)
