"""SwiGLU experts as one differentiable op: ``xmoe::swiglu_experts_forward``, ``…_gradient``, ``…_dgrad`` and
``…_wgrad``.

M = tokens, D = model width, H = hidden width of an expert, G = experts. What the stages do, and what they save beside
three grouped GEMMs, is in `xmoe.kernels.experts`.
"""

from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from xmoe.config import GroupedMMConfig, as_config, config_from_key
from xmoe.kernels import emulation, experts, pipeline
from xmoe.kernels.dispatch import Device
from xmoe.operands import FEATURE_MULTIPLE, whole_blocks
from xmoe.torch_backend.grouped_mm import grouped_mm_by_key
from xmoe.torch_backend.ops import (
    DTYPES,
    LIBRARY,
    Specs,
    aligned,
    allocate,
    arena,
    as_torch,
    backward,
    check_offsets,
    direct,
    fake_implementation,
    layout,
    pack,
    unpack,
    unseen,
)
from xmoe.torch_backend.weight_cache import cached


def swiglu_experts(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config: GroupedMMConfig | StrEnum | str | None = None
) -> Tensor:
    """w2 (silu(w1 x) * w3 x) of every row with the weights of its expert, and the gradients, in one op.

    The forward's GEMMs have the numbers of `scaled_grouped_mm`; the SwiGLU between them is computed in float32 and
    rounded once; the gradient of x is one GEMM over the gradients of both halves. Where the blocks of the format do not
    divide H (32 in MX formats, 128 in ``fp8_blockwise``), and only there, it is three `scaled_grouped_mm`. The backward
    overwrites what the forward saved, unless the graph is retained: a saved-tensor hook that keeps it will see that.

    Args:
        x: bf16 or fp32 [M, D]. Expert g owns the rows ``offs[g-1]:offs[g]``.
        w1, w3: bf16 or fp32 [G, H, D], gate and up.
        w2: [G, D, H], down, in the dtype of w1 and w3.
        offs: int32 [G], the end row of each expert; rows past the last one come out as zeros.
        config: what to quantize: a config, or a recipe (enum member or name); None is the bf16 baseline.

    Returns:
        [M, D] in ``config.out_dtype``, or in the dtype of x.

    Raises:
        ValueError: a shape, dtype or device that does not fit; D or H not a multiple of 16; a config that the device
            cannot run under its kernel preference.
    """
    for name, tensor in (("x", x), ("w1", w1), ("w2", w2), ("w3", w3), ("offs", offs)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is {'None' if tensor is None else type(tensor).__name__}; give a torch.Tensor")
    return swiglu_experts_by_key(x, w1, w2, w3, offs, as_config(config).to_key())


def swiglu_experts_by_key(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config_key: str) -> Tensor:
    """`swiglu_experts` with the config as its key, the form that the ops carry."""
    if w1.ndim == 3 and not _fuses(config_key, w1.shape[1]):
        _check(*_arguments(x, w1, w2, w3, offs))
        h = F.silu(grouped_mm_by_key(x, w1.mT, offs, config_key)) * grouped_mm_by_key(x, w3.mT, offs, config_key)
        return grouped_mm_by_key(h, w2.mT, offs, config_key)
    save = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, w2, w3))
    prepared = cached(lambda: _prepare(x, w1, w2, w3, offs, config_key), (config_key, x.dtype), w1, w2, w3) or ()
    op = torch.ops.xmoe.swiglu_experts_forward.default
    if unseen(x, w1, w2, w3, offs):
        op = swiglu_experts_with_autograd
    return op(x, w1, w2, w3, offs, config_key, save, *prepared)[0]


