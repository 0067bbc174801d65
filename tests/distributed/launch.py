"""Starts the trainings of `tests/distributed/forked.py` and waits for them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def launched(folder: Path, chains: list[list[dict[str, Any]]], timeout: float = 1500) -> list[list[list[int]]]:
    """Runs chains of specifications, written into `folder`: how each process of each training has ended."""
    path = folder / "specs.json"
    path.write_text(json.dumps(chains))
    subprocess.run(
        [sys.executable, "-m", "tests.distributed.forked", str(path)],
        check=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        timeout=timeout,
    )
    return json.loads(Path(f"{path}.ended").read_text())
