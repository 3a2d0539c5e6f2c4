"""What a recipe does to the operands and to the results of one grouped GEMM, or of a linear, as numbers.

M = tokens, K = contraction of the forward, N = output features, G = groups (experts).

Every function reads tensors on the host, which waits for the device. Large operands are quantized piece by piece, along
axes that share no scale.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from xmoe.config import Element, Float8LinearConfig, GroupedMMConfig, LinearConfig
from xmoe.kernels import emulation, tensorwise

_PIECE = 1 << 24
"""Elements that are quantized at a time, about."""
_E5M2 = "fp8_tensorwise_e5m2"
_TENSORWISE = ("fp8_tensorwise", _E5M2)


class Tally(NamedTuple):
    """Counts over the elements of an operand; None where the GEMM takes it in bf16."""

    amax: float
    saturated: int | None
    """Elements beyond 448 times their scale, which the cast cuts off."""
    flushed: int | None
    """Elements other than zero that become zero."""
    elements: int

    def plus(self, other: "Tally") -> "Tally":
        """Of the elements of both; an amax of NaN stays."""
        amax = math.nan if math.isnan(self.amax + other.amax) else max(self.amax, other.amax)
        if self.saturated is None or self.flushed is None or other.saturated is None or other.flushed is None:
            return Tally(amax, None, None, self.elements + other.elements)
        saturated, flushed = self.saturated + other.saturated, self.flushed + other.flushed
        return Tally(amax, saturated, flushed, self.elements + other.elements)


class Energy(NamedTuple):
    """Sums of squares: of a GEMM's result in bf16, and of what its result in the recipe differs by."""

    signal: float
    noise: float

    def plus(self, other: "Energy") -> "Energy":
        """Of both."""
        return Energy(self.signal + other.signal, self.noise + other.noise)


class Gemm(NamedTuple):
    """One of the three GEMMs."""

    operands: dict[str, Tally]
    """Of "activation", "weight" and "gradient" the two that it multiplies."""
    energy: Energy | None
    """None where it is computed in bf16."""


Results = tuple[Tensor, Tensor | None, Tensor | None]
"""``(out [M, N], dA [M, K] or None, dB [G, K, N] or None)``."""


def measure(
    A: Tensor,
    B: Tensor,
    offs: Tensor,
    dOut: Tensor,
    config: GroupedMMConfig | LinearConfig,
    results: Results,
    reference: Results,
    parts: Sequence[slice] = (slice(None),),
) -> list[dict[str, Gemm]]:
    """The GEMMs "fwd", "dgrad" and "wgrad" of ``out = A_g @ B_g``, those whose result there is, for each of the `parts`
    of N: the weights that were joined to B.

    Args:
        A, B, offs, dOut: [M, K], [G, K, N], int32 [G], [M, N], in bf16 or fp32; of a linear one group.
        config: what `results` were computed under; `reference` are the bf16 recipe's.
    """
    forward = config.format
    gradient = _E5M2 if isinstance(config, Float8LinearConfig) and config.grad_dtype is Element.E5M2 else forward
    wgrad, wgrad_gradient = ("bf16", "bf16") if config.wgrad_with_hp else (forward, gradient)
    ends = emulation.group_ends(offs, A.shape[0])
    tokens = ends[-1] if ends else 0
    out, dA, dB = results
    out_ref, dA_ref, dB_ref = reference

    def energy(x: Tensor | None, ref: Tensor | None, fmt: str) -> Energy | None:
        return None if x is None or ref is None or fmt == "bf16" else energies(x, ref)

    activation = of_rows(A[:tokens], forward, (slice(None),))[0]
    along_n = of_weights(B, forward, parts) if dA is not None else []
    gradients = of_rows(dOut[:tokens], gradient, parts) if dA is not None else []
    A_tokens = of_tokens(A, offs, wgrad) if dB is not None else None
    dA_energy = energy(dA, dA_ref, forward)

    found = []
    for index, part in enumerate(parts):
        weight = of_weights(B[..., part].mT, forward, (slice(None),))[0]
        gemms = {
            "fwd": Gemm({"activation": activation, "weight": weight}, energy(out[:, part], out_ref[:, part], forward))
        }
        if dA is not None:
            gemms["dgrad"] = Gemm({"gradient": gradients[index], "weight": along_n[index]}, dA_energy)
        if dB is not None and dB_ref is not None and A_tokens is not None:
            operands = {"activation": A_tokens, "gradient": of_tokens(dOut[:, part], offs, wgrad_gradient)}
            gemms["wgrad"] = Gemm(operands, energy(dB[..., part], dB_ref[..., part], wgrad))
        found.append(gemms)
    return found


