"""`quantize` on functions: a call of `jax.lax.ragged_dot` gives the bits of `xmoe.jax_frontend.ragged_dot`."""

import functools
import logging
import re
import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.conversions import LOGGER, RECIPE, D, E, LinenMoE, RoutedMoE, equal, grouped_dot
from tests.jax_frontend.conversions import _compiled_quickly as _compiled_quickly
from tests.jax_frontend.conversions import reference as reference
from tests.jax_frontend.conversions import x as x
from xmoe import FqnToConfig, MXFP8GroupedMMConfig
from xmoe.jax_frontend import quantize, ragged_dot


@functools.cache
def one_dot(config: Any = RECIPE) -> Callable[..., jax.Array]:
    """`ragged_dot` on SIZES, compiled once."""
    return jax.jit(lambda x, w: ragged_dot(x, w, SIZES, config=config))


@pytest.fixture(scope="module")
def weights() -> jax.Array:
    return jax.random.normal(jax.random.key(2), (2, E, D, D))


SIZES = jnp.array([3, 5, 0, 3])  # one row short


# ----------------------------------------------------------------------------------------------------------- functions

PROGRAMS: dict[str, Callable[[Any, Any], Any]] = {
    "plain": lambda x, w: grouped_dot(x, w[0].mT, SIZES),
    "scan": lambda x, w: lax.scan(lambda c, w: (grouped_dot(c, w, SIZES), c.sum()), x, w),
    "remat in scan, jit in remat": lambda x, w: lax.scan(
        jax.checkpoint(lambda c, w: (jax.jit(lambda c, w: jnp.sin(grouped_dot(c, w, SIZES)))(c, w), None)), x, w
    )[0],
    "remat with a policy": lambda x, w: jax.checkpoint(
        lambda x, w: grouped_dot(jnp.sin(grouped_dot(x, w[0], SIZES)), w[1], SIZES),
        policy=jax.checkpoint_policies.dots_saveable,
    )(x, w),
    "cond": lambda x, w: lax.cond(x.sum() > 1e9, lambda x, w: x, lambda x, w: grouped_dot(x, w[1], SIZES), x, w),
    "vmap": lambda x, w: jax.vmap(grouped_dot)(jnp.stack([x, -x]), w, jnp.stack([SIZES, SIZES[::-1]])),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_functions_have_the_bits_of_the_op(name: str, x: Any, weights: Any, reference: Any) -> None:
    program = PROGRAMS[name]

    config = RECIPE if name in ("plain", "scan") else "bf16"  # which compiles in a third of the time

    def value_and_gradients(fn: Any) -> Any:
        def run(x: Any, w: Any) -> Any:
            y, backward = jax.vjp(fn, x, w)
            return y, backward(jax.tree.map(jnp.cos, y))

        return jax.jit(run)(x, weights)

    # As a nested function, so that neither run finds what the other has traced.
    expected = reference(lambda: value_and_gradients(lambda x, w: program(x, w)), config)
    equal(value_and_gradients(quantize(lambda x, w: program(x, w), config)), expected)


def test_nothing_is_left_of_the_calls(x: Any, weights: Any) -> None:
    for name, program in PROGRAMS.items():
        assert "ragged_dot_general" not in str(jax.make_jaxpr(quantize(program, "bf16"))(x, weights)), name


def test_while_loops(x: Any, weights: Any) -> None:
    quantized = quantize(lambda x, w: lax.fori_loop(0, SIZES[0], lambda _, x: grouped_dot(x, w, SIZES) / 9, x), RECIPE)
    expected = x
    for _ in range(3):
        expected = one_dot()(expected, weights[0]) / 9
    equal(jax.jit(quantized)(x, weights[0]), expected)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map(check_vma: bool, x: Any, weights: Any, reference: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "other"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def gradients(wrap: Callable[[Any], Any]) -> Any:
        def program(x: Any, w: Any) -> Any:
            local = lambda x, w: grouped_dot(x, w.astype(x.dtype), SIZES // 2)  # noqa: E731
            specs = {"in_specs": (P("data"), P()), "out_specs": P("data")}
            return jax.shard_map(local, mesh=mesh, check_vma=check_vma, **specs)(x, w)

        return jax.jit(jax.grad(lambda x, w: jnp.square(wrap(program)(x, w)).sum(), (0, 1)))(x, weights[0])

    expected = reference(lambda: gradients(lambda fn: fn), "bf16")
    equal(gradients(lambda fn: quantize(fn, FqnToConfig({"w": "bf16"}))), expected)


def test_a_batch_dimension_and_a_transposed_weight_of_ragged_dot_general(x: Any, weights: Any) -> None:
    """lhs [K, B, M], rhs [G, N, B, K]: neither is in the order of `ragged_dot`."""
    lhs = jnp.stack([x, 2 * x]).transpose(2, 0, 1)
    rhs = weights.transpose(1, 3, 0, 2)  # [G, N, B, K]
    numbers = lax.RaggedDotDimensionNumbers((((0,), (3,)), ((1,), (2,))), [2], [0])
    call = lambda lhs, rhs: lax.ragged_dot_general(lhs, rhs, SIZES, numbers)  # noqa: E731
    expected = jnp.stack([one_dot()(scale * x, w) for scale, w in zip((1, 2), weights, strict=True)])
    equal(jax.jit(quantize(call, RECIPE))(lhs, rhs), expected)


@pytest.mark.parametrize(("dtype", "out"), [(jnp.bfloat16, jnp.float32), (jnp.float32, jnp.bfloat16)])
def test_any_size_and_the_dtype_that_is_preferred(dtype: Any, out: Any) -> None:
    """K=20 and N=13 are padded, in the forward and in the gradients."""
    lhs = jax.random.normal(jax.random.key(3), (9, 20)).astype(dtype)
    rhs = jax.random.normal(jax.random.key(4), (2, 20, 13)).astype(dtype)
    sizes = jnp.array([4, 5])
    config = MXFP8GroupedMMConfig(out_dtype="bfloat16")  # which the call overrules
    call = lambda a, b: grouped_dot(a, b, sizes, preferred_element_type=out)  # noqa: E731

    def padded(a: Any, b: Any) -> Any:
        a, b = jnp.pad(a, ((0, 0), (0, 12))), jnp.pad(b, ((0, 0), (0, 12), (0, 3)))
        return ragged_dot(a, b, sizes, config=config, preferred_element_type=out)[:, :13]

    @functools.partial(jax.jit, static_argnums=0)
    def run(fn: Any) -> Any:
        y, backward = jax.vjp(fn, lhs, rhs)
        return y, backward(jnp.ones_like(y))

    equal(run(quantize(call, config)), run(padded))


def test_arguments_that_are_no_arrays_and_results_too(x: Any, weights: Any) -> None:
    table = np.ones((2, 2), np.float32)
    assert quantize(lambda x, w: (grouped_dot(x, w, SIZES), table), "bf16")(x, weights[0])[1] is table

    def fn(x: Any, w: Any, *, scale: float, note: str | None = None) -> Any:
        if note:
            return {"y": grouped_dot(x, w, SIZES) * scale, "note": note, "nothing": None}
        return None

    out = quantize(fn, "bf16")(x, weights[0], scale=2.0, note="n")
    assert (out["note"], out["nothing"]) == ("n", None)
    equal(out["y"], one_dot("bf16")(x, weights[0]) * 2.0)


def test_a_jitted_function_traced_before_is_converted_and_stays_as_it_was(x: Any, weights: Any) -> None:
    inner = jax.jit(lambda x, w: grouped_dot(x, w, SIZES))
    before = inner(x, weights[0])
    quantized = quantize(lambda x, w: inner(x, w), RECIPE)
    equal(quantized(x, weights[0]), one_dot()(x, weights[0]))
    equal(inner(x, weights[0]), before)


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint])
def test_what_a_conversion_traces_serves_no_other_call(wrap: Any, x: Any, weights: Any) -> None:
    """JAX keeps what it traced of an inner quantized function, inside a conversion and outside."""
    for first in ("outer", "inner"):
        inner = wrap(quantize(lambda x, w: grouped_dot(x, w, SIZES), RECIPE))
        outer = quantize(lambda x, w, inner=inner: inner(x, w), "bf16")
        for which in (first, "outer", "inner"):
            fn, config = (outer, "bf16") if which == "outer" else (inner, RECIPE)
            equal(fn(x, weights[0]), one_dot(config)(x, weights[0]))


def test_a_function_around_a_quantized_one(x: Any, weights: Any) -> None:
    """It is not taken for that one, though functools.wraps says so."""
    quantized = quantize(lambda x, w: grouped_dot(x, w, SIZES), RECIPE)
    twice = functools.wraps(quantized)(lambda x, w: 2 * quantized(x, w))
    equal(quantize(twice, "bf16")(x, weights[0]), 2 * one_dot("bf16")(x, weights[0]))
    equal(quantize(quantized, "bf16")(x, weights[0]), one_dot("bf16")(x, weights[0]))
    with pytest.raises(ValueError, match="model_or_fn differentiates a ragged_dot inside itself"):
        quantize(jax.grad(lambda x, w: quantized(x, w).sum(), 1), "bf16")(x, weights[0])
    with pytest.raises(ValueError, match="model_or_fn differentiates a ragged_dot inside itself"):
        quantize(jax.grad(quantize(lambda x, w: grouped_dot(x, w, SIZES).sum(), RECIPE), 1), "bf16")(x, weights[0])


def test_only_this_platforms_branch_is_lowered(x: Any, weights: Any) -> None:
    def elsewhere(x: Any, w: Any) -> Any:
        copy = lambda a, o: o.__setitem__(..., a[...])  # noqa: E731
        return pl.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype))(x)

    here = lambda x, w: grouped_dot(x, w, SIZES)  # noqa: E731
    fn = lambda x, w: lax.platform_dependent(x, w, tpu=elsewhere, default=here)  # noqa: E731
    equal(jax.jit(quantize(fn, RECIPE))(x, weights[0]), one_dot()(x, weights[0]))


