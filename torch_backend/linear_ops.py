"""The custom op ``xmoe::linear``, its fake and its autograd: the three GEMMs of a linear layer.

M = rows of the input, K = in_features, N = out_features, Mp = M rounded up to 16.

A tensorwise linear is PyTorch's operations around one op, the cast: a compiler sees the maxima and fuses them with what
made the tensor. Everything else is the grouped GEMM of one group.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from xmoe.config import Accumulation, Element, Float8LinearConfig, Gemm, LinearConfig, config_from_key
from xmoe.kernels import tensorwise
from xmoe.operands import FEATURE_MULTIPLE
from xmoe.torch_backend import ops
from xmoe.torch_backend.calls import differentiable_once, direct, unseen
from xmoe.torch_backend.checks import DTYPES
from xmoe.torch_backend.grouped_gemm import prepare
from xmoe.torch_backend.ops import LIBRARY

LIBRARY.define(
    "linear(Tensor x, Tensor weight, str config_key, Tensor[]? prepared=None, Tensor[]? prepared_dgrad=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
LIBRARY.define(
    "cast_tensor(Tensor x, Tensor maxima, bool e5m2, bool rows, bool columns, bool emulated) "
    "-> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
Prepared = Sequence[Tensor] | None


# ------------------------------------------------------------------------------------------------------------- checks


def check_linear(
    x_shape: Sequence[int],
    x_dtype: torch.dtype,
    weight_shape: Sequence[int],
    weight_dtype: torch.dtype,
    devices: tuple[torch.device, torch.device],
) -> None:
    """Raises ValueError, naming the argument, its value and the fix, unless x [M, K] and weight [N, K] fit."""
    for name, dtype in (("input", x_dtype), ("weight", weight_dtype)):
        if dtype not in DTYPES:
            raise ValueError(f"{name} is {dtype}; cast it to torch.bfloat16 or torch.float32")
    (N, K), given = weight_shape, x_shape[-1]
    if given != K:
        raise ValueError(f"input has {given} columns and weight has in_features={K}, shape {tuple(weight_shape)}")
    for name, size in (("in_features", K), ("out_features", N)):
        if problem := misfit(name, size):
            raise ValueError(f"{problem}, or use pad_inner_dim=True")
    if devices[0] != devices[1]:
        raise ValueError(f"input and weight are on {devices[0]} and {devices[1]}; move them to one device")


def misfit(name: str, size: int) -> str:
    """What is wrong with a dimension of the weight, and the nearest good ones; "" where nothing is."""
    below = size // FEATURE_MULTIPLE * FEATURE_MULTIPLE
    if size == below > 0:
        return ""
    nearest = f"{below} or {below + FEATURE_MULTIPLE}" if below else str(FEATURE_MULTIPLE)
    return f"{name}={size} is not a positive multiple of {FEATURE_MULTIPLE}: use {nearest}"


_check_once = lru_cache(maxsize=4096)(check_linear)


def _check(x: Tensor, weight: Tensor) -> None:
    check = _check_once if unseen(x, weight) else check_linear  # sizes that are symbols have no hash
    check(x.shape, x.dtype, weight.shape, weight.dtype, (x.device, weight.device))


# --------------------------------------------------------------------------------------------------------------- cast


@torch.library.impl(LIBRARY, "cast_tensor", "CompositeExplicitAutograd")
@torch._disable_dynamo
def cast_tensor(
    x: Tensor, maxima: Tensor, e5m2: bool, rows: bool, columns: bool, emulated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`xmoe.kernels.tensorwise.cast`."""
    return tensorwise.cast(x, maxima, e5m2, rows, columns, emulated=emulated)


