"""Reading data from files, folders and saved datasets, and the errors for what cannot be read."""

import json

import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dsel_trl.data.columns import ROW_NUMBER
from dsel_trl.data.loading import check_rows, load_splits, number_rows, take_split
from dsel_trl.trainer.kinds import KINDS

ROWS = {"prompt": ["a", "b", "c"], "chosen": ["x", "y", "z"], "rejected": ["u", "v", "w"]}

PAIRS = KINDS["dpo"].columns


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def rows():
    return Dataset.from_dict(ROWS)


@pytest.mark.parametrize("ending", ["parquet", "jsonl", "json", "csv", "jsonl.gz"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files(rows, tmp_path, ending, streaming):
    path = tmp_path / f"pairs.{ending}"
    if ending == "parquet":
        rows.to_parquet(path)
    elif ending == "csv":
        rows.to_csv(path)
    elif ending == "json":
        path.write_text(json.dumps(rows.to_list()))
    else:
        rows.to_json(path, compression="gzip" if ending.endswith("gz") else None)
    splits = load_splits(str(path), streaming=streaming)
    assert list(splits) == ["train"]
    assert isinstance(splits["train"], IterableDataset if streaming else Dataset)
    assert list(splits["train"]) == rows.to_list()


def test_folder_named_after_its_splits(rows, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    rows.to_parquet(folder / "pairs_train.parquet")
    rows.select([0]).to_parquet(folder / "pairs_test.parquet")
    rows.select([0, 1]).to_parquet(folder / "pairs_validation.parquet")
    splits = load_splits(str(folder))
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "test": 1, "validation": 2}


@pytest.mark.parametrize("streaming", [False, True])
def test_saved_datasets(rows, tmp_path, streaming):
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
    assert list(load_splits(str(tmp_path / "one"), streaming=streaming)["train"]) == rows.to_list()
    both = load_splits(str(tmp_path / "two"), streaming=streaming)
    assert list(both["test"]) == [rows[1]]


@pytest.mark.parametrize("kind", ["dpo", "sft", "kto", "reward"])
@pytest.mark.parametrize("streaming", [False, True])
def test_demo(kind, streaming):
    splits = load_splits("demo", demo=KINDS[kind].demo, streaming=streaming)
    first = next(iter(splits["train"]))
    assert ("rejected" in first) == (kind in ("dpo", "reward"))
    check_rows(splits["train"], "demo", KINDS[kind].columns, "dsel")


@pytest.mark.parametrize(
    "name", ["nowhere.parquet", "./nowhere", "/no/where/at/all", "~/nowhere/data.jsonl", "some/folder/deep"]
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("dsel_trl.data.loading.load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        load_splits(name)


def test_a_hub_dataset_that_cannot_be_had_is_named(monkeypatch):
    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach it")

    monkeypatch.setattr("dsel_trl.data.loading.load_dataset", unreachable)
    with pytest.raises(FileNotFoundError, match="'someone/pairs' is no file or folder here"):
        load_splits("someone/pairs")


def test_unreadable_things_are_named(tmp_path):
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 this is no parquet")
    with pytest.raises(ValueError, match=r"broken\.parquet' cannot be read"):
        load_splits(str(tmp_path / "broken.parquet"))
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt' is none of \.parquet"):
        load_splits(str(tmp_path / "notes.txt"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.parquet"):
        load_splits(str(tmp_path / "empty"))


def test_a_missing_split_lists_those_there_are(rows):
    with pytest.raises(ValueError, match=r"no split 'tset'.*\['test', 'train'\].*--dataset_test_split"):
        take_split(DatasetDict(train=rows, test=rows), "tset", "pairs", "dataset_test_split")


def test_wrong_columns_and_empty_rows(rows):
    with pytest.raises(ValueError, match="needs the columns 'chosen' and 'rejected', but the columns of 'pairs'"):
        check_rows(rows.rename_column("chosen", "winner"), "pairs", PAIRS, "dsel dpo")
    with pytest.raises(
        ValueError, match="'messages', or 'prompt' and 'completion', or 'input_ids', or 'conversations', or 'body'"
    ):
        check_rows(rows, "pairs", (*KINDS["sft"].columns, ("body",)), "dsel sft")
    with pytest.raises(ValueError, match="no rows"):
        check_rows(rows.select([]), "pairs", PAIRS, "dsel dpo")
    holes = Dataset.from_dict({**ROWS, "rejected": ["u", None, None]})
    with pytest.raises(ValueError, match="'rejected' of 'pairs' is empty in 2 rows, first in row 1"):
        check_rows(holes, "pairs", PAIRS, "dsel dpo")
    check_rows(rows, "pairs", PAIRS, "dsel dpo")
    check_rows(rows.rename_columns({"chosen": "completion"}), "pairs", KINDS["sft"].columns, "dsel sft")


def test_rows_are_numbered_whatever_columns_they_have(rows):
    own = rows.add_column("example_id", ["p", None, "r"]).select([2, 0, 1])
    numbered = number_rows(own)
    assert numbered[ROW_NUMBER][:] == [0, 1, 2]
    assert numbered["example_id"][:] == ["r", "p", None]
    stream = rows.to_iterable_dataset()
    assert number_rows(stream) is stream
