"""``quantize_``: makes the expert weights of a model run their grouped GEMMs in low precision, in place."""

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from xmoe.config import GroupedMMConfig
from xmoe.fqn import UNMATCHED, FqnToConfig
from xmoe.torch_backend.tensor import ScaledGroupedMMTensor, unwrap

FilterFn = Callable[[nn.Module, str], bool]

logger = logging.getLogger(__name__)


def quantize_(
    model: nn.Module,
    config: GroupedMMConfig | FqnToConfig,
    filter_fn: FilterFn | None = None,
    *,
    verbose: bool = True,
) -> None:
    """Wraps expert weights in `ScaledGroupedMMTensor`: the parameters of `model` with three dimensions that match.

    Names, shapes, dtypes and values stay as they are; a converted parameter is a new ``nn.Parameter`` on the same
    storage, so make the optimizer afterwards. Converting again replaces the config.

    Args:
        model: any module whose experts go through ``torch._grouped_mm`` or ``torch.nn.functional.grouped_mm``.
        config: one config for every parameter that `filter_fn` lets through, or an `FqnToConfig`.
        filter_fn: called with the module that owns the parameter and that module's name; None takes every module.
        verbose: log the table of what was converted (level INFO, logger ``xmoe.torch_backend.quantize``).

    Raises:
        ValueError: nothing matches (the message lists the parameters with three dimensions), a matched parameter's K
            or N is not a multiple of 16, or `config` is of the wrong type.
    """
    if not isinstance(config, GroupedMMConfig | FqnToConfig):
        raise ValueError(f"config is {config!r}; give a GroupedMMConfig (config_from_recipe(...)) or an FqnToConfig")

    candidates = _expert_parameters(model)
    matched: list[tuple[nn.Module, str, str, GroupedMMConfig]] = []
    for module, module_name, name in candidates:
        if filter_fn is not None and not filter_fn(module, module_name):
            continue
        fqn = f"{module_name}.{name}".lstrip(".")
        chosen = config.resolve(fqn) if isinstance(config, FqnToConfig) else config
        if chosen is not None and chosen is not UNMATCHED:
            _check_shape(fqn, getattr(module, name))
            matched.append((module, name, fqn, chosen))
    names = [f"{module_name}.{name}".lstrip(".") for module, module_name, name in candidates]
    if not matched:
        raise ValueError(_nothing_matches(config, filter_fn, names))
    if isinstance(config, FqnToConfig) and (unused := config.unused(names)):
        logger.warning("quantize_: no expert parameter matches %s", ", ".join(map(repr, unused)))

    wrapped: dict[int, nn.Parameter] = {}  # a parameter that two modules share stays shared
    for module, name, _, chosen in matched:
        old = getattr(module, name)
        if id(old) not in wrapped:
            new = nn.Parameter(ScaledGroupedMMTensor(old, chosen), requires_grad=old.requires_grad)
            new.grad = old.grad
            wrapped[id(old)] = new
        setattr(module, name, wrapped[id(old)])
        _keep_wrapped_on_load(module)
    if verbose:
        logger.info("quantize_: %d of %d expert parameters\n%s", len(matched), len(candidates), _table(matched))


def _expert_parameters(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """(owner, owner's name, parameter's name) of every floating-point parameter [E, ., .]; convolutions have none."""
    return [
        (module, module_name, name)
        for module_name, module in model.named_modules()
        if not isinstance(module, _ConvNd)
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if parameter.ndim == 3 and parameter.is_floating_point()
    ]


def _check_shape(fqn: str, parameter: Tensor) -> None:
    if any(size % 16 for size in parameter.shape[1:]):
        raise ValueError(
            f"{fqn} has shape {tuple(parameter.shape)}; its last two dimensions must be multiples of 16: pad them, or "
            "leave the parameter out with filter_fn or FqnToConfig"
        )


def _nothing_matches(config: GroupedMMConfig | FqnToConfig, filter_fn: FilterFn | None, names: list[str]) -> str:
    if not names:
        return "model has no parameter with three dimensions; quantize_ converts expert weights [E, K, N] only"
    by = "filter_fn" if filter_fn is not None else f"config={config!r}"
    return f"{by} matches none of the parameters with three dimensions; change it to match some of: {', '.join(names)}"


def _table(matched: list[tuple[nn.Module, str, str, GroupedMMConfig]]) -> str:
    rows = [("parameter", "shape", "dtype", "config")]
    for module, name, fqn, config in matched:
        parameter = getattr(module, name)
        rows.append((fqn, str(list(parameter.shape)), str(parameter.dtype).removeprefix("torch."), config.to_key()))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _keep_wrapped_on_load(module: nn.Module) -> None:
    hooks = module._load_state_dict_pre_hooks.values()
    if not any(getattr(hook, "hook", None) is _rewrap for hook in hooks):
        module.register_load_state_dict_pre_hook(_rewrap)


def _rewrap(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Before ``load_state_dict(assign=True)`` puts the checkpoint's plain tensors in the place of wrapped weights."""
    if not local_metadata.get("assign_to_params_buffers", False):
        return
    for name, parameter in module.named_parameters(recurse=False):
        value = state_dict.get(prefix + name)
        if isinstance(parameter, ScaledGroupedMMTensor) and isinstance(value, Tensor) and value.ndim == 3:
            state_dict[prefix + name] = ScaledGroupedMMTensor(unwrap(value), parameter.config)
