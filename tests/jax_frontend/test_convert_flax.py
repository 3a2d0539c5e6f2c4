"""`quantize` on Flax models, NNX and Linen, and by qwix's rules."""

import copy
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from tests.jax_frontend.conversions import LOGGER, RECIPE, K, LinenModel, LinenMoE, Model, RoutedMoE, T, equal
from tests.jax_frontend.conversions import _compiled_quickly as _compiled_quickly
from tests.jax_frontend.conversions import reference as reference
from tests.jax_frontend.conversions import x as x
from xmoe import FqnToConfig
from xmoe.jax_frontend import from_qwix_rules, quantize

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
