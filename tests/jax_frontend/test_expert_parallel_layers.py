"""MoE layers on meshes of host devices, NNX and Linen: those of a single device, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.meshes import DY, MESHES, D, E, H, T, X, k, mesh_of, sqnr
from xmoe.jax_frontend import ExpertParallel, MoE, expert_parallel, linen


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
    layer.router.weight[...] = jnp.tile(layer.router.weight[..., :4, :], (2, 1))
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


def test_layers_that_a_mesh_does_not_fit_are_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"experts.w1 has shape \(6, 64, 32\): E=6 is not a multiple of 8, for the 8 devices of 'expert'; ",
    ):
        expert_parallel(MoE(D, H, 6, k, rngs=nnx.Rngs(0)), mesh_of(MESHES["8"]))
    tensor = ExpertParallel(mesh=mesh_of({"expert": 2, "tensor": 4}), tensor_axis="tensor")
    for name, shape in (("experts.w2", (8, 32, 96)), ("experts.w1", (8, 96, 32))):
        with pytest.raises(
            ValueError, match=rf"{name} has shape .*: H=96 is not a multiple of 64, for the 4 devices of"
        ):
            tensor.check_weight(name, shape)
    ExpertParallel(mesh=mesh_of(MESHES["8"])).check_weight("w1", (8, 50, 32))  # of experts that take any H
    with pytest.raises(ValueError, match=r"axis_types=\(Explicit,\); .*AxisType.Auto"):
        expert_parallel(layer(), mesh_of(MESHES["8"], AxisType.Explicit))
    explicit = ExpertParallel(mesh=mesh_of(MESHES["8"], AxisType.Explicit))
    with pytest.raises(ValueError, match=r"axis_types=\(Explicit,\); .*AxisType.Auto"):
        jax.eval_shape(linen.MoE(D, H, E, k, parallel=explicit).init, jax.random.key(0), X)
    six = linen.MoE(D, H, 6, k, parallel=ExpertParallel(mesh=mesh_of(MESHES["8"])))
    with pytest.raises(ValueError, match=r"experts.w1 has shape \(6, 64, 32\): E=6 is not a multiple of 8"):
        jax.eval_shape(six.init, jax.random.key(0), X)


@pytest.mark.parametrize("kind", ["Mesh", "str"])
def test_what_is_no_expert_parallelism(kind: str) -> None:
    """The mesh, or the name of its axis, in the place of the whole, and the other way."""
    given: Any = mesh_of(MESHES["8"]) if kind == "Mesh" else "expert"
    with pytest.raises(ValueError, match=rf"parallel is a {kind}; give ExpertParallel\(mesh=mesh\), or None"):
        jax.eval_shape(linen.MoE(D, H, E, k, parallel=given).init, jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"mesh is 'expert'; give a jax.sharding.Mesh"):
        ExpertParallel(mesh="expert")  # type: ignore[arg-type]


def test_stacked_layers() -> None:
    """For a scan over layers: experts are sharded, not layers; the results of one device."""
    layers = 3

    @nnx.vmap
    def stack(rngs: nnx.Rngs) -> MoE:
        return MoE(D, H, num_experts=E, top_k=2, config="bf16", rngs=rngs)

    def step(moe: MoE) -> Any:
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def through(moe: MoE, x: jax.Array) -> jax.Array:
            return x + moe(x)[0]

        return nnx.value_and_grad(lambda moe: (through(moe, X) * DY).sum())(moe)

    def run(mesh: jax.sharding.Mesh | None) -> Any:
        moe = halves(stack(nnx.Rngs(0).split(layers)))
        if mesh is not None:
            expert_parallel(moe, mesh)
            assert moe.experts.w1[...].sharding.spec == P(None, "expert", None)
            assert moe.router.weight[...].sharding.is_fully_replicated
        loss, gradients = nnx.jit(step)(moe)
        return {"loss": loss, **{str(path): g[...] for path, g in nnx.to_flat_state(gradients)}}

    want, got = run(None), run(mesh_of({"expert": 4}))
    assert min(sqnr(want, got).values()) >= 120, sqnr(want, got)
    with pytest.raises(ValueError, match=r"experts.w1 has shape \(3, 8, 64, 32\): E=8 is not a multiple of 3"):
        expert_parallel(stack(nnx.Rngs(0).split(layers)), jax.make_mesh(
            (3,), ("expert",), axis_types=(AxisType.Auto,), devices=jax.devices("cpu")[:3]
        ))  # fmt: skip


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
