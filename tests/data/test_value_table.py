import numpy as np
import pytest
from datasets import Dataset

from dsel_trl.data.value_table import read_values, write_values


def test_values_are_read_by_their_rows(tmp_path):
    path = tmp_path / "values.parquet"
    write_values(path, np.array([0.5, -1.0, 2.0]), ["a", "b", "a"])
    np.testing.assert_array_equal(read_values(path, np.array([2, 0])), [2.0, 0.5])
    assert Dataset.from_parquet(str(path), keep_in_memory=True)["group"][:] == ["a", "b", "a"]


def test_what_is_no_such_table_is_told(tmp_path):
    path = tmp_path / "values.parquet"
    with pytest.raises(FileNotFoundError, match="`dsel value` writes one"):
        read_values(path, np.arange(2))
    path.write_text("no parquet")
    with pytest.raises(ValueError, match="no parquet table"):
        read_values(path, np.arange(2))
    Dataset.from_dict({"id": [0, 1], "score": [1.0, 2.0]}).to_parquet(str(path))
    with pytest.raises(ValueError, match="'value'"):
        read_values(path, np.arange(2))
    Dataset.from_dict({"id": [1, 0], "value": [1.0, 2.0]}).to_parquet(str(path))
    with pytest.raises(ValueError, match="does not number the rows"):
        read_values(path, np.arange(2))
    write_values(path, np.arange(2.0))
    with pytest.raises(ValueError, match="holds 2 values, but the dataset has a row 2"):
        read_values(path, np.arange(3))
