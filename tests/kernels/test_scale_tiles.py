"""E8M0 scales in the tensor core's tiles: what the quantizers write and how the GEMMs read it."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests.kernels.backends import arrays, awkward, same_bytes
from tests.kernels.test_grouped_gemm import tensor
from tests.kernels.test_quantize import to_kernel, token_map
from xmoe import oracle
from xmoe.kernels import quantize
from xmoe.kernels.emulation import from_scale_tiles, to_scale_tiles
from xmoe.kernels.scale_tiles import descriptor, scales_of
from xmoe.operands import padded_tokens, scale_tiles_shape

MX = ("mxfp8_rceil", torch.bfloat16), ("mxfp8_floor", torch.float32)
GROUPS = {
    "uneven": (300, [130, 131, 300]),
    "empty groups": (300, [0, 128, 128, 300, 300]),
    "short": (150, [30, 93, 140]),
    "bad offsets": (150, [90, -4, 1000, 20]),
    "no tokens": (0, [0, 0]),
}
groups = pytest.mark.parametrize(("M", "ends"), GROUPS.values(), ids=GROUPS.keys())


def numbers(*shape: int) -> torch.Tensor:
    """E8M0 bytes that differ from their neighbours."""
    count = int(np.prod(shape))
    return (torch.arange(count) * 37 % 251 + 1).to(torch.uint8).view(shape).view(torch.float8_e8m0fnu)


def poisoned(*shape: int, device: torch.device) -> torch.Tensor:
    """Scale tiles of NaN."""
    return torch.full(shape, 0xFF, dtype=torch.uint8, device=device).view(torch.float8_e8m0fnu)


def same_tiles(tiles: torch.Tensor, scale: np.ndarray, offs: np.ndarray | None = None) -> bool:
    expected = to_scale_tiles(tensor(scale, torch.device("cpu")), None if offs is None else torch.from_numpy(offs))
    return tiles.shape == expected.shape and torch.equal(tiles.cpu().view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize(("rows", "blocks"), [(128, 4), (1, 1), (300, 5), (256, 9)])
def test_a_scale_is_where_the_tensor_core_reads_it(lead, rows, blocks):
    scale = numbers(*lead, rows, blocks)
    tiles = to_scale_tiles(scale)
    assert tiles.shape == (*lead, *scale_tiles_shape(rows, 32 * blocks))
    for r in {0, rows // 2, rows - 1, min(31, rows - 1), min(97, rows - 1)}:
        for c in range(blocks):
            place = (..., r // 128, c // 4, r % 32 * 16 + r % 128 // 32 * 4 + c % 4)
            assert torch.equal(tiles.view(torch.uint8)[place], scale.view(torch.uint8)[..., r, c])
    assert tiles.view(torch.uint8).sum(dtype=torch.int64) == scale.view(torch.uint8).sum(dtype=torch.int64)
    assert torch.equal(from_scale_tiles(tiles, rows, blocks).view(torch.uint8), scale.view(torch.uint8))


@groups
def test_each_group_begins_a_tile(M, ends):
    scale, offs = numbers(M, 5), torch.tensor(ends, dtype=torch.int32)
    tiles = to_scale_tiles(scale, offs)
    assert tiles.shape == (padded_tokens(M, len(ends)) // 128, 2, 512)
    layout, first = oracle.token_layout(np.array(ends), M), 0
    for group in layout:
        count = -(-(group.end - group.start) // 128)
        own = to_scale_tiles(scale[group.start : group.end]).view(torch.uint8)
        assert torch.equal(tiles[first : first + count].view(torch.uint8), own)
        first += count
    assert not tiles[first:].view(torch.uint8).any()
    back = from_scale_tiles(tiles, M, 5, offs).view(torch.uint8)
    assert torch.equal(back[: layout[-1].end], scale[: layout[-1].end].view(torch.uint8))
    assert not back[layout[-1].end :].any()


@triton.jit
def _untile(tiles_ptr, scale_ptr, R: tl.constexpr, B: tl.constexpr):
    half = tl.arange(0, 2)[:, None] * 256 + tl.arange(0, 256)[None, :]
    tile = tl.arange(0, R)[:, None] * B + tl.arange(0, B)[None, :]
    tiles = tl.load(tiles_ptr + tile[:, :, None, None] * 512 + half[None, None, :, :])
    place = tl.arange(0, R * 128)[:, None] * (B * 4) + tl.arange(0, B * 4)[None, :]
    tl.store(scale_ptr + place, scales_of(tiles))


@pytest.mark.parametrize(("R", "B"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_what_the_gemms_make_of_tiles(backend, R, B):
    """The tiles of a copy, as `dot_scaled` takes them."""
    scale = numbers(R * 128, B * 4)
    tiles, out = to_scale_tiles(scale).to(backend.device), torch.zeros(R * 128, B * 4, dtype=torch.uint8)
    out = out.to(backend.device)
    _untile[(1,)](tiles.view(torch.uint8), out, R, B)
    assert torch.equal(out.cpu(), scale.view(torch.uint8))


def test_copies_are_of_whole_tiles():
    scale = numbers(3, 2, 5, 512)
    copy = descriptor(scale, 256, 128)
    assert copy.shape == (6, 5, 2, 256)
    assert copy.strides == (2560, 512, 256, 1)
    assert copy.block == (2, 1, 2, 256)
    for rows, depth in ((64, 128), (128, 64)):
        with pytest.raises(AssertionError, match="whole tiles"):
            descriptor(scale, rows, depth)
    with pytest.raises(AssertionError, match="one after the other"):
        descriptor(scale.mT, 128, 128)


@pytest.mark.parametrize(("cols", "fmt", "dtype"), [(16, *MX[0]), (144, *MX[1])])
@groups
def test_rows(backend, fmt, M, ends, cols, dtype):
    check_rows(backend, fmt, M, ends, cols, dtype)


def test_rows_of_several_programs(backend):
    check_rows(backend, "mxfp8_rceil", 40, [7, 40], 1168, torch.float32)


def check_rows(backend, fmt, M, ends, cols, dtype):
    x, offs = to_kernel(awkward(M, cols).to(dtype), backend), np.array(ends, np.int32)
    expected = oracle.quantize_rows(arrays(x), fmt)
    covered = oracle.token_layout(offs, M)[-1].end
    data = torch.full((M, cols), -1.0, device=x.device).to(torch.float8_e4m3fn)
    scale = poisoned(*scale_tiles_shape(padded_tokens(M, len(ends)), cols), device=x.device)
    quantize.quantize_rows(x, fmt, data, scale, 4, map=token_map(torch.from_numpy(offs).to(x.device), M))
    assert same_bytes(data[:covered], expected.data[:covered])
    assert M == 0 or same_tiles(scale, expected.scale, offs)


@pytest.mark.parametrize(("cols", "fmt", "dtype"), [(80, *MX[0]), (256, *MX[1])])
@groups
def test_tokens(backend, fmt, M, ends, cols, dtype):
    x, offs = to_kernel(awkward(M, cols).to(dtype), backend), np.array(ends, np.int32)
    expected, Mp = oracle.quantize_tokens(arrays(x), offs, fmt), padded_tokens(M, len(ends))
    data = torch.full((cols, Mp), -1.0, device=x.device).to(torch.float8_e4m3fn)
    scale = poisoned(*scale_tiles_shape(cols, Mp), device=x.device)
    quantize.quantize_tokens(x, fmt, data, scale, None, *token_map(torch.from_numpy(offs).to(x.device), M))
    assert same_bytes(data, expected.data)
    assert same_tiles(scale, expected.scale)


@pytest.mark.parametrize(("fmt", "dtype"), MX)
@pytest.mark.parametrize("axis", ["K", "N"])
@pytest.mark.parametrize("stored", ["GKN", "GNK"])
@pytest.mark.parametrize(("K", "N"), [(80, 144), (128, 256)])
def test_weights(backend, K, N, fmt, axis, dtype, stored):
    B = to_kernel(awkward(3 * K, N).view(3, K, N).to(dtype), backend)
    expected = oracle.quantize_weights(arrays(B), axis, fmt)
    if stored == "GNK":
        B = B.mT.contiguous().mT
    data = torch.full(expected.data.shape, -1.0, device=B.device).to(torch.float8_e4m3fn)
    scale = poisoned(3, *scale_tiles_shape(*expected.data.shape[1:]), device=B.device)
    quantize.quantize_weights(B.mT if axis == "K" else B, fmt, data, scale, None, 4)
    assert same_bytes(data, expected.data)
    assert same_tiles(scale, expected.scale)


@pytest.mark.parametrize("N", [32, 96, 128, 160])
def test_weights_side_by_side(backend, N):
    """The second one begins inside a tile, or at its start."""
    whole = to_kernel(awkward(3 * 80, 2 * N).view(3, 80, 2 * N), backend)
    expected = oracle.quantize_weights(arrays(whole), "N", "mxfp8_rceil")
    parts = [half.mT.contiguous().mT for half in whole.split(N, 2)]
    data = torch.full(expected.data.shape, -1.0, device=whole.device).to(torch.float8_e4m3fn)
    scale = poisoned(3, *scale_tiles_shape(80, 2 * N), device=whole.device)
    quantize.quantize_weights(parts, "mxfp8_rceil", data, scale, None, 4)
    assert same_bytes(data, expected.data)
    assert same_tiles(scale, expected.scale)
