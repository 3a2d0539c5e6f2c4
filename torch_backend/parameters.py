"""Converted parameters: wrapped in place, kept wrapped by the module that holds them, and given back in place."""

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xmoe.torch_backend.unquantized import ORIGIN
from xmoe.torch_backend.wrapper import WrappedWeight, set_class, weight_class


def convert(module: nn.Module, name: str, cls: type[WrappedWeight]) -> None:
    """Makes the parameter `name` of `module` a `cls`, and keeps whatever is put in its place one.

    The ``nn.Parameter`` stays the object that it is: optimizers, hooks, ties, gradients and attributes know it by that.

    Raises ValueError for a parameter of a tensor subclass that is no DTensor.
    """
    parameters = module._parameters
    wrap_(parameters[name], cls, name)
    if not isinstance(parameters, ConvertedParameters):
        parameters = module.__dict__["_parameters"] = ConvertedParameters(parameters, {})
    if not parameters.classes:
        module.register_state_dict_post_hook(_plain_state)
    parameters.classes[name] = cls


def unquantize_(model: nn.Module) -> None:
    """Undoes ``quantize_``: every converted parameter of `model` is a plain one again.

    It is the same ``nn.Parameter`` on the same storage, with its gradient and its owners. Nothing of the conversion is
    left on the modules, except on those that have DTensors. A model without converted parameters stays as it is.
    """
    from xmoe.torch_backend.transformers import release

    for module in model.modules():
        if not isinstance(module._parameters, ConvertedParameters):
            continue
        release(module)
        parameters, names = module._parameters, list(module._parameters.classes)
        parameters.released.update(names)
        parameters.classes.clear()
        for name in names:
            unwrap_(parameters[name])
        if not any(map(is_dtensor, parameters.values())):
            module.__dict__["_parameters"] = dict(parameters)
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
        self._lent: dict[str, tuple[Tensor, type]] = {}
        """What is no parameter is wrapped for as long as it is stored; its class before."""
        self.released: set[str] = set()
        """What gets unwrapped: FSDP2 puts gathered parameters back that it has kept from before `unquantize_`."""

    def __setitem__(self, name: str, value: Any) -> None:
        # Dynamo sets no classes: there what is read is wrapped.
        if name in self.classes and not torch.compiler.is_dynamo_compiling():
            if name in self._lent:
                set_class(*self._lent.pop(name))
            before = type(value)
            if wrap_(value, self.classes[name], name) and not isinstance(value, nn.Parameter):
                self._lent[name] = value, before
        elif name in self.released:
            unwrap_(value)
        super().__setitem__(name, value)

    def __getitem__(self, name: str) -> Any:
        value = dict.__getitem__(self, name)
        cls = self.classes.get(name)
        if type(value) is cls or cls is None or weight_class(value) is cls:
            return value
        if torch.compiler.is_dynamo_compiling():
            return value.as_subclass(cls)
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
    if x is None or weight_class(x) is cls:
        return False
    if type(x) is nn.Parameter:
        x._is_param = True  # by which torch knows those of a subclass
    elif type(x) is not Tensor and not isinstance(x, WrappedWeight):
        cls = _class_beside(x, cls, name)
    set_class(x, cls)
    if isinstance(x, nn.Parameter):
        torch._dynamo.mark_static(x)  # as Dynamo takes the shapes of parameters that no dict of ours has handed out
    return True


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
    """The inverse of `wrap_`, of plain tensors, parameters and DTensors."""
    if isinstance(x, WrappedWeight):
        vars(x).pop(ORIGIN, None)
        set_class(x, nn.Parameter if vars(x).pop("_is_param", False) else Tensor)
    elif is_dtensor(x):
        set_class(x, sys.modules["torch.distributed.tensor"].DTensor)


def is_dtensor(x: Any) -> bool:
    """Without importing torch.distributed.tensor, a third of a second, before somebody else has."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def _plain_state(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """A ``state_dict`` holds plain values (unless ``keep_vars``), which convert no model that they are assigned to."""
    for name in getattr(module._parameters, "classes", ()):
        value = state_dict.get(prefix + name)
        if not isinstance(value, nn.Parameter):
            unwrap_(value)
