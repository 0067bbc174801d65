"""
What attaching costs: step time and peak memory with a method attached, against stock TRL.

The trainers take turns, one optimizer step each, so that whatever else the machine does hits all of them alike. A step
is everything between two step ends: fetching, forward, backward, optimizer, ledger. Prints a table and writes JSON.

    python -m benchmarks.overhead --pairs 40 --output overhead.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

VARIANTS = {
    "stock": None,
    # The control: what this measurement calls a difference where there is none.
    "stock, again": None,
    "uniform": ("uniform", {}),
    "margin (weights)": ("margin", {"action": "weight"}),
}
ROOT = Path(__file__).parents[1]
LIMITS = {"uniform": 1.01, "margin (weights)": 1.02}
MEMORY_LIMIT = 1.01
VOCABULARY, PROMPT, COMPLETION, BATCH = 2048, 64, 192, 8


def build_model(folder: str) -> None:
    """A Llama of about 6 million parameters and a tokenizer for its vocabulary."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {f"w{i}": i for i in range(VOCABULARY - 3)} | {
        "<pad>": VOCABULARY - 3,
        "<eos>": VOCABULARY - 2,
        "<unk>": VOCABULARY - 1,
    }
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)


def build_data(rows: int) -> Dataset:
    """Pairs of exactly `PROMPT + COMPLETION` tokens."""
    rng = np.random.default_rng(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - 3, length))

    return Dataset.from_list(
        [
            {
                "prompt": text(PROMPT),
                "chosen": " " + text(COMPLETION - 1) + " <eos>",
                "rejected": " " + text(COMPLETION - 1) + " <eos>",
            }
            for _ in range(rows)
        ]
    )


def build_trainer(variant: str, model: str, steps: int):
    from trl import DPOConfig, DPOTrainer

    from dsel_trl import SelectionCallback

    args = DPOConfig(
        tempfile.mkdtemp(),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        max_length=PROMPT + COMPLETION,
    )
    trainer = DPOTrainer(model, args=args, train_dataset=build_data(BATCH * 8))
    if VARIANTS[variant] is not None:
        name, parameters = VARIANTS[variant]
        trainer.add_callback(SelectionCallback(trainer, name, **parameters))
    return trainer


class Turns(TrainerCallback):
    """Lets one trainer at a time make one step, and times it."""

    def __init__(self, mine: threading.Semaphore, following: threading.Semaphore) -> None:
        self.mine, self.following = mine, following
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_begin(self, *args, **kwargs) -> None:
        self.mine.acquire()
        self.started = time.perf_counter()

    def on_step_end(self, *args, **kwargs) -> None:
        self.seconds.append(time.perf_counter() - self.started)
        self.following.release()
        self.mine.acquire()
        self.started = time.perf_counter()

    def on_train_end(self, *args, **kwargs) -> None:
        self.following.release()


def in_turns(makers: Sequence[Callable[[], Any]], turn_class: type[Turns] = Turns) -> list[list[float]]:
    """Step times of each trainer, one step in turn."""
    gates = [threading.Semaphore(0) for _ in makers]
    trainers, turns = [], []
    for index, make in enumerate(makers):
        trainer = make()
        turn = turn_class(gates[index], gates[(index + 1) % len(gates)])
        trainer.add_callback(turn)
        trainers.append(trainer)
        turns.append(turn)
    threads = [threading.Thread(target=trainer.train) for trainer in trainers]
    for thread in threads:
        thread.start()
    gates[0].release()
    for thread in threads:
        thread.join()
    return [turn.seconds for turn in turns]


def time_steps(model: str, pairs: int, warmup: int = 3) -> dict[str, list[float]]:
    """Step times of each variant, interleaved; the order of the turns rotates by construction of the ring."""
    found = in_turns([partial(build_trainer, variant, model, pairs + warmup) for variant in VARIANTS])
    return {variant: seconds[warmup:] for variant, seconds in zip(VARIANTS, found, strict=True)}


def own_peak() -> int:
    """Peak resident memory of this process in KiB. `ru_maxrss` would do, but begins with what the parent had."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def peak_memory(variant: str, model: str) -> int:
    """Peak resident memory in KiB of a process that trains this variant for 4 steps."""
    command = [sys.executable, "-m", "benchmarks.overhead", "--memory-of", variant, "--model", model]
    # Without these the C allocator keeps freed tensors by its own lights, and the same run differs by 8%.
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **allocator}, cwd=ROOT
    )
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=40, help="timed steps per variant")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="overhead.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    if options.memory_of:
        build_trainer(options.memory_of, options.model, 4).train()
        print(own_peak())
        return

    with tempfile.TemporaryDirectory() as model:
        build_model(model)
        seconds = time_steps(model, options.pairs)
        memory = {v: statistics.median(peak_memory(v, model) for _ in range(3)) for v in VARIANTS}
    result = {"pairs": options.pairs, "threads": options.threads, "torch": torch.__version__, "variants": {}}
    print(f"{'variant':<18}{'step s':>8}{'ratio':>9}{'  25%-75%':>16}{'limit':>7}{'peak MiB':>10}{'ratio':>8}")
    for variant in VARIANTS:
        ratios = sorted(a / b for a, b in zip(seconds[variant], seconds["stock"], strict=True))
        quarters = statistics.quantiles(ratios, n=4) if variant != "stock" else [1.0, 1.0, 1.0]
        row = {
            "median_step_seconds": statistics.median(seconds[variant]),
            "median_ratio": statistics.median(ratios),
            "ratio_quartiles": [quarters[0], quarters[2]],
            "limit": LIMITS.get(variant),
            "peak_memory_kib": memory[variant],
            "memory_ratio": memory[variant] / memory["stock"],
            "memory_limit": MEMORY_LIMIT,
        }
        result["variants"][variant] = row
        spread = f"{quarters[0]:.4f}-{quarters[2]:.4f}"
        print(
            f"{variant:<18}{row['median_step_seconds']:>8.3f}{row['median_ratio']:>9.4f}{spread:>16}"
            f"{row['limit'] or '':>7}{row['peak_memory_kib'] / 1024:>10.0f}{row['memory_ratio']:>8.4f}"
        )
    with open(options.output, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
