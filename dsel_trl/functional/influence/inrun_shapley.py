"""In-run data Shapley (hf.co/papers/2406.11011, Theorems 3 and 4)."""

from torch import Tensor


def inrun_shapley(products: Tensor, rate: Tensor | float, curved: Tensor | None = None) -> Tensor:
    """
    Shapley value of each example for the change of a validation loss in one step, `(n,)`; helpful ones are negative.

    `phi_i = -rate_i <g_v, g_i> + rate_i / 2 <g_i, H_v sum_j rate_j g_j>`: exact for the Taylor model of first (without
    the second term) or second order of the step.

    Args:
        products (`torch.Tensor` of shape `(n,)`):
            `<g_v, g_i>`: gradient of the validation loss times each example's.
        rate (`float` or `torch.Tensor` of shape `(n,)`):
            Coefficient of each example's gradient in the step that was made: the learning rate, times the example's
            share of the loss, times the factor of clipping.
        curved (`torch.Tensor` of shape `(n,)`, *optional*):
            `<g_i, H_v u>` with `u = sum_j rate_j g_j` and the Hessian `H_v` of the validation loss; without it the
            value is that of first order.
    """
    value = -rate * products
    return value if curved is None else value + 0.5 * rate * curved
