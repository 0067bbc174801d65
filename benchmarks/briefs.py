"""What a benchmark found, in a line or two of the front page."""

from typing import Any

Lines = list[tuple[str, str]]


def quickstart(result: dict[str, Any]) -> Lines:
    seeds = len(result["rows"][0]["seeds"])
    names = " / ".join(row["variant"] for row in result["rows"])
    means = " / ".join(f"{row['mean']:.1%}" for row in result["rows"])
    return [(f"held-out accuracy of the quickstart, 30% flipped labels, {seeds} seeds: {names}", means)]


def equal_compute(result: dict[str, Any]) -> Lines:
    """The same with as many floating-point operations for all, those of the selection charged."""
    ((what, means),) = quickstart(result)
    return [(what.replace("of the quickstart,", "at equal computation, selection's own charged,"), means)]


def overhead(result: dict[str, Any]) -> Lines:
    rows = {name: row for name, row in result["variants"].items() if name != "stock"}
    names = " / ".join(f"`{name}`" for name in rows)
    steps = " / ".join(
        "{:.3f} ({:.3f}-{:.3f})".format(row["median_ratio"], *row["ratio_quartiles"]) for row in rows.values()
    )
    memory = " / ".join(f"{row['memory_ratio']:.3f}" for row in rows.values())
    return [
        (f"step time attached / stock, {names}: median (quartiles)", steps),
        ("peak memory attached / stock, the same", memory),
    ]


def gpu(result: dict[str, Any]) -> Lines:
    rows = {row["what"]: row for part in result["parts"].values() for row in part["rows"]}
    lines = []
    if exact := rows.get("dpo, full, bf16"):
        what = "on a GPU in bf16, distance to the float32 gradient: weighted by the gate / stock TRL unweighted"
        lines.append((what, f"{exact['gate against float32']:.2g} / {exact['stock against float32']:.2g}"))
    budget, stock = (rows.get(f"135M dpo, uneven lengths: {name}") for name in ("token_budget", "stock"))
    if budget and stock:
        what = "on a GPU, uneven lengths, trained tokens per second: `token_budget` / TRL's batches"
        lines.append((what, f"{budget['tokens per second']:,.0f} / {stock['tokens per second']:,.0f}"))
    return lines


def scale(result: dict[str, Any]) -> Lines:
    rows, size = result["rows"], f"{result['examples']:,} examples"
    return [
        (f"{size}: ledger with 4 scores", f"{rows['ledger MB']:.0f} MB"),
        (f"{size}: ranking and planning an epoch, one core", f"{rows['rank and plan s']:.2f} s"),
    ]


def compression(result: dict[str, Any]) -> Lines:
    ratios = [row["speed_ratio"] for row in result["rows"] if "speed_ratio" in row]
    what = "ZIP, time of the published loop / ours, same selection, by stage sizes"
    return [(what, f"{min(ratios):.0f}x to {max(ratios):.0f}x")] if ratios else []


def throughput(result: dict[str, Any]) -> Lines:
    return [
        (
            f"trained tokens per second against TRL's default batches, `token_budget` on {file}",
            "{:.2f}x ({:.2f}-{:.2f})".format(row["ratio"], *row["interval"]),
        )
        for file, variants in result.items()
        if isinstance(variants, dict) and "ratio" in (row := variants.get("token_budget", {}))
    ]


def planted(result: dict[str, Any]) -> Lines:
    lines = []
    for row in result["table"]:
        share = f"{row['rate']:.0%} flipped labels, {len(row['seeds'])} seeds"
        if "recovered" in row and result["chosen"].get(f"{row['rate']:g}") == row["recipe"]:
            figure = "{:.0%} [{:.0%}, {:.0%}]".format(row["recovered"], *row["recovered_interval"])
            lines.append((f"{share}: what `{row['recipe']}`, chosen on other seeds, wins back of their cost", figure))
        if row["recipe"] == "audit_soft" and "auroc" in row:
            figure = "AUROC {:.3f} [{:.3f}, {:.3f}]".format(row["auroc"], *row["auroc_interval"])
            lines.append((f"{share}: the audit finds them", figure))
    return lines


def judges(result: dict[str, Any]) -> Lines:
    lines = []
    for row in result["table"]:
        if row["set"] == "pandalm" and row["variant"] == result["table"][0]["variant"]:
            best = max(row["single"].values())
            figure = "AUROC {:.3f} [{:.3f}, {:.3f}] / {:.3f}".format(row["auroc"], *row["auroc_interval"], best)
            lines.append((f"errors of a real judge ({row['judge']}) found: audit / its best signal", figure))
    return lines


def audit_scale(result: dict[str, Any]) -> Lines:
    found = result["rows"]["all"]
    what = f"audit of {result['pairs']:,} pairs beside the model's forwards, {result['workers']} cores"
    return [(what, f"{found['seconds of the wall'] / 60:.1f} min, {found['MB at the peak'] / 1000:.1f} GB")]


def recovery(result: dict[str, Any]) -> Lines:
    """What methods do to flipped labels where nothing is set."""
    of = {row["name"]: row for row in result["tables"].get("defaults", [])}
    named = ("margin: explicit", "selective_dpo", "margin", "random")
    if not set(named) <= set(of):
        return []
    figures = [f"{of[name]['flipped_among_dropped'][0]:.0%}" for name in named]
    what = "flipped pairs among the dropped half, everything at its default (TRL's bf16 and 1e-6 too)"
    return [(f"{what}: {' / '.join(f'`{name}`' for name in named)}", " / ".join(figures))]


def influence(result: dict[str, Any]) -> Lines:
    """What scores of each example in the ordinary step cost."""
    at = str(result["refresh"])
    return [
        (
            f"step time with in-run scores / stock ({row['what'].split(': ')[1]}): between two gradients of the "
            f"target / with one every {at} steps",
            f"{row['ratio']:.2f} / {row['mean_ratio_at'][at]:.2f}",
        )
        for row in result["rows"]
        if row["what"].startswith("inrun_shapley")
    ]


def lds(result: dict[str, Any]) -> Lines:
    """Whether scores foretell retraining."""
    of = {row["method"]: row for row in result["table"]}
    lines = []
    for name in ("in-run Shapley, first order", "LESS"):
        (low, high), words = of[name]["interval"], of["BM25"]["lds"]
        lines.append(
            (
                f"scores foretell the losses of {result['halves']} retrainings (LDS): {name} / BM25",
                f"{of[name]['lds']:.2f} [{low:.2f}, {high:.2f}] / {words:.2f}",
            )
        )
    return lines


def target(result: dict[str, Any]) -> Lines:
    shares = {(row["domain"], row["method"]): row["share"] for row in result["table"]}
    domains = list(dict.fromkeys(domain for domain, _ in shares))
    named = ", ".join(domains)
    return [
        (
            f"share of the target's domain in what is kept of a mixture ({named}): `{method}` / `random`",
            ", ".join(f"{shares[domain, method]:.0%} / {shares[domain, 'random']:.0%}" for domain in domains),
        )
        for method in ("gotd", "knn_shapley")
    ]


def safety(result: dict[str, Any]) -> Lines:
    rows = {row["method"]: row for row in result["table"]}
    names = ("seal, value", "inrun_shapley", "random")
    return [
        (
            "unsafe answers of a mixture found with trusted refusals, AUROC: `seal` with `value: helper` / "
            "`inrun_shapley` / `random`",
            " / ".join(f"{rows[name]['auroc']:.3f}" for name in names),
        )
    ]
