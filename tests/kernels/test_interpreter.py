"""The faster interpreter of tests/interpreter.py: what it keeps does not outlive its use, and nothing else differs."""

import pytest
import torch

from tests.kernels.backends import INTERPRETER_WORKS
from xmoe.kernels import e4m3

pytestmark = pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")

if not e4m3.HARDWARE:
    import triton
    import triton.language as tl
    from triton.runtime.errors import InterpreterError

    @triton.jit
    def _twice(x):
        return x + x

    @triton.jit
    def _sums(x_ptr, sums_ptr, N: tl.constexpr):
        """Sums of the rows, doubled, of x [2, N]: device functions of this module and of Triton's, in a loop."""
        for i in range(2):
            x = tl.load(x_ptr + i * N + tl.arange(0, N))
            tl.store(sums_ptr + i, tl.sum(_twice(x), 0))


@pytest.fixture
def x() -> torch.Tensor:
    return torch.arange(32, dtype=torch.int32).view(2, 16)


def test_every_launch_leaves_the_language_as_it_was(x):
    before = {name: getattr(tl, name) for name in ("load", "arange", "static_range", "dot")}
    methods = {name: getattr(tl.tensor, name, None) for name in ("__add__", "__index__", "T")}
    for factor in (1, 3):
        sums = torch.empty(2, dtype=torch.int32)
        _sums[(1,)](x * factor, sums, 16)
        assert sums.tolist() == (2 * factor * x.sum(1)).tolist()
        assert before == {name: getattr(tl, name) for name in before}
        assert methods == {name: getattr(tl.tensor, name, None) for name in methods}


def test_what_raises_raises_again_and_leaves_nothing_behind(x):
    sums = torch.zeros(2, dtype=torch.int32)
    for _ in range(2):
        with pytest.raises(InterpreterError, match="power of 2"):
            _sums[(1,)](x, sums, 15)
    assert not sums.any()
    _sums[(1,)](x, sums, 16)
    assert sums.tolist() == [240, 752]


def test_types_are_told_apart():
    """Kept types differ where their elements or their shapes do, and a tensor has its own type and handle."""
    makes = [lambda e=e, s=s: tl.block_type(e, s) for e in (tl.int32, tl.float32) for s in ([4], [2, 2], [8])]
    types = [make() for make in makes]
    assert [(t.element_ty, tuple(t.shape)) for t in types] == [
        (e, s) for e in (tl.int32, tl.float32) for s in ((4,), (2, 2), (8,))
    ]
    for _ in range(2):
        with pytest.raises(ValueError, match="power of 2"):
            tl.block_type(tl.int32, [3])
    assert all(make() == t for make, t in zip(makes, types, strict=True))
    tensors = [tl.tensor(handle, t) for handle in ("first", "second") for t in types]
    assert [(t.handle, t.type) for t in tensors] == [(handle, t) for handle in ("first", "second") for t in types]
    for t in tensors:
        assert [length.value for length in t.shape] == list(t.type.shape)
        assert t.numel.value == t.type.numel
