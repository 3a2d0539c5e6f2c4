"""``quantize`` on Flax modules, NNX and Linen: subclasses whose methods are traced, their variables as arguments."""

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from flax.core import lift
from flax.linen.transforms import lift_transform

from xmoe.fqn import dotted
from xmoe.jax_frontend.convert import is_converting, name_arguments

_TAG = "xmoe.quantize"


def is_module(x: Any) -> bool:
    return isinstance(x, (nnx.Module, linen.Module))


def quantize_module(module: Any, quantizer: Any, methods: tuple[str, ...]) -> Any:
    """A module of a subclass, with the variables (NNX) or the attributes (Linen) of this one."""
    cls = type(module)
    make = _nnx_class if isinstance(module, nnx.Module) else _linen_class
    converted = make(vars(cls).get("_xmoe_unquantized", cls), quantizer, methods)
    converted._xmoe_quantizer.told.clear()  # another model of this class and config has its own report
    # Not nnx.clone: the variables and submodules stay those of the original. A Linen module has them in its scope.
    quantized = copy.copy(module) if isinstance(module, nnx.Module) else module.copy()
    object.__setattr__(quantized, "__class__", converted)
    return quantized


def _subclass(cls: type, methods: dict[str, Any], **options: Any) -> type:
    """A subclass that goes by the class's own name, in checkpoints and in the names that Linen gives submodules."""
    names = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(cls)(cls.__name__, (cls,), {**names, **methods, "_xmoe_unquantized": cls}, **options)


def _methods(cls: type, names: tuple[str, ...]) -> dict[str, Callable[..., Any]]:
    for name in names:
        if not callable(getattr(cls, name, None)):
            raise ValueError(f"methods: {cls.__name__} has no method {name!r}; name those that are to be converted")
    return {name: getattr(cls, name) for name in names}


# ----------------------------------------------------------------------------------------------------------------- NNX


@functools.lru_cache(maxsize=256)
def _nnx_class(cls: type, quantizer: Any, methods: tuple[str, ...]) -> Any:
    """One class a configuration: `nnx.jit` knows modules by their class."""

    def converted(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def quantized(self: nnx.Module, *args: Any, **kwargs: Any) -> Any:
            if is_converting():
                return method(self, *args, **kwargs)
            return call(quantizer, method, (self, *args), kwargs)

        return quantized

    namespace = {name: converted(method) for name, method in _methods(cls, methods).items()}
    is_pytree = getattr(cls, "_pytree__is_pytree", True)
    return _subclass(cls, {**namespace, "_xmoe_quantizer": quantizer}, **({} if is_pytree else {"pytree": False}))


def _is_node(x: Any) -> bool:
    return isinstance(x, (nnx.Pytree, nnx.Variable))


def has_nodes(tree: Any) -> bool:
    """Whether NNX modules or variables are among the leaves."""
    return any(map(_is_node, jax.tree_util.tree_leaves(tree, is_leaf=_is_node)))


def call(quantizer: Any, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``fn(*args, **kwargs)`` with its calls converted, and with what it does to NNX modules among the arguments."""
    with nnx.update_context(_TAG):
        with nnx.split_context(_TAG) as context:
            graph, state = context.split((args, kwargs))
        flat, tree = jax.tree_util.tree_flatten_with_path(state)
        leaves = [leaf for _, leaf in flat]
        names = name_arguments(fn, [_without_value(path) for path, _ in flat])
        after: dict[str, Any] = {}

        def pure(given: list[Any]) -> tuple[Any, Any]:
            with nnx.merge_context(_TAG, inner=True) as context:
                inner = context.merge(graph, jax.tree_util.tree_unflatten(tree, given))
            before = nnx.graphdef(inner)
            out = fn(*inner[0], **inner[1])
            after["nodes"] = has_nodes(out)
            after["changed"] = nnx.graphdef(inner) != before
            with nnx.split_context(_TAG) as context:
                after["graph"], state = context.split((*inner, out if after["nodes"] else None))
            return state, None if after["nodes"] else out

        state, out = quantizer.run(pure, leaves, names)
        # A module that an outer trace only reads (it is closed over) must not be written to, not even what it has.
        written = any(new is not old for new, old in zip(jax.tree_util.tree_leaves(state), leaves, strict=False))
        if written or after["changed"] or after["nodes"]:
            with nnx.merge_context(_TAG, inner=False) as context:
                _, _, returned = context.merge(after["graph"], state)
            out = returned if after["nodes"] else out
        return out


def _without_value(path: tuple[Any, ...]) -> tuple[Any, ...]:
    """The path of a variable, not of the array in it."""
    return path[:-1] if getattr(path[-1], "name", None) == "value" else path


# --------------------------------------------------------------------------------------------------------------- Linen


@functools.lru_cache(maxsize=256)
def _linen_class(cls: type, quantizer: Any, methods: tuple[str, ...]) -> Any:
    """One class a configuration: `jax.jit` compares modules that are static arguments."""

    def converted(method: Callable[..., Any]) -> Callable[..., Any]:
        lifted = lift_transform(functools.partial(_lifted, quantizer, method), method)

        @functools.wraps(method)
        def quantized(self: linen.Module, *args: Any, **kwargs: Any) -> Any:
            run = method if self.scope is None or is_converting() or self.is_initializing() else lifted
            return run(self, *args, **kwargs)

        return quantized

    namespace = {name: converted(method) for name, method in _methods(cls, methods).items()}
    return _subclass(cls, {**namespace, "_xmoe_quantizer": quantizer})


def _lifted(quantizer: Any, method: Callable[..., Any], fn: Callable[..., Any]) -> Callable[..., Any]:
    """``fn(scopes, *args)``, a module's ``method``, with its calls converted; variables are inputs of the trace."""

    def inner(scope_fn: Any, repack_fn: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        flat, tree = jax.tree_util.tree_flatten_with_path((variables, rngs, args, kwargs))
        names = [_name_in_scope(method, path) for path, _ in flat]

        def pure(given: list[Any]) -> tuple[Any, Any]:
            variables, rngs, args, kwargs = jax.tree_util.tree_unflatten(tree, given)
            scopes = scope_fn(variables, rngs)
            out = fn(scopes, *args, **kwargs)
            return out, repack_fn(scopes)

        return quantizer.run(pure, [leaf for _, leaf in flat], names)

    return lift.pack(inner, (True,), (True,), (True,), name="quantize", enable_kwargs=True)


def _name_in_scope(method: Callable[..., Any], path: tuple[Any, ...]) -> str:
    """Of a leaf of ``(variables, rngs, args, kwargs)``: its path in its collection, or its name as an argument."""
    kind = path[0]
    if kind.idx == 0:  # group, scope, collection, and then the path
        return dotted(_without_value(path)[4:])
    return name_arguments(functools.partial(method, None), [path])[0] if kind.idx > 1 else ""
