"""SwiGLU experts as one op in JAX: against the `ragged_dot`s that they replace, on both engines."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xmoe import oracle
from xmoe.jax_frontend import emulation, permute_tokens, ragged_dot, swiglu_experts

M, D, H, G = 100, 64, 128, 4
NAMES = ("x", "w1", "w2", "w3")
ENGINES = ("jax", "bridge")


def problem(H: int = H, dtype: Any = jnp.bfloat16) -> tuple[jax.Array, ...]:
    """x, w1, w2, w3 and sizes: expert 1 has no rows, ten rows no expert."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((M, D), (G, H, D), (G, D, H), (G, H, D))
    draws = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    x, w1, w2, w3 = (draw.astype(dtype) / (1 if draw.ndim == 2 else 8) for draw in draws)
    return x, w1, w2, w3, jnp.array([30, 0, 40, 20])


def separate(x: Any, w1: Any, w2: Any, w3: Any, sizes: Any, **options: Any) -> jax.Array:
    dot = functools.partial(ragged_dot, group_sizes=sizes, transpose_rhs=True, **options)
    gate, up = dot(x, w1), dot(x, w3)
    return dot(jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up, w2)


def step(function: Any, x: Any, w1: Any, w2: Any, w3: Any, sizes: Any, **options: Any) -> list[np.ndarray]:
    """The output and the four gradients."""

    @jax.jit
    def run(x: Any, w1: Any, w2: Any, w3: Any) -> Any:
        out, vjp = jax.vjp(lambda *args: function(*args, sizes, **options), x, w1, w2, w3)
        return out, *vjp(jnp.ones_like(out) / 8)

    return [np.asarray(value, np.float32) for value in run(x, w1, w2, w3)]


@functools.cache  # compiling these is what takes the time, and several tests want the same
def experts(recipe: str, engine: str) -> list[np.ndarray]:
    """The output and the four gradients of `swiglu_experts` on `problem()`."""
    return step(swiglu_experts, *problem(), config=recipe, implementation=engine)


@functools.cache
def exact() -> list[np.ndarray]:
    """The same, nothing quantized, in float32."""
    *tensors, sizes = problem()
    return step(separate, *(a.astype(jnp.float32) for a in tensors), sizes, config="bf16", implementation="jax")


@pytest.mark.parametrize(
    ("recipe", "engine"),
    [
        *((recipe, engine) for recipe in ("bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil") for engine in ENGINES),
        ("fp8_rowwise_wgrad_with_hp", "bridge"),  # in JAX alone: test_engines_agree
    ],
)
def test_beside_separate_gemms(recipe: str, engine: str) -> None:
    one, three = experts(recipe, engine), step(separate, *problem(), config=recipe, implementation=engine)
    for name, a, b, c in zip(("out", *NAMES), one, three, exact(), strict=True):
        assert a.shape == b.shape
        assert oracle.sqnr(b, a) >= (46 if recipe == "bf16" else 36), name
        assert oracle.sqnr(c, a) >= (46 if recipe == "bf16" else 21), name
    assert not one[0][90:].any()
    assert not one[1][90:].any()
    assert not one[2][1].any()


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
def test_engines_agree(recipe: str) -> None:
    """To the last bits of exp, which torch and XLA round apart."""
    for a, b in zip(*(experts(recipe, engine) for engine in ENGINES), strict=True):
        assert oracle.sqnr(a, b) >= 50


