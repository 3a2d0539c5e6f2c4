"""Triton's CPU interpreter without the work that it does again at every operation.

A kernel in the interpreter costs what its operations cost, whatever the size of the tiles, and most of that is not
NumPy's. Measured on the quantizers of rows and weights (24 tests, 18.4 s of CPU time):

| what the interpreter does | how often | without it |
|---|---|---|
| puts its own functions into triton.language, found by `inspect` | at each call of a device function | 18.4 → 10.9 s |
| computes integers in 64 bits beside, and throws the comparison away where debug is off | `+`, `-` and `*` | → 6.6 s |
| writes down the table of NumPy's dtypes | at each operation | → 6.2 s |
| makes a block type, with its name, and wraps the lengths of a tensor's axes one by one | for each result | → 4.3 s |

`quicken` keeps what these made and changes no result. Nothing else is different: loads, stores, arithmetic and masks
stay the interpreter's.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton.runtime import interpreter

KNOWN_RELEASES = ("3.6.", "3.7.")
"""Those whose interpreter was read for this; any other runs as it is."""


def quicken() -> None:
    """Make this process's interpreter fast. Once, before the first launch."""
    if not triton.__version__.startswith(KNOWN_RELEASES):
        return
    interpreter._get_np_dtype = _by_name(interpreter._get_np_dtype)
    builder = interpreter.interpreter_builder
    assert not builder.options.debug, "with debug the comparison is an assertion: it must stay"
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    forget_types = _keep_types()
    _patch_once_a_launch(forget_types)


def _by_name(of_type: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """`of_type`, its results kept by the name of the Triton type (hashing that is cheap, hashing the type is not)."""
    known: dict[str, Any] = {}

    def kept(dtype: Any) -> Any:
        if dtype.name not in known:
            known[dtype.name] = of_type(dtype)
        return known[dtype.name]

    return kept


def _patch_once_a_launch(at_the_end: Callable[[], None]) -> None:
    """Have a device function find triton.language as its kernel's launch has left it."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    in_force: set[Any] = set()

    @functools.cache
    def visible(fn: Callable[..., Any]) -> frozenset[Any]:
        return frozenset(lang for lang in (tl, tl.core) if any(value is lang for value in fn.__globals__.values()))

    def patch_once(fn: Callable[..., Any]) -> interpreter._LangPatchScope:
        if visible(fn) and visible(fn) <= in_force:
            return interpreter._LangPatchScope()
        scope = patch(fn)
        in_force.update(visible(fn))
        return scope

    def restore_and_forget(scope: interpreter._LangPatchScope) -> None:  # a launch's; a device function's is dropped
        in_force.clear()
        at_the_end()
        restore(scope)

    interpreter._patch_lang = patch_once
    interpreter._LangPatchScope.restore = restore_and_forget


def _keep_types() -> Callable[[], None]:
    """Make block types of equal elements and shape one object, and give a tensor what the last of its type had: all
    attributes but its handle. Returns what forgets them: the keys are addresses, of objects that are kept alive."""
    make_type, make_tensor = tl.block_type.__init__, tl.tensor.__init__
    blocks: dict[tuple[int, ...], tl.block_type] = {}
    attributes: dict[int, dict[str, Any]] = {}

    def new_type(cls: type[tl.block_type], element_ty: tl.dtype, shape: Any) -> tl.block_type:
        kept = blocks.get((id(element_ty), *map(operator.index, shape)))
        return object.__new__(cls) if kept is None else kept

    def init_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        if not self.__dict__:
            make_type(self, element_ty, shape)  # raises where a length is no power of two
            blocks[id(element_ty), *self.shape] = self

    def init_tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if id(type) in attributes:
            self.__dict__.update(attributes[id(type)], handle=handle)
        else:
            make_tensor(self, handle, type)
            attributes[id(type)] = {name: value for name, value in self.__dict__.items() if name != "handle"}

    def forget() -> None:
        blocks.clear()
        attributes.clear()

    tl.block_type.__new__, tl.block_type.__init__, tl.tensor.__init__ = new_type, init_type, init_tensor
    return forget
