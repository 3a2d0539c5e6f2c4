"""Tables of what is converted."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from xmoe.torch_backend.wrapper import weight_class


def summary(model: nn.Module) -> str:
    """The converted parameters of a model, a line each: names (all of a tied one), shape, dtype, config.

    The last line counts them among all parameters.
    """
    names: dict[int, list[str]] = {}
    parameters: dict[int, Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    converted = {" = ".join(names[i]): p for i, p in parameters.items() if _config_key(p)}
    elements, of = (sum(p.numel() for p in some.values()) for some in (converted, parameters))
    counted = f"{len(converted)} of {len(parameters)} parameters, {elements / max(of, 1):.1%} of their elements"
    return f"{table(converted)}\n{counted}" if converted else counted


def _config_key(parameter: Tensor) -> str | None:
    """Of a converted parameter, DTensors included."""
    return getattr(weight_class(parameter), "config_key", None)


def table(converted: Mapping[str, Tensor]) -> str:
    """Of converted parameters by their names."""
    rows = [("parameter", "shape", "dtype", "config")]
    for name, parameter in converted.items():
        dtype = str(parameter.dtype).removeprefix("torch.")
        rows.append((name, str(list(parameter.shape)), dtype, _config_key(parameter) or "–"))
    return "\n".join(_lines(rows))


def _lines(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