@pytest.mark.parametrize(
    ("recipe", "engine", "H", "k"),
    [
        ("fp8_rowwise", "bridge", 128, 4),
        ("fp8_rowwise_wgrad_with_hp", "bridge", 128, 2),
        ("bf16", "bridge", 128, 1),
        ("mxfp8_rceil", "bridge", 48, 2),
        ("fp8_rowwise", "jax", 128, 4),  # slow to compile, and of the order it knows what it knows in every recipe
        ("bf16", "jax", 128, 1),
    ],
)
def test_tokens_as_the_router_saw_them(recipe: str, engine: str, H: int, k: int) -> None:
    """With an order: what `permute_tokens` and the op give, bit for bit; H = 48 does not fuse."""
    x, *weights, sizes = problem(H=H)
    x, order = x[: M // k], jax.random.permutation(jax.random.key(1), M)
    options = {"config": recipe, "implementation": engine}

    def sorted_first(x: Any, *rest: Any, **options: Any) -> jax.Array:
        return swiglu_experts(permute_tokens(x, order), *rest, **options)

    expected = step(sorted_first, x, *weights, sizes, **options)
    got = step(swiglu_experts, x, *weights, sizes, order=order, **options)
    for name, a, b in zip(("out", *NAMES), got, expected, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert got[1].shape == (M // k, D)


def test_bad_orders() -> None:
    x, *weights, sizes = problem()
    for order, message in (
        (jnp.arange(M - 1), r"order has shape \(99,\) and x T=100 tokens; give \[T \* k\]"),
        (jnp.zeros(M), "order is float32; give integers"),
        (jnp.array(0), r"order has shape \(\) and x T=100 tokens"),
        ([0] * M, "order is a list; give an array"),
    ):
        with pytest.raises(ValueError, match=message):
            swiglu_experts(x, *weights, sizes, order=order, config="fp8_rowwise")


def test_width_of_broken_blocks() -> None:
    """Separate GEMMs, decided before there is an engine."""
    args, options = problem(H=48), {"config": "mxfp8_rceil", "implementation": "bridge"}
    for one, three in zip(step(swiglu_experts, *args, **options), step(separate, *args, **options), strict=True):
        np.testing.assert_array_equal(one, three)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp"])
@pytest.mark.parametrize(
    ("engine", "subsets"),
    [("bridge", ((0,), (1,), (2,), (3,), (1, 2, 3), (0, 2))), ("jax", ((0,), (2,), (3,)))],  # one for each GEMM
    ids=["bridge", "jax"],
)
def test_some_gradients(recipe: str, engine: str, subsets: tuple[tuple[int, ...], ...]) -> None:
    *tensors, sizes = problem()
    every = experts(recipe, engine)[1:]
    for needed in subsets:

        def loss(*chosen: Any, needed: Any = needed) -> jax.Array:
            args = list(tensors)
            for index, value in zip(needed, chosen, strict=True):
                args[index] = value
            return swiglu_experts(*args, sizes, config=recipe, implementation=engine).astype(jnp.float32).sum() / 8

        grads = jax.jit(jax.grad(loss, argnums=tuple(range(len(needed)))))(*(tensors[i] for i in needed))
        for index, grad in zip(needed, grads, strict=True):
            np.testing.assert_array_equal(np.asarray(grad, np.float32), every[index])


def test_swiglu_and_its_gradient() -> None:
    gates = np.concatenate([np.linspace(-100, 100, 2001), [-0.0, 1e-30, 3e4]]).reshape(4, 501)
    ups, d = np.random.default_rng(0).standard_normal((2, 4, 501))
    gate_up, dh = (x.astype(np.float32) for x in (np.concatenate([gates, ups], 1), d))
    g, u, d = (x.astype(np.float64) for x in (*np.split(gate_up, 2, 1), dh))
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-g))
    gradient = np.concatenate([d * u * s * (1 + g * (1 - s)), d * g * s], 1)
    np.testing.assert_allclose(emulation.swiglu(gate_up), g * s * u, rtol=1e-5, atol=1e-30)
    np.testing.assert_allclose(emulation.swiglu_gradient(dh, gate_up), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[None]}, r"x has shape \(1, 100, 64\); give \[M, D\]"),
        ({"x": lambda x: x[:, :48]}, r"x has D=48 .* and w1 D=64"),
        ({"w1": lambda w: w[0]}, r"w1 has shape \(128, 64\); give \[G, H, D\]"),
        ({"w2": lambda w: w.swapaxes(1, 2)}, r"w2 has shape \(4, 128, 64\); give \(4, 64, 128\)"),
        ({"w3": lambda w: w.astype(jnp.float32)}, "w3 is float32 and w1 bfloat16; cast them"),
        ({"w3": lambda w: None}, "w3 is a NoneType; give an array"),
        ({"x": lambda x: x.astype(jnp.float16)}, "x.dtype"),
        ({"group_sizes": lambda s: s[:3]}, r"group_sizes has shape \(3,\); give \(4,\)"),
        ({"group_sizes": lambda s: s.astype(float)}, "group_sizes is float32; give"),
        ({"w1": lambda w: w[:, :40], "w2": lambda w: w[..., :40], "w3": lambda w: w[:, :40]}, "H=40 is not a positive"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    args = dict(zip((*NAMES, "group_sizes"), problem(), strict=True))
    args |= {name: f(args[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        swiglu_experts(**args, config="fp8_rowwise")
