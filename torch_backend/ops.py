"""The custom ops ``xmoe::grouped_mm_forward`` and ``xmoe::grouped_mm_backward``, their fakes and their autograd.

M = tokens, K = contraction, N = output features, G = groups, Mp = padded tokens (``xmoe.operands``).

The ops allocate by the specs of ``xmoe.kernels.pipeline`` and call it. All that follows from a call's signature
(shapes, dtypes, devices, config) is checked and worked out once and cached in a plan. They are registered with the
plain ``torch.library.Library``: without its kernels a forward takes 24 us of host time so, and 39 us with
``torch.library.custom_op`` and ``register_autograd``.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from xmoe.config import GroupedMMConfig, KernelPreference, config_from_key
from xmoe.kernels import operands, pipeline
from xmoe.kernels.dispatch import Device, Implementation, select
from xmoe.operands import QuantizedOperand
from xmoe.torch_backend.calls import direct
from xmoe.torch_backend.checks import DTYPES, check_offsets, check_signature

_TMA_BYTES = 16
Specs = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


LIBRARY = torch.library.Library("xmoe", "FRAGMENT")  # its registrations live as long as it does
LIBRARY.define(
    "grouped_mm_forward(Tensor A, Tensor B, Tensor offs, str config_key, bool save_tokens, Tensor[]? prepared=None, "
    "Tensor[]? prepared_dgrad=None, bool save_amax=False, Tensor[]? a_operand=None, Tensor[]? b_operand=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "grouped_mm_backward(Tensor dOut, Tensor[] A_saved, Tensor B, Tensor offs, str config_key, ScalarType A_dtype, "
    "bool need_dA, bool need_dB, Tensor[]? prepared=None, Tensor? b_amax=None) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


class _Plan(NamedTuple):
    problem: pipeline.Problem
    config: GroupedMMConfig
    view: Device
    outputs: Specs
    scratch: pipeline.Layout | None
    """None where there is no scratch."""


def as_torch(specs: dict[str, pipeline.TensorSpec]) -> Specs:
    return tuple((name, spec.shape, getattr(torch, spec.dtype)) for name, spec in specs.items())


def allocate(specs: Specs, device: torch.device) -> dict[str, Tensor]:
    """(`torch.empty` takes 0.5 us longer to read one tuple, which could be of names of dimensions.)"""
    return {name: torch.empty(*shape, dtype=dtype, device=device) for name, shape, dtype in specs}


def layout(spec: pipeline.Spec) -> pipeline.Layout | None:
    return pipeline.Layout(spec.scratch, turns=spec.turns) if spec.scratch else None


def arena(layout: pipeline.Layout | None, device: torch.device) -> pipeline.Tensors:
    return {} if layout is None else pipeline.Arena(layout, device)


# ----------------------------------------------------------------------------------------------------------- forward


@lru_cache(maxsize=4096)
def _forward_plan(
    A_shape: torch.Size,
    A_dtype: torch.dtype,
    B_shape: torch.Size,
    B_dtype: torch.dtype,
    offs_shape: torch.Size,
    offs_dtype: torch.dtype,
    devices: tuple[torch.device, ...],
    key: str,
    save_tokens: bool,
    prepared: bool,
    save_amax: bool,
    a_operand: bool,
) -> _Plan:
    check_signature(A_shape, A_dtype, B_shape, B_dtype, offs_shape, offs_dtype, devices)
    config = config_from_key(key)
    problem = _problem(A_shape[0], B_shape, A_dtype, B_dtype, _out_dtype(config, A_dtype))
    view = pipeline.device_of(devices[0].type, devices[0].index)
    rows = a_operand and operands.takes_rows(config, view)
    spec = pipeline.forward_spec(problem, config, view, save_tokens, prepared, save_amax, rows)
    return _Plan(problem, config, view, as_torch(spec.outputs), layout(spec))


def _out_dtype(config: GroupedMMConfig, A_dtype: torch.dtype) -> str:
    return config.out_dtype or DTYPES[A_dtype]


def _problem(
    M: int, B_shape: torch.Size, A_dtype: torch.dtype, B_dtype: torch.dtype, out_dtype: str
) -> pipeline.Problem:
    G, K, N = B_shape
    return pipeline.Problem(M, N, K, G, DTYPES[A_dtype], DTYPES[B_dtype], out_dtype)


@torch.library.impl(LIBRARY, "grouped_mm_forward", "CompositeExplicitAutograd")
@torch._disable_dynamo  # which traces into it where it has skipped the frame of the call
def grouped_mm_forward(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    config_key: str,
    save_tokens: bool,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
    save_amax: bool = False,
    a_operand: Sequence[Tensor] | None = None,
    b_operand: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(out [M, N], a_tokens, a_tokens_scale, b_amax)`` (``pipeline.forward_outputs``); empty [0] those that were not
    made.

    Args:
        A: bf16 or fp32 [M, K].
        B: bf16 or fp32 [G, K, N], any strides.
        offs: int32 [G], the end row of each group.
        config_key: ``GroupedMMConfig.to_key()``.
        save_tokens: also quantize A for the weight gradient. Ignored by configs whose wgrad takes A itself.
        prepared, prepared_dgrad: B quantized along K and along N (`pack`), or nothing. The second is for autograd.
        save_amax: also find the maxima that quantizing B along N needs, if they come at no cost: not of a B that is
            prepared or has N contiguous. Autograd asks for them where A needs a gradient.
        a_operand, b_operand: data and scale of operands along K that come quantized, or nothing. Of A and B only the
            shapes and dtypes count then, A being bf16, and for `save_tokens` A's values, data * scale.
    """
    plan = _forward_plan(
        A.shape, A.dtype, B.shape, B.dtype, offs.shape, offs.dtype, (A.device, B.device, offs.device), config_key,
        save_tokens, bool(prepared or b_operand), save_amax and k_is_contiguous(B), bool(a_operand),
    )  # fmt: skip
    if plan.config.debug:
        check_offsets(offs, A.shape[0])
    outputs, scratch = allocate(plan.outputs, A.device), arena(plan.scratch, A.device)
    rows, exact = None, False
    if a_operand:
        operand = QuantizedOperand(a_operand[0], a_operand[1], "K", plan.config.format)
        if operands.takes_rows(plan.config, plan.view):
            rows = operands.as_rows(operand, plan.config, plan.view, A if save_tokens else None)
        else:
            A, exact = A if save_tokens else operands.dequantize(operand), True
    if b_operand:
        b = operands.as_weights(
            QuantizedOperand(b_operand[0], b_operand[1], "K", plan.config.format), plan.config, plan.view
        )
    else:
        b = unpack(prepared) if prepared else aligned(B)
    A = A if rows is not None and not save_tokens else aligned(A.contiguous())
    pipeline.forward(plan.problem, plan.config, plan.view, A, b, offs.contiguous(), outputs, scratch, rows, exact)
    return _returned(outputs, A)


