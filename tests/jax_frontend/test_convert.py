"""`quantize`: a model's `jax.lax.ragged_dot` calls give the bits of `xmoe.jax_frontend.ragged_dot`, and nothing else.

`RoutedMoE` (NNX) and `LinenMoE` have the structure of MaxText's routed experts: tokens are sorted by expert, three
grouped GEMMs with kernels wi_0, wi_1 [E, D, H] and wo [E, H, D] cast to the layer's dtype, and the way back. Both take
the grouped GEMM from the module's global `grouped_dot`, which a test replaces for the reference.
"""

import copy
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from xmoe import FqnToConfig, MXFP8GroupedMMConfig
from xmoe.jax_frontend import from_qwix_rules, quantize, ragged_dot

T, D, H, E, K = 12, 32, 48, 4, 2
RECIPE = "fp8_rowwise"
LOGGER = "xmoe.jax_frontend.convert"

grouped_dot: Callable[..., jax.Array] = lax.ragged_dot  # bound at import: no patch of jax.lax would reach it


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly() -> Iterator[None]:
    """Both sides of each comparison are compiled alike; XLA's optimizations are most of the time otherwise."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def one_dot(config: Any = RECIPE) -> Callable[..., jax.Array]:
    """`ragged_dot` on SIZES, compiled once."""
    return jax.jit(lambda x, w: ragged_dot(x, w, SIZES, config=config))


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``reference(run, config)``: what ``run()`` gives where the model calls `xmoe.jax_frontend.ragged_dot` itself."""

    def of(run: Callable[[], Any], config: Any = RECIPE) -> Any:
        with monkeypatch.context() as patched:
            patched.setitem(globals(), "grouped_dot", functools.partial(ragged_dot, config=config))
            return run()

    return of


def equal(a: Any, b: Any) -> None:
    """The same bits everywhere."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert jnp.result_type(x) == jnp.result_type(y)
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


def experts(x: jax.Array, router: jax.Array, wi_0: Any, wi_1: Any, wo: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """[T, D] -> [T, D] and the tokens of each expert."""
    weights, chosen = lax.top_k(jax.nn.softmax(x @ router), K)
    slots = jnp.argsort(chosen.reshape(-1))
    sizes = jnp.bincount(chosen.reshape(-1), length=E)
    rows = x[slots // K].astype(dtype)
    wi_0, wi_1, wo = (jnp.asarray(w, dtype) for w in (wi_0, wi_1, wo))

    def gmm(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return grouped_dot(lhs, rhs, sizes, preferred_element_type=dtype)

    hidden = jax.nn.silu(gmm(rows, wi_0)) * gmm(rows, wi_1)
    back = gmm(hidden, wo)[jnp.argsort(slots)].reshape(-1, K, D)
    return jnp.einsum("tkd,tk->td", back, weights.astype(dtype)).astype(x.dtype), sizes


class RoutedMoE(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        init = nnx.initializers.lecun_normal(batch_axis=0)
        self.gate = nnx.Linear(D, E, use_bias=False, rngs=rngs)
        self.wi_0 = nnx.Param(init(rngs.params(), (E, D, H)))
        self.wi_1 = nnx.Param(init(rngs.params(), (E, D, H)))
        self.wo = nnx.Param(init(rngs.params(), (E, H, D)))
        self.seen = nnx.BatchStat(jnp.zeros(E, jnp.int32))
        self.dtype = dtype

    def __call__(self, x: jax.Array, count: bool = True) -> jax.Array:
        y, sizes = experts(x, self.gate.kernel[...], self.wi_0[...], self.wi_1[...], self.wo[...], self.dtype)
        if count:
            self.seen[...] = self.seen[...] + sizes
        return y


class Model(nnx.Module):
    """Two layers, residual; the second under remat."""

    def __init__(self, rngs: nnx.Rngs, dtype: Any = jnp.float32) -> None:
        self.layers = nnx.List([RoutedMoE(rngs, dtype), RoutedMoE(rngs, dtype)])
        self.calls = 0

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls += 1
        x = x + self.layers[0](x)
        return x + nnx.remat(lambda layer, x: layer(x))(self.layers[1], x)


class LinenMoE(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, count: bool = True) -> jax.Array:
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(batch_axis=0), ("exp", "in", "out"))
        wi_0, wi_1 = (self.param(f"wi_{i}", init, (E, D, H)) for i in range(2))
        wo = self.param("wo", init, (E, H, D))
        router = self.param("router", nn.initializers.lecun_normal(), (D, E))
        y, sizes = experts(x, router, wi_0, wi_1, wo, self.dtype)
        if count:
            self.sow("intermediates", "sizes", sizes)
        return x + y


class LinenModel(nn.Module):
    """Two layers: scanned with remat, so each parameter is a stack."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        block = nn.remat(LinenMoE, static_argnums=(2,))
        stack = nn.scan(
            lambda layer, carry, _: (layer(carry, False), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            metadata_params={nn.PARTITION_NAME: "layers"},
            length=2,
        )
        return nn.Dense(8)(stack(block(name="moe"), x, None)[0])


@pytest.fixture(scope="module")
def x() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (T, D))


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


