"""`dsel value`: what examples, or groups of them, are worth: Data Shapley, and whether to trust it."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset
from transformers import HfArgumentParser

from ..core.parameters import check_range, check_whole
from ..data.columns import text_codes
from ..data.files import write_json
from ..data.loading import check_rows, load_splits, take_split
from ..data.value_table import write_values
from ..functional.influence.linear_probe import ProbeGame
from ..functional.kmeans import kmeans
from ..scorers.probe_features import FORMS, ProbeRows, probe_rows, scaled
from ..scorers.shapley_values import ShapleySettings, ShapleyValues, shapley_values

SHOWN = 20


@dataclass
class ValueArguments:
    """What is valued, by which held-out examples, and how."""

    dataset_name: str = field(metadata={"help": "A parquet, jsonl or csv file, a folder, a hub id, or `demo`."})
    output_dir: str = field(metadata={"help": "Folder for values.parquet, value.json and unfinished work."})
    dataset_split: str = field(default="train", metadata={"help": "Split to value."})
    target: str | None = field(
        default=None, metadata={"help": "Held-out examples that say what is worth something; default the dataset."}
    )
    target_split: str | None = field(
        default=None, metadata={"help": "Their split: default `train` of a target, `test` of the dataset."}
    )
    group_column: str | None = field(
        default=None, metadata={"help": "Value groups of examples instead: those equal in this column."}
    )
    clusters: int | None = field(
        default=None, metadata={"help": "Value so many clusters of what the probe sees instead of examples."}
    )
    embedding_column: str | None = field(
        default=None, metadata={"help": "Lists of numbers that the probe sees instead of hashed words."}
    )
    features: int = field(default=64, metadata={"help": "Numbers that stand for a text."})
    ridge: float = field(default=10.0, metadata={"help": "Penalty of the probe, as strong as so many examples."})
    keep: float = field(
        default=0.5, metadata={"help": "Share of the players to be kept later: what the test of trust is about."}
    )
    exact_up_to: int = field(default=10, metadata={"help": "With so many players or fewer every set is valued."})
    permutations: int = field(default=500, metadata={"help": "Most orders of the players that are walked."})
    error: float = field(default=0.05, metadata={"help": "Mean relative change over 100 orders that is small enough."})
    tolerance: float = field(
        default=0.01, metadata={"help": "Share of the full worth that is no difference; 0 never ends an order early."}
    )
    patience: int = field(default=5, metadata={"help": "So many sets in a row without a difference end an order."})
    seed: int = field(default=0, metadata={"help": "Seed of orders, of the test's sets and of clusters."})


def value_dataset(words: Sequence[str]) -> str:
    """
    Runs `dsel value DATASET --output_dir FOLDER [--key value ...]`.

    A set of examples is worth what a linear probe that is trained on it takes off the held-out error. Finished parts
    are kept in the folder: after a kill, the same words go on from them.

    Args:
        words (`Sequence[str]`):
            The words after `dsel value`.

    Returns:
        `str`: whether to trust the values, the values, and where they are written.

    Raises:
        `ValueError`: for an unknown key, a dataset without pairs or completions, or a target of another format.
        `ImportError`: for `clusters` without scikit-learn.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words = ["--dataset_name", *words]
    parser = HfArgumentParser(ValueArguments, prog="dsel value", allow_abbrev=False)  # type: ignore[arg-type]
    asked, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown argument {unknown[0]!r} of `dsel value`. See `dsel value --help`.")
    return _value(asked)


def _check(asked: ValueArguments) -> None:
    check_whole("features", asked.features, 1, 4096)
    check_whole("exact_up_to", asked.exact_up_to, 0, 20)
    check_whole("permutations", asked.permutations, 1)
    check_whole("patience", asked.patience, 1)
    check_range("keep", asked.keep, 0, 1, open_low=True)
    check_range("tolerance", asked.tolerance, 0, 1)
    check_range("error", asked.error, 0, 1)
    if asked.clusters is not None:
        check_whole("clusters", asked.clusters, 2)
        if asked.group_column is not None:
            raise ValueError(f"group_column={asked.group_column!r} and clusters={asked.clusters}: give one of them.")


