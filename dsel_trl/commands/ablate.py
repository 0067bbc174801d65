"""`dsel ablate`: stock, random and several methods on the same data, several seeds, and a table of what came out."""

import argparse
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..core.parameters import check_choice, nearest
from ..data.columns import TRUTH_PREFIX
from ..data.fingerprints import dataset_fingerprint
from ..report.ablation import Row, table_of, write_tables
from ..trainer.kinds import KINDS
from . import COMMANDS, TRAININGS
from .ablation_cells import Cell
from .ablation_workers import Pool, result_of
from .arguments import check_arguments, parse_arguments, read_config, read_selection, read_yaml
from .train import TrainingFailed, make_methods, prepare

logger = logging.getLogger(__name__)

# Letters of a failure that are said again at the end.
SAID = 120
EQUAL = ("steps", "tokens", "flops")


@dataclass
class Grid:
    """
    What an ablation varies: the block `ablate:` of a YAML file, and the options of the same names.

    Args:
        trainer (`str`, *optional*, defaults to `"dpo"`):
            Kind of trainer.
        methods (`dict[str, list[dict]]`):
            The methods of each variant by the name it has in the table.
        seeds (`list[int]`, *optional*, defaults to `[0, 1, 2, 3, 4]`):
            Seeds of training and selection.
        flip (`list[float]`, *optional*):
            Shares of the training pairs whose labels are turned; without it the data is what it is.
        keep (`list[float]`, *optional*):
            Shares to keep: each variant is run with each of them.
        equal (`str`, *optional*, defaults to `"steps"`):
            What is equal beside the data: optimizer steps, trained `tokens`, or `flops` with all of selection's cost.
        metric (`str`, *optional*):
            A key of the trainer's evaluation, or `module:function` of the trainer; by default the trainer's own.
        random (`bool`, *optional*, defaults to `True`):
            Whether a random choice of each share that a method kept is run beside it.
        workers (`int`, *optional*, defaults to `1`):
            Trainings at once.
        threads (`int`, *optional*, defaults to `1`):
            Threads of torch in each: with another number sums are rounded otherwise.
        launch (`str`, *optional*):
            Launches each training, such as `accelerate launch --num_processes 2`.
    """

    trainer: str = "dpo"
    methods: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    flip: list[float] | None = None
    keep: list[float] | None = None
    equal: str = "steps"
    metric: str | None = None
    random: bool = True
    workers: int = 1
    threads: int = 1
    launch: str = ""

    def variants(self) -> dict[str, list[dict[str, Any]]]:
        """The methods by name, with each of the shares of `keep`."""
        if self.keep is None:
            return self.methods
        return {
            f"{name} keep={keep:g}": [{**selection[0], "keep": keep}, *selection[1:]]
            for name, selection in self.methods.items()
            for keep in self.keep
        }


def run_ablation(words: Sequence[str]) -> str:
    """
    Runs `dsel ablate --config FILE [--methods a,b] [--seeds 0,1,2] [--key value ...]`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel ablate`.

    Returns:
        `str`: the table, and where it was written.

    Raises:
        `ValueError`: for anything that cannot be; nothing has been trained then.
        `TrainingFailed`: at the end, if a cell failed; the table has been written, and names it.
    """
    ablation = Ablation(words)
    rows, failures = ablation.run()
    table = table_of(rows, ablation.grid.metric)
    files = write_tables(ablation.folder, rows, ablation.grid.metric, failures)
    text = "\n".join(["", table, *(f"Table: {file}" for file in files)])
    if not failures:
        return text
    print(text, flush=True)
    named = "; ".join(f"{name} ({why[:SAID]})" for name, why in failures.items())
    raise TrainingFailed(f"{len(failures)} cells failed and are missing from the table: {named}")


