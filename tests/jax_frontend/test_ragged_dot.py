"""`ragged_dot`: values and gradients against the oracle, JAX's transformations, and the errors."""

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.values import KERNEL_TIER, values
from xmoe import FqnToConfig, oracle
from xmoe.config import RECIPES, BF16GroupedMMConfig, FP8GroupedMMConfig, FP8GroupedMMRecipe, config_from_recipe
from xmoe.jax_frontend import ragged_dot

M, K, N, G = 150, 48, 80, 4
SIZES = np.array([50, 0, 3, 67], np.int32)  # 30 rows belong to nobody
OFFS = np.cumsum(SIZES)
A, B, DOUT = (jnp.asarray(values("normal", s, i)) for i, s in enumerate([(M, K), (G, K, N), (M, N)]))
each_engine = pytest.mark.parametrize("engine", ["jax", "bridge"])


def loss(lhs: jax.Array, rhs: jax.Array, sizes: Any = SIZES, **options: Any) -> jax.Array:
    out = ragged_dot(lhs, rhs, jnp.asarray(sizes), **{"config": "fp8_rowwise", **options})
    return (out.astype(jnp.float32) ** 2).sum()


def assert_equal(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("engine", "recipe"),
    [
        *(("bridge", recipe) for recipe in RECIPES),
        # In JAX alone an emulated recipe is the one that it emulates; it is slow to compile.
        *(("jax", recipe) for recipe in RECIPES if recipe != "mxfp8_emulated_floor"),
    ],
)
def test_every_recipe_is_the_oracles(engine: str, recipe: str) -> None:
    config = config_from_recipe(recipe)
    lhs, rhs, dout = (x.astype(jnp.bfloat16) for x in (A, B, DOUT))

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, dout: jax.Array) -> Any:
        dot = functools.partial(ragged_dot, group_sizes=jnp.asarray(SIZES), config=config, implementation=engine)
        out, vjp = jax.vjp(dot, lhs, rhs)
        return out, *vjp(dout)

    out, dlhs, drhs = (np.asarray(x) for x in run(lhs, rhs, dout))
    a, b, d = (np.asarray(x) for x in (lhs, rhs, dout))
    assert {x.dtype for x in (out, dlhs, drhs)} == {jnp.dtype(jnp.bfloat16)}
    assert min(oracle.sqnr_per_group(oracle.forward(a, b, OFFS, config), out, OFFS)) >= KERNEL_TIER
    assert min(oracle.sqnr_per_group(oracle.dgrad(d, b, OFFS, config), dlhs, OFFS)) >= KERNEL_TIER
    assert min(oracle.sqnr_per_group(oracle.wgrad(a, d, OFFS, config), drhs)) >= KERNEL_TIER
    assert not out[OFFS[-1] :].any()
    assert not dlhs[OFFS[-1] :].any()
    assert not drhs[1].any()


