"""Stages: datasets trained one after the other by one command, and what is forgotten of the earlier ones."""

import copy
import dataclasses
import gc
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..core.randomness import stream
from ..data.files import save_arrays, write_json
from ..data.loading import AnyDataset, number_rows
from ..data.stages import Stream, read_replay, split_by
from .arguments import Arguments
from .train import Job, build_trainer, find_model, load_datasets, make_methods, resumable, train

logger = logging.getLogger(__name__)

ACCURACIES = ("rewards/accuracies", "accuracy", "mean_token_accuracy")
REMEDY = "each stage is judged at its end: give it a `dataset_test_split` or an `eval_dataset_name`"
DONE, LEFT = "stage.json", "left.safetensors"


@dataclass(frozen=True)
class Stage:
    """
    One stage of a stream.

    Args:
        name (`str`): what it is called; its folder has it in its name.
        max_steps (`int`, *optional*): its steps, where they are not those of the run.
        num_train_epochs (`float`, *optional*): its epochs, likewise.
        max_tokens (`int`, *optional*):
            Trained tokens, padding not counted, with which it ends: with the optimizer step that reaches them. Steps
            and epochs are then its longest, and what the learning rate's schedule goes by.
    """

    name: str
    max_steps: int | None = None
    num_train_epochs: float | None = None
    max_tokens: int | None = None


@dataclass
class Stages:
    """All stages of a run: what they are trained on, judged by, and how earlier rows come again."""

    stages: list[Stage]
    stream: Stream
    evaluations: dict[str, AnyDataset]
    replay: str | float


def _entry_arguments(arguments: Arguments, entry: dict[str, Any]) -> Arguments:
    """The run's arguments with the dataset of one stage in the place of its own."""
    own = {key: entry[key] for key in entry if key.startswith("dataset_")}
    script = dataclasses.replace(arguments.script, **own)
    return dataclasses.replace(
        arguments, script=script, eval_dataset_name=entry.get("eval_dataset_name", arguments.eval_dataset_name)
    )


def load_stages(arguments: Arguments) -> Stages:
    """
    Loads the data of all stages and checks what can be checked before the first one is trained.

    Raises:
        `ValueError`: for data that is missing or does not go together.
    """
    replay = read_replay(arguments.replay)
    if isinstance(arguments.stages, dict):
        column = arguments.stages["column"]
        train_rows, judged = load_datasets(arguments, evaluate=True, remedy=REMEDY)
        trains, evaluations = split_by(train_rows, column), split_by(judged, column)
        missing = [name for name in trains if name not in evaluations]
        if missing:
            raise ValueError(f"stages: no row of the evaluation data has {column} {missing[0]!r}, but {REMEDY}.")
        stages = [Stage(name) for name in trains]
    else:
        stages, trains, evaluations = [], {}, {}
        for entry in arguments.stages or []:
            name = str(entry.get("name") or Path(str(entry["dataset_name"])).stem)
            if name in trains:
                raise ValueError(f"stages: two of them are called {name!r}: give them another `name`.")
            train_rows, judged = load_datasets(_entry_arguments(arguments, entry), evaluate=True, remedy=REMEDY)
            trains[name], evaluations[name] = train_rows, judged
            stages.append(Stage(name, *(entry.get(key) for key in ("max_steps", "num_train_epochs", "max_tokens"))))
    if len(stages) < 2:
        raise ValueError(f"stages: there is only {[stage.name for stage in stages]}: a stream has at least two.")
    return Stages(stages, Stream.of([stage.name for stage in stages], list(trains.values())), evaluations, replay)


def stage_folder(output_dir: str, index: int, stage: Stage) -> Path:
    """Where a stage writes: checkpoints, its selection, its model."""
    return Path(output_dir) / f"stage-{index + 1}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', stage.name)}"