class Ablation:
    """An ablation as it was asked for: checked, with a folder of its own."""

    def __init__(self, words: Sequence[str]) -> None:
        asked, rest = _parser().parse_known_args(list(words))
        self.origin = asked.config or ""
        config = read_config(asked.config) if asked.config else {}
        self.grid = _grid(config.pop("ablate", None) or {}, asked, config)
        arguments = self._checked(config, rest)
        self.folder = Path(arguments.training.output_dir)
        job = prepare(arguments)
        self.data = [_fingerprint(job.train_dataset), _fingerprint(job.eval_dataset)]
        # The built-in model is made once, by the loading above.
        self.config = {**config, "model_name_or_path": job.model}
        self.words = _without(rest, "--output_dir", "--model_name_or_path")

    def _checked(self, config: dict[str, Any], rest: Sequence[str]) -> Any:
        grid = self.grid
        config.pop("selection", None)
        arguments = parse_arguments(grid.trainer, rest, config, self.origin)
        check_arguments(arguments)
        if arguments.training.resume_from_checkpoint:
            raise ValueError("An ablation goes on by itself where it was: leave out resume_from_checkpoint.")
        for name, selection in grid.variants().items():
            for method in make_methods(selection):
                if grid.trainer not in method.trainers:
                    own = list(method.trainers)
                    raise ValueError(f"{name!r}: {method.name!r} works with {own}, not with {grid.trainer!r}.")
        arguments.evaluates = True
        return arguments

    # ---- The cells ----

    def run(self) -> tuple[list[Row], dict[str, str]]:
        """Runs what is not finished; the rows of the table, and how cells failed by their names."""
        grid = self.grid
        with Pool(self.folder, workers=grid.workers, threads=grid.threads, launch=grid.launch) as pool:
            return self._run(pool)

    def _run(self, pool: Pool) -> tuple[list[Row], dict[str, str]]:
        grid = self.grid
        flips: list[float | None] = [*grid.flip] if grid.flip else [None]
        places = [(flip, seed) for flip in flips for seed in grid.seeds]
        failures: dict[str, str] = {}
        found: dict[tuple[str, float | None, int], dict[str, Any]] = {}

        def run(cells: list[Cell], what: str) -> None:
            if not cells:
                return
            for cell, why in zip(cells, pool.run(cells, what), strict=True):
                result = result_of(self.folder / "cells" / cell.folder_name)
                if why or result is None:
                    failures[cell.name] = why
                    found.pop((cell.variant, cell.flip, cell.seed), None)
                else:
                    found[cell.variant, cell.flip, cell.seed] = {**result, **self._seconds(cell)}

        def run_at_equal(variants: list[tuple[str, list[dict[str, Any]], float | None, int]], what: str) -> None:
            """Cells with the steps of stock; where something else is equal, again with as many as make it so."""
            cells = []
            for name, selection, flip, seed in variants:
                stock = found.get(("stock", flip, seed))
                if stock is None:
                    failures[self._cell(name, selection, flip, seed).name] = "stock failed, so its steps are not known"
                else:
                    cells.append(replace(self._cell(name, selection, flip, seed), steps=stock["steps"]))
            run(cells, what)
            if grid.equal == "steps":
                return
            again = []
            for cell in cells:
                key = (cell.variant, cell.flip, cell.seed)
                if key not in found:
                    continue
                try:
                    steps = equal_steps(found[key], found["stock", cell.flip, cell.seed], grid.equal)
                except ValueError as error:
                    failures[cell.name] = str(error)
                    del found[key]
                    continue
                again.append(replace(cell, steps=steps))
            run(again, f"{what}, equal {grid.equal}")

        run([self._cell("stock", [], flip, seed) for flip, seed in places], "stock")
        variants = grid.variants()
        run_at_equal([(n, s, flip, seed) for n, s in variants.items() for flip, seed in places], "methods")
        shares = {} if not grid.random else self._shares(variants, flips, found)
        controls = {place: f"random keep={share:g}" for place, share in shares.items()}
        wanted = dict.fromkeys((controls[name, flip], share, flip) for (name, flip), share in shares.items())
        chosen = [(n, [{"name": "random", "keep": s}], flip, seed) for n, s, flip in wanted for seed in grid.seeds]
        run_at_equal(chosen, "random")
        rows = []
        for flip in flips:
            for name in ["stock", *variants, *sorted(name for name, _, where in wanted if where == flip)]:
                results = [found[name, flip, seed] for seed in grid.seeds if (name, flip, seed) in found]
                failed = [seed for seed in grid.seeds if (name, flip, seed) not in found]
                rows.append(Row(name, flip, results, failed, controls.get((name, flip))))
        return rows, failures

    @staticmethod
    def _shares(variants: Any, flips: list[float | None], found: Any) -> dict[tuple[str, float | None], float]:
        """The share that each variant kept, on average over the seeds, where it left something out."""
        shares = {}
        for name in variants:
            for flip in flips:
                kept = [result["kept_fraction"] for place, result in found.items() if place[:2] == (name, flip)]
                share = round(sum(kept) / len(kept), 3) if kept else 1.0
                if 0 < share < 1:
                    shares[name, flip] = share
        return shares

    def _cell(self, name: str, selection: list[dict[str, Any]], flip: float | None, seed: int) -> Cell:
        return Cell(
            kind=self.grid.trainer,
            variant=name,
            selection=selection,
            seed=seed,
            flip=flip,
            steps=None,
            config=self.config,
            words=self.words,
            metric=str(self.grid.metric),
            data=self.data,
            threads=self.grid.threads,
        )

    def _seconds(self, cell: Cell) -> dict[str, float]:
        file = self.folder / "cells" / cell.folder_name / "seconds.json"
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found


def equal_steps(result: dict[str, Any], stock: dict[str, Any], equal: str) -> int:
    """
    Optimizer steps with which a method takes as many trained tokens, or as much computation, as stock.

    Args:
        result, stock (`dict`):
            What came of a cell with equal steps, and of stock.
        equal (`str`):
            `"tokens"` or `"flops"`; these hold the training and all that selection adds, of which the part before the
            first step does not grow with the steps.

    Raises:
        `ValueError`: if selection alone, before the first step, costs as much as stock's training.
    """
    if equal == "tokens":
        return max(1, round(stock["tokens"] / (result["tokens"] / result["steps"])))
    budget = stock["training_flops"] - result["selection_flops_at_start"]
    if budget <= 0:
        raise ValueError(
            f"before its first step it costs {result['selection_flops_at_start'] / stock['training_flops']:.1f} times "
            "what the whole stock training does: at equal flops nothing is left to train with"
        )
    later = result["selection_flops"] - result["selection_flops_at_start"]
    return max(1, round(budget / ((result["training_flops"] + later) / result["steps"])))


