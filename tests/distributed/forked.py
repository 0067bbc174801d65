"""
Many trainings, each in fresh processes, at the price of one import: `python -m tests.distributed.forked SPECS.json`.

The libraries are imported once; each training runs in processes forked from there (as many as its `world`, joined by
gloo as torchrun would). `SPECS.json` holds chains: lists of specifications that run one after the other. Chains run
side by side, as many as two cores bear. How each process of each training ended is written to `SPECS.json.ended`.
"""

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from tests.distributed.training import train


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def fork(spec: dict[str, Any], rank: int, world: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = open(f"{spec['log']}.{rank}", "w")  # noqa: SIM115  (held open until the process ends)
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        if world > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world),
                LOCAL_WORLD_SIZE=str(world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        train(spec)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Training:
    """A training under way."""

    def __init__(self, spec: dict[str, Any], patience: float = 120.0) -> None:
        self.world = spec.get("world", 1)
        port = free_port()
        self.pids = [fork(spec, rank, self.world, port) for rank in range(self.world)]
        self.ended: dict[int, int] = {}
        self.deadline = time.monotonic() + patience

    def poll(self) -> list[int] | None:
        """How each process ended (negative: by that signal), or `None` while one is running."""
        for pid in set(self.pids) - set(self.ended):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                self.ended[pid] = os.waitstatus_to_exitcode(status)
        if any(self.ended.values()) or time.monotonic() > self.deadline:
            # One process is gone: the others wait for it for ever, as torchrun knows too.
            for pid in set(self.pids) - set(self.ended):
                os.kill(pid, signal.SIGKILL)
                self.ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return [self.ended[pid] for pid in self.pids] if len(self.ended) == self.world else None


def run(chains: list[list[dict[str, Any]]], slots: int = 2) -> list[list[list[int]]]:
    """Runs chains of trainings, on at most `slots` processes at a time."""
    ended: list[list[list[int]]] = [[] for _ in chains]
    waiting, active = list(range(len(chains))), {}
    while waiting or active:
        for number in [*active]:
            codes = active[number].poll()
            if codes is not None:
                del active[number]
                ended[number].append(codes)
                if len(ended[number]) < len(chains[number]):
                    waiting.insert(0, number)
        for number in [*waiting]:
            spec = chains[number][len(ended[number])]
            if sum(training.world for training in active.values()) + spec.get("world", 1) <= slots:
                active[number] = Training(spec)
                waiting.remove(number)
        time.sleep(0.01)
    return ended


if __name__ == "__main__":
    path = Path(sys.argv[1])
    # What was imported is never garbage: forked processes need not look through it, nor copy it to do so.
    gc.collect()
    gc.freeze()
    Path(f"{path}.ended").write_text(json.dumps(run(json.loads(path.read_text()))))