def _fingerprint(arguments: Arguments, plan: Stages, index: int) -> str:
    """What must be the same for a finished stage to count as one of this run."""
    training = arguments.training
    content = [
        [dataclasses.asdict(stage) for stage in plan.stages[: index + 1]],
        [plan.stream.starts[: index + 2].tolist(), plan.stream.rows.column_names],
        arguments.selection,
        plan.replay,
        arguments.kind,
        str(arguments.model.model_name_or_path),
        [training.seed, training.learning_rate, training.max_steps, training.num_train_epochs],
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _training(arguments: Arguments, stage: Stage, folder: Path) -> Any:
    # A shallow copy: constructing the configuration again would undo what its first construction settled.
    training = copy.copy(arguments.training)
    training.output_dir = str(folder)
    training.run_name = f"{training.run_name}-{stage.name}" if training.run_name else stage.name
    if stage.max_steps is not None:
        training.max_steps = stage.max_steps
    if stage.num_train_epochs is not None:
        training.num_train_epochs = stage.num_train_epochs
        if stage.max_steps is None:
            training.max_steps = -1
    if training.include_num_input_tokens_seen == "no":
        training.include_num_input_tokens_seen = "non_padding"
    return training


class _EndsByTokens(TrainerCallback):
    """Ends a training with the step that brings it to so many tokens."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.num_input_tokens_seen >= self.tokens:
            control.should_training_stop = True


def _cut_off(folder: Path, stage: Stage) -> str | None:
    """
    The checkpoint that a stage goes on from, if it was cut off.

    One of its very end is none: the trainer would make one more step behind it, so such a stage is trained anew.
    """
    found = resumable(folder)
    if found is None:
        return None
    state = json.loads((Path(found) / "trainer_state.json").read_text(encoding="utf-8"))
    limits = {"global_step": state["max_steps"], "num_input_tokens_seen": stage.max_tokens}
    ended = any(limit is not None and state[key] >= limit for key, limit in limits.items())
    return None if ended else found


def _judge(trainer: Any, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Loss, and accuracy where the trainer has one, on the held-out rows of each stage."""
    found: dict[str, dict[str, float]] = {"loss": {}, "accuracy": {}}
    for name in names:
        metrics = trainer.evaluate(trainer.eval_dataset[name])
        found["loss"][name] = float(metrics["eval_loss"])
        accuracy = next((metrics[f"eval_{key}"] for key in ACCURACIES if f"eval_{key}" in metrics), None)
        if accuracy is not None:
            found["accuracy"][name] = float(accuracy)
    return {measure: values for measure, values in found.items() if values}


def _left(trainer: Any) -> np.ndarray:
    """Rows of a stage's pool that its methods drop for good, by their position in the pool."""
    selection = getattr(trainer, "selection", None)
    if selection is None:
        return np.empty(0, dtype=np.int64)
    with selection.costs.clock():
        stay = selection.methods.survivors(selection.run)
    if stay is None:
        return np.empty(0, dtype=np.int64)
    return np.asarray(selection.run.rows.positions[~stay], dtype=np.int64)


def _run_stage(arguments: Arguments, plan: Stages, index: int, model: str, folder: Path) -> dict[str, Any]:
    """Trains one stage, judges it on all stages so far, and writes its model and what came out."""
    stage = plan.stages[index]
    training = _training(arguments, stage, folder)
    seed = training.seed if training.data_seed is None else training.data_seed
    pool = plan.stream.pool(index, plan.replay, stream(seed, "stages/replay", index))
    seen = [before.name for before in plan.stages[: index + 1]]
    rows = number_rows(plan.stream.rows.select(pool))
    job = Job(arguments, rows, {name: plan.evaluations[name] for name in seen}, model, continued=index > 0)
    trainer = build_trainer(job, training, arguments.selection)
    logger.info("Stage %d of %d, %r: %d rows.", index + 1, len(plan.stages), stage.name, len(pool))
    if stage.max_tokens is not None:
        trainer.add_callback(_EndsByTokens(stage.max_tokens))
    train(trainer, _cut_off(folder, stage) if arguments.training.resume_from_checkpoint else None)
    tokens = int(trainer.state.num_input_tokens_seen)
    if stage.max_tokens is not None and tokens < stage.max_tokens:
        logger.warning(
            "Stage %r has ended after %d of %d tokens: give it more steps.", stage.name, tokens, stage.max_tokens
        )
    result: dict[str, Any] = {
        "name": stage.name,
        "fingerprint": _fingerprint(arguments, plan, index),
        "pool": len(pool),
        "steps": int(trainer.state.global_step),
        "tokens": tokens,
        **_judge(trainer, seen),
    }
    dropped = pool[_left(trainer)]
    plan.stream.drop(dropped)
    result["dropped_for_good"] = len(dropped)
    if arguments.selection:
        result["cost"] = trainer.selection.costs.summary(trainer.selection.run.size)
    trainer.save_model(str(folder / "model"))
    trainer.accelerator.wait_for_everyone()
    if training.should_save:
        save_arrays(folder / LEFT, {"left": plan.stream.left})
        write_json(folder / DONE, result)
    trainer.accelerator.wait_for_everyone()
    if index + 1 == len(plan.stages):
        trainer.save_model(arguments.training.output_dir)
        trainer.end()
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return result


def _finished(arguments: Arguments, plan: Stages, index: int, folder: Path) -> dict[str, Any] | None:
    """What a stage that was trained to its end has left; `None` for one that was not."""
    from safetensors.numpy import load_file

    if not (folder / DONE).is_file():
        return None
    result: dict[str, Any] = json.loads((folder / DONE).read_text(encoding="utf-8"))
    if result["fingerprint"] != _fingerprint(arguments, plan, index):
        raise ValueError(
            f"{folder} was trained by another run: its data, stages, selection, seed or steps differ. Give another "
            "--output_dir."
        )
    plan.stream.left[:] = load_file(folder / LEFT)["left"]
    return result


def forgetting(results: Sequence[dict[str, Any]], measure: str) -> dict[str, Any]:
    """
    The forgetting table of one measure.

    Args:
        results (`Sequence[dict]`):
            Of each stage its `name` and, under `measure`, the value on each stage so far.
        measure (`str`):
            `"loss"` or `"accuracy"`.

    Returns:
        `dict`: `table`, a row per stage in the order of the stages (`None` for later ones); `final_mean`, the mean of
        its last row; `forgetting`, the mean over all stages but the last of how much worse they are at the end than
        right after they were trained.
    """
    names = [result["name"] for result in results]
    table = [[result[measure].get(name) for name in names] for result in results]
    worse = 1.0 if measure == "loss" else -1.0
    last = table[-1]
    lost = [worse * (last[k] - table[k][k]) for k in range(len(names) - 1)]
    return {
        "table": table,
        "final_mean": float(np.mean(last)),
        "forgetting": float(np.mean(lost)) if lost else 0.0,
    }


def summarised(results: Sequence[dict[str, Any]], arguments: Arguments) -> dict[str, Any]:
    """What `summary.json` says of the stages that are done."""
    measures = [measure for measure in ("loss", "accuracy") if measure in results[0]]
    counted: dict[str, float] = {}
    for result in results:
        for key, value in result.get("cost", {}).items():
            if isinstance(value, int | float):
                counted[key] = counted.get(key, 0) + value
    return {
        "methods": arguments.selection,
        "trainer": arguments.kind,
        "seed": arguments.training.seed,
        "replay": read_replay(arguments.replay),
        "stages": [{key: value for key, value in result.items() if key != "fingerprint"} for result in results],
        **{measure: forgetting(results, measure) for measure in measures},
        "cost": counted,
    }


def format_forgetting(results: Sequence[dict[str, Any]]) -> str:
    """The forgetting tables as text: a line per stage trained, a column per stage judged."""
    names = [result["name"] for result in results]
    lines = []
    for measure, form in (("loss", "{:.4f}"), ("accuracy", "{:.1%}")):
        if measure not in results[0]:
            continue
        found = forgetting(results, measure)
        rows = [[f"{measure} after", *names]]
        for name, values in zip(names, found["table"], strict=True):
            rows.append([name, *("" if value is None else form.format(value) for value in values)])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        texts = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", texts[0], "  ".join("-" * width for width in widths), *texts[1:]]
        means = [form.format(found[key]) for key in ("final_mean", "forgetting")]
        lines.append(f"mean at the end: {means[0]}; forgotten since each was trained: {means[1]}")
    return "\n".join(lines)


def run_stages(arguments: Arguments) -> str:
    """
    Trains all stages, each from the model of the one before, and returns the forgetting tables.

    With `resume_from_checkpoint` a stage that is done is not trained again, and one that was cut off goes on from its
    last checkpoint; after that the run is what it would have been.
    """
    for method in make_methods(arguments.selection):
        if arguments.kind not in method.trainers:
            raise ValueError(f"{method.name!r} works with {list(method.trainers)}, not with `dsel {arguments.kind}`.")
    plan = load_stages(arguments)
    model = find_model(arguments)
    output, results = arguments.training.output_dir, list[dict[str, Any]]()
    for index, stage in enumerate(plan.stages):
        folder = stage_folder(output, index, stage)
        result = _finished(arguments, plan, index, folder) if arguments.training.resume_from_checkpoint else None
        results.append(result or _run_stage(arguments, plan, index, model, folder))
        model = str(folder / "model")
        if arguments.training.should_save:
            write_json(Path(output) / "selection" / "summary.json", summarised(results, arguments))
    return f"{format_forgetting(results)}\n\nSummary: {Path(output) / 'selection' / 'summary.json'}"
