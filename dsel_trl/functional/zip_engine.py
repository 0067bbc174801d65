"""Compression ratios of many "anchor + candidate" texts without compressing the anchor again for each of them."""

import mmap
import os
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

LEVEL = 9
CHUNKS_PER_WORKER = 4


class Frame(NamedTuple):
    """What stands before, between and after the examples of a serialised list."""

    opening: bytes
    separator: bytes
    closing: bytes


class Anchor:
    """
    The compressor after a list of examples. It grows by appending, and is copied for every candidate.

    DEFLATE gives the same output however its input is cut, so the sizes equal those of one-shot compression.

    Args:
        frame (`Frame`):
            What stands around and between the examples.
    """

    def __init__(self, frame: Frame) -> None:
        self.ids: list[int] = []
        self._frame = frame
        self._compressor = zlib.compressobj(LEVEL)
        self._raw = len(frame.opening)
        self._packed = len(self._compressor.compress(frame.opening))

    def append(self, example_id: int, piece: bytes) -> None:
        """Adds one example at the end."""
        piece = self._frame.separator + piece if self.ids else piece
        self._raw += len(piece)
        self._packed += len(self._compressor.compress(piece))
        self.ids.append(example_id)

    def ratio(self, piece: bytes) -> float:
        """Compression ratio of the list with one more example."""
        rest = (self._frame.separator if self.ids else b"") + piece + self._frame.closing
        # A copy of the compressor costs microseconds, a second pass over the anchor milliseconds.
        compressor = self._compressor.copy()
        packed = self._packed + len(compressor.compress(rest)) + len(compressor.flush())
        return (self._raw + len(rest)) / packed


class _Anchors:
    """One anchor per purpose, extended when the new list continues the old one and rebuilt otherwise."""

    def __init__(self, pieces: Any, frame: Frame) -> None:
        self._pieces, self._frame = pieces, frame
        self._kept: dict[str, Anchor] = {}

    def ratios(self, purpose: str, anchor_ids: list[int], candidates: list[int]) -> list[float]:
        anchor = self._kept.get(purpose)
        if anchor is None or anchor.ids != anchor_ids[: len(anchor.ids)]:
            anchor = self._kept[purpose] = Anchor(self._frame)
        for example_id in anchor_ids[len(anchor.ids) :]:
            anchor.append(example_id, self._pieces[example_id])
        return [anchor.ratio(self._pieces[i]) for i in candidates]


class _MappedPieces:
    """The serialised examples in a file, shared by all processes instead of copied to each."""

    def __init__(self, path: str, offsets: NDArray[np.int64]) -> None:
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._offsets = offsets

    def __getitem__(self, i: int) -> bytes:
        return self._bytes[self._offsets[i] : self._offsets[i + 1]]


_worker: _Anchors | None = None


def _start_worker(path: str, offsets: NDArray[np.int64], frame: Frame) -> None:
    global _worker
    _worker = _Anchors(_MappedPieces(path, offsets), frame)


def _work(purpose: str, anchor_ids: list[int], candidates: list[int]) -> list[float]:
    assert _worker is not None
    return _worker.ratios(purpose, anchor_ids, candidates)


class CompressionEngine:
    """
    Computes compression ratios, in this process or in several.

    Args:
        pieces (`list[bytes]`):
            The serialised examples.
        frame (`Frame`):
            What stands around and between them.
        workers (`int`, *optional*, defaults to `1`):
            Number of processes. Above 1 they are spawned on entering the context.

    Example:

    ```python
    >>> from dsel_trl.functional.zip_engine import CompressionEngine, Frame

    >>> with CompressionEngine([b"abc", b"abd"], Frame(b"", b" ", b"")) as engine:
    ...     engine.ratios("all", [0], [1]).round(3).tolist()
    [0.467]
    ```
    """

    def __init__(self, pieces: list[bytes], frame: Frame, workers: int = 1) -> None:
        self._pieces, self._frame = pieces, frame
        self._workers = workers if sum(map(len, pieces)) else 1
        self._here = _Anchors(pieces, frame)
        self._pool: ProcessPoolExecutor | None = None
        self._path = ""

    def __enter__(self) -> Self:
        if self._workers > 1:
            handle, self._path = tempfile.mkstemp(prefix="dsel-zip-")
            with os.fdopen(handle, "wb") as file:
                file.writelines(self._pieces)
            offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in self._pieces])])
            self._pool = ProcessPoolExecutor(
                self._workers, get_context("spawn"), _start_worker, (self._path, offsets, self._frame)
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            os.unlink(self._path)
            self._pool = None

    def ratios(self, purpose: str, anchor_ids: list[int], candidates: list[int]) -> NDArray[np.float64]:
        """
        Compression ratio of the anchor with each of the candidates appended.

        Args:
            purpose (`str`):
                Name under which the compressor of the anchor is kept, so that an anchor that grows is compressed once.
            anchor_ids (`list[int]`):
                Examples of the anchor, in order.
            candidates (`list[int]`):
                Examples to append, one at a time.

        Returns:
            `np.ndarray` of float64 of shape `(len(candidates),)`.
        """
        if self._pool is None:
            return np.array(self._here.ratios(purpose, anchor_ids, candidates), dtype=np.float64)
        # Striding spreads long examples over the processes.
        stride = min(self._workers * CHUNKS_PER_WORKER, len(candidates))
        chunks = [candidates[start::stride] for start in range(stride)]
        results = np.empty(len(candidates))
        jobs = [self._pool.submit(_work, purpose, anchor_ids, chunk) for chunk in chunks]
        for start, job in enumerate(jobs):
            results[start::stride] = job.result()
        return results