def test_an_inner_jit_compiles_once(x: Any, weights: Any, caplog: pytest.LogCaptureFixture) -> None:
    inner = jax.jit(lambda x, w: grouped_dot(x, w, SIZES))
    quantized = quantize(lambda x, w: inner(x, w), "bf16")
    quantized(x, weights[0])
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        quantized(x, weights[0])
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]


def test_other_threads_keep_their_ragged_dot(x: Any, weights: Any) -> None:
    inside, seen = threading.Event(), threading.Event()
    found: list[Any] = []

    def slow(x: Any, w: Any) -> Any:
        inside.set()
        assert seen.wait(20), "the other thread did not run"
        return grouped_dot(x, w, SIZES)

    thread = threading.Thread(target=lambda: found.append(jax.jit(quantize(slow, RECIPE))(x, weights[0])))
    thread.start()
    assert inside.wait(20), "quantize did not trace"
    plain = jax.make_jaxpr(lambda x, w: grouped_dot(x, w, SIZES))(x, weights[0])
    seen.set()
    thread.join(60)
    assert "ragged_dot_general" in str(plain)
    equal(found[0], one_dot()(x, weights[0]))


# --------------------------------------------------------------------------------------------------------------- names


def chosen(fn: Any, config: Any, *args: Any, caplog: pytest.LogCaptureFixture) -> list[tuple[str, ...]]:
    """(weight, config) of each converted call, from the table that is logged."""
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=LOGGER):
        jax.eval_shape(quantize(fn, config), *args)
    tables = [r.getMessage().splitlines() for r in caplog.records if r.levelno == logging.INFO]
    return [(line.split("  ")[0], line.split()[-1]) for table in tables for line in table[2:]]


