"""``quantize_``: makes the GEMMs of a model's experts and linears run in low precision, in place."""

import logging
from collections.abc import Callable
from enum import StrEnum
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import ParametrizationList

from xmoe.config import LINEAR_RECIPES, RECIPES, GemmConfig, LinearConfig, any_config
from xmoe.fqn import DEFAULT, UNMATCHED, FqnToConfig, Unmatched, enclosing
from xmoe.torch_backend.linear import ScaledLinearTensor
from xmoe.torch_backend.linear_ops import misfit
from xmoe.torch_backend.parameters import convert
from xmoe.torch_backend.summary import table
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor
from xmoe.torch_backend.transformers import adopt
from xmoe.torch_backend.unquantized import remember, warn_of_kernels
from xmoe.torch_backend.wrapper import WrappedWeight

FilterFn = Callable[[nn.Module, str], bool]

logger = logging.getLogger(__name__)


class _Owner(NamedTuple):
    """A module and the name that it has a parameter under."""

    module: nn.Module
    name: str
    fqn: str
    """The parameter's, in the model."""


class _Weight(NamedTuple):
    """A parameter that could be converted."""

    owners: tuple[_Owner, ...]
    """One, or several where it is tied."""
    wrapper: type[WrappedWeight]
    strangers: tuple[str, ...]
    """Of a linear's weight: its names in modules that are no linears."""

    @property
    def parameter(self) -> nn.Parameter:
        return getattr(self.owners[0].module, self.owners[0].name)


_Matched = list[tuple[_Weight, GemmConfig]]
_WRAPPERS: tuple[type[WrappedWeight], ...] = (ScaledGroupedMMTensor, ScaledLinearTensor)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_CALLED = {ScaledGroupedMMTensor: "expert parameter", ScaledLinearTensor: "linear"}


