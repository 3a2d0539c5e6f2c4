"""Forward and backward of one grouped GEMM: what every frontend calls.

A frontend asks for a spec (the shapes and dtypes of outputs and scratch, from static shapes and the config), allocates
by it, and hands the tensors in by name. On a GPU nothing here allocates, synchronises or reads the environment, except
where the dispatch table names torch's or the emulated GEMM, which allocate.

M tokens, K contraction of the forward, N output features, G groups, Mp padded tokens (`xmoe.operands`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation
from xmoe.kernels.call import Call, on_device, programs, quantize_weights
from xmoe.kernels.dispatch import Device, select
from xmoe.kernels.replay import replayed
from xmoe.kernels.specs import (
    HAS_TRITON,
    Arena,
    Layout,
    Prepared,
    Problem,
    Spec,
    Tensors,
    TensorSpec,
    allocate,
    backward_spec,
    device_of,
    finds_maxima,
    forward_outputs,
    forward_spec,
    saved_spec,
    saves_input,
    weights_spec,
    with_maps,
)
from xmoe.operands import QuantizedOperand

__all__ = [
    "HAS_TRITON", "Arena", "Layout", "Problem", "Spec", "TensorSpec", "Tensors", "allocate", "backward",
    "backward_spec", "device_of", "forward", "forward_outputs", "forward_spec", "save", "saved_spec", "saves_input",
    "warm_up", "warm_up_save",
]  # fmt: skip


def forward(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    A: torch.Tensor,
    B: torch.Tensor | Prepared,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
    rows: Prepared | None = None,
    exact: bool = False,
) -> None:
    """Write the outputs of `forward_spec`.

    Args:
        A: bf16 or fp32 [M, K].
        B: bf16 or fp32 [G, K, N], any strides that leave K or N contiguous; or `prepare_weights` of it along K.
        offs: int32 [G], cumulative group ends; any values (docs/design.md).
        outputs, scratch: by the names of `forward_spec`, contiguous; ``a_tokens`` and, of B with K contiguous,
            ``b_amax`` are written where they are given.
        rows: of A, where it comes quantized (`xmoe.kernels.operands.as_rows`); A is then read for ``a_tokens`` alone.
        exact: A is data * scale of an MX operand, and its rows are to keep these values.
    """
    if select(config, device).gemm == "emulated":
        emulated_forward(config, A, B, offs, outputs, rows)
        return

    def run() -> None:
        call = Call(problem, config, device, offs, scratch)
        call.prepare(A.shape[0], outputs, scratch)
        if rows is None and not exact:
            a = call.rows_and_tokens("a", A, outputs)[0] if "a_tokens" in outputs else call.rows("a", A)
        else:
            a = call.rows("a", A, exact=True) if rows is None else rows
            if "a_tokens" in outputs:
                call.tokens("a_tokens", A, outputs)
        b = B if isinstance(B, Prepared) else B.mT
        call.grouped_mm(a, b, outputs["out"], columns=outputs.get("b_amax"))

    with on_device(offs):
        replayed(("forward", problem, config, device, exact), (A, B, offs, rows), (outputs, scratch), run)


def save(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    A: torch.Tensor,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Write the outputs of `saved_spec`: what `forward` saves of A, where only a wgrad is wanted.

    Args:
        A, offs: as in `forward`.
        outputs, scratch: by the names of `saved_spec`, contiguous. Without outputs nothing happens.
    """
    if not outputs:
        return
    if select(config, device).gemm == "emulated":
        _emulated_save(config, A, offs, outputs)
        return

    def run() -> None:
        call = Call(problem, config, device, offs, scratch)
        call.prepare(A.shape[0], outputs, scratch)
        call.tokens("a_tokens", A, outputs)

    with on_device(offs):
        replayed(("save", problem, config, device), (A, offs), (outputs, scratch), run)


