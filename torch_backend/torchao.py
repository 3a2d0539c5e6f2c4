"""xmoe's configs in ``torchao.quantization.quantize_`` and in torchao's ``FqnToConfig``, beside torchao's own:

    import xmoe.torch_backend.torchao

That line registers them with torchao, for the process; nothing else in xmoe imports torchao. Written for torchao 0.18:
its ``quantize_`` takes instances of ``AOBaseConfig``, looks up a handler by the config's exact class, and calls it as
``handler(module, config)``, or with the keyword ``parameter_name`` where a key of ``FqnToConfig`` names a parameter.
"""

import logging
from typing import Any

from torch import nn
from torchao.core.config import AOBaseConfig
from torchao.quantization.transform_module import register_quantize_module_handler

from xmoe.config import GroupedMMConfig
from xmoe.fqn import FqnToConfig
from xmoe.torch_backend.quantize import quantize_
from xmoe.torch_backend.wrapper import WrappedWeight

logger = logging.getLogger(__name__)


def convert(module: nn.Module, config: Any, parameter_name: str | None = None) -> nn.Module:
    """What torchao's ``quantize_`` does to a module that one of xmoe's configs is meant for: `quantize_`, in place.

    A module without parameters (an activation inside the experts, under "re:.*experts.*") is left as it is. So is, with
    a warning, a parameter that the config is not for (a bias, under the same pattern).

    Raises ValueError where a module has parameters but none that the config is for, and for weights that do not fit.
    """
    parameters = dict(module.named_parameters())
    if parameter_name is None and not parameters:
        return module
    kind = type(module).__name__
    if parameter_name is not None and parameters[parameter_name].ndim != 3:
        shape = tuple(parameters[parameter_name].shape)
        logger.warning("torchao's quantize_: %s.%s %s is no expert weight; left alone", kind, parameter_name, shape)
        return module
    if not any(parameter.ndim == 3 for parameter in parameters.values()):
        raise ValueError(
            f"{type(config).__name__} was given to a {kind}, which holds no parameter with three dimensions; choose "
            "modules with experts. torchao's quantize_ takes nn.Linear if filter_fn is left out, and so does '_default'"
        )
    quantize_(module, config if parameter_name is None else FqnToConfig({parameter_name: config}), verbose=False)
    converted = (name for name, parameter in module.named_parameters() if isinstance(parameter, WrappedWeight))
    logger.info("torchao's quantize_: %s of a %s to %s", parameter_name or ", ".join(converted), kind, config.to_key())
    return module


def _subclasses(base: type) -> list[type]:
    return [found for cls in base.__subclasses__() for found in (cls, *_subclasses(cls))]


AOBaseConfig.register(GroupedMMConfig)
for _config in _subclasses(GroupedMMConfig):
    register_quantize_module_handler(_config)(convert)
