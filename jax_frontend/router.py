"""The router of a mixture of experts in plain JAX: each token's experts and their scores, losses, and the load.

T tokens, E experts, k experts of each token; slot s = t * k + j is the j-th choice of token t.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from xmoe.jax_frontend.checks import check_arrays, check_booleans, check_integers, is_number

ScoreFunction = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2_sum"]

_TINY = 1e-18
"""Stands for a sum of sigmoids that have all underflowed; its inverse square, in the gradient, is still finite."""


class Routing(NamedTuple):
    """Where T tokens go. A pytree; the arrays that nobody reads are not computed under `jax.jit`."""

    scores: jax.Array
    """float32 [T, k]: what each expert's output is multiplied by; 0 for a dropped slot."""
    experts: jax.Array
    """int32 [T, k]: the experts of each token, best first."""
    group_sizes: jax.Array
    """int32 [E]: the rows of each expert, dropped slots not among them."""
    order: jax.Array
    """int32 [T * k], a permutation: the slot of each row, rows sorted by expert and dropped slots past the last expert.
    For `permute_tokens`, `swiglu_experts` and `combine`."""
    probabilities: jax.Array
    """float32 [T, E], of sum 1: the softmax, or the sigmoid scores divided by their sum."""
    tokens_per_expert: jax.Array
    """int32 [E]: the slots that chose each expert, dropped ones too. What `update_bias` wants."""
    logits: jax.Array
    """float32 [T, E]."""

    @property
    def metrics(self) -> dict[str, jax.Array]:
        """float32 scalars, but for the first, of these T tokens.

        ``tokens_per_expert``: int32 [E]. ``max_load``: the fullest expert's slots over the mean's (1: even).
        ``drop_fraction``: of the slots, those that found their expert full. ``router_entropy``: of a token's
        probabilities, mean over the tokens, in nats. ``load_balance_loss``, ``router_z_loss``: the functions' values.
        """
        (T, k), E = self.experts.shape, self.logits.shape[-1]
        p, slots = self.probabilities, max(1, T * k)
        entropy = -jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum()
        return {
            "tokens_per_expert": self.tokens_per_expert,
            "max_load": self.tokens_per_expert.max().astype(jnp.float32) * (E / slots),
            "drop_fraction": (self.tokens_per_expert - self.group_sizes).sum().astype(jnp.float32) / slots,
            "router_entropy": entropy / max(1, T),
            "load_balance_loss": self.load_balance_loss,
            "router_z_loss": router_z_loss(self.logits),
        }

    @property
    def load_balance_loss(self) -> jax.Array:
        """`load_balance_loss` of these tokens: a float32 scalar."""
        return load_balance_loss(self.probabilities, self.tokens_per_expert, self.experts.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """The static options of `route`, which explains them, checked. Hashable."""

    num_experts: int
    top_k: int
    score_function: ScoreFunction = "softmax"
    normalize: bool = True
    scaling_factor: float = 1.0
    num_expert_groups: int | None = None
    num_limited_groups: int | None = None
    group_score: GroupScore = "top2_sum"
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        E, k, groups, limited = self.num_experts, self.top_k, self.num_expert_groups, self.num_limited_groups
        check_integers(num_experts=E, top_k=k)
        check_booleans(normalize=self.normalize)
        if E < 1:
            raise ValueError(f"num_experts={E} is not positive; give 1 or more")
        if not 1 <= k <= E:
            raise ValueError(f"top_k={k} is out of range; give 1 to num_experts={E}")
        for name, value, known in (
            ("score_function", self.score_function, get_args(ScoreFunction)),
            ("group_score", self.group_score, get_args(GroupScore)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is not known; use {' or '.join(map(repr, known))}")
        if (groups is None) != (limited is None):
            raise ValueError(
                f"num_expert_groups={groups} and num_limited_groups={limited} go together; give both, or neither"
            )
        if groups is not None and limited is not None:
            check_integers(num_expert_groups=groups, num_limited_groups=limited)
            if groups < 1 or E % groups:
                raise ValueError(f"num_expert_groups={groups} does not divide num_experts={E}; give a divisor")
            if not 1 <= limited <= groups:
                raise ValueError(f"num_limited_groups={limited} is out of range; give 1 to num_expert_groups={groups}")
            if k > limited * (E // groups):
                raise ValueError(
                    f"top_k={k} exceeds the {limited * (E // groups)} experts of num_limited_groups={limited} groups; "
                    "raise num_limited_groups"
                )
        scaling, factor = self.scaling_factor, self.capacity_factor
        if not (is_number(scaling) and 0 < scaling < math.inf):
            raise ValueError(f"scaling_factor={scaling!r} is not a positive number; use 1.0 to leave scores")
        if factor is not None and not (is_number(factor) and 0 < factor < math.inf):
            raise ValueError(f"capacity_factor={factor!r} is not a positive number; use None to drop no token")

    def capacity(self, T: int) -> int | None:
        """The most slots of T tokens that an expert takes, ceil(T * k * capacity_factor / E); None: any number."""
        if self.capacity_factor is None:
            return None
        factor = Fraction(str(self.capacity_factor))  # 1.1 as it is written: 10 * 1.1 slots are 11, not 12
        return math.ceil(T * self.top_k * factor / self.num_experts)

    def route(self, logits: jax.Array, bias: jax.Array | None = None) -> Routing:
        """`route` with these options."""
        E = self.num_experts
        _check_logits(logits)
        if logits.ndim != 2 or logits.shape[1] != E:
            raise ValueError(f"logits has shape {logits.shape}; give [T, {E}], one logit for each expert")
        if bias is not None:
            check_arrays(variables=True, bias=bias)
            if bias.shape != (E,):
                raise ValueError(f"bias has shape {bias.shape}; give ({E},), one number for each expert")
        logits = logits.astype(jnp.float32)
        if self.score_function == "softmax":
            affinity = probabilities = jax.nn.softmax(logits, axis=-1)
        else:
            affinity = jax.nn.sigmoid(logits)
            probabilities = affinity / jnp.maximum(affinity.sum(axis=-1, keepdims=True), _TINY)
        experts = self._choose(jax.lax.stop_gradient(affinity), bias)
        # Not by indexing, whose gradient adds up in any order.
        scores = (affinity[:, None] * jax.nn.one_hot(experts, E, dtype=jnp.float32)).sum(axis=-1)
        if self.normalize:
            total = scores.sum(axis=-1, keepdims=True)
            scores = scores / (total if self.score_function == "softmax" else jnp.maximum(total, _TINY))
        if self.scaling_factor != 1:
            scores = scores * self.scaling_factor

        chosen = experts.reshape(-1)
        tokens_per_expert = group_sizes = (chosen[:, None] == jnp.arange(E)).sum(axis=0, dtype=jnp.int32)
        if (capacity := self.capacity(logits.shape[0])) is not None:
            fits = _position_in_expert(experts, tokens_per_expert) < capacity
            scores = jnp.where(fits, scores, 0)
            chosen = jnp.where(fits, experts, E).reshape(-1)
            group_sizes = jnp.minimum(tokens_per_expert, capacity)
        order = jnp.argsort(chosen, stable=True)
        return Routing(scores, experts, group_sizes, order, probabilities, tokens_per_expert, logits)

    def _choose(self, affinity: jax.Array, bias: jax.Array | None) -> jax.Array:
        """int32 [T, k]: the experts of the largest ``affinity + bias`` [T, E], of the best groups only."""
        E, G = self.num_experts, self.num_expert_groups
        choice = affinity if bias is None else affinity + jax.lax.stop_gradient(bias.astype(jnp.float32))
        if G is not None and self.num_limited_groups is not None:
            best = 1 if self.group_score == "max" else min(2, E // G)
            of_group = jax.lax.top_k(choice.reshape(-1, G, E // G), best)[0].sum(axis=-1)  # [T, G]
            _, groups = jax.lax.top_k(of_group, self.num_limited_groups)
            allowed = (groups[:, :, None] == jnp.arange(G)).any(axis=1)  # [T, G]
            choice = jnp.where(jnp.repeat(allowed, E // G, axis=1), choice, -jnp.inf)
        return jax.lax.top_k(choice, self.top_k)[1]


def route(
    logits: jax.Array,
    k: int,
    *,
    bias: jax.Array | None = None,
    score_function: ScoreFunction = "softmax",
    normalize: bool = True,
    scaling_factor: float = 1.0,
    num_expert_groups: int | None = None,
    num_limited_groups: int | None = None,
    group_score: GroupScore = "top2_sum",
    capacity_factor: float | None = None,
) -> Routing:
    """The k best experts of each token by ``logits`` [T, E], of any float dtype; everything is computed in float32.

    Of experts, or groups, that score the same, those with the lower index are taken first, as `jax.lax.top_k` does. The
    scores are differentiable, the choice is not.

    With ``capacity_factor`` an expert takes at most ceil(T * k * capacity_factor / E) slots: the first choices of all
    tokens in the order of the tokens, then the second choices, and so on (GShard, arXiv:2006.16668, algorithm 1).
    The slots that find it full go nowhere: their scores are 0, and the other scores of the token stay as they are.

    Args:
        logits: [T, E].
        k: experts of each token, 1 to E.
        bias: [E], added to what the experts are chosen by and to nothing else (auxiliary-loss-free balancing,
            arXiv:2408.15664); it gets no gradient. See `update_bias`.
        score_function: "softmax" over the experts, or "sigmoid" of each.
        normalize: a token's scores are divided by their sum. (With k = 1 they are then 1, and the router learns nothing
            from them.)
        scaling_factor: what the scores are multiplied by, after that.
        num_expert_groups, num_limited_groups: a token's experts come from its best ``num_limited_groups`` of
            ``num_expert_groups`` groups of successive experts (DeepSeek-V2, arXiv:2405.04434, section 2.1.2). None:
            from all.
        group_score: a group is worth its best expert ("max", as in DeepSeek-V2) or its best two together ("top2_sum",
            as in DeepSeek-V3, arXiv:2412.19437).
        capacity_factor: None drops no token.

    Raises:
        ValueError: an argument is out of range; it is named with its value and the fix.
    """
    _check_logits(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {logits.shape}; give [T, E], with leading axes flattened")
    return RouterOptions(
        num_experts=logits.shape[1],
        top_k=k,
        score_function=score_function,
        normalize=normalize,
        scaling_factor=scaling_factor,
        num_expert_groups=num_expert_groups,
        num_limited_groups=num_limited_groups,
        group_score=group_score,
        capacity_factor=capacity_factor,
    ).route(logits, bias)


def _check_logits(logits: jax.Array) -> None:
    check_arrays(variables=True, logits=logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits is {logits.dtype}; give floating-point logits, logits.astype(jnp.float32)")


def _position_in_expert(experts: jax.Array, tokens_per_expert: jax.Array) -> jax.Array:
    """int32 [T, k]: how many slots come before each at its expert, first choices first, then in the order of the
    tokens. By two sorts: nothing of size T * k * E is held."""
    T, k = experts.shape
    by_priority = experts.T.reshape(-1)  # all first choices, all second choices, ...
    row = jnp.argsort(jnp.argsort(by_priority, stable=True))
    first = jnp.cumsum(tokens_per_expert) - tokens_per_expert
    return (row - first[by_priority]).reshape(k, T).T


def load_balance_loss(probabilities: jax.Array, tokens_per_expert: jax.Array, k: int) -> jax.Array:
    """float32 scalar, E * Σ_e f_e P_e: f_e is expert e's fraction of the T * k slots, P_e its mean probability.

    It is 1 when the load is even (Switch Transformer, arXiv:2101.03961, equation 4). ``probabilities`` [T, E] and
    ``tokens_per_expert`` [E] are `Routing`'s; the gradient goes through the former.
    """
    T, E = probabilities.shape
    fraction = tokens_per_expert.astype(jnp.float32) / max(1, T * k)
    mean = probabilities.sum(axis=0) / max(1, T)
    return E * (fraction * mean).sum()


def router_z_loss(logits: jax.Array) -> jax.Array:
    """float32 scalar, the mean over the tokens of logsumexp(logits [T, E])²: it keeps logits small (ST-MoE,
    arXiv:2202.08906, equation 5)."""
    z = jax.nn.logsumexp(logits.astype(jnp.float32), axis=-1)
    return jnp.square(z).sum() / max(1, logits.shape[0])


def update_bias(bias: jax.Array, tokens_per_expert: jax.Array, rate: float | jax.Array) -> jax.Array:
    """[E]: ``bias`` moved by ``rate``, up where an expert had fewer tokens than the mean and down where it had more.

    The rule of auxiliary-loss-free balancing (arXiv:2408.15664, algorithm 1; DeepSeek-V3 uses a rate of 0.001), to be
    applied once a step, with the counts of the whole batch: sum those of micro-batches and of devices before.

    Raises:
        ValueError: ``rate`` is neither an array nor a number of 0 or more, or another argument is no array.
    """
    check_rate("rate", rate)
    check_arrays(variables=True, bias=bias, tokens_per_expert=tokens_per_expert)
    load = tokens_per_expert.astype(jnp.float32)
    return bias + jnp.asarray(rate, bias.dtype) * jnp.sign(load.mean() - load).astype(bias.dtype)


def check_rate(name: str, rate: float | jax.Array) -> None:
    """Raises ValueError for what is no rate of `update_bias`; arrays may be traced, and pass."""
    if not isinstance(rate, jax.Array | np.ndarray) and not (is_number(rate) and 0 <= rate < math.inf):
        raise ValueError(f"{name}={rate!r} would not even the load; give 0 or a small positive number such as 0.001")
