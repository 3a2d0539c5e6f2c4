"""``quantize``: makes the `jax.lax.ragged_dot` calls of a model that knows nothing of xmoe run in low precision."""

import functools
import inspect
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np

from xmoe.config import RECIPES, GroupedMMConfig, LinearConfig, config_from_recipe
from xmoe.fqn import DEFAULT, UNMATCHED, FqnToConfig, Unmatched, dotted
from xmoe.jax_frontend.convert_jaxpr import NO_NAMES, WEIGHT_GRADIENT, Conversion, Form, Jitted, Names, unreachable

Model = TypeVar("Model")
Choice = GroupedMMConfig | Literal[Unmatched.UNMATCHED] | None

logger = logging.getLogger(__name__)

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

# Part of the key of JAX's caches, so that what is traced for a conversion serves no other call.
_converting = jax.make_user_context(default_value=False)


def quantize(
    model_or_fn: Model,
    config: GroupedMMConfig | FqnToConfig | StrEnum | str,
    *,
    methods: Collection[str] = ("__call__",),
    verbose: bool = True,
) -> Model:
    """``model_or_fn`` with the `jax.lax.ragged_dot` calls that match run by `xmoe.jax_frontend.ragged_dot`.

    Calls of `jax.lax.ragged_dot_general` in the form of `ragged_dot`, with batch dimensions or without, are among them.
    K and N that are no multiples of 16 are padded with zeros, which costs a copy of each operand; the output has the
    dtype that the call gives it (``preferred_element_type``), whatever ``config.out_dtype`` says; the call's
    ``precision`` has no say. Gradients are those of the recipe: differentiate what this returns, and do not quantize
    what has been differentiated (which raises).

    - An NNX module gives a module of a subclass with the class's name. It shares its variables and submodules with the
      original: train one, evaluate the other. State, ``nnx.split`` and ``merge``, ``nnx.jit``, ``nnx.grad`` and
      optimizers see no difference.
    - A Linen module gives a module of a subclass with the class's name, with the same variables, for ``init``,
      ``apply``, ``bind`` and other modules. ``init`` itself quantizes nothing.
    - A function gives a function. NNX modules may be among its arguments.

    The function (module, method) is traced at each call, as `jax.jit` traces it once, and then run: put ``jax.jit`` or
    ``nnx.jit`` around it. Where conversions are nested, the outermost decides.

    **Names.** A call is named by the parameter that its weight was computed from (by casts, transpositions, slices,
    stacks and elementwise arithmetic, across ``jit``, ``scan``, ``cond``, ``while``, ``remat`` and ``shard_map``; not
    by sums, products of matrices or `jax.new_ref`): its path in the module, without Linen's collection
    ("layers.0.moe.wi_0"); for a function the path inside the argument, or, for an argument that is an array, the
    argument's name. The parameters of layers that are scanned have one name, and one config. A weight that no
    floating-point argument with two or more dimensions went into has the name "".

    What stays as it is: calls inside a function with a ``custom_vjp`` or ``custom_jvp`` of its own (with a warning in
    the log, or an error if there are no others), Pallas kernels (megablox, tokamax: have the model call
    `jax.lax.ragged_dot`), dense GEMMs, and methods that are not in ``methods``, those of submodules too.

    Args:
        model_or_fn: a Flax NNX or Linen module, or a function. Quantizing again replaces the config.
        config: one config or recipe (enum member or name) for every call, or an `FqnToConfig`, whose None leaves a call
            alone. A ``LinearConfig`` in it says nothing about these calls.
        methods: of a module, those that are converted.
        verbose: log the table of what was converted (level INFO, logger ``xmoe.jax_frontend.convert``), once.

    Raises:
        ValueError: `config` or `model_or_fn` is of the wrong type. When it is called: nothing matches (the message
            lists what could), one weight gets two configs, the function differentiates inside, or a call that a key
            names cannot be converted (fp16 operands, a ``group_offset``, ...; one that only "_default", or the one
            config, reaches is left alone then, with a warning in the log).
    """
    quantizer = _Quantizer(_mapping(config), verbose)
    if "flax" in sys.modules:
        from xmoe.jax_frontend import convert_flax

        if convert_flax.is_module(model_or_fn):
            names = (methods,) if isinstance(methods, str) else tuple(methods)
            return convert_flax.quantize_module(model_or_fn, quantizer, names)
    if not callable(model_or_fn) or inspect.isclass(model_or_fn):
        raise ValueError(f"model_or_fn is {model_or_fn!r}; give a Flax module (an instance of it) or a function")
    if any(map(_is_array, jax.tree.leaves(model_or_fn))):
        raise ValueError(
            f"model_or_fn is a {type(model_or_fn).__name__}, a pytree with weights in it; quantize a function that "
            "takes it, quantize(lambda model, *args: model(*args), config)"
        )
    made = getattr(model_or_fn, "_xmoe_quantized", None)  # which functools.wraps copies to other functions
    fn: Any = made.fn if made is not None and made.quantized is model_or_fn else model_or_fn

    @functools.wraps(fn)
    def quantized(*args: Any, **kwargs: Any) -> Any:
        if is_converting():
            return fn(*args, **kwargs)
        if "flax" in sys.modules:
            from xmoe.jax_frontend import convert_flax

            if convert_flax.has_nodes((args, kwargs)):
                return convert_flax.call(quantizer, fn, args, kwargs)
        leaves, tree = jax.tree_util.tree_flatten_with_path((args, kwargs))
        names = name_arguments(fn, [path for path, _ in leaves])
        return quantizer.run(lambda given: _call(fn, tree, given), [leaf for _, leaf in leaves], names)

    quantized._xmoe_quantized = _Quantized(quantized, fn)  # type: ignore[attr-defined]
    return quantized  # type: ignore[return-value]


