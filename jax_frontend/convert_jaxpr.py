"""The `jax.lax.ragged_dot` calls of a traced function, run by xmoe: an interpreter of jaxprs.

A function is traced as it is (`jax.make_jaxpr`), and what was traced is run again with other `ragged_dot_general`
primitives. Nothing of JAX is patched, so `from jax.lax import ragged_dot`, threads and the caches of `jax.jit` are as
they were; and the weight of a call is known by the argument that it was computed from, through casts, transpositions,
slices and stacks, into and out of `jit`, `scan`, `while`, `cond`, `remat` and `shard_map`.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.extend import core

from xmoe.config import GroupedMMConfig
from xmoe.jax_frontend.plan import DTYPES, platform
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.operands import FEATURE_MULTIPLE

Names = frozenset[str]
"""The parameters that a value was computed from, as the weight that it is; none of an activation."""

NO_NAMES: Names = frozenset()

Results = tuple[list[Any], list[Names]]
"""Of a program or an equation: its outputs, and what they were computed from."""

RAGGED_DOT = "ragged_dot_general"

WEIGHT_GRADIENT = "it contracts its ragged dimension, as a weight's gradient does"

# A value that these make of a parameter is still that parameter.
_KEEPS_NAMES = frozenset({
    "abs", "add", "all_gather", "all_gather_invariant", "all_to_all", "atan2", "bitcast_convert_type",
    "broadcast_in_dim", "cbrt", "ceil", "clamp", "concatenate", "convert_element_type", "copy", "cos", "device_put",
    "div", "dynamic_slice", "dynamic_update_slice", "erf", "exp", "exp2", "expm1", "floor", "gather", "integer_pow",
    "log", "log1p", "logistic", "max", "min", "mul", "name", "neg", "optimization_barrier", "pad", "pow", "ppermute",
    "psum", "psum_invariant", "pvary", "reduce_precision", "reduce_scatter", "rem", "reshape", "reshard", "rev",
    "round", "rsqrt", "scatter", "scatter-add", "scatter-max", "scatter-min", "scatter-mul", "scatter-sub",
    "select_n", "sharding_constraint", "sign", "sin", "slice", "split", "sqrt", "square", "squeeze", "stack",
    "stop_gradient", "sub", "tanh", "tile", "transpose", "unstack",
})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Form:
    """What is static about one call: out [batch..., M, N] = lhs [batch..., M, K] @ rhs [G, batch..., K, N]."""

    names: Names
    shape: tuple[int, ...]
    """Of rhs as the call has it."""
    dtype: str
    misfit: str = ""
    """Why it cannot be converted; "" where it can."""


@dataclass(slots=True)
class Conversion:
    """One conversion of one traced function."""

    choose: Callable[[Form], GroupedMMConfig | None]
    """The config of a call; None leaves it alone. Asked once for each call of the program."""
    jitted: "Jitted"
    """What inner calls of `jax.jit` were converted to, so that a program that is run again is not compiled again."""
    calls: "Calls" = field(default_factory=dict)
    """What was found."""
    place: "Place" = ()
    """Where this one is."""
    _equations: list[Any] = field(default_factory=list)  # alive, so that identities stay theirs

    def run(self, program: Any, values: Sequence[Any], names: Sequence[Names]) -> Results:
        """The outputs of a jaxpr (closed, or open without constants) and what they were computed from."""
        jaxpr, consts = _opened(program)
        env: dict[Any, tuple[Any, Names]] = {}
        env.update(zip(jaxpr.constvars, ((c, NO_NAMES) for c in consts), strict=True))
        env.update(zip(jaxpr.invars, zip(values, names, strict=True), strict=True))

        def read(atoms: Iterable[Any]) -> tuple[list[Any], list[Names]]:
            pairs = [(a.val, NO_NAMES) if isinstance(a, core.Literal) else env[a] for a in atoms]
            return [value for value, _ in pairs], [name for _, name in pairs]

        for part in _parts(jaxpr):
            eqn = part.eqns[0]
            if _concerns(eqn):
                scope = str(eqn.source_info.name_stack)
                with eqn.ctx.manager, jax.named_scope(scope) if scope else contextlib.nullcontext():
                    results = _RULES[eqn.primitive.name](self.at(eqn), eqn, *read(eqn.invars))
                env.update(zip(eqn.outvars, zip(*results, strict=True), strict=True))
            else:
                given, names_given = read(part.invars)
                results = core.jaxpr_as_fun(core.ClosedJaxpr(part, ()))(*given), _flow(part, names_given)
                env.update(zip(part.outvars, zip(*results, strict=True), strict=True))
        return read(jaxpr.outvars)

    def at(self, eqn: Any) -> "Conversion":
        """The same conversion, at an equation of its program."""
        self._equations.append(eqn)
        return replace(self, place=(*self.place, id(eqn)))

    def config_of(self, eqn: Any, names: Names) -> GroupedMMConfig | None:
        """Of the call at this place: `choose`, asked once."""
        if self.place not in self.calls:
            form = _form(eqn, names)
            self.calls[self.place] = form, self.choose(form)
        return self.calls[self.place][1]

    def traceable(self, program: Any, names: Sequence[Names]) -> Callable[..., list[Any]]:
        """The program as a function of its arguments, for JAX's own transformations."""
        return lambda *values: self.run(program, values, names)[0]


