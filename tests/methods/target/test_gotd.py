"""GOT-D in a run: the target's kind is kept, with each action and beside a set to stay away from."""

import numpy as np
import pytest
from datasets import Dataset

from dsel_trl import SelectionCallback, create_method
from tests import tiny

KINDS = (tiny.WORDS[:20], tiny.WORDS[100:120], tiny.WORDS[200:220])


def rows(kinds, seed):
    """Texts of the words of some kinds, with vectors that say which."""
    rng = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "text": " ".join(rng.choice(KINDS[kind], 12)),
                "vector": (np.eye(4)[kind] + 0.1 * rng.standard_normal(4)).tolist(),
                "domain": "abc"[kind],
            }
            for kind in kinds
        ]
    )


POOL = rows([0, 1, 2] * 8, seed=1)
TARGET = rows([1] * 5, seed=2)


def trained(make_trainer, **parameters):
    trainer = make_trainer("lm", dataset=POOL, max_steps=1)
    given = {"target": TARGET, "embedding": "column:vector", **parameters}
    callback = SelectionCallback(trainer, "gotd", **given)
    trainer.add_callback(callback)
    trainer.train()
    return callback


def test_the_kind_of_the_target_is_kept(make_trainer):
    kept = np.flatnonzero(~trained(make_trainer, keep=1 / 3).ledger.dropped)
    assert (kept % 3 == 1).all()
    assert len(kept) == 8


def test_the_policys_own_vectors_do(make_trainer):
    kept = np.flatnonzero(~trained(make_trainer, keep=1 / 3, embedding="policy").ledger.dropped)
    assert (kept % 3 == 1).mean() > 0.5


def test_a_negative_target_comes_last(make_trainer):
    scores = trained(make_trainer, negative=rows([2] * 5, seed=3), action="curriculum").ledger["gotd"]
    means = [scores[kind::3].mean() for kind in range(3)]
    assert means[1] > means[0] > means[2]


def test_weights_follow_the_scores(make_trainer):
    callback = trained(make_trainer, action="weight", temperature=0.1)
    method = callback.methods.methods[0]
    scores = callback.ledger["gotd"][:3].astype(float)
    np.testing.assert_allclose(method.weights(scores), np.exp(scores / 0.1), rtol=1e-5)


def test_domains_are_tested_first(make_trainer):
    callback = trained(make_trainer, domain_column="domain", domains=1, action="band", low=0.0, high=1.0)
    assert (np.flatnonzero(np.isfinite(callback.ledger["gotd"])) % 3 == 1).all()


def refused(make_trainer, message, **parameters):
    trainer = make_trainer("lm", dataset=POOL, max_steps=1)
    trainer.add_callback(SelectionCallback(trainer, "gotd", **{"target": TARGET, **parameters}))
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_cannot_be_compared(make_trainer, tmp_path):
    bare = TARGET.remove_columns("vector")
    refused(make_trainer, "no column 'vector'", target=bare, embedding="column:vector")
    np.save(tmp_path / "v.npy", np.zeros((24, 4), dtype=np.float32))
    refused(make_trainer, "vectors of the training set, but those of 'target'", embedding=f"file:{tmp_path / 'v.npy'}")
    refused(make_trainer, "domains=3 of the 3", embedding="column:vector", domain_column="domain", domains=3)
    refused(make_trainer, "no column 'none'", embedding="column:vector", domain_column="none")
    with pytest.raises(FileNotFoundError, match=r"no file or folder 'none\.parquet'"):
        trained(make_trainer, negative="none.parquet")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, "target=None"),
        ({"target": TARGET, "negative": 3}, "negative=int '3'"),
        ({"target": TARGET, "metric": "l1"}, "metric='l1'"),
        ({"target": TARGET, "solver": "lp"}, "solver='lp'"),
        ({"target": TARGET, "domains": 1}, "domains=1 is not read"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(ValueError, match=message):
        create_method("gotd", **parameters)
