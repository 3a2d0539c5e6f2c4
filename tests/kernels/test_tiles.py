"""The tile map: every token of a group once, in order, whatever the offsets hold."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.test_quantize import token_map
from xmoe import oracle
from xmoe.kernels import tiles


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    M=st.integers(0, 700),
    raw=st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-5, 710), min_size=1, max_size=20),
    ordered=st.booleans(),
)
def test_map(backend, M, raw, ordered):
    raw = sorted(min(max(o, 0), M) for o in raw) if ordered else raw
    offs = torch.tensor(raw, dtype=torch.int32)
    token_tiles, groups = token_map(offs.to(backend.device), M, tile=32)
    expected, tiles_so_far = [], 0
    for g, group in enumerate(oracle.token_layout(offs.numpy(), M)):
        assert groups[g, :3].tolist() == [group.start, group.end, tiles_so_far]
        rows = [[g, first, group.end] for first in range(group.start, group.end, 32)]
        tiles_so_far += len(rows)
        expected += rows
    assert groups[len(raw), :3].tolist() == [max(0, *(min(max(o, 0), M) for o in raw)), M, tiles_so_far]
    assert token_tiles[:tiles_so_far, :3].tolist() == expected


@pytest.mark.parametrize("G", [1, 8, 19])
def test_everything_of_a_call_at_once(backend, G, monkeypatch):
    """Three maps are those made one by one, of more groups than a program looks at at once too; what is to be zero
    becomes so, from its first to its last element and no further."""
    monkeypatch.setattr(tiles, "LANES", 8)
    M, device = 5 * G, backend.device
    offs = torch.randint(-3, M + 3, (G,), generator=torch.Generator().manual_seed(G), dtype=torch.int32).to(device)
    offs[G // 2 :] = offs[G // 2 :].sort().values
    maps = {tile: tuple(torch.full_like(x, -7) for x in token_map(offs, M, tile)) for tile in (128, 2, 64)}
    memory = torch.full((4, 3 * tiles.BLOCK), -7, dtype=torch.int32, device=device)
    sizes = 2 * tiles.BLOCK + 5, 0, 1, tiles.BLOCK
    tiles.prepare(offs, M, maps, [row[:size] for row, size in zip(memory, sizes, strict=True)])
    for row, size in zip(memory, sizes, strict=True):
        assert not row[:size].any()
        assert (row[size:] == -7).all()
    for tile, (token_tiles, groups) in maps.items():
        layout = oracle.token_layout(offs.cpu().numpy(), M)
        first_tiles = torch.tensor([0] + [-(-(g.end - g.start) // tile) for g in layout]).cumsum(0).tolist()
        rows = [[g.start, g.end, first] for g, first in zip(layout, first_tiles, strict=False)]
        assert groups[:, :3].tolist() == [*rows, [layout[-1].end, M, first_tiles[-1]]]
        expected = [[i, first, g.end] for i, g in enumerate(layout) for first in range(g.start, g.end, tile)]
        assert token_tiles[: len(expected), :3].tolist() == expected
        assert (token_tiles[len(expected) :] == -7).all()


def test_more_than_a_launch_has_is_refused():
    offs = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(AssertionError, match="a launch makes 3"):
        tiles.prepare(offs, 0, dict.fromkeys((16, 32, 64, 128), (offs, offs)))
    with pytest.raises(AssertionError, match="a launch has 4"):
        tiles.prepare(offs, 0, {}, [offs] * 5)
