"""xmoe.testing: what it finds, and that it finds what is wrong."""

import functools
import math
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import xmoe.jax_frontend as xj
import xmoe.torch_backend as xt
from xmoe import oracle, testing
from xmoe.config import config_from_recipe
from xmoe.testing import (
    GEMM_KINDS,
    KINDS,
    SMALL,
    as_numpy,
    assert_same_bytes,
    assert_sqnr,
    awkward,
    check_grouped_mm,
    check_ragged_dot,
    compare,
    gemm,
    values,
)  # fmt: skip

FEW: dict[str, Any] = {"shapes": SMALL[4:6], "patterns": ("uneven", "short", "empty")}


def test_it_loads_neither_framework() -> None:
    code = "import sys, xmoe.testing; print(sorted({'torch', 'jax', 'flax', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


# ---------------------------------------------------------------------------------------------------------- comparisons


def test_equal_arrays_of_three_frameworks() -> None:
    x = values("bits", (5, 6)).astype(ml_dtypes.bfloat16)
    tensor = torch.from_numpy(x.view(np.uint16).copy()).view(torch.bfloat16)
    for other in (x.copy(), tensor, jnp.asarray(x)):
        found = compare(x, other)
        assert (found.equal, found.different, found.sqnr_db, found.worst) == (True, 0, math.inf, None)
        assert str(found) == "equal, 30 elements"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"])
def test_torch_tensors_keep_their_bytes(dtype: str) -> None:
    tensor = torch.arange(24, dtype=torch.uint8).view(getattr(torch, dtype)).reshape(2, -1).T
    array = as_numpy(tensor)
    assert (array.dtype.name, array.shape) == (dtype, tuple(tensor.shape))
    assert array.T.tobytes() == bytes(range(24))
    assert as_numpy(torch.zeros(0, 3)).shape == (0, 3)
    assert as_numpy(torch.tensor(2.0)).shape == ()


def test_worst_element() -> None:
    a = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    b = a.copy()
    b[1, 0], b[0, 2] = 4.5, 3.25
    found = compare(a, b)
    assert (found.different, found.size, found.worst, found.values) == (2, 6, (1, 0), (4.0, 4.5))
    assert found.bytes == ("40800000", "40900000")
    assert found.sqnr_db == pytest.approx(oracle.sqnr(a, b))
    assert str(found).endswith("worst [1, 0]: 4 (0x40800000) and 4.5 (0x40900000)")


def test_a_nan_in_one_alone_is_the_worst() -> None:
    a = np.array([1, 2, np.nan, 3e38], np.float32)
    b = np.array([1, np.nan, np.nan, -3e38], np.float32)
    found = compare(a, b)
    assert (found.worst, found.sqnr_db, found.different) == ((1,), -math.inf, 2)


def test_nans_of_other_bits() -> None:
    a, b = (np.array([0x7FC00000 + i, 0], np.uint32).view(np.float32) for i in (0, 1))
    assert compare(a, b).different == 1
    assert compare(a, b, any_nan=True).equal


def test_signs_of_zeros() -> None:
    found = compare(np.float32([0, 1]), np.float32([-0.0, 1]))
    assert (found.equal, found.different, found.worst, found.sqnr_db) == (False, 1, (0,), math.inf)


def test_other_dtypes_compare_by_value() -> None:
    a, b = np.float64([1, 2]), np.array([1, 2], ml_dtypes.bfloat16)
    assert (compare(a, b).equal, compare(a, b).different) == (False, 0)
    assert compare(a + np.array([0, 1e-3]), b).worst == (1,)


def test_shapes_must_be_equal() -> None:
    with pytest.raises(ValueError, match=r"b has shape \(2,\) and a \(3,\); give arrays of one shape"):
        compare(np.zeros(3), np.zeros(2))


def test_same_bytes_of_operands() -> None:
    x = awkward((30, 64))
    want = oracle.quantize_rows(x, "mxfp8_rceil")
    assert_same_bytes(oracle.quantize_rows(x, "mxfp8_rceil"), want)
    with pytest.raises(AssertionError, match=r"mine data, wanted and got: .* elements differ"):
        assert_same_bytes(oracle.quantize_rows(x[::-1], "mxfp8_rceil"), want, "mine")
    with pytest.raises(AssertionError, match="not 'K' and 'mxfp8_rceil'"):
        assert_same_bytes(oracle.quantize_rows(x, "mxfp8_floor"), want)
    with pytest.raises(AssertionError, match="got is ndarray, not a QuantizedOperand"):
        assert_same_bytes(want.data, want)
    with pytest.raises(AssertionError, match="the array is float32, not float64"):
        assert_same_bytes(np.zeros(2, np.float32), np.zeros(2))


