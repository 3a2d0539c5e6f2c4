"""Hold MoE code to xmoe's contract: inputs that hurt, comparisons down to the byte, the oracle behind a grouped GEMM.

For pytest or anything else. Arrays may be NumPy's, PyTorch's or JAX's; only numpy is imported. What equal bytes and
decibels are promised where: ``xmoe.parity.contract``.

M = tokens, K = contraction of the forward GEMM, N = output features, G = groups.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from xmoe import oracle
from xmoe.comparison import Comparison, as_numpy, compare
from xmoe.config import GroupedMMConfig, as_config
from xmoe.operands import QuantizedOperand
from xmoe.shapes import PATTERNS, SMALL, Shape, group_sizes, offsets

__all__ = [
    "GEMM_KINDS", "KERNEL_TIER", "KINDS", "PATTERNS", "SMALL", "Comparison", "Gemm", "Shape", "as_numpy",
    "assert_same_bytes", "assert_sqnr", "awkward", "check_grouped_mm", "check_ragged_dot", "compare", "gemm",
    "group_sizes", "offsets", "values",
]  # fmt: skip

KERNEL_TIER = 50.0
"""dB against the oracle on the same operands, with bfloat16 output (docs/design.md): the tier of every kernel."""
KINDS = ("normal", "wide", "subnormal", "bits", "poisoned", "zero", "awkward")
"""Of `values`: what quantizers are given."""
GEMM_KINDS = ("normal", "tiny", "huge", "zero", "poisoned")
"""Of `gemm`: values whose products and sums stay in float32's normal range."""

# ------------------------------------------------------------------------------------------------------------- asserts


def assert_same_bytes(got: Any, want: Any, name: str = "", *, any_nan: bool = False) -> None:
    """Two arrays, or two `QuantizedOperand`, have one shape, one dtype and the same bytes.

    AssertionError says how many elements differ, and shows the worst of them. ``any_nan``: as in `compare`.
    """
    if isinstance(want, QuantizedOperand):
        assert isinstance(got, QuantizedOperand), f"{name or 'got'} is {type(got).__name__}, not a QuantizedOperand"
        assert (got.axis, got.format) == (want.axis, want.format), (
            f"{name or 'the operand'} has axis {got.axis!r} and format {got.format!r}, "
            f"not {want.axis!r} and {want.format!r}"
        )
        for part in ("data", "scale"):
            assert_same_bytes(getattr(got, part), getattr(want, part), f"{name} {part}".lstrip(), any_nan=any_nan)
        return
    got, want = as_numpy(got), as_numpy(want)
    name = name or "the array"
    assert got.shape == want.shape, f"{name} has shape {got.shape}, not {want.shape}"
    assert got.dtype == want.dtype, f"{name} is {got.dtype}, not {want.dtype}"
    found = compare(want, got, any_nan=any_nan)
    assert found.equal, f"{name}, wanted and got: {found}"


def assert_sqnr(got: Any, reference: Any, least_db: float = KERNEL_TIER, name: str = "", *, offs: Any = None) -> float:
    """``got`` is within ``least_db`` of ``reference``; returns the dB (inf where they are equal).

    Args:
        offs: int [G], group ends: the rows of every group are held to the bound by themselves, because a whole-tensor
            figure misses a dead small expert. An array [G, ...] of weights needs none: slice it.
    """
    got, reference = as_numpy(got), as_numpy(reference)
    name = name or "the array"
    assert got.shape == reference.shape, f"{name} has shape {got.shape}, not {reference.shape}"
    found = compare(reference, got, any_nan=True)
    assert found.sqnr_db >= least_db, f"{name} is less than {least_db:g} dB from the reference: {found}"
    for g, group in enumerate([] if offs is None else oracle.token_layout(as_numpy(offs), got.shape[0])):
        rows = slice(group.start, group.end)
        found = compare(reference[rows], got[rows], any_nan=True)
        assert found.sqnr_db >= least_db, f"{name}, group {g} alone, is less than {least_db:g} dB away: {found}"
    return found.sqnr_db if offs is None else compare(reference, got, any_nan=True).sqnr_db


# --------------------------------------------------------------------------------------------------------------- inputs


