"""What a benchmark found, as Markdown."""

import math
from typing import Any


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table of texts."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def numbers(result: dict[str, Any]) -> str:
    """Any JSON of numbers under names, however deep, as a table of two columns."""

    def walk(value: Any, name: str) -> list[list[str]]:
        if isinstance(value, dict):
            return [row for key, below in value.items() for row in walk(below, f"{name}, {key}" if name else str(key))]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return []
        return [[name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}"]]

    return markdown(["what", "measured"], walk(result.get("rows", result), ""))


def overhead(result: dict[str, Any]) -> str:
    """Seconds of a step and peak memory, as multiples of stock TRL."""
    rows = []
    for name, row in result["variants"].items():
        low, high = row["ratio_quartiles"]
        rows.append(
            [
                f"`{name}`" if name != "stock" else name,
                f"{row['median_step_seconds']:.3f}",
                f"{row['median_ratio']:.3f} ({low:.3f}-{high:.3f})",
                "-" if row["limit"] is None else f"{row['limit']:g}",
                f"{row['memory_ratio']:.4f}",
                f"{row['memory_limit']:g}",
            ]
        )
    return markdown(
        ["attached", "seconds per step", "step / stock (25%-75%)", "limit", "peak memory / stock", "limit"], rows
    )


def ablation(result: dict[str, Any]) -> str:
    """The table of `dsel ablate`, in short."""

    rows = [
        [
            row["variant"],
            f"{row['mean']:.1%}" + ("" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"),
            _points(row, "against_stock"),
            _percent(row["flipped_dropped"]),
            _percent(row["clean_dropped"]),
            f"{row['steps']:.0f}",
        ]
        for row in result["rows"]
    ]
    head = ["run", "held-out accuracy", "against stock, points", "flipped dropped", "clean dropped", "steps"]
    return markdown(head, rows)


def real_pairs(result: dict[str, Any]) -> str:
    """The ablations of real pairs, with the standard error of one accuracy."""
    rows = [
        [
            f"`{row['variant']}`",
            row["tuning"],
            "-" if row["kept_fraction"] is None else f"{row['kept_fraction']:.2f}",
            _percent(row["mean"]) + ("" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"),
            _points(row, "against_stock"),
            _points(row, "against_random"),
        ]
        for row in result["rows"]
    ]
    accuracy = f"held-out accuracy (standard error of one: {100 * result['standard_error']:.1f})"
    return markdown(["variant", "tuning", "kept", accuracy, "against stock, points", "against random, points"], rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _points(row: dict[str, Any], name: str) -> str:
    value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
    if value is None:
        return "-"
    return f"{100 * value:+.1f}" if low is None else f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def real_recipes(result: dict[str, Any]) -> str:
    """Which recipes trained to the end."""
    rows = [
        [
            f"`{row['recipe']}`",
            row["trainer"],
            str(row["exit"]),
            str(row.get("steps", "-")),
            "-" if row.get("kept") is None else f"{row['kept']:.2f}",
            f"{row['seconds']:.0f}",
        ]
        for row in result["rows"]
    ]
    return markdown(["recipe", "trainer", "exit code", "steps", "kept", "seconds"], rows)


def compression(result: dict[str, Any]) -> str:
    """Time of the published loop of ZIP and of ours."""
    rows = [
        [
            *(f"{row[key]:,}" for key in ("documents", "k1", "k2", "k3", "budget")),
            f"{row['plain_seconds']:.1f} s",
            f"{row['package_seconds']:.2f} s",
            f"{row['speed_ratio']:.1f}",
            "yes" if row["same"] else "NO",
        ]
        for row in result["rows"]
        if "speed_ratio" in row
    ]
    return markdown(["documents", "k1", "k2", "k3", "budget", "plain", "dsel_trl", "ratio", "same choice"], rows)


def throughput(result: dict[str, Any]) -> str:
    """Trained tokens per second of each way to form batches, by file."""
    rows = []
    for file, variants in result.items():
        if not isinstance(variants, dict):
            continue
        for name, row in variants.items():
            if "ratio" in row:
                low, high = row["interval"]
                cells = [f"{row['tokens_per_second']:,.0f}", f"{row['share']:.0%}"]
                rows.append([file, name, *cells, f"{row['ratio']:.2f} ({low:.2f}-{high:.2f})"])
    return markdown(["file", "batches", "tokens/s", "of the batch is real", "x TRL default (5%-95%)"], rows)


def planted(result: dict[str, Any]) -> str:
    """What recipes win back of what flipped labels cost, and how well the audit finds them."""

    def ranged(row: dict[str, Any], key: str) -> str:
        if key not in row:
            return "-"
        low, high = row[f"{key}_interval"]
        return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"

    rows = []
    for row in result["table"]:
        chosen = result["chosen"].get(f"{row['rate']:g}") == row["recipe"]
        cells = [f"{row['rate']:.0%}", f"{row['accuracy']:.1%}", str(len(row["seeds"]))]
        marks = [ranged(row, key) for key in ("recovered", "auroc", "right_after_flips")]
        rows.append([f"`{row['recipe']}`" + (" (chosen)" if chosen else ""), *cells, *marks])
    head = ["recipe", "flipped", "held-out accuracy", "seeds", "share of the cost recovered", "flips found, AUROC"]
    return markdown([*head, "labels right after its flips"], rows)


def judges(result: dict[str, Any]) -> str:
    """How well the audit finds a judge's errors, beside the best single signal."""
    rows = []
    for row in result["table"]:
        name, area = max(row["single"].items(), key=lambda item: item[1])
        low, high = row["auroc_interval"]
        rows.append(
            [
                row["set"],
                row["judge"],
                row["variant"],
                str(row["pairs"]),
                f"{row['auroc']:.3f} [{low:.3f}, {high:.3f}]",
                f"{area:.3f} (`{name}`)",
                f"{row['judge_right']:.1%} / {row['right_after_flips']:.1%}",
                f"{row['calibration_error_labels']:.3f} / {row['calibration_error_truth']:.3f}",
            ]
        )
    head = ["set", "judge", "signals", "pairs", "errors found, AUROC", "best single signal"]
    return markdown([*head, "labels right before / after flips", "calibration error, labels / truth"], rows)


# What is said of methods that choose and of those that weigh.
RECOVERED = {
    "drops": ("dropped", "flipped_among_dropped", "flipped_among_kept"),
    "weighs": ("weight_flipped", "weight_clean", "flipped_among_lowest"),
}


def recovery(result: dict[str, Any]) -> str:
    """What became of flipped pairs, table by table: the methods that choose, and those that weigh."""

    def cell(value: list[float] | None) -> str:
        return "-" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}"

    heads = {
        "drops": ["dropped", "flipped among the dropped", "flipped among the kept"],
        "weighs": ["mean weight of flipped pairs", "of clean pairs", "flipped among the lowest-weighted 30%"],
    }
    parts = []
    for table, found in result["tables"].items():
        for kind, head in heads.items():
            rows = [
                [
                    *(f"`{row['name']}`", row["uses"], f"{row['steps']:,.0f}"),
                    *(cell(row[key]) for key in RECOVERED[kind]),
                    row["verdict"],
                ]
                for row in found
                if row["kind"] == kind
            ]
            if rows:
                parts.append(markdown([f"{table}: {kind}", "uses", "steps", *head, "against chance"], rows))
    return "\n\n".join(parts)


def _with_interval(row: dict[str, Any], key: str, form: str = ".3f", factor: float = 1.0) -> str:
    """A mean and half of its 95% interval, or a dash where there is none."""
    if row.get(key) is None:
        return "-"
    return f"{factor * row[key]:{form}} ± {factor * row[f'{key}_interval']:{form.lstrip('+')}}"


def target(result: dict[str, Any]) -> str:
    """Per target and method: the right domain's share of what was trained, and the loss on its test rows."""
    rows = [
        [
            row["domain"],
            row["method"],
            _with_interval(row, "share", ".1f", 100) + "%",
            _with_interval(row, "loss"),
            _with_interval(row, "against_random", "+.3f"),
        ]
        for row in result["table"]
    ]
    head = ["target", "kept by", "right domain", "test loss", "less that of random"]
    return markdown(head, rows)


def safety(result: dict[str, Any]) -> str:
    """Per method: how well its scores find the unsafe rows."""
    rows = [
        [
            row["method"],
            _with_interval(row, "auroc"),
            _with_interval(row, "unsafe_of_dropped", ".1f", 100) + "%",
            f"{row['unsafe_of_all']:.1%}",
        ]
        for row in result["table"]
    ]
    return markdown(["scores of", "AUROC", "unsafe among the lowest 20%", "in the mixture"], rows)


def continual(result: dict[str, Any]) -> str:
    """Per way of training the stream: what the model ends with, and what it has forgotten."""
    rows = [
        [
            row["method"],
            _with_interval(row, "final"),
            _with_interval(row, "forgetting", "+.3f"),
            _with_interval(row, "final_apart", "+.3f"),
            _with_interval(row, "forgetting_apart", "+.3f"),
            f"{row['tokens']:,.0f}",
            f"{row['forwards']:,.0f} / {row['backwards']:,.0f}",
        ]
        for row in result["table"]
    ]
    head = ["trained", "final loss, all tasks", "forgetting", "final - random replay", "forgetting - random replay"]
    table = markdown([*head, "tokens trained", "forwards / backwards added"], rows)
    return "\n\n".join([table, " ".join(result["verdict"])])


def gpu(result: dict[str, Any]) -> str:
    """What was measured on a GPU: a row per line of its parts."""

    def cell(value: float) -> str:
        return f"{value:.2g}" if abs(value) < 0.1 else f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    rows = [
        [row["what"], "; ".join(f"{name} {cell(value)}" for name, value in row.items() if name != "what")]
        for part in result["parts"].values()
        for row in part["rows"]
        if "error" not in row
    ]
    return markdown(["what", "measured"], rows)


def flips(result: dict[str, Any]) -> str:
    """AUROC of flipped pairs: a row per setting, a column per size."""
    sizes = sorted({row["size"] for row in result["table"]})
    rows: dict[str, list[str]] = {}
    for row in result["table"]:
        cells = rows.setdefault(row["setting"], [row["setting"], *["-"] * len(sizes)])
        chosen = result["chosen"].get(str(row["size"])) == row["setting"]
        spread = "" if row["deviation"] is None else f" ± {row['deviation']:.3f}"
        cells[1 + sizes.index(row["size"])] = f"{row['auroc']:.3f}{spread}{' (chosen)' * chosen}"
    of = {row["size"]: row["steps"] for row in result["table"]}
    return markdown(["by", *[f"{size:,} pairs, {of[size]} steps" for size in sizes]], list(rows.values()))


def lds(result: dict[str, Any]) -> str:
    """Rank correlation of what scores foretell with what retraining gives."""
    rows = []
    for row in result["table"]:
        together = f"{row['together']['lds']:+.3f}" if "together" in row else "-"
        low, high = row["interval"]
        rows.append([row["method"], f"{row['lds']:+.3f} [{low:+.3f}, {high:+.3f}]", together])
    return markdown(["scores", "LDS, one run [95%]", "runs together"], rows)


def influence(result: dict[str, Any]) -> str:
    """Step time and memory with in-run scores, and of other ways to the same products."""

    def other(row: dict[str, Any], way: str) -> str:
        found = row.get("others", {}).get(way, {})
        return f"{found['in_steps']:.2f}" if "in_steps" in found else "fails" if "error" in found else "-"

    at = str(result["refresh"])
    rows = [
        [
            row["what"],
            "{:.3f} ({:.3f}-{:.3f})".format(row["ratio"], *row["quartiles"]) if "ratio" in row else "-",
            "-" if row["limit"] is None else f"{row['limit']:g}",
            "-" if row.get("control") is None else f"{row['control']:.3f}",
            "-" if math.isnan(row["refresh_in_steps"]) else f"{row['refresh_in_steps']:.2f}",
            f"{row['mean_ratio_at'][at]:.3f}" if at in row.get("mean_ratio_at", {}) else "-",
            f"{row['memory_ratio']:.2f}",
            other(row, "loop"),
            other(row, "vmap"),
        ]
        for row in result["rows"]
    ]
    head = [
        "what",
        "step / stock (25%-75%)",
        "limit",
        "stock / stock",
        "a refresh or a batch, in steps",
        f"mean at {at}",
    ]
    table = markdown([*head, "peak memory / stock", "loop, in steps", "vmap, in steps"], rows)
    if "dattri" not in result:
        return table
    rival = result["dattri"]
    if "error" in rival:
        return f"{table}\n\n{markdown(['beside it'], [[rival['error']]])}"
    sides = [
        [who, f"{rival[who]['stock_seconds']:.2f}", f"{rival[who]['ratio']:.2f}", f"{rival['rank_correlation']:.4f}"]
        for who in ("dsel_trl", "dattri-llm")
    ]
    head = [
        "the same batches, target renewed in every step",
        "stock step, seconds",
        "step / stock",
        "rank correlation",
    ]
    return f"{table}\n\n{markdown(head, sides)}"