def quantize_(
    model: nn.Module,
    config: GemmConfig | FqnToConfig | StrEnum | str,
    filter_fn: FilterFn | None = None,
    device: torch.device | str | None = None,
    *,
    verbose: bool = True,
) -> None:
    """Wraps the weights of `model` that match: those of experts, the parameters with three dimensions, under a
    ``GroupedMMConfig``; those of ``nn.Linear`` under a ``LinearConfig``. A config leaves the other kind alone.

    Names, shapes, dtypes and values stay as they are, and so do the ``nn.Parameter`` objects: optimizers and hooks that
    know them, made before or after, go on working. Tied experts (or linears) are converted for all their owners, if
    they match under one of their names; a linear tied to anything else is refused. Converting again replaces the
    config; `unquantize_` undoes it.

    Args:
        model: any module whose experts go through ``torch._grouped_mm`` or ``torch.nn.functional.grouped_mm``, and
            whose linears are ``nn.Linear``.
        config: one config, or a recipe (enum member or name), for every parameter that `filter_fn` lets through; or an
            `FqnToConfig`, whose None is a match too, and leaves the parameter alone.
        filter_fn: called with a module and its name. A module that it returns True for is converted with everything
            inside it: ``lambda module, fqn: isinstance(module, MoE)``. None takes the whole model. `filter_fqns` makes
            one from names to leave out.
        device: moves the model there first; None leaves it where it is.
        verbose: log the table of what was converted (level INFO, logger ``xmoe.torch_backend.quantize``).

    Raises:
        ValueError: nothing matches (the message lists what could), a key matches only weights of the other kind, a
            tied parameter gets two configs, a linear is tied to a module of another kind, a parameter is neither bf16,
            fp16 nor fp32, or `config` is of the wrong type. Also where a linear's sizes are no multiples of 16 and its
            config does not pad; but one that neither `filter_fn` nor a key named is then left alone, with a warning in
            the log. Experts are padded.
    """
    if not isinstance(config, GemmConfig | FqnToConfig | str):
        known = ", ".join((*RECIPES, *LINEAR_RECIPES))
        raise ValueError(
            f"config is {config!r}; give a GroupedMMConfig, a LinearConfig, an FqnToConfig or one of {known}"
        )
    mapping = config if isinstance(config, FqnToConfig) else FqnToConfig({DEFAULT: any_config(config)})
    if filter_fn is not None and not callable(filter_fn):
        raise ValueError(f"filter_fn is {filter_fn!r}; give a function of a module and its name, or filter_fqns([…])")
    if device is not None:
        model.to(device)

    weights = _weights(model)
    _check_keys(mapping, weights)
    taken: set[str] = set()
    if filter_fn is not None:
        taken = {name for name, module in _modules(model) if filter_fn(module, name)}
        if unused := sorted(getattr(filter_fn, "unused", ())):  # of filter_fqns
            logger.warning("quantize_: no module has %s in its name", ", ".join(map(repr, unused)))
        candidates = [tuple(o for o in w.owners if not taken.isdisjoint(enclosing(o.fqn))) for w in weights]
    else:
        candidates = [w.owners for w in weights]
    for fqn, wrapper in _parametrized(model):
        wanted = filter_fn is None or not taken.isdisjoint(enclosing(fqn))
        if wanted and isinstance(mapping.resolve(fqn), wrapper.config_type):
            logger.warning(
                "quantize_: left alone: %s is parametrized, and what its parametrization gives is a plain tensor; call "
                "torch.nn.utils.parametrize.remove_parametrizations first",
                fqn,
            )
    matched: _Matched = []
    misfits: list[str] = []
    leaves_alone = all(value is None for value in mapping.fqn_to_config.values())
    for weight, named in zip(weights, candidates, strict=True):
        chosen = _config_for(named, mapping)
        leaves_alone = leaves_alone or chosen is None
        if not isinstance(chosen, weight.wrapper.config_type):
            continue
        if weight.strangers:
            raise ValueError(_tied(weight))
        if weight.parameter.dtype not in _DTYPES:
            raise ValueError(
                f"{named[0].fqn} is {weight.parameter.dtype}; cast the model with model.to(torch.bfloat16), or leave "
                "the parameter out with filter_fn or FqnToConfig"
            )
        misfit = _misfit(weight, chosen) if isinstance(chosen, LinearConfig) else ""
        if not misfit:
            matched.append((weight, chosen))
        elif filter_fn is not None or any(mapping.key_for(owner.fqn) not in (DEFAULT, None) for owner in named):
            raise ValueError(f"{misfit}: pad them, or leave the parameter out with filter_fn or FqnToConfig")
        else:
            misfits.append(misfit)
    if not matched and not leaves_alone:
        raise ValueError("; ".join(misfits) or _nothing_matches(config, mapping, filter_fn, weights))
    for misfit in misfits:
        logger.warning("quantize_: left alone: %s", misfit)

    converted: dict[str, Tensor] = {}
    modules: dict[str, nn.Module] = {}
    for weight, chosen in matched:
        for owner in weight.owners:
            convert(owner.module, owner.name, weight.wrapper.with_key(chosen.to_key()))
        name = " = ".join(owner.fqn for owner in weight.owners)
        converted[name], modules[name] = weight.parameter, weight.owners[0].module
    remember(converted)
    warn_of_kernels(modules)
    adopt(modules.values())
    if verbose and matched:
        logger.info("quantize_: %s\n%s", _counts(matched, weights), table(converted))


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) under every name that a module has."""
    return list(model.named_modules(remove_duplicate=False))


def _weights(model: nn.Module) -> list[_Weight]:
    """The floating-point parameters [E, ., .], of which convolutions have none, and the weights of linears."""
    found: dict[int, list[tuple[_Owner, type[WrappedWeight] | None]]] = {}
    for module_name, module in _modules(model):
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owner = _Owner(module, name, f"{module_name}.{name}".removeprefix("."))
            found.setdefault(id(parameter), []).append((owner, _wrapper(module, name, parameter)))
    weights = []
    for owned in found.values():
        wrapper = next((wrapper for _, wrapper in owned if wrapper is not None), None)
        if wrapper is not None:
            strangers = tuple(owner.fqn for owner, own in owned if own is None and wrapper is ScaledLinearTensor)
            weights.append(_Weight(tuple(owner for owner, own in owned if own is not None), wrapper, strangers))
    return weights


def _parametrized(model: nn.Module) -> list[tuple[str, type[WrappedWeight]]]:
    """The weights that parametrizations compute, with the wrapper that they would have otherwise."""
    found: list[tuple[str, type[WrappedWeight]]] = []
    for name, module in _modules(model):
        if isinstance(module, ParametrizationList):
            owner, _, attribute = name.rpartition("parametrizations.")
            ndim = max((parameter.ndim for parameter in module.parameters(recurse=False)), default=0)
            linear = isinstance(model.get_submodule(owner.removesuffix(".")), nn.Linear) and attribute == "weight"
            wrapper = {2: ScaledLinearTensor if linear else None, 3: ScaledGroupedMMTensor}.get(ndim)
            if wrapper is not None:
                found.append((owner + attribute, wrapper))
    return found


def _wrapper(module: nn.Module, name: str, parameter: nn.Parameter) -> type[WrappedWeight] | None:
    if not parameter.is_floating_point() or isinstance(module, _ConvNd | ParametrizationList):
        return None  # what a parametrization computes of its parameters is multiplied, a plain tensor
    if parameter.ndim == 3:
        return ScaledGroupedMMTensor
    # NonDynamicallyQuantizableLinear: nn.MultiheadAttention multiplies by its weight without calling it.
    linear = isinstance(module, nn.Linear) and not isinstance(module, NonDynamicallyQuantizableLinear)
    return ScaledLinearTensor if linear and name == "weight" else None


def _names(weights: list[_Weight], *wrappers: type[WrappedWeight]) -> list[str]:
    return [owner.fqn for weight in weights if weight.wrapper in wrappers for owner in weight.owners]


def _wrapper_of(config: GemmConfig) -> type[WrappedWeight]:
    return next(wrapper for wrapper in _WRAPPERS if isinstance(config, wrapper.config_type))


def _check_keys(mapping: FqnToConfig, weights: list[_Weight]) -> None:
    """Warns of keys that match nothing. Raises ValueError for one that matches only what its config is not for."""
    unused = {
        wrappers: mapping.unused(_names(weights, *wrappers)) for wrappers in (_WRAPPERS, *((w,) for w in _WRAPPERS))
    }
    silent: dict[str, list[str]] = {}
    for key, config in mapping.fqn_to_config.items():
        wrappers = _WRAPPERS if config is None else (_wrapper_of(config),)
        if key not in unused[wrappers]:
            continue
        if config is not None and key not in unused[_WRAPPERS]:
            other = next(wrapper for wrapper in _WRAPPERS if wrapper not in wrappers)
            matched = next((name for name in _names(weights, other) if mapping.key_for(name) == key), None)
            if matched is None:  # others go before it
                continue
            raise ValueError(
                f"config: {key!r} has a {type(config).__name__} and matches only {other.kind}, such as {matched}; "
                f"give it a {other.config_type.__name__}"
            )
        called = " or ".join(_CALLED[wrapper] for wrapper in wrappers)
        silent.setdefault(called, []).append(repr(key))
    for called, keys in silent.items():
        logger.warning("quantize_: no %s matches %s", called, ", ".join(keys))


def _config_for(owners: tuple[_Owner, ...], mapping: FqnToConfig) -> GemmConfig | Literal[Unmatched.UNMATCHED] | None:
    """The one config of a parameter with these owners, or None, or UNMATCHED."""
    configs = {owner.fqn: config for owner in owners if (config := mapping.resolve(owner.fqn)) is not UNMATCHED}
    if len(set(configs.values())) > 1:
        found = ", ".join(f"{fqn}: {'None' if config is None else config.to_key()}" for fqn, config in configs.items())
        raise ValueError(f"config gives one tied parameter several configs ({found}); give all its names the same")
    return next(iter(configs.values()), UNMATCHED)


def _tied(weight: _Weight) -> str:
    name = weight.owners[0].fqn
    module = name.removesuffix(".weight")
    return (
        f"{name} is tied to {', '.join(weight.strangers)}, which is no linear: in 8 bits its two uses would differ. "
        f"Leave it out, with filter_fn=filter_fqns([{module!r}]) or FqnToConfig({{{module!r}: None, ...}}), or untie "
        f"it: {module}.weight = nn.Parameter({module}.weight.detach().clone())"
    )


def _misfit(weight: _Weight, config: LinearConfig) -> str:
    """Why the kernels cannot multiply by a linear's weight; "" where they can."""
    name, shape = weight.owners[0].fqn, tuple(weight.parameter.shape)
    sizes = () if config.pad_inner_dim else zip(("out_features", "in_features"), shape, strict=True)
    problems = [problem for size in sizes if (problem := misfit(*size))]
    return f"{name}: {', and '.join(problems)}, or use pad_inner_dim=True" if problems else ""


