"""What `dsel audit` is asked for, and what of it can be had."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import torch

from ..core.parameters import check_choice, check_whole
from ..scorers.label_audit import SIGNALS, AuditSettings

MODEL_SIGNALS = ("statistics", "states")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class AuditArguments:
    """What is audited, by which model, and where the answers go."""

    dataset_name: str = field(metadata={"help": "A parquet, jsonl or csv file, a folder, a hub id, or `demo`."})
    output_dir: str = field(metadata={"help": "Folder for audit.parquet, audit.html, audit.json and unfinished work."})
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Causal language model: a folder, a hub id or `demo`; without it texts alone count."},
    )
    dataset_split: str = field(default="train", metadata={"help": "Split to audit."})
    signals: list[str] | None = field(
        default=None, metadata={"help": f"Any of {', '.join(SIGNALS)}; by default all that can be had."}
    )
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and response; longer ones are cut."})
    template: str = field(
        default="auto", metadata={"help": "Chat template around prompts: auto (where there is one), always, never."}
    )
    dtype: str = field(default="auto", metadata={"help": f"Precision of the model: {', '.join(DTYPES)}."})
    device: str | None = field(default=None, metadata={"help": "Where the model runs; a GPU if there is one."})
    score_chosen_column: str | None = field(
        default=None, metadata={"help": "Scores of the chosen responses: pairs where they and the audit disagree."}
    )
    score_rejected_column: str | None = field(default=None, metadata={"help": "Scores of the rejected responses."})
    difference_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Numeric columns to judge by as well, each a difference chosen minus rejected that knows nothing "
            "of the pair's own label: margins of a held-out helper, influence on trusted pairs."
        },
    )
    noise_rate: float | None = field(
        default=None, metadata={"help": "Share of wrong labels where it is known; else it is estimated."}
    )
    folds: int = field(default=10, metadata={"help": "Folds: each label is judged by models of the others."})
    trees: int = field(default=200, metadata={"help": "Randomised trees per fold."})
    workers: int = field(default=1, metadata={"help": "Threads that grow them; the result does not depend on it."})
    seed: int = field(default=0, metadata={"help": "Seed of folds and trees."})
    page_rows: int = field(default=500, metadata={"help": "Pairs on the HTML page, from the most suspicious on."})
    cleaned_file: str | None = field(
        default=None, metadata={"help": "Parquet file to write with the suggested drops and flips done."}
    )


def settings_of(asked: AuditArguments) -> tuple[AuditSettings, list[str]]:
    """Errors before anything is read; settles the signals. Returns what cannot be had as well."""
    check_whole("max_length", asked.max_length, 2)
    check_whole("page_rows", asked.page_rows, 0)
    check_choice("template", asked.template, ("auto", "always", "never"))
    check_choice("dtype", asked.dtype, tuple(DTYPES))
    if (asked.score_chosen_column is None) != (asked.score_rejected_column is None):
        raise ValueError("score_chosen_column and score_rejected_column go together: give both or neither.")
    if asked.cleaned_file is not None and Path(asked.cleaned_file).exists():
        raise ValueError(f"cleaned_file: {asked.cleaned_file!r} exists; nothing was overwritten.")
    signals, notes = tuple(SIGNALS if asked.signals is None else asked.signals), []
    missing = [signal for signal in signals if signal in MODEL_SIGNALS]
    if asked.model_name_or_path is None and missing:
        if asked.signals is not None:
            raise ValueError(f"signals={missing} need a model: set --model_name_or_path.")
        signals = tuple(signal for signal in signals if signal not in MODEL_SIGNALS)
        notes.append(
            f"Not measured without --model_name_or_path: {', '.join(missing)}, and what truncation makes equal."
        )
    if asked.signals is None and find_spec("sklearn") is None:
        signals = tuple(signal for signal in signals if signal != "trees")
        notes.append('No trees without scikit-learn (pip install "dsel-trl[audit]"): the linear model judges alone.')
    names = ("folds", "noise_rate", "trees", "seed", "workers")
    return AuditSettings(signals, **{name: getattr(asked, name) for name in names}), notes