# ---- What was asked for ----


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsel ablate",
        description=f"{COMMANDS['ablate']}. All other arguments are those of the training.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of a training's arguments, with a block `ablate:` or without")
    parser.add_argument("--trainer", help=f"kind of trainer: {', '.join(TRAININGS)} (default: dpo)")
    methods = "names, or a YAML mapping of names to lists of methods (default: what `selection:` says)"
    parser.add_argument("--methods", help=methods)
    parser.add_argument("--seeds", help="such as 0,1,2 (default: 0,1,2,3,4)")
    parser.add_argument("--keep", help="shares to keep, such as 0.2,0.5: each method is run with each")
    parser.add_argument("--flip", help="shares of the training pairs whose labels are turned, such as 0,0.2,0.4")
    parser.add_argument("--equal", help=f"what is equal beside the data: {', '.join(EQUAL)} (default: steps)")
    parser.add_argument("--metric", help="key of the trainer's evaluation, or module:function of the trainer")
    parser.add_argument("--workers", type=int, help="trainings at once (default: 1)")
    parser.add_argument("--threads", type=int, help="threads of torch in each (default: 1)")
    parser.add_argument("--launch", help="launches each training, such as 'accelerate launch --num_processes 2'")
    parser.add_argument("--no_random", action="store_true", help="leave out the random choices of the same share")
    return parser


def _grid(block: Any, asked: argparse.Namespace, config: dict[str, Any]) -> Grid:
    if not isinstance(block, dict):
        raise ValueError(f"`ablate` must be a mapping, got {block!r}.")
    known = list(Grid.__dataclass_fields__)
    if unknown := [key for key in block if key not in known]:
        raise ValueError(f"ablate: unknown key {unknown[0]!r}.{nearest(str(unknown[0]), known)}")
    given = {key: value for key in known if (value := getattr(asked, key, None)) is not None}
    values = {**block, **given}
    if asked.no_random:
        values["random"] = False
    for name in ("seeds", "keep", "flip"):
        if name in values:
            values[name] = _numbers(name, values[name], int if name == "seeds" else float)
    methods = values.pop("methods", None)
    if methods is None and config.get("selection"):
        methods = {"selection": config["selection"]}
    grid = Grid(methods=_methods(methods), **values)
    check_choice("trainer", grid.trainer, tuple(KINDS))
    check_choice("equal", grid.equal, EQUAL)
    for name in ("workers", "threads"):
        if not isinstance(getattr(grid, name), int) or getattr(grid, name) < 1:
            raise ValueError(f"{name}={getattr(grid, name)!r} must be 1 or more.")
    for name in ("keep", "flip"):
        if any(not (0 < v <= 1 if name == "keep" else 0 <= v <= 1) for v in getattr(grid, name) or []):
            raise ValueError(f"{name}={getattr(grid, name)} must be shares, up to 1.")
    if grid.metric is None:
        grid.metric = KINDS[grid.trainer].measure.key
    return grid


def _numbers(name: str, value: Any, kind: type) -> list[Any]:
    parts = value if isinstance(value, list) else [value] if not isinstance(value, str) else value.split(",")
    try:
        return list(dict.fromkeys(kind(part) for part in parts))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be numbers, such as 0,1,2.") from error


def _methods(value: Any) -> dict[str, list[dict[str, Any]]]:
    """Variants by name: from names, from a list of methods, or from a mapping."""
    if isinstance(value, str):
        parsed = read_yaml(value, "--methods")
        value = [word.strip() for word in value.split(",")] if isinstance(parsed, str) else parsed
    if not value:
        raise ValueError("Which methods? Give --methods a,b, or `methods:` under `ablate:`, or a block `selection:`.")
    if isinstance(value, list):
        value = {entry if isinstance(entry, str) else str(entry.get("name")): entry for entry in value}
    found = {}
    for name, entry in value.items():
        if str(name) == "stock":
            raise ValueError("'stock' is always run: give a method another name.")
        empty = entry is None or isinstance(entry, str)
        found[str(name)] = read_selection({"name": entry or str(name)} if empty else entry)
    return found


def _fingerprint(rows: Any) -> str:
    """Hash of the values of rows; a stream's are not known."""
    if not isinstance(rows, Dataset):
        return "stream"
    return dataset_fingerprint(rows, [name for name in rows.column_names if not name.startswith(TRUTH_PREFIX)])


def _without(words: Sequence[str], *options: str) -> list[str]:
    """The words less some options with their one value."""
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not any(word.startswith(f"{option}=") for option in options):
            kept.append(word)
    return kept
