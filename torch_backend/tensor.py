"""The wrapper of expert weights: it makes their grouped and batched GEMMs run in low precision."""

import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Self

import torch
from torch import Tensor

from xmoe.torch_backend.experts import swiglu_experts_by_key
from xmoe.torch_backend.grouped_gemm import grouped_mm_by_key, key_with_out_dtype
from xmoe.torch_backend.observe import observed_grouped_mm, observed_swiglu_experts, observers
from xmoe.torch_backend.wrapper import WrappedWeight, config_key, follow_autocast, teach_compile, unwrap


class ScaledGroupedMMTensor(WrappedWeight):
    """Expert weights [G, K, N] whose GEMMs run in the precision of a config: as the second operand of

    - ``torch._grouped_mm(A, w, offs)`` and ``torch.nn.functional.grouped_mm``, which become
      `xmoe.torch_backend.scaled_grouped_mm`, and the op that transformers uses in their place;
    - ``torch.bmm``, ``torch.matmul`` and ``@``: groups of equal size;
    - ``torch.nn.functional.linear``, ``torch.mm`` and ``@`` of one expert, ``w[i]``: a single group.

    The output has the dtype that the operation on a plain weight would give, autocast included. See `WrappedWeight`
    for everything else.
    """

    ndims = 3
    kind = "expert weights"
    remedy = "multiply inputs of 2 or 3 dimensions by it with torch._grouped_mm, bmm, matmul or linear"

    @classmethod
    def with_key(cls, key: str) -> type[Self]:
        if "transformers.integrations.moe" in sys.modules:
            _learn_transformers()
        return super().with_key(key)


@cache
def _learn_transformers() -> None:
    """Intercepts what transformers computes where it does not trust ``torch.nn.functional.grouped_mm`` (float32 under
    ``torch.compile``, for one), and registers the experts implementation "xmoe", which a pickled model may name."""
    from xmoe.torch_backend.transformers import register

    register()
    op = torch.ops.transformers.grouped_mm_fallback
    ScaledGroupedMMTensor.handlers |= {op: _grouped_mm_fallback, op.default: _grouped_mm_fallback}
    teach_compile(op)


