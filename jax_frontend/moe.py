"""A token-choice mixture-of-experts layer for Flax NNX; parameters and math are those of the PyTorch one.

What it computes is in ``functional.py`` and ``router.py``; ``linen.py`` has the same layer for Flax Linen.
T = tokens, D = model width, H = width of an expert, E = experts, k = experts of each token.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

try:
    from flax import nnx
except ImportError as error:
    raise ImportError(f'xmoe.jax_frontend.MoE needs flax ({error}): pip install "xmoe[flax]"') from error

from xmoe.fqn import Name, dotted
from xmoe.jax_frontend import functional
from xmoe.jax_frontend.expert_parallel import ExpertParallel
from xmoe.jax_frontend.functional import Activation, AxisNames, ExpertConfigs, Initializer, Weights
from xmoe.jax_frontend.router import GroupScore, RouterOptions, ScoreFunction, update_bias


class RouterBias(nnx.Variable):
    """A router's bias, float32 [E]: state, and no parameter: optimizers and `nnx.grad` leave it alone."""


class Linear(nnx.Module):
    """``weight`` [out, in], as PyTorch stores it; no bias."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        kernel_init: Initializer | None = None,
        axes: tuple[str | None, ...] | None = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.weight = _param((out_features, in_features), kernel_init, axes, param_dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] @ weight^T, in the dtype of x."""
        return functional.linear(x, self.weight[...])


class Router(Linear):
    """``weight`` [E, D], and ``bias`` [E] (`RouterBias`) or None. `MoE` routes with them."""

    def __init__(self, dim: int, num_experts: int, *, with_bias: bool, **options: Any) -> None:
        super().__init__(dim, num_experts, **options)
        self.bias = RouterBias(jnp.zeros(num_experts, jnp.float32)) if with_bias else None


class FeedForward(nnx.Module):
    """w2(act(w1 x) * w3 x), by default SwiGLU; plain, without w3, w2(act(w1 x))."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        activation: Activation = "swiglu",
        kernel_init: Initializer | None = None,
        axis_names: AxisNames | None = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        def linear(name: str, in_features: int, out_features: int) -> Linear:
            axes = functional.axes_of(f"shared.{name}", axis_names)
            return Linear(
                in_features, out_features, kernel_init=kernel_init, axes=axes, param_dtype=param_dtype, rngs=rngs
            )

        self.w1 = linear("w1", dim, hidden_dim)
        self.w2 = linear("w2", hidden_dim, dim)
        self.w3 = linear("w3", dim, hidden_dim) if activation in functional.GATED else None
        self.activation: Activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        w3 = None if self.w3 is None else self.w3.weight[...]
        return functional.feed_forward(x, Weights(self.w1.weight[...], self.w2.weight[...], w3), self.activation)


class Experts(nnx.Module):
    """E experts on tokens sorted by expert: ``w1``, and if they are gated ``w3``, [E, H, D] and ``w2`` [E, D, H].

    SwiGLU weights of one config run as one op, `swiglu_experts`.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        configs: ExpertConfigs,
        activation: Activation = "swiglu",
        kernel_init: Initializer | None = None,
        axis_names: AxisNames | None = None,
        param_dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        def weight(name: str, *shape: int) -> nnx.Param:
            axes = functional.axes_of(f"experts.{name}", axis_names)
            return _param((num_experts, *shape), kernel_init, axes, param_dtype, rngs)

        self.w1 = weight("w1", hidden_dim, dim)
        self.w2 = weight("w2", dim, hidden_dim)
        self.w3 = weight("w3", hidden_dim, dim) if activation in functional.GATED else None
        self.configs = nnx.static(configs)
        self.activation: Activation = activation

    def __call__(self, x: jax.Array, group_sizes: jax.Array, order: jax.Array | None = None) -> jax.Array:
        """x [M, D] -> [M, D]; ``group_sizes`` int32 [E] rows of each expert. With the ``order`` of `permute_tokens` x
        is [T, D], not sorted yet. Rows past the last expert's come out as zeros."""
        return self.compute(self.weights(), x, group_sizes, order)

    def weights(self) -> dict[str, jax.Array]:
        """By name; w3 only where there is one."""
        weights = {"w1": self.w1[...], "w2": self.w2[...]}
        return weights if self.w3 is None else {**weights, "w3": self.w3[...]}

    def compute(
        self, weights: dict[str, jax.Array], x: jax.Array, group_sizes: jax.Array, order: jax.Array | None
    ) -> jax.Array:
        """The same with ``weights`` in place of the parameters: of fewer experts, say, or shards of H."""
        given = Weights(weights["w1"], weights["w2"], weights.get("w3"))
        return functional.apply_experts(x, given, group_sizes, order, self.configs, self.activation)


