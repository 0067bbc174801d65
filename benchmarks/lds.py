"""
Do influence scores foretell what training on other examples does? The linear datamodelling score on real text.

A small pretrained model is trained on many random halves of some instructions, and the loss of held-out queries is
taken after each. A method that scores every training example for every query foretells the loss after a half by the
sum of the scores of what is in it; the score (LDS) is the rank correlation over the halves of what was foretold with
what came, averaged over the queries. 0 is chance. Beside the methods: the cosine of gradients, BM25, the length and a
draw. The methods' scores are per query: of in-run Shapley the products with each query's own gradient, of LESS every
query as a subtask. Cells that are finished are skipped, so a run that was stopped goes on.

    python -m benchmarks.lds --data DATA --model MODEL --output lds.json --workers 4
    python -m benchmarks.lds --data DATA --model MODEL --output lds.json --report

DATA holds sft_domains_{train,test}.parquet. The interval is a bootstrap over queries and halves.
"""

import argparse
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from scipy.stats import rankdata

from benchmarks.cells import add_options, circumstances, run_cells, training
from dsel_trl.core.method import Method, Run, Step
from dsel_trl.data.files import write_json
from dsel_trl.data.rows import Rows
from dsel_trl.functional.adam import adam_direction
from dsel_trl.functional.influence.inrun_shapley import inrun_shapley
from dsel_trl.signals.batch import Batch, Signal
from dsel_trl.signals.ghost import Direction, ExampleGradients, GradientRequest

# Characters: of a completion at least, and of prompt and completion together at most.
SHORTEST, LONGEST = 30, 400
LAYERS = "linear"
# What is said of how the scores came about, in the order of the table.
METHODS = {
    "in-run Shapley, first order": "inrun_first",
    "in-run Shapley, second order": "inrun_second",
    "in-run Shapley, Adam": "inrun_adam",
    "LESS": "less",
    "gradient cosine, after training": "cosine_after",
    "gradient cosine, before training": "cosine_before",
    "BM25": "bm25",
    "length": "length",
    "random": "random",
}


def read(options: argparse.Namespace, split: str, size: int) -> Dataset:
    """`size` rows of a split that fit into `--max-length` tokens, of all domains alike while they have any."""
    from transformers import AutoTokenizer

    path = str(Path(options.data) / f"sft_domains_{split}.parquet")
    rng = np.random.default_rng([options.seed, len(split)])
    by_domain: dict[str, list[dict[str, str]]] = {}
    rows = [row for row in Dataset.from_parquet(path, keep_in_memory=True).to_list() if _fits(row)]
    tokens = AutoTokenizer.from_pretrained(options.model)([row["prompt"] + row["completion"] for row in rows])
    for row, found in zip(rows, tokens["input_ids"], strict=True):
        # With room for what the trainer puts around it: a row that is dropped would shift all that follow.
        if len(found) + 4 <= options.max_length:
            one = {"prompt": row["prompt"], "completion": row["completion"]}
            by_domain.setdefault(row["domain"], []).append(one)
    drawn = [[rows[i] for i in rng.permutation(len(rows))] for _, rows in sorted(by_domain.items())]
    # The domains take turns; one that has run out is passed over.
    turns = [row for turn in zip_longest(*drawn) for row in turn if row is not None]
    return Dataset.from_list([turns[i] for i in rng.permutation(size)])


def _fits(row: dict[str, str]) -> bool:
    return len(row["completion"]) >= SHORTEST and len(row["prompt"]) + len(row["completion"]) <= LONGEST


