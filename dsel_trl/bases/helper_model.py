"""What methods with a helper model share: the parameters that say how it is trained."""

from typing import Any

from ..core.method import Method

SETTINGS = ("helper_epochs", "helper_learning_rate", "helper_lora", "helper_model")


def helper_settings(method: Method, seed: int) -> dict[str, Any]:
    """
    How a helper of `method` is trained, by its parameters `helper_*`: arguments of the helper run, and of the
    fingerprint of what it gives.
    """
    return {name.removeprefix("helper_"): value for name, value in method.parameters().items() if name in SETTINGS} | {
        "seed": seed
    }
