"""Where methods are registered and found by name."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .method import Method
from .parameters import check_reads, check_unread, nearest

ENTRY_POINTS = "dsel_trl.methods"


_REGISTRY: dict[str, type[Method]] = {}


MethodType = TypeVar("MethodType", bound=type[Method])


def register(name: str) -> Callable[[MethodType], MethodType]:
    """
    Registers a dataclass of parameters as the method `name`.

    Raises:
        `ValueError`: if the name is not lower case, is taken, the class has no card, or its `reads` names a parameter
        that it has not.
        `TypeError`: if the class is not a [`Method`].
    """
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"A method's name is a lower-case identifier, got {name!r}.")

    def decorate(cls: MethodType) -> MethodType:
        if not (inspect.isclass(cls) and issubclass(cls, Method)):
            raise TypeError(f"{cls!r} is not a Method.")
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise ValueError(f"The method name {name!r} is taken by {_REGISTRY[name].__qualname__}.")
        # `@dataclass` writes the signature where there is no docstring.
        if not (cls.__doc__ or "").strip() or (cls.__doc__ or "").startswith(f"{cls.__name__}("):
            raise ValueError(f"{cls.__name__} needs a docstring: it is the card of the method {name!r}.")
        check_reads(cls)
        cls.name = name
        _refuse_unread(cls)
        _REGISTRY[name] = cls
        return cls

    return decorate


def _refuse_unread(cls: type[Method]) -> None:
    """Makes objects of a class refuse a parameter that goes unread, after the class's own checks."""
    own = cls.__post_init__

    @functools.wraps(own)
    def checked(self: Method) -> None:
        own(self)
        # A registered class may have a registered base: what is read is known at the end of the last one's checks.
        if type(self) is cls:
            check_unread(self)

    cls.__post_init__ = checked  # type: ignore[method-assign]


@lru_cache(maxsize=1)
def _load_methods() -> None:
    from .. import methods  # noqa: F401  (registers the built-in methods)

    for entry in entry_points(group=ENTRY_POINTS):
        entry.load()


def list_methods() -> list[str]:
    """Names of all registered methods, those of installed third parties included."""
    _load_methods()
    return sorted(_REGISTRY)


def get_method(name: str) -> type[Method]:
    """The class registered as `name`; `ValueError` with close matches if there is none."""
    _load_methods()
    if name not in _REGISTRY:
        raise ValueError(f"Unknown method {name!r}.{nearest(str(name), _REGISTRY)} See `dsel methods`.")
    return _REGISTRY[name]


def renamed_parameters(cls: type[Method]) -> dict[str, str]:
    """Earlier names of a method's parameters, those of its base classes included, with what they are called now."""
    return {old: new for base in reversed(cls.__mro__) for old, new in vars(base).get("renamed", {}).items()}


def create_method(name: str, **parameters: Any) -> Method:
    """
    A method by name.

    Example:

    ```python
    >>> create_method("random", keep=0.4)
    Random(keep=0.4, refresh='never')
    ```

    Raises:
        `ValueError`: for an unknown name or parameter (with the right or nearest one), or a value the method refuses.
    """
    cls = get_method(name)
    known = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    renamed = renamed_parameters(cls)
    for key in parameters:
        if key in renamed and key not in known:
            new, _, how = renamed[key].partition(" ")
            raise ValueError(f"Parameter {key!r} of {name!r} was renamed: use {new!r}{how and ' ' + how}.")
        if key not in known:
            raise ValueError(f"Unknown parameter {key!r} of {name!r}.{nearest(key, known)} It takes {known}.")
    return cls(**parameters)


def as_methods(method: Any, parameters: dict[str, Any]) -> list[Method]:
    """
    Methods out of what a user gives: a [`Method`], a name with its parameters, or a list of either.

    Raises:
        `ValueError`: for an unknown name or parameter, or parameters beside a method that is not given by name.
        `TypeError`: for anything else.
    """
    if isinstance(method, str):
        return [create_method(method, **parameters)]
    if parameters:
        raise ValueError(f"Parameters {sorted(parameters)} go with a method given by name; set them on the method.")
    if isinstance(method, Method):
        return [method]
    if isinstance(method, type) or not isinstance(method, Sequence):
        raise TypeError(f"method must be a Method object, a name or a list of them, got {method!r}.")
    return [create_method(item) if isinstance(item, str) else item for item in method]
