"""`dsel audit`: which labels of a preference dataset are probably wrong, and which pairs teach nothing."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ..core.parameters import check_choice, check_whole
from ..data.columns import numeric_column
from ..data.files import replacing, write_json
from ..data.loading import check_rows, load_splits, take_split
from ..data.pairs import PairTexts, PairTokens
from ..functional.audit.label_noise import area_under_curve
from ..functional.audit.pair_texts import compared_elsewhere, groups_of, relevance, repeats
from ..functional.ranking import zscore
from ..report.audit_page import write_audit_page
from ..scorers.label_audit import (
    FEWEST_PAIRS,
    SIGNALS,
    AuditSettings,
    LabelAudit,
    PairFeatures,
    audit_labels,
    single_signals,
)
from ..scorers.pair_features import measure_pairs
from ..scorers.pair_verdicts import DROP, FLIP, KEEP, REVIEW, Thresholds, Verdicts, judge
from ..scorers.responses import DEPTHS, ResponseReader

MODEL_SIGNALS = ("statistics", "states")
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class AuditArguments:
    """What is audited, by which model, and where the answers go."""

    dataset_name: str = field(metadata={"help": "A parquet, jsonl or csv file, a folder, a hub id, or `demo`."})
    output_dir: str = field(metadata={"help": "Folder for audit.parquet, audit.html, audit.json and unfinished work."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Causal language model, by folder or hub id; without it the texts are judged."}
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


def audit_file(words: Sequence[str]) -> str:
    """
    Runs `dsel audit DATASET --key value ...`.

    Args:
        words (`Sequence[str]`):
            The words after `dsel audit`.

    Returns:
        `str`: what was found, and where it is written.

    Raises:
        `ValueError`: for an unknown key, a dataset without pairs, a model that cannot be loaded, or a signal that was
            asked for and cannot be measured.
        `ImportError`: for the signal `trees` without scikit-learn.
    """
    words = list(words)
    if words and not words[0].startswith("-"):
        words = ["--dataset_name", *words]
    kinds: tuple[Any, ...] = (AuditArguments, Thresholds)
    parser = HfArgumentParser(kinds, prog="dsel audit", allow_abbrev=False)
    asked, thresholds, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        raise ValueError(f"Unknown argument {unknown[0]!r} of `dsel audit`. See `dsel audit --help`.")
    return _audit(asked, thresholds)


def _audit(asked: AuditArguments, thresholds: Thresholds) -> str:
    settings, notes = _settings(asked)
    dataset = take_split(load_splits(asked.dataset_name), asked.dataset_split, asked.dataset_name, "dataset_split")
    check_rows(dataset, asked.dataset_name, [("chosen", "rejected")], "dsel audit")
    output = Path(asked.output_dir)
    texts = PairTexts(dataset)
    prompts = texts.asked
    found = repeats(prompts, texts.chosen, texts.rejected)
    own, shared = relevance(prompts, texts.chosen, texts.rejected)
    compared = compared_elsewhere(prompts, texts.chosen, texts.rejected)
    more = _columns(dataset, asked.difference_columns)
    features = PairFeatures(groups_of(prompts), own, shared, compared, more=more)
    cut = found.identical
    if asked.model_name_or_path is not None:
        cut, lines = _read_pairs(features, texts, asked, settings, output)
        notes += lines
    unread = np.zeros(len(texts), dtype=bool) if features.lengths is None else (features.lengths == 0).any(axis=1)
    audit = _judged(features, settings, cut | found.identical | (found.duplicate >= 0), notes)
    disagreement = _disagreement(dataset, asked, audit)
    verdicts = judge(audit, found, cut, features.lengths, unread, thresholds, disagreement)
    table = _table(features, audit, verdicts, disagreement)
    with replacing(output / "audit.parquet") as temporary:
        Dataset.from_dict(table).to_parquet(str(temporary))
    facts = _facts(asked, audit, verdicts)
    write_json(output / "audit.json", _summary(asked, settings, thresholds, audit, features, verdicts, notes))
    _write_page(output / "audit.html", asked, texts, prompts, table, facts, audit, notes)
    lines = [f"{name}: {value}" for name, value in facts] + notes
    if asked.cleaned_file is not None:
        kept = _write_cleaned(dataset, verdicts, Path(asked.cleaned_file))
        lines.append(f"Cleaned copy: {asked.cleaned_file} ({kept} of {len(dataset)} pairs)")
    return "\n".join([*lines, f"Table: {output / 'audit.parquet'}", f"Page: {output / 'audit.html'}"])


def _settings(asked: AuditArguments) -> tuple[AuditSettings, list[str]]:
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


def _read_pairs(
    features: PairFeatures, texts: PairTexts, asked: AuditArguments, settings: AuditSettings, output: Path
) -> tuple[np.ndarray, list[str]]:
    """Adds what the model says; returns which pairs truncation makes equal, and remarks."""
    path = str(asked.model_name_or_path)
    device = asked.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "float32" if asked.dtype == "auto" and device == "cpu" else asked.dtype
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model_name_or_path={path!r} cannot be loaded as a causal language model: {error}"
        ) from error
    if asked.template == "always" and not tokenizer.chat_template:
        raise ValueError(f"template='always': the tokenizer of {path!r} has no chat template.")
    template = bool(tokenizer.chat_template) and asked.template != "never"
    tokens = PairTokens(texts, tokenizer, asked.max_length, template)
    features.lengths = tokens.responses
    notes = [f"Prompts went through {'the chat template' if template else 'no chat template'}."]
    if tokens.truncated:
        notes.append(f"{tokens.truncated} responses were cut at max_length={asked.max_length} tokens.")
    if not set(settings.signals) & set(MODEL_SIGNALS):
        return tokens.identical(), notes
    depths = DEPTHS if "states" in settings.signals else ()
    reader = ResponseReader(model.to(device).eval().requires_grad_(False), tokens.start, depths=depths)
    measured = measure_pairs(reader, tokens, output / "features")
    features.statistics = measured.pop("statistics")
    features.states = {int(name.removeprefix("layer_")): values for name, values in measured.items()}
    return tokens.identical(), notes


def _columns(dataset: Dataset, names: Sequence[str]) -> dict[str, np.ndarray]:
    return {name: numeric_column(dataset, name).astype(np.float32) for name in names}


def _judged(
    features: PairFeatures, settings: AuditSettings, left_out: np.ndarray, notes: list[str]
) -> LabelAudit | None:
    """The audit of all pairs that say something; those left out are as likely right as wrong."""
    ids = np.flatnonzero(~left_out)
    if len(ids) < FEWEST_PAIRS or len(np.unique(features.groups[ids])) < 2:
        notes.append(
            f"{len(ids)} pairs of {len(np.unique(features.groups[ids]))} prompts are too few to judge labels by: "
            "only texts were compared."
        )
        return None
    audit = audit_labels(features.take(ids), settings)
    for name in ("probability", "agreement", "opinion"):
        setattr(audit, name, _spread(getattr(audit, name), ids, len(features), 0.0 if name == "opinion" else np.nan))
    audit.opinions = {name: _spread(values, ids, len(features), np.nan) for name, values in audit.opinions.items()}
    if audit.predicted < 0.6:
        notes.append(
            f"Held-out labels are hardly foretold (AUROC {audit.predicted:.2f}): the probabilities say little."
        )
    return audit


def _spread(values: np.ndarray, ids: np.ndarray, size: int, fill: float) -> np.ndarray:
    whole = np.full(size, fill)
    whole[ids] = values
    return whole


def _disagreement(dataset: Dataset, asked: AuditArguments, audit: LabelAudit | None) -> np.ndarray | None:
    """Distance of explicit margin and opinion after z-scoring both, `(N,)`."""
    if audit is None or asked.score_chosen_column is None or asked.score_rejected_column is None:
        return None
    explicit = numeric_column(dataset, asked.score_chosen_column) - numeric_column(
        dataset, asked.score_rejected_column
    )
    return np.abs(zscore(explicit) - zscore(audit.opinion))


def _table(
    features: PairFeatures, audit: LabelAudit | None, verdicts: Verdicts, disagreement: np.ndarray | None
) -> dict[str, Any]:
    """The columns of `audit.parquet`, in the order of the dataset."""
    size = len(features)
    unknown = np.full(size, np.nan)
    table: dict[str, Any] = {
        "id": np.arange(size),
        "probability": unknown if audit is None else audit.probability,
        "action": verdicts.actions,
        "reason": verdicts.reasons,
        **verdicts.flags,
        **single_signals(features),
    }
    if audit is not None:
        table |= {"agreement": audit.agreement} | {f"opinion_{name}": v for name, v in audit.opinions.items()}
    return table if disagreement is None else table | {"disagreement": disagreement}


def _facts(asked: AuditArguments, audit: LabelAudit | None, verdicts: Verdicts) -> list[tuple[str, str]]:
    counts = {action: verdicts.actions.count(action) for action in (FLIP, DROP, REVIEW, KEEP)}
    facts = [
        ("Dataset", f"{asked.dataset_name} ({len(verdicts.actions)} pairs)"),
        ("Model", asked.model_name_or_path or "none"),
        ("Suggested", ", ".join(f"{action} {count}" for action, count in counts.items())),
        ("Found", ", ".join(f"{name.replace('_', ' ')} {int(v.sum())}" for name, v in verdicts.flags.items())),
    ]
    if audit is not None:
        low, high = audit.noise_rate_bounds
        facts += [
            ("Wrong labels, estimated", f"{audit.noise_rate:.1%} (between {low:.1%} and {high:.1%})"),
            ("Held-out labels foretold", f"AUROC {audit.predicted:.3f}, by length alone {audit.by_length:.3f}"),
            ("Expected calibration error", f"{audit.calibration_error:.3f} (on held-out labels)"),
        ]
    return facts


def _summary(
    asked: AuditArguments,
    settings: AuditSettings,
    thresholds: Thresholds,
    audit: LabelAudit | None,
    features: PairFeatures,
    verdicts: Verdicts,
    notes: list[str],
) -> dict[str, Any]:
    found: dict[str, Any] = {"pairs": len(features), "notes": notes}
    found["settings"] = {**asdict(settings), **asdict(thresholds), **asdict(asked), "signals": list(settings.signals)}
    found["actions"] = {action: verdicts.actions.count(action) for action in sorted(set(verdicts.actions))}
    if audit is not None:
        foretold, seen, sizes = (part.tolist() for part in audit.plot)
        found |= {
            "noise_rate": audit.noise_rate,
            "noise_rate_bounds": list(audit.noise_rate_bounds),
            "calibration_error": audit.calibration_error,
            "labels_foretold": audit.predicted,
            "labels_foretold_by_length": None if np.isnan(audit.by_length) else audit.by_length,
            "reliability": {"foretold": foretold, "seen": seen, "pairs": sizes},
            "single_signals": {
                name: area_under_curve(
                    np.nan_to_num(np.concatenate([values, -values])), np.arange(2 * len(values)) < len(values)
                )
                for name, values in single_signals(features).items()
            },
        }
    return found


def _write_page(
    path: Path,
    asked: AuditArguments,
    texts: PairTexts,
    prompts: list[str],
    table: dict[str, Any],
    facts: list[tuple[str, str]],
    audit: LabelAudit | None,
    notes: list[str],
) -> None:
    acted = np.array([action != KEEP for action in table["action"]])
    chance = np.nan_to_num(np.asarray(table["probability"]), nan=-1.0)
    # First what something is suggested about, then by probability; what was not judged comes with the suggestions.
    order = np.lexsort([-np.where(chance < 0, 1.0, chance), ~acted])[: asked.page_rows]
    numbers = [name for name, values in table.items() if isinstance(values, np.ndarray) and values.dtype.kind == "f"]
    rows = [
        {
            **{name: table[name][i] for name in ("id", "probability", "action", "reason")},
            "prompt": prompts[i],
            "chosen": texts.chosen[i],
            "rejected": texts.rejected[i],
            "signals": {name: float(table[name][i]) for name in numbers},
        }
        for i in order.tolist()
    ]
    shown = [f"The first {len(rows)} of {len(prompts)} pairs, the most suspicious first. All are in audit.parquet."]
    write_audit_page(
        path, "Audit of preference labels", facts, rows, None if audit is None else audit.plot, [*notes, *shown]
    )


def _write_cleaned(dataset: Dataset, verdicts: Verdicts, path: Path) -> int:
    """A copy with the drops and flips done: scores and all else of a side go with their response."""
    actions = np.array(verdicts.actions)
    swaps = [(name, name.replace("chosen", "rejected")) for name in dataset.column_names if "chosen" in name]
    swaps = [(one, other) for one, other in swaps if other in dataset.column_names]

    def turn(row: dict[str, Any], i: int) -> dict[str, Any]:
        if actions[i] != FLIP:
            return row
        return row | {one: row[other] for one, other in swaps} | {other: row[one] for one, other in swaps}

    turned = dataset.map(turn, with_indices=True, desc="Flipping", load_from_cache_file=False, keep_in_memory=True)
    kept = turned.select(np.flatnonzero(actions != DROP))
    with replacing(path) as temporary:
        kept.to_parquet(str(temporary))
    return len(kept)
