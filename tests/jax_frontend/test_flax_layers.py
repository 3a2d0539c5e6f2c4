"""The NNX and the Linen MoE layer: against every expert on every token, against each other, under Flax's transforms."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests.jax_frontend.dense import dense_gates, dense_moe
from tests.jax_frontend.values import KERNEL_TIER
from xmoe import FqnToConfig, oracle
from xmoe.jax_frontend import MoE, combine, functional, linen, route, swiglu_experts
from xmoe.jax_frontend.moe import RouterBias

D, H, E, k, T = 32, 48, 8, 2, 36
V3 = {"score_function": "sigmoid", "num_expert_groups": 4, "num_limited_groups": 2, "scaling_factor": 2.5}


QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiles in half the time."""


def nnx_layer(**options: Any) -> MoE:
    return MoE(D, H, E, k, **options, rngs=nnx.Rngs(0))


def tokens(dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (T, D), dtype)


def as_linen(layer: MoE, **options: Any) -> tuple[linen.MoE, dict[str, Any]]:
    """A Linen layer of the same arguments, and the weights and the bias of ``layer`` as its variables."""
    variables = {"params": nnx.to_pure_dict(nnx.state(layer, nnx.Param))}
    if layer.router.bias is not None:
        variables["router_stats"] = {"router": {"bias": layer.router.bias[...]}}
    return linen.MoE(D, H, E, k, **options), variables


def leaves(tree: Any) -> dict[str, jax.Array]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.flatten_with_path(tree)[0]}


ACTS: dict[str, Any] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu": lambda x: jnp.maximum(x, 0),
    "relu2": lambda x: jnp.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + jnp.exp(-x)),
}
ROUTER = ("score_function", "num_expert_groups", "num_limited_groups", "scaling_factor", "capacity_factor")


@pytest.mark.parametrize(
    ("activation", "options"),
    [
        ("swiglu", {"shared_hidden_dim": 24, "capacity_factor": 0.8}),
        ("geglu", {**V3, "bias_update_rate": 0.5}),
        ("relu2", {"shared_hidden_dim": 24}),
    ],
)
def test_math_and_equal_bits(activation: str, options: dict[str, Any]) -> None:
    """Outputs, losses, gradients and new biases of the two layers are equal, and near those of dense experts."""
    options = {**options, "activation": activation, "gated": activation.endswith("glu")}
    layer = nnx_layer(**options)
    if layer.router.bias is not None:
        layer.router.bias[...] = 0.2 * jax.random.normal(jax.random.key(3), E)
    module, variables = as_linen(layer, **options)
    graph, nnx_params, rest = nnx.split(layer, nnx.Param, ...)
    x, dy = tokens(), jax.random.normal(jax.random.key(2), (T, D))

    def in_nnx(params: Any, x: jax.Array) -> Any:
        layer = nnx.merge(graph, params, rest, copy=True)
        y, load_balance_loss = layer(x)
        bias = None if layer.router.bias is None else layer.router.bias[...]
        return (y * dy).sum() + load_balance_loss, {"y": y, "loss": load_balance_loss, "bias": bias}

    def in_linen(params: Any, x: jax.Array) -> Any:
        (y, load_balance_loss), state = module.apply({**variables, "params": params}, x, mutable=["router_stats"])
        bias = state["router_stats"]["router"]["bias"] if state else None
        return (y * dy).sum() + load_balance_loss, {"y": y, "loss": load_balance_loss, "bias": bias}

    def dense(params: Any, x: jax.Array) -> Any:
        routing = {name: options[name] for name in ROUTER if name in options}
        routing["bias"] = variables["router_stats"]["router"]["bias"] if "router_stats" in variables else None
        y = dense_moe(params, x, k, ACTS[activation], **routing)
        logits = x @ params["router"]["weight"].T
        _, rank = dense_gates(logits, k, **routing)
        p = dense_probabilities(logits, "score_function" in options)
        load_balance_loss = E * ((rank < k).mean(axis=0) / k * p.mean(axis=0)).sum()
        return (y * dy).sum() + load_balance_loss, {"y": y, "loss": load_balance_loss}

    def run(fn: Any, params: Any) -> Any:
        """In a program of its own: XLA may fuse what several have in common."""
        with jax.default_matmul_precision("highest"):
            return jax.jit(jax.grad(fn, (0, 1), has_aux=True), compiler_options=QUICKLY)(params, x)

    def by_name(result: Any) -> dict[str, jax.Array]:
        (grads, dx), values = result
        grads = nnx.to_pure_dict(grads) if isinstance(grads, nnx.State) else grads
        return {"dx": dx, **values, **leaves(grads)}

    params = variables["params"]
    got, of_linen, want = (by_name(run(*c)) for c in ((in_nnx, nnx_params), (in_linen, params), (dense, params)))
    assert got.keys() == of_linen.keys() == want.keys() | {"bias"}
    for name, value in got.items():
        np.testing.assert_array_equal(value, of_linen[name], err_msg=name)
    for name, value in want.items():
        assert oracle.sqnr(value, got[name]) >= 120, name
    if got["bias"] is not None:
        np.testing.assert_allclose(np.abs(got["bias"] - layer.router.bias[...]).max(), 0.5, rtol=1e-6)


