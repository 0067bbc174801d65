"""
In-run products of SFT examples with a target's gradient, by this package or by `dattri-llm` (0.1.0): speed and values.

Called twice by `influence.py --dattri PYTHON`, once per side, each in an environment of its own: the same model, the
same batches in the same order and the same target of 8 examples, whose gradient is taken anew in every step, by all
linear layers but the head. dattri-llm is used as its documentation says: a `HookManager` with a
`DataSelectionCallback` that scores against a loader of the target, and drops nothing. Writes the sum of each example's
products and the median seconds of a step, with scores and without.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

ROWS, TARGET, BATCH, LENGTH, STEPS, WARMUP = 32, 8, 8, 128, 32, 4


def texts(rows: int, seed: int) -> Dataset:
    """Rows of exactly `LENGTH` tokens, so that the mean over tokens is that over examples."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 4000, (rows, LENGTH), generator=generator)
    return Dataset.from_list([{"input_ids": row} for row in drawn.tolist()])


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)


def make_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, Clock]:
    args = SFTConfig(
        folder,
        per_device_train_batch_size=BATCH,
        max_steps=STEPS,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        max_length=LENGTH,
        bf16=False,
        use_cpu=options.device == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(options.model, args=args, train_dataset=texts(ROWS, 0))
    clock = Clock()
    trainer.add_callback(clock)
    return trainer, clock


def ours(trainer: Any) -> list[float]:
    from dsel_trl import SelectionCallback
    from dsel_trl.methods.influence.inrun_shapley import InRunShapley

    class Watches(InRunShapley):
        """Values the examples in the order in which they come, and chooses none."""

        @property
        def hooks(self) -> frozenset[str]:
            return super().hooks - {"select"}

    method = Watches(target=texts(TARGET, 1), keep=1.0, scale="plain")
    trainer.add_callback(SelectionCallback(trainer, method))
    trainer.train()
    return trainer.selection.ledger[method.name].astype(float).tolist()


def theirs(trainer: Any) -> list[float]:
    from dattri_llm import DataSelectionCallback, HookManager, HookManagerConfig

    class Kept(DataSelectionCallback):
        """Keeps the scores, which it works out and then only compares with a threshold."""

        @staticmethod
        def select_samples(scores: torch.Tensor, **kwargs: Any) -> list[int]:
            found.append(scores.detach().float().cpu())
            return DataSelectionCallback.select_samples(scores, **kwargs)

    found: list[torch.Tensor] = []
    device = trainer.model.device
    target = torch.tensor(texts(TARGET, 1)["input_ids"], device=device)

    def loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    chosen = {
        name: "linear_io"
        for name, module in trainer.model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }
    callback = Kept(
        trainer.model,
        target="val_loader",
        val_loader=[target],
        val_loss_fn=loss,
        selection_kwargs={"threshold": float("-inf"), "threshold_mode": "hard"},
    )
    config = HookManagerConfig(hook_types=chosen)
    with HookManager(trainer.model, config=config, callbacks=[callback]).collect(deregister_on_exit=True):
        trainer.train()
    sums = torch.zeros(ROWS)
    for step, scores in enumerate(found):
        places = torch.arange(step * BATCH, (step + 1) * BATCH) % ROWS
        sums[places] += scores
    return sums.tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--who", choices=("dsel_trl", "dattri-llm"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(options, folder)
        trainer.train()
        found["stock_seconds"] = statistics.median(clock.seconds[WARMUP:])
        trainer, clock = make_trainer(options, folder)
        found["scores"] = ours(trainer) if options.who == "dsel_trl" else theirs(trainer)
        found["seconds"] = statistics.median(clock.seconds[WARMUP:])
    found["ratio"] = found["seconds"] / found["stock_seconds"]
    Path(options.output).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
