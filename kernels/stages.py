"""The stages of `xmoe.kernels.pipeline` one by one, on operands of their own: what a benchmark times apart.

M tokens, K contraction of the forward, N output features, G groups.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation, pipeline
from xmoe.kernels.call import Call
from xmoe.kernels.dispatch import Device, select
from xmoe.operands import QuantizedOperand

BLOCK_SCALED = Device("cuda", (10, 0))
"""The device whose pipeline multiplies every format's 8-bit elements as they are."""


Written = tuple[tuple[torch.Tensor, ...], Callable[[], Any]]
"""Outputs, and what writes them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A quantizer: ``launch`` reads ``source`` and writes all of ``outputs``."""

    name: str
    source: torch.Tensor
    outputs: tuple[torch.Tensor, ...]
    launch: Callable[[], Any]
    reference: Callable[[], tuple[torch.Tensor, ...]]
    """What must be in ``outputs``, byte for byte, by the emulation."""

    @property
    def nbytes(self) -> int:
        """Bytes that it has to move: the source read once, the outputs written once."""
        return self.source.nbytes + sum(x.nbytes for x in self.outputs)


@dataclass(frozen=True, slots=True)
class PreparedGemm:
    """The forward GEMM on operands that are quantized already: ``launch`` writes ``out`` bf16 [M, N]."""

    a: torch.Tensor
    a_scale: torch.Tensor | None
    b: torch.Tensor
    b_scale: torch.Tensor | None
    out: torch.Tensor
    launch: Callable[[], Any]

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """(a [M, K], its scale, b [G, N, K], its scale); bf16 has no scales."""
        return self.a, self.a_scale, self.b, self.b_scale


def _problem(A: torch.Tensor, B: torch.Tensor) -> tuple[pipeline.Problem, Device]:
    (M, K), (G, _, N) = A.shape, B.shape
    return pipeline.Problem(M, N, K, G), pipeline.device_of(A.device.type, A.device.index)


def quantizers(config: GroupedMMConfig, A: torch.Tensor, B: torch.Tensor, offs: torch.Tensor) -> list[Stage]:
    """The quantizers that a forward and backward of ``config`` (not bf16) runs on A and B.

    Where this GPU dequantizes to bf16 on the way to the tensor cores, what it runs ("... as bf16", "tokens, straight")
    comes after those that write the 8-bit operand of a GPU that does not.

    Args:
        A: bf16 [M, K].
        B: bf16 [G, K, N], the transposed view of weights stored [G, N, K].
        offs: int32 [G], cumulative group ends; the last one is M.
    """
    problem, device = _problem(A, B)
    if select(config, device).gemm == "emulated":
        return _stages(config, A, B, offs, _EmulatedCalls(config, offs), "")
    stages = _stages(config, A, B, offs, _KernelCalls(problem, config, BLOCK_SCALED, offs), "")
    if select(config, device).elements == "bf16":
        stages += _stages(config, A, B, offs, _KernelCalls(problem, config, device, offs), " as bf16")
    return stages


class _KernelCalls:
    """`pipeline`'s launches by stage, into tensors of their own."""

    def __init__(self, problem: pipeline.Problem, config: GroupedMMConfig, device: Device, offs: torch.Tensor) -> None:
        self.scale_tiles = select(config, device).scale_tiles
        forward = pipeline.forward_spec(problem, config, device)
        backward = pipeline.backward_spec(problem, config, device)
        self._forward, self._backward = (
            pipeline.allocate(s.outputs | s.scratch, offs.device) for s in (forward, backward)
        )
        self._calls = [Call(problem, config, device, offs, tensors) for tensors in (self._forward, self._backward)]
        for call, tensors in zip(self._calls, (self._forward, self._backward), strict=True):
            call.prepare(problem.M, tensors)  # once: maxima found again are the same

    def rows(self, A: torch.Tensor) -> Written:
        return _written(lambda: [self._calls[0].rows("a", A)])

    def tokens(self, A: torch.Tensor) -> Written:
        return _written(lambda: [self._calls[0].tokens("a_tokens", A, self._forward)])

    def rows_and_tokens(self, A: torch.Tensor) -> Written:
        return _written(lambda: self._calls[0].rows_and_tokens("a", A, self._forward))

    def weights(self, B: torch.Tensor, axis: str) -> Written:
        return _written(lambda: [self._calls[0].weights(B.mT) if axis == "K" else self._calls[1].weights(B)])


def _written(launch: Callable[[], Iterable[tuple[torch.Tensor, torch.Tensor | None]]]) -> Written:
    """The tensors of the operands that ``launch`` returns, the same at every launch, and the launch."""
    return tuple(x for operand in launch() for x in operand if x is not None), launch


