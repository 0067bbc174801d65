"""
What in-run scores cost: step time and peak memory against stock TRL, and other ways to the same products beside them.

Stock and scored trainers take turns, one optimizer step each, in one process, so that whatever else the machine does
hits them alike; a step's ratio is that to the stock step beside it. The target's gradient is renewed every `--refresh`
steps: the median ratio is that of a step between two refreshes, the table also says what a refresh costs and what a
step costs on average at several intervals. Beside them, on the same batch and model: a loop of one backward pass per
example, and `torch.func.vmap` of `grad`, both of which give the same products and no training step.

    python -m benchmarks.influence --output influence.json                  # a Llama of 6 million parameters, on a CPU
    python -m benchmarks.influence --device cuda --output influence.json    # of 135 million and of one billion

With `--dattri PYTHON`, the interpreter of an environment that has `dattri-llm`, `trl` and this benchmark's folder, the
same SFT batches are trained and scored there too (`dattri_rival.py`).
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import SIZES, VOCABULARY, pairs, tokenizer
from benchmarks.overhead import Turns, in_turns, own_peak
from dsel_trl.data.files import write_json

ROOT = Path(__file__).parents[1]
LIMITS = {"full": 1.40, "lora": 1.08}
HEADS = {"135M": 49152, "1B": 32000}
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 4}
TARGET = 8
INTERVALS = (1, 5, 10, 20, 50)
SCORES = "inrun_shapley"
# Model, trainer, what is trained, examples of a batch, tokens of a sequence, and the method that scores.
Cell = tuple[str, str, str, int, int, str]
GRIDS: dict[str, list[Cell]] = {
    "cpu": [
        ("6M", "sft", "full", 8, 256, SCORES),
        ("6M", "sft", "lora", 8, 256, SCORES),
        ("6M", "sft", "full", 8, 256, "grand"),
        ("6M", "sft", "full", 8, 256, "el2n"),
        ("6M", "sft", "full", 8, 256, "greats"),
        ("6M", "sft", "full", 8, 256, "less"),
    ],
    "cuda": [
        ("135M", "sft", "full", 16, 1024, SCORES),
        ("135M", "sft", "lora", 16, 1024, SCORES),
        ("1B", "sft", "full", 4, 1024, SCORES),
        ("1B", "sft", "lora", 8, 1024, SCORES),
        ("1B", "dpo", "lora", 4, 1024, SCORES),
    ],
}
# What they are measured with: `greats` has no pass of its own for candidates, all others keep every example.
PARAMETERS: dict[str, dict[str, Any]] = {
    SCORES: {"keep": 1.0},
    "grand": {"keep": 1.0},
    "el2n": {"keep": 1.0},
    "greats": {},
    "less": {"keep": 1.0, "warm_up": 0.5, "checkpoints": 1},
}
# Measure nothing in the ordinary step, but all examples at some moments.
AT_MOMENTS = ("less",)


class TimedTurns(Turns):
    """Turns that wait for the device before they look at the clock."""

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait()
        super().on_step_end(*args, **kwargs)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_folder(folder: Path, size: str) -> str:
    """A random Llama with a tokenizer for its first words."""
    made = folder / size
    if not made.exists():
        torch.manual_seed(0)
        shape = SMALL if size == "6M" else SIZES[size]
        vocabulary = HEADS.get(size, VOCABULARY)
        config = LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=True, max_position_embeddings=2048, **shape)
        LlamaForCausalLM(config).save_pretrained(made)
        tokenizer().save_pretrained(made)
    return str(made)


def rows_of(kind: str, count: int, length: int, seed: int) -> Dataset:
    made = pairs(count, length, seed=seed).remove_columns("weight")
    return made if kind == "dpo" else made.remove_columns("rejected").rename_column("chosen", "completion")


def build_trainer(cell: Cell, options: argparse.Namespace, model: str, steps: int, scored: bool):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback, get_method_card

    _, kind, what, batch, length, method = cell
    config, trainer_class = (DPOConfig, DPOTrainer) if kind == "dpo" else (SFTConfig, SFTTrainer)
    peft_config = None
    if what == "lora":
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    arguments = config(
        tempfile.mkdtemp(dir=options.folder),
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_length=length,
        bf16=options.device == "cuda",
        use_cpu=options.device == "cpu",
        gradient_checkpointing=options.checkpointing,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    train = rows_of(kind, batch * 8, length, 0)
    trainer = trainer_class(model, args=arguments, train_dataset=train, peft_config=peft_config)
    if scored:
        how = dict(PARAMETERS[method])
        own = {parameter.name for parameter in get_method_card(method).parameters}
        if "target" in own:
            how["target"] = rows_of(kind, TARGET, length, 1)
        if "target_refresh" in own:
            how["target_refresh"] = options.refresh
        if "layers" in own:
            how["layers"] = "lora" if what == "lora" else "linear"
        trainer.add_callback(SelectionCallback(trainer, method, **how))
    return trainer


def refreshes(seconds: list[float], options: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Steps between two refreshes and those with one, the warm-up left out."""
    steps = range(options.warmup, len(seconds))
    return [k for k in steps if k % options.refresh], [k for k in steps if k % options.refresh == 0]


