"""What an ablation varies: the block `ablate:` of a YAML file, and the options of the same names."""

import argparse
from dataclasses import dataclass, field
from typing import Any

from ..core.parameters import check_choice, nearest
from ..trainer.kinds import KINDS
from . import COMMANDS, TRAININGS
from .arguments import read_selection, read_yaml

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


def grid_parser() -> argparse.ArgumentParser:
    """Of the options of `dsel ablate`."""
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


def read_grid(block: Any, asked: argparse.Namespace, config: dict[str, Any]) -> Grid:
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
    if not grid.seeds:
        raise ValueError("seeds=[]: give at least one, such as 0,1,2.")
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
