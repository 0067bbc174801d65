"""What a run is told: YAML file and command line, through TRL's own parser, with a clear error for each slip."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers.utils import is_torch_bf16_gpu_available
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser

from ..core.identical import IDENTICAL
from ..core.parameters import check_choice, nearest
from ..trainer.kinds import KINDS
from .stage_arguments import check_stages, read_stages
from .yaml_files import read_config, read_yaml

# Earlier keys, and what does the same now.
MOVED = {"compare": " `dsel ablate --config FILE --seeds 0,1,2` compares with stock and random."}


@dataclass
class SelectionArguments:
    """
    What `dsel dpo` and the other trainings take beside TRL's own arguments.

    Args:
        selection (`str`, *optional*):
            The methods: in the YAML file a list of mappings with `name` and parameters, on the command line the same
            as YAML or JSON text. Without it the run is TRL's own.
        eval_dataset_name (`str`, *optional*):
            Evaluation data: a file, a folder or a hub id. Defaults to the split `dataset_test_split` of the dataset.
        log_by (`str`, *optional*):
            Column of texts by whose values loss, margin, kept share, weight and tokens are logged apart.
        identical (`str`, *optional*, defaults to `"warn"`):
            What is done about pairs whose two sides are equal after truncation: `warn` or `drop`.
        stages (`str`, *optional*):
            Datasets to train one after the other: in the YAML file a list of mappings with `dataset_name` (and `name`,
            `dataset_config`, `dataset_train_split`, `dataset_test_split`, `eval_dataset_name`, `max_steps`,
            `num_train_epochs`, and `max_tokens`, with which a stage ends once it has trained so many), or
            `column: NAME`, a column of `dataset_name` by whose values its rows are staged.
        replay (`str`, *optional*, defaults to `"0"`):
            What of the earlier stages comes again: so many of their rows, drawn at random, per row of the new one, or
            `all`, of which the methods choose.
        resume_across_versions (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint made with other versions of the libraries may be continued.
        resume_with_other_batches (`bool`, *optional*, defaults to `False`):
            Whether a checkpoint may be continued with other batches at the start of its next epoch.
    """

    selection: str | None = field(
        default=None,
        metadata={"help": "Methods as YAML or JSON, such as '[{name: random, keep: 0.4}]'. In a file: a list."},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Evaluation data: a file, a folder or a hub id. Defaults to `dataset_test_split`."},
    )
    log_by: str | None = field(
        default=None,
        metadata={"help": "Column of texts, such as `source`, by whose values the selection logs loss, margin, ..."},
    )
    identical: str = field(
        default="warn",
        metadata={"help": "Pairs that are equal after truncation: warn (count them) or drop."},
    )
    stages: str | None = field(
        default=None,
        metadata={"help": "Datasets to train one after the other, or {column: NAME}. In a file: a list or a mapping."},
    )
    replay: str = field(
        default="0",
        metadata={"help": "Rows of earlier stages per row of the new one (0: none), or all."},
    )
    resume_across_versions: bool = field(
        default=False,
        metadata={"help": "Continue a checkpoint made with other versions of the libraries."},
    )
    resume_with_other_batches: bool = field(
        default=False,
        metadata={"help": "Continue a checkpoint with another batch size at the start of its next epoch."},
    )


@dataclass
class Arguments:
    """
    Everything a run was told; `notes` are lines for the log about what was filled in, `evaluates` says whether there
    must be evaluation data although training itself does not evaluate.
    """

    kind: str
    script: ScriptArguments
    training: Any
    model: ModelConfig
    mixture: DatasetMixtureConfig
    selection: list[dict[str, Any]]
    eval_dataset_name: str | None
    log_by: str | None
    identical: str
    stages: list[dict[str, Any]] | dict[str, str] | None
    replay: str
    resume_across_versions: bool
    resume_with_other_batches: bool
    notes: list[str]
    evaluates: bool = False


class _Parser(TrlParser):
    """TRL's parser; errors are exceptions instead of two hundred lines of usage and an exit."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def read_selection(value: Any) -> list[dict[str, Any]]:
    """
    The block `selection` as a list of mappings, each with a `name`.

    Raises:
        `ValueError`: for anything else; the message shows the offending entry.
    """
    if isinstance(value, str):
        value = read_yaml(value, "--selection")
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError(
                "Each entry of `selection` is a mapping with a `name`, such as {name: random, keep: 0.4}, got "
                f"{entry!r}."
            )
        if wrong := [key for key in entry if not isinstance(key, str)]:
            raise ValueError(f"The parameters in `selection` have names, but {entry['name']!r} is given {wrong[0]!r}.")
    return [dict(entry) for entry in entries]


def make_parser(kind: str) -> TrlParser:
    """The parser of `dsel dpo` or another training: all of TRL's arguments and ours."""
    types: Any = (ScriptArguments, KINDS[kind].config, ModelConfig, DatasetMixtureConfig, SelectionArguments)
    parser = _Parser(
        types,
        prog=f"dsel {kind}",
        # An abbreviation would let a misspelt option pass as another one.
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of arguments; the command line overrides it.")
    return parser


def _apply_config(parser: TrlParser, config: dict[str, Any], path: str) -> None:
    """Makes the values of the file the parser's defaults, checked as if they had been typed."""
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    known = set(actions) - {"help", "config"}
    if unknown := [key for key in config if key not in known]:
        hints = " ".join(f"Unknown key {key!r}.{MOVED.get(key) or nearest(key, known)}" for key in unknown)
        raise ValueError(f"{path}: {hints}")
    defaults = {}
    for key, value in config.items():
        # YAML reads the word `no` as false, and `eval_strategy: no` is how everybody writes it.
        if value is False and key.endswith("_strategy"):
            value = "no"
        choices = actions[key][0].choices
        if choices is not None and isinstance(value, str) and value not in choices:
            raise ValueError(
                f"{path}: {key}: {value!r} is none of {list(choices)}.{nearest(value, map(str, choices))}"
            )
        # argparse converts and checks defaults that are strings.
        defaults[key] = str(value) if isinstance(value, bool | int | float) else value
    parser.set_defaults_with_config(**defaults)


def _resume(value: str | None) -> str | bool | None:
    """`resume_from_checkpoint` as the trainer wants it: a folder, `True` for the last one, or `None`."""
    if value is None or value.lower() in ("false", "no", "none", ""):
        return None
    if value.lower() in ("true", "yes"):
        return True
    if not Path(value).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint: there is no folder {value!r}.")
    return value


def parse_arguments(
    kind: str, argv: Sequence[str], config: dict[str, Any] | None = None, origin: str = ""
) -> Arguments:
    """
    Reads the arguments of `dsel dpo` or another training.

    Args:
        kind (`str`):
            `"dpo"`, `"sft"`, `"kto"` or `"reward"`.
        argv (`Sequence[str]`):
            The words after it.
        config (`dict`, *optional*):
            What a YAML file of arguments holds, instead of one that the words name.
        origin (`str`, *optional*):
            Where that is from, for errors.

    Returns:
        `Arguments`: checked and complete.

    Raises:
        `ValueError`: for an unknown key or a value that cannot be; the message names it and the nearest right one.
        `FileNotFoundError`: if the config file or a checkpoint does not exist.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", nargs="?")
    config_path = first.parse_known_args(argv)[0].config
    if any(word == "--config" or word.startswith("--config=") for word in argv) and not config_path:
        raise ValueError("--config needs the path of a YAML file.")
    # Read before the parser is made: its block `env` must be in force when the configuration classes look around.
    if config is None:
        config = read_config(config_path) if config_path else {}
    parser = make_parser(kind)
    _apply_config(parser, config, config_path or origin)
    given, unknown = parser.parse_known_args(list(argv))
    if unknown:
        options = [option for action in parser._actions for option in action.option_strings]
        word = unknown[0]
        if word.startswith("-"):
            word = word.split("=")[0]
            raise ValueError(f"Unknown option {word!r}.{nearest(word, options)} See `dsel {kind} --help`.")
        hint = f" Did you mean `--config {word}`?" if word.endswith((".yaml", ".yml")) and not config_path else ""
        raise ValueError(f"Unexpected word {word!r}.{hint}")
    notes = []
    if given.bf16 is None and not given.fp16 and (given.use_cpu or not is_torch_bf16_gpu_available()):
        parser.set_defaults(bf16=False)
        notes.append("No accelerator with bfloat16 is used: training in float32 (bf16=False).")
    try:
        parsed = parser.parse_args_into_dataclasses(args=list(argv), look_for_args_file=False)
    except TypeError as error:
        # `DatasetConfig(**entry)` in TRL's mixture says which key of `datasets:` it does not know.
        raise ValueError(str(error)) from error
    script, training, model, mixture, own = parsed[:5]
    training.resume_from_checkpoint = _resume(training.resume_from_checkpoint)
    return Arguments(
        kind=kind,
        script=script,
        training=training,
        model=model,
        mixture=mixture,
        selection=read_selection(own.selection),
        eval_dataset_name=own.eval_dataset_name,
        log_by=own.log_by,
        identical=own.identical,
        stages=read_stages(own.stages),
        replay=own.replay,
        resume_across_versions=own.resume_across_versions,
        resume_with_other_batches=own.resume_with_other_batches,
        notes=notes,
    )


def check_arguments(arguments: Arguments) -> None:
    """
    Checks what goes together and what does not, before anything is loaded or written.

    Raises:
        `ValueError`: with the offending key and what would be right.
    """
    script, training = arguments.script, arguments.training
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and "LOCAL_RANK" in os.environ and training.world_size == 1:
        raise ValueError(
            f"{launched} processes were launched, but each of them would train alone, as none has an accelerator: set "
            "use_cpu: true to train on CPUs together."
        )
    if arguments.model.model_name_or_path is None:
        raise ValueError("model_name_or_path is missing: a folder with a model, a hub id, or `demo`.")
    if script.dataset_name and arguments.mixture.datasets:
        raise ValueError("Both `dataset_name` and `datasets` are given: which one is the training data? Give one.")
    check_stages(arguments)
    if not script.dataset_name and not arguments.mixture.datasets and not isinstance(arguments.stages, list):
        raise ValueError("dataset_name is missing: a parquet/jsonl/json/csv file, a folder, a hub id, or `demo`.")
    if getattr(training, "trust_remote_code", False):
        raise ValueError("trust_remote_code is not supported: code from a hub repository is never run.")
    check_choice("identical", arguments.identical, IDENTICAL)
    if (arguments.log_by is not None or arguments.identical == "drop") and not arguments.selection:
        raise ValueError("`log_by` and `identical` are of a selection: add a block `selection:`, such as uniform.")
    found = sorted(
        path.name for path in Path(training.output_dir).glob("stage-*" if arguments.stages else "checkpoint-*")
    )
    if found and not training.resume_from_checkpoint:
        raise ValueError(
            f"{str(training.output_dir)!r} holds {found[-1]} of an earlier run. Continue it with "
            "--resume_from_checkpoint true, or give another --output_dir."
        )
