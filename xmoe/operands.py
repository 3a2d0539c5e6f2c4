"""The one quantized-array type."""

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

Array = TypeVar("Array")

FORMATS = ("fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "mxfp8_floor")
"""Of quantized operands; a config's format may be "bf16" too."""
FEATURE_MULTIPLE = 16
"""K and N are multiples of this: 8-bit rows of 16 bytes, on every device (docs/design.md)."""
TOKEN_TILE = 128
"""Each group's tokens start at a multiple of this in a wgrad operand (tokens)."""
MX_BLOCK = 32
"""Elements that share one E8M0 scale (OCP Microscaling Formats v1.0, section 5)."""

SCALE_TILE_ROWS, SCALE_TILE_BLOCKS, SCALE_TILE_BYTES = 128, 4, 512
"""A block-scaled tensor core reads E8M0 scales in tiles of 512 bytes: those of 128 rows, 4 blocks each. The scale of
row r and block c of a tile is its byte (r % 32) * 16 + r // 32 * 4 + c (PTX ISA, tcgen05.mma, scale factor layout of
scale_vec::1X; cuBLAS, 1D block scaling factors layout)."""

FP8_BLOCK = 128
"""Elements of the contraction that share one scale of ``fp8_blockwise``; also a weight block's other side."""
SCALE_BLOCKS = {"fp8_blockwise": FP8_BLOCK, "mxfp8_rceil": MX_BLOCK, "mxfp8_floor": MX_BLOCK}
"""Elements of the contraction that share a scale, in the formats that have more than one scale a row."""


def whole_blocks(format: str, C: int) -> bool:
    """Whether C elements are whole blocks of the format, so that its blocks may begin anew after them."""
    return C % SCALE_BLOCKS.get(format, 1) == 0


def padded_tokens(M: int, G: int) -> int:
    """Columns of a wgrad operand: the most that M tokens in G groups need when each group is padded to TOKEN_TILE."""
    return (M + G * (TOKEN_TILE - 1)) // TOKEN_TILE * TOKEN_TILE


def scale_tiles_shape(rows: int, C: int) -> tuple[int, int, int]:
    """The shape of the scale tiles of `rows` rows of C elements: [ceil(rows/128), ceil(C/128), 512]."""
    return -(-rows // SCALE_TILE_ROWS), -(-C // (MX_BLOCK * SCALE_TILE_BLOCKS)), SCALE_TILE_BYTES


@dataclass(frozen=True, slots=True)
class QuantizedOperand(Generic[Array]):
    """A GEMM operand in 8 bits: e4m3 data, its scales, and the logical axis that they run along.

    Invariants: the contraction is the last axis of ``data``; dequantized = data * scale; the shapes are those of the
    layout tables in ``docs/design.md`` (never those in scale tiles). ``Array`` is a numpy, torch or jax array.
    """

    data: Array
    """float8_e4m3fn."""
    scale: Array
    """float32 (``fp8_*``) or float8_e8m0fnu (``mxfp8_*``)."""
    axis: str
    """The logical axis that one scale covers: "K", "N" or "tokens"."""
    format: str
    """One of FORMATS; in PyTorch's linears "fp8_tensorwise" too, with one float32 scale []."""

    def map(self, fn: Any) -> "QuantizedOperand[Any]":
        """The same operand with ``fn`` applied to data and scale."""
        return QuantizedOperand(fn(self.data), fn(self.scale), self.axis, self.format)