def _value(asked: ValueArguments) -> str:
    _check(asked)
    dataset, target = _datasets(asked)
    own, held = (probe_rows(rows, asked.features, asked.embedding_column) for rows in (dataset, target))
    own, held = scaled(own, held, paired="chosen" in dataset.column_names)
    names, players = _players(asked, dataset, own)
    game = ProbeGame(*own, *held, players, asked.ridge)
    settings = ShapleySettings(**{name: getattr(asked, name) for name in ShapleySettings.__dataclass_fields__})
    output = Path(asked.output_dir)
    work = output / "unfinished"
    found = shapley_values(game, settings, work, _fingerprint(own, held, players, asked.ridge))
    each = (found.values / game.sizes)[players]
    grouped = len(names) < len(dataset) or asked.group_column is not None
    write_values(output / "values.parquet", each, [names[player] for player in players] if grouped else None)
    write_json(output / "value.json", _summary(asked, found, names, game.sizes))
    shutil.rmtree(work, ignore_errors=True)
    files = [f"Values: {output / 'values.parquet'}", f"Summary: {output / 'value.json'}"]
    return "\n".join([*_facts(asked, found, game), *_table(found.values, names, game.sizes), *files])


def _datasets(asked: ValueArguments) -> tuple[Dataset, Dataset]:
    """What is valued and what is held out, in the same format."""
    splits = load_splits(asked.dataset_name)
    dataset = take_split(splits, asked.dataset_split, asked.dataset_name, "dataset_split")
    check_rows(dataset, asked.dataset_name, FORMS, "dsel value")
    name = asked.dataset_name if asked.target is None else asked.target
    split = asked.target_split or ("test" if asked.target is None else "train")
    if asked.target is None and split == asked.dataset_split:
        raise ValueError(f"target_split={split!r} is what is valued itself: name another split, or a --target.")
    target = take_split(splits if asked.target is None else load_splits(name), split, name, "target_split")
    form = next(form for form in FORMS if set(form) <= set(dataset.column_names))
    check_rows(target, name, [form], "dsel value")
    return dataset, target


def _players(asked: ValueArguments, dataset: Dataset, rows: ProbeRows) -> tuple[list[str], np.ndarray]:
    """Names of the players, and the player of each row."""
    if asked.group_column is not None:
        return text_codes(dataset, asked.group_column)
    if asked.clusters is not None:
        if asked.clusters > len(dataset):
            raise ValueError(f"clusters={asked.clusters} is more than the {len(dataset)} rows of the dataset.")
        found, _ = kmeans(rows.inputs, asked.clusters, seed=asked.seed)
        kept, players = np.unique(found, return_inverse=True)
        return [f"cluster {cluster}" for cluster in kept], players
    return [f"row {row}" for row in range(len(dataset))], np.arange(len(dataset))


def _fingerprint(own: ProbeRows, held: ProbeRows, players: np.ndarray, ridge: float) -> str:
    digest = hashlib.sha256(repr(ridge).encode())
    for part in (*own, *held, players):
        digest.update(repr(part.shape).encode() + np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()


def _facts(asked: ValueArguments, found: ShapleyValues, game: ProbeGame) -> list[str]:
    how = (
        f"exact, {found.valued} sets"
        if found.exact
        else f"{found.orders} orders, {found.valued} sets, moved {found.moved:.3f} over the last 100"
    )
    lines = [
        f"Can a selection of {found.trust.size} of {len(game)} players by these values be trusted? {found.trust}",
        f"Worth of all: {found.full:.4f} of held-out squared error taken off",
        f"Values: {how}",
    ]
    if not found.exact and not found.moved < asked.error:
        lines.append(f"They still move: more --permutations than {asked.permutations} would settle them.")
    if found.full <= 0:
        lines.append("The probe learns nothing from this data that helps on the target: the values say little.")
    return lines


def _table(values: np.ndarray, names: list[str], sizes: np.ndarray) -> list[str]:
    """The players, best first; of many the best and the worst."""
    order = np.argsort(-values, kind="stable")
    cut = len(order) > SHOWN
    shown = np.concatenate([order[: SHOWN // 2], order[-(SHOWN // 2) :]]) if cut else order
    width = max(len(names[player]) for player in shown)
    lines = [f"{'player':<{width}}  {'rows':>7}  {'value':>11}  {'per row':>11}"]
    for place, player in enumerate(shown.tolist()):
        if cut and place == SHOWN // 2:
            lines.append(f"... {len(order) - SHOWN} more")
        value, size = values[player], sizes[player]
        lines.append(f"{names[player]:<{width}}  {size:>7}  {value:>11.6f}  {value / size:>11.6f}")
    return lines


def _summary(asked: ValueArguments, found: ShapleyValues, names: list[str], sizes: np.ndarray) -> dict[str, object]:
    numbers = {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in asdict(found.trust).items()
    }
    return {
        "settings": asdict(asked),
        "trust": numbers,
        "worth_of_all": found.full,
        "exact": found.exact,
        "orders": found.orders,
        "sets_valued": found.valued,
        "moved": found.moved if np.isfinite(found.moved) else None,
        "players": [
            {"name": name, "rows": int(size), "value": float(value)}
            for name, size, value in zip(names, sizes, found.values, strict=True)
        ],
    }