@pytest.mark.parametrize("activation", ACTS)
def test_activations(activation: Any) -> None:
    """In float32, whatever the dtype."""
    gate, up = tokens(jnp.bfloat16), tokens(jnp.bfloat16)[::-1] if activation.endswith("glu") else None
    got = jax.jit(functional.activate, static_argnums=0)(activation, gate, up)
    want = ACTS[activation](gate.astype(jnp.float32)) * (1 if up is None else up.astype(jnp.float32))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), want, rtol=2**-7 if up is not None else 2**-8, atol=1e-30)


def dense_probabilities(logits: jax.Array, sigmoid: bool) -> jax.Array:
    if not sigmoid:
        return jax.nn.softmax(logits, axis=1)
    p = 1 / (1 + jnp.exp(-logits))
    return p / p.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("config", "dtype", "options"),
    [
        ("bf16", "bfloat16", {"activation": "geglu", **V3}),
        ("fp8_rowwise", "bfloat16", {"capacity_factor": 0.8}),  # the fused op
        (FqnToConfig({"experts.w2": "fp8_rowwise"}), "float32", {"gated": False, "activation": "relu2"}),
    ],
)
def test_recipes_are_near(config: Any, dtype: str, options: dict[str, Any]) -> None:
    x = tokens(jnp.dtype(dtype))
    apply = nnx.jit(lambda layer, x: layer(x)[0])
    y, want = apply(nnx_layer(config=config, **options), x), apply(nnx_layer(**options), x.astype(jnp.float32))
    assert y.dtype == x.dtype
    least = 40 if config == "bf16" else 22
    assert least <= oracle.sqnr(want, y.astype(jnp.float32)) < 60  # and it is not the unquantized layer


def test_state_moves_in_training_only() -> None:
    layer, x = nnx_layer(bias_update_rate=0.01), tokens()
    step = nnx.jit(lambda layer, x: nnx.capture(layer, nnx.Intermediate)(x))
    layer.eval()
    step(layer, x)
    assert not np.asarray(layer.router.bias[...]).any()
    layer.train()
    _, metrics = step(layer, x)
    counts = metrics["tokens_per_expert"][0]
    np.testing.assert_array_equal(layer.router.bias[...], 0.01 * np.sign(T * k / E - counts).astype(np.float32))
    kinds = {".".join(path): type(variable) for path, variable in nnx.to_flat_state(nnx.state(layer))}
    weights = ["router.weight", *(f"experts.w{i}" for i in (1, 2, 3))]
    assert kinds == {"router.bias": RouterBias, **dict.fromkeys(weights, nnx.Param)}  # nothing was left by the capture


