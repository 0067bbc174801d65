"""YAML of arguments: a file or a text, with the place of each mistake."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from ..core.parameters import nearest


class _Loader(yaml.SafeLoader):
    """YAML in which `1e-6` is a number and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str, origin: str) -> Any:
    """Parses YAML; a mistake becomes a `ValueError` that says where in `origin` it is."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ValueError(f"{origin}{place}: {getattr(error, 'problem', None) or error}.") from error


def read_config(path: str) -> dict[str, Any]:
    """
    Reads a YAML file of arguments and sets the environment variables of its block `env`, as TRL does.

    Raises:
        `FileNotFoundError`: if there is no such file.
        `ValueError`: if it is not a YAML mapping.
    """
    if not Path(path).is_file():
        beside = [str(p) for p in Path(path).parent.glob("*.y*ml")] if Path(path).parent.is_dir() else []
        raise FileNotFoundError(f"There is no config file {path!r}.{nearest(path, beside)}")
    config = read_yaml(Path(path).read_text(encoding="utf-8"), path)
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds {type(config).__name__}, but must hold a YAML mapping (`key: value` lines).")
    environment = config.pop("env", None) or {}
    if not isinstance(environment, dict):
        raise ValueError(f"`env` in {path} must be a mapping of variables to values, got {environment!r}.")
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    return config
