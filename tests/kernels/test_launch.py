"""Launching what Triton compiled, beside what Triton itself would launch. (Replaying: test_replay.py.)"""

import ast
import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.experimental.gluon.language import NVMMASharedLayout
from triton.runtime import JITFunction, driver, jit
from triton.tools.tensor_descriptor import TensorDescriptor

from tests.cuda_graphs import recording
from tests.kernels.fake_cuda import DTYPES, MEMORY, ONE, Driver, FakeCompiled, one
from xmoe.kernels import launch
from xmoe.kernels.launch import Descriptor


def five(a, b, c, d, e, BLOCK: tl.constexpr):
    pass


FIVE = JITFunction(five)
UNSPECIALISED = JITFunction(one, do_not_specialize=["x"])
BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))

TENSORS = [x[start:] for x in MEMORY.values() for start in (0, 1, 8, 16)]
DESCRIPTORS = [
    Descriptor(MEMORY[dtype].view(-1, 64), (8, size), (64, 1), block)
    for dtype, size, block in itertools.product(DTYPES[:3], (32, 64), ((1, 32), (8, 32), (32, 8)))
] + [
    Descriptor(MEMORY[dtype].view(-1, 64), (8, 64), (64, 1), (8, 32), NVMMASharedLayout(swizzle, 8 * dtype.itemsize, 2))
    for dtype, swizzle in itertools.product(DTYPES[:3], (0, 32))
]
INTEGERS = [
    *range(-17, 34), 2**31 - 16, 2**31 - 1, 2**31, 2**31 + 1, -(2**31), -(2**31) - 1, -(2**31) - 16, 2**32, 2**32 + 1,
    2**63 - 1, 2**63 - 16, 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 16, -(2**63),
]  # fmt: skip
ARGUMENTS = [None, *INTEGERS, *TENSORS, *DESCRIPTORS]


def key(kernel: JITFunction, *args: Any, **constants: Any) -> tuple[Any, ...]:
    """What `launch` tells kinds of arguments apart by."""
    launch._compiled.clear()
    launch.launch(kernel, (1,), *args, **constants)
    (found,) = launch._compiled
    return found


def specialisation(kernel: JITFunction, *args: Any, **constants: Any) -> str:
    """What Triton does."""
    binder = jit.create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    args = tuple(launch.described(arg) if isinstance(arg, Descriptor) else arg for arg in args)
    _, found, options = binder(*args, debug=False, **constants)
    return f"{found} {options}"


@pytest.mark.usefixtures("fake_gpu")
def test_the_key_tells_arguments_apart_as_triton_does():
    kinds = [(key(ONE, arg, BLOCK=1), specialisation(ONE, arg, BLOCK=1), arg) for arg in ARGUMENTS]
    assert len({kind for kind, *_ in kinds}) > 25
    for (kind, expected, x), (other, other_expected, y) in itertools.combinations(kinds, 2):
        assert (kind == other) == (expected == other_expected), f"{x} and {y}"


@pytest.mark.usefixtures("fake_gpu")
def test_the_key_tells_no_less_apart_where_triton_does_not_specialise():
    kinds = [(key(UNSPECIALISED, arg, BLOCK=1), specialisation(UNSPECIALISED, arg, BLOCK=1)) for arg in ARGUMENTS]
    for (kind, expected), (other, other_expected) in itertools.combinations(kinds, 2):
        assert kind != other or expected == other_expected


