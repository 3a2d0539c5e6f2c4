"""The transformations that touch what XLA does with the kernels, on a GPU: several runs each, on changing data, so that
XLA replays recorded launches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.values import bytes_of, values
from xmoe import shapes
from xmoe.config import RECIPES, config_from_recipe
from xmoe.jax_frontend import OUTPUT_NAME, RESIDUAL_NAMES, ragged_dot, ragged_dot_wgrad

pytestmark = pytest.mark.gpu

M, N, K, G, RUNS = 1000, 384, 256, 6, 4
KERNELS = [recipe for recipe in RECIPES if "emulated" not in recipe]
policies = jax.checkpoint_policies

Step = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], Any]


def inputs(seed: int) -> tuple[jax.Array, ...]:
    """lhs, rhs stored [G, N, K], dout and sizes."""
    dims = (M, K), (G, N, K), (M, N)
    arrays = (jnp.asarray(values("normal", s, 3 * seed + i), jnp.bfloat16) for i, s in enumerate(dims))
    return *arrays, jnp.asarray(shapes.group_sizes("uneven", M, G, seed=seed))


def loss(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array, config: Any) -> jax.Array:
    out = ragged_dot(lhs, rhs, sizes, config=config, transpose_rhs=True)
    return (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum()


def plain(config: Any) -> Step:
    """(dlhs, drhs)"""
    return jax.jit(jax.grad(functools.partial(loss, config=config), (0, 1)))


def assert_same_bytes(got: Step, want: Step) -> None:
    for seed in range(RUNS):
        args = inputs(seed)
        expected = want(*args)  # first: `got` may take its arguments for itself
        for x, y in zip(jax.tree.leaves(got(*args)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(bytes_of(x), bytes_of(y))


@pytest.mark.parametrize("recipe", KERNELS)
@pytest.mark.parametrize("transposed", [False, True])
def test_wgrad_is_that_of_ragged_dot(recipe: str, transposed: bool) -> None:
    options = {"config": recipe, "transpose_rhs": transposed}

    def of_backward(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> jax.Array:
        rhs = rhs if transposed else rhs.swapaxes(1, 2)
        return jax.vjp(lambda b: ragged_dot(lhs, b, sizes, **options), rhs)[1](dout)[0]

    own = jax.jit(lambda lhs, rhs, dout, sizes: ragged_dot_wgrad(lhs, dout, sizes, **options))
    assert_same_bytes(own, jax.jit(of_backward))


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_rceil"])
def test_gradients_of_wgrad(recipe: str) -> None:
    """Those of `ragged_dot` with the cotangent for weights: its forward, and its gradient of lhs."""
    options = {"config": recipe, "transpose_rhs": True}

    def own(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> Any:
        return jax.vjp(lambda a, d: ragged_dot_wgrad(a, d, sizes, **options), lhs, dout)[1](rhs)

    def of_dot(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> Any:
        out, backward = jax.vjp(lambda a: ragged_dot(a, rhs, sizes, **options), lhs)
        return backward(dout)[0], out

    assert_same_bytes(jax.jit(own), jax.jit(of_dot))


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
@pytest.mark.parametrize("name", ["nothing", "residuals", "residuals and output", "offloaded"])
def test_checkpoint_policies(name: str, recipe: str) -> None:
    policy = {
        "nothing": policies.nothing_saveable,
        "residuals": policies.save_only_these_names(*RESIDUAL_NAMES),
        "residuals and output": policies.save_only_these_names(*RESIDUAL_NAMES, OUTPUT_NAME),
        "offloaded": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=list(RESIDUAL_NAMES), offload_src="device",
            offload_dst="pinned_host",
        ),
    }[name]  # fmt: skip
    saving = jax.jit(jax.grad(jax.checkpoint(functools.partial(loss, config=recipe), policy=policy), (0, 1)))
    assert_same_bytes(saving, plain(recipe))


def test_residuals_spare_the_forward() -> None:
    """With the weights' maxima among them, which only these kernels give."""
    args = inputs(0)
    for names, calls in ((RESIDUAL_NAMES, 2), ([n for n in RESIDUAL_NAMES if n != "xmoe_amax"], 3)):
        policy = policies.save_only_these_names(*names)
        step = jax.value_and_grad(jax.checkpoint(functools.partial(loss, config="fp8_rowwise"), policy=policy), (0, 1))
        text = jax.jit(step).lower(*args).as_text()
        assert text.count("@xla_buffer_python_gpu_callback_cmd_buffer(") == calls


def test_scan_and_vmap() -> None:
    recipe = "fp8_rowwise"

    def layers(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> Any:
        each = jax.checkpoint(functools.partial(loss, config=recipe))
        body = lambda total, weights: (total + each(lhs, weights, dout, sizes), None)  # noqa: E731
        return jax.grad(lambda weights: jax.lax.scan(body, 0.0, weights)[0])(jnp.stack([rhs] * 3))

    def mapped(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, sizes: jax.Array) -> Any:
        grad = jax.grad(functools.partial(loss, config=recipe), (0, 1))
        dlhs, drhs = jax.vmap(grad, (0, None, None, None))(jnp.stack([lhs, lhs]), rhs, dout, sizes)
        return dlhs[1], drhs[1]

    thrice = lambda *args: jnp.stack([plain(recipe)(*args)[1]] * 3)  # noqa: E731
    assert_same_bytes(jax.jit(layers), thrice)
    assert_same_bytes(jax.jit(mapped), plain(recipe))


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_donation_and_aot(check_vma: bool) -> None:
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "model"))
    specs = P("data"), P("model"), P("data"), P("model")
    grad = jax.grad(functools.partial(loss, config="fp8_rowwise"), (0, 1))
    mapped = jax.shard_map(grad, mesh=mesh, in_specs=specs, out_specs=specs[:2], check_vma=check_vma)
    compiled = jax.jit(lambda a, *rest: mapped(a, *rest), donate_argnums=0).lower(*inputs(0)).compile()
    assert_same_bytes(compiled, plain("fp8_rowwise"))


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil"])
def test_command_buffer_changes_no_bit(recipe: str) -> None:
    config = config_from_recipe(recipe)
    off = type(config).from_dict({**config.to_dict(), "command_buffer": False})
    assert_same_bytes(plain(off), plain(config))
    assert "_cmd_buffer(" in plain(config).lower(*inputs(0)).as_text()
    assert "_cmd_buffer(" not in plain(off).lower(*inputs(0)).as_text()
