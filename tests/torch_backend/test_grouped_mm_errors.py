"""What `scaled_grouped_mm` says of arguments that do not fit, and the offsets that a test or a user may draw."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.torch_backend.test_grouped_mm import FP8, numpy, problem
from xmoe.config import FP8GroupedMMConfig, GroupedMMConfig
from xmoe.torch_backend import generate_jagged_offs, scaled_grouped_mm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda A, B, offs: (A[0], B, offs), r"A has shape \(64,\); flatten the leading dimensions to \[M, K\]"),
        (lambda A, B, offs: (A, B[0], offs), r"B_t has shape \(64, 48\); give expert weights \[G, K, N\]"),
        (lambda A, B, offs: (A.half(), B, offs), r"A is torch.float16; cast it to torch.bfloat16 or torch.float32"),
        (lambda A, B, offs: (A, B.double(), offs), r"B_t is torch.float64; cast it"),
        (
            lambda A, B, offs: (A, B.mT, offs),
            r"A has K=64 columns and B_t \(4, 48, 64\) has K=48; .*transpose\(-2, -1\)",
        ),
        (lambda A, B, offs: (A, B[..., :0], offs), r"N=0 is not a positive multiple of 16; pad it to 16"),
        (lambda A, B, offs: (A, B[..., :30], offs[:2]), r"offs has shape \(2,\)"),
        (lambda A, B, offs: (A, B, offs.long()), r"offs is torch.int64; cast it with offs.to\(torch.int32\)"),
        (lambda A, B, offs: (A, B, offs[:3]), r"offs has shape \(3,\); give one end row for each of the G=4 groups"),
        (lambda A, B, offs: (A, B, offs[None]), r"offs has shape \(1, 4\)"),
        (lambda A, B, offs: (A, B, offs.to("meta")), r"are on cpu, cpu, meta; move them to one device"),
        (lambda A, B, offs: (A, B[:0], offs[:0]), r"give at least one group"),
    ],
)
@pytest.mark.parametrize("fake", [False, True])
def test_bad_arguments(change: Callable[..., Any], message: str, fake: bool) -> None:
    """The same message from a call and from tracing, which has the fake implementation see it."""
    A, W, offs = problem()
    args = change(A.detach(), W.detach().mT, offs)
    if fake:
        with torch._subclasses.FakeTensorMode() as mode:
            fakes = [mode.from_tensor(x) for x in args]
            with pytest.raises(ValueError, match=message):
                scaled_grouped_mm(*fakes, FP8)
    else:
        with pytest.raises(ValueError, match=message):
            scaled_grouped_mm(*args, FP8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda A, B, offs: (A, B, None), r"offs is None; give a torch.Tensor: int32 \[G\], the end row of each group"),
        (lambda A, B, offs: (A, B, [1, 2]), r"offs is list; give a torch.Tensor: int32"),
        (lambda A, B, offs: (numpy(A), B, offs), r"A is ndarray; give a torch.Tensor"),
        (lambda A, B, offs: (A, numpy(B), offs), r"B_t is ndarray; give a torch.Tensor"),
        (lambda A, B, offs: (A, B, offs, 3), r"config=3 is not a config; give a GroupedMMConfig or one of bf16"),
    ],
)
def test_arguments_of_the_wrong_type(change: Callable[..., Any], message: str) -> None:
    A, W, offs = problem()
    with pytest.raises(ValueError, match=message):
        scaled_grouped_mm(*change(A, W.mT, offs))


@pytest.mark.parametrize(
    ("offs", "message"),
    [
        ((30, 20, 70, 90), r"offs\[1\]=20 is less than offs\[0\]=30; give cumulative sums"),
        ((30, 30, 70, 101), r"offs\[3\]=101 is outside \[0, M=100\]"),
        ((-1, 30, 70, 90), r"offs\[0\]=-1 is outside \[0, M=100\]"),
    ],
)
def test_debug_checks_the_offsets(offs: tuple[int, ...], message: str) -> None:
    A, W, ends = problem(offs=offs)
    with pytest.raises(ValueError, match=message):
        scaled_grouped_mm(A, W.mT, ends, FP8GroupedMMConfig(debug=True))
    assert scaled_grouped_mm(A, W.mT, ends, FP8).isfinite().all()  # else: data, read as docs/design.md says


def test_preference_that_the_device_lacks() -> None:
    A, W, offs = problem()
    config: GroupedMMConfig = FP8GroupedMMConfig(kernel_preference="triton")
    with pytest.raises(ValueError, match="kernel_preference=triton cannot run fp8_rowwise on cpu"):
        scaled_grouped_mm(A, W.mT, offs, config)


@pytest.mark.parametrize("multiple_of", [1, 32])
def test_jagged_offs(multiple_of: int) -> None:
    offs = generate_jagged_offs(8, 256, multiple_of)
    assert (offs.dtype, offs.shape, offs[-1].item()) == (torch.int32, (8,), 256)
    assert (offs.diff() >= 0).all()
    assert not (offs % multiple_of).any()
    with pytest.raises(ValueError, match="M=100 is not a multiple of multiple_of=32"):
        generate_jagged_offs(8, 100, 32)
    with pytest.raises(ValueError, match="E=0"):
        generate_jagged_offs(0, 100)
    with pytest.raises(ValueError, match="M=-32 rows; give 0 or more"):
        generate_jagged_offs(8, -32, 32)
    with pytest.raises(ValueError, match="multiple_of=0; give at least 1"):
        generate_jagged_offs(8, 100, 0)
