"""`from_qwix_rules`: a list of qwix's rules for quantized training, as an `FqnToConfig`. qwix is not imported."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np

from xmoe.config import GroupedMMConfig, config_from_recipe
from xmoe.fqn import FqnToConfig

_OPS = ("ragged_dot", "ragged_dot_general")
_RECIPES = {"float8_e4m3fn": "fp8_rowwise", "mxfp8": "mxfp8_rceil"}
"""By the type of all three operands."""
_TILES: dict[str, tuple[Any, ...]] = {"float8_e4m3fn": (None,), "mxfp8": (None, 32)}
"""Elements of a scale along the contraction, qwix's ``tile_size``; None: a whole row, or the type's own."""

# Fields whose other values ask for what no recipe does: (name, the values that ask for nothing, what is meant).
_PLAIN: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("weight_calibration_method", ("absmax", None), "scales come from the largest magnitude"),
    ("act_calibration_method", ("absmax", None), "scales come from the largest magnitude"),
    ("bwd_calibration_method", ("absmax", None), "scales come from the largest magnitude"),
    ("act_static_scale", (False, None), "scales are those of each call's own operands"),
    ("disable_channelwise_axes", (False, None), "each row and column has a scale"),
    ("bwd_stochastic_rounding", (None,), "rounding is to nearest even"),
    ("additional_qt_config", (None, {}), "there is nothing to override"),
)


def from_qwix_rules(rules: Iterable[Any]) -> FqnToConfig:
    """The `FqnToConfig` that says of experts what ``[QtRule(module_path=..., weight_qtype=..., ...)]`` says.

    Rules are any objects with qwix's attributes; one that an object lacks has qwix's default. As in qwix, the first
    rule whose ``module_path``, a regular expression on a path with slashes, matches a module in full decides about it,
    and what no rule matches stays as it is. The module is the one that has the parameter. Rules whose ``op_names`` do
    not have "ragged_dot" are for other products, and left out.

    ==================  =============  ============  ==============================================================
    weight_qtype        act_qtype      bwd_qtype     becomes
    ==================  =============  ============  ==============================================================
    None                any            any           None: left alone, as qwix does
    float8_e4m3fn       the same       the same      "fp8_rowwise"; scales are powers of two, qwix's are not
    "mxfp8"             the same       the same      "mxfp8_rceil"
    ==================  =============  ============  ==============================================================

    Raises:
        ValueError: naming the rule, the field and its value, for everything else: other types, a backward that is not
            quantized (``bwd_qtype=None``, qwix's default) or in e5m2, other tile sizes, calibrations or roundings,
            static scales.
    """
    configs: dict[str, GroupedMMConfig | None] = {}
    for number, rule in enumerate(rules):
        ops = getattr(rule, "op_names", ())
        if ops and not set(_OPS) & set(ops):
            continue
        key = f"re:{_parameters_of(getattr(rule, 'module_path', '.*'), number)}"
        configs.setdefault(key, _config(rule, number))  # the first of two with one path decides
    configs.setdefault("re:.*", None)
    return FqnToConfig(configs)


def _config(rule: Any, number: int) -> GroupedMMConfig | None:
    kinds = [_type_name(getattr(rule, name, None)) for name in ("weight_qtype", "act_qtype", "bwd_qtype")]
    if kinds[0] is None:
        return None
    if kinds[0] not in _RECIPES or len(set(kinds)) > 1:
        raise ValueError(
            f"rules[{number}]: weight_qtype={kinds[0]}, act_qtype={kinds[1]}, bwd_qtype={kinds[2]} is no recipe; give "
            f"all three one type of {', '.join(_RECIPES)}, or make an FqnToConfig of recipes"
        )
    for name in ("tile_size", "bwd_weight_grad_tile_size"):
        size = getattr(rule, name, None)
        if size not in _TILES[kinds[0]]:
            accepted = " or ".join(map(str, _TILES[kinds[0]]))
            raise ValueError(
                f"rules[{number}]: {name}={size!r} is not supported with {kinds[0]}; give {accepted}, or the recipe "
                "'fp8_blockwise' (128 elements) in an FqnToConfig"
            )
    for name, accepted, meaning in _PLAIN:
        value = getattr(rule, name, None)
        if value not in accepted:
            raise ValueError(f"rules[{number}]: {name}={value!r} is not supported ({meaning}); give {accepted[0]!r}")
    return config_from_recipe(_RECIPES[kinds[0]])


def _type_name(qtype: Any) -> str | None:
    """ "float8_e4m3fn" of a name, a NumPy dtype or a scalar type of JAX or ml_dtypes."""
    if qtype is None or isinstance(qtype, str):
        return qtype
    return np.dtype(getattr(qtype, "dtype", qtype)).name


def _parameters_of(module_path: str, number: int) -> str:
    """The regular expression, on a dotted name, of the parameters of the modules that qwix's matches."""
    try:
        matches_root = re.fullmatch(module_path, "") is not None
    except re.error as error:
        raise ValueError(f"rules[{number}]: module_path={module_path!r} is no regular expression: {error}") from error
    inside = rf"(?:{_with_dots(module_path)})\.[^.]+"
    return rf"(?:{inside}|[^.]*)" if matches_root else inside


def _with_dots(pattern: str) -> str:
    """A pattern on "a/b" as one on "a.b": slashes, escaped or not, become dots that stand for themselves."""
    out, in_class, i = [], False, 0
    while i < len(pattern):
        piece = pattern[i : i + 2] if pattern[i] == "\\" else pattern[i]
        i += len(piece)
        in_class = (in_class or piece == "[") and piece != "]"
        slash = "." if in_class else r"\."
        out.append(slash if piece in ("/", r"\/") else piece)
    return "".join(out)
