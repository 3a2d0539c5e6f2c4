"""Expert parallelism on 8 host devices: rows, results and gradients against a single device."""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe import oracle
from xmoe.jax_frontend import (
    ExpertParallel,
    MoE,
    combine,
    expert_parallel,
    linen,
    parallel_experts,
    permute_tokens,
    swiglu_experts,
)
from xmoe.jax_frontend.exchange import exchange, slices

T, D, H, E, k = 64, 32, 64, 8, 3
"""T: of all devices together."""
MESHES = {"8": {"expert": 8}, "2x4": {"data": 2, "expert": 4}, "2x2x2": {"data": 2, "expert": 2, "tensor": 2}}
each_exchange = pytest.mark.parametrize("how", ["ragged_all_to_all", "all_to_all", "all_gather"])


def mesh_of(axes: dict[str, int], kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((*axes.values(),), (*axes,), axis_types=(kind,) * len(axes), devices=jax.devices("cpu"))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


X, DY = normal(0, T, D), normal(1, T, D)
WEIGHTS = {"w1": normal(2, E, H, D) / 6, "w2": normal(3, E, D, H) / 8, "w3": normal(4, E, H, D) / 6}
CHOSEN = jax.lax.top_k(normal(5, T, E) + jnp.arange(E) / 4, k)[1]  # uneven
SCORES = 2.0 ** -jax.random.randint(jax.random.key(6), (T, k), 0, 3).astype(jnp.float32)
"""Powers of two: products with them are exact, so a fused multiply-add gives no other bits."""


def ragged_all_to_all(
    operand: Any, output: Any, input_offsets: Any, send_sizes: Any, output_offsets: Any, recv_sizes: Any, *,
    axis_name: Any,
) -> jax.Array:  # fmt: skip
    """What the documentation of `jax.lax.ragged_all_to_all` says, for XLA's CPU backend, which has none. Sizes on which
    sender and receiver disagree poison the result."""
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    everyones = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    for sender, (rows, *pieces) in enumerate(zip(*everyones, strict=True)):
        begins, sizes, there = (a.reshape(len(everyones[0]), -1)[me] for a in pieces)
        expected = recv_sizes.reshape(len(everyones[0]), -1)[sender]
        within = row[:, None] - there  # [rows, pieces]
        mine = (within >= 0) & (within < sizes)
        received = rows[jnp.clip((begins + within).max(1, where=mine, initial=0), 0, rows.shape[0] - 1)]
        output = jnp.where(mine.any(1, keepdims=True), received, output)
        output = jnp.where((expected == sizes).all(), output, jnp.nan)
    return output


@pytest.fixture
def _ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    module = sys.modules[ExpertParallel.__module__]  # its name is a function's, too
    monkeypatch.setattr(module, "platform", lambda: "gpu")


def float32_experts(
    weights: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, order: jax.Array | None
) -> jax.Array:
    """SwiGLU experts without any quantization."""
    rows = rows if order is None else permute_tokens(rows, order)
    within = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]

    def dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        rows = jax.lax.ragged_dot(jnp.where(within, rows, 0), weight.swapaxes(1, 2), sizes, precision=highest)
        return jnp.where(within, rows, 0)

    return dot(jax.nn.silu(dot(rows, weights["w1"])) * dot(rows, weights["w3"]), weights["w2"])


def fp8_experts(weights: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, order: jax.Array | None) -> jax.Array:
    w1, w2, w3 = (weights[name].astype(rows.dtype) for name in ("w1", "w2", "w3"))
    return swiglu_experts(rows, w1, w2, w3, sizes, config="fp8_rowwise", order=order, implementation="bridge")


def alone(
    experts: Any, weights: dict[str, jax.Array], x: jax.Array, scores: jax.Array, chosen: jax.Array = CHOSEN
) -> jax.Array:
    """A single device's y [T, D]; an expert that is none goes nowhere."""
    chosen = chosen.reshape(-1)
    sizes, order = (chosen[:, None] == jnp.arange(E)).sum(0), jnp.argsort(chosen, stable=True)
    return combine(experts(weights, x, sizes, order), scores, order)


