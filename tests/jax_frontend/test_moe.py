"""The Flax MoE layer: its math against a loop over tokens, its configs, its parameters; weights to and from PyTorch."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from xmoe import FqnToConfig, oracle
from xmoe.config import config_from_recipe
from xmoe.jax_frontend import MoE, from_torch, to_torch

D, H, E, k, T = 32, 48, 4, 2, 30


def layer(seed: int = 0, **options: Any) -> MoE:
    return MoE(D, H, E, k, **{"dtype": jnp.float32, **options}, rngs=nnx.Rngs(seed))


def tokens(dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T // 2, D), dtype)


apply = nnx.jit(lambda moe, x: moe(x))


def swiglu(x: np.ndarray, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> np.ndarray:
    gate = w1 @ x
    return w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ x))


@pytest.mark.parametrize("shared", [None, 16])
@pytest.mark.parametrize("normalize", [True, False])
def test_math(shared: int | None, normalize: bool) -> None:
    moe, x = layer(shared_hidden_dim=shared, normalize_scores=normalize), tokens()
    w = {name: tensor.double().numpy() for name, tensor in to_torch(moe).items()}
    want, counts, mean = np.zeros((T, D)), np.zeros(E), np.zeros(E)
    for t, row in enumerate(np.asarray(x, np.float64).reshape(T, D)):
        p = np.exp(w["router.weight"] @ row)
        p /= p.sum()
        chosen = np.argsort(-p)[:k]
        counts[chosen] += 1 / (T * k)
        mean += p / T
        for e in chosen:
            score = p[e] / p[chosen].sum() if normalize else p[e]
            want[t] += score * swiglu(row, *(w[f"experts.w{i}"][e] for i in (1, 2, 3)))
        if shared:
            want[t] += swiglu(row, *(w[f"shared.w{i}.weight"] for i in (1, 2, 3)))
    y, load_balance_loss = apply(moe, x)
    assert (y.shape, y.dtype, load_balance_loss.dtype) == (x.shape, x.dtype, jnp.float32)
    assert oracle.sqnr(want.reshape(x.shape), y) >= 120
    np.testing.assert_allclose(load_balance_loss, E * (counts * mean).sum(), rtol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"score_function": "sigmoid", "capacity_factor": 1.0, "bias_update_rate": 0.1}]
)
def test_x64(options: dict[str, Any]) -> None:
    """The same bits and dtypes, gradients too, where Python's numbers make float64 of what has no dtype."""

    @nnx.jit
    def step(moe: MoE, x: jax.Array) -> Any:
        def loss(moe: MoE) -> Any:
            (y, load_balance_loss), metrics = nnx.capture(moe, nnx.Intermediate)(x)
            return (y.astype(jnp.float32) ** 2).sum() + load_balance_loss, (y, metrics)

        return nnx.grad(loss, has_aux=True)(moe)

    x = tokens(jnp.bfloat16)
    first, second = (layer(dtype=None, config="fp8_rowwise", **options) for _ in range(2))  # a step moves the bias
    want = jax.tree.leaves(step(first, x))
    with jax.enable_x64(True):
        got = jax.tree.leaves(step(second, x))
    assert [a.dtype for a in got] == [a.dtype for a in want]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_experts_may_be_idle_and_tokens_absent() -> None:
    moe = layer(config="fp8_rowwise")
    moe.router.weight[...] = moe.router.weight[...].at[:2].set(0).at[2:].set(-1)
    y, load_balance_loss = apply(moe, jnp.ones((T, D)))
    np.testing.assert_allclose(load_balance_loss, E / 2, rtol=1e-5)  # two experts have everything
    assert jnp.isfinite(y).all()
    y, load_balance_loss = apply(moe, jnp.ones((0, D)))
    assert (y.shape, float(load_balance_loss)) == ((0, D), 0.0)


