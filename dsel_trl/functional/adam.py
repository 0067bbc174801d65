"""How Adam scales a gradient (hf.co/papers/1412.6980, Algorithm 1)."""

from torch import Tensor


def adam_direction(gradient: Tensor, second_moment: Tensor, eps: float) -> Tensor:
    """
    A gradient as Adam scales it, `g / (sqrt(v) + eps)`, with second moments that stay what they are.

    Args:
        gradient (`torch.Tensor`):
            Any gradient.
        second_moment (`torch.Tensor` of the same shape):
            The running mean of squares, its bias taken out (divided by `1 - beta2 ** step`).
        eps (`float`):
            The optimizer's.
    """
    return gradient / (second_moment.sqrt() + eps)
