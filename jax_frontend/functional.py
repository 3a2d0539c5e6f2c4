"""What the NNX and the Linen MoE layer compute, as functions of arrays: one semantics for both. Needs no flax.

T = tokens, D = model width, H = hidden width of an expert, E = experts, k = experts of each token, M rows.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from xmoe.config import GroupedMMConfig, LinearConfig, as_config
from xmoe.dtypes import dtype_name
from xmoe.fqn import UNMATCHED, FqnToConfig
from xmoe.jax_frontend.checks import check_arrays, check_booleans, check_integers
from xmoe.jax_frontend.experts import swiglu_experts
from xmoe.jax_frontend.permute import combine, permute_tokens
from xmoe.jax_frontend.plan import check_placement
from xmoe.jax_frontend.ragged_dot import ragged_dot, report_bad_order
from xmoe.jax_frontend.router import RouterOptions, Routing, check_rate
from xmoe.operands import FEATURE_MULTIPLE

_log = logging.getLogger(__name__)

Activation = Literal["swiglu", "geglu", "gelu", "relu", "relu2", "silu"]
Initializer = Callable[..., jax.Array]
"""(key, shape, dtype) → an array, as in `jax.nn.initializers`."""
AxisNames = Sequence[str | None]
"""The logical names of the axes (E, D, H) of the parameters."""

GATED: dict[str, Callable[[jax.Array], jax.Array]] = {"swiglu": jax.nn.silu, "geglu": jax.nn.gelu}
PLAIN: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}
"""The GELUs are `jax.nn.gelu`'s default, the tanh approximation."""


PARAM_DTYPES = ("bfloat16", "float16", "float32", "float64")
"""Of parameters; they are cast to what the experts compute in."""


class ExpertConfigs(NamedTuple):
    """The config of each weight, None for one left alone. Hashable, as a static argument of `jax.jit` must be."""

    w1: GroupedMMConfig | None
    w2: GroupedMMConfig | None
    w3: GroupedMMConfig | None


class Weights(NamedTuple):
    """Of E experts, w1 and w3 [E, H, D] and w2 [E, D, H]; of one feed-forward layer without the E.

    Plain experts, w2(activation(w1 x)), have no w3.
    """

    w1: jax.Array
    w2: jax.Array
    w3: jax.Array | None


def moe(
    x: jax.Array,
    router: jax.Array,
    bias: jax.Array | None,
    experts: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    shared: Callable[[jax.Array], jax.Array] | None,
    options: RouterOptions,
    dtype: jax.typing.DTypeLike | None,
    parallel: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Routing]:
    """y like x [..., D], and where its tokens went.

    Args:
        router: [E, D]; the logits are products in float32.
        bias: float32 [E] or None, as in `route`.
        experts: (tokens [T, D], group_sizes [E], order [T * k]) → [T * k, D], sorted by expert.
        shared: [T, D] → [T, D], added to what the experts give.
        dtype: the experts, the shared one too, compute in it; None: in that of x.
        parallel: (tokens [T, D], their experts [T, k], E where there is none, scores [T, k]) → float32 [T, D], in place
            of ``experts`` and their weighted sum.
    """
    check_arrays(variables=True, x=x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}; give floating-point tokens, x.astype(jnp.bfloat16)")
    if x.shape[-1:] != router.shape[-1:]:
        raise ValueError(f"x has shape {x.shape}; give tokens [..., dim], dim={router.shape[-1]}")
    check_placement("jax", x=x)
    tokens = x.reshape(-1, x.shape[-1])
    inputs = tokens if dtype is None else tokens.astype(dtype)
    logits = jnp.matmul(tokens.astype(jnp.float32), router.astype(jnp.float32).T, precision=jax.lax.Precision.HIGHEST)
    routing = options.route(logits, bias)
    if parallel is None:
        y = combine(experts(inputs, routing.group_sizes, routing.order), routing.scores, routing.order)
    else:
        chosen = routing.experts
        if options.capacity_factor is not None:  # a dropped slot goes nowhere
            chosen = jnp.where(routing.scores != 0, chosen, options.num_experts)
        y = parallel(inputs, chosen, routing.scores)
    y = y.astype(x.dtype)
    if shared is not None:
        y = y + shared(inputs).astype(x.dtype)
    return y.reshape(x.shape), routing