def values(kind: str, shape: Sequence[int], seed: int = 0) -> NDArray[np.float32]:
    """float32 of one kind, the same on every machine.

    "normal" N(0, 1); "wide" every exponent; "subnormal" up to the least normals; "bits" any, NaNs and infinities among
    them; "poisoned" normal with 1% NaN and 1% -Inf; "zero" rows of 0 and -0 by turns; "awkward" rows over forty powers
    of two with some of zeros, tiny, huge and poisoned values. Raises ValueError for another kind.
    """
    shape = tuple(shape)
    rng = np.random.default_rng(seed)
    sign = rng.integers(0, 2, shape, dtype=np.uint32) << np.uint32(31)
    x = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        return ((rng.integers(0, 255 << 23, shape, dtype=np.uint32)) | sign).view(np.float32)
    if kind == "subnormal":
        return (rng.integers(0, 1 << 24, shape, dtype=np.uint32) | sign).view(np.float32)
    if kind == "bits":
        return rng.integers(0, 1 << 32, shape, dtype=np.uint32).view(np.float32)
    if kind == "poisoned":
        where = rng.random(shape)
        x[where < 0.01] = np.nan
        x[where > 0.99] = -np.inf
    elif kind == "zero":
        x[:] = 0
        x[::2] = -0.0
    elif kind == "awkward":
        return awkward(shape, seed)
    elif kind != "normal":
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(KINDS)}")
    return x