class _EmulatedCalls:
    """The same of the emulation."""

    scale_tiles = False

    def __init__(self, config: GroupedMMConfig, offs: torch.Tensor) -> None:
        self._format, self._offs = config.format, offs

    def _calls(self, *functions: Callable[[], QuantizedOperand[torch.Tensor]]) -> Written:
        def run() -> tuple[torch.Tensor, ...]:
            return tuple(x for function in functions for x in _tensors(function(), "8 bits"))

        outputs = run()
        return outputs, lambda: [_bytes(o).copy_(_bytes(x)) for o, x in zip(outputs, run(), strict=True)]

    def rows(self, A: torch.Tensor) -> Written:
        return self._calls(lambda: emulation.quantize_rows(A, self._format))

    def tokens(self, A: torch.Tensor) -> Written:
        return self._calls(lambda: emulation.quantize_tokens(A, self._offs, self._format))

    def rows_and_tokens(self, A: torch.Tensor) -> Written:
        return self._calls(
            lambda: emulation.quantize_rows(A, self._format),
            lambda: emulation.quantize_tokens(A, self._offs, self._format),
        )

    def weights(self, B: torch.Tensor, axis: str) -> Written:
        return self._calls(lambda: emulation.quantize_weights(B, axis, self._format))


def _stages(
    config: GroupedMMConfig,
    A: torch.Tensor,
    B: torch.Tensor,
    offs: torch.Tensor,
    calls: "_KernelCalls | _EmulatedCalls",
    suffix: str,
) -> list[Stage]:
    fmt, kind = config.format, "bf16" if suffix else "tiles" if calls.scale_tiles else "8 bits"

    def rows() -> tuple[torch.Tensor, ...]:
        return _tensors(emulation.quantize_rows(A, fmt), kind, offs)

    def tokens() -> tuple[torch.Tensor, ...]:  # saved for the backward: 8 bits on every device
        data, scale = _tensors(emulation.quantize_tokens(A, offs, fmt), "8 bits" if suffix else kind)
        if not suffix:
            return data, scale
        layout = emulation.token_layout(emulation.group_ends(offs, A.shape[0]))
        columns = torch.cat([torch.arange(column, column + end - start) for start, end, column in layout])
        return _bytes(data).mT[columns.to(data.device)].view(data.dtype), scale.mT.contiguous()

    straight = ", straight" if suffix else ""
    stages = [Stage(f"rows{suffix}", A, *calls.rows(A), rows)]
    if not pipeline.saves_input(config):
        stages.append(Stage(f"tokens{straight}", A, *calls.tokens(A), tokens))
        both = calls.rows_and_tokens(A)
        stages.append(Stage(f"rows{suffix} and tokens{straight}", A, *both, lambda: (*rows(), *tokens())))
    for axis in ("K", "N"):
        stages.append(
            Stage(
                f"weights {axis}{suffix}", B, *calls.weights(B, axis),
                lambda axis=axis: _tensors(emulation.quantize_weights(B, axis, fmt), kind),
            )
        )  # fmt: skip
    return stages


def _tensors(
    operand: QuantizedOperand[torch.Tensor], kind: str, offs: torch.Tensor | None = None
) -> tuple[torch.Tensor, ...]:
    """`kind`: "8 bits", the same with scale "tiles" (of rows, whose groups end at `offs`), or "bf16"."""
    if kind == "bf16":
        return (emulation.dequantize(operand).bfloat16(),)
    return operand.data, emulation.to_scale_tiles(operand.scale, offs) if kind == "tiles" else operand.scale


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.uint8) if x.element_size() == 1 else x


def prepared_gemm(config: GroupedMMConfig, A: torch.Tensor, B: torch.Tensor, offs: torch.Tensor) -> PreparedGemm:
    """The forward GEMM of ``config`` (bf16 too) on A and B, quantized here. Arguments as in `quantizers`."""
    problem, device = _problem(A, B)
    out = torch.full((problem.M, problem.N), float("nan"), dtype=torch.bfloat16, device=A.device)
    if select(config, device).gemm == "emulated":
        if config.format == "bf16":
            return PreparedGemm(A, None, B, None, out, lambda: emulation.grouped_mm_bf16(A, B, offs, out=out))
        a, b = emulation.quantize_rows(A, config.format), emulation.quantize_weights(B, "K", config.format)
        return PreparedGemm(
            a.data, a.scale, b.data, b.scale, out, lambda: emulation.grouped_mm(a, b, offs, out=out)
        )  # fmt: skip
    scratch = pipeline.allocate(pipeline.forward_spec(problem, config, device, save_tokens=False).scratch, A.device)
    call = Call(problem, config, device, offs, scratch)
    call.prepare(problem.M, scratch)
    rows, weights = call.rows("a", A), pipeline.Prepared(*call.weights(B.mT))

    def launch() -> None:
        call.prepare(problem.M, scratch)  # part of every call
        call.grouped_mm(rows, weights, out)

    return PreparedGemm(*rows, *weights, out, launch)