def _prepare(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config_key: str
) -> tuple[list[Tensor], list[Tensor]]:
    """The weights quantized for the forward and for the backward; nothing in the bf16 format."""
    config = config_from_key(config_key)
    if config.format == "bf16":
        return [], []
    _check(*_arguments(x, w1, w2, w3, offs))
    e = _experts(0, w1.shape, x.dtype, w1.dtype, config)
    view = pipeline.device_of(x.device.type, x.device.index)
    weights = (aligned(w.contiguous()) for w in (w1, w2, w3))
    packed = [pack(operand) for operand in experts.prepare_weights(e, config, view, *weights)]
    of_forward, of_backward = ([tensor for pair in half for tensor in pair] for half in (packed[:3], packed[3:]))
    return of_forward, of_backward


@torch.compiler.assume_constant_result
def _fuses(config_key: str, H: int) -> bool:
    return whole_blocks(config_from_key(config_key).format, H)


# --------------------------------------------------------------------------------------------------------------- plans


class _Plan(NamedTuple):
    experts: experts.Experts
    config: GroupedMMConfig
    view: Device
    outputs: Specs
    scratch: pipeline.Layout | None


class _Argument(NamedTuple):
    """What `_check` asks of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _arguments(*tensors: Tensor) -> tuple[_Argument, ...]:
    return tuple(_Argument(x.shape, x.dtype, x.device) for x in tensors)


def _check(x: _Argument, w1: _Argument, w2: _Argument, w3: _Argument, offs: _Argument) -> None:
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
        if size < FEATURE_MULTIPLE or size % FEATURE_MULTIPLE:
            raise ValueError(f"{name}={size} is not a positive multiple of {FEATURE_MULTIPLE}; pad it with zeros")
    for name, tensor in (("x", x), ("w1", w1)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} is {tensor.dtype}; cast it to torch.bfloat16 or torch.float32")
    for name, w in (("w2", w2), ("w3", w3)):
        if w.dtype != w1.dtype:
            raise ValueError(f"{name} is {w.dtype} and w1 {w1.dtype}; cast them to one dtype")
    if offs.dtype != torch.int32 or tuple(offs.shape) != (G,):
        raise ValueError(f"offs is {offs.dtype} {tuple(offs.shape)}; give int32 ({G},), the end row of each expert")
    devices = {tensor.device for tensor in (x, w1, w2, w3, offs)}
    if len(devices) > 1:
        raise ValueError(f"x, w1, w2, w3 and offs are on {', '.join(map(str, devices))}; move them to one device")


_check_once = lru_cache(maxsize=4096)(_check)


def _experts(
    M: int, w1_shape: torch.Size, x_dtype: torch.dtype, w_dtype: torch.dtype, config: GroupedMMConfig
) -> experts.Experts:
    G, H, D = w1_shape
    return experts.Experts(M, D, H, G, DTYPES[x_dtype], DTYPES[w_dtype], config.out_dtype or DTYPES[x_dtype])


@lru_cache(maxsize=4096)
def _plan(
    stage: str, M: int, w1_shape: torch.Size, x_dtype: torch.dtype, w_dtype: torch.dtype, device: torch.device,
    key: str, *flags: bool,
) -> _Plan:  # fmt: skip
    """`flags`: as the stage's spec takes them."""
    config = config_from_key(key)
    e = _experts(M, w1_shape, x_dtype, w_dtype, config)
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

