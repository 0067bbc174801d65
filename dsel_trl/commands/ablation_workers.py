"""The processes in which the cells of an ablation run: several at once, each of them free to fail."""

import contextlib
import json
import logging
import os
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..data.files import write_json
from .ablation_cells import DONE, Cell

logger = logging.getLogger(__name__)

MODULE = "dsel_trl.commands.ablation_cells"
# Lines of a process's log that are told when it has died.
LAST_LINES = 3


class Worker:
    """A process that runs one cell after the other; one that has died is followed by another."""

    def __init__(self, log: Path, launch: Sequence[str], threads: int) -> None:
        self.log, self.launch = log, list(launch)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        self.process: subprocess.Popen[str] | None = None

    def run(self, spec: Path) -> str | None:
        """Runs the cell of a file to its end; how the process died, if it did."""
        if self.launch:
            # A launcher starts and ends a group of processes for each cell.
            self.process = self._start([*self.launch, "-m", MODULE, str(spec)])
            code = self.process.wait()
            return None if code in (0, 1) else self._died(code)
        if self.process is None or self.process.poll() is not None:
            if self.process is not None:
                self._close_pipes()
            self.process = self._start([sys.executable, "-m", MODULE])
        try:
            assert self.process.stdin is not None
            assert self.process.stdout is not None
            self.process.stdin.write(f"{spec}\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.strip() == DONE:
                    return None
        except BrokenPipeError:
            pass
        return self._died(self.process.wait())

    def _start(self, command: list[str]) -> "subprocess.Popen[str]":
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "a", encoding="utf-8") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": log if self.launch else subprocess.PIPE}
            return subprocess.Popen(command, stderr=log, text=True, env=self.environment, **pipes)

    def _died(self, code: int) -> str:
        lines = [line for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        how = f"its process ended by signal {-code}" if code < 0 else f"its process ended with exit code {code}"
        return f"{how}: {' / '.join(lines[-LAST_LINES:])[-500:]}"

    def close(self) -> None:
        """Ends the process, also in the middle of a cell."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._close_pipes()

    def _close_pipes(self) -> None:
        assert self.process is not None
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def result_of(folder: Path) -> dict[str, Any] | None:
    """What came of a cell, if it was finished."""
    file = folder / "result.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


class Pool:
    """
    The processes of an ablation, which last from its first cell to its last one.

    Args:
        folder (`Path`):
            Folder of the ablation.
        workers (`int`):
            Cells at once.
        threads (`int`):
            Threads of torch in each process.
        launch (`str`):
            A command that launches a module in several processes, such as `accelerate launch --num_processes 2`;
            empty for one process each.
    """

    def __init__(self, folder: Path, *, workers: int, threads: int, launch: str) -> None:
        self.folder = folder
        logs = folder / "logs"
        self.workers = [Worker(logs / f"worker-{n}.txt", shlex.split(launch), threads) for n in range(workers)]

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        for worker in self.workers:
            worker.close()

    def run(self, cells: Sequence[Cell], description: str) -> list[str]:
        """Runs the cells that are not finished; how each cell failed, empty for one that did not."""
        waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
        failures = [""] * len(cells)
        for i, cell in enumerate(cells):
            if result_of(self.folder / "cells" / cell.folder_name) is None:
                waiting.put(i)
        bar = tqdm(total=len(cells), initial=len(cells) - waiting.qsize(), desc=description)

        def serve(worker: Worker) -> None:
            while True:
                try:
                    i = waiting.get_nowait()
                except queue.Empty:
                    return
                failures[i] = _run(worker, cells[i], self.folder)
                if failures[i]:
                    logger.warning("%s: %s", cells[i].name, failures[i])
                bar.update()

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in self.workers]
        try:
            for thread in threads[: waiting.qsize()]:
                thread.start()
            for thread in threads:
                # In pieces: a join without end would not hear of an interruption.
                while thread.is_alive():
                    thread.join(0.2)
        finally:
            while not waiting.empty():
                waiting.get()
            bar.close()
        return failures


def _run(worker: Worker, cell: Cell, folder: Path) -> str:
    own = folder / "cells" / cell.folder_name
    spec = own / "cell.json"
    (own / "error.json").unlink(missing_ok=True)
    write_json(spec, {"cell": asdict(cell), "folder": str(own), "shared": str(folder / "shared")})
    died = worker.run(spec)
    if result_of(own) is not None:
        return ""
    if (own / "error.json").is_file():
        return str(json.loads((own / "error.json").read_text(encoding="utf-8"))["error"])
    failure = died or "it left no result"
    write_json(own / "error.json", {"error": failure})
    return failure
