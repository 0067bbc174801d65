"""What a run with `stages` is told, and what goes with it."""

from typing import Any

from ..core.parameters import check_whole, nearest
from ..data.stages import read_replay
from .yaml_files import read_yaml

STAGE_KEYS = (
    *("name", "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split"),
    *("eval_dataset_name", "max_steps", "num_train_epochs", "max_tokens"),
)


def read_stages(value: Any) -> list[dict[str, Any]] | dict[str, str] | None:
    """
    The block `stages` as a list of mappings, each with a `dataset_name`, or as `{"column": NAME}`.

    Raises:
        `ValueError`: for anything else; the message shows the offending entry.
    """
    if isinstance(value, str):
        value = read_yaml(value, "--stages")
    if value is None:
        return None
    if isinstance(value, dict):
        if set(value) != {"column"} or not isinstance(value["column"], str):
            raise ValueError(f"`stages` is a list of datasets, or {{column: NAME}}, got {value!r}.")
        return value
    for entry in value if isinstance(value, list) else [value]:
        if not isinstance(entry, dict) or not isinstance(entry.get("dataset_name"), str):
            raise ValueError(f"Each of `stages` is a mapping with a `dataset_name`, got {entry!r}.")
        for key in entry:
            if key not in STAGE_KEYS:
                raise ValueError(
                    f"stages: unknown key {key!r}.{nearest(key, STAGE_KEYS)} It takes {list(STAGE_KEYS)}."
                )
        if "max_tokens" in entry:
            check_whole("max_tokens", entry["max_tokens"], 1)
    return list(value)


def check_stages(arguments: Any) -> None:
    """
    Checks what goes with `stages` and what does not.

    Args:
        arguments ([`~dsel_trl.commands.arguments.Arguments`]):
            Everything a run was told.

    Raises:
        `ValueError`: with the offending key and what would be right.
    """
    if arguments.stages is None:
        if arguments.replay != "0":
            raise ValueError(f"replay={arguments.replay!r} is of `stages`, of which there are none: leave it out.")
        return
    read_replay(arguments.replay)
    script = arguments.script
    if isinstance(arguments.stages, list) and (script.dataset_name or arguments.mixture.datasets):
        raise ValueError("Both `stages` with datasets and another dataset are given: leave `dataset_name` out.")
    if script.dataset_streaming:
        raise ValueError("`stages` need the rows of their datasets: set dataset_streaming: false.")
    if arguments.training.resume_from_checkpoint not in (None, True):
        raise ValueError(
            f"resume_from_checkpoint={arguments.training.resume_from_checkpoint!r}: of stages the last is found by "
            "itself: set it to true."
        )
    if arguments.kind == "reward" and arguments.model.use_peft:
        raise ValueError("`stages` train a reward model as a whole, not an adapter of it: leave use_peft out.")
