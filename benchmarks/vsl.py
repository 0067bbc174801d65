"""
Trained tokens per second: batches that fit their lengths against TRL's own.

    python -m benchmarks.vsl --documents documents.parquet --pairs pairs.parquet more_pairs.parquet --model MODEL

For each file the trainers take turns, some optimizer steps each, so that whatever else the machine does hits all of
them alike. Only real tokens count, padding does not: both sides of a pair, prompts included. On a CPU the seconds are
those of the process (one thread: the wall clock of a machine that does nothing else); with a GPU, the wall clock.
Prints a table and writes JSON; the interval of a ratio is a bootstrap over the turns (5%-95%).

`--same-loss N` trains on instead, for N seeds, and compares the validation loss after equal trained tokens.
"""

import argparse
import gc
import json
import os
import tempfile
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback

# name: (trainer arguments, selection)
DOCUMENTS = {
    "TRL default": ({}, None),
    "TRL group_by_length": ({"train_sampling_strategy": "group_by_length"}, None),
    "TRL packing (wrapped)": ({"packing": True, "packing_strategy": "wrapped"}, None),
    "TRL packing (bfd), by row": ({"packing": True, "row_by_row": True}, None),
    "token_budget": ({}, {"name": "token_budget"}),
    # A small micro-batch stays in a CPU's cache: packing row by row must be compared with this.
    "token_budget, by row": ({"row_by_row": True}, {"name": "token_budget"}),
    # Without a curriculum: the first steps are then like all others, which is what a short measurement needs.
    "dataset_decomposition": (
        {},
        {"name": "dataset_decomposition", "mode": "decompose", "curriculum": "uniform", "cycles": 1},
    ),
}
# DPOTrainer cannot group by length: the sampler looks for `input_ids`, which pairs do not have.
PAIRS = {
    "TRL default": ({}, None),
    "token_budget": ({}, {"name": "token_budget"}),
    "dataset_decomposition": (
        {},
        {"name": "dataset_decomposition", "min_log2": 5, "curriculum": "uniform", "cycles": 1},
    ),
}


def seconds() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


class Turns(TrainerCallback):
    """Lets one trainer at a time make some steps; counts the tokens and seconds of each turn."""

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore, turns: int, steps: int) -> None:
        self.mine, self.following, self.turns, self.steps = mine, following, turns, steps
        self.rows: list[tuple[int, int, float]] = []
        self.tokens = self.slots = self.done = 0
        self.started = 0.0

    def saw(self, mask: torch.Tensor | None, slots: int) -> None:
        self.tokens += slots if mask is None else int(mask.sum())
        self.slots += slots

    def on_train_begin(self, *args, **kwargs) -> None:
        self.mine.acquire()
        self.started = seconds()

    def on_step_end(self, args, state, control, **kwargs):
        self.done += 1
        if self.done % self.steps:
            return control
        self.rows.append((self.tokens, self.slots, seconds() - self.started))
        self.tokens = self.slots = 0
        control.should_training_stop = len(self.rows) == self.turns
        self.following.release()
        if not control.should_training_stop:
            self.mine.acquire()
            self.started = seconds()
        return control


def build_trainer(options, rows: Dataset, kind: str, variant: str, seed: int = 0, other: dict | None = None, **more):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback, create_method

    config, selection = (DOCUMENTS if kind == "sft" else PAIRS)[variant]
    config, selection = {**config, **more}, other or selection
    batch, accumulation, full = options.batch_size, 1, 1
    if kind == "sft":
        # As many tokens per step as the default batch has on average, in full rows.
        lengths = [len(ids) for ids in rows["input_ids"]]
        full = max(1, round(batch * float(np.minimum(lengths, options.max_length).mean()) / options.max_length))
    if config.pop("row_by_row", False):
        # Without flash attention a flattened row costs the square of its length: the rows of a step go one by one.
        batch, accumulation = 1, full
    elif config.get("packing"):
        batch = full
    if selection is not None and accumulation > 1:
        selection = {**selection, "tokens": options.max_length}
    model_config = AutoConfig.from_pretrained(options.model)
    model_config.max_position_embeddings = max(model_config.max_position_embeddings, options.max_length + 1)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(options.model, config=model_config, dtype="float32")
    args = {
        "output_dir": tempfile.mkdtemp(dir=options.scratch),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_length": options.max_length,
        "seed": seed,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "learning_rate": 1e-3 if kind == "sft" else 1e-4,
        **config,
    }
    if selection is not None and selection.get("mode") == "decompose":
        args |= {"max_length": None, "per_device_train_batch_size": 1}
        selection = {**selection, "max_log2": options.max_length.bit_length() - 1, "tokens": full * options.max_length}
    cls, config_cls = (SFTTrainer, SFTConfig) if kind == "sft" else (DPOTrainer, DPOConfig)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    trainer = cls(model, args=config_cls(**args), train_dataset=rows, processing_class=tokenizer)
    if selection is not None:
        trainer.add_callback(SelectionCallback(trainer, create_method(**selection)))
    return trainer


def watch(trainer, turns: Turns) -> None:
    """Counts tokens and padding of every training batch on its way into the loss."""
    own = trainer.compute_loss

    def counting(model, inputs, *args, **kwargs):
        turns.saw(inputs.get("attention_mask"), inputs["input_ids"].numel())
        return own(model, inputs, *args, **kwargs)

    trainer.compute_loss = counting


