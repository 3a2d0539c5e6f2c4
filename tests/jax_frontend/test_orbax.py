"""Orbax saves and restores what the Flax layer is made of, onto a mesh too, and training goes on with the same bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe.jax_frontend import MoE

ocp = pytest.importorskip("orbax.checkpoint")

D, H, E, k = 32, 48, 8, 2


def layer(seed: int = 0, recipe: str = "bf16") -> MoE:
    return MoE(D, H, E, k, param_dtype=jnp.bfloat16, config=recipe, rngs=nnx.Rngs(seed))


def make() -> tuple[MoE, nnx.Optimizer]:
    model = layer()
    return model, nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model: MoE, optimizer: nnx.Optimizer, x: jax.Array) -> jax.Array:
    loss, gradients = nnx.value_and_grad(lambda model: jnp.square(model(x)[0] - 1).mean())(model)
    optimizer.update(model, gradients)
    return loss


def tokens(step: int) -> jax.Array:
    return jax.random.normal(jax.random.key(step), (64, D))


def assert_same(a: Any, b: Any) -> None:
    """Structure, dtypes and bits."""
    a, b = nnx.to_pure_dict(a), nnx.to_pure_dict(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree.flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nnx.State, nnx.State, list[jax.Array]]:
    """Of (model, optimizer) after two steps; that state, the one two steps later, and their losses."""
    path, cpu = tmp_path_factory.mktemp("orbax") / "step-2", jax.devices("cpu")[0]
    with jax.default_device(cpu):  # as in the tests: what is compiled here serves there
        graph, state = nnx.split(make())
        model, optimizer = nnx.merge(graph, jax.device_put(state, cpu))  # committed, as restored ones are
        for step in range(2):
            train_step(model, optimizer, tokens(step))
        saved = jax.tree.map(jnp.copy, nnx.state((model, optimizer)))
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, saved)
        losses = [train_step(model, optimizer, tokens(step)) for step in (2, 3)]
    return path, saved, nnx.state((model, optimizer)), losses


def test_training_goes_on_with_the_same_bits(checkpoint: Any) -> None:
    path, saved, later, losses = checkpoint
    graph, shapes = nnx.split(nnx.eval_shape(make))  # no weights are made
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, shapes)
    assert_same(restored, saved)
    model, optimizer = nnx.merge(graph, restored)
    assert [train_step(model, optimizer, tokens(step)) for step in (2, 3)] == losses
    assert_same(nnx.state((model, optimizer)), later)


def test_restores_onto_a_mesh(checkpoint: Any) -> None:
    """Each expert, and its moments, to one of four pairs of devices, H over a pair; the rest everywhere."""
    path, saved, _, _ = checkpoint
    mesh = Mesh(np.array(jax.devices("cpu")).reshape(4, 2), ("expert", "tensor"))
    specs = {"w1": P("expert", "tensor"), "w3": P("expert", "tensor"), "w2": P("expert", None, "tensor")}

    def place(path: Any, leaf: Any) -> jax.ShapeDtypeStruct:
        names = [str(getattr(part, "key", "")) for part in path]
        spec = next((specs[name] for name in names if "experts" in names and name in specs), P())
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    graph, shapes = nnx.split(nnx.eval_shape(make))
    wanted = jax.tree.map_with_path(place, shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(path, wanted)
    assert_same(restored, saved)
    model, optimizer = nnx.merge(graph, restored)
    for weight in (model.experts.w2, optimizer.opt_state[0].mu.experts.w2):
        assert weight.sharding.spec == specs["w2"]
        assert {shard.data.shape for shard in weight.addressable_shards} == {(E // 4, D, H // 2)}
    assert model.router.weight.sharding.is_fully_replicated


def test_one_layer_by_the_pytree_checkpointer(tmp_path: Path) -> None:
    """Its parameters as nested dicts, into a layer of another recipe."""
    weights = nnx.to_pure_dict(nnx.state(layer(), nnx.Param))
    checkpointer = ocp.PyTreeCheckpointer()
    checkpointer.save(tmp_path / "layer", weights)
    other = layer(seed=1, recipe="mxfp8_rceil")
    like = nnx.to_pure_dict(nnx.state(other, nnx.Param))
    arguments = ocp.checkpoint_utils.construct_restore_args(like)
    nnx.update(other, checkpointer.restore(tmp_path / "layer", like, restore_args=arguments))
    assert_same(nnx.state(other, nnx.Param), nnx.state(layer(), nnx.Param))