def with_gradients(f: Any) -> Any:
    """(weights, x, scores, ...) -> y of f(weights, x, scores, ...) and its gradients with DY, by name."""

    def run(weights: Any, x: jax.Array, scores: jax.Array, *rest: Any) -> dict[str, jax.Array]:
        y, vjp = jax.vjp(lambda *a: f(*a, *rest), weights, x, scores)
        weights, x, scores = vjp(DY)
        return {"y": y, "x": x, "scores": scores, **weights}

    return jax.jit(run)


float32_alone = with_gradients(functools.partial(alone, float32_experts))


@functools.cache
def single(experts: Any, dtype: str = "float32") -> dict[str, jax.Array]:
    return with_gradients(functools.partial(alone, experts))(WEIGHTS, X.astype(dtype), SCORES)


def on_mesh(experts: Any, how: Any, axes: str, dtype: str = "float32", **options: Any) -> dict[str, jax.Array]:
    tensor = "tensor" if "tensor" in MESHES[axes] else None
    parallel = ExpertParallel(mesh=mesh_of(MESHES[axes]), exchange=how, tensor_axis=tensor, **options)

    def f(weights: dict[str, jax.Array], x: jax.Array, scores: jax.Array) -> jax.Array:
        return parallel.apply(experts, weights, x, CHOSEN, scores).y

    return with_gradients(f)(WEIGHTS, X.astype(dtype), SCORES)


def sqnr(want: dict[str, jax.Array], got: dict[str, jax.Array]) -> dict[str, float]:
    """dB by name; inf: the same bits."""
    return {
        name: np.inf if np.array_equal(want[name], got[name]) else oracle.sqnr(np.asarray(want[name]), got[name])
        for name in want
    }


# ------------------------------------------------------------------------------------------------------------ exchange


@pytest.mark.parametrize("collective", ["ragged_all_to_all", "all_to_all"])
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_rows_travel_and_gradients_travel_back(collective: Any) -> None:
    rng = np.random.default_rng(0)
    devices, R, S = 4, 20, 40
    counts = rng.multinomial(17, [0.5, 0.3, 0.2, 0], devices).astype(np.int32)  # some are 0, and so is a column
    x, dy = rng.standard_normal((2, devices, S, 3), np.float32)
    x = x[:, :R]

    @functools.partial(jax.shard_map, mesh=mesh_of({"a": 4, "b": 2}), in_specs=P("a"), out_specs=P("a"))
    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        outgoing, incoming = slices(jnp.asarray(counts), "a")
        move = functools.partial(exchange, outgoing=outgoing, incoming=incoming, axis="a", collective=collective)
        y, vjp = jax.vjp(lambda x: move(x, S), x[0])
        return y[None], vjp(dy[0])[0][None]

    want, want_dx = np.zeros((devices, S, 3), np.float32), np.zeros_like(x)
    filled = [0] * devices
    for sender in range(devices):
        first = 0
        for receiver, n in enumerate(counts[sender]):
            there = filled[receiver]
            want[receiver, there : there + n] = x[sender, first : first + n]
            want_dx[sender, first : first + n] = dy[receiver, there : there + n]
            first, filled[receiver] = first + n, there + n
    y, dx = jax.jit(run)(x, dy)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, want_dx)


@pytest.mark.parametrize("check_vma", [True, False])
def test_ragged_exchange_lowers_for_gpus(check_vma: bool) -> None:
    """Two collectives, there and back, and none for offsets."""

    def run(x: jax.Array, counts: jax.Array) -> jax.Array:
        outgoing, incoming = slices(counts, "expert")
        f = functools.partial(
            exchange, size=16, outgoing=outgoing, incoming=incoming, axis="expert", collective="ragged_all_to_all"
        )
        return jax.grad(lambda x: (f(x) ** 2).sum())(x)

    mesh, specs = mesh_of({"expert": 8}), (P("expert"), P())
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=check_vma)
    arguments = jax.ShapeDtypeStruct((64, 4), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.int32)
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 2
    assert 'all_to_all"(' not in text


# ----------------------------------------------------------------------------------------------------- a single device


@pytest.mark.parametrize(
    ("how", "axes", "check_vma"),
    [
        ("ragged_all_to_all", "2x4", True),
        ("ragged_all_to_all", "2x2x2", False),
        ("all_to_all", "2x2x2", True),
        ("all_to_all", "8", False),
        ("all_gather", "2x4", False),
        ("all_gather", "2x2x2", True),
    ],
)
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_results_and_gradients_are_those_of_a_single_device(how: str, axes: str, check_vma: bool) -> None:
    got = sqnr(single(float32_experts), on_mesh(float32_experts, how, axes, check_vma=check_vma))
    assert min(got.values()) >= 120, got