def measure(options, rows: Dataset, kind: str) -> dict[str, dict]:
    variants = DOCUMENTS if kind == "sft" else PAIRS
    names, failed = [], {}
    made = []
    for name in variants:
        try:
            trainer = build_trainer(options, rows, kind, name, max_steps=10_000)
        except Exception as error:
            failed[name] = {"failed": f"{type(error).__name__}: {error}"}
            continue
        names.append(name)
        made.append(trainer)
    gates = [threading.Semaphore(0) for _ in names]
    turns = [
        Turns(gates[i], gates[(i + 1) % len(names)], options.turns + 1, options.steps) for i, _ in enumerate(names)
    ]
    for trainer, turn in zip(made, turns, strict=True):
        trainer.add_callback(turn)
        watch(trainer, turn)

    def train(trainer) -> None:
        try:
            trainer.train()
        except BaseException:
            # The others would wait for their turn for ever.
            traceback.print_exc()
            os._exit(1)

    threads = [threading.Thread(target=train, args=(trainer,)) for trainer in made]
    for thread in threads:
        thread.start()
    gates[0].release()
    for thread in threads:
        thread.join()
    # The first turn warms up.
    return {name: {"turns": turn.rows[1:]} for name, turn in zip(names, turns, strict=True)} | failed


def load(options, path: str, kind: str) -> Dataset:
    rows = Dataset.from_parquet(path)
    rows = rows.shuffle(seed=0).select(range(min(options.rows, len(rows))))
    if kind == "dpo":
        return rows.select_columns(["prompt", "chosen", "rejected"])
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = [[*i, tokenizer.eos_token_id] for i in tokenizer(list(rows[options.column]))["input_ids"]]
    return Dataset.from_dict({"input_ids": ids})


def pooled(rows: np.ndarray) -> np.ndarray:
    """Tokens per second of turns `(..., turns, 3)`: all tokens over all seconds."""
    return rows[..., 0].sum(axis=-1) / rows[..., 2].sum(axis=-1)


SAME_LOSS = {
    "sft": {
        "TRL default": None,
        "token_budget": {"name": "token_budget"},
        "dataset_decomposition": {"name": "dataset_decomposition", "mode": "decompose", "min_log2": 6},
    },
    "dpo": {
        "TRL default": None,
        "token_budget": {"name": "token_budget"},
        "token_budget, weighting: batch": {"name": "token_budget", "weighting": "batch"},
    },
}


def same_loss(options, path: str, kind: str) -> dict[str, list[float]]:
    """Validation loss after one epoch over the same rows, so after the same trained tokens, for each seed."""
    rows = load(options, path, kind)
    if kind == "sft":
        rows = rows.map(lambda row: {"input_ids": row["input_ids"][: options.max_length]})
    held = len(rows) // 5
    train, test = rows.select(range(held, len(rows))), rows.select(range(held))
    losses: dict[str, list[float]] = {name: [] for name in SAME_LOSS[kind]}
    for seed in range(options.same_loss):
        for name, selection in SAME_LOSS[kind].items():
            trainer = build_trainer(options, train, kind, "TRL default", seed, selection, num_train_epochs=1)
            trainer.train()
            trainer.eval_dataset = build_trainer(options, test, kind, "TRL default", seed).train_dataset
            losses[name].append(trainer.evaluate()["eval_loss"])
    print(f"\n{Path(path).stem}: validation loss, {options.same_loss} seeds")
    print(f"{'batches':<34}{'mean':>8}  difference (deviation)")
    base = np.array(losses["TRL default"])
    for name, values in losses.items():
        difference = np.array(values) - base
        spread = f"{difference.mean():+.4f} ({difference.std(ddof=1):.4f})" if name != "TRL default" else ""
        print(f"{name:<34}{np.mean(values):>8.4f}  {spread}", flush=True)
    print(f"standard deviation of TRL default over the seeds: {base.std(ddof=1):.4f}")
    return losses


def table(name: str, results: dict[str, dict]) -> None:
    print(f"\n{name}\n{'batches':<28}{'tokens/s':>10}{'25%-75%':>16}{'real share':>12}{'x default':>11}{'5%-95%':>14}")
    base = np.array(results["TRL default"]["turns"])
    draws = np.random.default_rng(0).integers(0, len(base), size=(2, 4000, len(base)))
    for variant, result in results.items():
        if "failed" in result:
            print(f"{variant:<28} failed: {result['failed'][:90]}")
            continue
        rows = np.array(result["turns"])
        low, high = np.quantile(rows[:, 0] / rows[:, 2], [0.25, 0.75])
        ratio = pooled(rows) / pooled(base)
        interval = np.quantile(pooled(rows[draws[0]]) / pooled(base[draws[1]]), [0.05, 0.95])
        share = rows[:, 0].sum() / rows[:, 1].sum()
        result |= {"tokens_per_second": pooled(rows), "ratio": ratio, "interval": interval.tolist(), "share": share}
        spread = f"{low:.0f}-{high:.0f}"
        print(
            f"{variant:<28}{pooled(rows):>10.0f}{spread:>16}{share:>12.3f}{ratio:>11.2f}"
            f"{interval[0]:>7.2f}-{interval[1]:.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", help="parquet file of documents")
    parser.add_argument("--column", default="text", help="column of the documents")
    parser.add_argument("--pairs", nargs="*", default=[], help="parquet files of preference pairs")
    parser.add_argument("--model", required=True, help="model to train (a small one)")
    parser.add_argument("--max-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4000, help="rows of each file, drawn at random")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps per turn")
    parser.add_argument("--same-loss", type=int, default=0, metavar="N", help="compare validation losses of N seeds")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("vsl.json"))
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    report = {"batch_size": options.batch_size, "max_length": options.max_length, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as options.scratch:
        for path, kind in [(options.documents, "sft")] * bool(options.documents) + [(p, "dpo") for p in options.pairs]:
            if options.same_loss:
                results = same_loss(options, path, kind)
            else:
                results = measure(options, load(options, path, kind), kind)
                table(Path(path).stem, results)
            report[Path(path).stem] = results
            gc.collect()
    options.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