def halves(options: argparse.Namespace) -> np.ndarray:
    """Which examples each retraining is on, `(halves, rows)` bool."""
    chosen = np.zeros((options.halves, options.rows), dtype=bool)
    for k, row in enumerate(chosen):
        row[np.random.default_rng([options.seed, 3, k]).permutation(options.rows)[: options.rows // 2]] = True
    return chosen


def make_trainer(options: argparse.Namespace, folder: str, train: Dataset, seed: int, epochs: int) -> Any:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        options.model,
        args=SFTConfig(
            **training(options, folder, seed),
            learning_rate=options.rate,
            per_device_train_batch_size=options.batch,
            num_train_epochs=epochs,
            data_seed=seed,
            max_length=options.max_length,
        ),
        train_dataset=train,
        eval_dataset=read(options, "test", options.queries),
    )
    if (len(trainer.train_dataset), len(trainer.eval_dataset)) != (len(train), options.queries):
        raise ValueError(f"Some rows do not fit into --max-length {options.max_length} tokens.")
    return trainer


def query_losses(trainer: Any) -> list[float]:
    """Mean loss over the trained tokens of each query."""
    model, found = trainer.model.eval(), []
    for row in trainer.eval_dataset:
        inputs = trainer.data_collator([row])
        inputs = {k: v.to(model.device) for k, v in inputs.items() if isinstance(v, torch.Tensor)}
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1].float(), labels[0, 1:], ignore_index=-100)
        found.append(float(loss))
    return found


# ---- Scores of a run, one for each example and query ----


@dataclass
class PerQuery(Method):
    """In-run Shapley values towards each query by itself, `values[kind]` `(rows, queries)`; acts on nothing."""

    queries: Any = field(default=None)

    name = "per_query"
    signals = (Signal.INFLUENCE,)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.values: dict[str, np.ndarray] = {}
        self._waiting: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    def setup(self, run: Run) -> None:
        self.rows = run.prepare(self.queries, "queries")
        self.values = {kind: np.zeros((run.size, len(self.rows))) for kind in ("first", "second", "adam")}

    def begin(self, run: Run) -> None:
        self.cosines = cosines(run, self.rows)

    def _gradient(self, run: Run, query: int) -> Direction:
        return run.gradients.of(self.rows, np.array([query]), layers=LAYERS)

    def gradients(self, run: Run) -> GradientRequest:
        directions: dict[str, Direction] = {}
        moments = run.gradients.second_moments(LAYERS)
        for query in range(len(self.rows)):
            found = self._gradient(run, query)
            directions[f"first/{query}"] = found
            if moments is not None:
                scaled = {name: adam_direction(value, *moments[name]) for name, value in found.items()}
                directions[f"adam/{query}"] = scaled
        return GradientRequest(LAYERS, directions=directions, keep=True)

    def after_backward(self, run: Run, batch: Batch, gradients: ExampleGradients) -> dict[str, torch.Tensor]:
        found = {name: (gradients.shares * gradients.dot(name)).cpu().numpy() for name in gradients.request.directions}
        of_step = run.gradients.of_step(LAYERS)
        for query in range(len(self.rows)):
            bent = run.gradients.curvature(of_step, lambda query=query: self._gradient(run, query))
            found[f"curved/{query}"] = (gradients.shares * gradients.against(bent)).cpu().numpy()
        self._waiting.append((batch.ids.cpu().numpy(), found))
        return {}

    def observe(self, run: Run, step: Step) -> None:
        waiting, self._waiting = self._waiting, []
        rate = step.learning_rate * step.clip_factor
        for ids, found in waiting:
            for query in range(len(self.rows)):
                products, curved = (torch.from_numpy(found[f"{name}/{query}"]) for name in ("first", "curved"))
                kinds = {"first": inrun_shapley(products, rate)}
                kinds["second"] = inrun_shapley(products, rate, curved * rate)
                if f"adam/{query}" in found:
                    kinds["adam"] = inrun_shapley(torch.from_numpy(found[f"adam/{query}"]), step.learning_rate)
                for kind, values in kinds.items():
                    np.add.at(self.values[kind][:, query], ids, -values.numpy())


def cosines(run: Run, rows: Rows) -> np.ndarray:
    """Cosine of each example's gradient with each query's at the model as it is, `(rows, queries)`."""
    directions = {str(q): run.gradients.of(rows, np.array([q]), layers=LAYERS) for q in range(len(rows))}
    lengths = [sum(float(v.double().square().sum()) for v in d.values()) ** 0.5 for d in directions.values()]
    request, found = GradientRequest(LAYERS, directions=directions, norms=True), np.zeros((run.size, len(rows)))
    for positions, gradients in run.gradients.each(run.rows, np.arange(run.size), request):
        products = torch.stack([gradients.dot(str(q)) for q in range(len(rows))], dim=1)
        found[positions] = (products / gradients.norms.unsqueeze(1)).cpu().numpy() / np.array(lengths)
    return found