@torch.library.register_fake("xmoe::cast_tensor", lib=LIBRARY)
def _(
    x: Tensor, maxima: Tensor, e5m2: bool, rows: bool, columns: bool, emulated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (R, C), dtype = x.shape, tensorwise.dtype_of(e5m2)
    return (
        x.new_empty((R, C) if rows else 0, dtype=dtype),
        x.new_empty((C, tensorwise.padded_rows(R)) if columns else 0, dtype=dtype),
        x.new_empty((), dtype=torch.float32),
    )


_cast_op = torch.ops.xmoe.cast_tensor.default


def _maxima(x: Tensor) -> Tensor:
    return tensorwise.find_maxima(x, plain=not unseen(x))


# ------------------------------------------------------------------------------------------------------------ schemes


class Forward(NamedTuple):
    """What a scheme's forward gives."""

    out: Tensor
    """[M, N] in the dtype of x."""
    saved: tuple[Tensor, ...] = ()
    """For the backward, beside the weight; as many whatever is cached."""
    maxima: Tensor | None = None
    """Of the weight, where they were found."""


class Scheme(Protocol):
    """How a config's GEMMs are computed. `prepared`: the weight quantized along K (or N), or nothing."""

    def forward(self, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, prepared: Prepared) -> Forward: ...

    def backward(
        self,
        dOut: Tensor,
        weight: Tensor,
        found: Forward,
        x_dtype: torch.dtype,
        need_dx: bool,
        need_dw: bool,
        prepared: Prepared,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(dx [M, K], dw [N, K]); of `found` all but ``out``."""
        ...

    def prepare(self, x: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The weight quantized along K and along N, for inputs like x."""
        ...


class Grouped:
    """As grouped GEMMs of one group, whose weights are the linear's, transposed: [1, K, N]."""

    def __init__(self, config: LinearConfig) -> None:
        grouped = [config.grouped(gemm) for gemm in Gemm]
        self.keys = [None if each is None else each.to_key() for each in grouped]

    def forward(self, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, prepared: Prepared) -> Forward:
        offs = one_group(x)
        args = x, as_group(weight), offs, self.keys[0], need_dw, prepared, None, need_dx
        out, a, a_scale, maxima = direct(ops._forward_op, ops.grouped_mm_forward, *args)
        saves_input = need_dw and ops.pipeline.saves_input(config_from_key(self.keys[2]))
        saved = () if not need_dw else (x,) if saves_input else (a, a_scale)
        return Forward(out, (offs, *saved), maxima if maxima.numel() else None)

    def backward(
        self,
        dOut: Tensor,
        weight: Tensor,
        found: Forward,
        x_dtype: torch.dtype,
        need_dx: bool,
        need_dw: bool,
        prepared: Prepared,
    ) -> tuple[Tensor | None, Tensor | None]:
        offs, *a = found.saved
        B, (_, dgrad, wgrad) = as_group(weight), self.keys

        def gradients(key: str | None, need_dx: bool, need_dw: bool) -> tuple[Tensor, Tensor]:
            return ops.backward(dOut, a, B, offs, key, x_dtype, need_dx, need_dw, prepared or (), found.maxima)

        if dgrad == wgrad or not (need_dx and need_dw):
            dx, dB = gradients(dgrad if need_dx else wgrad, need_dx, need_dw)
        else:
            dx, dB = gradients(dgrad, True, False)[0], gradients(wgrad, False, True)[1]
        return dx if need_dx else None, dB[0].mT if need_dw else None

    def prepare(self, x: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        assert self.keys[0] is not None, "a grouped scheme has the configs of all GEMMs"
        return prepare(x, as_group(weight), one_group(x), self.keys[0])


class Tensorwise:
    """One scale for each operand; GEMMs by ``torch._scaled_mm``, or emulated."""

    def __init__(self, config: Float8LinearConfig) -> None:
        self.preference = config.kernel_preference
        self.e5m2 = config.grad_dtype is Element.E5M2
        self.fast = [getattr(config, f"accumulation_{gemm}") is Accumulation.FAST for gemm in Gemm]
        hp = config.grouped(Gemm.GRAD_WEIGHT)
        self.hp_key = None if hp is None else hp.to_key()
        """Of the weight gradient's GEMM, if that is in bf16."""

    def forward(
        self, x: Tensor, weight: Tensor, need_dx: bool, need_dw: bool, prepared: Prepared, given: Prepared = None
    ) -> Forward:
        """`given`: x quantized along K, for a forward without a weight gradient; of x only its dtype counts then."""
        emulated, columns = self._emulated(x.device), need_dw and self.hp_key is None
        if x.shape[0] == 0:
            return Forward(x.new_zeros(0, weight.shape[0]), (x, x)[: self._saves(need_dw)])
        if given:
            a, a_scale = given
            a_columns = a
        else:
            x = x.contiguous()
            a, a_columns, a_scale = _cast(x, _maxima(x), False, True, columns, emulated)
        maxima = None
        if prepared:
            b, b_scale = prepared
        else:
            weight = weight.contiguous()
            maxima = _maxima(weight)
            b, _, b_scale = _cast(weight, maxima, False, True, False, emulated)
        out = tensorwise.scaled_mm(a, a_scale, b, b_scale, x.dtype, fast=self.fast[0], emulated=emulated)
        return Forward(out, ((a_columns, a_scale) if columns else (x,) if need_dw else ()), maxima)

    def backward(
        self,
        dOut: Tensor,
        weight: Tensor,
        found: Forward,
        x_dtype: torch.dtype,
        need_dx: bool,
        need_dw: bool,
        prepared: Prepared,
    ) -> tuple[Tensor | None, Tensor | None]:
        emulated, (N, K), M = self._emulated(dOut.device), weight.shape, dOut.shape[0]
        dx = dw = None
        if M == 0:
            zeros = dOut.new_zeros(0, K, dtype=x_dtype) if need_dx else None
            return zeros, weight.new_zeros(N, K) if need_dw else None
        columns = need_dw and self.hp_key is None
        dOut = dOut.contiguous()
        if need_dx or columns:
            d, d_columns, d_scale = _cast(dOut, _maxima(dOut), self.e5m2, need_dx, columns, emulated)
            if need_dx:
                b, b_scale = prepared or _columns(weight, found.maxima, emulated)
                dx = tensorwise.scaled_mm(d, d_scale, b, b_scale, x_dtype, fast=self.fast[1], emulated=emulated)
            if columns:
                a, a_scale = found.saved
                dw = tensorwise.scaled_mm(
                    d_columns, d_scale, a, a_scale, weight.dtype, fast=self.fast[2], emulated=emulated
                )
        if need_dw and not columns:
            args = as_group(weight), one_group(dOut), self.hp_key, x_dtype, False, True
            dw = ops.backward(dOut, found.saved, *args)[1][0].mT
        return dx, dw

    def prepare(self, x: Tensor, weight: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        weight = weight.contiguous()
        data, columns, scale = _cast(weight, _maxima(weight), False, True, True, self._emulated(weight.device))
        return [data, scale], [columns, scale]

    def _saves(self, need_dw: bool) -> int:
        return 0 if not need_dw else 2 if self.hp_key is None else 1

    def _emulated(self, device: torch.device) -> bool:
        if device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available()):
            return tensorwise.emulated_on(self.preference, device)
        return True  # what is said to be elsewhere


def _cast(
    x: Tensor, maxima: Tensor, e5m2: bool, rows: bool, columns: bool, emulated: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return direct(_cast_op, cast_tensor, x, maxima, e5m2, rows, columns, emulated)


def _columns(weight: Tensor, maxima: Tensor | None, emulated: bool) -> tuple[Tensor, Tensor]:
    """weight [N, K] quantized along N: [K, N] and its scale."""
    weight = weight.contiguous()
    maxima = _maxima(weight) if maxima is None else maxima
    _, columns, scale = _cast(weight, maxima, False, False, True, emulated)
    return columns, scale


def as_group(weight: Tensor) -> Tensor:
    """[N, K] as [1, K, N]."""
    return weight.mT.unsqueeze(0)


@lru_cache(maxsize=256)
def _one_group(M: int, device: torch.device, stream: int) -> Tensor:
    """Of one stream: another might read it before it is written."""
    with torch.inference_mode(False):
        return torch.full((1,), M, dtype=torch.int32, device=device)


def one_group(x: Tensor) -> Tensor:
    """offs int32 [1] of one group with all rows of x; kept, where nothing could hold it against its will."""
    if not unseen(x) or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return torch.full((1,), x.shape[0], dtype=torch.int32, device=x.device)
    return _one_group(x.shape[0], x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)


@lru_cache
def scheme(config_key: str) -> Scheme:
    """Of the config with this key."""
    config = config_from_key(config_key)
    if isinstance(config, Float8LinearConfig) and config.format == "fp8_tensorwise":
        return Tensorwise(config)
    return Grouped(config)


# ----------------------------------------------------------------------------------------------------------- autograd


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, config_key: str, prepared: Prepared, prepared_dgrad: Prepared
    ) -> Tensor:
        need_dx, need_dw, *_ = ctx.needs_input_grad
        found = scheme(config_key).forward(x, weight, need_dx, need_dw, prepared)
        ctx.set_materialize_grads(False)
        ctx.config_key, ctx.x_dtype = config_key, x.dtype
        # Not saved tensors, whose number must not depend on a cache. The weight is one, and autograd checks that
        # nothing has changed it since.
        ctx.prepared, ctx.maxima = tuple(prepared_dgrad or ()), found.maxima
        ctx.save_for_backward(weight, *found.saved)
        return found.out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        (dOut,), (need_dx, need_dw, *_) = gradients, ctx.needs_input_grad
        if dOut is None or not (need_dx or need_dw):
            return (None,) * 5
        weight, *saved = ctx.saved_tensors
        found = Forward(dOut, tuple(saved), ctx.maxima)
        backward = scheme(ctx.config_key).backward
        dx, dw = differentiable_once(
            "xmoe::linear", lambda: backward(dOut, weight, found, ctx.x_dtype, need_dx, need_dw, ctx.prepared)
        )
        return dx, dw, None, None, None


@torch.library.impl(LIBRARY, "linear", "Autograd")
@torch._disable_dynamo
def linear_with_autograd(
    x: Tensor, weight: Tensor, config_key: str, prepared: Prepared = None, prepared_dgrad: Prepared = None
) -> Tensor:
    """out [M, N] = x @ weight^T, in the dtype of x.

    Args:
        x: bf16 or fp32 [M, K].
        weight: bf16 or fp32 [N, K].
        config_key: ``LinearConfig.to_key()``.
        prepared, prepared_dgrad: weight quantized along K and along N (`Scheme.prepare`), or nothing.
    """
    _check(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, config_key, prepared, prepared_dgrad)
    return scheme(config_key).forward(x, weight, False, False, prepared).out


@torch.library.impl(LIBRARY, "linear", "CompositeExplicitAutograd")
@torch._disable_dynamo
def _(x: Tensor, weight: Tensor, config_key: str, prepared: Prepared = None, prepared_dgrad: Prepared = None) -> Tensor:
    _check(x, weight)
    return scheme(config_key).forward(x, weight, False, False, prepared).out


@torch.library.register_fake("xmoe::linear", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, config_key: str, prepared: Prepared = None, prepared_dgrad: Prepared = None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch._disable_dynamo
def unseen_linear(x: Tensor, weight: Tensor, config_key: str, *prepared: Prepared) -> Tensor:
    """``xmoe::linear``, for a call that is `unseen`."""
    x, weight = unwrap_if_dead(x), unwrap_if_dead(weight)  # if a transform of torch.func has left them behind
    return linear_with_autograd(x, weight, config_key, *prepared)