@given(*[st.tuples(*[st.sampled_from(ARGUMENTS)] * 5)] * 2, st.lists(st.booleans(), min_size=5, max_size=5))
def test_the_key_of_many_arguments(args, others, same):
    others = tuple(a if s else o for a, o, s in zip(args, others, same, strict=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", Driver())
        patch.setattr(launch, "_compiled", {})
        patch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: None)
        equal = key(FIVE, *args, BLOCK=1) == key(FIVE, *others, BLOCK=1)
    assert equal == (specialisation(FIVE, *args, BLOCK=1) == specialisation(FIVE, *others, BLOCK=1))


@pytest.mark.usefixtures("fake_gpu")
def test_the_key_holds_kernel_constants_options_and_device(monkeypatch):
    constants = [{"BLOCK": 1}, {"BLOCK": 2}, {"BLOCK": (1, 2)}, {"BLOCK": "x"}, {"BLOCK": 1, "num_warps": 2},
                 {"BLOCK": 1, "num_stages": 2}, {"BLOCK": 2, "num_warps": 1}]  # fmt: skip
    keys = [key(ONE, 3, **each) for each in constants] + [key(UNSPECIALISED, 3, BLOCK=1)]
    monkeypatch.setattr(Driver, "device", 1)
    keys.append(key(ONE, 3, BLOCK=1))
    assert len(set(keys)) == len(keys)


def test_what_is_launched_and_replayed_is_what_triton_would_launch():
    script = Path(__file__).with_name("replay_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_kernel_is_started_by_launch():
    """A replayed call would leave out the launches that `launch` does not see."""
    kernels, found = Path(launch.__file__).parent, []
    for path in sorted(kernels.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                found.append((path.name, ast.unparse(node.func)))
    assert found == [("launch.py", "kernel[grid]")]


# ------------------------------------------------------------------------------------------------- left to Triton


def test_the_second_launch_is_direct(fake_gpu, compiled):
    for x in (MEMORY[torch.int8], MEMORY[torch.int8][16:], MEMORY[torch.int8][1:]):
        launch.launch(ONE, (3, 2), x, BLOCK=1)
    address = MEMORY[torch.int8].data_ptr()
    assert compiled == [(3, 2, 1, Driver.stream, 5, (4, 1, 0), None, None, None, address + 16, None)]
    assert len(fake_gpu) == 2, "the unaligned tensor is of another kind"


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_see_every_launch(hook, fake_gpu, compiled, monkeypatch):
    launch.launch(ONE, (1,), 16, BLOCK=1)
    getattr(knobs.runtime, hook).add(test_hooks_see_every_launch)
    try:
        launch.launch(ONE, (1,), 16, BLOCK=1)
    finally:
        getattr(knobs.runtime, hook).remove(test_hooks_see_every_launch)
    monkeypatch.setattr(ONE, "pre_run_hooks", [print])
    launch.launch(ONE, (1,), 16, BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (3, 0)
    monkeypatch.setattr(ONE, "pre_run_hooks", [])
    launch.launch(ONE, (1,), 16, BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (3, 1)


def test_constants_of_a_module_are_no_obstacle(fake_gpu, compiled):
    kernel = JITFunction(reads_a_global)
    kernel.used_global_vals = {("x", 0): (tl.constexpr(1), {})}
    for _ in range(2):
        launch.launch(kernel, (1,), 16, BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (1, 1)


def test_an_unknown_triton_launches_itself(fake_gpu, compiled, monkeypatch):
    monkeypatch.setattr(launch, "KNOWN", False)
    monkeypatch.setattr(driver, "_active", None)  # would fail if it were asked for anything
    for _ in range(2):
        launch.launch(ONE, (1,), DESCRIPTORS[0], BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (2, 0)
    assert isinstance(fake_gpu[0][0], TensorDescriptor)


@pytest.mark.parametrize("arg", [True, 1.5, "x", (1, 2)])
def test_other_types_are_left_to_triton(arg, fake_gpu, compiled):
    for _ in range(2):
        launch.launch(ONE, (1,), arg, BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (2, 0)


def reads_a_global(x, BLOCK: tl.constexpr):
    pass


def constant_first(BLOCK: tl.constexpr, x):
    pass


@pytest.mark.parametrize("why", ["backend", "result", "globals", "constant first"])
def test_the_unexpected_is_left_to_triton(why, fake_gpu, compiled, monkeypatch, caplog):
    kernel = JITFunction(constant_first if why == "constant first" else reads_a_global)
    if why == "globals":
        kernel.used_global_vals = {("x", 0): (1, {})}
    if why in ("backend", "result"):
        result = FakeCompiled(kernel, compiled, "hip") if why == "backend" else None
        monkeypatch.setattr(JITFunction, "run", lambda self, *args, **_: fake_gpu.append(args) or result)
    with caplog.at_level("DEBUG", "xmoe.kernels.launch"):
        for _ in range(3):
            launch.launch(kernel, (1,), *([16] if why != "constant first" else [16, 16]), BLOCK=1)
    assert (len(fake_gpu), len(compiled)) == (3, 0)
    assert len(caplog.records) == 1


# ----------------------------------------------------------------------------------------------------------- on a GPU


@triton.jit(do_not_specialize=["rows"])
def copy_strided(x_ptr, out_ptr, stride_r, stride_c, rows, cols, bias, BLOCK: tl.constexpr):
    row, col = tl.program_id(0), tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * stride_r + col * stride_c, (row < rows) & (col < cols), 0)
    if bias is not None:
        x += tl.load(bias + col, col < cols, 0).to(x.dtype)
    tl.store(out_ptr + row * cols + col, x, (row < rows) & (col < cols))


@triton.jit
def copy_tiles(desc, out_ptr, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    tile = desc.load([tl.program_id(0) * ROWS, 0])
    offsets = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None] * cols + tl.arange(0, COLS)[None, :]
    tl.store(out_ptr + offsets, tile, (tl.arange(0, COLS) < cols)[None, :])


@pytest.mark.gpu
def test_direct_launches_on_a_gpu_give_the_bits_of_tritons(monkeypatch):
    """Divisible and indivisible, unaligned, 1 and None, four dtypes, over and over: the keys must not mix them up."""
    memory = torch.randint(-100, 100, (200_000,), device="cuda")
    dtypes = torch.float32, torch.bfloat16, torch.int8, torch.int32
    cases = list(itertools.product(dtypes, (1, 16, 17, 48), (0, 1, 4), (1, 2, 16), (False, True)))
    for dtype, cols, start, step, bias in cases * 2:
        x = memory.to(dtype)[start:]
        results = []
        for known in (True, False):
            monkeypatch.setattr(launch, "KNOWN", known)
            out = torch.full((33, cols), 77, dtype=dtype, device="cuda")
            args = x, out, 48 * step + start, step, 33, cols, memory.to(torch.int8) if bias else None
            launch.launch(copy_strided, (33,), *args, BLOCK=64, num_warps=1 + (cols > 16))
            results.append(out)
        assert torch.equal(*results), (dtype, cols, start, step, bias)
        want = x[: 33 * (48 * step + start)].view(33, -1)[:, : cols * step : step]
        assert torch.equal(results[0], want + (memory.to(torch.int8)[:cols].to(dtype) if bias else 0))


@pytest.mark.gpu
def test_descriptors_on_a_gpu_follow_their_tensor():
    for _ in range(2):
        for dtype, cols, rows in itertools.product((torch.bfloat16, torch.float32, torch.int8), (32, 64), (8, 16)):
            for x in torch.randint(-100, 100, (3, 32, 64), device="cuda").to(dtype):
                out = torch.empty(32, cols, dtype=dtype, device="cuda")
                desc = Descriptor(x, (32, cols), (64, 1), (rows, cols))
                launch.launch(copy_tiles, (32 // rows,), desc, out, cols, ROWS=rows, COLS=cols)
                assert torch.equal(out, x[:, :cols])


@pytest.mark.gpu
def test_launches_go_to_the_current_stream():
    stream, x = torch.cuda.Stream(), torch.arange(16, dtype=torch.int32, device="cuda")
    out = torch.zeros(16, dtype=torch.int32, device="cuda")
    args = copy_strided, (1,), x, out, 16, 1, 1, 16, None
    launch.launch(*args, BLOCK=64)
    launch.launch(*args, BLOCK=64)
    torch.cuda.synchronize()
    out.zero_()
    graph = torch.cuda.CUDAGraph()
    with recording(graph, stream):  # which fails if a launch goes elsewhere, or captures nothing
        launch.launch(*args, BLOCK=64)
    torch.cuda.synchronize()
    assert not out.any(), "a captured launch ran"
    graph.replay()
    assert torch.equal(out, x)


@pytest.mark.gpu
def test_a_second_gpu_has_kernels_of_its_own():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for device in (0, 1, 0, 1):
        with torch.cuda.device(device):
            x = torch.arange(64, dtype=torch.int32, device="cuda")
            out = torch.empty_like(x)
            launch.launch(copy_strided, (1,), x, out, 64, 1, 1, 64, None, BLOCK=64)
            assert torch.equal(out, x)
