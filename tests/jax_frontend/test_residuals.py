"""What the JAX ops save for the backward, in bytes, as their docstrings tell; and the switch for CUDA graphs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.jax_frontend.values import values
from xmoe.config import RECIPES, FP8GroupedMMConfig, config_from_recipe
from xmoe.jax_frontend import bridge, ragged_dot, ragged_dot_wgrad, swiglu_experts
from xmoe.jax_frontend.plan import make_plan
from xmoe.kernels import pipeline
from xmoe.kernels.dispatch import Device, select
from xmoe.operands import padded_tokens

M, K, N, G = 150, 256, 48, 3
Mp = padded_tokens(M, G)
SIZES = jnp.array([100, 0, 40], jnp.int32)
A, B = (jnp.asarray(values("normal", s), jnp.bfloat16) for s in ((M, K), (G, K, N)))


def bytes_saved(function: Any, *args: jax.Array) -> int:
    """Of all that the backward keeps, the arguments apart."""
    own = {(x.shape, x.dtype) for x in args}
    saved = jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args))
    return sum(x.size * x.dtype.itemsize for x in saved if (x.shape, x.dtype) not in own)


def token_bytes(recipe: str, features: int) -> int:
    """Of the 8-bit wgrad operand of so many features: the table in the docstring of `ragged_dot`."""
    fmt = config_from_recipe(recipe).format
    if fmt == "fp8_rowwise":
        return features * Mp + 4 * G * features
    return features * Mp + features * Mp // 32


@pytest.mark.parametrize("engine", ["jax", "bridge"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_ragged_dot_saves_what_its_docstring_tells(recipe: str, engine: str) -> None:
    dot = functools.partial(ragged_dot, group_sizes=SIZES, config=recipe, implementation=engine)
    of_input = pipeline.saves_input(config_from_recipe(recipe))  # lhs itself, an argument
    assert bytes_saved(dot, A, B) == (0 if of_input else token_bytes(recipe, K)) + 4 * G
    saved = jax.tree.leaves(jax.eval_shape(lambda a, b: jax.vjp(dot, a, b)[1], A, B))
    assert ((M, K) in {x.shape for x in saved}) == of_input


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "fp8_rowwise_wgrad_with_hp"])
def test_swiglu_experts_saves_what_its_docstring_tells(recipe: str) -> None:
    D, H = 64, 128
    x, w1, w3, w2 = (jnp.ones(shape, A.dtype) for shape in ((M, D), (G, H, D), (G, H, D), (G, D, H)))
    run = functools.partial(swiglu_experts, group_sizes=SIZES, config=recipe, implementation="bridge")
    gate_up = 2 * 2 * H * M
    tokens = 0 if pipeline.saves_input(config_from_recipe(recipe)) else token_bytes(recipe, D) + token_bytes(recipe, H)
    assert bytes_saved(lambda *args: run(*args), x, w1, w2, w3) == gate_up + tokens + 4 * G
    order = lambda *args: run(*args, order=jnp.arange(M))  # noqa: E731
    assert bytes_saved(order, x, w1, w2, w3) == gate_up + tokens + 4 * G + (4 if tokens else 8) * M


def test_wgrad_saves_its_operands_and_nothing_else() -> None:
    dout = jnp.ones((M, N), jnp.bfloat16)
    run = functools.partial(ragged_dot_wgrad, group_sizes=SIZES, config="mxfp8_rceil", implementation="bridge")
    assert bytes_saved(run, A, dout) == 4 * G
    assert bytes_saved(lambda a: run(a, dout), A) == 4 * G + dout.nbytes, "lhs is for the gradient of dout alone"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
def test_on_a_gpu(recipe: str, transposed: bool) -> None:
    """What the kernels save there, by their specs: straight MX tokens are not padded, and row-wise weights with K
    contiguous leave their columns' maxima."""
    config, sm90 = config_from_recipe(recipe), Device("cuda", (9, 0))
    spec = pipeline.forward_spec(pipeline.Problem(M, N, K, G), config, sm90, save_amax=transposed)
    sizes = {name: int(np.prod(x.shape)) * jnp.dtype(x.dtype).itemsize for name, x in spec.outputs.items()}
    of_tokens = sizes["a_tokens"] + sizes["a_tokens_scale"]
    assert of_tokens == (token_bytes(recipe, K) if recipe == "fp8_rowwise" else K * M + K * Mp // 32)
    assert sizes.get("b_amax", 0) == (4 * G * K if recipe == "fp8_rowwise" and transposed else 0)


@pytest.mark.parametrize("command_buffer", [True, False])
def test_command_buffer_is_the_configs_choice(command_buffer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what the GPU's kernels compute; torch's own GEMM and emulations cannot be recorded at any rate."""
    monkeypatch.setattr(bridge, "_device", lambda platform: Device("cuda", (9, 0)))
    config = FP8GroupedMMConfig(command_buffer=command_buffer)
    for preference, recordable in (("auto", command_buffer), ("torch", False), ("emulated", False)):
        chosen = dataclasses.replace(config, kernel_preference=preference)
        monkeypatch.setattr(
            bridge, "implementation_of", lambda config, platform: select(config, Device("cuda", (9, 0)))
        )
        plan = make_plan(A, B, SIZES, None, FP8GroupedMMConfig(), False, "bridge")
        plan = dataclasses.replace(plan, config=chosen)
        for cached in (bridge._forward_call, bridge._save_call, bridge._backward_call):
            make = cached.__wrapped__
            flags = {bridge._forward_call: (True,), bridge._save_call: (), bridge._backward_call: (True, True, False)}
            assert make(plan, *flags[cached]).recordable == recordable


def test_command_buffer_changes_no_key_and_no_number() -> None:
    off = FP8GroupedMMConfig(command_buffer=False)
    assert off.to_key() == "fp8_rowwise;command_buffer=false"
    assert FP8GroupedMMConfig.from_toml(off.to_toml()) == off
    assert FP8GroupedMMConfig().to_key() == "fp8_rowwise"
    got, want = (
        jax.jit(functools.partial(ragged_dot, config=config, implementation="bridge"))(A, B, SIZES)
        for config in (off, FP8GroupedMMConfig())
    )
    np.testing.assert_array_equal(got, want)
    with pytest.raises(ValueError, match="command_buffer=1 is not a boolean"):
        FP8GroupedMMConfig(command_buffer=1)  # type: ignore[arg-type]
