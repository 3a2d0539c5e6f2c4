"""Wgrad operands as implementations keep them, in the layout of the oracle (docs/design.md, Operand layouts)."""

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xmoe.operands import SCALE_TILE_BLOCKS, SCALE_TILE_ROWS, QuantizedOperand, padded_tokens
from xmoe.oracle import token_layout


class Layout(Protocol):
    """What of `xmoe.kernels.dispatch.Implementation` says where bytes lie."""

    @property
    def straight_tokens(self) -> bool: ...

    @property
    def scale_tiles(self) -> bool: ...

    @property
    def warp_specialized(self) -> bool: ...


def tokens_operand(
    data: NDArray[Any], scale: NDArray[Any], offs: NDArray[np.int32], M: int, format: str, layout: Layout
) -> QuantizedOperand[NDArray[Any]]:
    """e4m3 [C, Mp] with its scale, of M tokens, from what a forward saves under ``layout``: [M, C] where tokens are
    straight, scales with blocks first where they are, or in the tensor core's tiles."""
    if layout.straight_tokens:
        rows = data
        data = np.zeros((rows.shape[1], padded_tokens(M, len(offs))), rows.dtype)
        for group in token_layout(offs, M):
            data[:, group.columns] = rows[group.start : group.end].T
        scale = scale.T
    elif layout.scale_tiles:
        scale = from_scale_tiles(scale, data.shape[0], data.shape[1] // 32)
    elif layout.warp_specialized and format == "fp8_blockwise":
        scale = scale.T
    return QuantizedOperand(data, np.ascontiguousarray(scale), "tokens", format)


def from_scale_tiles(tiles: NDArray[Any], R: int, B: int) -> NDArray[Any]:
    """E8M0 [R, B] of tiles [ceil(R/128), ceil(B/4), 512]: row r and block c in byte (r % 32) * 16 + r // 32 * 4 + c."""
    quarters = tiles.reshape(*tiles.shape[:2], SCALE_TILE_ROWS // 4, 4, SCALE_TILE_BLOCKS)
    rows = quarters.transpose(0, 3, 2, 1, 4)
    return rows.reshape(tiles.shape[0] * SCALE_TILE_ROWS, tiles.shape[1] * SCALE_TILE_BLOCKS)[:R, :B]
