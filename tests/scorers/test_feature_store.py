"""Features on disk: numpy reads them, a pass that was killed goes on, and a full disk is told of before."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from dsel_trl.scorers import feature_store
from dsel_trl.scorers.feature_store import FeatureStore

IDS = np.array([3, 1, 4, 15, 9])
ABOUT = {"projection": {"seed": 7, "features": 3}, "of": "abc"}
ROWS = np.arange(15, dtype=np.float32).reshape(5, 3) / 7

KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from tests.scorers.test_feature_store import ABOUT, IDS, ROWS
from dsel_trl.scorers.feature_store import FeatureStore
store = FeatureStore(Path(sys.argv[1]), "less", IDS, 3, ABOUT)
store.write(np.array([0, 2]), ROWS[[0, 2]])
store.rows[1] = 99.0
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_numpy_alone_reads_them(tmp_path):
    store = FeatureStore(tmp_path, "less", IDS, 3, ABOUT, rank=1)
    store.write(store.missing, ROWS)
    index = json.loads((tmp_path / "less-1.json").read_text())
    rows = np.load(tmp_path / "less-1.npy", mmap_mode="r")
    assert index == {"ids": IDS.tolist(), "shape": [5, 3], "dtype": "float16", "about": ABOUT}
    assert rows.dtype == np.float16
    np.testing.assert_allclose(rows, ROWS, rtol=1e-3)
    assert not len(store.missing)


def test_a_pass_that_was_killed_goes_on_where_it_ended(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    store = FeatureStore(tmp_path, "less", IDS, 3, ABOUT)
    # A row that was begun but not finished is written again.
    assert store.missing.tolist() == [1, 3, 4]
    store.write(store.missing, ROWS[store.missing])
    np.testing.assert_allclose(np.load(tmp_path / "less-0.npy"), ROWS, rtol=1e-3)


@pytest.mark.parametrize(
    "change", [{"about": {**ABOUT, "of": "other"}}, {"ids": IDS[:4]}, {"width": 4}, {"dtype": "float32"}]
)
def test_files_of_something_else_are_begun_anew(tmp_path, change):
    FeatureStore(tmp_path, "less", IDS, 3, ABOUT).write(np.arange(5), ROWS)
    other = {"ids": IDS, "width": 3, "about": ABOUT, **change}
    store = FeatureStore(tmp_path, "less", **other)
    assert len(store.missing) == len(other["ids"])
    assert store.rows.shape == (len(other["ids"]), other["width"])


def test_a_broken_file_is_begun_anew(tmp_path):
    FeatureStore(tmp_path, "less", IDS, 3, ABOUT).write(np.arange(5), ROWS)
    (tmp_path / "less-0.npy").write_bytes(b"cut")
    assert len(FeatureStore(tmp_path, "less", IDS, 3, ABOUT).missing) == 5


def test_a_disk_without_room_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"5 examples, 3 numbers each, need 0.00 GB, but .* has 0.00 GB left"):
        FeatureStore(tmp_path / "new", "less", IDS, 3, ABOUT)
    assert not list((tmp_path / "new").iterdir())


def test_what_half_precision_cannot_hold_is_an_error(tmp_path):
    store = FeatureStore(tmp_path, "less", IDS, 3, ABOUT)
    with pytest.raises(ValueError, match="up to 70000 are beyond float16: use float32"):
        store.write(np.array([0]), np.full((1, 3), 7e4))
    assert len(store.missing) == 5
    with pytest.raises(ValueError, match="dtype='int8'"):
        FeatureStore(tmp_path, "less", IDS, 3, ABOUT, dtype="int8")
