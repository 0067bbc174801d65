"""One training from its arguments: data, model, trainer, selection; all is checked before anything is written."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from trl import get_dataset, get_peft_config, get_quantization_config

from ..callback import SelectionCallback
from ..core.composition import Composition
from ..core.method import Method
from ..core.registry import create_method
from ..data.demo.model import build_demo_model
from ..data.loading import DEMO, AnyDataset, check_rows, load_splits, number_rows, take_split
from ..trainer.checkpoints import last_complete_checkpoint
from ..trainer.forwards import ignore_bias_buffers
from ..trainer.kinds import KINDS
from .arguments import Arguments
from .run_data import source_of

logger = logging.getLogger(__name__)

# What a wrong argument raises, here and in TRL: the user's to mend. Anything else is a failure of the run.
MISTAKES = (ValueError, TypeError, KeyError, OSError, ImportError, NotImplementedError)


# What helps where a run is to be judged and has no held-out data.
JUDGED = "give --eval_dataset_name, --dataset_test_split or --eval_strategy no"


class TrainingFailed(Exception):
    """Training started and did not end well; the cause is in `__cause__`."""


@dataclass
class Job:
    """What a run needs, loaded and checked."""

    arguments: Arguments
    train_dataset: AnyDataset
    eval_dataset: AnyDataset | dict[str, AnyDataset] | None
    model: str
    # Whether `model` is what an earlier stage of the run has trained: its adapter, if any, is trained on.
    continued: bool = False


def make_methods(selection: list[dict[str, Any]]) -> list[Method]:
    """The methods of a block `selection:`; an unknown name, parameter or combination is a `ValueError`."""
    methods = [create_method(**entry) for entry in selection]
    if methods:
        Composition(methods)
    return methods


def load_datasets(arguments: Arguments, *, evaluate: bool, remedy: str = JUDGED) -> tuple[AnyDataset, Any]:
    """
    Loads and checks the training data and, to `evaluate`, the held-out data (else `None`).

    Raises:
        `ValueError`: if rows, columns or splits are missing; without held-out data the error gives the `remedy`.
        `FileNotFoundError`: if there is no such dataset.
    """
    script, training, mixture = arguments.script, arguments.training, arguments.mixture
    kind, command = KINDS[arguments.kind], f"dsel {arguments.kind}"
    # Only some trainers read texts without structure, from a column that the user names.
    text_field = getattr(training, "dataset_text_field", None)
    columns = kind.columns if text_field is None else (*kind.columns, (text_field,))
    if mixture.datasets:
        name, splits = "datasets", get_dataset(mixture)
    else:
        name = str(script.dataset_name)
        splits = load_splits(name, demo=kind.demo, config=script.dataset_config, streaming=script.dataset_streaming)
    train = take_split(splits, script.dataset_train_split, name, "dataset_train_split")
    check_rows(train, name, columns, command)
    if not evaluate:
        return train, None
    if arguments.eval_dataset_name is not None:
        name = arguments.eval_dataset_name
        splits = load_splits(name, demo=kind.demo, streaming=script.dataset_streaming)
    split = script.dataset_test_split
    if arguments.eval_dataset_name is not None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise ValueError(
            f"Evaluation needs data, but {name!r} has no split {split!r}, only {sorted(splits)}: {remedy}."
        )
    check_rows(splits[split], name, columns, command)
    return train, splits[split]


def find_model(arguments: Arguments) -> str:
    """Path or hub id of the model; the demo model is built here, after all other checks."""
    name, training = str(arguments.model.model_name_or_path), arguments.training
    if name == DEMO:
        folder = Path(training.output_dir) / "demo_model"
        # Several threads wait for each other longer than they compute on so small a model.
        torch.set_num_threads(1)
        with training.main_process_first(desc="building the demo model"):
            return str(build_demo_model(folder))
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_like_path and not path.is_dir():
        raise FileNotFoundError(f"model_name_or_path: there is no folder {name!r}.")
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise FileNotFoundError(f"model_name_or_path: the folder {name!r} holds no model (no config.json).")
    if not path.is_dir():
        try:
            AutoConfig.from_pretrained(name, revision=arguments.model.model_revision)
        except OSError as error:
            raise FileNotFoundError(
                f"model_name_or_path: {name!r} is no folder here, and the hub gave no model of that name ({error})."
            ) from error
    return str(path) if path.is_dir() else name


def prepare(arguments: Arguments) -> Job:
    """
    Loads and checks everything a run needs. Nothing is written, but for the demo model if it is asked for.

    Raises:
        One of `MISTAKES`, with what is wrong and what would be right.
    """
    methods = make_methods(arguments.selection)
    for method in methods:
        if arguments.kind not in method.trainers:
            raise ValueError(f"{method.name!r} works with {list(method.trainers)}, not with `dsel {arguments.kind}`.")
    evaluate = bool(arguments.compare) or arguments.training.eval_strategy != "no"
    train, evaluation = load_datasets(arguments, evaluate=evaluate)
    return Job(arguments, number_rows(train), evaluation, find_model(arguments))


def build_trainer(job: Job, training: Any, selection: list[dict[str, Any]]) -> Any:
    """TRL's trainer for a job, as TRL's own script builds it, with the methods of a block `selection:` attached."""
    model = job.arguments.model
    adapter = job.continued and model.use_peft
    loading = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
        "trust_remote_code": False,
    }
    training.model_init_kwargs = None if adapter else loading
    with _no_empty_folder(Path(training.output_dir)):
        trainer = KINDS[job.arguments.kind].trainer(
            model=_trained_adapter(job.model, model, loading) if adapter else job.model,
            args=training,
            train_dataset=job.train_dataset,
            eval_dataset=job.eval_dataset,
            quantization_config=None if adapter else get_quantization_config(model),
            peft_config=None if adapter else get_peft_config(model),
        )
        if selection:
            callback = attach(
                trainer,
                selection,
                log_by=job.arguments.log_by,
                identical=job.arguments.identical,
                resume_across_versions=job.arguments.resume_across_versions,
                resume_with_other_batches=job.arguments.resume_with_other_batches,
            )
            if not job.arguments.mixture.datasets:
                script = job.arguments.script
                source = source_of(str(script.dataset_name), script.dataset_train_split, script.dataset_config)
                rows = None if script.dataset_streaming else len(job.train_dataset)
                callback.source = {**source, "rows": rows}
    if job.arguments.script.ignore_bias_buffers:
        ignore_bias_buffers(trainer)
    return trainer


def _trained_adapter(folder: str, model: Any, loading: dict[str, Any]) -> Any:
    """The base model with the adapter of `folder`, to be trained on."""
    from peft import AutoPeftModelForCausalLM

    quantization = get_quantization_config(model)
    if quantization is not None:
        loading = {**loading, "quantization_config": quantization}
    loading = {key: value for key, value in loading.items() if value is not None}
    return AutoPeftModelForCausalLM.from_pretrained(folder, is_trainable=True, **loading)


@contextlib.contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """A trainer that cannot be built leaves no empty output folder behind."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