class _Quantized(NamedTuple):
    """A function that `quantize` made, and what it made it of."""

    quantized: Callable[..., Any]
    fn: Callable[..., Any]


def _call(fn: Callable[..., Any], tree: Any, leaves: list[Any]) -> Any:
    args, kwargs = jax.tree_util.tree_unflatten(tree, leaves)
    return fn(*args, **kwargs)


def _mapping(config: Any) -> FqnToConfig:
    if isinstance(config, FqnToConfig):
        return config
    one = config
    if isinstance(config, str) and config in RECIPES:
        one = config_from_recipe(config)
    if not isinstance(one, GroupedMMConfig):
        raise ValueError(f"config is {config!r}; give a GroupedMMConfig, an FqnToConfig or one of {', '.join(RECIPES)}")
    return FqnToConfig({DEFAULT: one})


def name_arguments(fn: Callable[..., Any], paths: Sequence[Sequence[Any]]) -> list[str]:
    """The names of leaves of ``(args, kwargs)``: the path inside the argument, or else the argument's name."""
    try:
        parameters = [p.name for p in inspect.signature(fn).parameters.values() if p.kind in _POSITIONAL]
    except (TypeError, ValueError):  # of some callables in C
        parameters = []
    names = []
    for path in paths:
        _, argument, *inside = dotted(path).split(".")
        if not inside and argument.isdigit() and int(argument) < len(parameters):
            argument = parameters[int(argument)]
        names.append(".".join(inside) or argument)
    return names


def is_converting() -> bool:
    """Whether this thread is tracing a function for a conversion, which will convert what is inside it."""
    return _converting.value