@each_engine
@pytest.mark.parametrize("recipe", ["bf16", "mxfp8_rceil"])
def test_transposed_weights_change_nothing_but_the_layout(engine: str, recipe: str) -> None:
    options = {"config": recipe, "implementation": engine}
    want = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1)))(A, B)
    stored = B.swapaxes(1, 2)
    transposed = functools.partial(loss, transpose_rhs=True, **options)
    value, (dlhs, drhs) = jax.jit(jax.value_and_grad(transposed, (0, 1)))(A, stored)
    assert drhs.shape == stored.shape
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    # Swapped operands may be summed in another order.
    np.testing.assert_allclose(dlhs, want[1][0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(drhs.swapaxes(1, 2), want[1][1], rtol=1e-5, atol=1e-5)


@each_engine
def test_dtypes(engine: str) -> None:
    def dtypes(lhs: jax.Array, **options: Any) -> tuple[str, ...]:
        def run(lhs: jax.Array, rhs: jax.Array) -> Any:
            dot = functools.partial(ragged_dot, group_sizes=jnp.asarray(SIZES), implementation=engine, **options)
            out, vjp = jax.vjp(dot, lhs, rhs)
            return out, *vjp(out)

        return tuple(x.dtype.name for x in jax.eval_shape(run, lhs, B))

    to_float32 = FP8GroupedMMConfig(out_dtype="float32")
    short = A.astype(jnp.bfloat16)
    assert dtypes(short) == ("bfloat16", "bfloat16", "float32")
    assert dtypes(A) == ("float32", "float32", "float32")
    assert dtypes(short, config=to_float32) == ("float32", "bfloat16", "float32")
    assert dtypes(A, config=to_float32, preferred_element_type=jnp.bfloat16) == ("bfloat16", "float32", "float32")


def test_config_none_a_recipe_and_a_config_are_interchangeable() -> None:
    def dot(**options: Any) -> jax.Array:
        return jax.jit(functools.partial(ragged_dot, implementation="bridge", **options))(A, B, SIZES)

    assert_equal(dot(), dot(config=BF16GroupedMMConfig()))
    assert_equal(dot(config="fp8_rowwise"), dot(config=FP8GroupedMMConfig()))
    assert_equal(dot(config=FP8GroupedMMRecipe.FP8_ROWWISE), dot(config=FP8GroupedMMConfig()))
    assert not np.array_equal(dot(), dot(config="fp8_rowwise"))


@each_engine
def test_sizes_of_any_integer_dtype(engine: str) -> None:
    grads = jax.jit(jax.grad(functools.partial(loss, config="bf16", implementation=engine), (0, 1)))
    want = grads(A, B, jnp.asarray(SIZES))
    for dtype in ("int8", "uint32", "int64"):
        with jax.enable_x64(True):
            sizes = jnp.asarray(SIZES, dtype)
            assert sizes.dtype == dtype
            assert_equal(grads(A, B, sizes), want)


@each_engine
@pytest.mark.parametrize("groups", [1, G])
def test_no_tokens(engine: str, groups: int) -> None:
    none = np.zeros(groups, np.int32)
    grads = jax.grad(functools.partial(loss, sizes=none, implementation=engine), (0, 1))
    dlhs, drhs = jax.jit(grads)(A[:0], B[:groups])
    assert dlhs.shape == (0, K)
    assert not drhs.any()


@each_engine
@pytest.mark.parametrize("sizes", [[100, 100, 0, 0], [-20, 60, 0, 200], [2**31 - 1, 2**31 - 1, 5, 5]])
def test_bad_sizes_are_cut_and_harm_nobody(engine: str, sizes: list[int]) -> None:
    sizes = np.array(sizes, np.int32)
    with np.errstate(over="ignore"):
        offs = np.cumsum(sizes, dtype=np.int32)
    out = jax.jit(functools.partial(ragged_dot, config="fp8_rowwise", implementation=engine))(A, B, sizes)
    want = oracle.forward(np.asarray(A), np.asarray(B), offs, FP8GroupedMMConfig())
    assert oracle.sqnr(want, out) >= 130  # float32 output


@each_engine
def test_group_offset_of_every_shard(engine: str) -> None:
    """Two of the four groups at a time: the rows of the others are zeros, as are their gradients."""
    held = 2

    @jax.jit
    def run(lhs: jax.Array, rhs: jax.Array, offset: Any) -> Any:
        dot = functools.partial(ragged_dot, group_sizes=jnp.asarray(SIZES), implementation=engine, group_offset=offset)
        out, vjp = jax.vjp(dot, lhs, rhs)
        return out, *vjp(DOUT.astype(out.dtype))

    want, dlhs, drhs = (np.asarray(x) for x in run(A, B, None))
    for offset in range(G - held + 1):
        rows = slice(OFFS[offset - 1] if offset else 0, OFFS[offset + held - 1])
        got = run(A, B[offset : offset + held], jnp.array([offset]))
        for mine, all_of_it in zip(got[:2], (want, dlhs), strict=True):
            np.testing.assert_array_equal(mine[rows], all_of_it[rows])
            assert not mine[: rows.start].any()
            assert not mine[rows.stop :].any()
        # The tiles of tokens begin elsewhere, so sums may come in another order.
        np.testing.assert_allclose(got[2], drhs[offset : offset + held], rtol=1e-5, atol=1e-5)


def test_bad_sizes_with_a_group_offset_are_cut() -> None:
    """Group 1 begins at row 100; of its 80 rows 50 exist."""
    dot = functools.partial(ragged_dot, config="bf16", implementation="bridge")
    sizes = jnp.array([100, 80, 7], jnp.int32)
    got = jax.jit(dot)(A, B[1:2], sizes, group_offset=jnp.array(1))
    np.testing.assert_array_equal(got[100:], jax.jit(dot)(A[100:], B[1:2], jnp.array([50])))
    assert not got[:100].any()


@pytest.mark.parametrize(("offset", "clipped"), [(-3, 0), (1, None), (100, 2)])
def test_an_offset_that_is_data_is_clipped_and_debug_says_so(
    offset: int, clipped: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    dot = functools.partial(ragged_dot, config=BF16GroupedMMConfig(debug=True), implementation="bridge")
    run = jax.jit(lambda offset: dot(A, B[:2], jnp.asarray(SIZES), group_offset=offset))
    with caplog.at_level(logging.ERROR):
        got = run(jnp.array([offset]))
        jax.effects_barrier()
    messages = [r.getMessage() for r in caplog.records]
    if clipped is None:
        assert not messages
    else:
        assert messages == [f"group_offset={offset} is out of range, and was clipped: give 0 to 2"]
        np.testing.assert_array_equal(got, run(jnp.array([clipped])))


# ------------------------------------------------------------------------------------------------------------- errors


def test_signature_begins_with_that_of_jax() -> None:
    theirs, ours = (list(inspect.signature(f).parameters) for f in (jax.lax.ragged_dot, ragged_dot))
    assert ours[: len(theirs)] == theirs


def _with(**changes: Any) -> Callable[[], Any]:
    arguments = {"lhs": A, "rhs": B, "group_sizes": jnp.asarray(SIZES), "config": "fp8_rowwise"} | changes
    return functools.partial(ragged_dot, **arguments)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (_with(lhs=A[None]), r"lhs has shape \(1, 150, 48\); give \[M, K\]"),
        (_with(rhs=B[0]), r"rhs has shape \(48, 80\); give \[G, K, N\]"),
        (_with(rhs=B[:0]), r"rhs has shape \(0, 48, 80\)"),
        (_with(rhs=B.swapaxes(1, 2)), "K=48 columns .* K=80 .* transpose_rhs=True"),
        (_with(rhs=B[:, :, :70]), "N=70 .* multiple of 16"),
        (_with(lhs=A[:, :40], rhs=B[:, :40]), "K=40 .* multiple of 16"),
        (_with(group_sizes=jnp.asarray(SIZES[:3])), r"group_sizes has shape \(3,\); give \(4,\)"),
        (_with(group_sizes=jnp.asarray(SIZES, jnp.float32)), r"float32; give group_sizes.astype\(jnp.int32\)"),
        (_with(lhs=A.astype(jnp.float16)), "lhs.dtype=.*float16.* use one of bfloat16, float32"),
        (_with(rhs=B.astype(jnp.int8)), "rhs.dtype=.*int8"),
        (_with(preferred_element_type=jnp.int32), "preferred_element_type=.*int32"),
        (_with(precision=jax.lax.Precision.HIGHEST), "precision=.*accumulation='precise'"),
        (_with(group_offset=jnp.zeros(2, jnp.int32)), r"group_offset is int32 of shape \(2,\); give one integer"),
        (_with(group_offset=jnp.zeros(1)), "group_offset is float32"),
        (_with(transpose_rhs="yes"), r"transpose_rhs='yes' is not a boolean; use True or False"),
        (_with(group_offset=1), r"group_offset is a int; give an array, jnp\.asarray\(group_offset\)"),
        (_with(group_offset=jnp.array([1])), "group_offset=1 is out of range; give 0 to 0,"),
        (
            _with(group_offset=np.array(3), rhs=B[:2]),
            "group_offset=3 is out of range; give 0 to 2, .* less those of rhs",
        ),
        (_with(group_offset=jnp.array(-1), rhs=B[:2]), "group_offset=-1 is out of range; give 0 to 2"),
        (_with(group_offset=jnp.zeros(1, jnp.int32), group_sizes=jnp.asarray(SIZES[:3])), "of all groups, .* holds 4"),
        (_with(out_sharding=P()), "out_sharding is not supported; .*shard_map"),
        (_with(config="fp4"), "config='fp4' is not known; use one of bf16, fp8_rowwise"),
        (_with(config=FqnToConfig({})), "config is a FqnToConfig, which is for models; give the GroupedMMConfig"),
        (_with(implementation="cuda"), "implementation='cuda' is not known; use 'bridge', 'jax'"),
        (_with(config=FP8GroupedMMConfig(kernel_preference="triton")), "kernel_preference=triton .* a CPU; use"),
        (
            _with(config=FP8GroupedMMConfig(kernel_preference="torch"), implementation="jax"),
            "kernel_preference=torch .* implementation='jax' has none; use",
        ),
    ],
)
def test_wrong_uses_are_named_at_trace_time(call: Callable[[], Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(call)


def test_lists_are_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"group_sizes is a list; give an array, jnp\.asarray\(group_sizes\)"):
        ragged_dot(jnp.ones((4, 16)), jnp.ones((2, 16, 16)), [2, 2])  # type: ignore[arg-type]
