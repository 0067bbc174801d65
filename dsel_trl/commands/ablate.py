"""`dsel ablate`: stock, random and several methods on the same data, several seeds, and a table of what came out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..data.columns import TRUTH_PREFIX
from ..data.fingerprints import dataset_fingerprint
from ..report.ablation import Row, table_of, write_tables
from .ablation_cells import Cell
from .ablation_grid import grid_parser, read_grid
from .ablation_results import Results
from .ablation_workers import Pool
from .arguments import check_arguments, parse_arguments, read_config
from .train import TrainingFailed, make_methods, prepare

# Letters of a failure that are said again at the end.
SAID = 120


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
        asked, rest = grid_parser().parse_known_args(list(words))
        self.origin = asked.config or ""
        config = read_config(asked.config) if asked.config else {}
        self.grid = read_grid(config.pop("ablate", None) or {}, asked, config)
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
        cells = Results(pool, self.folder)
        cells.run([self._cell("stock", [], flip, seed) for flip, seed in places], "stock")
        variants, found = grid.variants(), cells.found
        # Variant after variant of one seed: those that share scores of no seed then seldom wait for each other.
        wanted = [self._cell(name, s, flip, seed) for flip, seed in places for name, s in variants.items()]
        cells.run_at_equal(wanted, grid.equal, "methods")
        shares = {} if not grid.random else self._shares(variants, flips, found)
        controls = {place: f"random keep={share:g}" for place, share in shares.items()}
        randoms = dict.fromkeys((controls[name, flip], share, flip) for (name, flip), share in shares.items())
        chosen = [
            self._cell(name, [{"name": "random", "keep": share}], flip, seed)
            for name, share, flip in randoms
            for seed in grid.seeds
        ]
        cells.run_at_equal(chosen, grid.equal, "random")
        rows = []
        for flip in flips:
            for name in ["stock", *variants, *sorted(name for name, _, where in randoms if where == flip)]:
                results = [found[name, flip, seed] for seed in grid.seeds if (name, flip, seed) in found]
                failed = [seed for seed in grid.seeds if (name, flip, seed) not in found]
                rows.append(Row(name, flip, results, failed, controls.get((name, flip))))
        return rows, cells.failures

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
