"""`Rows`: examples that can be collated, measured and named, whatever they are for."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset

from .columns import ROW_NUMBER, column_values, numeric_column
from .fingerprints import dataset_fingerprint
from .identical import identical_pairs
from .lengths import list_lengths, padded_lengths, response_lengths, sequence_lengths

# What a sequence is taken to cost whose tokens nothing limits.
UNKNOWN_LENGTH = 1024


@dataclass(frozen=True)
class Layout:
    """
    Where the prepared rows of a trainer hold their responses.

    Attributes:
        sides (`tuple[str, ...]`):
            The responses of a row: each has its text in a column of that name and its tokens in `<side>_ids`. Without
            any, a row is one sequence: `input_ids` with `labels`.
        prompts (`bool`):
            Whether the prompt's tokens lie apart, in `prompt_ids`, and stand before each response.
        beside (`tuple[str, ...]`):
            Columns that decide an example's loss beside its tokens.
    """

    sides: tuple[str, ...] = ()
    prompts: bool = False
    beside: tuple[str, ...] = ()

    @property
    def pairs(self) -> bool:
        return len(self.sides) == 2

    @property
    def sequences(self) -> int:
        """Sequences that a row is trained as."""
        return max(1, len(self.sides))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The columns of token ids, without which nothing is known of a row before it is collated."""
        if not self.sides:
            return ("input_ids",)
        return (*(("prompt_ids",) if self.prompts else ()), *(f"{side}_ids" for side in self.sides))


class UnreadableError(ValueError):
    """Something was asked of rows that cannot be known before they are collated."""


