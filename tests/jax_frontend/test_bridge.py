"""The bridge on a CPU: the PyTorch emulation, bit for bit, on XLA's buffers; and what it says when it cannot run."""

import functools
import logging
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.jax_frontend.values import bytes_of, values
from xmoe import shapes
from xmoe.config import RECIPES, FP8GroupedMMConfig, config_from_recipe
from xmoe.jax_frontend import bridge, plan, ragged_dot
from xmoe.jax_frontend.plan import make_plan
from xmoe.kernels import emulation
from xmoe.kernels.dispatch import Device
from xmoe.operands import FORMATS, QuantizedOperand


def reference(A: torch.Tensor, B: torch.Tensor, dOut: torch.Tensor, offs: torch.Tensor, recipe: str) -> list:
    """out, dA, dB straight from the emulated kernels."""
    config, fmt = config_from_recipe(recipe), config_from_recipe(recipe).format
    if fmt == "bf16":
        gemms = [emulation.grouped_mm_bf16(A, B, offs, A.dtype), emulation.grouped_mm_bf16(dOut, B.mT, offs, A.dtype)]
    else:
        pairs = ((A, "K"), (dOut, "N"))
        operands = [(emulation.quantize_rows(x, fmt), emulation.quantize_weights(B, axis, fmt)) for x, axis in pairs]
        gemms = [emulation.grouped_mm(a, b, offs, A.dtype) for a, b in operands]
    if fmt == "bf16" or config.wgrad_with_hp:
        return [*gemms, emulation.grouped_mm_tokens_bf16(A, dOut, offs, B.dtype)]
    tokens = [emulation.quantize_tokens(x, offs, fmt) for x in (A, dOut)]
    return [*gemms, emulation.grouped_mm_tokens(*tokens, offs, B.dtype)]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("transposed", [False, True], ids=["GKN", "GNK"])
def test_is_the_pytorch_emulation(recipe: str, transposed: bool) -> None:
    M, N, K, G = 100, 80, 48, 4
    sizes = shapes.group_sizes("short", M, G)
    A, B, dOut = (jnp.asarray(values("normal", s, i), jnp.bfloat16) for i, s in enumerate([(M, K), (G, K, N), (M, N)]))

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, dout: jax.Array) -> tuple[jax.Array, ...]:
        options = {"config": recipe, "transpose_rhs": transposed, "implementation": "bridge"}
        out, vjp = jax.vjp(lambda a, b: ragged_dot(a, b, jnp.asarray(sizes), **options), lhs, rhs)
        return out, *vjp(dout)

    rhs = B.swapaxes(1, 2) if transposed else B
    out, dlhs, drhs = run(A, rhs, dOut)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a callback: the split of a GEMM over threads may change the order of its sums
    try:
        tA, tB, tdOut = (torch.from_dlpack(x) for x in (A, rhs, dOut))
        want = reference(
            tA, tB.mT if transposed else tB, tdOut, torch.from_numpy(np.cumsum(sizes, dtype=np.int32)), recipe
        )
    finally:
        torch.set_num_threads(threads)
    for name, got, expected in zip(("out", "dlhs", "drhs"), (out, dlhs, drhs), want, strict=True):
        got = got.swapaxes(1, 2) if transposed and name == "drhs" else got
        np.testing.assert_array_equal(bytes_of(got), bytes_of(expected), err_msg=name)


@pytest.mark.parametrize("fmt", FORMATS)
def test_what_the_forward_saves_is_the_wgrad_operand(fmt: str) -> None:
    A, B = jnp.asarray(values("poisoned", (100, 48))), jnp.ones((3, 48, 16))
    sizes = jnp.array([40, 0, 50], jnp.int32)
    static = make_plan(A, B, sizes, None, fmt, False, "bridge")
    _, saved, _ = jax.jit(functools.partial(bridge.forward, static, save=True))(
        A, B, jnp.cumsum(sizes, dtype=jnp.int32)
    )
    want = emulation.quantize_tokens(torch.from_dlpack(A), torch.tensor([40, 40, 90], dtype=torch.int32), fmt)
    assert isinstance(want, QuantizedOperand)
    np.testing.assert_array_equal(bytes_of(saved[0]), bytes_of(want.data))
    np.testing.assert_array_equal(bytes_of(saved[1]), bytes_of(want.scale))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32", "float8_e4m3fn", "float8_e8m0fnu"])