@pytest.mark.parametrize("how", ["all_to_all", "all_gather"])
def test_quantized_experts_have_the_bits_of_a_single_device(how: str) -> None:
    """Where only experts are sharded; but `all_gather` adds up y, and in bf16 the gradient of x, in another order."""
    got = sqnr(single(fp8_experts, "bfloat16"), on_mesh(fp8_experts, how, "8", "bfloat16"))
    inexact = {"scores": 125} if how == "all_to_all" else {"y": 140, "scores": 125, "x": 45}
    assert all(got[name] >= least for name, least in inexact.items()), got
    assert {name for name, db in got.items() if db < np.inf} <= {*inexact}, got


def test_data_shards_are_quantized_by_themselves() -> None:
    """Weights' gradients are the sum of what each data shard's single device would have."""
    got = on_mesh(fp8_experts, "all_to_all", "2x4", "bfloat16")
    half, parts = T // 2, []
    for rows in (slice(half), slice(half, T)):

        def f(weights: Any, x: jax.Array, scores: jax.Array, rows: slice = rows) -> Any:
            return (alone(fp8_experts, weights, x, scores, CHOSEN[rows]) * DY[rows]).sum()

        grads = jax.jit(jax.grad(f))(WEIGHTS, X[rows].astype(jnp.bfloat16), SCORES[rows])
        parts.append(grads)
    want = jax.tree.map(jnp.add, *parts)
    assert sqnr(want, got) == dict.fromkeys(want, np.inf)
    whole = single(fp8_experts, "bfloat16")
    np.testing.assert_array_equal(got["y"], whole["y"])
    np.testing.assert_array_equal(got["x"], whole["x"])


def test_a_tensor_axis_has_scales_of_its_own() -> None:
    got = sqnr(single(fp8_experts, "bfloat16"), on_mesh(fp8_experts, "all_to_all", "2x2x2", "bfloat16"))
    assert min(got.values()) >= 45, got
    assert got["y"] < np.inf


# ------------------------------------------------------------------------------------------------------------ capacity


@each_exchange
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_what_has_no_room_is_dropped_and_nothing_else(how: Any) -> None:
    """Of an expert with too many rows each sender loses its last ones, by the same share."""
    devices, slots, capacity = 8, T // 8 * k, 1.2
    room = int(np.ceil(slots * capacity))
    chosen = np.asarray(CHOSEN).reshape(devices, slots).copy()
    chosen[0, :4] = [-1, E, 100, -7]  # nobody's
    kept, dropped = chosen.copy(), 0
    kept[(kept < 0) | (kept >= E)] = E
    for expert in range(E):  # of one device each
        counts = (chosen == expert).sum(axis=1)
        ends = np.cumsum(counts)
        if ends[-1] > room:
            share = np.float32(room) / np.float32(ends[-1])
            given = np.diff(np.minimum((ends * share).astype(np.int64), room), prepend=0)
            assert given.sum() <= room, "an oracle that overflows"
            for sender in range(devices):
                lost = np.flatnonzero(chosen[sender] == expert)[given[sender] :]
                kept[sender, lost] = E
                dropped += len(lost)
    assert 10 < dropped < 60
    parallel = ExpertParallel(mesh=mesh_of(MESHES["8"]), exchange=how, capacity=capacity)

    def run(weights: Any, x: jax.Array, scores: jax.Array) -> Any:
        def f(*arguments: Any) -> Any:
            weights, x, scores = arguments
            return tuple(parallel.apply(float32_experts, weights, x, jnp.asarray(chosen.reshape(T, k)), scores))

        y, vjp, fraction = jax.vjp(f, weights, x, scores, has_aux=True)
        weights, x, scores = vjp(DY)
        return {"y": y, "x": x, "scores": scores, **weights}, fraction

    got, fraction = jax.jit(run)(WEIGHTS, X, SCORES)
    np.testing.assert_allclose(fraction, dropped / (T * k), rtol=1e-6)
    want = float32_alone(WEIGHTS, X, SCORES, jnp.asarray(kept.reshape(T, k)))
    assert min(sqnr(want, got).values()) >= 120


