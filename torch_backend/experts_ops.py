"""The ops of SwiGLU experts: ``xmoe::swiglu_experts_forward``, ``…_gradient``, ``…_dgrad`` and ``…_wgrad``. What they
do is in `xmoe.kernels.experts`; `xmoe.torch_backend.experts` puts them together.

M = rows, D = model width, H = hidden width of an expert, G = experts, T = tokens that go to k experts each.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xmoe.config import GroupedMMConfig, config_from_key
from xmoe.kernels import emulation, experts, pipeline
from xmoe.kernels.dispatch import Device
from xmoe.operands import FEATURE_MULTIPLE
from xmoe.torch_backend.combine import check_order
from xmoe.torch_backend.ops import (
    DTYPES,
    LIBRARY,
    Specs,
    aligned,
    allocate,
    arena,
    as_torch,
    check_offsets,
    fake_implementation,
    layout,
    unpack,
)

# --------------------------------------------------------------------------------------------------------------- plans


class _Plan(NamedTuple):
    experts: experts.Experts
    config: GroupedMMConfig
    view: Device
    outputs: Specs
    scratch: pipeline.Layout | None


class Argument(NamedTuple):
    """What `check` asks of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def arguments(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Of each tensor its `Argument`, None of none."""
    return tuple(None if x is None else Argument(x.shape, x.dtype, x.device) for x in tensors)


def check(
    x: Argument,
    w1: Argument,
    w2: Argument,
    w3: Argument,
    offs: Argument,
    order: Argument | None = None,
    multiple: int = FEATURE_MULTIPLE,
) -> None:
    """Raises ValueError unless they fit together, with D and H positive multiples of `multiple`."""
    if len(x.shape) != 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; flatten the leading dimensions to [M, D]")
    if len(w1.shape) != 3 or w1.shape[0] < 1:
        raise ValueError(f"w1 has shape {tuple(w1.shape)}; give [G, H, D] with at least one expert")
    G, H, D = w1.shape
    if x.shape[1] != D:
        raise ValueError(f"x has D={x.shape[1]} columns and w1 {tuple(w1.shape)} has D={D}; give w1 as [G, H, D]")
    for name, w, shape in (("w3", w3, (G, H, D)), ("w2", w2, (G, D, H))):
        if tuple(w.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(w.shape)}; give {list(shape)}, to go with w1 {list(w1.shape)}")
    for name, size in (("D", D), ("H", H)):
        if size < 1 or size % multiple:
            raise ValueError(f"{name}={size} is not a positive multiple of {multiple}; pad it with zeros")
    for name, tensor in (("x", x), ("w1", w1)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; cast it to torch.bfloat16 or torch.float32")
    for name, w in (("w2", w2), ("w3", w3)):
        if w.dtype != w1.dtype:
            raise ValueError(f"{name} is {w.dtype} and w1 {w1.dtype}; cast them to one dtype")
    if offs.dtype != torch.int32 or tuple(offs.shape) != (G,):
        raise ValueError(f"offs is {offs.dtype} {tuple(offs.shape)}; give int32 ({G},), the end row of each expert")
    if order is not None:
        check_order(x.shape[0], order.shape, order.dtype)
    devices = {tensor.device for tensor in (x, w1, w2, w3, offs, order) if tensor is not None}
    if len(devices) > 1:
        raise ValueError(
            f"x, the weights, offs and order are on {', '.join(map(str, devices))}; move them to one device"
        )


_check_once: Any = lru_cache(maxsize=4096)(check)


def experts_of(
    M: int, w1_shape: torch.Size, x_dtype: torch.dtype, w_dtype: torch.dtype, config: GroupedMMConfig, k: int = 0
) -> experts.Experts:
    G, H, D = w1_shape
    return experts.Experts(M, D, H, G, DTYPES[x_dtype], DTYPES[w_dtype], config.out_dtype or DTYPES[x_dtype], k)


def by_rows(w: Tensor) -> Tensor:
    """w [G, P, C], or a copy, with C contiguous and where TMA can read it."""
    return aligned(w if w.stride(2) == 1 else w.contiguous())


def _rows_and_k(x: Tensor, order: Tensor | None) -> tuple[int, int]:
    """M and the k of `Experts`. (No tokens go to one expert each.)"""
    if order is None:
        return x.shape[0], 0
    M, T = order.shape[0], x.shape[0]
    return M, M // T if T else 1


@lru_cache(maxsize=4096)
def _plan(
    stage: str, M: int, w1_shape: torch.Size, x_dtype: torch.dtype, w_dtype: torch.dtype, device: torch.device,
    key: str, k: int, *flags: bool,
) -> _Plan:  # fmt: skip
    """`flags`: as the stage's spec takes them."""
    config = config_from_key(key)
    e = experts_of(M, w1_shape, x_dtype, w_dtype, config, k)
    view = pipeline.device_of(device.type, device.index)
    spec = _SPECS[stage](e, config, view, *flags)
    return _Plan(e, config, view, as_torch(spec.outputs), layout(spec))


_SPECS: dict[str, Any] = {
    "forward": experts.forward_spec,
    "gradient": experts.gradient_spec,
    "dgrad": experts.dgrad_spec,
    "wgrad": experts.wgrad_spec,
}


# ----------------------------------------------------------------------------------------------------------------- ops

SAVED = (
    "gate_up", "x_tokens", "x_tokens_scale", "h_tokens", "h_tokens_scale", "w13_amax", "w2_amax", "place", "tokens",
)  # fmt: skip
GRADIENT = "d", "d_scale", "d_tokens", "d_tokens_scale", *experts.MAPS

LIBRARY.define(
    "swiglu_experts_forward(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor offs, str config_key, bool save, "
    "Tensor? order=None, Tensor[]? prepared=None, Tensor[]? prepared_dgrad=None) "
    f"-> ({', '.join(['Tensor'] * (1 + len(SAVED)))})",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_gradient(Tensor(a!) dh, Tensor(b!) gate_up, Tensor w1, Tensor offs, str config_key, "
    "bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_dgrad(Tensor d, Tensor d_scale, Tensor w1, Tensor w3, Tensor offs, str config_key, "
    "ScalarType x_dtype, Tensor[] maps, SymInt k=0, Tensor? place=None, Tensor[]? prepared=None, "
    "Tensor? w13_amax=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_wgrad(Tensor d_tokens, Tensor d_tokens_scale, Tensor[] x_saved, Tensor w1, Tensor offs, "
    "str config_key, ScalarType x_dtype, Tensor[] maps, SymInt M, Tensor? tokens=None) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define("swiglu(Tensor gate_up) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(LIBRARY, "swiglu_experts_forward", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu_experts_forward(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    offs: Tensor,
    config_key: str,
    save: bool,
    order: Tensor | None = None,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """``out`` [M, D] and the SAVED tensors (``experts.forward_outputs``); empty [0] those that `save` or the config
    does not ask for.

    ``order`` is the slot of each row, if x [T, D] is not sorted. ``prepared`` are w1, w2 and w3 quantized for the
    forward, ``prepared_dgrad`` w2 and w1 with w3 for the backward (``experts.prepare_weights``, each by ``ops.pack``),
    or nothing. The second is for autograd.
    """
    _check_once(*arguments(x, w1, w2, w3, offs, order))
    M, k = _rows_and_k(x, order)
    plan = _plan("forward", M, w1.shape, x.dtype, w1.dtype, x.device, config_key, k, save, bool(prepared))
    if plan.config.debug:
        check_offsets(offs, M)
    outputs, scratch = allocate(plan.outputs, x.device), arena(plan.scratch, x.device)
    x, order = aligned(x.contiguous()), None if order is None else order.contiguous()
    b1, b2, b3 = _unpack(prepared, 3) if prepared else [by_rows(w) for w in (w1, w2, w3)]
    experts.forward(plan.experts, plan.config, plan.view, x, b1, b2, b3, offs.contiguous(), outputs, scratch, order)
    return outputs["out"], *_named(SAVED, outputs, x)


def _named(names: Sequence[str], outputs: dict[str, Tensor], like: Tensor) -> Any:
    return tuple(outputs[name] if name in outputs else like.new_empty(0) for name in names)


def _unpack(tensors: Sequence[Tensor], operands: int) -> list[Any]:
    """So many operands of `pack`, one after the other."""
    each = len(tensors) // operands
    return [unpack(tensors[each * index : each * (index + 1)]) for index in range(operands)]


@torch.library.register_fake("xmoe::swiglu_experts_forward", lib=LIBRARY)
def _(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    offs: Tensor,
    config_key: str,
    save: bool,
    order: Tensor | None = None,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    check(*arguments(x, w1, w2, w3, offs, order))
    config, (M, k) = config_from_key(config_key), _rows_and_k(x, order)
    e = experts_of(M, w1.shape, x.dtype, w1.dtype, config, k)
    specs = experts.forward_outputs(e, config, fake_implementation(config, x.device), save, bool(prepared))
    outputs = allocate(as_torch(specs), x.device)
    return outputs["out"], *_named(SAVED, outputs, x)


@torch.library.impl(LIBRARY, "swiglu_experts_gradient", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu_experts_gradient(
    dh: Tensor, gate_up: Tensor, w1: Tensor, offs: Tensor, config_key: str, need_dx: bool, need_dw: bool
) -> tuple[Tensor, ...]:
    """The GRADIENT tensors (``experts.gradient_outputs``); empty [0] those that are not needed or not there. The others
    are in place of dh [M, H] or gate_up [M, 2H] (``experts.places``), both contiguous, which may become anything."""
    assert dh.is_contiguous(), f"dh has strides {dh.stride()}: its memory is used again"
    assert gate_up.is_contiguous(), f"gate_up has strides {gate_up.stride()}: its memory is used again"
    needs = need_dx, need_dw
    plan = _plan("gradient", dh.shape[0], w1.shape, dh.dtype, w1.dtype, dh.device, config_key, 0, *needs)
    outputs, scratch = allocate(plan.outputs, dh.device), arena(plan.scratch, dh.device)
    experts.gradient(plan.experts, plan.config, plan.view, dh, gate_up, offs.contiguous(), *needs, outputs, scratch)
    return _named(GRADIENT, outputs, dh)


def _maps(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """By name, those that are there."""
    return {name: x for name, x in zip(experts.MAPS, tensors, strict=True) if x.numel()}


@torch.library.register_fake("xmoe::swiglu_experts_gradient", lib=LIBRARY)
def _(
    dh: Tensor, gate_up: Tensor, w1: Tensor, offs: Tensor, config_key: str, need_dx: bool, need_dw: bool
) -> tuple[Tensor, ...]:
    config = config_from_key(config_key)
    e = experts_of(dh.shape[0], w1.shape, dh.dtype, w1.dtype, config)
    specs = experts.gradient_outputs(e, config, fake_implementation(config, dh.device), need_dx, need_dw)
    return _named(GRADIENT, allocate(as_torch(specs), dh.device), dh)


@torch.library.impl(LIBRARY, "swiglu_experts_dgrad", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu_experts_dgrad(
    d: Tensor,
    d_scale: Tensor,
    w1: Tensor,
    w3: Tensor,
    offs: Tensor,
    config_key: str,
    x_dtype: torch.dtype,
    maps: Sequence[Tensor],
    k: int = 0,
    place: Tensor | None = None,
    prepared: Sequence[Tensor] | None = None,
    w13_amax: Tensor | None = None,
) -> Tensor:
    """dx [M, D], or [M / k, D] with ``place``, from the rows that `swiglu_experts_gradient` has left. ``w13_amax``: the
    forward's, of the same values of w1 and w3, or nothing."""
    flags = bool(prepared), w13_amax is not None
    plan = _plan("dgrad", d.shape[0], w1.shape, x_dtype, w1.dtype, d.device, config_key, k, *flags)
    outputs, scratch = allocate(plan.outputs, d.device), arena(plan.scratch, d.device)
    w13 = unpack(prepared) if prepared else [by_rows(w) for w in (w1, w3)]
    scale = d_scale if d_scale.numel() else None
    rest = offs.contiguous(), outputs, scratch, _maps(maps), w13_amax, place
    experts.dgrad(plan.experts, plan.config, plan.view, d, scale, w13, *rest)
    return outputs["dx"]


@torch.library.register_fake("xmoe::swiglu_experts_dgrad", lib=LIBRARY)
def _(
    d: Tensor, d_scale: Tensor, w1: Tensor, w3: Tensor, offs: Tensor, config_key: str, x_dtype: torch.dtype,
    maps: Sequence[Tensor], k: int = 0, *_: Any,
) -> Tensor:  # fmt: skip
    return d.new_empty(d.shape[0] // max(k, 1), w1.shape[2], dtype=x_dtype)


@torch.library.impl(LIBRARY, "swiglu_experts_wgrad", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu_experts_wgrad(
    d_tokens: Tensor,
    d_tokens_scale: Tensor,
    x_saved: Sequence[Tensor],
    w1: Tensor,
    offs: Tensor,
    config_key: str,
    x_dtype: torch.dtype,
    maps: Sequence[Tensor],
    M: int,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(dw1, dw3)`` [G, H, D] in the dtype of w1, from the tokens that `swiglu_experts_gradient` has left. ``tokens``:
    the forward's, if it gave them."""
    k = 0 if tokens is None else M // max(1, x_saved[0].shape[0])
    plan = _plan("wgrad", M, w1.shape, x_dtype, w1.dtype, d_tokens.device, config_key, k)
    outputs, scratch = allocate(plan.outputs, d_tokens.device), arena(plan.scratch, d_tokens.device)
    saved = tuple(x_saved)
    if pipeline.saves_input(plan.config):
        saved = tuple(aligned(x.contiguous()) for x in saved)
    scale = d_tokens_scale if d_tokens_scale.numel() else None
    rest = offs.contiguous(), outputs, scratch, _maps(maps), tokens
    experts.wgrad(plan.experts, plan.config, plan.view, d_tokens, scale, saved, *rest)
    return outputs["dw1"], outputs["dw3"]


@torch.library.register_fake("xmoe::swiglu_experts_wgrad", lib=LIBRARY)
def _(
    d_tokens: Tensor, d_tokens_scale: Tensor, x_saved: Sequence[Tensor], w1: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return tuple(torch.empty(w1.shape, dtype=w1.dtype, device=w1.device) for _ in range(2))  # type: ignore[return-value]


@torch.library.impl(LIBRARY, "swiglu", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu(gate_up: Tensor) -> Tensor:
    """silu(g) * u [M, H] of gate_up [M, 2H] = [g | u], in float32, rounded once."""
    if gate_up.device.type != "cuda" or not pipeline.HAS_TRITON:
        return emulation.swiglu(gate_up)
    h = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    experts.swiglu_into(gate_up.contiguous(), h)
    return h


@torch.library.register_fake("xmoe::swiglu", lib=LIBRARY)
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