Place = tuple[int, ...]
"""The identities of the equations that lead to a call, outermost first: layers may share the program that it is in."""

Calls = dict[Place, tuple[Form, GroupedMMConfig | None]]
Jitted = WeakKeyDictionary[Any, dict[tuple[Any, ...], tuple[Any, Calls]]]
"""By program, and then by platform and names: it converted, its calls."""


# ------------------------------------------------------------------------------------------------- programs and parts


def _opened(program: Any) -> tuple[Any, Sequence[Any]]:
    return (program.jaxpr, program.consts) if hasattr(program, "consts") else (program, ())


def _programs(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs among an equation's parameters, alone or in tuples."""
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(item, "eqns"):
                yield item


def _concerns(eqn: Any) -> bool:
    """Whether an equation is a call, or one that the interpreter follows to a call inside it."""
    name = eqn.primitive.name
    return name == RAGGED_DOT or (name in _RULES and any(map(_holds_calls, _programs(eqn.params))))


def _holds_calls(program: Any) -> bool:
    return any(map(_concerns, _opened(program)[0].eqns))


def unreachable(program: Any) -> Iterator[str]:
    """The primitives, such as `custom_vjp_call`, that hold calls which are left alone."""
    for eqn in _opened(program)[0].eqns:
        name = eqn.primitive.name
        for inner in _programs(eqn.params):
            if name in _RULES:
                yield from unreachable(inner)
            elif any(e.primitive.name == RAGGED_DOT for e in _all_equations(inner)):
                yield name


def _all_equations(program: Any) -> Iterator[Any]:
    for eqn in _opened(program)[0].eqns:
        yield eqn
        for inner in _programs(eqn.params):
            yield from _all_equations(inner)


def _parts(jaxpr: Any) -> list[Any]:
    """A jaxpr cut into those of one equation that concerns the interpreter and those between them, which JAX runs."""
    runs: list[list[Any]] = []
    previous = True
    for eqn in jaxpr.eqns:
        concerns = _concerns(eqn)
        if concerns or previous:
            runs.append([])
        runs[-1].append(eqn)
        previous = concerns
    parts: list[Any] = []
    wanted = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
    for run in reversed(runs):
        made = {v: None for eqn in run for v in eqn.outvars}
        needed = {v: None for eqn in run for v in eqn.invars if isinstance(v, core.Var) and v not in made}
        effects = frozenset().union(*(eqn.effects for eqn in run))
        parts.append(
            jaxpr.replace(
                constvars=[],
                invars=list(needed),
                outvars=[v for v in made if v in wanted],
                eqns=run,
                effects=effects,
                debug_info=jaxpr.debug_info.with_unknown_names(),
            )
        )
        wanted.update(needed)
    return parts[::-1]


def _flow(program: Any, names: Sequence[Names]) -> list[Names]:
    """What the outputs of a program that holds no calls were computed from."""
    jaxpr, _ = _opened(program)
    env: dict[Any, Names] = {v: name for v, name in zip(jaxpr.invars, names, strict=True) if name}
    for eqn in jaxpr.eqns:
        given = [NO_NAMES if isinstance(a, core.Literal) else env.get(a, NO_NAMES) for a in eqn.invars]
        if any(given):
            env.update(zip(eqn.outvars, _flow_through(eqn, given), strict=True))
    return [NO_NAMES if isinstance(a, core.Literal) else env.get(a, NO_NAMES) for a in jaxpr.outvars]


def _flow_through(eqn: Any, given: list[Names]) -> list[Names]:
    if eqn.primitive.name in _KEEPS_NAMES:
        if len(given) == len(eqn.outvars):  # optimization_barrier, psum and their like: each by itself
            return given
        return [NO_NAMES.union(*given)] * len(eqn.outvars)
    if eqn.primitive.name == "scan":
        inside, _ = _names_in_scan(eqn, given)
        return _flow(eqn.params["jaxpr"], inside)
    if eqn.primitive.name == "while":
        return _names_in_while(eqn, given)
    out = [NO_NAMES] * len(eqn.outvars)
    for inner in _programs(eqn.params):
        jaxpr, _ = _opened(inner)
        behind = given[len(given) - len(jaxpr.invars) :]  # of cond, what follows the index
        if len(behind) == len(jaxpr.invars) and len(jaxpr.outvars) == len(out):
            out = [a | b for a, b in zip(out, _flow(inner, behind), strict=True)]
    return out


def _names_in_scan(eqn: Any, given: list[Names]) -> tuple[list[Names], tuple[int, int]]:
    """What the inputs of a scan's body were computed from, at any step; where the carry begins and ends among them."""
    inner, _ = _opened(eqn.params["jaxpr"])
    # What is scanned has an axis more outside. (How many there are of each is said differently by JAX 0.10 and 0.11.)
    carried = sum(_ndim(out) == _ndim(v) for out, v in zip(eqn.outvars, inner.outvars, strict=True))
    scanned = sum(_ndim(x) != _ndim(v) for x, v in zip(eqn.invars, inner.invars, strict=True))
    first, last = len(given) - scanned - carried, len(given) - scanned
    carry = _names_in_loop(lambda carry: _flow(inner, [*given[:first], *carry, *given[last:]]), given[first:last])
    return [*given[:first], *carry, *given[last:]], (first, last)


def _names_in_while(eqn: Any, given: list[Names]) -> list[Names]:
    """What the carry of a while loop was computed from, at any step."""
    n = eqn.params["cond_nconsts"]
    m = n + eqn.params["body_nconsts"]
    return _names_in_loop(lambda carry: _flow(eqn.params["body_jaxpr"], [*given[n:m], *carry]), given[m:])


def _names_in_loop(body: Callable[[list[Names]], list[Names]], carry: list[Names]) -> list[Names]:
    """Of the carry, which ``body`` gives first, until nothing is added."""
    while (joined := [a | b for a, b in zip(carry, body(carry), strict=False)]) != carry:
        carry = joined
    return carry


# ------------------------------------------------------------------------------------------------------------ the call


def _form(eqn: Any, names: Names) -> Form:
    lhs, rhs, group_sizes = (v.aval for v in eqn.invars)
    misfit = _misfit(eqn, lhs, rhs, group_sizes)
    return Form(names, tuple(rhs.shape), str(rhs.dtype), misfit)


def _misfit(eqn: Any, lhs: Any, rhs: Any, group_sizes: Any) -> str:
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    (lhs_contract, rhs_contract), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,) = numbers.lhs_ragged_dimensions
    if ragged in lhs_contract:
        return WEIGHT_GRADIENT
    if ragged in lhs_batch:
        return "its ragged dimension is a batch dimension"
    inner = set(range(ragged + 1, lhs.ndim)) - {*lhs_contract, *lhs_batch}
    free = rhs.ndim - len(rhs_contract) - len(rhs_batch) - 1
    if len(lhs_contract) != 1 or free != 1 or inner:
        return "it is no [M, K] @ [G, K, N], with or without batch dimensions"
    if params.get("group_offset") is not None:
        return "it has a group_offset"
    if params.get("out_sharding") is not None:
        return "it has an out_sharding; call it inside jax.shard_map"
    for name, aval in (("lhs", lhs), ("rhs", rhs), ("the output", eqn.outvars[0].aval)):
        if str(aval.dtype) not in DTYPES:
            return f"{name} is {aval.dtype}, neither {' nor '.join(DTYPES)}"
    return ""