class Stack(nn.Module):
    """Two Linen layers, each in a checkpoint, by `flax.linen.scan`."""

    options: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        scan = nn.scan(
            nn.remat(Residual),
            {"params": 0, "router_stats": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(self.options, name="layers")(x, None)


class Residual(nn.Module):
    options: dict[str, Any]

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        y, load_balance_loss = linen.MoE(D, H, E, k, **self.options, name="moe")(x)
        return x + y, load_balance_loss


def test_scans_over_layers_with_remat() -> None:
    """Stacked layers under NNX's and Linen's scan and remat are the layers one after the other."""
    options = {"bias_update_rate": 0.01, "gated": False}
    x, stack = tokens(), Stack(options)
    variables = jax.jit(stack.init)(jax.random.key(0), x)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def in_linen(params: Any) -> Any:
        def loss(params: Any) -> Any:
            mutable = ["router_stats", "intermediates"]
            (y, losses), state = stack.apply({**variables, "params": params}, x, mutable=mutable)
            return (y**2).mean() + losses.sum(), (y, state)

        return jax.grad(loss, has_aux=True)(params)

    @nnx.jit
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: jax.Array) -> MoE:
        return MoE(D, H, E, k, **options, rngs=nnx.Rngs(key))

    @nnx.jit
    def in_nnx(layers: MoE) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
        @nnx.remat
        def forward(x: jax.Array, layer: MoE) -> tuple[jax.Array, jax.Array]:
            y, load_balance_loss = layer(x)
            return x + y, load_balance_loss

        def loss(layers: MoE) -> Any:
            (y, losses), metrics = nnx.capture(lambda layers: forward(x, layers), nnx.Intermediate)(layers)
            return (y**2).mean() + losses.sum(), (y, nnx.to_pure_dict(metrics))

        return nnx.grad(loss, has_aux=True)(layers)

    def in_turn(params: Any) -> jax.Array:
        y = x
        for i in range(2):
            layer = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]["moe"])
            bias = {"router": {"bias": jnp.zeros(E)}}
            y = y + linen.MoE(D, H, E, k, **options).apply({"params": layer, "router_stats": bias}, y)[0]
        return y

    grads, (y, state) = in_linen(variables["params"])
    layers = make(jax.random.split(jax.random.key(1), 2))
    nnx.update(layers, variables["params"]["layers"]["moe"])
    nnx_grads, (nnx_y, metrics) = in_nnx(layers)
    want_y = jax.jit(in_turn, compiler_options=QUICKLY)(variables["params"])
    bias, sown = state["router_stats"]["layers"]["moe"]["router"]["bias"], state["intermediates"]["layers"]["moe"]
    np.testing.assert_array_equal(layers.router.bias[...], bias)
    np.testing.assert_array_equal(bias, 0.01 * np.sign(T * k / E - sown["tokens_per_expert"][0]).astype(np.float32))
    assert min(oracle.sqnr(want_y, y), oracle.sqnr(want_y, nnx_y)) >= 110
    assert metrics.keys() == sown.keys()
    for name, (values,) in metrics.items():  # of both layers in one array
        np.testing.assert_allclose(values, sown[name][0], rtol=1e-6, err_msg=name)
    grads, nnx_grads = leaves(grads), leaves({"layers": {"moe": nnx.to_pure_dict(nnx_grads)}})
    assert grads.keys() == nnx_grads.keys()
    for name, gradient in grads.items():
        assert oracle.sqnr(gradient, nnx_grads[name]) >= 110, name


NAMES = ("expert", "embed", "mlp")
RULES = (("expert", "x"), ("embed", None), ("mlp", "y"))