@dataclass(frozen=True)
class _Quantizer:
    """One configuration of the calls, and what it has logged."""

    mapping: FqnToConfig
    verbose: bool
    told: set[str] = field(default_factory=set, compare=False)
    jitted: Jitted = field(default_factory=WeakKeyDictionary, compare=False, repr=False)

    def run(self, fn: Callable[[list[Any]], Any], leaves: Sequence[Any], names: Sequence[str]) -> Any:
        """``fn(leaves)`` with its calls converted; it takes any Python values and returns a pytree of such.

        ``names`` are those of the leaves; leaves that are no arrays are constants to the trace.
        """
        dynamic = [i for i, leaf in enumerate(leaves) if _is_array(leaf)]
        returned: list[Any] = []

        def traced(*arrays: Any) -> list[Any]:
            given = list(leaves)
            for i, array in zip(dynamic, arrays, strict=True):
                given[i] = array
            out, tree = jax.tree_util.tree_flatten(fn(given))
            returned[:] = out, tree
            return [leaf for leaf in out if isinstance(leaf, jax.Array)]

        arrays = [leaves[i] for i in dynamic]
        with _converting(True):
            program = jax.make_jaxpr(traced)(*arrays)
        conversion = Conversion(self._choose, self.jitted)
        origins = [frozenset({names[i]}) if _may_be_weight(leaves[i]) else NO_NAMES for i in dynamic]
        results = iter(conversion.run(program, arrays, origins)[0])
        self._report(conversion, program)
        out, tree = returned
        return jax.tree_util.tree_unflatten(
            tree, [next(results) if isinstance(leaf, jax.Array) else leaf for leaf in out]
        )

    def _choose(self, form: Form) -> GroupedMMConfig | None:
        if form.misfit == WEIGHT_GRADIENT:
            raise ValueError(
                "model_or_fn differentiates a ragged_dot inside itself: quantize the function (or the model) that is "
                "differentiated, jax.grad(quantize(loss, config)), so that the backward is the recipe's too"
            )
        config = self._resolve(form.names)
        if config is UNMATCHED or config is None or not form.misfit:
            return None if config is UNMATCHED else config
        if any(self.mapping.key_for(name) not in (DEFAULT, None) for name in _named(form.names)):
            raise ValueError(f"{_title(form)}: {form.misfit}; leave it out of config, with None")
        return None

    def _resolve(self, names: Names) -> Choice:
        """The one config of a call whose weight was computed from these."""
        found: dict[str, Any] = {name: self.mapping.resolve(name) for name in _named(names)}
        configs = {n: c for n, c in found.items() if c is not UNMATCHED and not isinstance(c, LinearConfig)}
        if len(set(configs.values())) > 1:
            each = ", ".join(f"{n}: {'None' if c is None else c.to_key()}" for n, c in configs.items())
            raise ValueError(f"config gives one weight several configs ({each}); give all its names the same")
        return next(iter(configs.values()), UNMATCHED)

    # ------------------------------------------------------------------------------------------------------ messages

    def _report(self, conversion: Conversion, program: Any) -> None:
        """Logs what was done, once. Raises ValueError where nothing was."""
        calls = list(conversion.calls.values())
        converted = [(form, config) for form, config in calls if config is not None]
        unfit = [form for form, config in calls if config is None and form.misfit and self._wanted(form)]
        hidden = sorted(set(unreachable(program)))
        if not converted and not self._leaves_alone(calls):
            raise ValueError("quantize: " + self._nothing(calls, unfit, hidden))
        for form in unfit:
            self._tell(logging.WARNING, f"quantize: left alone: {_title(form)}: {form.misfit}")
        for primitive in hidden:
            self._tell(
                logging.WARNING,
                f"quantize: left alone: calls inside {primitive}, whose derivative is not made of its calls",
            )
        about_experts = {k for k, c in self.mapping.fqn_to_config.items() if not isinstance(c, LinearConfig)}
        unused = self.mapping.unused(name for form, _ in calls for name in _named(form.names))
        if keys := [repr(key) for key in unused if key in about_experts]:
            self._tell(logging.WARNING, f"quantize: no weight of a ragged_dot matches {', '.join(keys)}")
        if self.verbose and converted:
            count = f"{len(converted)} of {len(calls)} ragged_dot calls"
            self._tell(logging.INFO, f"quantize: {count}\n{_table(converted)}")

    def _tell(self, level: int, message: str) -> None:
        if message not in self.told:
            self.told.add(message)
            logger.log(level, "%s", message)

    def _wanted(self, form: Form) -> bool:
        return self._resolve(form.names) not in (UNMATCHED, None)

    def _leaves_alone(self, calls: Sequence[tuple[Form, Any]]) -> bool:
        """Whether the config says of something that it stays as it is, and so nothing need be converted."""
        every = all(config is None for config in self.mapping.fqn_to_config.values())
        return every or any(self._resolve(form.names) is None for form, _ in calls)

    def _nothing(self, calls: Sequence[tuple[Form, Any]], unfit: Sequence[Form], hidden: Sequence[str]) -> str:
        if unfit:
            return "; ".join(f"{_title(form)}: {form.misfit}" for form in unfit)
        if calls:
            names = ", ".join(dict.fromkeys(_title(form) for form, _ in calls))
            keys = ", ".join(map(repr, self.mapping.fqn_to_config))
            return f"config (keys: {keys}) matches none of the weights; change it to match some of: {names}"
        if hidden:
            return (
                f"all calls of jax.lax.ragged_dot are inside {', '.join(hidden)}, whose derivative is not made of its "
                "calls, so none can be converted; call xmoe.jax_frontend.ragged_dot there, or take the derivative away"
            )
        return (
            "nothing here calls jax.lax.ragged_dot; a model with several implementations of its experts must be set "
            "to that one (MaxText: sparse_matmul=True, megablox=False)"
        )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array) or (isinstance(x, np.ndarray) and _may_be_weight(x))


def _may_be_weight(x: Any) -> bool:
    return x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating)


def _named(names: Names) -> list[str]:
    return sorted(names) or [""]


def _title(form: Form) -> str:
    return " = ".join(sorted(form.names)) or "a weight that is no parameter"


def _table(converted: Sequence[tuple[Form, GroupedMMConfig]]) -> str:
    rows = [("weight", "shape", "dtype", "config")]
    rows += [(_title(form), str(list(form.shape)), form.dtype, config.to_key()) for form, config in converted]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)