def _product(A: Tensor, B: Tensor, offs: Tensor, key: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """[M, N] of A [M, K] and B [G, K, N], in `out_dtype` or the dtype of A."""
    product: Callable[..., Tensor] = grouped_mm_by_key
    if not torch.compiler.is_compiling():  # what the ops save for the backward is plain
        A, B, offs = unwrap(A), unwrap(B), unwrap(offs)
        if observers:
            product = partial(observed_grouped_mm, weight=B)
    out_dtype = out_dtype or A.dtype
    half = torch.float16
    if half in (A.dtype, B.dtype):  # exact in float32, which the kernels read
        A, B = (x.float() if x.dtype == half else x for x in (A, B))
    if out_dtype == half:
        return product(A, B, offs, key_with_out_dtype(key, torch.float32)).half()
    return product(A, B, offs, key_with_out_dtype(key, out_dtype) if out_dtype != A.dtype else key)


def _batched(A: Tensor, B: Tensor, key: str, out_dtype: torch.dtype | None = None) -> Tensor:
    """[G, T, N] of A [G, T, K] and B [G, K, N]: groups of equal size."""
    G, T, K = A.shape
    if G == 0:  # of no expert
        return torch.bmm(A, unwrap(B).to(A.dtype)).to(out_dtype or A.dtype)
    offs = torch.arange(1, G + 1, dtype=torch.int32, device=A.device) * T
    return _product(A.reshape(G * T, K), B, offs, key, out_dtype).view(G, T, B.shape[2])


def _single(A: Tensor, B: Tensor, key: str) -> Tensor:
    """[..., N] of A [..., K] and one expert's B [K, N]: a group."""
    rows = A.reshape(-1, A.shape[-1])
    offs = torch.full((1,), rows.shape[0], dtype=torch.int32, device=A.device)
    return _product(rows, B.unsqueeze(0), offs, key).view(*A.shape[:-1], B.shape[-1])


def _grouped_mm(
    cls: type[ScaledGroupedMMTensor],
    func: Callable[..., Any],
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """Where the second operand is [G, K, N]; the weight gradient's form, 2D x 2D, is the plain op."""
    if not isinstance(mat2, ScaledGroupedMMTensor) or mat2.ndim != 3 or bias is not None:
        return NotImplemented
    key = config_key(cls, mat2)
    if self.ndim == 2 and offs is not None:
        return _product(self, mat2, offs, key, out_dtype)
    return _batched(self, mat2, key, out_dtype) if self.ndim == 3 and offs is None else NotImplemented


def _grouped_mm_fallback(
    cls: type[ScaledGroupedMMTensor], func: Callable[..., Any], input: Tensor, weight: Tensor, offs: Tensor
) -> Any:
    """``transformers::grouped_mm_fallback``, whose offsets may be int64."""
    return _grouped_mm(cls, func, input, weight, offs.to(torch.int32))


def _linear(
    cls: type[ScaledGroupedMMTensor],
    func: Callable[..., Any],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> Any:
    if not isinstance(weight, ScaledGroupedMMTensor) or weight.ndim != 2:
        return NotImplemented
    key = config_key(cls, weight)
    input, weight, bias = follow_autocast(input, weight, bias)
    out = _single(input, weight.mT, key)
    return out if bias is None else out + bias


def _matmul(cls: type[ScaledGroupedMMTensor], func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``mm``, ``bmm``, ``mv``, ``matmul`` and ``@``, with the weight on either side of an activation."""
    operands = (*args, *(kwargs.pop(name) for name in ("input", "mat2", "vec", "other") if name in kwargs))
    first, second = operands
    wrapped = [isinstance(x, ScaledGroupedMMTensor) for x in operands]
    if kwargs or all(wrapped):
        return NotImplemented
    if wrapped[1]:
        out = _dense(*follow_autocast(first, second)[:2], config_key(cls, second))
        return NotImplemented if out is None else out
    A = second if second.ndim == 1 else second.mT
    out = None if first.ndim < 2 else _dense(*follow_autocast(A, first.mT)[:2], config_key(cls, first))
    if out is None:
        return NotImplemented
    return out if second.ndim == 1 else out.mT.contiguous()


def _dense(A: Tensor, B: Tensor, key: str) -> Tensor | None:
    """A @ B for weights B [K, N] or [G, K, N]; None for other forms."""
    if B.ndim == 2:
        return _single(A, B, key)
    if B.ndim == 3 and (A.ndim == 2 or (A.ndim == 3 and A.shape[0] in (1, B.shape[0]))):
        return _batched(A.expand(B.shape[0], *A.shape[-2:]), B, key)
    return None


ScaledGroupedMMTensor.handlers = {
    **dict.fromkeys(
        # torch.nn.functional.grouped_mm has no __torch_function__ hook of its own and reaches the first.
        (torch._grouped_mm, torch.ops.aten._grouped_mm, torch.ops.aten._grouped_mm.default),
        _grouped_mm,
    ),
    torch.nn.functional.linear: _linear,
    **dict.fromkeys(
        (
            *(torch.mm, torch.bmm, torch.mv, torch.matmul, torch.linalg.matmul),
            *(Tensor.mm, Tensor.bmm, Tensor.mv, Tensor.matmul, Tensor.__matmul__, Tensor.__rmatmul__),
        ),
        _matmul,
    ),
}


def wrapped_swiglu_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, order: Tensor | None = None
) -> Tensor:
    """`xmoe.torch_backend.swiglu_experts` of weights that are wrapped with one config."""
    key = type(w1).config_key  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunctionSubclass():
        if not torch.compiler.is_compiling():
            x, w1, w2, w3 = unwrap(x), unwrap(w1), unwrap(w2), unwrap(w3)
            if observers:
                return observed_swiglu_experts(x, w1, w2, w3, offs, key, order)
        return swiglu_experts_by_key(x, w1, w2, w3, offs, key, order)