def awkward(shape: Sequence[int], seed: int = 0, *, poison: bool = True) -> NDArray[np.float32]:
    """float32 of rows (all axes but the last) over forty powers of two. Every third row is all 0, -0, ±1e-30, ±1e-38,
    3e38, 448 (the largest e4m3) or 464 (what rounds to it); with ``poison`` and 25 rows or more one has a NaN and one
    an -Inf."""
    shape = tuple(shape)
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((math.prod(shape[:-1]), shape[-1])).astype(np.float32)
    x *= np.exp2(rng.integers(-20, 20, (len(x), 1))).astype(np.float32)
    for row, value in zip(range(1, len(x), 3), (0.0, -0.0, 1e-30, 1e-38, 3e38, 448.0, 464.0), strict=False):
        x[row] = value if value > 1 else x[row] * np.float32(value)
    if poison and len(x) > 24 and shape[-1]:
        x[22, shape[-1] // 2], x[24, 0] = np.nan, -np.inf
    return x.reshape(shape)


class Gemm(NamedTuple):
    """The inputs of one grouped GEMM and its gradients, in bfloat16 or float32."""

    A: NDArray[Any]
    """[M, K]."""
    B: NDArray[Any]
    """[G, K, N]."""
    offs: NDArray[np.int32]
    """[G], cumulative group ends."""
    dOut: NDArray[Any]
    """[M, N]."""

    @property
    def group_sizes(self) -> NDArray[np.int32]:
        """[G]."""
        return np.diff(self.offs, prepend=np.int32(0)).astype(np.int32)


def gemm(
    shape: Shape, pattern: str = "uneven", kind: str = "normal", *, seed: int = 0, dtype: Any = "bfloat16"
) -> Gemm:
    """Inputs of one kind: "normal" N(0, 1); "tiny" (times 2^-42, below the least amax of an FP8 scale); "huge" (times
    2^55); "zero" (every other row, and one expert); "poisoned" (a NaN or an Inf in one element of each).

    Raises ValueError for another kind or pattern.
    """
    if kind not in GEMM_KINDS:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(GEMM_KINDS)}")
    M, N, K, G = shape.M, shape.N, shape.K, shape.G
    arrays = [values("normal", s, 3 * seed + i) for i, s in enumerate([(M, K), (G, K, N), (M, N)])]
    if kind in ("tiny", "huge"):
        arrays = [x * np.float32(2.0 ** (-42 if kind == "tiny" else 55)) for x in arrays]
    elif kind == "zero":
        A, B, dOut = arrays
        A[::2], dOut[1::2], B[G // 2] = 0, -0.0, 0
    elif kind == "poisoned" and M:
        A, B, dOut = arrays
        A[M // 2, K // 2], B[G // 2, K // 3, N // 2], dOut[M // 3, N // 3] = np.nan, np.inf, np.nan
    dtype = _dtype(dtype)
    A, B, dOut = (x.astype(dtype) for x in arrays)
    return Gemm(A, B, offsets(pattern, M, G, seed=seed), dOut)


def _dtype(dtype: Any) -> np.dtype[Any]:
    name = str(dtype)
    if name not in ("bfloat16", "float32"):
        raise ValueError(f"dtype={dtype!r} is not supported; use 'bfloat16' or 'float32'")
    return np.dtype(getattr(ml_dtypes, name, name))


# ------------------------------------------------------------------------------------------------ a user's grouped GEMM

Framework = Literal["numpy", "torch", "jax"]
Backward = Callable[..., tuple[Any, Any]]


def check_grouped_mm(
    fn: Callable[[Any, Any, Any], Any],
    recipe: GroupedMMConfig | str,
    backward: Backward | None = None,
    *,
    framework: Framework = "torch",
    device: Any = None,
    shapes: Shape | Iterable[Shape] = SMALL,
    patterns: str | Iterable[str] = tuple(PATTERNS),
    kinds: str | Iterable[str] = ("normal", "zero"),
    dtype: str = "bfloat16",
    least_db: float = KERNEL_TIER,
) -> dict[str, float]:
    """Hold ``fn(A [M, K], B [G, K, N], offs int32 [G]) -> [M, N]`` and its gradients to the oracle.

    Checked for every shape, pattern of group sizes and kind of values: shapes and dtypes; ``least_db`` against float64
    GEMMs on the recipe's quantized operands, whole and of every expert; exact zeros in rows past the last group and in
    the gradient of an expert without tokens; NaN where the recipe says so, and nowhere else.

    Args:
        fn: a grouped GEMM with the numerics of ``recipe``.
        recipe: a recipe's name or a config.
        backward: ``(dOut [M, N], A, B, offs) -> (dA, dB)``. None: the framework differentiates ``fn``; in NumPy the
            forward alone is checked.
        framework: whose arrays ``fn`` takes: "torch", "jax" or "numpy" (bfloat16 as of ml_dtypes).
        device: of the torch tensors, or a `jax.Device`; None: the CPU in torch, JAX's default.
        shapes, patterns, kinds: of `Shape`, of `PATTERNS`, of `GEMM_KINDS`; one or several.
        dtype: of A, B and dOut: "bfloat16" or "float32".
        least_db: of "out", "dA" and "dB"; float32 sums with bfloat16 outputs reach 50.

    Returns:
        The least dB of each result.

    Raises:
        AssertionError: it does not hold; the message names the result, the inputs and the worst element.
        ValueError: an argument that does not fit.
    """
    return _check(fn, recipe, backward, framework, device, shapes, patterns, kinds, dtype, least_db, sizes=False)


def check_ragged_dot(
    fn: Callable[[Any, Any, Any], Any],
    recipe: GroupedMMConfig | str,
    backward: Backward | None = None,
    *,
    framework: Framework = "jax",
    device: Any = None,
    shapes: Shape | Iterable[Shape] = SMALL,
    patterns: str | Iterable[str] = tuple(PATTERNS),
    kinds: str | Iterable[str] = ("normal", "zero"),
    dtype: str = "bfloat16",
    least_db: float = KERNEL_TIER,
) -> dict[str, float]:
    """`check_grouped_mm` of ``fn(lhs [M, K], rhs [G, K, N], group_sizes int32 [G]) -> [M, N]``, as in JAX."""
    return _check(fn, recipe, backward, framework, device, shapes, patterns, kinds, dtype, least_db, sizes=True)


def _check(fn, recipe, backward, framework, device, shapes, patterns, kinds, dtype, least_db, *, sizes: bool):
    config = as_config(recipe)
    if framework not in _RUN:
        raise ValueError(f"framework={framework!r} is not known; use one of {', '.join(_RUN)}")
    patterns = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    shapes = (shapes,) if isinstance(shapes, Shape) else tuple(shapes)
    if strange := [shape for shape in shapes if not isinstance(shape, Shape)]:
        raise ValueError(f"shapes has {strange[0]!r} in it; give Shapes, your own or of xmoe.shapes.ALL.values()")
    for name, several in (("shapes", shapes), ("patterns", patterns), ("kinds", kinds)):
        if not several:
            raise ValueError(f"{name} is empty, so nothing would be checked; give one or more")
    least: dict[str, float] = {}
    for shape in shapes:
        for pattern in patterns:
            for kind in kinds:
                inputs = gemm(shape, pattern, kind, dtype=dtype)
                groups = inputs.group_sizes if sizes else inputs.offs
                where = f"{shape.name} {tuple(shape[1:])}, {pattern} groups, {kind} values"
                checked = _checked(fn, backward, inputs, where)
                results = _RUN[framework](*checked, inputs, groups, device)
                for name, db in _hold(results, inputs, config, least_db, where).items():
                    least[name] = min(db, least.get(name, math.inf))
    return least


def _checked(fn, backward, inputs: Gemm, where: str) -> tuple[Any, Any]:
    """``fn`` and ``backward``, which say so where they give no arrays, or those of other shapes."""

    def forward(*args: Any) -> Any:
        out = fn(*args)
        _assert_shape(out, inputs.dOut.shape, f"out of {where}")
        return out

    def gradients(*args: Any) -> Any:
        found = backward(*args)
        is_pair = isinstance(found, tuple | list) and len(found) == 2
        assert is_pair, f"backward of {where} gives a {type(found).__name__}, not (dA, dB)"
        for name, gradient, x in zip(("dA", "dB"), found, (inputs.A, inputs.B), strict=True):
            _assert_shape(gradient, x.shape, f"{name} of {where}")
        return found

    return forward, None if backward is None else gradients


def _assert_shape(array: Any, shape: tuple[int, ...], what: str) -> None:
    assert hasattr(array, "shape"), f"{what} is a {type(array).__name__}, not an array of shape {shape}"
    assert tuple(array.shape) == shape, f"{what} has shape {tuple(array.shape)}, not {shape}"


def _hold(
    results: dict[str, Any], inputs: Gemm, config: GroupedMMConfig, least_db: float, where: str
) -> dict[str, float]:
    A, B, offs, dOut = inputs
    references = {
        "out": lambda: oracle.forward(A, B, offs, config),
        "dA": lambda: oracle.dgrad(dOut, B, offs, config),
        "dB": lambda: oracle.wgrad(A, dOut, offs, config),
    }
    found = {}
    for name, result in results.items():
        what = f"{name} of {where}"
        assert result is not None, f"{what} is None: the output does not depend on it, or the gradient is cut"
        got, reference = as_numpy(result), references[name]()
        dtype = np.dtype(getattr(ml_dtypes, config.out_dtype or "", config.out_dtype or A.dtype))
        want_dtype = dtype if name == "out" else A.dtype
        assert got.dtype == want_dtype, f"{what} is {got.dtype}, not {want_dtype}"
        if name == "dB":
            empty = got[inputs.group_sizes == 0]
            assert not empty.any(), f"{what}: an expert without tokens has a gradient; it must be exact zeros"
            found[name] = assert_sqnr(got, reference, least_db, what)
            for g, (x, y) in enumerate(zip(got, reference, strict=True)):
                assert_sqnr(x, y, least_db, f"{what}, expert {g} alone,")
        else:
            past = got[offs[-1] :]
            assert not past.any(), f"{what}: rows past the last group are not zeros"
            found[name] = assert_sqnr(got, reference, least_db, what, offs=offs)
    return found


def _run_numpy(fn, backward, inputs: Gemm, groups, device) -> dict[str, Any]:
    results = {"out": fn(inputs.A, inputs.B, groups)}
    if backward is not None:
        results |= zip(("dA", "dB"), backward(inputs.dOut, inputs.A, inputs.B, groups), strict=True)
    return results


def _run_torch(fn, backward, inputs: Gemm, groups, device) -> dict[str, Any]:
    import torch

    def tensor(x: NDArray[Any]) -> torch.Tensor:
        plain = x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
        copy = torch.from_numpy(plain.copy())
        return (copy.view(torch.bfloat16) if plain is not x else copy).to(device or "cpu")

    A, B, dOut, groups = (tensor(x) for x in (inputs.A, inputs.B, inputs.dOut, groups))
    if backward is not None:
        return {"out": fn(A, B, groups), **dict(zip(("dA", "dB"), backward(dOut, A, B, groups), strict=True))}
    A.requires_grad_()
    B.requires_grad_()
    out = fn(A, B, groups)
    out.backward(dOut.to(out.dtype))
    return {"out": out, "dA": A.grad, "dB": B.grad}


def _run_jax(fn, backward, inputs: Gemm, groups, device) -> dict[str, Any]:
    import jax

    A, B, dOut, groups = (jax.device_put(x, device) for x in (inputs.A, inputs.B, inputs.dOut, groups))
    if backward is not None:
        return {"out": fn(A, B, groups), **dict(zip(("dA", "dB"), backward(dOut, A, B, groups), strict=True))}
    out, vjp = jax.vjp(lambda A, B: fn(A, B, groups), A, B)
    return {"out": out, **dict(zip(("dA", "dB"), vjp(dOut.astype(out.dtype)), strict=True))}


_RUN = {"numpy": _run_numpy, "torch": _run_torch, "jax": _run_jax}