def test_logical_axis_names() -> None:
    """Of both layers, on a mesh: each parameter is sharded as the rules say."""
    options = {"shared_hidden_dim": 16, "axis_names": NAMES}
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices("cpu"))
    with nnx.use_eager_sharding(False):
        specs = nnx.get_partition_spec(nnx.state(nnx.eval_shape(lambda: nnx_layer(**options))))
    variables = jax.eval_shape(linen.MoE(D, H, E, k, **options).init, jax.random.key(0), tokens())
    P = jax.sharding.PartitionSpec
    matrices = {"w1": P("mlp", "embed"), "w2": P("embed", "mlp"), "w3": P("mlp", "embed")}
    want = {
        "router": {"weight": P(None, "embed")},
        "experts": {name: P("expert", *spec) for name, spec in matrices.items()},
        "shared": {name: {"weight": spec} for name, spec in matrices.items()},
    }
    assert nnx.to_pure_dict(specs) == want
    assert nn.get_partition_spec(variables)["params"] == want
    with jax.set_mesh(mesh), nnx.logical_axis_rules(RULES):
        layer = nnx.jit(lambda: nnx_layer(**options))()
        assert layer.experts.w2[...].sharding.spec == P("x", None, "y")
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(variables), mesh, RULES)
    assert shardings["params"]["experts"]["w1"].spec == P("x", "y", None)


def test_initializers_are_called_as_flax_kernels_are() -> None:
    """[in, out], each expert's by itself, so that fan-in is the input's; the default has the same variance."""
    for kernel_init in (None, nnx.initializers.lecun_normal()):
        init = jax.jit(functional.weight_init(kernel_init), static_argnums=(1, 2))
        experts = init(jax.random.key(0), (E, 256, D), jnp.dtype("float32"))
        np.testing.assert_allclose(experts.std(), D**-0.5, rtol=0.02)
        assert not np.array_equal(experts[0], experts[1])
        matrix = init(jax.random.key(0), (16, 1024), jnp.dtype("bfloat16"))
        np.testing.assert_allclose(matrix.astype(jnp.float32).std(), 1024**-0.5, rtol=0.02)
        assert (matrix.shape, matrix.dtype) == ((16, 1024), jnp.bfloat16)
    layer = nnx_layer(kernel_init=nnx.initializers.constant(0.5), shared_hidden_dim=16)
    assert {float(jnp.ptp(w) + w.max()) for w in jax.tree.leaves(nnx.to_pure_dict(nnx.state(layer)))} == {0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, r"activation='gelu' is not for gated experts; .*'swiglu', 'geglu', or gated=False"),
        ({"gated": False, "activation": "swiglu"}, r"activation='swiglu' .* plain experts; .* or gated=True"),
        ({"activation": "tanh"}, r"activation='tanh' .* use one of 'swiglu', 'geglu'"),
        ({"axis_names": ("expert", "embed")}, r"axis_names=\('expert', 'embed'\) are not three"),
        ({"capacity_factor": -1.0}, r"capacity_factor=-1.0"),
        ({"scaling_factor": -1.0}, r"scaling_factor=-1.0 is not a positive number"),
        ({"bias_update_rate": -1.0}, r"bias_update_rate=-1.0 would not even the load; give 0 or a small positive"),
        ({"bias_update_rate": float("nan")}, r"bias_update_rate=nan"),
        ({"shared_hidden_dim": -16}, r"shared_hidden_dim=-16 is negative; give a width, or None"),
        ({"shared_hidden_dim": 16.0}, r"shared_hidden_dim=16.0 is not an integer"),
        ({"dim": 32.0}, r"dim=32.0 is not an integer; give one"),
        ({"hidden_dim": "48"}, r"hidden_dim='48' is not an integer"),
        ({"top_k": True}, r"top_k=True is not an integer"),
        ({"capacity_factor": "2"}, r"capacity_factor='2' is not a positive number; use None"),
        ({"scaling_factor": True}, r"scaling_factor=True is not a positive number"),
        ({"bias_update_rate": "x"}, r"bias_update_rate='x' would not even the load; give 0"),
        ({"normalize_scores": "yes"}, r"normalize_scores='yes' is not a boolean; use True or False"),
        ({"gated": "yes"}, r"gated='yes' is not a boolean"),
        ({"dtype": "foo"}, r"^dtype='foo' is not supported; use one of bfloat16, float32"),
        ({"dtype": jnp.float16}, r"^dtype=.*float16.* is not supported"),
        ({"kernel_init": "normal"}, r"kernel_init='normal' is no function; give one of flax.nnx.initializers, or None"),
        ({"param_dtype": "foo"}, r"param_dtype='foo' is not supported; use one of bfloat16, float16"),
        ({"param_dtype": jnp.int8}, r"param_dtype=.*int8.* is not supported"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    options = {"dim": D, "hidden_dim": H, "num_experts": E, "top_k": k, **options}
    with pytest.raises(ValueError, match=message):
        MoE(**options, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(linen.MoE(**options).init, jax.random.key(0), tokens())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rngs": None}, r"rngs is a NoneType; give flax.nnx.Rngs, such as nnx.Rngs\(0\)"),
        ({"rngs": 0}, r"rngs is a int; give"),
        ({"rngs": jax.random.key(0)}, r"rngs is a .*; give flax.nnx.Rngs"),
        ({"path": 3}, r"path=3 is no name; give one such as 'layers.0.moe' or"),
    ],
)
def test_wrong_arguments_of_nnx_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(D, H, E, k, **{"rngs": nnx.Rngs(0), **options})


