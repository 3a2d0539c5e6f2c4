"""Differentiable grouped GEMMs in low precision: drop-ins for ``torch._grouped_mm(A, B_t, offs)``."""

import dataclasses
from enum import StrEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xmoe.config import (
    FP8GroupedMMConfig,
    GroupedMMConfig,
    KernelPreference,
    MXFP8GroupedMMConfig,
    ScaleCalculationMode,
    as_config,
    config_from_key,
)
from xmoe.kernels import pipeline
from xmoe.operands import FEATURE_MULTIPLE, QuantizedOperand
from xmoe.torch_backend import ops
from xmoe.torch_backend.calls import unseen
from xmoe.torch_backend.checks import refuse_transforms
from xmoe.torch_backend.operand_gemm import grouped_mm_of_operands
from xmoe.torch_backend.operands import Operand
from xmoe.torch_backend.weight_cache import cached


def scaled_grouped_mm(
    A: Tensor | Operand,
    B_t: Tensor | Operand,
    offs: Tensor,
    config: GroupedMMConfig | StrEnum | str | None = None,
) -> Tensor:
    """out[M, N] = A_g @ B_t[g] for the rows of each group g, and its gradients, in the precision of `config`.

    Without a config that is bfloat16: fp32 inputs are rounded to bf16 before every GEMM.

    Args:
        A: bf16 or fp32 [M, K]. Group g owns the rows ``offs[g-1]:offs[g]``. Or a `QuantizedOperand` of [M, K]
            (`quantize_activations`): the forward multiplies its bytes. It gets no gradient; for that of B_t its values,
            in bf16, are quantized along the tokens.
        B_t: bf16 or fp32 [G, K, N], any strides; for weights stored [G, N, K] give ``weight.transpose(-2, -1)``. K and
            N that are not multiples of 16 cost a zero-padded copy of A, of B_t and of the output. Or a
            `QuantizedOperand` of [G, N, K] (`quantize_weights`), which gets no gradient; for that of A its values, in
            bf16, are quantized along N in the backward.
        offs: int32 [G], the end row of each group. Groups may be empty and need no alignment; rows past the last one
            come out as zeros. Offsets stay on the device: bad ones raise under ``config.debug`` only.
        config: what to quantize: a config, or a recipe (enum member or name); None is the bf16 baseline.

    Returns:
        [M, N] in ``config.out_dtype``, or in the dtype of A; bf16 where that is quantized.

    Raises:
        ValueError: a shape, dtype or device that does not fit; no tensor where one is needed; a config that the device
            cannot run under its kernel preference.
    """
    for name, x in (("A", A), ("B_t", B_t), ("offs", offs)):
        if not isinstance(x, Tensor) and not (isinstance(x, QuantizedOperand) and name != "offs"):
            form = ": int32 [G], the end row of each group" if name == "offs" else ""
            raise ValueError(f"{name} is {'None' if x is None else type(x).__name__}; give a torch.Tensor{form}")
    if isinstance(A, QuantizedOperand) or isinstance(B_t, QuantizedOperand):
        return grouped_mm_of_operands(A, B_t, offs, as_config(config))
    return grouped_mm_by_key(A, B_t, offs, as_config(config).to_key())


def grouped_mm_by_key(A: Tensor, B_t: Tensor, offs: Tensor, config_key: str) -> Tensor:
    """`scaled_grouped_mm` with the config as its key, the form that the ops carry."""
    if B_t.ndim == 3 and (B_t.shape[1] % FEATURE_MULTIPLE or B_t.shape[2] % FEATURE_MULTIPLE):
        return _padded(A, B_t, offs, config_key)
    save_tokens = B_t.requires_grad and torch.is_grad_enabled()
    prepared = cached(lambda: prepare(A, B_t, offs, config_key), (config_key, A.dtype), B_t) or ()
    if unseen(A, B_t, offs):
        return ops.unseen_grouped_mm(A, B_t, offs, config_key, save_tokens, *prepared)
    refuse_transforms(A, B_t)
    return torch.ops.xmoe.grouped_mm_forward.default(A, B_t, offs, config_key, save_tokens, *prepared)[0]


