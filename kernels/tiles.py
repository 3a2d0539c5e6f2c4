"""The tile map: which group each block of tokens belongs to, computed on the device from the offsets; and `prepare`,
the launch that makes the maps of a call.

G groups, M tokens. Offsets are data: they are read as ``ends = running maximum of clip(offs, 0, M)``, so no value in
them can send a kernel outside its buffers.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
import triton.language as tl

from xmoe.kernels.launch import launch

TILE_FIELDS = 4
"""int32 fields of a row of the map, three of them used: 16 bytes keep rows aligned."""
MAPS, RANGES = 3, 4
"""The most tile maps of a call, one for its tokens and two for its GEMMs, and tensors to zero."""
LANES, BLOCK = 128, 1024
"""Groups or tiles that a program looks at at once, and elements that it zeroes."""

Map = tuple[torch.Tensor, torch.Tensor]
"""(tiles, groups): int32 [max_tiles(M, G, tile), 4], of each used tile its group, first row and the group's end row;
int32 [G + 1, 4], of each group its start row, end row and first tile. Row G is the rows past the last group, and its
first tile is the number of tiles in use."""


def max_tiles(M: int, G: int, tile: int) -> int:
    """The most tiles of `tile` tokens that M tokens in G groups can take."""
    return (M + G * (tile - 1)) // tile


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["M", "G", "tile_0", "tile_1", "tile_2", "count_0", "count_1", "count_2", "count_3"])
def _prepare(
    offs_ptr, M, G,
    tile_0, tiles_0_ptr, groups_0_ptr,
    tile_1, tiles_1_ptr, groups_1_ptr,
    tile_2, tiles_2_ptr, groups_2_ptr,
    zeros_0_ptr, count_0,
    zeros_1_ptr, count_1,
    zeros_2_ptr, count_2,
    zeros_3_ptr, count_3,
    LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (p, i) writes what map i has of group p, and block p of zeros i. Unused: a map of tile 0, a count of 0.
    One specialisation serves every call."""
    index = tl.program_id(1)
    if index == 0:
        _map_group(offs_ptr, M, G, tile_0, tiles_0_ptr, groups_0_ptr, LANES)
        _zero_block(zeros_0_ptr, count_0, BLOCK)
    elif index == 1:
        _map_group(offs_ptr, M, G, tile_1, tiles_1_ptr, groups_1_ptr, LANES)
        _zero_block(zeros_1_ptr, count_1, BLOCK)
    elif index == 2:
        _map_group(offs_ptr, M, G, tile_2, tiles_2_ptr, groups_2_ptr, LANES)
        _zero_block(zeros_2_ptr, count_2, BLOCK)
    else:
        _zero_block(zeros_3_ptr, count_3, BLOCK)


@triton.jit
def _zero_block(x_ptr, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + element, 0, element < count)


@triton.jit
def _map_group(offs_ptr, M, G, tile, tiles_ptr, groups_ptr, LANES: tl.constexpr):
    group = tl.program_id(0)  # G stands for the rows past the last group
    if (group <= G) & (tile > 0):
        start = tl.zeros((), tl.int32)
        end = tl.zeros((), tl.int32)  # at last, of the groups up to this one
        first_tile = tl.zeros((), tl.int32)
        for some in range(0, tl.minimum(group + 1, G), LANES):
            lane = some + tl.arange(0, LANES)
            own = tl.load(offs_ptr + lane, lane < G, 0)
            before = tl.load(offs_ptr + lane - 1, (lane > 0) & (lane < G), 0)
            ends = tl.maximum(tl.associative_scan(tl.minimum(tl.maximum(own, 0), M), 0, _larger), end)
            starts = tl.maximum(tl.associative_scan(tl.minimum(tl.maximum(before, 0), M), 0, _larger), end)
            first_tile += tl.sum(tl.where((lane < group) & (lane < G), tl.cdiv(ends - starts, tile), 0))
            start = tl.max(tl.where(lane <= group, starts, 0))
            end = tl.max(tl.where(lane <= group, ends, 0))
        if group == G:
            start = end
            end = M
        tl.store(groups_ptr + group * 4, start)
        tl.store(groups_ptr + group * 4 + 1, end)
        tl.store(groups_ptr + group * 4 + 2, first_tile)
        if group < G:
            count = tl.cdiv(end - start, tile)
            for first in range(0, count, LANES):
                index = first + tl.arange(0, LANES)
                row = tiles_ptr + (first_tile + index) * 4
                tl.store(row, tl.zeros_like(index) + group, index < count)
                tl.store(row + 1, start + index * tile, index < count)
                tl.store(row + 2, tl.zeros_like(index) + end, index < count)


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


def prepare(offs: torch.Tensor, M: int, maps: Mapping[int, Map], zeros: Sequence[torch.Tensor] = ()) -> None:
    """What a call needs before all else, in one launch: the tile maps of `offs`, and zeros.

    Args:
        offs: int32 [G], cumulative group ends.
        M: tokens.
        maps: by the tokens of a tile, written; at most MAPS.
        zeros: int32, contiguous, become zero; at most RANGES, of any size.
    """
    assert len(maps) <= MAPS, f"maps of {[*maps]} tokens: a launch makes {MAPS}"
    assert len(zeros) <= RANGES, f"{len(zeros)} tensors to zero: a launch has {RANGES}"
    G, counts = offs.shape[0], [x.numel() for x in zeros]
    unused_maps, unused_zeros = (MAPS - len(maps)) * (0, offs, offs), (RANGES - len(zeros)) * (offs, 0)
    launch(
        _prepare, (max([G + 1, *(cdiv(count, BLOCK) for count in counts)]), max(len(maps), len(zeros))),
        offs, M, G, *(x for tile, map in maps.items() for x in (tile, *map)), *unused_maps,
        *(x for pair in zip(zeros, counts, strict=True) for x in pair), *unused_zeros,
        LANES=LANES, BLOCK=BLOCK,
    )  # fmt: skip


def cdiv(a: int, b: int) -> int:
    return -(-a // b)  # triton.cdiv takes a microsecond