def test_arrays_cross_without_a_copy(dtype: str) -> None:
    array = jax.lax.bitcast_convert_type(jnp.arange(64, dtype=jnp.uint8).reshape(8, 8), jnp.uint8)
    array = jax.lax.bitcast_convert_type(array, dtype) if jnp.dtype(dtype).itemsize == 1 else array.astype(dtype)
    tensor = bridge.torch_from_jax(array)
    assert str(tensor.dtype) == f"torch.{dtype}"
    assert tensor.data_ptr() == array.unsafe_buffer_pointer()
    np.testing.assert_array_equal(bytes_of(tensor), bytes_of(array))


def test_one_callback_serves_all_calls_of_a_configuration() -> None:
    A, B, sizes = jnp.ones((32, 16)), jnp.ones((2, 16, 16)), jnp.array([16, 16], jnp.int32)
    plans = [make_plan(A, B, sizes, None, "fp8_rowwise", False, "bridge") for _ in range(2)]
    assert bridge._forward_call(plans[0], True) is bridge._forward_call(plans[1], True)

    traces = []

    @jax.jit
    def run(A: jax.Array) -> jax.Array:
        traces.append(A)
        return ragged_dot(A, B, sizes, config="fp8_rowwise", implementation="bridge")

    for _ in range(3):
        run(A)
    assert len(traces) == 1


def test_callbacks_leave_torchs_threads_alone() -> None:
    before = torch.get_num_threads()
    A, B, sizes = jnp.ones((32, 16)), jnp.ones((2, 16, 16)), jnp.array([16, 16], jnp.int32)
    jax.block_until_ready(ragged_dot(A, B, sizes, implementation="bridge"))
    assert torch.get_num_threads() == before


def test_callbacks_that_overlap_leave_torchs_threads_alone() -> None:
    def begin() -> int:
        bridge._one_thread.__enter__()
        return torch.get_num_threads()

    def end() -> int:
        bridge._one_thread.__exit__()
        return torch.get_num_threads()

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as a, ThreadPoolExecutor(1) as b, ThreadPoolExecutor(1) as later:
            steps = ((a, begin), (b, begin), (a, end), (b, end), (later, torch.get_num_threads))
            assert [thread.submit(step).result() for thread, step in steps] == [1, 1, 3, 3, 3]
    finally:
        torch.set_num_threads(before)


A, B, SIZES = jnp.ones((32, 16)), jnp.ones((2, 16, 16)), jnp.array([16, 16], jnp.int32)


def arguments(**changes: object) -> dict:
    return {"preferred_element_type": None, "config": None, "transpose_rhs": False, "implementation": None} | changes


