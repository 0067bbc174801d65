"""Plain relevance in a run: what is like the target is kept, whatever it is like by."""

import numpy as np
from datasets import Dataset

from dsel_trl import SelectionCallback


def rows(kinds):
    words = ("w1 w2 w3", "w7 w8 w9")
    return Dataset.from_list([{"text": words[k], "vector": np.eye(3)[k].tolist()} for k in kinds])


def kept(make_trainer, name, **parameters):
    trainer = make_trainer("lm", dataset=rows([0, 1] * 6), max_steps=1)
    callback = SelectionCallback(trainer, name, target=rows([1, 1]), keep=0.5, **parameters)
    trainer.add_callback(callback)
    trainer.train()
    return np.flatnonzero(~callback.ledger.dropped).tolist()


def test_by_words(make_trainer):
    assert kept(make_trainer, "jsd_relevance") == [1, 3, 5, 7, 9, 11]


def test_by_embeddings(make_trainer):
    assert kept(make_trainer, "cosine_relevance", embedding="column:vector") == [1, 3, 5, 7, 9, 11]
