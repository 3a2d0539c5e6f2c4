"""What a call of the ops must be: shapes, dtypes and devices that fit, no transforms, and, in debug, offsets.

M = tokens, K = contraction, N = output features, G = groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from xmoe.operands import FEATURE_MULTIPLE

DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def check_signature(
    A_shape: Sequence[int],
    A_dtype: torch.dtype,
    B_shape: Sequence[int],
    B_dtype: torch.dtype,
    offs_shape: Sequence[int],
    offs_dtype: torch.dtype,
    devices: Sequence[torch.device],
    multiple: int = FEATURE_MULTIPLE,
) -> None:
    """Raises ValueError, naming the argument, its value and the fix, unless A [M, K], B [G, K, N] and offs [G] fit,
    with K and N positive multiples of `multiple`."""
    if len(A_shape) != 2:
        raise ValueError(f"A has shape {tuple(A_shape)}; flatten the leading dimensions to [M, K]")
    if len(B_shape) != 3:
        raise ValueError(f"B_t has shape {tuple(B_shape)}; give expert weights [G, K, N]")
    for name, dtype in (("A", A_dtype), ("B_t", B_dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}; cast it to torch.bfloat16 or torch.float32")
    G, K, N = B_shape
    if A_shape[1] != K:
        raise ValueError(
            f"A has K={A_shape[1]} columns and B_t {tuple(B_shape)} has K={K}; give B_t as [G, K, N], which for "
            "weights stored [G, N, K] is weight.transpose(-2, -1)"
        )
    if G < 1:
        raise ValueError(f"B_t has shape {tuple(B_shape)}; give at least one group")
    for name, size in (("K", K), ("N", N)):
        if size < 1 or size % multiple:
            padded = max(1, -(-size // multiple)) * multiple
            raise ValueError(f"{name}={size} is not a positive multiple of {multiple}; pad it to {padded}")
    if offs_dtype != torch.int32:
        raise ValueError(f"offs is {offs_dtype}; cast it with offs.to(torch.int32)")
    if tuple(offs_shape) != (G,):
        raise ValueError(f"offs has shape {tuple(offs_shape)}; give one end row for each of the G={G} groups, ({G},)")
    if not devices[0] == devices[1] == devices[2]:
        raise ValueError(f"A, B_t and offs are on {', '.join(map(str, devices))}; move them to one device")


def check_offsets(offs: Tensor, M: int) -> None:
    """Raises ValueError unless ``offs`` [G] is non-decreasing within [0, M]. Waits for the device."""
    ends = offs.tolist()
    for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if not 0 <= end <= M:
            raise ValueError(f"offs[{g}]={end} is outside [0, M={M}]; offs are cumulative row counts of A")
        if end < start:
            raise ValueError(f"offs[{g}]={end} is less than offs[{g - 1}]={start}; give cumulative sums of group sizes")


def refuse_transforms(*tensors: Tensor) -> None:
    """Raises NotImplementedError where a transform of ``torch.func``, or forward-mode differentiation, has one of the
    `tensors` of a call of the ops, whose dispatcher would run vmap in a loop, and lose tangents."""
    if torch.compiler.is_compiling():
        return
    for x in tensors:
        tangent = forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None
        if tangent or is_functorch_wrapped_tensor(x):
            raise NotImplementedError(
                "low-precision GEMMs support neither the transforms of torch.func (vmap, grad, vjp, jvp, ...) nor "
                "forward-mode differentiation; use backward() or torch.autograd.grad, with a batch in place of vmap, "
                "or xmoe.torch_backend.unquantize_(model)"
            )
