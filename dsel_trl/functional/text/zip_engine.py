"""Compression ratios of many "anchor + candidate" texts without compressing the anchor again for each of them."""

import json
import os
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from . import zip_worker
from .zip_worker import Anchors, Frame, MappedPieces


class CompressionEngine:
    """
    Computes compression ratios, in this process or in several.

    Args:
        pieces (`list[bytes]`):
            The serialised examples.
        frame (`Frame`):
            What stands around and between them.
        workers (`int`, *optional*, defaults to `1`):
            Number of processes. Above 1 they are started on entering the context; the results are the same.

    Example:

    ```python
    >>> from dsel_trl.functional.text.zip_engine import CompressionEngine
    >>> from dsel_trl.functional.text.zip_worker import Frame

    >>> with CompressionEngine([b"abc", b"abd"], Frame(b"", b" ", b"")) as engine:
    ...     engine.ratios("all", [0], [1]).round(3).tolist()
    [0.467]
    ```
    """

    def __init__(self, pieces: list[bytes], frame: Frame, workers: int = 1) -> None:
        self._pieces, self._frame = pieces, frame
        self._sizes = np.fromiter((len(piece) for piece in pieces), dtype=np.int64, count=len(pieces))
        self._workers = min(workers, max(len(pieces), 1))
        self._here = Anchors(pieces, frame)
        self._processes: list[subprocess.Popen[str]] = []
        self._path = ""

    def __enter__(self) -> Self:
        if self._workers > 1:
            handle, self._path = tempfile.mkstemp(prefix="dsel-zip-")
            os.close(handle)
            MappedPieces.write(self._path, self._pieces)
            # -I keeps the folder of this file, whose modules could hide others, off the path of the process.
            command = [sys.executable, "-I", "-S", zip_worker.__file__, self._path, str(len(self._pieces))]
            command += [part.hex() for part in self._frame]
            self._processes = [
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                for _ in range(self._workers)
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            process.communicate()
        if self._processes:
            os.unlink(self._path)
            self._processes = []

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

        Raises:
            `RuntimeError`: if a process has died.
        """
        if not self._processes:
            return np.array(self._here.ratios(purpose, anchor_ids, candidates), dtype=np.float64)
        # Dealing from the longest to the shortest gives every process about the same number of bytes.
        order = np.argsort(-self._sizes[candidates], kind="stable")
        shares = [order[start :: self._workers] for start in range(self._workers)]
        results = np.empty(len(candidates))
        try:
            for process, share in zip(self._processes, shares, strict=True):
                assert process.stdin is not None
                job = [purpose, anchor_ids, [candidates[position] for position in share]]
                process.stdin.write(json.dumps(job) + "\n")
                process.stdin.flush()
            for process, share in zip(self._processes, shares, strict=True):
                assert process.stdout is not None
                results[share] = json.loads(process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError) as error:
            codes = [process.poll() for process in self._processes]
            raise RuntimeError(f"a compression process ended early (exit codes {codes})") from error
        return results
