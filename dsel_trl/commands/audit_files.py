"""What `dsel audit` writes: the table, the summary, the page, and a cleaned copy where one is asked for."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.files import replacing
from ..data.pairs import PairTexts
from ..functional.audit.label_noise import area_under_curve
from ..report.audit_page import write_audit_page
from ..scorers.label_audit import AuditSettings, LabelAudit, PairFeatures, single_signals
from ..scorers.pair_verdicts import DROP, FLIP, KEEP, REVIEW, Thresholds, Verdicts
from .audit_arguments import AuditArguments


def audit_table(
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


def audit_facts(asked: AuditArguments, audit: LabelAudit | None, verdicts: Verdicts) -> list[tuple[str, str]]:
    counts = {action: verdicts.actions.count(action) for action in (FLIP, DROP, REVIEW, KEEP)}
    facts = [
        ("Dataset", f"{asked.dataset_name} ({len(verdicts.actions)} pairs)"),
        ("Model", asked.model_name_or_path or "none"),
        ("Suggested", ", ".join(f"{action} {count}" for action, count in counts.items())),
        ("Found", ", ".join(f"{name.replace('_', ' ')} {int(v.sum())}" for name, v in verdicts.flags.items())),
    ]
    if audit is not None:
        facts += [
            ("Wrong labels", _share_of_wrong(audit)),
            ("Held-out labels foretold", f"AUROC {audit.predicted:.3f}, by length alone {audit.by_length:.3f}"),
            ("Expected calibration error", f"{audit.calibration_error:.3f} (on held-out labels)"),
        ]
    return facts


def _share_of_wrong(audit: LabelAudit) -> str:
    low, high = audit.noise_range
    if low == high:
        return f"{audit.noise_rate:.1%}, as given"
    return (
        f"about {audit.noise_rate:.1%}: the surest opinions are contradicted by {low:.1%} of their labels, all "
        f"opinions by {high:.1%}"
    )


def audit_summary(
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
            "noise_range": list(audit.noise_range),
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


def write_page(
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


def write_cleaned(dataset: Dataset, verdicts: Verdicts, path: Path) -> int:
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