@pytest.mark.parametrize("axes", [(None, 0), (0, None)], ids=["tokens", "weights"])
def test_vmap_of_an_unquantized_layer(axes: tuple[int | None, int | None]) -> None:
    """`jax.lax.ragged_dot` in float32, which JAX maps over all of its operands or none."""
    graph, state = nnx.split(layer())
    other = (state, 2 * tokens()) if axes[0] is None else (nnx.state(layer(seed=1)), tokens())
    grads = jax.jit(jax.grad(lambda state, x: (nnx.merge(graph, state, copy=True)(x)[0] ** 2).mean(), (0, 1)))

    def both(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), a, b)

    want = both(grads(state, tokens()), grads(*other))
    given = (
        one if axis is None else both(one, two) for axis, one, two in zip(axes, (state, tokens()), other, strict=True)
    )
    got = jax.vmap(grads, axes)(*given)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        assert oracle.sqnr(np.asarray(a), np.asarray(b)) >= 140  # 152 seen


def test_gradients_follow_the_unquantized_layers() -> None:
    x = tokens(jnp.bfloat16)
    grads = nnx.jit(nnx.grad(lambda moe, x: (moe(x)[0].astype(jnp.float32) ** 2).mean()))
    want = grads(layer(dtype=jnp.float32), x)
    for recipe in ("bf16", "fp8_rowwise", "mxfp8_rceil"):
        got = grads(layer(dtype=jnp.bfloat16, config=recipe), x)
        for (name, reference), (_, gradient) in zip(nnx.to_flat_state(want), nnx.to_flat_state(got), strict=True):
            assert gradient[...].dtype == jnp.float32
            noise = oracle.sqnr(reference[...], gradient[...])
            assert noise >= (30 if recipe == "bf16" else 18), (recipe, name)


def test_config_by_parameter_path() -> None:
    fp8 = config_from_recipe("fp8_rowwise")
    config = FqnToConfig({"layers.0.moe.experts.w2": None, "re:layers\\..*\\.experts": fp8})
    moe = layer(config=config, path="layers.0.moe")
    assert moe.experts.configs == (fp8, None, fp8)
    assert layer(config=config, path=("layers", 0, "moe")).experts.configs == (fp8, None, fp8)
    assert layer(config="fp8_rowwise").experts.configs == (fp8, fp8, fp8)
    linears = FqnToConfig({"layers.0.moe.experts.w1": fp8, "_default": "rowwise"})  # which is no recipe of experts
    assert layer(config=linears, path="layers.0.moe").experts.configs == (fp8, None, None)
    by_name, x = layer(config=FqnToConfig({"experts": "fp8_rowwise"})), tokens()
    np.testing.assert_array_equal(apply(by_name, x)[0], apply(layer(config="fp8_rowwise"), x)[0])
    assert not np.array_equal(apply(moe, x)[0], apply(by_name, x)[0])


def test_a_mapping_that_misses_the_layer_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    keys = {"layers.0.moe.experts": "fp8_rowwise"}
    with caplog.at_level(logging.WARNING):
        for said in (keys | {"other.experts.w2": None}, keys | {"_default": None}):
            layer(config=FqnToConfig(said), path="other")
        assert not caplog.records
        assert set(layer(config=FqnToConfig(keys), path="other").experts.configs) == {None}
    (record,) = caplog.records
    assert "other.experts.w1" in record.getMessage()
    assert "'layers.0.moe.experts'" in record.getMessage()