def backward(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    dOut: torch.Tensor,
    A_saved: tuple[torch.Tensor, ...],
    B: torch.Tensor | Prepared | None,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
    b_amax: torch.Tensor | None = None,
) -> None:
    """Write the outputs of `backward_spec`, those that `outputs` names.

    Args:
        dOut: bf16 or fp32 [M, N].
        A_saved: (A,) if `saves_input(config)`, else (a_tokens, a_tokens_scale); unused, and may be (), without ``dB``.
        B: as in `forward`; prepared along N; unused, and may be None, without ``dA``.
        offs: as in `forward`.
        outputs: ``dA`` contiguous; ``dB`` [G, K, N] contiguous, or the transposed view of a contiguous [G, N, K].
        b_amax: the forward's, of the same B, if it gave one.
    """
    if select(config, device).gemm == "emulated":
        _emulated_backward(config, dOut, A_saved, B, offs, outputs)
        return

    def run() -> None:
        own, (M, N) = scratch, dOut.shape
        if "dA" in outputs and "d_tokens" in scratch:  # the rows lie where the tokens will
            own = {**scratch, "d": scratch["d_tokens"].flatten()[: M * N].view(M, N)}
        call = Call(problem, config, device, offs, own)
        call.prepare(M, scratch)
        amax, amax_is_known = own.get("d_tokens_amax"), False
        if "dA" in outputs:
            assert B is not None, "dA needs B"
            rows, amax_is_known = call.rows_and_amax("d", dOut, amax)
            call.grouped_mm(rows, B, outputs["dA"], amax=b_amax)
        if "dB" not in outputs:
            return
        if saves_input(config):
            call.wgrad_hp(A_saved[0], dOut, outputs["dB"])
        else:
            a, a_scale = A_saved
            d_tokens = call.tokens("d_tokens", dOut, own, amax, amax_is_known)
            call.wgrad(call.saved_tokens((a, a_scale)), d_tokens, outputs["dB"])

    with on_device(offs):
        replayed(("backward", problem, config, device), (dOut, A_saved, B, b_amax, offs), (outputs, scratch), run)


def emulated_forward(
    config: GroupedMMConfig, A, B, offs: torch.Tensor, outputs: Tensors, rows: Prepared | None = None
) -> None:
    out = outputs["out"]
    if config.format == "bf16":
        emulation.grouped_mm_bf16(A, B, offs, out=out)
        return
    if rows is None:
        a = emulation.quantize_rows(A, config.format, axis="K")
    else:
        assert rows.scale is not None, "an emulated operand has scales"
        a = QuantizedOperand(rows.data, rows.scale, "K", config.format)
    emulation.grouped_mm(a, _emulated_weights(B, "K", config.format), offs, out=out)
    if "a_tokens" in outputs:
        _emulated_save(config, A, offs, outputs)


def _emulated_save(config: GroupedMMConfig, A: torch.Tensor, offs: torch.Tensor, outputs: Tensors) -> None:
    tokens = emulation.quantize_tokens(A, offs, config.format)
    _copy_bytes(outputs["a_tokens"], tokens.data)
    _copy_bytes(outputs["a_tokens_scale"], tokens.scale)


def _emulated_backward(config: GroupedMMConfig, dOut, A_saved, B, offs: torch.Tensor, outputs: Tensors) -> None:
    fmt, ends = config.format, offs.clamp(0, dOut.shape[0])
    if "dA" in outputs:
        if fmt == "bf16":
            emulation.grouped_mm_bf16(dOut, B.mT, offs, out=outputs["dA"])
        else:
            d = emulation.quantize_rows(dOut, fmt, axis="N")
            emulation.grouped_mm(d, _emulated_weights(B, "N", fmt), offs, out=outputs["dA"])
    if "dB" in outputs:
        if saves_input(config):
            emulation.grouped_mm_tokens_bf16(A_saved[0], dOut, offs, out=outputs["dB"])
        else:
            data, scale = A_saved
            a = QuantizedOperand(data, scale, "tokens", fmt)
            emulation.grouped_mm_tokens(a, emulation.quantize_tokens(dOut, offs, fmt), ends, out=outputs["dB"])


def _emulated_weights(B: torch.Tensor | Prepared, axis: str, format: str) -> emulation.Operand:
    if not isinstance(B, Prepared):
        return emulation.quantize_weights(B, axis, format)
    assert B.scale is not None, "an emulated operand has scales"
    return QuantizedOperand(B.data, B.scale, axis, format)