@dataclass
class Rows:
    """
    Examples as a trainer prepares them: a training set, a set to follow, or one side of the pairs of either.

    Args:
        name (`str`):
            What they are, for messages and files.
        dataset ([`~datasets.Dataset`]):
            The user's columns and the token columns.
        layout ([`Layout`]):
            Where the responses are.
        tokenizer:
            The trainer's.
        collate (`Callable[[np.ndarray], dict]`):
            Gives the inputs of some rows as the trainer's collator makes them, on the training device.
        max_length (`int`, *optional*):
            What a sequence is truncated to when it is collated.
        truncation (`str`, *optional*, defaults to `"keep_start"`):
            Which end of a longer sequence stays: `"keep_start"` or `"keep_end"`.
        text_field (`str`, *optional*, defaults to `"text"`):
            Column of texts without structure.
        collated (`tuple[str, ...]`, *optional*):
            What the collator is given, where that is not tokens.
        device (`torch.device`, *optional*, defaults to the CPU):
            Where the model that trains on them is.
        kept (`Callable[[Rows], np.ndarray]`, *optional*):
            Which rows, `(N,)` bool, the trainer keeps when it prepares a dataset; by default all.
    """

    name: str
    dataset: Dataset
    layout: Layout
    tokenizer: Any
    collate: Callable[[np.ndarray], dict[str, Any]]
    max_length: int | None = None
    truncation: str = "keep_start"
    text_field: str = "text"
    collated: tuple[str, ...] = ()
    device: Any = "cpu"
    kept: Callable[["Rows"], np.ndarray] | None = None

    def __post_init__(self) -> None:
        self._columns: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def column_names(self) -> list[str]:
        return list(self.dataset.column_names)

    @property
    def tokenized(self) -> bool:
        """Whether the token columns are there: images are tokenized in the collator, as other rows may be."""
        return set(self.layout.tokens) <= set(self.column_names)

    @property
    def trained_columns(self) -> tuple[str, ...]:
        """The columns that are trained on: tokens, labels and what else decides a loss, or what the collator reads."""
        if not self.tokenized:
            return self.collated
        beside = (*self.layout.beside, *(() if self.layout.sides else ("labels",)))
        return (*self.layout.tokens, *(name for name in beside if name in self.column_names))

    def fingerprint(self, columns: Sequence[str] = ()) -> str:
        """Hash of what training reads of the rows, and of the numeric `columns`."""
        return dataset_fingerprint(self.dataset, self.trained_columns, columns)

    @property
    def end(self) -> str | None:
        """The end token that the trainer has put behind the responses' texts."""
        return getattr(self.tokenizer, "eos_token", None)

    def side(self, name: str) -> "Rows":
        """The rows with one response of each pair; rows that are no pairs are what they are."""
        if not self.layout.pairs:
            return self
        if name not in self.layout.sides:
            raise ValueError(f"side={name!r} is none of {list(self.layout.sides)}.")
        return replace(self, layout=replace(self.layout, sides=(name,)))

    @cached_property
    def positions(self) -> np.ndarray:
        """
        Position of each row in the dataset that the user passed, `(N,)` int64.

        Some rows may have been dropped when the dataset was prepared. A column that `dsel` adds says which are left;
        else the index table does that the trainer's filter leaves behind, told from a view of the user's own by what
        is missing in it: exactly the rows that the trainer drops.
        """
        if ROW_NUMBER in self.column_names:
            return numeric_column(self.dataset, ROW_NUMBER).astype(np.int64)
        if self.kept is not None and self.dataset._indices is not None:
            whole = copy.copy(self.dataset)
            whole._indices = None
            indices = self.dataset._indices.column(0).to_numpy().astype(np.int64)
            if np.array_equal(np.flatnonzero(self.kept(replace(self, dataset=whole))), indices):
                return indices
        return np.arange(len(self), dtype=np.int64)

    def column(self, name: str) -> np.ndarray:
        """A numeric column, `(N,)` float64, NaN where null. Columns with the truth of a test are refused."""
        if name not in self._columns:
            self._columns[name] = numeric_column(self.dataset, name)
        return self._columns[name]

    def _need_tokens(self) -> None:
        if not self.tokenized:
            raise UnreadableError(
                f"the lengths and tokens of the rows of {self.name!r} are needed, but they are tokenized when they "
                f"are collated: there are no columns {list(self.layout.tokens)}, only {sorted(self.column_names)}."
            )

    def values(self, name: str, reader: str = "") -> Any:
        """
        A column of any type, as the dataset gives it. Columns with the truth of a test are refused.

        Args:
            name (`str`):
                The column.
            reader (`str`, *optional*):
                Who asks, such as the parameter that named it: the beginning of an error.
        """
        return column_values(self.dataset, name, reader)

    @cached_property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        self._need_tokens()
        if self.layout.sides:
            return response_lengths(self.dataset, self.max_length, self.layout.sides)
        return sequence_lengths(self.dataset)

    @property
    def completion_lengths(self) -> np.ndarray:
        """Tokens that carry loss per row (of all its responses), `(N,)` int32."""
        return self._lengths[0]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row as it is trained (all its sequences, prompts included), `(N,)` int32."""
        return self._lengths[1]

    @cached_property
    def identical(self) -> np.ndarray:
        """Which pairs have two sides that are equal after truncation, `(N,)` bool."""
        self._need_tokens()
        first, second = self.layout.sides
        return identical_pairs(
            self.dataset, (first, second), self.layout.prompts, self.max_length, self.truncation == "keep_end"
        )

    @property
    def pass_lengths(self) -> np.ndarray:
        """Tokens per row for cutting a pass into batches, `(N,)` int32; where they are not known, all are alike."""
        if self.tokenized:
            return self.lengths
        return np.full(len(self), (self.max_length or UNKNOWN_LENGTH) * self.layout.sequences, dtype=np.int32)

    @cached_property
    def padded_lengths(self) -> np.ndarray:
        """Tokens of the sequence that a row's sequences are padded to, after truncation, `(N,)` int32."""
        self._need_tokens()
        if self.layout.sides:
            return padded_lengths(self.dataset, self.max_length, self.layout.sides)
        return list_lengths(self.dataset, "input_ids")