def apply_experts(
    x: jax.Array,
    weights: Weights,
    group_sizes: jax.Array,
    order: jax.Array | None,
    configs: ExpertConfigs,
    activation: Activation,
) -> jax.Array:
    """[M, D] of x [M, D] sorted by expert, or with ``order`` [T, D]; rows past the last group are zeros.

    SwiGLU experts of one config run as one op, `swiglu_experts`; others are a `ragged_dot` a weight.
    """
    if activation == "swiglu" and configs.w1 is not None and configs.w1 == configs.w2 == configs.w3:
        w1, w2, w3 = (w.astype(x.dtype) for w in weights if w is not None)
        return swiglu_experts(x, w1, w2, w3, group_sizes, config=configs.w1, order=order)
    if order is not None:
        if any(config is not None and config.debug for config in configs):
            jax.debug.callback(report_bad_order, order)
        x = permute_tokens(x, order)

    def dot(x: jax.Array, weight: jax.Array, config: GroupedMMConfig | None) -> jax.Array:
        return _dot(x, weight.astype(x.dtype), group_sizes, config)

    gate = dot(x, weights.w1, configs.w1)
    up = None if weights.w3 is None else dot(x, weights.w3, configs.w3)
    return dot(activate(activation, gate, up), weights.w2, configs.w2)


def _dot(x: jax.Array, weight: jax.Array, group_sizes: jax.Array, config: GroupedMMConfig | None) -> jax.Array:
    """[M, N] of x [M, K] and weight [E, N, K]."""
    if config is None and x.dtype != jnp.bfloat16:  # left alone: the kernels would round to bfloat16
        # JAX says nothing about rows past the last group, neither in the product nor in the gradient.
        within = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
        operands = _mapped_alike(jnp.where(within, x, 0), weight.swapaxes(1, 2), group_sizes)
        return jnp.where(within, jax.lax.ragged_dot(*operands, precision=jax.lax.Precision.HIGHEST), 0)
    return ragged_dot(x, weight, group_sizes, config=config, transpose_rhs=True)


def _mapped_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The same arrays, but where `jax.vmap` maps one of them it maps all, as `jax.lax.ragged_dot` asks for. (Each is
    made to depend on no element of the others, which XLA folds away.)"""
    elements = sum(jax.lax.stop_gradient(a).reshape(-1)[:0].astype(jnp.int32).sum() for a in arrays)
    return [jnp.where(elements == 0, a, 0) for a in arrays]


def feed_forward(x: jax.Array, weights: Weights, activation: Activation) -> jax.Array:
    """w2(activation(w1 x) * w3 x), or without w3 w2(activation(w1 x)), of x [..., D], in the dtype of x."""
    gate = linear(x, weights.w1)
    up = None if weights.w3 is None else linear(x, weights.w3)
    return linear(activate(activation, gate, up), weights.w2)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [..., in] @ weight^T, weight [out, in], in the dtype of x."""
    return x @ weight.astype(x.dtype).T


def activate(activation: Activation, gate: jax.Array, up: jax.Array | None) -> jax.Array:
    """act(gate) * up in their dtype; act in float32, rounded once, as PyTorch does it. Without ``up`` act(gate)."""
    act = (PLAIN if up is None else GATED)[activation]
    h = act(gate.astype(jnp.float32)).astype(gate.dtype)
    return h if up is None else h * up


# ------------------------------------------------------------------------------------------- the layers' arguments


def check_sizes(**sizes: int) -> None:
    """Raises ValueError for a size that the kernels do not take."""
    check_integers(**sizes)
    for name, size in sizes.items():
        if size <= 0 or size % FEATURE_MULTIPLE:
            raise ValueError(f"{name}={size} is not a positive multiple of {FEATURE_MULTIPLE}; round it up")


def check_options(*, shared_hidden_dim: int | None, bias_update_rate: float | None, **booleans: bool) -> None:
    """Raises ValueError for options of a layer that are out of range; `RouterOptions` checks those of its router."""
    check_booleans(**booleans)
    if shared_hidden_dim is not None:
        check_integers(shared_hidden_dim=shared_hidden_dim)
        if shared_hidden_dim < 0:
            raise ValueError(
                f"shared_hidden_dim={shared_hidden_dim} is negative; give a width, or None for no shared expert"
            )
    if bias_update_rate is not None:
        check_rate("bias_update_rate", bias_update_rate)


