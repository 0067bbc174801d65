"""The cells of `dsel ablate` in processes: one that dies, a launcher's, and an ablation that is killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsel_trl.cli import main
from dsel_trl.commands import ablation_cells
from dsel_trl.commands.ablate import Ablation
from dsel_trl.commands.ablation_cells import run_cell
from dsel_trl.commands.ablation_workers import Pool, result_of

ROOT = Path(__file__).parents[2]
METHODS = {"explicit": {"name": "margin", "source": "explicit", "keep": 2 / 3}}


def test_a_process_that_dies_is_named_and_the_next_cell_has_another(base, tmp_path, monkeypatch):
    """In real processes: one cell of two ends its process."""
    (tmp_path / "judge.py").write_text(
        "import os\ndef judge(trainer):\n    return 0.25 if trainer.args.seed else os._exit(3)\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    path = base({"seeds": [0, 1], "metric": "judge:judge", "methods": METHODS, "random": False}, max_steps=1)
    ablation = Ablation(["--config", path])
    rows, failures = ablation.run()
    assert "exit code 3" in failures["stock, seed 0"]
    assert failures["explicit, seed 0"] == "stock failed, so its steps are not known"
    found = [(row.variant, list(row.by_seed), row.failed) for row in rows]
    assert found == [("stock", [1], [0]), ("explicit", [1], [0])]
    assert {row.mean("metric") for row in rows} == {0.25}


def running(pid):
    """Processes that descend from one, itself included."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    below, found = [tuple(map(int, line.split())) for line in listed.splitlines()], {pid}
    while more := {child for child, parent in below if parent in found} - found:
        found |= more
    return found


def alive(pids):
    for pid in pids:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            continue
    return False


def wait_until(true, seconds):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="processes are looked at in /proc")
@pytest.mark.usefixtures("no_picture", "in_process")
def test_killed_at_any_moment_it_goes_on_to_the_same_table(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # A score that the seeds share, a kept set, and `random` beside it.
    methods = {**METHODS, "helped": {"name": "s2l", "keep": 0.5, "checkpoints": 2, "clusters": 2}}
    block = {"seeds": [0, 1], "methods": methods}
    path = base(block)
    words = [sys.executable, "-m", "dsel_trl", "ablate", "--config", path]
    with open(tmp_path / "log.txt", "w") as log:
        started = subprocess.Popen(words, start_new_session=True, stderr=log, stdout=log)
    cells = tmp_path / "out" / "cells"
    began, pause = random.SystemRandom().randrange(1, 8), random.SystemRandom().random() * 0.6
    try:
        wait_until(lambda: len(list(cells.glob("*/cell.json"))) >= began or started.poll() is not None, 240)
        time.sleep(pause)
        assert started.poll() is None, (tmp_path / "log.txt").read_text()
    finally:
        family = running(started.pid)
        started.kill()
        started.wait()
    moment = f"killed {pause:.3f} s after cell {began} began"
    # What it has started ends with it: nothing trains beside the ablation that goes on.
    wait_until(lambda: not alive(family), 30)
    finished = {file: file.stat().st_mtime_ns for file in cells.glob("*/result.json")}
    assert len(finished) >= began - 1, moment
    assert main(["ablate", "--config", path]) == 0, moment
    assert finished.items() <= {file: file.stat().st_mtime_ns for file in cells.glob("*/result.json")}.items(), moment
    assert main(["ablate", "--config", base(block, output_dir=str(tmp_path / "whole"))]) == 0
    for name in ("ablation.md", "ablation.csv", "ablation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), moment


def test_a_launched_process_ends_with_the_one_that_launched_it(monkeypatch):
    """As a rank of a launcher, which inherits the pipe of the ablation's process and runs one cell."""
    reading, writing = os.pipe()
    rank = os.fork()
    if not rank:
        os.close(writing)
        os.dup2(reading, 0)
        monkeypatch.setattr(sys, "argv", ["ablation_cells", "cell.json"])
        monkeypatch.setattr(ablation_cells, "work", lambda spec: time.sleep(60))
        ablation_cells.main()
        os._exit(7)
    os.close(reading)
    time.sleep(0.3)
    assert os.waitpid(rank, os.WNOHANG) == (0, 0), "it has ended by itself"
    os.close(writing)
    end = time.monotonic() + 20
    while not (found := os.waitpid(rank, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    if not found[0]:
        os.kill(rank, 9)
        os.waitpid(rank, 0)
    assert found[0] == rank, "it went on alone"
    assert os.waitstatus_to_exitcode(found[1]) == 1


def test_a_cell_under_accelerate_launch(base, tmp_path, monkeypatch):
    """Two processes of 4 pairs each train what one process trains in batches of 8."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    launch = f"accelerate launch --config_file {ROOT / 'recipes/accelerate/cpu_2_processes.yaml'}"
    block = {"seeds": [0], "methods": METHODS, "launch": launch}
    ablation = Ablation(["--config", base(block, per_device_train_batch_size=4)])
    cell = ablation._cell("explicit", ablation.grid.methods["explicit"], None, 0)
    with Pool(ablation.folder, workers=1, threads=1, launch=launch) as pool:
        assert pool.run([cell], "launched") == [""]
    launched = result_of(ablation.folder / "cells" / cell.folder_name)
    one = Ablation(["--config", base({**block, "launch": ""})])
    alone = run_cell(
        one._cell("explicit", one.grid.methods["explicit"], None, 0), tmp_path / "alone", tmp_path / "shared"
    )
    same = ("steps", "tokens", "kept_fraction", "cost", "flipped_dropped", "clean_dropped", "training_flops")
    assert {name: launched[name] for name in same} == {name: alone[name] for name in same}
    assert launched["metrics"]["eval_loss"] == pytest.approx(alone["metrics"]["eval_loss"], rel=1e-4)
    table = json.loads((ablation.folder / "cells" / cell.folder_name / "selection" / "summary.json").read_text())
    assert table["steps"] == launched["steps"]
