"""Files that appear complete or not at all."""

import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import dsel_trl
from dsel_trl.data.files import replacing, save_arrays, write_json

PACKAGE = Path(dsel_trl.__file__).parent


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert not path.exists()
        assert temporary.parent == path.parent
    assert path.read_text() == "half"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("kind", ["file", "folder", "nothing"])
def test_what_fails_leaves_nothing_behind(tmp_path, kind):
    path = tmp_path / "file.txt"
    path.write_text("before")

    def write():
        with replacing(path) as temporary:
            if kind == "file":
                temporary.write_text("half")
            elif kind == "folder":
                temporary.mkdir()
                (temporary / "inside").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_is_put_in_place_as_one(tmp_path):
    with replacing(tmp_path / "model") as temporary:
        temporary.mkdir()
        (temporary / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_two_writers_do_not_meet(tmp_path):
    """Each has a temporary file of its own: the last to end is what stays, whole."""
    path, both = tmp_path / "file.txt", threading.Barrier(2)

    def write(letter):
        with replacing(path) as temporary:
            temporary.write_text(letter * 10)
            both.wait(10)
            assert temporary.read_text() == letter * 10

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in ("a" * 10, "b" * 10)
    assert os.listdir(tmp_path) == ["file.txt"]


def test_what_json_cannot_hold_leaves_nothing_behind(tmp_path):
    with pytest.raises(TypeError):
        write_json(tmp_path / "values.json", {"values": object()})
    assert not os.listdir(tmp_path)
    write_json(tmp_path / "values.json", {"values": [1]})
    assert json.loads((tmp_path / "values.json").read_text()) == {"values": [1]}


def test_arrays_come_back_as_they_were(tmp_path):
    save_arrays(tmp_path / "a.safetensors", {"values": np.arange(3.0)[::-1]})
    assert load_file(tmp_path / "a.safetensors")["values"].tolist() == [2.0, 1.0, 0.0]
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_replaced_in_one_place(path):
    if path == PACKAGE / "data" / "files.py":
        return
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"os\.(?:replace|rename)\b|\.tmp\b|(?:partial|temporary)\.(?:rename|replace)\(", text)