# ----------------------------------------------------------------------------------------------------------------- NNX


@pytest.fixture
def model() -> Model:
    return Model(nnx.Rngs(0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_nnx_training_step(dtype: Any, x: Any, reference: Any) -> None:
    """nnx.jit around nnx.grad, with state that the forward writes."""
    config = RECIPE if dtype == jnp.bfloat16 else "bf16"

    def step(convert: Callable[[Any], Any]) -> Any:
        model = convert(Model(nnx.Rngs(0), dtype))
        run = nnx.jit(nnx.value_and_grad(lambda model: jnp.square(model(x)).mean()))
        loss, gradients = run(model)
        return loss, nnx.to_pure_dict(gradients), nnx.to_pure_dict(nnx.state(model)), model.calls

    equal(step(lambda model: quantize(model, config)), reference(lambda: step(lambda model: model), config))


def test_nnx_modules_are_what_they_were(model: Model, x: Any) -> None:
    quantized = quantize(model, FqnToConfig({"layers.0": "bf16"}))
    assert isinstance(quantized, Model)
    assert type(quantized).__name__ == "Model"
    assert type(quantized).__qualname__ == Model.__qualname__
    assert quantized.layers is model.layers, "variables are shared"
    assert jax.tree.structure(nnx.state(quantized)) == jax.tree.structure(nnx.state(model))
    graphdef, state = nnx.split(quantized)
    assert nnx.graphdef(quantize(model, FqnToConfig({"layers.0": "bf16"}))) == graphdef, "nnx.jit knows it again"
    again = nnx.merge(graphdef, state)
    y = nnx.jit(lambda m: m(x))(again)
    assert not jnp.array_equal(y, nnx.jit(lambda m: m(x))(model)), "it is still quantized"
    equal(jax.jit(lambda state: nnx.merge(graphdef, state)(x))(state), y)
    assert type(quantize(quantized, RECIPE)).__mro__[1] is Model, "converting again replaces the config"
    assert type(copy.deepcopy(quantized)) is type(quantized)


def test_nnx_names_and_state(model: Model, x: Any, caplog: pytest.LogCaptureFixture) -> None:
    quantized = quantize(model, FqnToConfig({"layers.1": "bf16", "re:.*wo": RECIPE}))
    with caplog.at_level(logging.INFO, logger=LOGGER):
        nnx.jit(lambda model, x: model(x))(quantized, x)
    table = caplog.records[-1].getMessage().splitlines()
    assert table[0] == "quantize: 4 of 6 ragged_dot calls"
    assert [line.split()[0] for line in table[2:]] == ["layers.0.wo", "layers.1.wi_0", "layers.1.wi_1", "layers.1.wo"]
    assert model.layers[0].seen[...].sum() == T * K
    assert quantized.calls == 1


def test_nnx_module_that_a_trace_only_reads(x: Any) -> None:
    """A module that is closed over may be called, where it writes nothing."""
    quantized = quantize(RoutedMoE(nnx.Rngs(0)), "bf16")
    equal(jax.jit(lambda x: quantized(x, count=False))(x), nnx.jit(lambda model, x: model(x))(quantized, x))


def test_nnx_function_with_a_module_among_its_arguments(model: Model, x: Any, reference: Any) -> None:
    loss = lambda model, x: jnp.square(model(x)).mean()  # noqa: E731
    quantized = nnx.value_and_grad(quantize(loss, FqnToConfig({"layers": "bf16"})))
    value, gradients = nnx.jit(quantized)(model, x)
    assert model.layers[0].seen[...].sum() == T * K
    plain = nnx.jit(nnx.value_and_grad(lambda model, x: loss(model, x)))
    expected = reference(lambda: plain(Model(nnx.Rngs(0)), x), "bf16")
    equal((value, nnx.to_pure_dict(gradients)), (expected[0], nnx.to_pure_dict(expected[1])))


# --------------------------------------------------------------------------------------------------------------- Linen


def test_linen_scanned_and_rematerialised(x: Any, reference: Any) -> None:
    plain = LinenModel()
    quantized = quantize(plain, FqnToConfig({"moe": "bf16"}))
    variables = jax.jit(quantized.init)(jax.random.key(0), x)
    equal(variables, jax.jit(plain.init)(jax.random.key(0), x))

    def run(model: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda v: jnp.square(model.apply(v, x)).mean()))(variables)

    equal(run(quantized), reference(lambda: run(plain), "bf16"))


def test_linen_bf16_metrics_and_names(x: Any, reference: Any, caplog: pytest.LogCaptureFixture) -> None:
    plain = LinenMoE(jnp.bfloat16)
    quantized = quantize(plain, FqnToConfig({"re:wi_.": RECIPE, "_default": RECIPE}))
    assert isinstance(quantized, LinenMoE)
    assert type(quantized).__name__ == "LinenMoE"
    variables = jax.jit(lambda key: quantized.init(key, x, count=False))(jax.random.key(0))
    run = lambda model: jax.jit(lambda v: model.apply(v, x, count=True, mutable=["intermediates"]))(variables)  # noqa: E731
    with caplog.at_level(logging.INFO, logger=LOGGER):
        got = run(quantized)
    equal(got, reference(lambda: run(plain)))
    assert [line.split()[0] for line in caplog.records[-1].getMessage().splitlines()[2:]] == ["wi_0", "wi_1", "wo"]


def test_linen_inside_another_module_and_bound(x: Any) -> None:
    class Outer(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.inner(x, count=False)

    inner = quantize(LinenMoE(), "bf16")
    variables = jax.jit(Outer(inner).init)(jax.random.key(0), x)
    own = {"params": variables["params"]["inner"]}
    expected = jax.jit(lambda v: inner.apply(v, x, count=False))(own)
    equal(jax.jit(Outer(inner).apply)(variables, x), expected)
    equal(jax.jit(lambda v: inner.bind(v)(x, count=False))(own), expected)
    assert not jnp.array_equal(jax.jit(Outer(LinenMoE()).apply)(variables, x), expected)


def test_qwix_rules_on_a_model(model: Model, x: Any, caplog: pytest.LogCaptureFixture) -> None:
    types = dict.fromkeys(("weight_qtype", "act_qtype", "bwd_qtype"), "float8_e4m3fn")
    rules = from_qwix_rules([SimpleNamespace(module_path="layers/1", op_names=("ragged_dot",), **types)])
    with caplog.at_level(logging.INFO, logger=LOGGER):
        nnx.eval_shape(lambda model: model(x), quantize(model, rules))
    assert "3 of 6" in caplog.records[-1].getMessage()