def of_rows(x: Tensor, fmt: str, parts: Sequence[slice]) -> list[Tally]:
    """Of x [R, C], quantized along C, the `parts` of C."""

    if fmt in _TENSORWISE:
        return [_of_tensor(x, fmt)]

    def pieces() -> Iterator[_Piece]:
        for rows in x.split(max(1, _PIECE // max(x.shape[1], 1))):
            operand = None if fmt == "bf16" else emulation.quantize_rows(rows, fmt)
            yield _piece(rows, operand)

    return _tallies(pieces(), parts, fmt)


def of_weights(B: Tensor, fmt: str, parts: Sequence[slice]) -> list[Tally]:
    """Of B [G, P, C], quantized along C, the `parts` of C."""

    if fmt in _TENSORWISE:
        return [_of_tensor(B.flatten(0, 1), fmt)]

    def pieces() -> Iterator[_Piece]:
        for weight in B.split(1):
            operand = None if fmt == "bf16" else emulation.quantize_weights(weight, "N", fmt)
            yield _piece(weight, operand)

    return _tallies(pieces(), parts, fmt)


def of_tokens(x: Tensor, offs: Tensor, fmt: str) -> Tally:
    """Of x [M, C], quantized along the tokens of each group."""
    if fmt in _TENSORWISE:
        return _of_tensor(x, fmt)
    layout = emulation.token_layout(emulation.group_ends(offs, x.shape[0]))

    def pieces() -> Iterator[_Piece]:
        for columns in x.split(max(1, _PIECE // max(x.shape[0], 1)), dim=1):
            operand = None if fmt == "bf16" else emulation.quantize_tokens(columns, offs, fmt)
            padded = _piece(columns.t(), operand, offs)
            for start, end, column in layout:
                group = slice(column, column + end - start)
                data, values = (None if each is None else each[:, group] for each in padded[1:])
                yield _Piece(columns[start:end].t(), data, values)

    return _tallies(pieces(), (slice(None),), fmt)[0]


def _of_tensor(x: Tensor, fmt: str) -> Tally:
    """Of x [R, C], a linear's operand under one scale."""

    def pieces() -> Iterator[_Piece]:
        if x.numel():
            maxima = tensorwise.find_maxima(x, plain=True)
            for rows in x.split(_rows(x)):
                data, _, scale = tensorwise.cast(rows, maxima, fmt == _E5M2, True, False, emulated=True)
                yield _Piece(rows, data, data.float() * scale)

    return _tallies(pieces(), (slice(None),), fmt)[0]


class _Piece(NamedTuple):
    """Elements, the bytes that they become, and what those stand for; None where they stay as they are."""

    x: Tensor
    data: Tensor | None
    values: Tensor | None


def _piece(x: Tensor, operand: emulation.Operand | None, offs: Tensor | None = None) -> _Piece:
    if operand is None:
        return _Piece(x, None, None)
    return _Piece(x, operand.data, emulation.dequantize(operand, offs))


def _tallies(pieces: Iterator[_Piece], parts: Sequence[slice], fmt: str) -> list[Tally]:
    """Of all `pieces` together, one for each of the `parts` of their last axis."""
    none = None if fmt == "bf16" else 0
    tallies = [Tally(0.0, none, none, 0)] * len(parts)
    for piece in pieces:
        for index, part in enumerate(parts):
            tallies[index] = tallies[index].plus(_tally(*(None if t is None else t[..., part] for t in piece)))
    return tallies


def _tally(x: Tensor | None, data: Tensor | None, values: Tensor | None) -> Tally:
    assert x is not None, "a piece has elements"
    magnitude = x.float().abs()
    amax = float(magnitude.max()) if magnitude.numel() else 0.0
    if data is None or values is None:
        return Tally(amax, None, None, x.numel())
    codes = data.float().abs()
    saturated = int(((codes == torch.finfo(data.dtype).max) & (magnitude > values.abs())).sum())
    flushed = int(((codes == 0) & (magnitude != 0)).sum())
    return Tally(amax, saturated, flushed, x.numel())


def energies(x: Tensor, reference: Tensor) -> Energy:
    """Of x beside its `reference`, of any one shape."""
    signal = noise = 0.0
    for result, wanted in zip(x.split(_rows(x)), reference.split(_rows(x)), strict=True):
        wanted = wanted.double()
        signal += float(wanted.square().sum())
        noise += float((result.double() - wanted).square().sum())
    return Energy(signal, noise)


def _rows(x: Tensor) -> int:
    return max(1, _PIECE * x.shape[0] // max(x.numel(), 1))
