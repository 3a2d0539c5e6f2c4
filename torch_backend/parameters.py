"""Converted parameters: wrapped in place, kept wrapped by the module that holds them, and given back in place."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xmoe.torch_backend.wrapper import WrappedWeight


def convert(module: nn.Module, name: str, cls: type[WrappedWeight]) -> None:
    """Makes the parameter `name` of `module` a `cls`, and keeps whatever is put in its place one.

    The ``nn.Parameter`` stays the object that it is: optimizers, hooks, ties, gradients and attributes know it by that.

    Raises ValueError for a parameter of a tensor subclass that is no DTensor.
    """
    parameters = module._parameters
    wrap_(parameters[name], cls, name)
    if not isinstance(parameters, ConvertedParameters):
        parameters = module.__dict__["_parameters"] = ConvertedParameters(parameters, {})
        module.register_state_dict_post_hook(_plain_state)
    parameters.classes[name] = cls


def unquantize_(model: nn.Module) -> None:
    """Undoes ``quantize_``: every converted parameter of `model` is a plain one again.

    It is the same ``nn.Parameter`` on the same storage, with its gradient and its owners; nothing of the conversion is
    left on the modules. A model without converted parameters stays as it is.
    """
    for module in model.modules():
        if not isinstance(module._parameters, ConvertedParameters):
            continue
        for name in module._parameters.classes:
            unwrap_(dict.get(module._parameters, name))
        module.__dict__["_parameters"] = dict(module._parameters)
        for key, hook in list(module._state_dict_hooks.items()):
            if hook is _plain_state:
                del module._state_dict_hooks[key]


class ConvertedParameters(dict[str, Any]):
    """``module._parameters`` of a module with converted weights: what is stored under their names gets wrapped.

    All that replaces a parameter stores it here: ``load_state_dict(assign=True)``, ``Module.to``, FSDP2, whose gathered
    parameters are plain ones, ``distribute_module`` and ``torch.func.functional_call``. What is read is looked at, too:
    moving a DTensor changes what it holds, not what is stored.
    """

    def __init__(self, parameters: Mapping[str, Any], classes: dict[str, type[WrappedWeight]]) -> None:
        super().__init__(parameters)
        self.classes = classes
        self._lent: dict[str, Tensor] = {}
        """Wrapped by `__setitem__` for as long as they are stored: they are not parameters."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name in self.classes:
            if (lent := self._lent.pop(name, None)) is not None:
                unwrap_(lent)
            if wrap_(value, self.classes[name], name) and not isinstance(value, nn.Parameter):
                self._lent[name] = value
        super().__setitem__(name, value)

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        cls = self.classes.get(name)
        if cls is not None and carried(value) is not cls:
            if torch.compiler.is_dynamo_compiling():
                return value.as_subclass(cls)  # of torch.export(strict=True), which takes parameters for plain tensors
            wrap_(value, cls, name)
        return value

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (dict(self), {name: (cls.__base__, cls.config_key) for name, cls in self.classes.items()})


def _rebuild(parameters: dict[str, Any], classes: dict[str, tuple[type[WrappedWeight], str]]) -> ConvertedParameters:
    return ConvertedParameters(parameters, {name: base.with_key(key) for name, (base, key) in classes.items()})


def wrap_(x: Tensor | None, cls: type[WrappedWeight], name: str = "data") -> bool:
    """Makes `x` a `cls`, in place, or a DTensor a `WrappedDTensor` of it; whether it was none.

    Raises ValueError for another tensor subclass, and for a DTensor of partial sums.
    """
    if x is None or carried(x) is cls:
        return False
    if type(x) is nn.Parameter:
        x._is_param = True  # by which torch knows those of a subclass
    elif type(x) is not Tensor and not isinstance(x, WrappedWeight):
        cls = _class_beside(x, cls, name)
    x.__class__ = cls
    return True


def carried(x: Any) -> type:
    """The class of wrapped weights that `x` is one of, or its local part, if it is one at all."""
    return getattr(type(x), "weight", type(x))


def _class_beside(x: Any, cls: type[WrappedWeight], name: str) -> Any:
    """What makes a `cls` of a tensor of another subclass."""
    from xmoe.torch_backend.traced import TRACERS, traced_class

    if isinstance(x, TRACERS):
        return traced_class(cls, type(x))
    if not is_dtensor(x):
        raise ValueError(f"{name} is a {type(x).__name__}; give an nn.Parameter, or one that is a DTensor")
    from xmoe.torch_backend.dtensor import dtensor_class

    if any(placement.is_partial() for placement in x.placements):
        raise ValueError(f"{name} has placements {x.placements}; redistribute it: partial sums are no weights")
    return dtensor_class(cls)


def unwrap_(x: Tensor | None) -> None:
    """The inverse of `wrap_`."""
    if isinstance(x, WrappedWeight):
        is_parameter = x.__dict__.pop("_is_param", False)
        x.__class__ = getattr(type(x), "tracer", nn.Parameter if is_parameter else Tensor)
    elif is_dtensor(x):
        from xmoe.torch_backend.dtensor import plain_dtensor

        plain_dtensor(x)  # type: ignore[arg-type]


def is_dtensor(x: Any) -> bool:
    """Without importing torch.distributed.tensor, a third of a second, before somebody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _plain_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A ``state_dict`` holds plain values (unless ``keep_vars``), which convert no model that they are assigned to."""
    for name in module._parameters.classes:  # type: ignore[union-attr]
        value = state_dict.get(prefix + name)
        if not isinstance(value, nn.Parameter):
            unwrap_(value)
