"""`dsel audit`: which labels of a preference dataset are probably wrong, and which pairs teach nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from ..data.columns import numeric_column
from ..data.demo.model import build_demo_model
from ..data.files import replacing, write_json
from ..data.loading import DEMO, check_rows, load_splits, take_split
from ..data.pairs import PairTexts, PairTokens
from ..functional.audit.pair_texts import compared_elsewhere, groups_of, relevance, repeats
from ..functional.ranking import zscore
from ..scorers.label_audit import FEWEST_PAIRS, AuditSettings, LabelAudit, PairFeatures, audit_labels
from ..scorers.pair_features import measure_pairs
from ..scorers.pair_verdicts import Thresholds, judge
from ..scorers.responses import DEPTHS, ResponseReader
from .audit_arguments import DTYPES, MODEL_SIGNALS, AuditArguments, settings_of
from .audit_files import audit_facts, audit_summary, audit_table, write_cleaned, write_page


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
    settings, notes = settings_of(asked)
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
    table = audit_table(features, audit, verdicts, disagreement)
    with replacing(output / "audit.parquet") as temporary:
        Dataset.from_dict(table).to_parquet(str(temporary))
    facts = audit_facts(asked, audit, verdicts)
    write_json(output / "audit.json", audit_summary(asked, settings, thresholds, audit, features, verdicts, notes))
    write_page(output / "audit.html", asked, texts, prompts, table, facts, audit, notes)
    lines = [f"{name}: {value}" for name, value in facts] + notes
    if asked.cleaned_file is not None:
        kept = write_cleaned(dataset, verdicts, Path(asked.cleaned_file))
        lines.append(f"Cleaned copy: {asked.cleaned_file} ({kept} of {len(dataset)} pairs)")
    return "\n".join([*lines, f"Table: {output / 'audit.parquet'}", f"Page: {output / 'audit.html'}"])


def _read_pairs(
    features: PairFeatures, texts: PairTexts, asked: AuditArguments, settings: AuditSettings, output: Path
) -> tuple[np.ndarray, list[str]]:
    """Adds what the model says; returns which pairs truncation makes equal, and remarks."""
    path = str(asked.model_name_or_path)
    if path == DEMO:
        path = str(build_demo_model(output / "demo_model"))
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