@pytest.mark.parametrize(("how", "capacity"), [("all_to_all", None), ("all_to_all", 0.01), ("all_gather", 7.9)])
def test_everybody_to_one_device(how: Any, capacity: float | None) -> None:
    chosen = jnp.full((T, k), 5)
    parallel = ExpertParallel(mesh=mesh_of(MESHES["8"]), exchange=how, capacity=capacity)
    y, dropped = jax.jit(lambda: parallel.apply(float32_experts, WEIGHTS, X, chosen, SCORES))()
    kept = {None: T * k, 0.01: 1, 7.9: 190}[capacity]
    np.testing.assert_allclose(dropped, 1 - kept / (T * k), rtol=1e-5, atol=1e-7)
    if capacity is None:
        want = float32_alone(WEIGHTS, X, SCORES, chosen)["y"]
        assert oracle.sqnr(np.asarray(want), y) >= 120


# ----------------------------------------------------------------------------------------------------------- the layer


def layer() -> MoE:
    return MoE(D, H, E, k, config="bf16", shared_hidden_dim=16, rngs=nnx.Rngs(0))


def test_the_layer_trains_as_on_a_single_device() -> None:
    x = X.reshape(8, T // 8, D)

    @nnx.jit
    def step(moe: MoE, x: jax.Array) -> Any:
        def loss(moe: MoE, x: jax.Array) -> Any:
            y, load_balance_loss = moe(x)
            return (y * DY.reshape(y.shape)).mean() + load_balance_loss, y

        return nnx.value_and_grad(loss, has_aux=True)(moe, x)

    moe = expert_parallel(layer(), mesh_of(MESHES["2x4"]))
    assert moe.experts.w1[...].sharding.spec == P("expert", None)
    assert moe.router.weight[...].sharding.is_fully_replicated
    sharded = jax.device_put(x, NamedSharding(moe.parallel.mesh, P(moe.parallel.token_axes)))
    (loss, y), grads = step(moe, sharded)
    (want_loss, want_y), want = step(layer(), x)
    assert y.sharding.spec == P(("data", "expert"))
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    got = sqnr({"y": want_y}, {"y": y})
    for (path, gradient), (_, reference), (_, parameter) in zip(
        *map(nnx.to_flat_state, (grads, want, nnx.state(moe))), strict=True
    ):
        name = ".".join(path)
        got |= sqnr({name: reference[...]}, {name: gradient[...]})
        assert gradient[...].sharding.is_equivalent_to(parameter[...].sharding, parameter.ndim), name
    assert min(got.values()) >= 100, got


def halves(layer: MoE) -> MoE:
    """The layer, whose top-2 scores are all exactly 1/2: expert e and its twin e + 4 score the same."""
    layer.router.weight[...] = jnp.tile(layer.router.weight[:4], (2, 1))
    return layer


def test_a_layer_that_is_not_compiled() -> None:
    """Without jit around it: the same bits."""
    moe = halves(MoE(D, H, E, 2, config="bf16", rngs=nnx.Rngs(0)))
    want, _ = nnx.jit(lambda moe: moe(X))(moe)
    np.testing.assert_array_equal(expert_parallel(moe, mesh_of({"expert": 4}))(X)[0], want)


@functools.cache
def with_full_experts(flax: str, parallel: ExpertParallel | None) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """({"y": ..., and gradients by name}, metrics) of a layer whose experts take 0.7 of a balanced load."""
    options: dict[str, Any] = {"capacity_factor": 0.7, "config": "bf16", "shared_hidden_dim": 16}
    graph, state = nnx.split(halves(MoE(D, H, E, 2, **options, rngs=nnx.Rngs(0))))
    weights = nnx.to_pure_dict(state)
    if parallel is not None:
        where = {name: NamedSharding(parallel.mesh, parallel.spec(name)) for name in weights["experts"]}
        weights["experts"] = jax.device_put(weights["experts"], where)

    def loss(weights: Any, x: jax.Array) -> Any:
        if flax == "linen":
            moe = linen.MoE(D, H, E, 2, parallel=parallel, **options)
            (y, _), metrics = moe.apply({"params": weights}, x, mutable=["intermediates"])
            return (y * DY).sum(), (y, metrics["intermediates"])
        nnx.replace_by_pure_dict(state, weights)
        moe = nnx.merge(graph, state)
        moe.parallel = parallel
        (y, _), metrics = nnx.capture(moe, nnx.Intermediate)(x)
        return (y * DY).sum(), (y, nnx.to_pure_dict(metrics))

    grads, (y, metrics) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(weights, X)
    return {"y": y, **{jax.tree_util.keystr(path): g for path, g in jax.tree.leaves_with_path(grads)}}, metrics


@pytest.mark.parametrize("flax", ["nnx", "linen"])
def test_a_capacity_factor_drops_what_it_drops_on_a_single_device(flax: str) -> None:
    """In layers of either kind; and what the router dropped asks for no room on a device."""
    room = np.ceil(T * 2 * 0.7 / E) / (T / 8 * 2)  # for what the router lets through, and no more
    got, metrics = with_full_experts(flax, ExpertParallel(mesh=mesh_of(MESHES["8"]), capacity=float(room)))
    want, of_single = with_full_experts("nnx", None)
    assert metrics["exchange_drop_fraction"] == (0,)
    assert 0.1 < of_single["drop_fraction"][0] < 0.6
    for name in ("drop_fraction", "tokens_per_expert"):
        np.testing.assert_array_equal(metrics[name][0], of_single[name][0])
    assert min(sqnr(want, got).values()) >= 110, sqnr(want, got)
    assert got["[0]['experts']['w1']"].sharding.spec[0] == "expert"


def test_the_layer_tells_what_had_no_room() -> None:
    moe = MoE(D, H, E, k, rngs=nnx.Rngs(0))
    moe.router.weight[...] = jnp.zeros((E, D))  # all experts score the same: everybody takes the first three
    moe = expert_parallel(moe, mesh_of(MESHES["8"]), capacity=4 / 3, exchange="all_gather")
    _, metrics = nnx.jit(lambda moe, x: nnx.capture(moe, nnx.Intermediate)(x))(moe, X)
    (fraction,) = jax.tree.leaves(metrics["exchange_drop_fraction"])
    assert fraction == 0.5  # each of the three devices has room for 4 / 3 * 24 of 64 slots


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"axis": "model"}, r"axis='model' is not of the mesh; its axes are \('expert',\)"),
        ({"tensor_axis": "model"}, "tensor_axis='model' is not of the mesh"),
        ({"data_axes": ("expert",)}, r"share an axis"),
        ({"exchange": "ring"}, "exchange='ring' is not known; use one of ragged_all_to_all"),
        ({"exchange": "ragged_all_to_all"}, "no implementation on a CPU in XLA; use 'all_to_all'"),
        ({"tensor_axis": ("expert",)}, r"tensor_axis=\('expert',\): \('expert',\) is not the name of one axis"),
        ({"data_axes": "expert"}, r"data_axes=\('expert',\) and .* share an axis"),
        ({"data_axes": "data"}, r"data_axes=\('data',\) is not of the mesh"),
        ({"T": 60}, r"T=60 tokens, which \('expert',\) do not divide into 8; pad the batch"),
        ({"E": 4}, r"w1 has shape \(4, 64, 32\): E=4 is not a multiple of the 8 devices of 'expert'"),
        ({"chosen": CHOSEN[:8]}, r"chosen has shape \(8, 3\); give \[T, k\], T=64"),
        ({"chosen": SCORES}, "chosen is float32; give integers"),
        ({"scores": SCORES[:, :2]}, r"scores has shape \(64, 2\); give \(64, 3\)"),
        ({"scores": SCORES.astype(jnp.bfloat16)}, "scores is bfloat16"),
        ({"chosen": CHOSEN.tolist()}, "chosen is a list; give an array"),
        ({"x": X[None]}, r"x has shape \(1, 64, 32\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    rows = slice(options.pop("T", T))
    experts = options.pop("E", E)
    weights = {name: weight[:experts] for name, weight in WEIGHTS.items()}
    given = {"x": X[rows], "chosen": CHOSEN[rows], "scores": SCORES[rows]}
    given |= {name: options.pop(name) for name in [*options] if name in given}
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            lambda: ExpertParallel(mesh=mesh_of(MESHES["8"]), **options).apply(float32_experts, weights, **given)
        )