def _at_call(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    config = conversion.config_of(eqn, names[1])
    out = eqn.primitive.bind(*values, **eqn.params) if config is None else _converted(eqn, config, *values)
    return [out], [NO_NAMES]


def _converted(eqn: Any, config: GroupedMMConfig, lhs: Any, rhs: Any, group_sizes: Any) -> jax.Array:
    """A call in the place of the equation's, of the output's shape and dtype."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    ((lhs_k,), (rhs_k,)), (lhs_batch, rhs_batch) = numbers.dot_dimension_numbers
    (ragged,), (group,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
    (rhs_n,) = set(range(rhs.ndim)) - {group, rhs_k, *rhs_batch}
    outer = [d for d in range(lhs.ndim) if d not in (*lhs_batch, ragged, lhs_k)]  # of a vmap that rhs had no part in
    lhs = lhs.transpose(*lhs_batch, *outer, ragged, lhs_k)
    straight = rhs_k < rhs_n  # [G, K, N]; otherwise [G, N, K], as the caller has it, which the op takes without a copy
    rhs = rhs.transpose(*rhs_batch, group, *((rhs_k, rhs_n) if straight else (rhs_n, rhs_k)))
    call: Callable[..., jax.Array] = functools.partial(
        _padded, config=config, transpose_rhs=not straight, dtype=eqn.outvars[0].aval.dtype
    )
    sizes = None if group_sizes.ndim == 1 else 0
    for shared in (*(None for _ in outer), *(0 for _ in lhs_batch)):
        call = jax.vmap(call, in_axes=(0, shared, sizes))
    return call(lhs, rhs, group_sizes)


def _padded(
    lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, *, config: GroupedMMConfig, transpose_rhs: bool, dtype: Any
) -> jax.Array:
    """`ragged_dot` at any K and N: zeros make them multiples of 16, and change no scale and no sum."""
    n = rhs.shape[1 if transpose_rhs else 2]
    missing = [-size % FEATURE_MULTIPLE for size in rhs.shape[1:]]
    if any(missing):
        rhs = jnp.pad(rhs, ((0, 0), *((0, m) for m in missing)))
        lhs = jnp.pad(lhs, ((0, 0), (0, missing[1 if transpose_rhs else 0])))
    out = ragged_dot(lhs, rhs, group_sizes, preferred_element_type=dtype, config=config, transpose_rhs=transpose_rhs)
    return out[:, :n] if any(missing) else out


# ------------------------------------------------------------------------------- primitives that hold other programs


def _through_jit(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    program = eqn.params["jaxpr"]
    known, key = conversion.jitted.setdefault(program, {}), (platform(), *names)
    if key not in known:
        inside = Conversion(conversion.choose, conversion.jitted)
        converted = jax.make_jaxpr(inside.traceable(program, names))(*values)
        known[key] = converted, inside.calls
    converted, calls = known[key]
    conversion.calls.update(((*conversion.place, *place), call) for place, call in calls.items())
    results = eqn.primitive.bind(*values, **{**eqn.params, "jaxpr": converted})
    return results, _flow(program, names)


def _through_remat(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    program = eqn.params["jaxpr"]
    again = jax.checkpoint(
        conversion.traceable(program, names), prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"]
    )
    return again(*values), _flow(program, names)


def _through_shard_map(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    params, program = eqn.params, eqn.params["jaxpr"]
    mapped = jax.shard_map(
        conversion.traceable(program, names),
        mesh=params["mesh"],
        in_specs=tuple(params["in_specs"]),
        out_specs=list(params["out_specs"]),
        axis_names=set(params["newly_manual_axes"]),
        check_vma=params["check_vma"],
    )
    return jax.jit(mapped)(*values), _flow(program, names)  # eagerly, shard_map has no custom_vjp like the op's


def _through_scan(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    params, program = eqn.params, eqn.params["jaxpr"]
    inside, (first, last) = _names_in_scan(eqn, names)
    consts, init, xs = values[:first], values[first:last], values[last:]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        out, _ = conversion.run(program, [*consts, *carry, *x], inside)
        return out[: last - first], out[last - first :]

    end, ys = jax.lax.scan(body, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"])
    return [*end, *ys], _flow(program, inside)


def _ndim(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _through_while(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    params = eqn.params
    n = params["cond_nconsts"]
    m = n + params["body_nconsts"]
    carried = _names_in_while(eqn, names)

    def part(program: Any, first: int, last: int) -> Callable[[list[Any]], list[Any]]:
        known = [*names[first:last], *carried]
        return lambda carry: conversion.run(program, [*values[first:last], *carry], known)[0]

    cond, body = part(params["cond_jaxpr"], 0, n), part(params["body_jaxpr"], n, m)
    return list(jax.lax.while_loop(lambda carry: cond(carry)[0], body, values[m:])), carried


def _through_cond(conversion: Conversion, eqn: Any, values: list[Any], names: list[Names]) -> Results:
    index, *operands = values
    branches = [conversion.traceable(branch, names[1:]) for branch in eqn.params["branches"]]
    platforms = eqn.params.get("branches_platforms")
    if platforms is None:
        out = jax.lax.switch(index, branches, *operands)
    else:  # of jax.lax.platform_dependent: one for several, and None for all others
        by = {p: branch for several, branch in zip(platforms, branches, strict=True) for p in several or ("default",)}
        out = jax.lax.platform_dependent(*operands, **by)
    flows = [_flow(branch, names[1:]) for branch in eqn.params["branches"]]
    return list(out), [NO_NAMES.union(*each) for each in zip(*flows, strict=True)]


_RULES: dict[str, Callable[[Conversion, Any, list[Any], list[Names]], Results]] = {
    RAGGED_DOT: _at_call,
    "jit": _through_jit,
    "remat2": _through_remat,
    "shard_map": _through_shard_map,
    "scan": _through_scan,
    "while": _through_while,
    "cond": _through_cond,
}
