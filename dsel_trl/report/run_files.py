"""
What a run leaves behind: `ledger.parquet`, `summary.json`, `history.json` and, with the `report` extra, one picture.
"""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from ..core.ledger import Ledger
from ..data.files import replacing, write_json
from .picture import draw_run
from .record import RunRecord

logger = logging.getLogger(__name__)


def write_run(
    folder: Path,
    ledger: Ledger,
    *,
    ids: np.ndarray | None,
    summary: dict[str, Any],
    history: list[dict[str, float]],
) -> None:
    """
    Writes the files of a finished run into `folder`: each of them appears complete or not at all.

    Args:
        folder (`Path`):
            `output_dir/selection`.
        ledger ([`Ledger`]):
            The run's ledger.
        ids (`np.ndarray`, *optional*):
            Positions of the examples in the user's dataset.
        summary (`dict`):
            JSON values.
        history (`list[dict[str, float]]`):
            The logged rows.
    """
    with replacing(folder / "ledger.parquet") as temporary:
        # Written by pyarrow itself: `Dataset.to_parquet` shows a progress bar for each file.
        parquet.write_table(ledger.to_table(ids), temporary)
    write_json(folder / "summary.json", summary)
    write_json(folder / "history.json", {"rows": history})
    if importlib.util.find_spec("matplotlib") is None:
        logger.info('No picture of the selection was drawn: pip install "dsel-trl[report]" to get one.')
        return
    draw_run(folder / "selection.png", RunRecord.of(ledger, summary, history))