@pytest.mark.parametrize("capacity", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_capacity_that_is_none(capacity: Any) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity!r} is not a positive number; give a multiple .* or None"):
        ExpertParallel(mesh=mesh_of(MESHES["8"]), capacity=capacity)
    run = functools.partial(parallel_experts, None, num_experts=E, axis="expert", capacity=capacity)
    mapped = jax.shard_map(run, mesh=mesh_of(MESHES["8"]), in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(ValueError, match=f"capacity={capacity!r} is not a positive number"):
        jax.eval_shape(mapped, X, CHOSEN, SCORES)


def test_names_of_axes_as_a_partition_spec_takes_them() -> None:
    several = ExpertParallel(mesh=mesh_of(MESHES["2x4"]), data_axes=("data",))
    for data_axes in ("data", ["data"]):
        one = ExpertParallel(mesh=mesh_of(MESHES["2x4"]), data_axes=data_axes)  # type: ignore[arg-type]
        assert one == several
        assert hash(one) == hash(several)
        assert one.token_axes == ("data", "expert")


def test_layers_that_a_mesh_does_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"experts.w1 has shape \(6, 64, 32\): E=6 .* multiple of the 8 devices"):
        expert_parallel(MoE(D, H, 6, k, rngs=nnx.Rngs(0)), mesh_of(MESHES["8"]))
    tensor = ExpertParallel(mesh=mesh_of({"expert": 2, "tensor": 4}), tensor_axis="tensor")
    with pytest.raises(ValueError, match=r"experts.w2 has shape \(8, 32, 50\): H=50 is not a multiple of the 4"):
        tensor.check_weight("experts.w2", (8, 32, 50), tensor.spec("w2"))
    with pytest.raises(ValueError, match=r"axis_types=\(Explicit,\); .*AxisType.Auto"):
        expert_parallel(layer(), mesh_of(MESHES["8"], AxisType.Explicit))
    explicit = ExpertParallel(mesh=mesh_of(MESHES["8"], AxisType.Explicit))
    with pytest.raises(ValueError, match=r"axis_types=\(Explicit,\); .*AxisType.Auto"):
        jax.eval_shape(linen.MoE(D, H, E, k, parallel=explicit).init, jax.random.key(0), X)
    six = linen.MoE(D, H, 6, k, parallel=ExpertParallel(mesh=mesh_of(MESHES["8"])))
    with pytest.raises(ValueError, match=r"experts.w1 has shape \(6, 64, 32\): E=6 .* multiple of the 8 devices"):
        jax.eval_shape(six.init, jax.random.key(0), X)


