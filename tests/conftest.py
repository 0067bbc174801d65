"""Fixtures of all tests: the tiny model, and trainers on it that leave nothing behind."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
torch.set_num_threads(1)

# `tests.tiny` is imported where it is used: tests of pure functions need not wait for the trainers.


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama and its tokenizer."""
    from tests import tiny

    return tiny.build_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make_trainer(model: Path, tmp_path: Path) -> Callable[..., Any]:
    """`make_trainer(kind, **config)`: a stock trainer that writes below `tmp_path`."""
    from tests import tiny

    def make(kind: str, **config: Any) -> Any:
        output_dir = config.pop("output_dir", tmp_path / "out")
        return tiny.make_trainer(kind, config.pop("model", model), output_dir, **config)

    return make


@pytest.fixture
def reward_trainer(model: Path, tmp_path: Path) -> Callable[..., Any]:
    """`reward_trainer(**config)`: a stock trainer of a reward model."""
    from trl import RewardConfig, RewardTrainer

    from tests import tiny

    def make(**config: Any) -> Any:
        args = RewardConfig(str(tmp_path / "out"), **{**tiny.COMMON, **config})
        dataset = tiny.preferences().remove_columns(["prompt"])
        torch.manual_seed(0)
        return RewardTrainer(str(model), args=args, train_dataset=dataset)

    return make


@pytest.fixture(scope="module", autouse=True)
def _lasting() -> None:
    """What is there before a file's tests stays: every `train()` collects garbage, and need not look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_logger() -> Iterator[None]:
    """The package's logger as a test finds it: the command line gives it a handler of its own."""
    logger = logging.getLogger("dsel_trl")
    handlers, level, propagate = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = handlers, level, propagate


@pytest.fixture
def pictures() -> None:
    """Runs of a test that asks for this end with their picture."""


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs end without drawing: a picture takes longer than the run. Each recipe draws its own."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr("dsel_trl.report.run_files.draw_run", lambda *args: None)