def label(cell: Cell) -> str:
    """What a row says of itself."""
    size, kind, what, batch, length, method = cell
    trained = "LoRA r=8" if what == "lora" else "all linear layers"
    return f"{method}: {size} {kind}, {trained}, {batch} x {length} tokens"


def measure(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    model, what = model_folder(Path(options.folder), cell[0]), cell[2]
    steps = options.warmup + options.steps
    # The control: what this measurement calls a difference where there is none. Three models of 1B are too many.
    wanted = [False, True] if cell[0] == "1B" else [False, True, False]
    stock, scored, *again = in_turns(
        [partial(build_trainer, cell, options, model, steps, scored) for scored in wanted], TimedTurns
    )
    plain, renewing = refreshes(scored, options)
    ratios = [scored[k] / stock[k] for k in plain]
    quarters = statistics.quantiles(ratios, n=4)
    median = statistics.median(stock[options.warmup :])
    between = statistics.median(ratios)
    extra = statistics.median(scored[k] / stock[k] for k in renewing) - between if renewing else float("nan")
    row = {
        "what": label(cell),
        "stock_seconds": median,
        "ratio": between,
        "quartiles": [quarters[0], quarters[2]],
        "limit": LIMITS[what] if cell[-1] == SCORES else None,
        "control": statistics.median(again[0][k] / stock[k] for k in plain) if again else None,
        "refresh_in_steps": extra,
        "mean_ratio_at": {str(n): between + extra / n for n in sorted({*INTERVALS, options.refresh})},
    }
    gc.collect()
    peaks = [peak_memory(cell, options, model, scored) for scored in (False, True)]
    return row | {"stock_peak_mib": peaks[0], "peak_mib": peaks[1], "memory_ratio": peaks[1] / peaks[0]}


def measure_moment(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """What it takes to measure a batch of examples once, in stock steps: of whole runs, one with such a moment."""
    model, (_, _, _, batch, _, _) = model_folder(Path(options.folder), cell[0]), cell
    seconds = []
    for scored in (False, True):
        trainer = build_trainer(cell, options, model, 8, scored)
        # The two runs stand one after the other: what else the machine does must not count.
        started = time.process_time()
        trainer.train()
        seconds.append(time.process_time() - started)
    stock, batches = seconds[0] / 8, len(trainer.train_dataset) / batch + TARGET / batch
    peaks = [peak_memory(cell, options, model, scored) for scored in (False, True)]
    return {
        "what": label(cell),
        "stock_seconds": stock,
        "limit": None,
        "refresh_in_steps": (seconds[1] - seconds[0]) / batches / stock,
        "stock_peak_mib": peaks[0],
        "peak_mib": peaks[1],
        "memory_ratio": peaks[1] / peaks[0],
    }


def peak_memory(cell: Cell, options: argparse.Namespace, model: str, scored: bool) -> float:
    """Peak memory in MiB (of the device, or resident) of a process that trains for a few steps, with one refresh."""
    command = [sys.executable, "-m", "benchmarks.influence", "--memory-of", json.dumps([*cell, model, scored])]
    command += ["--device", options.device, "--refresh", str(options.refresh)]
    command += ["--checkpointing"] * options.checkpointing
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env={**os.environ, **allocator}, cwd=ROOT
    )
    return float(done.stdout.split()[-1])


# ---- Other ways to the same products ----


def others(cell: Cell, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds for the products of a batch's gradients with one direction: in a loop, and by `vmap` of `grad`."""
    size, _, what, batch, length, _ = cell
    model = LlamaForCausalLM.from_pretrained(model_folder(Path(options.folder), size), attn_implementation="eager")
    model = model.to(options.device).train()
    if what == "lora":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, config)
    linear = {
        name
        for name, value in model.named_parameters()
        if value.requires_grad and value.dim() == 2 and "embed" not in name and "lm_head" not in name
    }
    wanted = {name: value for name, value in model.named_parameters() if name in linear}
    held = {name: value.detach() for name, value in model.named_parameters() if name not in linear}
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCABULARY - 3, (batch, length), device=options.device)
    direction = {name: torch.randn_like(value) for name, value in wanted.items()}

    def loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[1:])

    def autocast() -> Any:
        return torch.autocast("cuda", torch.bfloat16, enabled=options.device == "cuda")

    def loop() -> torch.Tensor:
        found = []
        for ids in tokens:
            with autocast():
                value = loss(model(input_ids=ids[None], use_cache=False).logits, ids)
            grads = torch.autograd.grad(value, list(wanted.values()))
            found.append(sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True)))
        return torch.stack(found)

    # Causal by hand: what makes the mask looks at values, which `vmap` does not allow.
    mask = torch.full((length, length), torch.finfo(torch.float32).min, device=options.device).triu(1)[None, None]

    def of_one(parameters: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        how = {"input_ids": ids[None], "attention_mask": mask, "use_cache": False}
        how["position_ids"] = torch.arange(length, device=options.device)[None]
        with autocast():
            logits = torch.func.functional_call(model, {**parameters, **held}, kwargs=how).logits
        return loss(logits, ids)

    def mapped() -> torch.Tensor:
        grads = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0))(
            {name: value.detach() for name, value in wanted.items()}, tokens
        )
        return torch.stack([(grads[n].flatten(1) * direction[n].flatten()).sum(1) for n in wanted]).sum(0)

    found: dict[str, Any] = {}
    values = {}
    for name, way in (("loop", loop), ("vmap", mapped)):
        try:
            if options.device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            values[name] = way().detach()
            took = []
            for _ in range(3):
                wait()
                started = time.perf_counter()
                way()
                wait()
                took.append(time.perf_counter() - started)
            found[name] = {"seconds": statistics.median(took)}
            if options.device == "cuda":
                found[name]["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        gc.collect()
    if len(values) == 2:
        found["apart"] = float((values["loop"] - values["vmap"]).norm() / values["loop"].norm())
    return found


def rival(options: argparse.Namespace) -> dict[str, Any]:
    """Speed and agreement with `dattri-llm` on the same SFT batches; see `dattri_rival.py`."""
    folder = Path(options.folder) / "rival"
    folder.mkdir()
    model = model_folder(Path(options.folder), "6M" if options.device == "cpu" else "135M")
    script, found = Path(__file__).with_name("dattri_rival.py"), {}
    for who, python in (("dsel_trl", sys.executable), ("dattri-llm", options.dattri)):
        output = folder / f"{who}.json"
        command = [python, str(script), "--who", who, "--model", model, "--device", options.device]
        done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True)
        if done.returncode:
            return {"error": f"{who}: {done.stderr.strip().splitlines()[-1]}"}
        found[who] = json.loads(output.read_text(encoding="utf-8"))
    from scipy.stats import spearmanr

    ours, theirs = (found[who].pop("scores") for who in ("dsel_trl", "dattri-llm"))
    found["rank_correlation"] = float(spearmanr(ours, theirs).statistic)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each trainer")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--refresh", type=int, default=20, help="steps for which one gradient of the target serves")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", type=int, nargs="*", help="which rows of the grid, from 0 (default: all)")
    parser.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing, as TRL has it")
    parser.add_argument("--dattri", help="the Python of an environment with dattri-llm")
    parser.add_argument("--output", default="influence.json")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(options.threads)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        options.folder = folder
        if options.memory_of:
            *cell, model, scored = json.loads(options.memory_of)
            build_trainer(tuple(cell), options, model, 3, scored).train()
            on_gpu = options.device == "cuda"
            print(torch.cuda.max_memory_allocated() / 2**20 if on_gpu else own_peak() / 1024)
            return
        result: dict[str, Any] = {
            "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "threads": options.threads,
            "target": TARGET,
            "refresh": options.refresh,
            "steps": options.steps,
            "checkpointing": options.checkpointing,
        }
        output = Path(options.output)
        before = json.loads(output.read_text(encoding="utf-8")) if output.is_file() else {}
        same = all(before.get(key) == value for key, value in result.items())
        # What was measured with the same settings stands: a run that was stopped goes on.
        result = {**result, "rows": [], **(before if same else {})}
        done = {row["what"] for row in result["rows"]}
        grid = GRIDS[options.device]
        for number in range(len(grid)) if options.cells is None else options.cells:
            if label(grid[number]) in done:
                continue
            row = (measure_moment if grid[number][-1] in AT_MOMENTS else measure)(grid[number], options)
            if grid[number][1] == "sft" and grid[number][-1] == SCORES:
                row["others"] = others(grid[number], options)
                for way in ("loop", "vmap"):
                    if "seconds" in row["others"][way]:
                        row["others"][way]["in_steps"] = row["others"][way]["seconds"] / row["stock_seconds"]
            result["rows"].append(row)
            print(json.dumps(row), flush=True)
            write_json(output, result)
        if options.dattri:
            result["dattri"] = rival(options)
            print(json.dumps(result["dattri"]))
            write_json(output, result)


if __name__ == "__main__":
    main()
