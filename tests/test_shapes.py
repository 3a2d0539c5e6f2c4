"""The shape table's group patterns do what their names say, for every M and G."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from xmoe import shapes


@given(st.sampled_from(tuple(shapes.PATTERNS)), st.integers(0, 10**6), st.integers(1, 200), st.integers(0, 9))
def test_sizes_fit_and_repeat(pattern, M, G, seed):
    sizes = shapes.group_sizes(pattern, M, G, seed=seed)
    assert sizes.dtype == np.int32
    assert sizes.shape == (G,)
    assert sizes.min() >= 0
    assert sizes.sum(dtype=np.int64) <= M
    np.testing.assert_array_equal(sizes, shapes.group_sizes(pattern, M, G, seed=seed))
    offs = shapes.offsets(pattern, M, G, seed=seed)
    assert offs.dtype == np.int32
    np.testing.assert_array_equal(np.diff(offs, prepend=0), sizes)


def test_patterns():
    M, G = 1003, 8
    sizes = {pattern: shapes.group_sizes(pattern, M, G).tolist() for pattern in shapes.PATTERNS}
    assert sizes["even"] == [126, 126, 126, 125, 125, 125, 125, 125]
    assert len(set(sizes["uneven"])) > 4
    assert sum(sizes["uneven"]) == sum(sizes["empty"]) == M
    assert sizes["empty"][::2] == [0] * 4
    assert sizes["one"] == [0, 0, 0, 0, M, 0, 0, 0]
    assert sum(sizes["short"]) == 802
    assert sizes["single_rows"] == [1] * 8


def test_table():
    assert len(shapes.ALL) == len(shapes.MODELS) + len(shapes.SMALL)  # names are unique
    assert shapes.ALL["llama4_g16"] == ("llama4_g16", 128000, 8192, 5120, 16)
    assert shapes.ALL["deepseek_v3_g32"][1:] == (128000, 2048, 7168, 32)
    assert shapes.ALL["llama4_g1"].flops == 2 * 128000 * 8192 * 5120
    assert all(shape.N % 16 == 0 and shape.K % 16 == 0 for shape in shapes.ALL.values())


def test_wrong_arguments():
    with pytest.raises(ValueError, match="pattern='odd' is not known; use one of even, uneven"):
        shapes.group_sizes("odd", 1, 1)
    with pytest.raises(ValueError, match="G=0"):
        shapes.group_sizes("even", 1, 0)
