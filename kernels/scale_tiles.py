"""E8M0 scales in the tiles that a block-scaled tensor core reads (`xmoe.operands.SCALE_TILE_ROWS`): where a quantizer
stores one, and how a GEMM takes whole tiles from memory to `tl.dot_scaled`.

A tile of 512 bytes holds the scales of 128 rows, 4 blocks of 32 elements each. Tiles lie row-major: [ceil(rows/128),
ceil(C/128), 512]. Bytes past the last row or block are 0, or, rows past those of a weight, anything: the scale of a
zero must not be NaN, that of a row which is never stored may be.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.launch import Descriptor
from xmoe.operands import MX_BLOCK, SCALE_TILE_BLOCKS, SCALE_TILE_BYTES, SCALE_TILE_ROWS


@triton.jit
def tile_byte(row, block, across):
    """Where the scale of a row and a block is, in bytes; int64. `across`: tiles side by side, ceil(C/128)."""
    tile = (row // 128).to(tl.int64) * across + block // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + block % 4


@triton.jit
def scales_of(tiles):
    """The scales [128 R, 4 B] of tiles [R, B, 2, 256], as `tl.dot_scaled` takes them. For Triton these very steps mean
    that the tiles, in shared memory, are the tensor core's: it copies them to tensor memory (`tcgen05.cp`)."""
    R: tl.constexpr = tiles.shape[0]
    B: tl.constexpr = tiles.shape[1]
    return tiles.reshape(R, B, 32, 4, 4).trans(0, 3, 2, 1, 4).reshape(R * 128, B * 4)


def in_tiles(data: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Whether the scale of an MX operand is in tiles: it has one axis more than in rows."""
    return scale is not None and scale.ndim == data.ndim + 1


def descriptor(scale: torch.Tensor, rows: int, depth: int) -> Descriptor:
    """Of E8M0 tiles [..., ceil(R/128), ceil(C/128), 512], for copies of `rows` rows (of all matrices, one after the
    other) and `depth` elements. A copy's sides are 256 at the most: a tile counts as 2 x 256."""
    assert rows % SCALE_TILE_ROWS == 0, f"{rows} rows: a copy has whole tiles of {SCALE_TILE_ROWS}"
    assert depth % (MX_BLOCK * SCALE_TILE_BLOCKS) == 0, f"a depth of {depth}: a copy has whole tiles of 128"
    assert scale.is_contiguous(), f"strides {scale.stride()}: tiles lie one after the other"
    across, half = scale.shape[-2], SCALE_TILE_BYTES // 2
    return Descriptor(
        scale.view(torch.uint8), (scale.numel() // (across * SCALE_TILE_BYTES), across, 2, half),
        (across * SCALE_TILE_BYTES, SCALE_TILE_BYTES, half, 1),
        (rows // SCALE_TILE_ROWS, depth // (MX_BLOCK * SCALE_TILE_BLOCKS), 2, half),
    )  # fmt: skip