def prepare_weights(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    b: torch.Tensor | Sequence[torch.Tensor],
    amax: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Prepared:
    """Quantize b [G, P, C] (or several, side by side) along C into new memory, for any number of calls.

    Not for the bf16 format, which multiplies weights as they are. Of `problem` only the dtypes matter. `amax`,
    `columns`: as in `xmoe.kernels.call.quantize_weights`.
    """
    impl, parts = select(config, device), [b] if isinstance(b, torch.Tensor) else b
    (G, P, _), C = parts[0].shape, sum(part.shape[2] for part in parts)
    if impl.gemm == "emulated":
        operand = emulation.quantize_weights(torch.cat(list(parts), 2), "N", config.format)
        return Prepared(operand.data, operand.scale)
    tensors = allocate(weights_spec(P, C, replace(problem, G=G), config, impl), parts[0].device)
    if "b_amax" in tensors:
        tensors["b_amax"].zero_()
    with on_device(parts[0]):
        return quantize_weights(parts, config, tensors, programs(parts[0].device.index), amax, columns)


def prepare_both(
    problem: Problem, config: GroupedMMConfig, device: Device, B: torch.Tensor
) -> tuple[Prepared, Prepared]:
    """`prepare_weights` of B [G, K, N] along K and along N."""
    rows = B if B.stride(2) == 1 else B.mT
    columns = no_maxima(config, device, rows)
    of_rows = prepare_weights(problem, config, device, rows, columns=columns)
    of_columns = prepare_weights(problem, config, device, rows.mT, amax=columns)
    return (of_columns, of_rows) if rows is B else (of_rows, of_columns)


def no_maxima(config: GroupedMMConfig, device: Device, rows: torch.Tensor) -> torch.Tensor | None:
    """Zeros [G, C], to receive the maxima of the columns of weights [G, P, C], where quantizing these finds them."""
    G, _, C = rows.shape
    finds = finds_maxima(config, select(config, device), C)
    return torch.zeros(G, C, dtype=torch.int32, device=rows.device) if finds else None


def _copy_bytes(out: torch.Tensor, x: torch.Tensor) -> None:
    """copy_ without an fp8 cast kernel in between."""
    byte = torch.uint8 if x.element_size() == 1 else x.dtype
    out.view(byte).copy_(x.view(byte))


# -------------------------------------------------------------------------------------------------------------- set-up


@lru_cache(maxsize=4096)
def warm_up(problem: Problem, config: GroupedMMConfig, device: torch.device) -> None:
    """Compile and load every kernel that `problem` will launch, forward and backward, for either gradient or both and
    weights stored [G, K, N] or [G, N, K], so that a first launch may be recorded into a CUDA graph. Runs the calls on
    16 tokens of one expert; does nothing off CUDA."""
    if device.type != "cuda":
        return
    view = device_of(device.type, device.index)
    if select(config, view).gemm == "emulated":
        return
    M = 16
    small = replace(problem, M=M, G=1)

    A = torch.zeros(M, problem.K, dtype=getattr(torch, problem.a_dtype), device=device)
    B = torch.zeros(1, problem.K, problem.N, dtype=getattr(torch, problem.b_dtype), device=device)
    dOut = torch.zeros(M, problem.N, dtype=getattr(torch, problem.out_dtype), device=device)
    offs = torch.full((1,), M, dtype=torch.int32, device=device)
    for b in (B, B.mT.contiguous().mT):
        saved = (A,)
        for save_tokens in (False, True):
            flags = {"save_tokens": save_tokens, "save_amax": save_tokens and b is not B}
            spec, of_problem = (forward_spec(p, config, view, **flags) for p in (small, problem))
            outputs, scratch = allocate(spec.outputs, device), allocate(with_maps(spec, of_problem, small), device)
            forward(problem, config, view, A, b, offs, outputs, scratch)
        if not saves_input(config):
            saved = (outputs["a_tokens"], outputs["a_tokens_scale"])
        for needs in ((True, False), (False, True), (True, True)):
            spec, of_problem = (backward_spec(p, config, view, *needs) for p in (small, problem))
            grads, scratch = allocate(spec.outputs, device), allocate(with_maps(spec, of_problem, small), device)
            if "dB" in grads and b is not B:
                grads["dB"] = grads["dB"].view(1, problem.N, problem.K).mT
            backward(problem, config, view, dOut, saved, b, offs, grads, scratch)
    torch.cuda.synchronize(device)


@lru_cache(maxsize=4096)
def warm_up_save(problem: Problem, config: GroupedMMConfig, device: torch.device) -> None:
    """`warm_up` for `save`, whose backward is that of `warm_up`."""
    if device.type != "cuda":
        return
    view = device_of(device.type, device.index)
    if select(config, view).gemm == "emulated" or saves_input(config):
        return
    small = replace(problem, M=16, G=1)
    A = torch.zeros(16, problem.K, dtype=getattr(torch, problem.a_dtype), device=device)
    offs = torch.full((1,), 16, dtype=torch.int32, device=device)
    spec = saved_spec(small, config, view)
    save(problem, config, view, A, offs, allocate(spec.outputs, device), allocate(spec.scratch, device))
    torch.cuda.synchronize(device)