_RETURNED = ("out", "a_tokens", "a_tokens_scale", "b_amax")


def _returned(outputs: dict[str, Tensor], A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple([outputs[name] if name in outputs else A.new_empty(0) for name in _RETURNED])  # type: ignore[return-value]


def pack(prepared: pipeline.Prepared) -> list[Tensor]:
    """As ops take it: one tensor or two."""
    return [x for x in prepared if x is not None]


def unpack(tensors: Sequence[Tensor]) -> pipeline.Prepared:
    """The inverse of `pack`."""
    return pipeline.Prepared(tensors[0], tensors[1] if len(tensors) > 1 else None)


def aligned(x: Tensor) -> Tensor:
    """x, or a contiguous copy (of the same axis) of an x that TMA cannot read as it lies.

    It can where one of the last two axes is contiguous and the first byte and the other strides are multiples of 16
    bytes (CUDA driver API, ``cuTensorMapEncodeTiled``); a stride of 0, of an expanded axis, is none.
    """
    if x.data_ptr() % _TMA_BYTES == 0 and _tma_reads(x.stride(), x.element_size()):
        return x
    if x.ndim == 3 and k_is_contiguous(x):
        return x.mT.clone(memory_format=torch.contiguous_format).mT
    return x.clone(memory_format=torch.contiguous_format)


@lru_cache(maxsize=4096)
def _tma_reads(strides: tuple[int, ...], element_size: int) -> bool:
    multiple = _TMA_BYTES // element_size
    whole = all(s == 1 or (s > 0 and s % multiple == 0) for s in strides)
    return whole and 1 in strides[-2:] and strides.count(1) == 1


def k_is_contiguous(B: Tensor) -> bool:
    """Whether K is the contiguous axis of B [G, K, N]; and of `aligned(B)`."""
    return B.stride(1) == 1 != B.stride(2)


def fake_implementation(config: GroupedMMConfig, device: torch.device) -> Implementation:
    """What a tensor that is said to be on `device` would get."""
    if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
        return select(config, pipeline.device_of(device.type, device.index))
    return select(dataclasses.replace(config, kernel_preference=KernelPreference.EMULATED), Device("meta"))


@torch.library.register_fake("xmoe::grouped_mm_forward", lib=LIBRARY)
def _(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    config_key: str,
    save_tokens: bool,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
    save_amax: bool = False,
    a_operand: Sequence[Tensor] | None = None,
    b_operand: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    devices = (A.device, B.device, offs.device)
    check_signature(A.shape, A.dtype, B.shape, B.dtype, offs.shape, offs.dtype, devices)
    config = config_from_key(config_key)
    problem = _problem(A.shape[0], B.shape, A.dtype, B.dtype, _out_dtype(config, A.dtype))
    implementation = fake_implementation(config, A.device)
    save_amax = save_amax and not (prepared or b_operand) and k_is_contiguous(B)
    specs = pipeline.forward_outputs(problem, config, implementation, save_tokens, save_amax)
    return _returned(allocate(as_torch(specs), A.device), A)


# ---------------------------------------------------------------------------------------------------------- backward


@lru_cache(maxsize=4096)
def _backward_plan(
    M: int,
    dOut_dtype: torch.dtype,
    A_dtype: torch.dtype,
    B_shape: torch.Size,
    B_dtype: torch.dtype,
    device: torch.device,
    key: str,
    need_dA: bool,
    need_dB: bool,
    prepared: bool,
    amax_is_known: bool,
) -> _Plan:
    config = config_from_key(key)
    problem = _problem(M, B_shape, A_dtype, B_dtype, DTYPES[dOut_dtype])
    view = pipeline.device_of(device.type, device.index)
    spec = pipeline.backward_spec(problem, config, view, need_dA, need_dB, prepared, amax_is_known)
    return _Plan(problem, config, view, as_torch(spec.outputs), layout(spec))


def _empty_dB(B: Tensor) -> Tensor:
    """dB [G, K, N] in B's layout: a transposed view of [G, N, K] where B is one, else contiguous."""
    G, K, N = B.shape
    return B.new_empty(G, K, N) if B.stride(2) == 1 else B.new_empty(G, N, K).transpose(1, 2)


@torch.library.impl(LIBRARY, "grouped_mm_backward", "CompositeExplicitAutograd")
@torch._disable_dynamo
def grouped_mm_backward(
    dOut: Tensor,
    A_saved: Sequence[Tensor],
    B: Tensor,
    offs: Tensor,
    config_key: str,
    A_dtype: torch.dtype,
    need_dA: bool,
    need_dB: bool,
    prepared: Sequence[Tensor] | None = None,
    b_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``(dA [M, K], dB [G, K, N])``, empty [0] where not needed. dB has the memory layout of B.

    Args:
        dOut: [M, N] in the forward's output dtype.
        A_saved: ``(a_tokens, a_tokens_scale)`` of the forward, ``(A,)`` where the config's wgrad takes A itself
            (``pipeline.saves_input``), or () without `need_dB`.
        B, offs, config_key: as in the forward.
        A_dtype: of A and dA.
        prepared: B quantized along N (`pack`), or nothing.
        b_amax: the forward's, of the same values of B, or nothing.
    """
    device = dOut.device
    plan = _backward_plan(
        dOut.shape[0], dOut.dtype, A_dtype, B.shape, B.dtype, device, config_key, need_dA, need_dB, bool(prepared),
        b_amax is not None,
    )  # fmt: skip
    outputs = {
        name: _empty_dB(B) if name == "dB" else torch.empty(*shape, dtype=dtype, device=device)
        for name, shape, dtype in plan.outputs
    }
    scratch = arena(plan.scratch, device)
    dOut, b, offs = aligned(dOut.contiguous()), unpack(prepared) if prepared else aligned(B), offs.contiguous()
    saved = tuple(A_saved)
    if pipeline.saves_input(plan.config):
        saved = tuple(aligned(A.contiguous()) for A in saved)
    pipeline.backward(plan.problem, plan.config, plan.view, dOut, saved, b, offs, outputs, scratch, b_amax)
    return (
        outputs["dA"] if need_dA else dOut.new_empty(0, dtype=A_dtype),
        outputs["dB"] if need_dB else B.new_empty(0),
    )


@torch.library.register_fake("xmoe::grouped_mm_backward", lib=LIBRARY)
def _(
    dOut: Tensor,
    A_saved: Sequence[Tensor],
    B: Tensor,
    offs: Tensor,
    config_key: str,
    A_dtype: torch.dtype,
    need_dA: bool,
    need_dB: bool,
    prepared: Sequence[Tensor] | None = None,
    b_amax: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dA_shape = (dOut.shape[0], B.shape[1]) if need_dA else (0,)
    return dOut.new_empty(dA_shape, dtype=A_dtype), _empty_dB(B) if need_dB else B.new_empty(0)


# ---------------------------------------------------------------------------------------------------------- autograd


_forward_op = torch.ops.xmoe.grouped_mm_forward.default
_backward_op = torch.ops.xmoe.grouped_mm_backward.default


def backward(*args: Any) -> tuple[Tensor, Tensor]:
    """`grouped_mm_backward`, inside an autograd function."""
    return direct(_backward_op, grouped_mm_backward, *args)


def _save(ctx: Any, A: Tensor, B: Tensor, offs: Tensor, config_key: str, prepared: Any, made: Sequence[Tensor]) -> None:
    """What the backward needs, of the inputs (`prepared` along N) and of what the forward made beside ``out``."""
    a_tokens, a_tokens_scale, b_amax = made
    ctx.set_materialize_grads(False)
    ctx.config_key, ctx.A_dtype = config_key, A.dtype
    A_saved = ()
    if ctx.needs_input_grad[1]:
        A_saved = (A,) if pipeline.saves_input(config_from_key(config_key)) else (a_tokens, a_tokens_scale)
    # Not saved tensors, whose number and shapes must not depend on a cache. B is saved, and autograd checks that
    # nothing has changed it since.
    ctx.prepared, ctx.b_amax = tuple(prepared or ()), b_amax if b_amax.numel() else None
    ctx.save_for_backward(B, offs, *A_saved)


class _GroupedMM(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        B: Tensor,
        offs: Tensor,
        config_key: str,
        save_tokens: bool,
        prepared: Sequence[Tensor] | None,
        prepared_dgrad: Sequence[Tensor] | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        args = A, B, offs, config_key, save_tokens, prepared, None, ctx.needs_input_grad[0]
        results = direct(_forward_op, grouped_mm_forward, *args)
        ctx.mark_non_differentiable(*results[1:])
        _save(ctx, A, B, offs, config_key, prepared_dgrad, results[1:])
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        dOut = gradients[0]
        need_dA, need_dB = ctx.needs_input_grad[:2]
        if dOut is None or not (need_dA or need_dB):
            return (None,) * 7
        B, offs, *A_saved = ctx.saved_tensors
        dA, dB = backward(
            dOut, A_saved, B, offs, ctx.config_key, ctx.A_dtype, need_dA, need_dB, ctx.prepared, ctx.b_amax
        )
        return dA if need_dA else None, dB if need_dB else None, None, None, None, None, None


class _GroupedMMBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, A_saved: Sequence[Tensor], rest: tuple[Any, ...], dOut: Tensor, B: Tensor) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _backward_op(dOut, A_saved, B, *rest)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError("xmoe::grouped_mm_backward has no derivative; drop create_graph=True")


@torch.library.impl(LIBRARY, "grouped_mm_forward", "Autograd")
@torch._disable_dynamo
def grouped_mm_with_autograd(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    config_key: str,
    save_tokens: bool,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
    save_amax: bool = False,
    a_operand: Sequence[Tensor] | None = None,
    b_operand: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        assert not [*(a_operand or ()), *(b_operand or ())], "quantized operands have an autograd function of their own"
        return _GroupedMM.apply(A, B, offs, config_key, save_tokens, prepared, prepared_dgrad)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(A, B, offs, config_key, save_tokens, prepared, None, save_amax, a_operand, b_operand)


class _UnseenGroupedMM(_GroupedMM):
    """Of `unseen` calls: nobody asks for more than ``out``."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, B: Tensor, offs: Tensor, config_key: str, *rest: Any) -> Any:
        save_tokens, prepared, prepared_dgrad = rest
        out, *made = grouped_mm_forward(A, B, offs, config_key, save_tokens, prepared, None, ctx.needs_input_grad[0])
        _save(ctx, A, B, offs, config_key, prepared_dgrad, made)
        return out


_apply: Callable[..., Any] = super(torch.autograd.Function, _UnseenGroupedMM).apply  # type: ignore[misc]
"""`_UnseenGroupedMM.apply`, which is a call of this and 2 us of finding out that it needs no more."""


@torch._disable_dynamo
def unseen_grouped_mm(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    config_key: str,
    save_tokens: bool,
    prepared: Sequence[Tensor] | None = None,
    prepared_dgrad: Sequence[Tensor] | None = None,
) -> Tensor:
    """The ``out`` of ``xmoe::grouped_mm_forward``, for a call that is `unseen`."""
    A, B, offs = (
        unwrap_if_dead(A),
        unwrap_if_dead(B),
        unwrap_if_dead(offs),
    )  # if a transform of torch.func has left them behind
    if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
        return _apply(A, B, offs, config_key, save_tokens, prepared, prepared_dgrad)
    return grouped_mm_forward(A, B, offs, config_key, save_tokens, prepared)[0]


@torch.library.impl(LIBRARY, "grouped_mm_backward", "Autograd")
@torch._disable_dynamo
def _(dOut: Tensor, A_saved: Sequence[Tensor], B: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and (dOut.requires_grad or B.requires_grad):
        return _GroupedMMBackward.apply(A_saved, rest, dOut, B)
    with torch._C._AutoDispatchBelowAutograd():
        return _backward_op(dOut, A_saved, B, *rest)