LIBRARY.define(
    "swiglu_experts_forward(Tensor x, Tensor w1, Tensor w2, Tensor w3, Tensor offs, str config_key, bool save, "
    "Tensor[]? prepared=None, Tensor[]? prepared_dgrad=None) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_gradient(Tensor(a!) dh, Tensor(b!) gate_up, Tensor w1, Tensor offs, str config_key, "
    "bool need_dx, bool need_dw) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_dgrad(Tensor d, Tensor d_scale, Tensor w1, Tensor w3, Tensor offs, str config_key, "
    "ScalarType x_dtype, Tensor[]? prepared=None, Tensor? w13_amax=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "swiglu_experts_wgrad(Tensor d_tokens, Tensor d_tokens_scale, Tensor[] x_saved, Tensor w1, Tensor offs, "
    "str config_key, ScalarType x_dtype, SymInt M) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define("swiglu(Tensor gate_up) -> Tensor", tags=torch.Tag.pt2_compliant_tag)

_GRADIENT = ("d", "d_scale", "d_tokens", "d_tokens_scale")
_SAVED = ("gate_up", "x_tokens", "x_tokens_scale", "h_tokens", "h_tokens_scale", "w13_amax", "w2_amax")


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
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    """``(out [M, D], gate_up [M, 2H], x_tokens, x_tokens_scale, h_tokens, h_tokens_scale, w13_amax, w2_amax)``
    (``experts.forward_outputs``); empty [0] those that `save` or the config does not ask for.

    ``prepared`` are w1, w2 and w3 quantized for the forward, ``prepared_dgrad`` w2 and w1 with w3 for the backward
    (``experts.prepare_weights``, each by ``ops.pack``), or nothing. The second is for autograd.
    """
    _check_once(*_arguments(x, w1, w2, w3, offs))
    plan = _plan("forward", x.shape[0], w1.shape, x.dtype, w1.dtype, x.device, config_key, save, bool(prepared))
    if plan.config.debug:
        check_offsets(offs, x.shape[0])
    outputs, scratch = allocate(plan.outputs, x.device), arena(plan.scratch, x.device)
    x = aligned(x.contiguous())
    b1, b2, b3 = _unpack(prepared, 3) if prepared else (aligned(w.contiguous()) for w in (w1, w2, w3))
    experts.forward(plan.experts, plan.config, plan.view, x, b1, b2, b3, offs.contiguous(), outputs, scratch)
    return outputs["out"], *_named(_SAVED, outputs, x)


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
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    _check(*_arguments(x, w1, w2, w3, offs))
    config = config_from_key(config_key)
    e = _experts(x.shape[0], w1.shape, x.dtype, w1.dtype, config)
    specs = experts.forward_outputs(e, config, fake_implementation(config, x.device), save, bool(prepared))
    outputs = allocate(as_torch(specs), x.device)
    return outputs["out"], *_named(_SAVED, outputs, x)


@torch.library.impl(LIBRARY, "swiglu_experts_gradient", "CompositeExplicitAutograd")
@torch._disable_dynamo
def swiglu_experts_gradient(
    dh: Tensor, gate_up: Tensor, w1: Tensor, offs: Tensor, config_key: str, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(d, d_scale, d_tokens, d_tokens_scale)`` (``experts.gradient_outputs``); empty [0] those that are not needed or
    not there. The others are in place of dh [M, H] or gate_up [M, 2H] (``experts.places``), both contiguous, which may
    become anything."""
    assert dh.is_contiguous(), f"dh has strides {dh.stride()}: its memory is used again"
    assert gate_up.is_contiguous(), f"gate_up has strides {gate_up.stride()}: its memory is used again"
    plan = _plan("gradient", dh.shape[0], w1.shape, dh.dtype, w1.dtype, dh.device, config_key, need_dx, need_dw)
    outputs, scratch = allocate(plan.outputs, dh.device), arena(plan.scratch, dh.device)
    needs = need_dx, need_dw
    experts.gradient(plan.experts, plan.config, plan.view, dh, gate_up, offs.contiguous(), *needs, outputs, scratch)
    return _named(_GRADIENT, outputs, dh)


def _named(names: Sequence[str], outputs: dict[str, Tensor], like: Tensor) -> Any:
    return tuple(outputs[name] if name in outputs else like.new_empty(0) for name in names)


@torch.library.register_fake("xmoe::swiglu_experts_gradient", lib=LIBRARY)
def _(
    dh: Tensor, gate_up: Tensor, w1: Tensor, offs: Tensor, config_key: str, need_dx: bool, need_dw: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config = config_from_key(config_key)
    e = _experts(dh.shape[0], w1.shape, dh.dtype, w1.dtype, config)
    specs = experts.gradient_outputs(e, config, fake_implementation(config, dh.device), need_dx, need_dw)
    return _named(_GRADIENT, allocate(as_torch(specs), dh.device), dh)


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
    prepared: Sequence[Tensor] | None = None,
    w13_amax: Tensor | None = None,
) -> Tensor:
    """dx [M, D] from the rows that `swiglu_experts_gradient` has left. ``w13_amax``: the forward's, of the same values
    of w1 and w3, or nothing."""
    flags = bool(prepared), w13_amax is not None
    plan = _plan("dgrad", d.shape[0], w1.shape, x_dtype, w1.dtype, d.device, config_key, *flags)
    outputs, scratch = allocate(plan.outputs, d.device), arena(plan.scratch, d.device)
    w13 = unpack(prepared) if prepared else [aligned(w.contiguous()) for w in (w1, w3)]
    scale = d_scale if d_scale.numel() else None
    experts.dgrad(plan.experts, plan.config, plan.view, d, scale, w13, offs.contiguous(), outputs, scratch, w13_amax)
    return outputs["dx"]


@torch.library.register_fake("xmoe::swiglu_experts_dgrad", lib=LIBRARY)
def _(
    d: Tensor, d_scale: Tensor, w1: Tensor, w3: Tensor, offs: Tensor, config_key: str, x_dtype: torch.dtype, *_: Any
) -> Tensor:
    return d.new_empty(d.shape[0], w1.shape[2], dtype=x_dtype)


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
    M: int,
) -> tuple[Tensor, Tensor]:
    """``(dw1, dw3)`` [G, H, D] in the dtype of w1, from the tokens that `swiglu_experts_gradient` has left."""
    plan = _plan("wgrad", M, w1.shape, x_dtype, w1.dtype, d_tokens.device, config_key)
    outputs, scratch = allocate(plan.outputs, d_tokens.device), arena(plan.scratch, d_tokens.device)
    saved = tuple(x_saved)
    if pipeline.saves_input(plan.config):
        saved = tuple(aligned(x.contiguous()) for x in saved)
    scale = d_tokens_scale if d_tokens_scale.numel() else None
    experts.wgrad(plan.experts, plan.config, plan.view, d_tokens, scale, saved, offs.contiguous(), outputs, scratch)
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


# ------------------------------------------------------------------------------------------------------------ autograd


_forward_op = torch.ops.xmoe.swiglu_experts_forward.default
_gradient_op = torch.ops.xmoe.swiglu_experts_gradient.default
_dgrad_op = torch.ops.xmoe.swiglu_experts_dgrad.default
_wgrad_op = torch.ops.xmoe.swiglu_experts_wgrad.default
_swiglu_op = torch.ops.xmoe.swiglu.default


@torch.compiler.assume_constant_result
def _places(config_key: str, device: torch.device, x_dtype: torch.dtype) -> experts.Places:
    config = config_from_key(config_key)
    return experts.places(config, fake_implementation(config, device), DTYPES[x_dtype])


class _NoSecondDerivative(torch.autograd.Function):
    """Lets a gradient through that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("the gradients of swiglu_experts have no derivative; drop create_graph=True")


class _SwigluExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        offs: Tensor,
        config_key: str,
        prepared: Sequence[Tensor] | None,
        prepared_dgrad: Sequence[Tensor] | None,
    ) -> Any:
        args = x, w1, w2, w3, offs, config_key, True, prepared
        out, gate_up, *tokens, w13_amax, w2_amax = direct(_forward_op, swiglu_experts_forward, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(gate_up, *tokens, w13_amax, w2_amax)
        ctx.config_key, ctx.takes_input = config_key, pipeline.saves_input(config_from_key(config_key))
        need_x, need_h = ctx.needs_input_grad[1] or ctx.needs_input_grad[3], ctx.needs_input_grad[2]
        x_saved, h_saved = ((x,) if ctx.takes_input else tokens[:2]), (() if ctx.takes_input else tokens[2:])
        # Not saved tensors, whose number and shapes must not depend on a cache. The weights are saved, and autograd
        # checks that nothing has changed them since.
        ctx.prepared = tuple(prepared_dgrad or ())
        ctx.w13_amax, ctx.w2_amax = (amax if amax.numel() else None for amax in (w13_amax, w2_amax))
        ctx.count = len(x_saved) * need_x
        activations = (*(x_saved if need_x else ()), *(h_saved if need_h else ()))
        ctx.save_for_backward(gate_up, w1, w2, w3, offs, *activations)
        return out, gate_up, *tokens, w13_amax, w2_amax

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return _SwigluExperts._backward(ctx, *gradients)
        with torch.no_grad():
            found = _SwigluExperts._backward(ctx, *gradients)
        return tuple(None if x is None else _NoSecondDerivative.apply(x.detach().requires_grad_()) for x in found)

    @staticmethod
    def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dout, (need_dx, need_dw1, need_dw2, need_dw3) = gradients[0], ctx.needs_input_grad[:4]
        if dout is None or not any(ctx.needs_input_grad):
            return (None,) * 8
        gate_up, w1, w2, w3, offs, *saved = ctx.saved_tensors
        x_saved, h_saved = saved[: ctx.count], saved[ctx.count :]
        each = len(ctx.prepared) // 2
        of_w2, of_w13 = ctx.prepared[:each], ctx.prepared[each:]
        # The gradient of gate_up takes its place: the largest tensor here, and free after this, unless the graph stays.
        if torch._C._autograd._get_current_graph_task_keep_graph():  # pyright: ignore[reportAttributeAccessIssue]
            gate_up = gate_up.clone()
        else:
            ctx.maybe_clear_saved_tensors()
        del saved
        key, need_dw13, dx, dw1, dw3 = ctx.config_key, need_dw1 or need_dw3, None, None, None
        if ctx.takes_input and need_dw2:
            h_saved = [direct(_swiglu_op, swiglu, gate_up)]
        need_dh = need_dx or need_dw13
        dh, dw2 = backward(dout, h_saved, w2.mT, offs, key, gate_up.dtype, need_dh, need_dw2, of_w2, ctx.w2_amax)
        del h_saved
        if need_dh:
            M, x_dtype = gate_up.shape[0], gate_up.dtype
            args = dh, gate_up, w1, offs, key, need_dx, need_dw13
            left = dict(zip(_GRADIENT, direct(_gradient_op, swiglu_experts_gradient, *args), strict=True))
            left |= {"dh": dh, "gate_up": gate_up}
            where = _places(key, gate_up.device, x_dtype)
            d, d_scale, d_tokens = left[where.rows], left["d_scale"], left[where.tokens]
            d_tokens_scale = left["d_tokens_scale"]
            del dh, gate_up, args, left
            if need_dx:
                args = d, d_scale, w1, w3, offs, key, x_dtype, of_w13, ctx.w13_amax
                dx = direct(_dgrad_op, swiglu_experts_dgrad, *args)
                del args
            del d, d_scale
            if need_dw13:
                args = d_tokens, d_tokens_scale, x_saved, w1, offs, key, x_dtype, M
                dw1, dw3 = direct(_wgrad_op, swiglu_experts_wgrad, *args)
        return (
            dx if need_dx else None, dw1 if need_dw1 else None, dw2.mT if need_dw2 else None,
            dw3 if need_dw3 else None, None, None, None, None,
        )  # fmt: skip


@torch.library.impl(LIBRARY, "swiglu_experts_forward", "Autograd")
@torch._disable_dynamo
def swiglu_experts_with_autograd(
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    offs: Tensor,
    config_key: str,
    save: bool,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, w1, w2, w3)):
        return _SwigluExperts.apply(x, w1, w2, w3, offs, config_key, prepared, prepared_dgrad)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(x, w1, w2, w3, offs, config_key, save, prepared)