def inrun_cell(options: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    from dsel_trl import SelectionCallback

    queries = read(options, "test", options.queries)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder, read(options, "train", options.rows), seed, options.epochs)
        method = PerQuery(queries=queries)
        trainer.add_callback(SelectionCallback(trainer, method))
        trainer.train()
        after = cosines(trainer.selection.run, method.rows)
    values = {f"inrun_{kind}": values for kind, values in method.values.items()}
    return {**values, "cosine_before": method.cosines, "cosine_after": after}


def less_cell(options: argparse.Namespace, seed: int) -> dict[str, np.ndarray]:
    from dsel_trl import SelectionCallback, create_method
    from dsel_trl.functional.influence.less import over_checkpoints

    queries = read(options, "test", options.queries)
    queries = queries.add_column("query", list(range(len(queries))))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(options, folder, read(options, "train", options.rows), seed, options.epochs)
        # The run is its own warm-up: all of it is trained as it comes, and measured four times.
        how = {"warm_up": 0.95, "keep": 1.0, "features": 4096, "dtype": "float32", "layers": LAYERS}
        method = create_method("less", target=queries, subtask_column="query", **how)
        trainer.add_callback(SelectionCallback(trainer, method))
        trainer.train()
        state = method.state_dict()
    tables = [torch.from_numpy(state[f"influence/{k}"]) for k in range(len(state["rates"]))]
    return {"less": over_checkpoints(tables, state["rates"]).numpy()}


def half_cell(options: argparse.Namespace, number: int, seed: int) -> dict[str, Any]:
    chosen = np.flatnonzero(halves(options)[number])
    train = read(options, "train", options.rows).select(chosen)
    with tempfile.TemporaryDirectory() as folder:
        # As many steps as on all rows: a half is served twice as often.
        trainer = make_trainer(options, folder, train, seed, 2 * options.epochs)
        before = query_losses(trainer) if number == 0 else None
        trainer.train()
        return {"losses": query_losses(trainer), "before": before}


# ---- Cells ----


