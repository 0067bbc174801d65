"""
Many trainings, each in fresh processes, at the price of one import: `python -m tests.distributed.forked SPECS.json`.

The libraries are imported once; each training runs in processes forked from there (as many as its `world`, joined by
gloo as torchrun would). `SPECS.json` holds a list of specifications; how each process ended is written to
`SPECS.json.ended`.
"""

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


def run(spec: dict[str, Any], patience: float = 120.0) -> list[int]:
    """Runs the processes of a training; returns how each ended (negative: by that signal)."""
    world = spec.get("world", 1)
    port = free_port()
    pids = [fork(spec, rank, world, port) for rank in range(world)]
    ended: dict[int, int] = {}
    deadline = time.monotonic() + patience
    while len(ended) < world:
        for pid in set(pids) - set(ended):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[pid] = os.waitstatus_to_exitcode(status)
        if any(ended.values()) or time.monotonic() > deadline:
            # One process is gone: the others wait for it for ever, as torchrun knows too.
            for pid in set(pids) - set(ended):
                os.kill(pid, signal.SIGKILL)
                ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.01)
    return [ended[pid] for pid in pids]


if __name__ == "__main__":
    path = Path(sys.argv[1])
    Path(f"{path}.ended").write_text(json.dumps([run(spec) for spec in json.loads(path.read_text())]))
