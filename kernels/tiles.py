"""The tile map: which group each block of tokens belongs to, computed on the device from the offsets.

G groups, M tokens. Offsets are data: they are read as ``ends = running maximum of clip(offs, 0, M)``, so no value in
them can send a kernel outside its buffers.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.launch import launch

TILE_FIELDS = 4
"""int32 fields of a row of the map, three of them used: 16 bytes keep rows aligned."""


def max_tiles(M: int, G: int, tile: int) -> int:
    """The most tiles of `tile` tokens that M tokens in G groups can take."""
    return (M + G * (tile - 1)) // tile


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["M", "G"])
def _map_tiles(offs_ptr, tiles_ptr, groups_ptr, M, G, TILE: tl.constexpr, G_BLOCK: tl.constexpr):
    group = tl.program_id(0)  # program G stands for the rows past the last group
    lane = tl.arange(0, G_BLOCK)
    offs = tl.load(offs_ptr + lane, lane < G, 0)
    before = tl.load(offs_ptr + lane - 1, (lane > 0) & (lane < G), 0)
    ends = tl.associative_scan(tl.minimum(tl.maximum(offs, 0), M), 0, _larger)
    starts = tl.associative_scan(tl.minimum(tl.maximum(before, 0), M), 0, _larger)
    tiles = tl.where(lane < G, tl.cdiv(ends - starts, TILE), 0)
    first_tile = tl.sum(tl.where(lane < group, tiles, 0))
    if group == G:
        tl.store(groups_ptr + group * 4, tl.max(ends))
        tl.store(groups_ptr + group * 4 + 1, M)
        tl.store(groups_ptr + group * 4 + 2, first_tile)
    else:
        start = tl.sum(tl.where(lane == group, starts, 0))
        end = tl.sum(tl.where(lane == group, ends, 0))
        tl.store(groups_ptr + group * 4, start)
        tl.store(groups_ptr + group * 4 + 1, end)
        tl.store(groups_ptr + group * 4 + 2, first_tile)
        count = tl.cdiv(end - start, TILE)
        for first in range(0, count, 128):
            tile = first + tl.arange(0, 128)
            row = tiles_ptr + (first_tile + tile) * 4
            tl.store(row, tl.zeros_like(tile) + group, tile < count)
            tl.store(row + 1, start + tile * TILE, tile < count)
            tl.store(row + 2, tl.zeros_like(tile) + end, tile < count)


@triton.jit
def tile_rows(tile, tiles_ptr, groups_ptr, G, R, RAGGED: tl.constexpr, BLOCK_R: tl.constexpr):
    """(group, first row, end row) of a tile; a tile past the last one is empty. Rows of a dense group count from 0."""
    if RAGGED:
        used = tl.load(groups_ptr + G * 4 + 2)
        group = tl.load(tiles_ptr + tile * 4, tile < used, 0)
        first = tl.load(tiles_ptr + tile * 4 + 1, tile < used, 0)
        end = tl.load(tiles_ptr + tile * 4 + 2, tile < used, 0)
    else:
        per_group = tl.cdiv(R, BLOCK_R)
        group = tile // per_group
        first = tile % per_group * BLOCK_R
        end = R
    return group, first, end


def map_tiles(offs: torch.Tensor, M: int, tile: int, tiles: torch.Tensor, groups: torch.Tensor) -> None:
    """Write the tile map of `offs`.

    Args:
        offs: int32 [G], cumulative group ends.
        M: tokens.
        tile: tokens a tile.
        tiles: int32 [max_tiles(M, G, tile), 4], written: group, first row, the group's end row, for each used tile.
        groups: int32 [G + 1, 4], written: start row, end row, first tile; row G is the rows past the last group, and
            its first tile is the number of tiles in use.
    """
    G = offs.shape[0]
    block = 1 << (G - 1).bit_length()
    warps = 1 if block <= 1024 else 4  # at 4096 groups the scan of one warp would spill
    launch(_map_tiles, (G + 1,), offs, tiles, groups, M, G, TILE=tile, G_BLOCK=block, num_warps=warps)


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes a microsecond
