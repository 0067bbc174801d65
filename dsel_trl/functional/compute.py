"""Floating-point operations of a training and of what selection adds to it: 2 per parameter and token and pass."""


def training_flops(parameters: float, tokens: float, *, adapter: bool = False, reference: bool = False) -> float:
    """
    Operations of a training (hf.co/papers/2001.08361, section 2.1: forward `2 N` per token, backward twice that).

    Args:
        parameters (`float`):
            Parameters of the model, N.
        tokens (`float`):
            Tokens trained on.
        adapter (`bool`, *optional*, defaults to `False`):
            Whether only an adapter is trained: then the backward pass makes no gradients of the weights, and costs as
            much as a forward.
        reference (`bool`, *optional*, defaults to `False`):
            Whether each step runs a reference model of the same size.

    Returns:
        `float`: operations.
    """
    return parameters * tokens * (2 + (2 if adapter else 4) + (2 if reference else 0))


def selection_flops(parameters: float, forward_tokens: float, backward_tokens: float) -> float:
    """
    Operations of passes beside the training, each counted as one of a model of `parameters`.

    Args:
        parameters (`float`):
            Parameters of the model.
        forward_tokens, backward_tokens (`float`):
            Tokens that went forwards through any model, and backwards.

    Returns:
        `float`: operations.
    """
    return parameters * (2 * forward_tokens + 4 * backward_tokens)