@pytest.mark.parametrize("kind", ["Mesh", "str"])
def test_what_is_no_expert_parallelism(kind: str) -> None:
    """The mesh, or the name of its axis, in the place of the whole, and the other way."""
    given: Any = mesh_of(MESHES["8"]) if kind == "Mesh" else "expert"
    with pytest.raises(ValueError, match=rf"parallel is a {kind}; give ExpertParallel\(mesh=mesh\), or None"):
        jax.eval_shape(linen.MoE(D, H, E, k, parallel=given).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"mesh is 'expert'; give a jax.sharding.Mesh"):
        ExpertParallel(mesh="expert")  # type: ignore[arg-type]


def test_what_is_no_layer() -> None:
    class Block(nnx.Module):
        def __init__(self) -> None:
            self.moe = MoE(D, H, num_experts=E, top_k=2, rngs=nnx.Rngs(0))

    with pytest.raises(ValueError, match=r"moe is a Block, .*; give each of its MoE layers: moe$"):
        expert_parallel(Block(), mesh_of({"expert": 4}))
    with pytest.raises(ValueError, match=r"the Linen module MoE, .* linen.MoE\(..., parallel=ExpertParallel\(mesh"):
        expert_parallel(linen.MoE(D, H, E, k), mesh_of({"expert": 4}))
    with pytest.raises(ValueError, match="mesh is None; give a"):
        expert_parallel(Block().moe, None)  # type: ignore[arg-type]
    for x, message in ((X.astype(jnp.int32), "x is int32; give floating-point"), (X[:, :16], "give tokens .*dim=32")):
        with pytest.raises(ValueError, match=message):
            Block().moe(x)