@pytest.fixture
def gpu_for_jax_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX believes to be on a GPU, and torch is built without CUDA."""
    monkeypatch.setattr(plan, "platform", lambda: "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    plan._warn_once.cache_clear()


@pytest.mark.usefixtures("gpu_for_jax_alone")
def test_a_gpu_without_cuda_in_torch_falls_back_to_jax_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for options in ({"config": "mxfp8_emulated_rceil"}, {"implementation": "jax"}):
            assert make_plan(A, B, SIZES, **arguments(**options)).engine == "jax"
        assert not caplog.records
        for recipe in ("fp8_rowwise", "mxfp8_rceil"):
            assert make_plan(A, B, SIZES, **arguments(config=recipe)).engine == "jax"
    (record,) = caplog.records
    assert "built without CUDA; reinstall it from PyPI" in record.getMessage()


@pytest.mark.usefixtures("gpu_for_jax_alone")
@pytest.mark.parametrize("preference", ["triton", "torch"])
def test_a_gpu_without_cuda_in_torch_refuses_kernels_asked_for(preference: str) -> None:
    config = FP8GroupedMMConfig(kernel_preference=preference)
    with pytest.raises(ValueError, match=f"kernel_preference={preference} .* reinstall .* kernel_preference=auto"):
        make_plan(A, B, SIZES, **arguments(config=config))
    with pytest.raises(ValueError, match=r"implementation='bridge' .* reinstall .* implementation='jax'"):
        make_plan(A, B, SIZES, **arguments(implementation="bridge"))


@pytest.mark.usefixtures("gpu_for_jax_alone")
def test_a_driver_too_old_for_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ValueError, match=r"finds no GPU for its CUDA 13\.0; update the GPU's driver"):
        make_plan(A, B, SIZES, **arguments(implementation="bridge"))


@pytest.fixture
def gpu_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Device], None]:
    """Makes JAX and torch believe in a GPU."""

    def pretend(device: Device) -> None:
        monkeypatch.setattr(plan, "platform", lambda: "gpu")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(bridge, "_device", lambda platform: device)
        plan._warn_once.cache_clear()

    return pretend


def test_a_gpu_without_triton_is_named(gpu_of: Callable[[Device], None]) -> None:
    gpu_of(Device("cuda", (9, 0), triton=False))
    for options in ({}, {"implementation": "bridge"}, {"config": FP8GroupedMMConfig(kernel_preference="triton")}):
        with pytest.raises(ImportError, match=r"need Triton, .*: pip install triton, or .* implementation='jax'"):
            make_plan(A, B, SIZES, **arguments(**options))
    assert make_plan(A, B, SIZES, **arguments(implementation="jax")).engine == "jax"
    assert make_plan(A, B, SIZES, **arguments(config="mxfp8_emulated_rceil")).engine == "jax"


def test_a_gpu_too_old_for_the_kernels_falls_back_to_jax_and_says_so_once(
    gpu_of: Callable[[Device], None], caplog: pytest.LogCaptureFixture
) -> None:
    gpu_of(Device("cuda", (8, 0)))
    with caplog.at_level(logging.WARNING):
        for recipe in ("fp8_rowwise", "mxfp8_rceil"):
            assert make_plan(A, B, SIZES, **arguments(config=recipe)).engine == "jax"
    (record,) = caplog.records
    assert "sm_80 has no fp8 tensor cores; an NVIDIA GPU of compute capability 8.9 or higher" in record.getMessage()
    with pytest.raises(ValueError, match="kernel_preference=triton cannot run fp8_rowwise on sm_80"):
        make_plan(A, B, SIZES, **arguments(config=FP8GroupedMMConfig(kernel_preference="triton")))


@pytest.mark.parametrize("make", ["ragged_dot", "wgrad", "experts"])
def test_a_tpu_has_no_bridge(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "platform", lambda: "tpu")
    calls = {
        "ragged_dot": lambda *rest: make_plan(A, B, SIZES, None, rest[0], False, rest[1]),
        "wgrad": lambda *rest: plan.make_wgrad_plan(A, A, SIZES, None, rest[0], False, rest[1]),
        "experts": lambda *rest: plan.make_experts_plan(A, B, B, B, SIZES, *rest),
    }
    assert calls[make](None, None).engine == "jax"
    with pytest.raises(ValueError, match="implementation='bridge' runs on GPU and CPU, not on tpu; use implementation"):
        calls[make](None, "bridge")
    with pytest.raises(ValueError, match=r"kernel_preference=triton asks for GPU kernels, but .* a TPU; use"):
        calls[make](FP8GroupedMMConfig(kernel_preference="triton"), None)


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in {blocked!r}):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Block())
"""


def run_without(blocked: tuple[str, ...], code: str) -> subprocess.CompletedProcess[str]:
    program = BLOCKED.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)


def test_without_jax_the_import_says_what_to_install() -> None:
    done = run_without(("jax",), "import xmoe\nimport xmoe.jax_frontend")
    assert done.returncode != 0
    assert "ImportError: xmoe.jax_frontend needs jax (No module named 'jax'): pip install" in done.stderr


def test_without_torch_or_flax_the_rest_works() -> None:
    code = """
import jax, jax.numpy as jnp
import xmoe.jax_frontend as xj
A, B, sizes = jnp.ones((32, 16)), jnp.ones((2, 16, 16)), jnp.array([16, 16], jnp.int32)
dot = jax.jit(lambda a, b, s: xj.ragged_dot(a, b, s, config="mxfp8_rceil"))
assert dot(A, B, sizes).shape == (32, 16), "the pure-JAX path needs neither"
bridge = lambda: xj.ragged_dot(A, B, sizes, implementation="bridge")
for use, missing, fix in ((bridge, "torch", "torch>=2.11"), (lambda: xj.MoE, "flax", "xmoe[flax]")):
    try:
        use()
    except ImportError as error:
        assert f"No module named '{missing}'" in str(error), error
        assert fix in str(error), error
    else:
        raise SystemExit("no ImportError")
"""
    done = run_without(("torch", "flax", "triton"), code)
    assert done.returncode == 0, done.stderr


def test_weights_go_to_torch_without_the_kernels() -> None:
    done = run_without(
        ("xmoe.kernels",),
        "import jax.numpy as jnp\nfrom xmoe.jax_frontend import to_torch\nprint(to_torch({'w': jnp.ones(2)}))",
    )
    assert "tensor([1., 1.])" in done.stdout, done.stderr