def _padded(A: Tensor, B_t: Tensor, offs: Tensor, config_key: str) -> Tensor:
    """`grouped_mm_by_key` of any K and N. Zeros change no scale and no sum."""
    _, K, N = B_t.shape
    devices = (A.device, B_t.device, offs.device)
    ops.check_signature(A.shape, A.dtype, B_t.shape, B_t.dtype, offs.shape, offs.dtype, devices, multiple=1)
    more_k, more_n = -K % FEATURE_MULTIPLE, -N % FEATURE_MULTIPLE
    pad = torch.constant_pad_nd  # F.pad cannot be traced with a wrapper
    A = pad(A, (0, more_k))
    B_t = pad(B_t.mT, (0, more_k, 0, more_n)).mT if ops.k_is_contiguous(B_t) else pad(B_t, (0, more_n, 0, more_k))
    return grouped_mm_by_key(A, B_t, offs, config_key)[:, :N].contiguous()


def prepare(A: Tensor, B_t: Tensor, offs: Tensor, config_key: str) -> tuple[list[Tensor], list[Tensor]]:
    """B_t quantized along K and along N; nothing in the bf16 format."""
    devices = (A.device, B_t.device, offs.device)
    ops.check_signature(A.shape, A.dtype, B_t.shape, B_t.dtype, offs.shape, offs.dtype, devices)
    config = config_from_key(config_key)
    if config.format == "bf16":
        return [], []
    view = pipeline.device_of(B_t.device.type, B_t.device.index)
    G, K, N = B_t.shape
    problem = pipeline.Problem(0, N, K, G, ops.DTYPES[A.dtype], ops.DTYPES[B_t.dtype])
    along_k, along_n = pipeline.prepare_both(problem, config, view, ops.aligned(B_t))
    return ops.pack(along_k), ops.pack(along_n)


def to_fp8_rowwise_then_scaled_grouped_mm(
    A: Tensor | Operand,
    B_t: Tensor | Operand,
    offs: Tensor,
    out_dtype: torch.dtype | None = None,
    *,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
    wgrad_with_hp: bool = False,
) -> Tensor:
    """`scaled_grouped_mm` under ``FP8GroupedMMConfig`` with these fields; `out_dtype` None is the dtype of A."""
    config = _config(
        FP8GroupedMMConfig, out_dtype=out_dtype, kernel_preference=kernel_preference, wgrad_with_hp=wgrad_with_hp
    )
    return scaled_grouped_mm(A, B_t, offs, config)


def to_mxfp8_then_scaled_grouped_mm(
    A: Tensor | Operand,
    B_t: Tensor | Operand,
    offs: Tensor,
    out_dtype: torch.dtype | None = None,
    kernel_preference: KernelPreference | str = KernelPreference.AUTO,
    wgrad_with_hp: bool = False,
    scale_calculation_mode: ScaleCalculationMode | str = ScaleCalculationMode.RCEIL,
) -> Tensor:
    """`scaled_grouped_mm` under ``MXFP8GroupedMMConfig`` with these fields; `out_dtype` None is the dtype of A."""
    config = _config(
        MXFP8GroupedMMConfig,
        out_dtype=out_dtype,
        kernel_preference=kernel_preference,
        wgrad_with_hp=wgrad_with_hp,
        scale_calculation_mode=scale_calculation_mode,
    )
    return scaled_grouped_mm(A, B_t, offs, config)


_to_fp8_rowwise_then_scaled_grouped_mm = to_fp8_rowwise_then_scaled_grouped_mm
_to_mxfp8_then_scaled_grouped_mm = to_mxfp8_then_scaled_grouped_mm


@lru_cache(maxsize=1024)
def _config(cls: type[GroupedMMConfig], **fields: Any) -> GroupedMMConfig:
    return cls(**fields)


@lru_cache(maxsize=1024)
def key_with_out_dtype(config_key: str, out_dtype: torch.dtype) -> str:
    """The key of the same config with another output dtype."""
    neutral: Any = out_dtype  # the config holds its name
    return dataclasses.replace(config_from_key(config_key), out_dtype=neutral).to_key()
