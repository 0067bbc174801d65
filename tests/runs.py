"""Runs without a trainer: what a method may use, made of arrays."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from dsel_trl.core.costs import Costs
from dsel_trl.core.data_passes import Passes
from dsel_trl.core.ledger import Ledger
from dsel_trl.core.run import Run
from dsel_trl.data.rows import Layout, Rows

LAYOUTS = {"dpo": Layout(("chosen", "rejected"), prompts=True), "sft": Layout()}


class NumberedRows(Rows):
    """Rows of which only the number, some columns and the lengths are known."""

    def __init__(self, size: int, layout: Layout, columns: Mapping[str, Any], lengths: Any, dataset: Any) -> None:
        super().__init__("train", dataset, layout, tokenizer=None, collate=not_here)
        self._size = size
        self._columns = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
        self._given = None if lengths is None else np.asarray(lengths, dtype=np.int32)

    def __len__(self) -> int:
        return self._size

    @property
    def tokenized(self) -> bool:
        return self._given is not None or (self.dataset is not None and super().tokenized)

    @property
    def lengths(self) -> np.ndarray:
        return super().lengths if self._given is None else self._given

    @property
    def completion_lengths(self) -> np.ndarray:
        return super().completion_lengths if self._given is None else self._given


def not_here(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("This run has no trainer.")


def make_run(
    size: int,
    *,
    trainer: str = "dpo",
    columns: Mapping[str, Any] | None = None,
    lengths: Any = None,
    dataset: Any = None,
    **values: Any,
) -> Run:
    """A run of `size` examples; `values` are fields of [`Run`]."""
    arguments = SimpleNamespace(per_device_train_batch_size=8, gradient_accumulation_steps=1, max_length=None)
    costs = Costs()
    rows = NumberedRows(size, LAYOUTS[trainer], columns or {}, lengths, dataset)
    fields: dict[str, Any] = {
        "trainer": trainer,
        "ledger": Ledger(size),
        "training_rows": rows,
        "arguments": arguments,
        "output_dir": "",
        "processing_class": None,
        "model": None,
        "reference": None,
        "passes": Passes(lambda: rows, not_here, costs=costs),
        "costs": costs,
        "log": lambda logged: None,
        "tell": lambda key, text, level: None,
        **dict.fromkeys(
            ("prepare", "load", "loss", "train_helper", "generate", "refer", "restart", "restart_rate", "gradients"),
            not_here,
        ),
    }
    return Run(**{**fields, **values})
