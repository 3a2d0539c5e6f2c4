"""`ragged_dot_wgrad`: the values of `ragged_dot`'s own backward and of the oracle, its gradients, and its errors."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.values import KERNEL_TIER, bytes_of, values
from xmoe import oracle
from xmoe.config import RECIPES, FP8GroupedMMConfig, config_from_recipe
from xmoe.jax_frontend import ragged_dot, ragged_dot_wgrad

M, K, N, G = 150, 48, 32, 4
SIZES = np.array([50, 0, 3, 67], np.int32)  # 30 rows belong to nobody
OFFS = np.cumsum(SIZES)
A, B, DOUT = (jnp.asarray(values("normal", s, i), jnp.bfloat16) for i, s in enumerate([(M, K), (G, K, N), (M, N)]))
QUICK = {"jax": "bf16", "bridge": "fp8_rowwise"}
"""Of each engine a recipe that is quick to compile."""
each_engine = pytest.mark.parametrize("engine", ["jax", "bridge"])


def wgrad(lhs: jax.Array, dout: jax.Array, sizes: Any = SIZES, **options: Any) -> jax.Array:
    return ragged_dot_wgrad(lhs, dout, jnp.asarray(sizes), **{"config": "fp8_rowwise", **options})


@pytest.mark.parametrize(
    ("engine", "recipe"),
    [
        *(("bridge", recipe) for recipe in RECIPES),
        *(("jax", recipe) for recipe in ("bf16", "fp8_rowwise", "mxfp8_rceil")),
    ],
)
def test_every_recipe_is_the_backward_of_ragged_dot(engine: str, recipe: str) -> None:
    options = {"config": recipe, "implementation": engine}

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, dout: jax.Array) -> tuple[jax.Array, jax.Array]:
        dot = functools.partial(ragged_dot, lhs, group_sizes=jnp.asarray(SIZES), **options)
        return wgrad(lhs, dout, **options), jax.vjp(dot, rhs)[1](dout)[0]

    got, of_backward = run(A, B, DOUT)
    assert got.shape == (G, K, N)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(bytes_of(got), bytes_of(of_backward))
    want = oracle.wgrad(np.asarray(A), np.asarray(DOUT), OFFS, config_from_recipe(recipe))
    assert min(oracle.sqnr_per_group(want, np.asarray(got))) >= KERNEL_TIER
    assert not np.asarray(got[1]).any()


def test_is_what_jax_computes_with_a_ragged_contraction() -> None:
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
    want = jax.lax.ragged_dot_general(A, DOUT, jnp.asarray(SIZES), numbers, preferred_element_type=jnp.float32)
    got = wgrad(A, DOUT, config="bf16", preferred_element_type=jnp.float32, implementation="bridge")
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


@each_engine
def test_layouts_and_dtypes(engine: str) -> None:
    options = {"implementation": engine, "config": QUICK[engine]}
    of_float32 = functools.partial(wgrad, **options, preferred_element_type=jnp.float32)
    transposed = jax.jit(functools.partial(of_float32, transpose_rhs=True))
    np.testing.assert_allclose(jax.jit(of_float32)(A, DOUT), transposed(A, DOUT).swapaxes(1, 2), rtol=1e-6, atol=1e-5)

    def dtypes(a: jax.Array, d: jax.Array, **more: Any) -> jnp.dtype:
        return jax.eval_shape(functools.partial(wgrad, **{**options, **more}), a, d).dtype

    wide = A.astype(jnp.float32)
    assert dtypes(wide, DOUT) == jnp.float32
    assert dtypes(A, DOUT.astype(jnp.float32)) == jnp.bfloat16
    assert dtypes(A, DOUT, config=FP8GroupedMMConfig(out_dtype="float32")) == jnp.bfloat16


@each_engine
def test_rows_of_nobody_do_not_count_and_bad_sizes_harm_nobody(engine: str) -> None:
    run = jax.jit(functools.partial(wgrad, implementation=engine, config=QUICK[engine]))
    poisoned = [x.at[OFFS[-1] :].set(jnp.nan) for x in (A, DOUT)]
    np.testing.assert_array_equal(bytes_of(run(*poisoned, SIZES)), bytes_of(run(A, DOUT, SIZES)))
    for sizes in ([100, 100, 0, 0], [-20, 60, 0, 200], [2**31 - 1, 2**31 - 1, 5, 5]):
        sizes = np.array(sizes, np.int32)
        with np.errstate(over="ignore"):
            offs = np.cumsum(sizes, dtype=np.int32)
        want = oracle.wgrad(np.asarray(A), np.asarray(DOUT), offs, config_from_recipe(QUICK[engine]))
        assert oracle.sqnr(want, np.asarray(run(A, DOUT, sizes))) >= KERNEL_TIER


def test_no_tokens() -> None:
    assert not np.asarray(wgrad(A[:0], DOUT[:0], np.zeros(G, np.int32), implementation="bridge")).any()


@each_engine
@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_ragged_dots_with_the_cotangent_for_weights(engine: str, transposed: bool) -> None:
    options = {
        "config": "bf16" if engine == "jax" else "mxfp8_rceil",
        "implementation": engine,
        "transpose_rhs": transposed,
    }
    weights = B.swapaxes(1, 2) if transposed else B

    @jax.jit
    def run(lhs: jax.Array, dout: jax.Array, weights: jax.Array) -> Any:
        dot = functools.partial(ragged_dot, group_sizes=jnp.asarray(SIZES), **options)
        own = jax.vjp(functools.partial(wgrad, **options), lhs, dout)[1](weights)
        out, backward = jax.vjp(lambda x: dot(x, weights), lhs)
        return own, (backward(dout)[0], out)

    (dlhs, ddout), (want_dlhs, want_ddout) = run(A, DOUT, weights)
    np.testing.assert_array_equal(bytes_of(dlhs), bytes_of(want_dlhs))
    np.testing.assert_array_equal(bytes_of(ddout), bytes_of(want_ddout))
    assert not np.asarray(ddout[OFFS[-1] :], np.float32).any()


def test_a_backward_of_ones_own() -> None:
    """`ragged_dot` made of the two public ops, and its gradients to the bit."""
    options: dict[str, Any] = {"config": "fp8_rowwise", "implementation": "bridge"}

    @jax.custom_vjp
    def dot(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return ragged_dot(lhs, rhs, sizes, **options)

    def backward(saved: Any, dout: jax.Array) -> Any:
        lhs, rhs, sizes = saved
        return (
            ragged_dot(dout, rhs, sizes, transpose_rhs=True, **options),
            ragged_dot_wgrad(lhs, dout, sizes, **options),
            None,
        )

    dot.defvjp(lambda *args: (dot(*args), args), backward)
    sizes = jnp.asarray(SIZES)
    got, want = (
        jax.jit(lambda a, b, d, f=f: jax.vjp(lambda a, b: f(a, b, sizes), a, b)[1](d))(A, B, DOUT)
        for f in (dot, functools.partial(ragged_dot, **options))
    )
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(bytes_of(x), bytes_of(y)), got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_sums_over_the_tokens(check_vma: bool) -> None:
    mesh = Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "model"))
    lhs, dout, sizes = jnp.concatenate([A, -A]), jnp.concatenate([DOUT] * 2), np.stack([SIZES, SIZES[::-1]])

    def shard(a: jax.Array, d: jax.Array, s: jax.Array) -> jax.Array:
        own = wgrad(a, d, s.reshape(-1), implementation="bridge", preferred_element_type="float32")
        return jax.lax.psum(own, "data")

    specs = P("data", "model"), P("data"), P("data")  # 12 columns of lhs a shard, no multiple of 16
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(None, "model"), check_vma=check_vma)
    with pytest.raises(ValueError, match="K=12 is not a positive multiple of 16"):
        jax.eval_shape(mapped, lhs, dout, sizes)
    lhs = jnp.pad(lhs, ((0, 0), (0, 16)))
    alone = jax.jit(functools.partial(wgrad, implementation="bridge", preferred_element_type="float32"))
    want = sum(alone(lhs[i * M : (i + 1) * M], dout[i * M : (i + 1) * M], sizes[i]) for i in range(2))
    np.testing.assert_allclose(jax.jit(mapped)(lhs, dout, sizes), want, rtol=1e-5, atol=1e-4)


def _with(**changes: Any) -> Callable[[], Any]:
    arguments = {"lhs": A, "dout": DOUT, "group_sizes": jnp.asarray(SIZES), "config": "fp8_rowwise"} | changes
    return functools.partial(ragged_dot_wgrad, **arguments)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (_with(lhs=A[None]), r"lhs has shape \(1, 150, 48\); give \[M, K\]"),
        (_with(dout=DOUT[0]), r"dout has shape \(32,\); give \[M, N\]"),
        (_with(dout=DOUT[:100]), r"lhs has shape \(150, 48\) and dout \(100, 32\); give the same M rows"),
        (_with(dout=DOUT[:, :20]), "N=20 is not a positive multiple of 16; pad"),
        (_with(group_sizes=jnp.zeros((2, 2), jnp.int32)), r"group_sizes has shape \(2, 2\); give \[G\]"),
        (_with(group_sizes=jnp.zeros(0, jnp.int32)), r"group_sizes has shape \(0,\); give \[G\]"),
        (_with(group_sizes=jnp.asarray(SIZES, jnp.float32)), r"float32; give group_sizes.astype\(jnp.int32\)"),
        (_with(group_sizes=[50, 0, 3, 67]), r"group_sizes is a list; give an array"),
        (_with(dout=DOUT.astype(jnp.float16)), "dout.dtype=.*float16.* use one of bfloat16, float32"),
        (_with(preferred_element_type=jnp.int8), "preferred_element_type=.*int8"),
        (_with(implementation="cuda"), "implementation='cuda' is not known; use 'bridge', 'jax'"),
    ],
)
def test_wrong_uses_are_named_at_trace_time(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(call)
