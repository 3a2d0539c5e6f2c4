"""The same tensors in memory layouts that kernels cannot read as they lie."""

from collections.abc import Callable

from torch import Tensor


def _reversed_axes(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def _every_second(x: Tensor) -> Tensor:
    return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


def _padded_rows(x: Tensor) -> Tensor:
    """Rows that are no multiple of 16 bytes apart, in bfloat16."""
    return x.new_zeros(*x.shape[:-1], x.shape[-1] + 4)[..., : x.shape[-1]].copy_(x)


def _odd_offset(x: Tensor) -> Tensor:
    """In a flat buffer of parameters, from its second element on."""
    return x.new_zeros(x.numel() + 1)[1:].view(x.shape).copy_(x)


def _expanded(x: Tensor) -> Tensor:
    """The last row, expert or offset in the place of all."""
    return x[-1:].clone().expand_as(x)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "reversed axes": _reversed_axes,
    "every second": _every_second,
    "padded rows": _padded_rows,
    "odd offset": _odd_offset,
    "expanded": _expanded,
}
"""All but "expanded" keep the values."""
