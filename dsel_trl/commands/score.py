"""`dsel score`: a dataset with log-probabilities, margins, rewards and the scores of methods beside its rows."""

import argparse
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from safetensors.numpy import load_file
from torch import Tensor

from ..bases import ByScore
from ..core.cache import model_fingerprint
from ..core.method import Method, naming
from ..data.columns import ROW_NUMBER
from ..data.files import replacing, save_arrays
from ..signals.kto_batch import KTOBatch
from ..signals.pair_batch import PairBatch, RewardBatch
from ..trainer.kinds import KINDS
from . import COMMANDS, TRAININGS
from .arguments import check_arguments, parse_arguments, read_config
from .train import build_trainer, prepare

logger = logging.getLogger(__name__)


def score_dataset(words: Sequence[str]) -> str:
    """
    Runs `dsel score --output_file FILE [--trainer KIND] [--config FILE] [--key value ...]`.

    The rows are measured in blocks, each of them over all processes; a block that is done is kept beside the file, and
    a further call goes on with the next.

    Args:
        words (`Sequence[str]`):
            The words after `dsel score`.

    Returns:
        `str`: what was written where.

    Raises:
        `ValueError`: for an unknown key, an existing file, a name that the dataset has already, or a method that has
            no scores before training.
    """
    asked, rest = _parser().parse_known_args(list(words))
    if asked.trainer not in KINDS:
        raise ValueError(f"trainer={asked.trainer!r} is none of {', '.join(TRAININGS)}.")
    if asked.block < 1:
        raise ValueError(f"block={asked.block!r} must be 1 or more.")
    output = Path(asked.output_file)
    if output.suffix != ".parquet":
        raise ValueError(f"output_file: {asked.output_file!r} must end in .parquet.")
    if output.exists():
        raise ValueError(f"output_file: {asked.output_file!r} exists; nothing was overwritten.")
    config = read_config(asked.config) if asked.config else {}
    # Caches of methods lie beside the file, and no trainer leaves a folder of its own.
    work = output.with_name(f".{output.name}.parts")
    arguments = parse_arguments(asked.trainer, [*rest, "--output_dir", str(work)], config, asked.config or "")
    check_arguments(arguments)
    arguments.training.report_to = []
    job = prepare(arguments)
    if not isinstance(job.train_dataset, Dataset):
        raise ValueError("dsel score reads a dataset more than once: load it without streaming.")
    trainer = build_trainer(job, arguments.training, arguments.selection or [{"name": "uniform"}])
    scorer = _Scorer(trainer, work, asked.block, len(job.train_dataset))
    table = scorer.table(values=not asked.no_values, methods=bool(arguments.selection))
    if not trainer.accelerator.is_main_process:
        return ""
    rows = job.train_dataset.remove_columns([ROW_NUMBER])
    names = {name: asked.prefix + name for name in table}
    if taken := [name for name in names.values() if name in rows.column_names]:
        raise ValueError(f"The dataset has a column {taken[0]!r} already: give a --prefix for the new ones.")
    rows = Dataset.from_dict({"id": np.arange(len(rows))}) if asked.only_scores else rows
    for name, values in table.items():
        rows = rows.add_column(names[name], values)
    with replacing(output) as temporary:
        rows.to_parquet(str(temporary))
    shutil.rmtree(work, ignore_errors=True)
    unknown = int(np.isnan(next(iter(table.values()))).sum()) if table else 0
    left = f" ({unknown} rows that the trainer leaves out have none)" if unknown else ""
    return f"{len(rows)} rows with {', '.join(names.values())}{left}: {output}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsel score",
        description=f"{COMMANDS['score']}. All other arguments are a training's; `selection` names the methods.",
        allow_abbrev=False,
    )
    parser.add_argument("--output_file", required=True, help="the parquet file to write")
    parser.add_argument("--config", help="YAML file of a training's arguments")
    parser.add_argument("--trainer", default="dpo", help=f"how rows are read: {', '.join(TRAININGS)} (default: dpo)")
    parser.add_argument("--block", type=int, default=4096, help="rows that are measured between two saves")
    parser.add_argument("--prefix", default="", help="put before the names of the new columns")
    parser.add_argument("--only_scores", action="store_true", help="write ids and scores without the rows")
    parser.add_argument("--no_values", action="store_true", help="only the methods' scores: no log-probabilities")
    return parser


