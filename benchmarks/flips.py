"""
Do gradients find flipped labels? AUROC of the flipped pairs of the built-in corpus by what methods say of them.

One run per seed and setting: DPO on `--sizes` pairs of which 30% are flipped, with a clean target of 64 pairs; the
score is minus a pair's value (of GREATS its last alignment), and 0.5 is chance. `brute force` is a backward pass of
each pair by itself in every step, by all parameters, times the target's gradient at that step, all steps alike: what
the engine has to reproduce. It also says how far the engine's products of the linear layers are from its own in that
very run. The settings of in-run Shapley are compared on the seeds of `--choose`, and all is reported on those of
`--seeds`. Cells that are finished are skipped, so a run that was stopped goes on.

    python -m benchmarks.flips --output flips.json --workers 4
    python -m benchmarks.flips --output flips.json --report
"""

import argparse
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import add_options, circumstances, demo_model, run_cells, training
from dsel_trl.data.files import write_json

BATCH, TARGET = 32, 64
# Pairs and optimizer steps.
STEPS = {640: 60, 2048: 120}
BRUTE = "brute force"
SETTINGS: dict[str, tuple[str, dict[str, Any]] | None] = {
    BRUTE: None,
    "in-run, first order": ("inrun_shapley", {}),
    "in-run, second order": ("inrun_shapley", {"taylor": 2}),
    "in-run, plain": ("inrun_shapley", {"scale": "plain"}),
    "in-run, cosine": ("inrun_shapley", {"scale": "cosine"}),
    "in-run, norms, cosine": ("inrun_shapley", {"layers": "norms", "scale": "cosine"}),
    "GREATS": ("greats", {}),
    "LESS": ("less", {"warm_up": 0.5}),
}
# Which ones the best is chosen among.
CANDIDATES = tuple(name for name in SETTINGS if name.startswith("in-run"))


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Share of pairs (one positive, one not) in which the positive one has the higher score; ties count half."""
    from dsel_trl.functional.audit.label_noise import area_under_curve

    known = np.isfinite(scores)
    return area_under_curve(scores[known], positive[known])


def brute_force(stock: type) -> type:
    """A trainer that takes the backward pass of every pair of a batch alone, before it makes its step."""

    class BruteForce(stock):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            count = len(inputs["input_ids"]) // 2
            ids = inputs["example_id"][:count].cpu().numpy()
            named = dict(model.named_parameters())
            linear = torch.tensor([name.endswith("proj.weight") for name in named])

            def gradient(piece: dict[str, Any]) -> list[torch.Tensor]:
                return torch.autograd.grad(stock.compute_loss(self, model, piece), list(named.values()))

            target = gradient({name: value.to(model.device) for name, value in self.followed.items()})
            for k, i in enumerate(ids.tolist()):
                piece = {
                    name: value[[k, count + k]]
                    for name, value in inputs.items()
                    if isinstance(value, torch.Tensor) and name != "example_id"
                }
                found = torch.stack([(g * v).sum() for g, v in zip(gradient(piece), target, strict=True)]).cpu()
                self.products[:, i] += [float(found.sum()), float(found[linear].sum())]
                self.visited[i] = True
            return super().training_step(model, inputs, *args, **kwargs)

    return BruteForce


def run(options: argparse.Namespace, setting: str, size: int, seed: int) -> dict[str, Any]:
    from transformers import set_seed
    from trl import DPOConfig, DPOTrainer

    from dsel_trl import SelectionCallback, create_method
    from dsel_trl.data.demo.corpus import demo_preferences

    data = demo_preferences(seed, train_size=size, test_size=512)
    truth = np.array(data["train"]["truth_flipped"], dtype=bool)
    followed = data["test"].select(range(TARGET)).select_columns(["prompt", "chosen", "rejected"])
    model = demo_model(options)
    # What the brute force is compared with: the same products of the linear layers.
    name, parameters = SETTINGS[setting] or ("inrun_shapley", {"scale": "plain"})
    with tempfile.TemporaryDirectory() as folder:
        args = DPOConfig(
            **training(options, folder, seed),
            max_steps=options.steps or STEPS[size],
            per_device_train_batch_size=BATCH,
            learning_rate=options.rate,
            warmup_steps=10,
        )
        collated: dict[str, torch.Tensor] = {}
        if setting == BRUTE:
            other = DPOTrainer(model, args=args, train_dataset=followed)
            collated = other.data_collator([other.train_dataset[i] for i in range(TARGET)])
        set_seed(seed)
        stock = brute_force(DPOTrainer) if setting == BRUTE else DPOTrainer
        trainer = stock(model, args=args, train_dataset=data["train"])
        trainer.followed = {name: value for name, value in collated.items() if isinstance(value, torch.Tensor)}
        trainer.products, trainer.visited = np.zeros((2, size)), np.zeros(size, dtype=bool)
        kept = {} if name == "greats" else {"keep": 1.0}
        method = create_method(name, target=followed, **kept, **parameters)
        trainer.add_callback(SelectionCallback(trainer, method))
        result = trainer.train()
        ledger = trainer.selection.ledger
        values = np.asarray(ledger.decisions()["score"], dtype=float) if name == "greats" else ledger[name]
        found: dict[str, Any] = {"auroc": auroc(-values, truth)}
        if setting == BRUTE:
            seen = trainer.visited
            whole, linear = trainer.products
            found = {"auroc": auroc(-whole[seen], truth[seen]), "auroc_linear": auroc(-linear[seen], truth[seen])}
            found["engine_apart"] = float(np.abs(ledger[name][seen] - linear[seen]).max() / np.abs(linear[seen]).max())
        # What the run says of each pair anyway, at its last visit.
        found["auroc_margin"] = auroc(-ledger["implicit_margin"], truth)
        found |= {"train_seconds": result.metrics["train_runtime"], "pairs": int(np.isfinite(values).sum())}
        return {"setting": setting, "size": size, "seed": seed, **found}


# ---- Cells ----


def cells(options: argparse.Namespace) -> list[tuple[str, int, int]]:
    first = [name for name in options.settings if name in CANDIDATES]
    chosen = [(setting, size, seed) for size in options.sizes for seed in options.choose for setting in first]
    return chosen + [
        (setting, size, seed) for size in options.sizes for seed in options.seeds for setting in options.settings
    ]


def report(options: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the reported seeds, and for each size the setting that was chosen on the others."""
    done = {(row["setting"], row["size"], row["seed"]): row for row in rows}
    found: dict[str, Any] = {"table": [], "chosen": {}}
    for size in options.sizes:
        tried = {}
        for setting in options.settings:
            first = [done[setting, size, s]["auroc"] for s in options.choose if (setting, size, s) in done]
            if setting in CANDIDATES and len(first) == len(options.choose) and first:
                tried[setting] = float(np.mean(first))
            reported = {s: done[setting, size, s] for s in options.seeds if (setting, size, s) in done}
            if not reported:
                continue
            row: dict[str, Any] = {"setting": setting, "size": size, "steps": options.steps or STEPS[size]}
            row |= {"seeds": list(reported), "aurocs": [one["auroc"] for one in reported.values()]}
            for key in ("auroc", "auroc_linear", "engine_apart", "auroc_margin", "train_seconds"):
                if all(key in one for one in reported.values()):
                    row[key] = float(np.mean([one[key] for one in reported.values()]))
            row["deviation"] = float(np.std(row["aurocs"], ddof=1)) if len(reported) > 1 else None
            row["chosen_on"] = tried.get(setting)
            found["table"].append(row)
        if tried:
            found["chosen"][str(size)] = max(tried, key=lambda name: tried[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps, where not those of the size")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2, 3, 4, 5, 6], help="reported")
    parser.add_argument("--choose", type=int, nargs="*", default=[0, 1], help="on which the best setting is chosen")
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--brute", action="store_true", help="only the brute force, beside the engine in the same run")
    add_options(parser)
    options = parser.parse_args()
    if options.brute:
        options.settings = [BRUTE]
    demo_model(options)
    wanted = cells(options)
    rows = run_cells(run, wanted, options)
    found = report(options, rows) | circumstances(options, wanted, rows)
    found["versions"] = {name: version(name) for name in ("torch", "transformers", "trl")}
    found["methods"] = {name: list(value) if value else None for name, value in SETTINGS.items()}
    write_json(Path(options.output), found)
    for row in found["table"]:
        each = " ".join(f"{value:.3f}" for value in row["aurocs"])
        print(f"{row['size']:>5} {row['setting']:<36}{row['auroc']:.3f} ({each})  margin {row['auroc_margin']:.3f}")
    print(f"chosen on seeds {options.choose}: {found['chosen']}; cells missing: {found['missing']}")


if __name__ == "__main__":
    main()