def attach(trainer: Any, selection: list[dict[str, Any]], **settings: Any) -> SelectionCallback:
    """Adds the methods of a block `selection:` to a trainer; `settings` are parameters of the callback."""
    callback = SelectionCallback(trainer, make_methods(selection), **settings)
    trainer.add_callback(callback)
    return callback


def train(trainer: Any, resume: str | bool | None = None) -> None:
    """
    Trains; a mistake that shows before the first step is raised as it is.

    Raises:
        `TrainingFailed`: for any failure after the first step, and for any that is nobody's mistake.
    """
    try:
        trainer.train(resume_from_checkpoint=resume)
    except MISTAKES as error:
        if not trainer.state.global_step:
            raise
        raise TrainingFailed(str(error)) from error
    except Exception as error:
        raise TrainingFailed(str(error)) from error


def resumable(folder: Path) -> str | None:
    """The last complete checkpoint in a folder, if there is one."""
    try:
        return last_complete_checkpoint(str(folder))
    except ValueError:
        return None


def run_single(job: Job) -> None:
    """Trains once, saves the model and says where everything is."""
    arguments, training = job.arguments, job.arguments.training
    trainer = build_trainer(job, training, arguments.selection)
    if not arguments.selection:
        logger.info("No `selection:` is given: this is a stock TRL run.")
    train(trainer, training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
    logger.info("Model: %s", training.output_dir)
    if arguments.selection:
        for line in selection_files(Path(training.output_dir)):
            logger.info(line)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
    trainer.end()


def selection_files(output_dir: Path) -> list[str]:
    """Lines that say where a run's ledger and picture are."""
    files = {"Ledger": "ledger.parquet", "Summary": "summary.json", "Picture": "selection.png"}
    found = {name: output_dir / "selection" / file for name, file in files.items()}
    return [f"{name}: {os.fspath(path)}" for name, path in found.items() if path.is_file()]
