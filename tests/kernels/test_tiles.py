"""The tile map: every token of a group once, in order, whatever the offsets hold."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.kernels.test_quantize import token_map
from xmoe import oracle


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