class MoE(nnx.Module):
    """Routes each token to its ``top_k`` best of ``num_experts`` experts; unless ``capacity_factor`` says so, no token
    is dropped.

    Parameters, named and shaped as in the PyTorch layer: ``router.weight`` [E, D], ``experts.w1`` and ``experts.w3``
    [E, H, D], ``experts.w2`` [E, D, H], and with ``shared_hidden_dim`` those of the expert that sees every token,
    ``shared.w1.weight`` and so on. Where two experts score the same, this layer takes the one with the lower index
    (`jax.lax.top_k`); PyTorch promises no order. With ``bias_update_rate`` there is also ``router.bias``, float32 [E],
    a `RouterBias`.

    Weights begin at LeCun's normal initialisation: truncated, of variance 1 / fan-in. (The PyTorch layer draws all of
    its weights from N(0, 0.02²).)

    In bfloat16 XLA keeps some intermediate results in float32. Under ``xla_allow_excess_precision=False`` it rounds
    where PyTorch does.

    Under `nnx.capture` with `nnx.Intermediate` each call sows the metrics of `Routing.metrics`, one
    `nnx.Intermediate` a name: the tokens of each expert, the largest load, the fraction of slots dropped, the router's
    entropy, and the load-balance and z losses, which may be trained on::

        (y, _), metrics = nnx.capture(layer, nnx.Intermediate)(x)
        loss = task_loss(y) + 0.001 * metrics["router_z_loss"][0]  # a value for each call of the layer

    Args:
        dim, hidden_dim: D and H, multiples of 16.
        num_experts, top_k: E and k.
        shared_hidden_dim: the width of the shared expert; None or 0: there is none. Several shared experts are one of
            their widths' sum.
        normalize_scores: the scores of a token's k experts sum to 1.
        score_function, scaling_factor, num_expert_groups, num_limited_groups, group_score, capacity_factor: as in
            `route`.
        bias_update_rate: balances the load by a bias instead of a loss: after each call in training mode `update_bias`
            moves ``router.bias`` at this rate, 0.001 in DeepSeek-V3. With 0 the bias stays until the method
            `update_bias` is called, as it must be where a step has several micro-batches, or devices that see their own
            tokens only. None: there is no bias.
        gated: experts are w2(act(w1 x) * w3 x); if False, w2(act(w1 x)), and there is no w3. Also of the shared one.
        activation: "swiglu" (the default) or "geglu" of gated experts; "gelu" (the default), "relu", "relu2", "silu" of
            plain ones. GELU is `jax.nn.gelu`, the tanh approximation; relu2 is ReLU squared.
        config: of the experts' GEMMs: a `GroupedMMConfig`, a recipe (enum or name), a `FqnToConfig`, or None to leave
            them in ``dtype``. A `FqnToConfig` that says nothing about any of them is logged as a warning.
        path: this layer's name or path in its model, which the keys of a `FqnToConfig` begin with: "layers.0.moe" or
            ("layers", 0, "moe").
        deterministic: evaluation mode, in which the bias stays. ``train()`` and ``eval()`` switch it.
        kernel_init: of every weight: an initializer of kernels [in, out], such as `nnx.initializers.normal(0.02)`,
            called once for each expert. None: as above.
        axis_names: logical names of E, D and H, such as ("expert", "embed", "mlp"); they become the parameters'
            ``out_sharding``, so, unless under `nnx.use_eager_sharding(False)`, the layer is made with a mesh set and
            under `flax.nnx.logical_axis_rules`. The router's experts have no name. None: no names.
        dtype: the experts compute in it: bfloat16 or float32; None: in the dtype of the input, as in PyTorch.
        param_dtype: the parameters are stored in it: bfloat16, float16, float32 or float64.

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
        score_function: ScoreFunction = "softmax",
        scaling_factor: float = 1.0,
        num_expert_groups: int | None = None,
        num_limited_groups: int | None = None,
        group_score: GroupScore = "top2_sum",
        capacity_factor: float | None = None,
        bias_update_rate: float | None = None,
        gated: bool = True,
        activation: Activation | None = None,
        config: Any = None,
        path: Name = "",
        deterministic: bool = False,
        kernel_init: Initializer | None = None,
        axis_names: AxisNames | None = None,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        functional.check_options(
            shared_hidden_dim=shared_hidden_dim, bias_update_rate=bias_update_rate, normalize_scores=normalize_scores,
            gated=gated,
        )  # fmt: skip
        if not isinstance(path, str | Sequence):
            raise ValueError(f"path={path!r} is no name; give one such as 'layers.0.moe' or ('layers', 0, 'moe')")
        if not isinstance(rngs, nnx.Rngs):
            raise ValueError(f"rngs is a {type(rngs).__name__}; give flax.nnx.Rngs, such as nnx.Rngs(0)")
        self.dtype, param_dtype = functional.as_dtypes(dtype, param_dtype)
        self.options = RouterOptions(
            num_experts=num_experts,
            top_k=top_k,
            score_function=score_function,
            normalize=normalize_scores,
            scaling_factor=scaling_factor,
            num_expert_groups=num_expert_groups,
            num_limited_groups=num_limited_groups,
            group_score=group_score,
            capacity_factor=capacity_factor,
        )
        functional.check_sizes(dim=dim, hidden_dim=hidden_dim)
        activation = functional.check_activation(activation, gated)
        self.parallel: ExpertParallel | None = None
        """How the experts lie on a mesh (`expert_parallel`); None: on one device."""
        self.num_experts, self.top_k, self.normalize_scores = num_experts, top_k, normalize_scores
        self.bias_update_rate, self.deterministic = bias_update_rate, deterministic
        made: dict[str, Any] = {"kernel_init": kernel_init, "param_dtype": param_dtype, "rngs": rngs}
        axes = functional.axes_of("router.weight", axis_names)
        self.router = Router(dim, num_experts, with_bias=bias_update_rate is not None, axes=axes, **made)
        made |= {"activation": activation, "axis_names": axis_names}
        configs = functional.resolve(config, dotted(path), gated)
        self.experts = Experts(dim, hidden_dim, num_experts, configs=configs, **made)
        self.shared = FeedForward(dim, shared_hidden_dim, **made) if shared_hidden_dim else None

    def __call__(self, x: jax.Array, *, deterministic: bool | None = None) -> tuple[jax.Array, jax.Array]:
        """``(y, load_balance_loss)`` of x [..., D]: y like x, and a float32 scalar (Switch Transformer, equation 4).

        ``deterministic`` overrides the layer's.
        """
        bias = None if self.router.bias is None else self.router.bias[...]
        y, routing = functional.moe(
            x, self.router.weight[...], bias, self.experts, self.shared, self.options, self.dtype,
            None if self.parallel is None else self._on_mesh,
        )  # fmt: skip
        if hasattr(self, "__captures__"):  # sowing outside of nnx.capture would add variables to the layer
            for name, value in routing.metrics.items():
                self.sow(nnx.Intermediate, name, value)
        training = not (self.deterministic if deterministic is None else deterministic)
        if training and self.bias_update_rate:
            self.update_bias(routing.tokens_per_expert)
        return y, routing.load_balance_loss

    def _on_mesh(self, tokens: jax.Array, chosen: jax.Array, scores: jax.Array) -> jax.Array:
        assert self.parallel is not None, "called on one device"
        y, fraction = self.parallel.apply(self.experts.compute, self.experts.weights(), tokens, chosen, scores)
        if hasattr(self, "__captures__"):
            self.sow(nnx.Intermediate, "exchange_drop_fraction", fraction)
        return y

    def update_bias(self, tokens_per_expert: jax.Array, rate: float | jax.Array | None = None) -> None:
        """Moves ``router.bias`` at ``rate`` (None: the layer's) to even the load of [E] tokens (`router.update_bias`).

        Raises:
            ValueError: the layer has no bias.
        """
        rate = self.bias_update_rate if rate is None else rate
        if self.router.bias is None or rate is None:
            raise ValueError("bias_update_rate=None: the layer has no bias to update; give a rate, or 0 to call this")
        self.router.bias[...] = update_bias(self.router.bias[...], tokens_per_expert, rate)


def _param(
    shape: tuple[int, ...],
    kernel_init: Initializer | None,
    axes: tuple[str | None, ...] | None,
    param_dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Param:
    value = functional.weight_init(kernel_init)(rngs.params(), shape, param_dtype)
    return nnx.Param(value) if axes is None else nnx.Param(value, out_sharding=axes)
