"""Random numbers: the named streams that draws come from, and how the run's own generators stay untouched."""

import hashlib
import json
import operator
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def stream(seed: int, name: str, *key: int) -> np.random.Generator:
    """
    The generator of a name: another one for every other seed, name or key.

    Args:
        seed (`int`):
            Seed of the run.
        name (`str`):
            Whose draw it is and of what, as in `"random/keep"`.
        *key (`int`):
            Which of these draws: an epoch, a step, a batch.

    Raises:
        `TypeError`: for a name that is no text, or a key that is no whole number.

    Example:

    ```python
    >>> stream(0, "random/keep", 1).random() == stream(0, "random/keep", 1).random()
    True
    ```
    """
    return np.random.default_rng(_entropy(seed, name, key))


def stream_seed(seed: int, name: str, *key: int) -> int:
    """A seed in [0, 2**31) for what makes its own generator of one; named as in [`stream`]."""
    return _entropy(seed, name, key) % 2**31


def _entropy(seed: int, name: str, key: tuple[int, ...]) -> int:
    if not isinstance(name, str):
        raise TypeError(f"A random stream needs a name first, such as 'random/keep', but {name!r} is given.")
    # Not a row of numbers for numpy, which fills it up with zeros and cuts up what has more than 32 bits.
    content = json.dumps([operator.index(seed), name, *map(operator.index, key)])
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=16).digest(), "big")


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Gives the global generators back as they were: a trainer seeds them when it is made."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()  # noqa: NPY002
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.random.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