def test_numbers_of_numpy_and_short_names_of_dtypes() -> None:
    layer = MoE(
        np.int64(D), np.int32(H), np.int64(E), np.int8(k), capacity_factor=np.float32(1.1), rngs=nnx.Rngs(0),
        scaling_factor=np.float64(2), normalize_scores=np.True_, bias_update_rate=np.float32(0.1), dtype="bf16",
        param_dtype="fp32", deterministic=True,
    )  # fmt: skip
    y, _ = jax.eval_shape(layer, tokens())
    assert (y.shape, layer.dtype, layer.experts.w1.dtype) == ((T, D), jnp.bfloat16, jnp.float32)


def test_lists_are_no_tokens() -> None:
    layer, x = nnx_layer(), tokens()
    with pytest.raises(ValueError, match=r"x is a list; give an array, jnp.asarray\(x\)"):
        layer(x.tolist())
    with pytest.raises(ValueError, match="x is a list; give an array"):
        linen.MoE(D, H, E, k).init(jax.random.key(0), x.tolist())


def test_a_layer_without_a_bias_has_none_to_update() -> None:
    with pytest.raises(ValueError, match="bias_update_rate=None"):
        nnx_layer().update_bias(jnp.zeros(E))


def test_dropped_slots_stay_out_of_the_bridges_gemms() -> None:
    """The fused op through the bridge, where groups end before the rows: as in plain JAX, and no gradient of a token
    that nobody took."""
    x, logits = tokens(jnp.bfloat16), jax.random.normal(jax.random.key(2), (T, E)) + jnp.arange(float(E))
    shapes = ((E, 64, D), (E, D, 64), (E, 64, D))
    weights = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) / 6 for i, shape in enumerate(shapes)]

    def loss(x: jax.Array, implementation: Any) -> Any:
        routing = route(logits, k, capacity_factor=0.6)
        sizes, order = routing.group_sizes, routing.order
        rows = swiglu_experts(x, *weights, sizes, config="fp8_rowwise", order=order, implementation=implementation)
        y = combine(rows, routing.scores, order)
        return (y**2).sum(), (y, routing)

    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1, compiler_options=QUICKLY)
    (dx, (y, routing)), (want_dx, (want_y, _)) = run(x, "bridge"), run(x, "jax")
    dropped = (np.asarray(routing.scores) == 0).all(axis=1)
    assert 0 < dropped.sum() < T
    assert not np.any(y[dropped])
    assert not np.any(dx[dropped])
    assert oracle.sqnr(want_y, y) >= 120
    assert oracle.sqnr(want_dx.astype(jnp.float32), dx.astype(jnp.float32)) >= KERNEL_TIER