def as_dtypes(dtype: Any, param_dtype: Any) -> tuple[jnp.dtype | None, jnp.dtype]:
    """Of the experts' computation, None for that of the input, and of the parameters. Raises ValueError."""
    name = dtype_name(param_dtype, "param_dtype", PARAM_DTYPES)
    return None if dtype is None else jnp.dtype(dtype_name(dtype)), jnp.dtype(name)


def check_activation(activation: Activation | None, gated: bool) -> Activation:
    """``activation``, or the default: "swiglu" of gated experts and "gelu" of plain ones. Raises ValueError."""
    if activation is None:
        return "swiglu" if gated else "gelu"
    known = GATED if gated else PLAIN
    if activation not in known:
        kind, names = "gated" if gated else "plain", ", ".join(map(repr, known))
        other = f", or gated={not gated}" if activation in (PLAIN if gated else GATED) else ""
        raise ValueError(f"activation={activation!r} is not for {kind} experts; use one of {names}{other}")
    return activation


def resolve(config: Any, path: str, gated: bool = True, *, warn: bool = True) -> ExpertConfigs:
    """The configs of the experts of the layer called ``path`` ("layers.0.moe"); w3's is None where they are plain.

    With ``warn`` a `FqnToConfig` that says nothing about them is logged. Raises ValueError for a config that is none.
    """
    names = ExpertConfigs._fields if gated else ("w1", "w2")
    if not isinstance(config, FqnToConfig):
        config = None if config is None else as_config(config)
        return ExpertConfigs(config, config, config if gated else None)
    experts = f"{path}.experts".lstrip(".")
    found = {name: config.resolve(f"{experts}.{name}") for name in names}
    # A config of linears says nothing about experts.
    found = {name: UNMATCHED if isinstance(c, LinearConfig) else c for name, c in found.items()}
    if warn and all(c is UNMATCHED for c in found.values()):
        _log.warning(
            "MoE: no key of config matches %s.%s or .%s, so they stay unquantized; the keys are %s. Give path= "
            "this layer's name in its model, or, if that is meant, the key '_default' with None",
            experts,
            ", .".join(names[:-1]),
            names[-1],
            ", ".join(map(repr, config.fqn_to_config)) or "none",
        )
    configs = {name: c if isinstance(c, GroupedMMConfig) else None for name, c in found.items()}
    return ExpertConfigs(configs["w1"], configs["w2"], configs.get("w3"))


def weight_init(kernel_init: Initializer | None) -> Initializer:
    """(key, shape, dtype) → a weight [out, in], or of each expert [E, out, in].

    ``kernel_init`` makes a kernel as Flax has them, [in, out], each expert's by itself. None: LeCun's normal
    initialisation, Flax's default.
    """
    if kernel_init is None:
        return _lecun_normal
    if not callable(kernel_init):
        raise ValueError(f"kernel_init={kernel_init!r} is no function; give one of flax.nnx.initializers, or None")

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            return kernel_init(key, (shape[-1], shape[-2]), dtype).T

        return one(key) if len(shape) == 2 else jax.vmap(one)(jax.random.split(key, shape[0]))

    return init


def _lecun_normal(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    experts = () if len(shape) == 2 else (0,)
    init = jax.nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=-1, out_axis=-2, batch_axis=experts
    )
    return init(key, shape, dtype)


def axes_of(name: str, axis_names: AxisNames | None) -> tuple[str | None, ...] | None:
    """The logical names of the axes of "router.weight", "experts.w1", "shared.w1" and so on; None where there are none.

    The router's experts have no name: a device that holds some of the experts scores all of them. Raises ValueError.
    """
    if axis_names is None:
        return None
    if isinstance(axis_names, str) or len(axis_names) != 3:
        raise ValueError(f"axis_names={axis_names!r} are not three; give names like ('expert', 'embed', 'mlp')")
    expert, embed, mlp = axis_names
    part, _, weight = name.partition(".")
    if part == "router":
        return None, embed
    matrix = (embed, mlp) if weight.startswith("w2") else (mlp, embed)
    return (expert, *matrix) if part == "experts" else matrix
