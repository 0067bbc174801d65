"""Embeddings of a sentence-transformers model: a tiny one, made on the spot."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from dsel_trl import SelectionCallback
from dsel_trl.data.conversations import joined
from dsel_trl.functional.facility_location import facility_location
from dsel_trl.functional.text.deita import diversity_filter
from dsel_trl.functional.text.semdedup import max_similarity_to_earlier
from tests import tiny
from tests.distributed.launch import launched

pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed (extra `embed`)")


@pytest.fixture(scope="module")
def encoder(model, tmp_path_factory):
    """Folder of a two-layer BERT without a head, behind a mean over its tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.3,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
        AutoTokenizer.from_pretrained(model).save_pretrained(folder / "bert")
        transformer = Transformer(str(folder / "bert"), max_seq_length=24)
        SentenceTransformer(modules=[transformer, Pooling(16, "mean")], device="cpu").save(str(folder / "whole"))
    # As published encoders often are: the head that the architecture knows is not in the checkpoint.
    BertModel.from_pretrained(folder / "bert", add_pooling_layer=False).save_pretrained(folder / "whole")
    return folder / "whole"


@pytest.fixture(scope="module")
def vectors(encoder):
    """Mean token states of each example's text, through the plain model, one at a time."""
    bert = BertModel.from_pretrained(encoder, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    found = []
    with torch.no_grad():
        for row in tiny.completions():
            ids = tokenizer(joined([("", row["prompt"]), ("", row["completion"])]))["input_ids"][:24]
            found.append(bert(torch.tensor([ids])).last_hidden_state[0].mean(dim=0).numpy())
    return np.stack(found)


def kept(make_trainer, name, encoder, **parameters):
    trainer = make_trainer("sft", max_steps=1)
    callback = SelectionCallback(trainer, name, embedding=f"model:{encoder}", **parameters)
    trainer.train()
    return np.flatnonzero(~callback.ledger.dropped).tolist(), callback


def test_semdedup_goes_by_the_sentences(make_trainer, encoder, vectors, tmp_path):
    ids, callback = kept(make_trainer, "semdedup", encoder, keep=0.6, clusters=1)
    assert len(ids) == 24
    found = list((tmp_path / "out" / "selection").glob("embeddings-*.safetensors"))
    assert len(found) == 1
    # One cluster: the order within it is that of the distance to the mean.
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    order = np.argsort(unit @ unit.mean(axis=0), kind="stable")
    similarity = max_similarity_to_earlier(unit[order])
    np.testing.assert_allclose(callback.ledger["semdedup_similarity"][order], similarity, atol=1e-5)


def test_deita_filters_by_the_sentences(make_trainer, encoder, vectors):
    columns = {"complexity_column": "difficulty", "quality_column": "weight"}
    scores = np.array(tiny.completions()["difficulty"]) * np.array(tiny.completions()["weight"])
    ids, _ = kept(make_trainer, "deita", encoder, **columns, keep=0.5, threshold=0.8)
    expected = diversity_filter(scores, vectors, threshold=0.8, size=20)
    assert ids == sorted(expected.tolist())
    assert set(ids) != set(np.argsort(-scores)[:20].tolist())


def test_ifd_covers_the_sentences(make_trainer, encoder, vectors):
    ids, _ = kept(make_trainer, "ifd", encoder, keep=1.0, limit=100.0, diverse=0.25)
    assert ids == sorted(facility_location(vectors, 10).tolist())


def test_the_generators_are_left_alone(make_trainer, encoder):
    """A run that finds the vectors on disk goes on as one that had to load the model."""
    weights = []
    for _ in range(2):
        trainer = make_trainer("sft", max_steps=3, lora=True, lora_dropout=0.3)
        trainer.add_callback(SelectionCallback(trainer, "semdedup", embedding=f"model:{encoder}"))
        trainer.train()
        weights.append(tiny.weights_of(trainer))
    tiny.assert_same_weights(*weights)


def test_a_model_that_cannot_be_loaded_is_named(make_trainer):
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "semdedup", embedding="model:nowhere/at/all")
    with pytest.raises(ValueError, match="embedding='model:nowhere/at/all' cannot be loaded"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_code_that_comes_with_a_model_is_not_run(make_trainer, encoder, tmp_path):
    folder = tmp_path / "foreign"
    folder.mkdir()
    for path in encoder.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    modules = [{"idx": 0, "name": "0", "path": "", "type": "own.Own"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    trainer = make_trainer("sft")
    SelectionCallback(trainer, "semdedup", embedding=f"model:{folder}")
    with pytest.raises(ValueError, match="trust_remote_code"):
        trainer.train()
    assert not (tmp_path / "ran").exists()


def test_two_processes_choose_what_one_chooses(make_trainer, model, encoder, tmp_path):
    method = {"embedding": f"model:{encoder}", "keep": 0.6, "clusters": 3}
    spec = {
        "kind": "sft",
        "methods": [["semdedup", method]],
        "size": 40,
        "world": 2,
        "model": str(model),
        "output_dir": str(tmp_path / "two"),
        "trace": str(tmp_path / "trace"),
        "log": str(tmp_path / "log"),
        "config": {"max_steps": 1, "per_device_train_batch_size": 1},
    }
    ended = launched(tmp_path, [[spec]], timeout=300)
    log = "".join((tmp_path / f"log.{rank}").read_text()[-2000:] for rank in range(2))
    assert ended == [[[0, 0]]], log
    two = torch.load(spec["trace"], weights_only=False).ledger
    _, callback = kept(make_trainer, "semdedup", encoder, keep=0.6, clusters=3)
    for name in ("semdedup", "semdedup_similarity"):
        np.testing.assert_array_equal(two[f"score:{name}"], callback.ledger[name])