def batch_values(batch: Any) -> dict[str, Tensor]:
    """
    What a measured batch says of each of its examples, `(B,)` each: sums of log-probabilities over the trained tokens,
    rewards (`beta` times the log-ratio to the reference; a reward model's own), margin, loss and length in tokens.
    """
    values: dict[str, Tensor] = {}
    if isinstance(batch, RewardBatch):
        values["reward_chosen"], values["reward_rejected"] = batch.rewards
        values["implicit_margin"] = batch.implicit_margin
    elif isinstance(batch, PairBatch):
        values = {"chosen_logps": batch.policy_chosen_logps, "rejected_logps": batch.policy_rejected_logps}
        values |= {"ref_chosen_logps": batch.ref_chosen_logps, "ref_rejected_logps": batch.ref_rejected_logps}
        for side in ("chosen", "rejected"):
            ratio = values[f"{side}_logps"] - values[f"ref_{side}_logps"]
            values[f"reward_{side}"] = batch.settings.beta * ratio
        values["implicit_margin"] = batch.implicit_margin
    elif isinstance(batch, KTOBatch):
        values = {"logps": batch.policy_logps, "ref_logps": batch.ref_logps, "reward": batch.rewards}
    else:
        values["logps"] = batch.policy_logps
    return {**values, "loss": batch.loss, "tokens": batch.lengths.float()}


class _Scorer:
    """
    Measures the rows of a trainer that is not trained.

    Args:
        trainer:
            The trainer, with a selection.
        folder (`Path`):
            Where finished blocks are kept.
        block (`int`):
            Rows of a block.
        size (`int`):
            Rows of the user's dataset.
    """

    def __init__(self, trainer: Any, folder: Path, block: int, size: int) -> None:
        self.trainer, self.folder, self.block, self.size = trainer, folder, block, size
        self.callback = trainer.selection

    def table(self, values: bool, methods: bool) -> dict[str, np.ndarray]:
        """Values by column of every row of the user's dataset, NaN where the trainer has dropped it."""
        callback = self.callback
        callback.begin_run(None)
        run = callback.run
        run.model = self.trainer.model
        positions = run.rows.positions
        if len(np.unique(positions)) < len(positions):
            raise ValueError("The trainer makes several examples of a row: unpair the dataset, or use --trainer dpo.")
        found: dict[str, np.ndarray] = {}
        if values:
            found.update(self._in_blocks("values", batch_values))
        for method in callback.methods.methods if methods else []:
            with naming(method):
                scores = self._of_method(method)
            if clash := sorted(found.keys() & scores.keys()):
                raise ValueError(f"{method.name!r} has scores of the name {clash[0]!r}, which is taken: --no_values.")
            found.update(scores)
        full = {name: np.full(self.size, np.nan, dtype=np.float32) for name in found}
        for name, column in full.items():
            column[positions] = found[name]
        return full

    def _of_method(self, method: Method) -> dict[str, np.ndarray]:
        """The scores of one method: what it measures before training, or what it would write of each batch."""
        run = self.callback.run
        method.begin(run)
        known = method.scores(run) if isinstance(method, ByScore) else np.empty(0)
        if np.isfinite(known).any():
            return {method.name: known.astype(np.float32)}
        if "score" in method.hooks:

            def scored(batch: Any) -> dict[str, Tensor]:
                scores = method.score(batch)
                return scores if isinstance(scores, dict) else {method.name: scores}

            return self._in_blocks(method.name, scored, method.describe())
        if "select" in method.hooks:
            run.decision = None
            mask = method.select(run)
            scores = run.decision.scores if run.decision is not None else mask
            if scores is not None:
                return {method.name: np.asarray(scores, dtype=np.float32)}
        raise ValueError(f"{method.name!r} has no score of a row before training: leave it out.")

    def _in_blocks(
        self, what: str, measure: Callable[[Any], dict[str, Tensor]], parameters: Any = None
    ) -> dict[str, np.ndarray]:
        run, names = self.callback.run, []  # type: Any, list[str]
        told = [what, parameters, run.rows.fingerprint(), model_fingerprint(run.model), self.block, run.seed]
        key = hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:12]
        parts: list[dict[str, np.ndarray]] = []

        def stacked(batch: Any) -> Tensor:
            values = measure(batch)
            names[:] = list(values)
            return torch.stack([value.float() for value in values.values()], dim=1)

        for start in range(0, run.size, self.block):
            file = self.folder / f"{what}-{key}-{start}.safetensors"
            part = run.passes.everywhere(lambda file=file: load_file(file) if file.is_file() else None)
            if part is None:
                ids = np.arange(start, min(start + self.block, run.size))
                description = f"Scoring {what}, rows {start}-{ids[-1]}"
                # Every process runs a batch, if only for company: all of them know the names.
                values = run.passes.measure(stacked, ids, description=description)
                part = {name: values[:, i].copy() for i, name in enumerate(names)}
                if run.passes.rank == 0:
                    save_arrays(file, part)
            parts.append(part)
        return {name: np.concatenate([part[name] for part in parts]) for name in sorted(parts[0])}
