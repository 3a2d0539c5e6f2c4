"""The mixture-of-experts layer of ``moe.py`` for Flax Linen: the same arguments, parameters and bits.

T = tokens, D = model width, H = width of an expert, E = experts, k = experts of each token.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(f'xmoe.jax_frontend.linen needs flax ({error}): pip install "xmoe[flax]"') from error

from xmoe.fqn import dotted
from xmoe.jax_frontend import functional
from xmoe.jax_frontend.expert_parallel import ExpertParallel, check_automatic
from xmoe.jax_frontend.functional import Activation, AxisNames, Initializer, Weights
from xmoe.jax_frontend.router import GroupScore, RouterOptions, ScoreFunction, update_bias

ROUTER_STATS = "router_stats"
"""The collection of the routers' biases."""


class MoE(nn.Module):
    """Routes each token to its ``top_k`` best of ``num_experts`` experts: `xmoe.jax_frontend.MoE`, where the arguments
    are explained, in Linen.

    Variables: in "params" ``router.weight`` [E, D], ``experts.w1`` and, if they are gated, ``experts.w3`` [E, H, D],
    ``experts.w2`` [E, D, H], with ``shared_hidden_dim`` ``shared.w1.weight`` and so on; with ``bias_update_rate`` in
    "router_stats" ``router.bias``, float32 [E].

    Where "router_stats" is mutable, and ``deterministic`` is not set, a call moves the bias at ``bias_update_rate``. To
    do it by hand keep the collection immutable, and apply `xmoe.jax_frontend.update_bias` to it. Metrics
    (`Routing.metrics`) are sown into "intermediates"::

        (y, _), state = layer.apply(variables, x, mutable=["intermediates", "router_stats"])
        loss = task_loss(y) + 0.001 * state["intermediates"]["router_z_loss"][0]

    The layer knows its path in the model, so a `FqnToConfig` needs no ``path``: its keys begin with the names of the
    modules around it, "layers_0.moe.experts". With ``axis_names`` the parameters are boxed by
    `flax.linen.with_logical_partitioning`.

    With ``parallel`` calls run on its mesh, as those of an NNX layer do after `expert_parallel`; ``init`` does not.
    Where the variables lie is up to the caller: the experts' as ``parallel.spec("w1")`` and so on say, or, what is the
    same, by `flax.linen.get_sharding` with ``axis_names=(parallel.axis, None, parallel.tensor_axis)``.

    Raises ValueError, when it is initialised or called, for an argument that is out of range.
    """

    dim: int
    hidden_dim: int
    num_experts: int
    top_k: int
    shared_hidden_dim: int | None = None
    normalize_scores: bool = True
    score_function: ScoreFunction = "softmax"
    scaling_factor: float = 1.0
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    group_score: GroupScore = "top2_sum"
    capacity_factor: float | None = None
    bias_update_rate: float | None = None
    gated: bool = True
    activation: Activation | None = None
    config: Any = None
    deterministic: bool = False
    kernel_init: Initializer | None = None
    axis_names: AxisNames | None = None
    dtype: Any = None
    param_dtype: Any = jnp.float32
    parallel: ExpertParallel | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool | None = None) -> tuple[jax.Array, jax.Array]:
        """``(y, load_balance_loss)`` of x [..., D]: y like x, and a float32 scalar (Switch Transformer, equation 4).

        ``deterministic`` overrides the layer's.
        """
        functional.check_options(
            shared_hidden_dim=self.shared_hidden_dim, bias_update_rate=self.bias_update_rate,
            normalize_scores=self.normalize_scores, gated=self.gated,
        )  # fmt: skip
        dtype, param_dtype = functional.as_dtypes(self.dtype, self.param_dtype)
        options = RouterOptions(
            num_experts=self.num_experts,
            top_k=self.top_k,
            score_function=self.score_function,
            normalize=self.normalize_scores,
            scaling_factor=self.scaling_factor,
            num_expert_groups=self.num_expert_groups,
            num_limited_groups=self.num_limited_groups,
            group_score=self.group_score,
            capacity_factor=self.capacity_factor,
        )
        functional.check_sizes(dim=self.dim, hidden_dim=self.hidden_dim)
        if self.parallel is not None:
            if not isinstance(self.parallel, ExpertParallel):
                raise ValueError(
                    f"parallel is a {type(self.parallel).__name__}; give ExpertParallel(mesh=mesh), or None"
                )
            check_automatic(self.parallel.mesh)
        activation = functional.check_activation(self.activation, self.gated)
        made: dict[str, Any] = {
            "dim": self.dim,
            "kernel_init": self.kernel_init,
            "axis_names": self.axis_names,
            "param_dtype": param_dtype,
        }
        weight, bias = _Router(**made, num_experts=self.num_experts, name="router")(self.bias_update_rate is not None)
        made["activation"] = activation
        configs = functional.resolve(self.config, dotted(self.path), self.gated, warn=self.is_initializing())
        weights = _Experts(**made, hidden_dim=self.hidden_dim, num_experts=self.num_experts, name="experts")()
        by_name = {name: weight for name, weight in weights._asdict().items() if weight is not None}
        if self.parallel is not None:
            for name, w in by_name.items():
                self.parallel.check_weight(f"experts.{name}", w.shape)

        def experts(x: jax.Array, group_sizes: jax.Array, order: jax.Array) -> jax.Array:
            return functional.apply_experts(x, weights, group_sizes, order, configs, activation)

        def on_mesh(tokens: jax.Array, chosen: jax.Array, scores: jax.Array) -> jax.Array:
            def compute(w: Any, x: jax.Array, group_sizes: jax.Array, order: jax.Array | None) -> jax.Array:
                given = Weights(w["w1"], w["w2"], w.get("w3"))
                return functional.apply_experts(x, given, group_sizes, order, configs, activation)

            assert self.parallel is not None, "called on one device"
            y, fraction = self.parallel.apply(compute, by_name, tokens, chosen, scores)
            self.sow("intermediates", "exchange_drop_fraction", fraction)
            return y

        shared = None
        if self.shared_hidden_dim:
            shared = _FeedForward(**made, hidden_dim=self.shared_hidden_dim, name="shared")
        bias_value = None if bias is None else bias.value
        y, routing = functional.moe(
            x, weight, bias_value, experts, shared, options, dtype,
            None if self.parallel is None or self.is_initializing() else on_mesh,
        )  # fmt: skip
        for name, value in routing.metrics.items():
            self.sow("intermediates", name, value)
        training = not (self.deterministic if deterministic is None else deterministic) and not self.is_initializing()
        if bias is not None and self.bias_update_rate and training and self.is_mutable_collection(ROUTER_STATS):
            bias.value = update_bias(bias.value, routing.tokens_per_expert, self.bias_update_rate)
        return y, routing.load_balance_loss