def cells(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    scores = [(kind, 0, seed) for seed in range(options.runs) for kind in ("inrun", "less")]
    return scores + [("half", k, seed) for seed in range(options.repeats) for k in range(options.halves)]


def work(options: argparse.Namespace, kind: str, number: int, seed: int) -> dict[str, Any]:
    if kind == "half":
        found = half_cell(options, number, 100 + seed)
    else:
        scores = inrun_cell(options, seed) if kind == "inrun" else less_cell(options, seed)
        found = {"scores": {name: values.tolist() for name, values in scores.items()}}
    return {"kind": kind, "number": number, **found}


# ---- What came of it ----


def words(text: str) -> list[str]:
    return "".join(c.lower() if c.isalnum() else " " for c in text).split()


def bm25(train: list[str], queries: list[str], k1: float = 1.2, b: float = 0.75) -> np.ndarray:
    """Okapi BM25 of each training text for each query, `(rows, queries)`."""
    documents = [Counter(words(text)) for text in train]
    sizes = np.array([sum(counts.values()) for counts in documents], dtype=float)
    holds = Counter(word for counts in documents for word in counts)
    found = np.zeros((len(train), len(queries)))
    for q, query in enumerate(queries):
        for word in words(query):
            times = np.array([counts[word] for counts in documents], dtype=float)
            rare = np.log(1 + (len(train) - holds[word] + 0.5) / (holds[word] + 0.5))
            found[:, q] += rare * times * (k1 + 1) / (times + k1 * (1 - b + b * sizes / sizes.mean()))
    return found


def of_texts(options: argparse.Namespace) -> dict[str, np.ndarray]:
    train, queries = read(options, "train", options.rows), read(options, "test", options.queries)
    texts = [f"{row['prompt']} {row['completion']}" for row in train]
    asked = [f"{row['prompt']} {row['completion']}" for row in queries]
    lengths = np.array([len(row["completion"]) for row in train], dtype=float)
    return {
        "bm25": bm25(texts, asked),
        "length": np.repeat(lengths[:, None], len(asked), axis=1),
        "random": np.random.default_rng([options.seed, 4]).standard_normal((len(texts), len(asked))),
    }


def rank_correlations(foretold: np.ndarray, came: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each column, `(queries,)`."""
    ranks = [rankdata(values, axis=0) for values in (foretold, came)]
    a, b = (r - r.mean(axis=0) for r in ranks)
    lengths = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return np.divide((a * b).sum(axis=0), lengths, out=np.zeros_like(lengths), where=lengths > 0)


def lds(scores: list[np.ndarray], chosen: np.ndarray, gains: np.ndarray, draws: int) -> dict[str, Any]:
    """
    Mean over queries and runs, with its 95% interval.

    `scores`, one of each run, are `(rows, queries)`; `chosen` is `(halves, rows)`; `gains` are minus the losses,
    `(halves, queries)`.
    """
    foretold = [chosen.astype(float) @ one for one in scores]
    values = [float(rank_correlations(one, gains).mean()) for one in foretold]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(draws):
        rows, columns = rng.integers(len(gains), size=len(gains)), rng.integers(gains.shape[1], size=gains.shape[1])
        came = gains[rows][:, columns]
        drawn.append(np.mean([rank_correlations(one[rows][:, columns], came).mean() for one in foretold]))
    interval = [float(np.quantile(drawn, q)) for q in (0.025, 0.975)]
    return {"lds": float(np.mean(values)), "interval": interval, "runs": values}


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    losses: dict[int, list[list[float]]] = {}
    scores: dict[str, list[np.ndarray]] = {name: [values] for name, values in of_texts(options).items()}
    seconds: dict[str, list[float]] = {}
    before = None
    for row in rows:
        seconds.setdefault(row["kind"], []).append(row["seconds"])
        if row["kind"] == "half":
            losses.setdefault(row["number"], []).append(row["losses"])
            before = row["before"] or before
        for name, values in row.get("scores", {}).items():
            scores.setdefault(name, []).append(np.array(values))
    found: dict[str, Any] = {"table": [], "retrainings": sum(map(len, losses.values()))}
    found["seconds_each"] = {kind: float(np.mean(values)) for kind, values in seconds.items()}
    if not losses:
        return found
    numbers = sorted(losses)
    gains = -np.array([np.mean(losses[k], axis=0) for k in numbers])
    chosen = halves(options)[numbers]
    full = [k for k in numbers if len(losses[k]) == options.repeats >= 2]
    if full:
        # How well a retraining with one seed foretells that of the same half with another: a ceiling.
        pairs = [-np.array([losses[k][seed] for k in full]) for seed in (0, 1)]
        found["between_seeds"] = float(rank_correlations(*pairs).mean())
    found |= {"halves": len(numbers), "queries": gains.shape[1], "loss_after": float(-gains.mean())}
    if before is not None:
        found["loss_before"] = float(np.mean(before))
    for label, name in METHODS.items():
        if name in scores:
            found["table"].append({"method": label, **lds(scores[name], chosen, gains, options.draws)})
            if len(scores[name]) > 1:
                together = [np.mean([one / (np.abs(one).mean() + 1e-30) for one in scores[name]], axis=0)]
                found["table"][-1]["together"] = lds(together, chosen, gains, options.draws)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--halves", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2, help="retrainings of each half, with seeds of their own")
    parser.add_argument("--runs", type=int, default=2, help="runs on all rows, of which each gives scores")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of rows, queries and halves")
    parser.add_argument("--draws", type=int, default=1000, help="of the bootstrap")
    add_options(parser)
    options = parser.parse_args()
    wanted = cells(options)
    rows = run_cells(work, wanted, options)
    found = report(options, rows) | circumstances(options, wanted, rows)
    found["versions"] = {name: version(name) for name in ("torch", "transformers", "trl")}
    write_json(Path(options.output), found)
    for row in found["table"]:
        low, high = row["interval"]
        together = f"   runs together {row['together']['lds']:+.3f}" if "together" in row else ""
        print(f"{row['method']:<34}{row['lds']:+.3f} [{low:+.3f}, {high:+.3f}]{together}")
    print({key: found.get(key) for key in ("between_seeds", "loss_before", "loss_after", "seconds_each", "missing")})


if __name__ == "__main__":
    main()
