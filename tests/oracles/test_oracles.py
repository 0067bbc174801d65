"""Checks every oracle file of a folder against the public functions of `dsel_trl`.

An oracle file `<name>.<split>.json` holds inputs and expected outputs. The adapter `adapters/<name>.py` reads the
inputs, calls the package and yields `(label, got, expected)` triples; this runner compares them with the tolerance of
the file. `DSEL_ORACLES` names another folder with files of the same format.
"""

import importlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
FOLDER = Path(os.environ.get("DSEL_ORACLES", HERE / "files"))
ADAPTERS = {path.stem for path in (HERE / "adapters").glob("*.py")} - {"__init__"}
FILES = sorted(FOLDER.glob("*.json"))
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def decode(value):
    """JSON has no NaN: the files write non-finite numbers as strings."""
    if isinstance(value, dict):
        return {key: decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [decode(item) for item in value]
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def assert_same(label, got, expected, rtol, atol):
    """
    Recursive comparison: containers by structure, numbers within tolerance, the rest exactly.

    NaN equals NaN and null: some files write a number that is not defined as null.
    """
    if hasattr(got, "detach"):
        got = got.detach().cpu().numpy()
    if isinstance(got, np.ndarray | np.generic):
        got = got.tolist()
    if expected is None and isinstance(got, float):
        expected = math.nan
    if isinstance(expected, dict):
        assert set(got) == set(expected), f"{label}: keys {sorted(got)} != {sorted(expected)}"
        for key in expected:
            assert_same(f"{label}.{key}", got[key], expected[key], rtol, atol)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), f"{label}: {len(got)} items, expected {len(expected)}"
        for index, item in enumerate(expected):
            assert_same(f"{label}[{index}]", got[index], item, rtol, atol)
    elif isinstance(expected, float | int) and not isinstance(expected, bool):
        # A list would be broadcast against the number, and counts and positions have no tolerance.
        assert isinstance(got, float | int), f"{label}: got {got!r}, expected {expected}"
        exact = isinstance(got, int) and isinstance(expected, int)
        tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": rtol, "atol": atol}
        np.testing.assert_allclose(got, expected, **tolerance, equal_nan=True, err_msg=label)
    else:
        assert got == expected, f"{label}: {got!r} != {expected!r}"


@pytest.mark.parametrize(
    ("got", "expected"),
    [
        (1.0, 1.0001),
        (math.nan, 0.0),
        (math.inf, -math.inf),
        (None, 0.0),
        (0.0, None),
        ([1.0, 1.0], 1.0),
        ([1.0], [1.0, 1.0]),
        (1_000_001, 1_000_002),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": [{"b": np.array([1.0, math.nan])}]}, {"a": [{"b": [1.0, 2.0]}]}),
        ("x", "y"),
        (True, False),
    ],
)
def test_a_wrong_value_fails(got, expected):
    with pytest.raises(AssertionError):
        assert_same("value", got, expected, 1e-5, 1e-6)


def test_equal_values_pass():
    got = {"a": np.array([1.0, math.nan, -math.inf]), "b": (np.int64(3), None, True), "c": []}
    expected = decode(json.loads('{"a": [1.000001, "NaN", "-Infinity"], "b": [3.0, null, true], "c": []}'))
    assert_same("value", got, expected, 1e-5, 1e-6)


def test_the_folder_has_oracles():
    assert FILES, f"no oracle files in {FOLDER}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_oracle(path):
    name = path.name.split(".")[0]
    if name not in ADAPTERS:
        pytest.skip(f"no adapter for {name!r}: this method is not part of the package yet")
    oracle = decode(json.loads(path.read_text(encoding="utf-8")))
    tolerance = oracle.get("tolerance") or {}
    if not isinstance(tolerance, dict):
        tolerance = {}
    rtol, atol = float(tolerance.get("rtol", 1e-5)), float(tolerance.get("atol", 1e-6))
    adapter = importlib.import_module(f"tests.oracles.adapters.{name}")
    compared = 0
    for label, got, expected in adapter.evaluate(oracle):
        assert_same(f"{name}:{label}", got, expected, rtol, atol)
        compared += 1
    assert compared, f"the adapter of {name!r} compared nothing in {path}"