def test_sqnr_of_every_group() -> None:
    reference = values("normal", (100, 16)).astype(np.float64)
    got = reference.copy()
    got[:3] *= 1e-3  # a dead small expert
    reference[:3], offs = reference[:3] * 1e-3, np.array([3, 100])
    got[:3] *= 1e-3
    assert assert_sqnr(got, reference) > 50
    with pytest.raises(AssertionError, match="the array, group 0 alone, is less than 50 dB away"):
        assert_sqnr(got, reference, offs=offs)


# --------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind: str) -> None:
    x = values(kind, (40, 8), seed=1)
    assert (x.dtype, x.shape) == (np.float32, (40, 8))
    assert_same_bytes(values(kind, (40, 8), seed=1), x)
    assert kind == "zero" or not np.array_equal(values(kind, (40, 8), seed=2), x)
    assert np.isfinite(x).all() == (kind not in ("bits", "poisoned", "awkward"))


def test_awkward_rows() -> None:
    x = awkward((30, 16))
    assert (x[1] == 0).all()
    assert np.signbit(x[4][x[4] == 0]).any()
    assert (np.abs(x[10]) < np.finfo(np.float32).tiny * 10).all()
    assert (x[13] == np.float32(3e38)).all()
    assert np.isnan(x[22]).sum() == np.isinf(x[24]).sum() == 1
    assert np.isfinite(awkward((30, 16), poison=False)).all()


@pytest.mark.parametrize("kind", GEMM_KINDS)
def test_gemm_inputs_stay_in_range(kind: str) -> None:
    inputs = gemm(SMALL[2], "short", kind, dtype="float32")
    out = oracle.forward(inputs.A, inputs.B, inputs.offs, config_from_recipe("bf16"))
    finite = out[np.isfinite(out) & (out != 0)]
    assert ((np.abs(finite) > 1e-38) & (np.abs(finite) < 3e38)).all()
    assert np.isfinite(out).all() == (kind != "poisoned")
    assert (np.cumsum(inputs.group_sizes) == inputs.offs).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: values("odd", (2, 2)), "kind='odd' is not known; use one of normal, wide"),
        (lambda: gemm(SMALL[0], kind="odd"), "kind='odd' is not known; use one of normal, tiny"),
        (lambda: gemm(SMALL[0], dtype="float16"), "dtype='float16' is not supported; use 'bfloat16' or 'float32'"),
        (lambda: check_grouped_mm(max, "bf16", framework="mlx"), "framework='mlx' is not known; use one of numpy"),
        (lambda: check_grouped_mm(max, "bf16", shapes="llama4"), "shapes has 'l' in it; give Shapes, your own or of"),
        (lambda: check_grouped_mm(max, "bf16", shapes=()), "shapes is empty, so nothing would be checked"),
        (lambda: check_grouped_mm(max, "bf16", kinds=[]), "kinds is empty"),
    ],
)
def test_wrong_arguments(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------------ a user's grouped GEMM


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_floor_wgrad_with_hp"])
def test_ours_in_torch_holds(recipe: str) -> None:
    least = check_grouped_mm(functools.partial(xt.scaled_grouped_mm, config=recipe), recipe, kinds=GEMM_KINDS, **FEW)
    assert set(least) == {"out", "dA", "dB"}
    assert min(least.values()) >= testing.KERNEL_TIER


def test_ours_in_jax_holds() -> None:
    dot = jax.jit(functools.partial(xj.ragged_dot, config="fp8_blockwise"))
    assert set(check_ragged_dot(dot, "fp8_blockwise", shapes=SMALL[4:5], patterns=("short",))) == {"out", "dA", "dB"}


def _numpy(config: Any) -> tuple[Any, Any]:
    def forward(A: Any, B: Any, offs: Any) -> Any:
        return oracle.forward(A, B, offs, config).astype(A.dtype)

    def backward(dOut: Any, A: Any, B: Any, offs: Any) -> tuple[Any, Any]:
        return oracle.dgrad(dOut, B, offs, config).astype(A.dtype), oracle.wgrad(A, dOut, offs, config).astype(B.dtype)

    return forward, backward


def test_numpy_functions_with_a_backward_of_their_own() -> None:
    forward, backward = _numpy(config_from_recipe("mxfp8_rceil"))
    assert set(check_grouped_mm(forward, "mxfp8_rceil", backward, framework="numpy", **FEW)) == {"out", "dA", "dB"}
    assert set(check_grouped_mm(forward, "mxfp8_rceil", framework="numpy", **FEW)) == {"out"}


def _spoil(array: Any, at: Any, value: Any) -> Any:
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda out, dA, dB, g: (out.astype(np.float32), dA, dB), "out of .* is float32, not bfloat16"),
        (lambda out, dA, dB, g: (_spoil(out, slice(g.offs[-1], None), 1), dA, dB), "past the last group are not zeros"),
        (lambda out, dA, dB, g: (out, dA, _spoil(dB, g.group_sizes == 0, 1)), "without tokens has a gradient"),
        (lambda out, dA, dB, g: (out, dA * dA.dtype.type(1.02), dB), "dA of .* is less than 50 dB from the reference"),
        (lambda out, dA, dB, g: (_spoil(out, (0, 0), np.nan), dA, dB), "out of .* -inf dB"),
        (lambda out, dA, dB, g: (out, dA, dB[..., :8]), r"has shape \(5, 16, 8\), not \(5, 16, 16\)"),
    ],
)
def test_what_is_wrong_is_found(wrong: Any, message: str) -> None:
    forward, backward = _numpy(config_from_recipe("fp8_rowwise"))
    shape = SMALL[4]
    pattern = "empty" if "tokens" in message else "short"
    inputs = gemm(shape, pattern)
    results = forward(inputs.A, inputs.B, inputs.offs), *backward(inputs.dOut, *inputs[:3])
    out, *gradients = wrong(*results, inputs)
    only = {"shapes": [shape], "patterns": [pattern], "kinds": ["normal"]}
    with pytest.raises(AssertionError, match=message):
        check_grouped_mm(lambda *_: out, "fp8_rowwise", lambda *_: gradients, framework="numpy", **only)


