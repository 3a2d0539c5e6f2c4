"""``quantize_``: makes the expert weights of a model run their grouped GEMMs in low precision, in place."""

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from xmoe.config import RECIPES, GroupedMMConfig, as_config
from xmoe.fqn import DEFAULT, UNMATCHED, FqnToConfig, Unmatched, enclosing
from xmoe.operands import FEATURE_MULTIPLE
from xmoe.torch_backend.parameters import convert
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor

FilterFn = Callable[[nn.Module, str], bool]

logger = logging.getLogger(__name__)


class _Owner(NamedTuple):
    """A module and the name that it has a parameter under."""

    module: nn.Module
    name: str
    fqn: str
    """The parameter's, in the model."""


_Parameters = list[tuple[_Owner, ...]]
"""The expert parameters of a model, each with all of its owners: one, or several where it is tied."""
_Matched = list[tuple[tuple[_Owner, ...], GroupedMMConfig]]


def quantize_(
    model: nn.Module,
    config: GroupedMMConfig | FqnToConfig | StrEnum | str,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    verbose: bool = True,
) -> None:
    """Wraps expert weights in `ScaledGroupedMMTensor`: the parameters of `model` with three dimensions that match.

    Names, shapes, dtypes and values stay as they are, and so do the ``nn.Parameter`` objects: optimizers and hooks that
    know them, made before or after, go on working. A tied parameter is converted for all its owners if it matches under
    one of its names. Converting again replaces the config; `unquantize_` undoes it.

    Args:
        model: any module whose experts go through ``torch._grouped_mm`` or ``torch.nn.functional.grouped_mm``.
        config: one config, or a recipe (enum member or name), for every parameter that `filter_fn` lets through; or an
            `FqnToConfig`, whose None is a match too, and leaves the parameter alone.
        filter_fn: called with a module and its name. A module that it returns True for is converted with everything
            inside it: ``lambda module, fqn: isinstance(module, MoE)``. None takes the whole model.
        device: moves the model there first; None leaves it where it is.
        verbose: log the table of what was converted (level INFO, logger ``xmoe.torch_backend.quantize``).

    Raises:
        ValueError: nothing matches (the message lists the parameters with three dimensions), a tied parameter gets two
            configs, or `config` is of the wrong type. Also where K or N is not a multiple of 16; but a parameter that
            neither `filter_fn` nor a key named is then left alone, with a warning in the log.
    """
    if not isinstance(config, GroupedMMConfig | FqnToConfig | str):
        raise ValueError(f"config is {config!r}; give a GroupedMMConfig, an FqnToConfig or one of {', '.join(RECIPES)}")
    mapping = config if isinstance(config, FqnToConfig) else FqnToConfig({DEFAULT: as_config(config)})
    if device is not None:
        model.to(device)

    parameters = _expert_parameters(model)
    if unused := mapping.unused(_names(parameters)):
        logger.warning("quantize_: no expert parameter matches %s", ", ".join(map(repr, unused)))
    if filter_fn is not None:
        taken = {name for name, module in _modules(model) if filter_fn(module, name)}
        candidates = [tuple(o for o in owners if not taken.isdisjoint(enclosing(o.fqn))) for owners in parameters]
    else:
        candidates = parameters
    matched: _Matched = []
    misfits: list[str] = []
    leaves_alone = all(value is None for value in mapping.fqn_to_config.values())
    for owners, named in zip(parameters, candidates, strict=True):
        chosen = _config_for(named, mapping)
        leaves_alone = leaves_alone or chosen is None
        if not isinstance(chosen, GroupedMMConfig):
            continue
        misfit = _misfit(owners[0])
        if not misfit:
            matched.append((owners, chosen))
        elif filter_fn is not None or any(mapping.key_for(owner.fqn) not in (DEFAULT, None) for owner in named):
            raise ValueError(f"{misfit}: pad them, or leave the parameter out with filter_fn or FqnToConfig")
        else:
            misfits.append(misfit)
    if not matched and not leaves_alone:
        raise ValueError("; ".join(misfits) or _nothing_matches(config, filter_fn, _names(parameters)))
    for misfit in misfits:
        logger.warning("quantize_: left alone: %s", misfit)

    for owners, chosen in matched:
        for owner in owners:
            convert(owner.module, owner.name, ScaledGroupedMMTensor.with_key(chosen.to_key()))
    if verbose and matched:
        logger.info("quantize_: %d of %d expert parameters\n%s", len(matched), len(parameters), _table(matched))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) under every name that a module has."""
    return list(model.named_modules(remove_duplicate=False))


def _expert_parameters(model: nn.Module) -> _Parameters:
    """Every floating-point parameter [E, ., .]; convolutions have none."""
    found: dict[int, list[_Owner]] = {}
    for module_name, module in _modules(model):
        if isinstance(module, _ConvNd):
            continue
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.ndim == 3 and parameter.is_floating_point():
                owner = _Owner(module, name, f"{module_name}.{name}".removeprefix("."))
                found.setdefault(id(parameter), []).append(owner)
    return list(map(tuple, found.values()))


def _names(parameters: _Parameters) -> list[str]:
    return [owner.fqn for owners in parameters for owner in owners]


def _config_for(
    owners: tuple[_Owner, ...], mapping: FqnToConfig
) -> GroupedMMConfig | Literal[Unmatched.UNMATCHED] | None:
    """The one config of a parameter with these owners, or None, or UNMATCHED."""
    configs = {owner.fqn: config for owner in owners if (config := mapping.resolve(owner.fqn)) is not UNMATCHED}
    if len(set(configs.values())) > 1:
        found = ", ".join(f"{fqn}: {'None' if config is None else config.to_key()}" for fqn, config in configs.items())
        raise ValueError(f"config gives one tied parameter several configs ({found}); give all its names the same")
    return next(iter(configs.values()), UNMATCHED)


def _misfit(owner: _Owner) -> str:
    """Why the kernels cannot multiply by a parameter; "" where they can."""
    shape = tuple(getattr(owner.module, owner.name).shape)
    if not any(size % FEATURE_MULTIPLE for size in shape[1:]):
        return ""
    return f"{owner.fqn} has shape {shape}; its last two dimensions must be multiples of {FEATURE_MULTIPLE}"


def _nothing_matches(config: object, filter_fn: FilterFn | None, names: list[str]) -> str:
    if not names:
        return "model has no parameter with three dimensions; quantize_ converts expert weights [E, K, N] only"
    culprits = [] if filter_fn is None else ["filter_fn"]
    if isinstance(config, FqnToConfig):
        culprits.append(f"config (keys: {', '.join(map(repr, config.fqn_to_config))})")
    by, called = " with ".join(culprits), " (filter_fn sees the modules that hold them)" if filter_fn else ""
    among = f"none of the parameters with three dimensions{called}"
    return f"{by} matches {among}; change it to match some of: {', '.join(names)}"


def _table(matched: _Matched) -> str:
    rows = [("parameter", "shape", "dtype", "config")]
    for owners, config in matched:
        parameter = getattr(owners[0].module, owners[0].name)
        dtype = str(parameter.dtype).removeprefix("torch.")
        rows.append((" = ".join(owner.fqn for owner in owners), str(list(parameter.shape)), dtype, config.to_key()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