def _nothing_matches(config: object, mapping: FqnToConfig, filter_fn: FilterFn | None, weights: list[_Weight]) -> str:
    wrappers = tuple(dict.fromkeys(_wrapper_of(c) for c in mapping.fqn_to_config.values() if c is not None))
    names = _names(weights, *wrappers)
    what = {ScaledGroupedMMTensor: "parameters with three dimensions", ScaledLinearTensor: "weights of nn.Linear"}
    if not names:
        if wrappers == (ScaledGroupedMMTensor,):
            return (
                "model has no parameter with three dimensions; a GroupedMMConfig is for expert weights [E, K, N] only"
            )
        if wrappers == (ScaledLinearTensor,):
            return "model has no nn.Linear; a LinearConfig is for the weights of those only"
        return "model has neither a parameter with three dimensions nor an nn.Linear; quantize_ converts only these"
    culprits = [] if filter_fn is None else ["filter_fn"]
    if isinstance(config, FqnToConfig):
        culprits.append(f"config (keys: {', '.join(map(repr, config.fqn_to_config))})")
    by, called = " with ".join(culprits), " (filter_fn sees the modules that hold them)" if filter_fn else ""
    among = f"none of the {' and '.join(what[wrapper] for wrapper in wrappers)}{called}"
    return f"{by} matches {among}; change it to match some of: {', '.join(names)}"


def _counts(matched: _Matched, weights: list[_Weight]) -> str:
    """ "6 of 7 expert parameters"."""
    parts = []
    for wrapper in _WRAPPERS:
        if count := sum(weight.wrapper is wrapper for weight, _ in matched):
            parts.append(f"{count} of {sum(w.wrapper is wrapper for w in weights)} {_CALLED[wrapper]}s")
    return ", ".join(parts)