def test_graphs_are_hashable() -> None:
    """So that one can be a static argument."""
    graph, state = nnx.split(layer(config="fp8_rowwise"))
    assert hash(graph) == hash(nnx.split(layer(config="fp8_rowwise"))[0])
    assert graph != nnx.split(layer(config="mxfp8_rceil"))[0]
    f, x = jax.jit(lambda graph, state, x: nnx.merge(graph, state)(x), static_argnums=0), tokens()
    np.testing.assert_array_equal(f(graph, state, x)[0], apply(nnx.merge(graph, state), x)[0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_computes_in_the_dtype_of_the_input_unless_told(dtype: Any) -> None:
    x = tokens(dtype)
    y = {d: apply(layer(dtype=d, shared_hidden_dim=16), x)[0] for d in (None, jnp.bfloat16, jnp.float32)}
    assert {out.dtype for out in y.values()} == {x.dtype}
    np.testing.assert_array_equal(y[None], y[dtype])
    assert not np.array_equal(y[jnp.bfloat16], y[jnp.float32])


def test_no_shared_expert() -> None:
    for none in (None, 0):
        assert not [name for name in to_torch(layer(shared_hidden_dim=none)) if name.startswith("shared")]


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"top_k=5 .* num_experts=4"):
        MoE(D, H, E, 5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"hidden_dim=40 .* multiple of 16"):
        MoE(D, 40, E, k, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="config='fp4' is not known"):
        layer(config="fp4")


def test_weights_share_memory_with_pytorch_both_ways() -> None:
    moe = layer(shared_hidden_dim=16)
    state_dict = to_torch(moe)
    assert {name: tuple(tensor.shape) for name, tensor in state_dict.items()} == {
        "router.weight": (E, D),
        "experts.w1": (E, H, D),
        "experts.w2": (E, D, H),
        "experts.w3": (E, H, D),
        "shared.w1.weight": (16, D),
        "shared.w2.weight": (D, 16),
        "shared.w3.weight": (16, D),
    }
    assert state_dict["experts.w1"].data_ptr() == moe.experts.w1[...].unsafe_buffer_pointer()
    assert to_torch(nnx.state(moe, nnx.Param)).keys() == state_dict.keys()

    changed = {name: torch.nn.Parameter(2 * tensor) for name, tensor in state_dict.items()}
    arrays = from_torch(changed)
    for name, tensor in changed.items():
        array = arrays
        for part in name.split("."):
            array = array[part]
        assert array.unsafe_buffer_pointer() == tensor.data_ptr(), name  # all of them lie at multiples of 64 bytes
    before = moe.experts.w2[...]
    nnx.update(moe, arrays)
    np.testing.assert_array_equal(moe.experts.w2[...], 2 * before)


def test_a_routers_bias_goes_along() -> None:
    moe, other = layer(bias_update_rate=0.1), layer(bias_update_rate=0.1)
    apply(moe, tokens())
    assert moe.router.bias[...].any()
    nnx.update(other, from_torch({name: tensor.clone() for name, tensor in to_torch(moe).items()}))
    np.testing.assert_array_equal(other.router.bias[...], moe.router.bias[...])


@pytest.mark.parametrize(
    ("carry", "given", "message"),
    [
        (to_torch, 3, "module_or_state is 3; give a Flax NNX module, its state, or nested dicts of arrays"),
        (to_torch, {"a": {"b": "x"}}, "module_or_state has a.b='x', which is no array; give"),
        (from_torch, [torch.ones(1)], r"state_dict is a list; give tensors by name, module.state_dict\(\)"),
        (from_torch, {"a": 3}, r"state_dict\['a'\] is a int; give a torch.Tensor"),
    ],
)
def test_what_is_no_weight_is_named(carry: Any, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        carry(given)


def test_unaligned_weights_are_copied() -> None:
    weight = torch.arange(65, dtype=torch.float32)[1:]
    array = from_torch({"blocks.0.weight": weight})["blocks"][0]["weight"]
    assert weight.data_ptr() % 64 == 4
    assert array.unsafe_buffer_pointer() != weight.data_ptr()
    np.testing.assert_array_equal(array, weight.numpy())


def test_weights_of_other_dtypes() -> None:
    moe = MoE(D, H, E, k, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    state_dict = to_torch(moe)
    assert {tensor.dtype for tensor in state_dict.values()} == {torch.bfloat16}
    assert {array.dtype.name for array in jax.tree.leaves(from_torch(state_dict))} == {"bfloat16"}
