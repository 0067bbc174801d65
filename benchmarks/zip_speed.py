"""ZIP: the same selection as a plain re-implementation of the published loop, and how much faster.

    python -m benchmarks.zip_speed --data documents.parquet --out zip_speed.json

The plain loop serialises and compresses "everything selected so far + candidate" anew for every candidate. The package
serialises each example once, keeps the compressor of what is selected, and copies it for each candidate. Both run in
one process and are compared by CPU time; the column of the worker processes is wall-clock time.
"""

import argparse
import json
import platform
import time
import zlib
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from dsel_trl.functional.text.zip import canonical_example, zip_select


def plain_ratio(examples):
    raw = str(examples).encode()
    return len(raw) / len(zlib.compress(raw, level=9))


def plain_zip(data, budget, k1, k2, k3):
    """The published loop, ties broken by id; for pools that are too large to come back to burnt examples."""
    state = np.array([plain_ratio([example]) for example in data], dtype=np.float32)
    selected = []
    while len(selected) < budget:
        anchor = [data[i] for i in selected]
        pool = np.argsort(state, kind="stable")[:k1]
        state[pool] = [plain_ratio([*anchor, data[i]]) for i in pool]
        finalists = pool[np.lexsort((pool, state[pool]))][:k2]
        state[finalists] = 1_000_000
        chosen, remaining = [], finalists.tolist()
        for _ in range(k3):
            anchor = [data[i] for i in chosen]
            ratios = np.array([plain_ratio([*anchor, data[i]]) for i in remaining], dtype=np.float32)
            chosen.append(remaining.pop(int(np.lexsort((remaining, ratios))[0])))
        selected += chosen
    return selected


def timed(clock, function, *args, **kwargs):
    start = clock()
    result = function(*args, **kwargs)
    return result, clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="parquet file with a column of documents")
    parser.add_argument("--column", default="text", help="name of that column")
    parser.add_argument("--documents", type=int, default=2000, help="documents to select from, drawn at random")
    parser.add_argument("--budgets", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--k1", type=int, default=1000)
    parser.add_argument("--k2", type=int, default=40)
    parser.add_argument("--k3", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2, help="processes of the last column")
    parser.add_argument("--skip-plain", action="store_true", help="time the package only")
    parser.add_argument("--out", type=Path, default=Path("zip_speed.json"))
    args = parser.parse_args()

    texts = pq.read_table(args.data, columns=[args.column]).column(0).to_pylist()
    drawn = np.random.default_rng(0).permutation(len(texts))[: args.documents]
    data = [canonical_example(int(i), [("text", texts[i])], "documents") for i in drawn]
    stages = {"k1": args.k1, "k2": args.k2, "k3": args.k3}
    rows = []
    columns = ("documents", "budget", "plain s", "package s", "ratio", "workers s", "same")
    print("{:>9} {:>6} {:>9} {:>9} {:>6} {:>9}  {}".format(*columns))
    # Growth with the budget on the whole pool, then growth with the pool at the smallest budget.
    runs = [(len(data), budget) for budget in args.budgets]
    runs += [(len(data) // part, args.budgets[0]) for part in (4, 2)]
    for size, budget in runs:
        pool = data[:size]
        ids, fast = timed(time.process_time, zip_select, pool, budget, truncate=False, **stages)
        several = {"workers": args.workers, **stages}
        parallel_ids, parallel = timed(time.perf_counter, zip_select, pool, budget, truncate=False, **several)
        row = {"documents": size, "budget": budget, **stages, "package_seconds": fast}
        row |= {
            "workers": args.workers,
            "workers_seconds": parallel,
            "workers_same": bool((ids == parallel_ids).all()),
        }
        comparable = size - budget / args.k3 * args.k2 >= args.k1
        if not args.skip_plain and comparable:
            plain_ids, plain = timed(time.process_time, plain_zip, pool, budget, **stages)
            row |= {"plain_seconds": plain, "same": plain_ids == ids.tolist()}
            row |= {"speed_ratio": plain / fast}
        rows.append(row)
        values = [row.get(key, float("nan")) for key in ("plain_seconds", "package_seconds", "speed_ratio")]
        cells = "{:9.1f} {:9.2f} {:6.1f} {:9.2f}".format(*values, parallel)
        print(f"{size:9d} {budget:6d} {cells}  {row.get('same', '-')}", flush=True)

    report = {
        "source": args.data.name,
        "mean_bytes": float(np.mean([len(repr(example).encode()) for example in data])),
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "python": platform.python_version(),
        "rows": rows,
    }
    args.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
