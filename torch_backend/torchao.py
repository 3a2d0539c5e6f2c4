"""xmoe's configs in ``torchao.quantization.quantize_`` and in torchao's ``FqnToConfig``, beside torchao's own:

    import xmoe.torch_backend.torchao

That line registers them with torchao, for the process; nothing else in xmoe imports torchao. Written for torchao 0.18:
its ``quantize_`` takes instances of ``AOBaseConfig``, looks up a handler by the config's exact class, and calls it as
``handler(module, config)``, or with the keyword ``parameter_name`` where a key of ``FqnToConfig`` names a parameter.
"""

import logging
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig  # type: ignore (optional)
from torchao.quantization.transform_module import register_quantize_module_handler  # type: ignore (optional)
from torchao.utils import TorchAOBaseTensor  # type: ignore (optional)

from xmoe.config import GroupedMMConfig
from xmoe.fqn import FqnToConfig
from xmoe.torch_backend.quantize import quantize_
from xmoe.torch_backend.wrapper import WrappedWeight

logger = logging.getLogger(__name__)

_BASE: type = GroupedMMConfig.__mro__[-2]
"""What every config derives from, whatever it is for."""


def convert(module: nn.Module, config: Any, parameter_name: str | None = None) -> nn.Module:
    """What torchao's ``quantize_`` does to a module, or to one parameter of it, that has one of xmoe's configs:
    `quantize_`, in place.

    Left alone are modules without parameters (an activation inside the experts, under "re:.*experts.*"), and, with a
    warning, parameters that the config is not for (a bias under that key) and those that an earlier key has converted,
    to one of either library's. So the first key decides, as torchao documents: it hands a parameter to every pattern
    that matches.

    Raises ValueError where the config is for experts and a module has parameters but no expert weights, and for weights
    that do not fit.
    """
    parameters = dict(module.named_parameters())
    ndim = 3 if isinstance(config, GroupedMMConfig) else 2
    kind = type(module).__name__
    if parameter_name is None:
        if not parameters:
            return module
        if not any(parameter.ndim == ndim for parameter in parameters.values()):
            wanted = "the experts" if ndim == 3 else "linears"
            raise ValueError(
                f"{type(config).__name__} was given to a {kind}, which holds no parameter with {ndim} dimensions; name "
                f"{wanted}. torchao's quantize_ takes every nn.Linear if filter_fn is left out, and for '_default'"
            )
        quantize_(module, config, verbose=False)
    else:
        parameter, name = parameters[parameter_name], f"{kind}.{parameter_name}"
        if isinstance(parameter, TorchAOBaseTensor):
            logger.warning("left alone: %s is a %s of an earlier key or call", name, type(parameter).__name__)
            return module
        if isinstance(parameter, WrappedWeight):
            if parameter.config != config:
                kept, other = parameter.config_key, config.to_key()
                logger.warning("left alone: %s has %s, of an earlier key or call, not %s", name, kept, other)
            return module
        if parameter.ndim != ndim:
            logger.warning("left alone: %s %s is not for %s", name, tuple(parameter.shape), type(config).__name__)
            return module
        quantize_(module, FqnToConfig({parameter_name: config}), verbose=False)
    converted = [name for name, parameter in module.named_parameters() if isinstance(parameter, WrappedWeight)]
    logger.info("%s of a %s: %s", parameter_name or ", ".join(converted), kind, config.to_key())
    return module


def _subclasses(base: type) -> list[type]:
    return [found for cls in base.__subclasses__() for found in (cls, *_subclasses(cls))]


AOBaseConfig.register(_BASE)
for _config in _subclasses(_BASE):
    register_quantize_module_handler(_config)(convert)
