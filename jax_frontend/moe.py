"""A dropless token-choice mixture-of-experts layer for Flax NNX; parameters and math are those of the PyTorch one.

T = tokens, D = model width, H = width of an expert, E = experts, k = experts of each token.
"""

import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(f'xmoe.jax_frontend.MoE needs flax ({error}): pip install "xmoe[flax]"') from error

from xmoe.config import GroupedMMConfig, LinearConfig, as_config
from xmoe.fqn import UNMATCHED, FqnToConfig, Name, dotted
from xmoe.jax_frontend.expert_parallel import ExpertParallel
from xmoe.jax_frontend.experts import swiglu_experts
from xmoe.jax_frontend.permute import combine, permute_tokens
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.operands import FEATURE_MULTIPLE

_log = logging.getLogger(__name__)

_linear_init = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2)
_expert_init = nnx.initializers.variance_scaling(
    1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=0
)
"""LeCun's normal initialisation, Flax's default, of weights whose last axis is the input's."""


class Linear(nnx.Module):
    """``weight`` [out, in], as PyTorch stores it; no bias."""

    def __init__(self, in_features: int, out_features: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(_linear_init(rngs.params(), (out_features, in_features), param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] @ weight^T, in the dtype of x."""
        return x @ self.weight[...].astype(x.dtype).T


class FeedForward(nnx.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, hidden_dim: int, *, param_dtype: Any, rngs: nnx.Rngs) -> None:
        self.w1 = Linear(dim, hidden_dim, param_dtype=param_dtype, rngs=rngs)
        self.w2 = Linear(hidden_dim, dim, param_dtype=param_dtype, rngs=rngs)
        self.w3 = Linear(dim, hidden_dim, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.w2(_swiglu(self.w1(x), self.w3(x)))


class ExpertConfigs(NamedTuple):
    """The config of each weight, None for one left alone. Hashable, as a static argument of `jax.jit` must be."""

    w1: GroupedMMConfig | None
    w2: GroupedMMConfig | None
    w3: GroupedMMConfig | None


class Experts(nnx.Module):
    """E SwiGLU experts on tokens sorted by expert: ``w1``, ``w3`` [E, H, D] and ``w2`` [E, D, H].

    Weights of one config run as one op, `swiglu_experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        configs: ExpertConfigs,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.w1 = nnx.Param(_expert_init(rngs.params(), (num_experts, hidden_dim, dim), param_dtype))
        self.w2 = nnx.Param(_expert_init(rngs.params(), (num_experts, dim, hidden_dim), param_dtype))
        self.w3 = nnx.Param(_expert_init(rngs.params(), (num_experts, hidden_dim, dim), param_dtype))
        self.configs = nnx.static(configs)

    def __call__(self, x: jax.Array, group_sizes: jax.Array, order: jax.Array | None = None) -> jax.Array:
        """x [M, D] -> [M, D]; ``group_sizes`` int32 [E] rows of each expert. With the ``order`` of `permute_tokens` x
        is [T, D], not sorted yet."""
        weights = {name: getattr(self, name)[...] for name in ExpertConfigs._fields}
        return self.compute(weights, x, group_sizes, order)

    def compute(
        self, weights: dict[str, jax.Array], x: jax.Array, group_sizes: jax.Array, order: jax.Array | None = None
    ) -> jax.Array:
        """The same with ``weights`` in place of the parameters: of fewer experts, say, or shards of H."""
        configs = self.configs
        weights = {name: weight.astype(x.dtype) for name, weight in weights.items()}
        if configs.w1 is not None and configs.w1 == configs.w2 == configs.w3:
            w1, w2, w3 = (weights[name] for name in ExpertConfigs._fields)
            return swiglu_experts(x, w1, w2, w3, group_sizes, config=configs.w1, order=order)
        x = x if order is None else permute_tokens(x, order)
        gate, up = (_dot(x, weights[name], group_sizes, getattr(configs, name)) for name in ("w1", "w3"))
        return _dot(_swiglu(gate, up), weights["w2"], group_sizes, configs.w2)


def _dot(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, config: GroupedMMConfig | None) -> jax.Array:
    """[M, N] of x [M, K] and weight [E, N, K]; rows past the last expert's come out as zeros."""
    if config is None and x.dtype != jnp.bfloat16:  # left alone: the kernels would round to bfloat16
        # JAX says nothing about rows past the last group, neither in the product nor in the gradient.
        within, highest = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None], jax.lax.Precision.HIGHEST
        x = jax.lax.ragged_dot(jnp.where(within, x, 0), weight.swapaxes(1, 2), group_sizes, precision=highest)
        return jnp.where(within, x, 0)
    return ragged_dot(x, weight, group_sizes, config=config, transpose_rhs=True)


class MoE(nnx.Module):
    """Routes each token to its ``top_k`` best of ``num_experts`` SwiGLU experts; no token is dropped.

    Parameters, named and shaped as in the PyTorch layer: ``router.weight`` [E, D], ``experts.w1`` and ``experts.w3``
    [E, H, D], ``experts.w2`` [E, D, H], and with ``shared_hidden_dim`` those of the expert that sees every token,
    ``shared.w1.weight`` and so on. Where two experts score the same, this layer takes the one with the lower index
    (`jax.lax.top_k`); PyTorch promises no order.

    Weights begin at LeCun's normal initialisation: truncated, of variance 1 / fan-in. (The PyTorch layer draws all of
    its weights from N(0, 0.02²).)

    In bfloat16 XLA keeps some intermediate results in float32. Under ``xla_allow_excess_precision=False`` it rounds
    where PyTorch does.

    Args:
        dim, hidden_dim: D and H, multiples of 16.
        num_experts, top_k: E and k.
        shared_hidden_dim: the width of the shared expert; None or 0: there is none.
        normalize_scores: the scores of a token's k experts sum to 1.
        config: of the experts' GEMMs: a `GroupedMMConfig`, a recipe (enum or name), a `FqnToConfig`, or None to leave
            them in ``dtype``. A `FqnToConfig` that says nothing about any of them is logged as a warning.
        path: this layer's name or path in its model, which the keys of a `FqnToConfig` begin with: "layers.0.moe" or
            ("layers", 0, "moe").
        dtype: the experts compute in it: bfloat16 or float32; None: in the dtype of the input, as in PyTorch.
        param_dtype: the parameters are stored in it.

    Raises:
        ValueError: an argument is out of range; it is named with its value and the fix.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        top_k: int,
        *,
        shared_hidden_dim: int | None = None,
        normalize_scores: bool = True,
        config: Any = None,
        path: Name = "",
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k} is out of range; give 1 to num_experts={num_experts}")
        for name, size in (("dim", dim), ("hidden_dim", hidden_dim)):
            if size <= 0 or size % FEATURE_MULTIPLE:
                raise ValueError(f"{name}={size} is not a positive multiple of {FEATURE_MULTIPLE}; round it up")
        self.num_experts, self.top_k, self.normalize_scores = num_experts, top_k, normalize_scores
        self.dtype = None if dtype is None else jnp.dtype(dtype)
        self.parallel: ExpertParallel | None = None
        """How the experts lie on a mesh (`expert_parallel`); None: on one device."""
        self.router = Linear(dim, num_experts, param_dtype=param_dtype, rngs=rngs)
        configs = _resolve(config, dotted(path))
        self.experts = Experts(dim, hidden_dim, num_experts, configs=configs, param_dtype=param_dtype, rngs=rngs)
        if shared_hidden_dim:
            self.shared = FeedForward(dim, shared_hidden_dim, param_dtype=param_dtype, rngs=rngs)
        else:
            self.shared = None

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """``(y, load_balance_loss)`` of x [..., D]: y like x, and a float32 scalar (Switch Transformer, equation 4)."""
        tokens = x.reshape(-1, x.shape[-1])
        T, k = tokens.shape[0], self.top_k
        inputs = tokens if self.dtype is None else tokens.astype(self.dtype)
        router = self.router.weight[...].astype(jnp.float32)
        logits = jnp.matmul(tokens.astype(jnp.float32), router.T, precision=jax.lax.Precision.HIGHEST)
        probabilities = jax.nn.softmax(logits, axis=-1)  # [T, E]
        _, chosen = jax.lax.top_k(jax.lax.stop_gradient(probabilities), k)  # [T, k]
        scores = (probabilities[:, None] * jax.nn.one_hot(chosen, self.num_experts)).sum(axis=-1)
        if self.normalize_scores:
            scores = scores / scores.sum(axis=-1, keepdims=True)

        chosen = chosen.reshape(-1)  # [T * k]
        order = jnp.argsort(chosen, stable=True)  # slots, by expert
        group_sizes = (chosen[:, None] == jnp.arange(self.num_experts)).sum(axis=0, dtype=jnp.int32)
        if self.parallel is None:
            y = combine(self.experts(inputs, group_sizes, order), scores, order).astype(x.dtype)
        else:
            weights = {name: getattr(self.experts, name)[...] for name in ExpertConfigs._fields}
            y, dropped = self.parallel.apply(self.experts.compute, weights, inputs, chosen.reshape(T, k), scores)
            y = y.astype(x.dtype)
            if hasattr(self, "__captures__"):  # sowing outside of nnx.capture would add a variable to the layer
                self.sow(nnx.Intermediate, "exchange_drop_fraction", dropped)
        if self.shared is not None:
            y = y + self.shared(inputs).astype(x.dtype)

        fraction = group_sizes.astype(jnp.float32) / max(1, T * k)
        mean = probabilities.sum(axis=0) / max(1, T)
        return y.reshape(x.shape), self.num_experts * (fraction * mean).sum()


def _swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up in their dtype; silu in float32, rounded once, as PyTorch does it."""
    return jax.nn.silu(gate.astype(jnp.float32)).astype(gate.dtype) * up


def _resolve(config: Any, path: str) -> ExpertConfigs:
    """The configs of the experts of the layer called ``path``."""
    if not isinstance(config, FqnToConfig):
        config = None if config is None else as_config(config)
        return ExpertConfigs(config, config, config)
    experts = f"{path}.experts".lstrip(".")
    found = [config.resolve(f"{experts}.{name}") for name in ExpertConfigs._fields]
    found = [UNMATCHED if isinstance(c, LinearConfig) else c for c in found]  # which says nothing about experts
    if all(c is UNMATCHED for c in found):
        _log.warning(
            "MoE: no key of config matches %s.w1, .w2 or .w3, so they stay unquantized; the keys are %s. Give path= "
            "this layer's name in its model, or, if that is meant, the key '_default' with None",
            experts,
            ", ".join(map(repr, config.fqn_to_config)) or "none",
        )
    return ExpertConfigs(*(None if c is UNMATCHED else c for c in found))