def test_names_follow_the_weight(x: Any, weights: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Through casts, slices, stacks, jit and arithmetic; activations carry none."""
    parameters = {"layers": [{"moe": {"w": weights[0], "scale": jnp.ones((E, 1, D))}}], "each": list(weights[0])}

    def fn(p: Any, x: Any, bare: Any) -> Any:
        first = p["layers"][0]["moe"]
        x = grouped_dot(x, jax.jit(jnp.multiply)(first["w"], first["scale"]).astype(x.dtype), SIZES)
        x = grouped_dot(x, jnp.stack(p["each"]).mT, SIZES)
        x = grouped_dot(x, bare[1], SIZES)
        return grouped_dot(x, jnp.ones((E, D, D)) * x[0, 0], SIZES)

    mapping = FqnToConfig(
        {"layers.0.moe": RECIPE, "re:each\\.\\d": "mxfp8_rceil", "bare": "bf16", "_default": "mxfp8_floor"}
    )
    assert chosen(fn, mapping, parameters, x, weights, caplog=caplog) == [
        ("layers.0.moe.scale = layers.0.moe.w", "fp8_rowwise"),
        ("each.0 = each.1 = each.2 = each.3", "mxfp8_rceil"),
        ("bare", "bf16"),
        ("a weight that is no parameter", "mxfp8_floor"),
    ]


@pytest.mark.parametrize(
    "derive",
    [
        lax.stop_gradient, lambda w: jnp.tile(w, (1, 1, 1)), lambda w: w.at[0].set(0), lambda w: w.at[0].multiply(2),
        lambda w: lax.clamp(-1.0, w, 1.0), jnp.round, jnp.tanh, jnp.square, lambda w: w**3, jnp.abs, jnp.sqrt, jnp.exp,
        lambda w: lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, w))[1],
        lambda w: lax.scan(lambda c, w: (w, c), jnp.ones_like(w[0]), w)[1],
    ],
)  # fmt: skip
def test_what_keeps_a_name(derive: Any, x: Any, weights: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = FqnToConfig({"w": "bf16", "_default": None})
    fn = lambda x, w: grouped_dot(x, derive(w), SIZES)  # noqa: E731
    assert chosen(fn, config, x, weights[0], caplog=caplog) == [("w", "bf16")]


@pytest.mark.parametrize("loop", ["scan", "while"])
def test_weights_that_a_loop_carries(loop: str, x: Any, weights: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The name of a carried weight is that of all that it ever is, inside the loop and behind it."""

    def repeat(body: Callable[[Any], Any], carry: Any) -> Any:
        if loop == "scan":
            return lax.scan(lambda carry, _: (body(carry), None), carry, None, length=3)[0]
        return lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, body(c[1])), (0, carry))[1]

    def fetched(x: Any, w: Any) -> Any:
        last, x = repeat(lambda c: (w, grouped_dot(c[1], c[0], SIZES)), (jnp.ones((E, D, D)), x))
        return grouped_dot(x, last, SIZES)

    def swapped(x: Any, a: Any, b: Any) -> Any:
        return repeat(lambda c: (c[1], c[0], grouped_dot(c[2], c[0], SIZES)), (a, b, x))[2]

    config = FqnToConfig({"w": "bf16", "_default": None})
    assert chosen(fetched, config, x, weights[0], caplog=caplog) == [("w", "bf16")] * 2
    with pytest.raises(ValueError, match=r"config gives one weight several configs \(a: bf16, b: None\)"):
        jax.eval_shape(quantize(swapped, FqnToConfig({"a": "bf16", "b": None})), x, *weights)


