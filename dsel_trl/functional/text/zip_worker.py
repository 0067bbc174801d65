"""A process of the compression engine: reads jobs as JSON lines from stdin and answers with compression ratios.

It is run by path, on the standard library alone: so it starts in milliseconds, does not import the package (nor torch)
once more, and works from a script without a `__main__` guard.
"""

import json
import mmap
import sys
import zlib
from array import array
from collections.abc import Sequence
from typing import NamedTuple, Protocol

LEVEL = 9


class Frame(NamedTuple):
    """What stands before, between and after the examples of a serialised list."""

    opening: bytes
    separator: bytes
    closing: bytes


class Pieces(Protocol):
    """The serialised examples by id."""

    def __getitem__(self, i: int, /) -> bytes: ...


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


class Anchors:
    """
    One anchor per purpose, extended when the new list continues the old one and rebuilt otherwise.

    Args:
        pieces (`Pieces`):
            The serialised examples.
        frame (`Frame`):
            What stands around and between them.
    """

    def __init__(self, pieces: Pieces, frame: Frame) -> None:
        self._pieces, self._frame = pieces, frame
        self._kept: dict[str, Anchor] = {}

    def ratios(self, purpose: str, anchor_ids: Sequence[int], candidates: Sequence[int]) -> list[float]:
        """Compression ratio of the anchor with each of the candidates appended."""
        anchor = self._kept.get(purpose)
        if anchor is None or anchor.ids != anchor_ids[: len(anchor.ids)]:
            anchor = self._kept[purpose] = Anchor(self._frame)
        for example_id in anchor_ids[len(anchor.ids) :]:
            anchor.append(example_id, self._pieces[example_id])
        return [anchor.ratio(self._pieces[i]) for i in candidates]


class MappedPieces:
    """
    The serialised examples in a file that all processes share: `n + 1` int64 offsets, then the bytes.

    Args:
        path (`str`):
            The file.
        n (`int`):
            Number of examples.
    """

    def __init__(self, path: str, n: int) -> None:
        with open(path, "rb") as file:
            self._file = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._start = 8 * (n + 1)
        self._offsets = array("q")
        self._offsets.frombytes(self._file[: self._start])

    @staticmethod
    def write(path: str, pieces: Sequence[bytes]) -> None:
        """Writes such a file."""
        offsets = array("q", [0])
        for piece in pieces:
            offsets.append(offsets[-1] + len(piece))
        with open(path, "wb") as file:
            file.write(offsets.tobytes())
            file.writelines(pieces)

    def __getitem__(self, i: int, /) -> bytes:
        return self._file[self._start + self._offsets[i] : self._start + self._offsets[i + 1]]


def main(path: str, n: str, *frame: str) -> None:
    """Answers jobs until stdin is closed."""
    anchors = Anchors(MappedPieces(path, int(n)), Frame(*map(bytes.fromhex, frame)))
    for line in sys.stdin:
        sys.stdout.write(json.dumps(anchors.ratios(*json.loads(line))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