@pytest.mark.parametrize(
    ("out", "gradients", "message"),
    [
        (None, None, r"out of .* is a NoneType, not an array of shape \(\d+, \d+\)"),
        ("half", None, r"out of .* has shape \(\d+, 8\), not"),
        ("whole", None, r"backward of .* gives a NoneType, not \(dA, dB\)"),
        ("whole", (None, None), r"dA of .* is a NoneType, not an array of shape"),
        ("whole", [np.zeros((3, 3))] * 3, r"backward of .* gives a list, not \(dA, dB\)"),
    ],
)
@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_what_is_no_result_is_found(out: Any, gradients: Any, message: str, framework: Any) -> None:
    def fn(A: Any, B: Any, offs: Any) -> Any:
        return None if out is None else (A @ B[0])[:, : 8 if out == "half" else None]

    backward = None if out != "whole" else lambda *_: gradients
    with pytest.raises(AssertionError, match=message):
        check_ragged_dot(fn, "bf16", backward, framework=framework, shapes=SMALL[4], patterns="even", kinds="normal")


def test_an_output_without_a_gradient_is_found() -> None:
    def fn(A: Any, B: Any, offs: Any) -> Any:
        return xt.scaled_grouped_mm(A, B.detach(), offs, config="bf16")

    with pytest.raises(AssertionError, match=r"dB of .* is None: the output does not depend on it"):
        check_grouped_mm(fn, "bf16", shapes=SMALL[4], patterns="even", kinds="normal")


def test_one_shape_is_one_that_is_listed() -> None:
    one = {"patterns": "even", "kinds": "normal", "framework": "numpy"}
    forward, backward = _numpy(config_from_recipe("fp8_rowwise"))
    got = check_grouped_mm(forward, "fp8_rowwise", backward, shapes=SMALL[4], **one)
    listed = {"patterns": ["even"], "kinds": ["normal"], "framework": "numpy"}
    assert got == check_grouped_mm(forward, "fp8_rowwise", backward, shapes=[SMALL[4]], **listed)


def test_another_recipe_is_found() -> None:
    with pytest.raises(AssertionError, match=r"out of least_features .* is less than 50 dB"):
        check_grouped_mm(functools.partial(xt.scaled_grouped_mm, config="bf16"), "fp8_rowwise", **FEW)