class _Layer(nn.Module):
    """How a part of the layer makes its weights: arguments of `MoE`."""

    kernel_init: Initializer | None
    axis_names: AxisNames | None
    param_dtype: Any


class _Router(_Layer):
    """``weight`` [E, D] and the variable ``bias`` [E]."""

    dim: int
    num_experts: int

    @nn.compact
    def __call__(self, with_bias: bool) -> tuple[jax.Array, nn.Variable[jax.Array] | None]:
        weight = _param(self, "weight", "router.weight", (self.num_experts, self.dim))
        if not with_bias:
            return weight, None
        return weight, self.variable(ROUTER_STATS, "bias", jnp.zeros, (self.num_experts,), jnp.float32)


class _Experts(_Layer):
    """``w1``, and if they are gated ``w3``, [E, H, D] and ``w2`` [E, D, H]."""

    dim: int
    hidden_dim: int
    num_experts: int
    activation: Activation

    @nn.compact
    def __call__(self) -> Weights:
        def weight(name: str, *shape: int) -> jax.Array:
            return _param(self, name, f"experts.{name}", (self.num_experts, *shape))

        return _weights(weight, self.dim, self.hidden_dim, self.activation)


class _FeedForward(_Layer):
    """``w1.weight``, and if it is gated ``w3.weight``, [H, D] and ``w2.weight`` [D, H]."""

    dim: int
    hidden_dim: int
    activation: Activation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def weight(name: str, *shape: int) -> jax.Array:
            made = self.kernel_init, self.axis_names, self.param_dtype
            return _Weight(*made, full_name=f"shared.{name}", shape=shape, name=name)()

        weights = _weights(weight, self.dim, self.hidden_dim, self.activation)
        return functional.feed_forward(x, weights, self.activation)


class _Weight(_Layer):
    """``weight``, of any shape, and nothing else: a linear layer's name in the tree of parameters."""

    full_name: str
    shape: tuple[int, ...]

    @nn.compact
    def __call__(self) -> jax.Array:
        return _param(self, "weight", self.full_name, self.shape)


def _weights(weight: Callable[..., jax.Array], dim: int, hidden_dim: int, activation: Activation) -> Weights:
    """By ``weight(name, *shape)``, in the order in which the NNX layer makes them."""
    w1, w2 = weight("w1", hidden_dim, dim), weight("w2", dim, hidden_dim)
    return Weights(w1, w2, weight("w3", hidden_dim, dim) if activation in functional.GATED else None)


def _param(layer: _Layer, name: str, full_name: str, shape: tuple[int, ...]) -> jax.Array:
    """Of ``layer``, with its initializer and, by ``full_name``, logical axis names."""
    init: Any = functional.weight_init(layer.kernel_init)  # of arrays, or boxes that `param` opens
    axes = functional.axes_of(full_name, layer.axis_names)
    if axes is not None:
        init = nn.with_logical_partitioning(init, axes)
    return layer.param(name, init, shape, layer.param_dtype)
