"""Rho-1, selective language modelling: train on the tokens with the highest excess loss (hf.co/papers/2404.07965)."""

import torch
from torch import Tensor

SCOPES = ("batch", "sequence")


def excess_loss(token_nll: Tensor, ref_token_nll: Tensor) -> Tensor:
    """
    Excess loss of every token: how much worse the policy is than the reference model (hf.co/papers/2404.07965, Eq. 3).

    Args:
        token_nll (`torch.Tensor` of shape `(B, L)`):
            Negative log-likelihood of each token under the policy, in nats.
        ref_token_nll (`torch.Tensor` of shape `(B, L)`):
            The same under the frozen reference model.

    Returns:
        `torch.Tensor` of shape `(B, L)`: detached, in float32 or better.

    Raises:
        `ValueError`: if the shapes differ.
    """
    if token_nll.shape != ref_token_nll.shape:
        raise ValueError(
            f"`token_nll` has shape {tuple(token_nll.shape)}, `ref_token_nll` has {tuple(ref_token_nll.shape)}"
        )
    return _at_least_float32(token_nll.detach()) - _at_least_float32(ref_token_nll.detach())


def select_tokens(excess: Tensor, mask: Tensor, select_ratio: float = 0.6, scope: str = "batch") -> Tensor:
    """
    Marks the tokens with the highest excess loss (hf.co/papers/2404.07965, section 2.2).

    Args:
        excess (`torch.Tensor` of shape `(B, L)`):
            Excess losses. A non-finite one is never selected.
        mask (`torch.Tensor` of shape `(B, L)`):
            True (or 1) where a token counts; padding and prompt are False.
        select_ratio (`float`, *optional*, defaults to `0.6`):
            Fraction of the valid tokens to select: `max(1, int(select_ratio * n_valid))`.
        scope (`str`, *optional*, defaults to `"batch"`):
            `"batch"` ranks all valid tokens together, `"sequence"` ranks each row on its own. A row without valid
            tokens selects nothing.

    Returns:
        `torch.Tensor` of bool, shape `(B, L)`. Ties go to the earlier row, then to the earlier token.

    Raises:
        `ValueError`: if `select_ratio` is not in (0, 1], `scope` is unknown or the shapes differ.

    Example:

    ```python
    >>> import torch
    >>> from dsel_trl.functional.loss.rho1 import select_tokens

    >>> select_tokens(torch.tensor([[0.5, 2.0, 1.0]]), torch.tensor([[True, True, False]]), select_ratio=0.5)
    tensor([[False,  True, False]])
    ```
    """
    if not 0 < select_ratio <= 1:
        raise ValueError(f"`select_ratio` must lie in (0, 1], got {select_ratio}")
    if scope not in SCOPES:
        raise ValueError(f'`scope` must be "batch" or "sequence", got {scope!r}')
    if excess.shape != mask.shape:
        raise ValueError(f"`excess` has shape {tuple(excess.shape)}, `mask` has {tuple(mask.shape)}")
    valid = mask.bool() & torch.isfinite(excess)
    rows = valid if scope == "sequence" else valid.reshape(1, -1)
    values = _at_least_float32(excess.detach()).reshape(rows.shape).masked_fill(~rows, -torch.inf)
    order = torch.sort(values, dim=1, descending=True, stable=True).indices
    n_valid = rows.sum(dim=1, keepdim=True).cpu()
    # The slack undoes rounding such as 0.29 * 100 = 28.999999999999996. Not every device knows float64, the CPU does.
    n_select = (n_valid.double() * select_ratio + 1e-9).floor().long().clamp(min=1).minimum(n_valid)
    taken = torch.arange(rows.shape[1], device=rows.device) < n_select.to(rows.device)
    return torch.zeros_like(rows).scatter(1, order, taken).reshape(valid.shape)


def selected_token_weights(selected: Tensor, n_selected: int | Tensor | None = None, n_tokens: int = 1) -> Tensor:
    """
    Factor of each token's loss in the selective loss (hf.co/papers/2404.07965, Eq. 4): `1 / n_selected` for the
    selected ones, 0 for the others, so that the sum is the mean loss of the selected tokens.

    Args:
        selected (`torch.Tensor` of bool, any shape):
            Selected tokens.
        n_selected (`int` or `torch.Tensor`, *optional*):
            Denominator. Defaults to the number of selected tokens here; with several processes pass the global number.
        n_tokens (`int`, *optional*, defaults to `1`):
            Number of tokens that the losses are divided by elsewhere: the factors are so much larger.

    Returns:
        `torch.Tensor` of float32, of the shape of `selected`: all zeros if nothing is selected.
    """
    count = selected.sum() if n_selected is None else torch.as_tensor(n_selected, device=selected.device)
    return selected.float() * (n_tokens / count.clamp(min=1))


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()