SHARED: dict[str, Callable[[Any], Any]] = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "jit in remat": lambda f: jax.checkpoint(jax.jit(f)),
    "cond": lambda f: lambda x, w: lax.cond(x.sum() < 1e9, f, lambda x, w: x, x, w),
    "scan": lambda f: functools.partial(lambda body, x, w: lax.scan(body, x, w[None])[0], lambda x, w: (f(x, w), None)),
}


@pytest.mark.parametrize("how", SHARED)
def test_layers_that_share_a_program_keep_their_names(
    how: str, x: Any, weights: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """JAX traces the function once, and each layer has its own config."""
    layer = SHARED[how](lambda x, w: grouped_dot(x, w, SIZES))

    def net(x: Any, p: Any) -> Any:
        for w in p.values():
            x = layer(x, w)
        return x

    p = {"l0": weights[0], "l1": weights[1], "l2": weights[0]}
    config = FqnToConfig({"l0": None, "l1": RECIPE, "l2": "bf16"})
    assert chosen(net, config, x, p, caplog=caplog) == [("l1", RECIPE), ("l2", "bf16")]
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    y = one_dot()(grouped_dot(x, p["l0"], SIZES), p["l1"])
    equal(jax.jit(quantize(net, config))(x, p), one_dot("bf16")(y, p["l2"]))


def test_only_what_a_key_names(x: Any, weights: Any) -> None:
    fn = lambda x, p: grouped_dot(grouped_dot(x, p["a"], SIZES), p["b"], SIZES)  # noqa: E731
    quantized = quantize(fn, FqnToConfig({"b": RECIPE, "a": None}))
    expected = one_dot()(lax.ragged_dot(x, weights[0], SIZES), weights[1])
    equal(jax.jit(quantized)(x, {"a": weights[0], "b": weights[1]}), expected)


# -------------------------------------------------------------------------------------------------------------- errors


@jax.custom_vjp
def own_derivative(x: Any, w: Any) -> Any:
    return grouped_dot(x, w, SIZES)


own_derivative.defvjp(lambda x, w: (own_derivative(x, w), None), lambda _, d: (d, None))


@pytest.mark.parametrize(
    ("fn", "config", "message"),
    [
        pytest.param(lambda x, w: w + 1, RECIPE, "nothing here calls jax.lax.ragged_dot", id="no call"),
        pytest.param(
            lambda x, w: grouped_dot(x, w, SIZES), FqnToConfig({"v": RECIPE}), "(keys: 'v') matches none", id="no match"
        ),
        pytest.param(
            lambda x, w: jax.grad(lambda w: grouped_dot(x, w, SIZES).sum())(w),
            RECIPE,
            "quantize the function",
            id="grad",
        ),
        pytest.param(
            lambda x, w: grouped_dot(x.astype(jnp.float16), w.astype(jnp.float16), SIZES),
            FqnToConfig({"w": RECIPE}),
            "w: lhs is float16, neither bfloat16 nor float32; leave it out",
            id="float16, named",
        ),
        pytest.param(
            lambda x, w: grouped_dot(x.astype(jnp.float16), w.astype(jnp.float16), SIZES),
            RECIPE,
            "w: lhs is float16",
            id="float16, not named",
        ),
        pytest.param(
            lambda x, w: grouped_dot(x, w + x[0], SIZES),
            FqnToConfig({"w": RECIPE, "x": "bf16"}),
            "one weight several configs (w: fp8_rowwise, x: bf16)",
            id="two configs",
        ),
        pytest.param(
            lambda x, w: own_derivative(x, w),
            RECIPE,
            "are inside custom_vjp_call, whose derivative is not made of its calls, so none can be converted; call",
            id="custom_vjp",
        ),
    ],
)
def test_errors_of_a_call(fn: Any, config: Any, message: str, x: Any, weights: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(quantize(fn, config), x, weights[0])


@pytest.mark.parametrize(
    ("model", "config", "options", "message"),
    [
        (lambda x: x, "tensorwise", {}, "config is 'tensorwise'; give a GroupedMMConfig"),
        (lambda x: x, "nonsense", {}, "config is 'nonsense'; give a GroupedMMConfig, an FqnToConfig or one of bf16, "),
        (lambda x: x, None, {}, "config is None"),
        (RoutedMoE, RECIPE, {}, "give a Flax module (an instance of it)"),
        (
            jax.tree_util.Partial(max, np.ones((2, 2))),
            RECIPE,
            {},
            "a Partial, a pytree with weights in it; quantize",
        ),
        (LinenMoE(), RECIPE, {"methods": ("encode",)}, "methods: LinenMoE has no method 'encode'"),
        (LinenMoE(), RECIPE, {"methods": "encode"}, "methods: LinenMoE has no method 'encode'"),
    ],
)
def test_errors_of_quantize(model: Any, config: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        quantize(model, config, **options)


def test_warnings_are_given_once(x: Any, weights: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Of keys that match nothing, of calls that cannot be converted, and of those with derivatives of their own."""

    def fn(x: Any, w: Any) -> Any:
        y = grouped_dot(own_derivative(x, w), w, SIZES)
        return y + grouped_dot(x.astype(jnp.float16), w.astype(jnp.float16), SIZES)

    quantized = quantize(fn, FqnToConfig({"typo": RECIPE, "_default": RECIPE}))
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        for _ in range(2):
            jax.eval_shape(quantized, x, weights[0])
    assert [r.getMessage() for r in caplog.records] == [
        "quantize: left alone: w: lhs is float16, neither bfloat16 nor float32",
        "quantize: left alone: calls inside custom_vjp_call, whose derivative is not made of its calls",
        "quantize: no weight of a ragged_dot matches 'typo'",
    ]
