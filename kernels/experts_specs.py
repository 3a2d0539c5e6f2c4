"""Specs of the experts' stages: what each call of `xmoe.kernels.experts` writes, worked out from static facts.

M rows sorted by expert, D model width, H hidden width, G experts held here, Mp padded tokens (`xmoe.operands`).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from xmoe.config import GroupedMMConfig
from xmoe.kernels.dispatch import Device, Implementation, select
from xmoe.kernels.specs import (
    HAS_TRITON,
    Problem,
    Spec,
    TensorSpec,
    backward_spec,
    finds_maxima,
    is_map,
    maxima_spec,
    rows_spec,
    saves_input,
    scale_tiles,
    token_map,
    tokens_spec,
)
from xmoe.kernels.specs import forward_outputs as gemm_outputs
from xmoe.kernels.specs import forward_spec as gemm_spec
from xmoe.operands import TOKEN_TILE, padded_tokens

if HAS_TRITON:
    from xmoe.kernels.quantize_rows_fp8 import LONGEST_ROW


@dataclass(frozen=True, slots=True)
class Experts:
    """The static facts of a call. Dtypes are names; that of x is also that of gate_up, h and their gradients."""

    M: int
    D: int
    H: int
    G: int
    x_dtype: str = "bfloat16"
    w_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"
    k: int = 0
    """Experts of each token, where x comes as M / k tokens in an order of their own; 0: as M rows."""

    @property
    def x_rows(self) -> int:
        return self.M // self.k if self.k else self.M

    @property
    def input_problem(self) -> Problem:
        """x times w1 or w3."""
        return Problem(self.M, self.H, self.D, self.G, self.x_dtype, self.w_dtype, self.x_dtype)

    @property
    def joint_problem(self) -> Problem:
        """x times w1 and w3 side by side."""
        return Problem(self.M, 2 * self.H, self.D, self.G, self.x_dtype, self.w_dtype, self.x_dtype)

    @property
    def output_problem(self) -> Problem:
        """h times w2."""
        return Problem(self.M, self.D, self.H, self.G, self.x_dtype, self.w_dtype, self.out_dtype)


class Places(NamedTuple):
    """Where `gradient` leaves what it makes of the gradient of gate_up: in an output of that name, or in place of what
    it was given."""

    rows: str
    """What `dgrad` multiplies: "d", "dh" or "gate_up"."""
    tokens: str
    """What `wgrad` multiplies: "d_tokens" or "gate_up"."""


def places(config: GroupedMMConfig, impl: Implementation, x_dtype: str) -> Places:
    """Where a GEMM multiplies what the quantizer read in numbers of the same size, it takes their place."""
    if impl.gemm == "emulated" or config.format == "bf16":
        return Places("gate_up", "gate_up")
    half = x_dtype == "bfloat16"
    in_place = saves_input(config) or (impl.straight_tokens and half)
    return Places(
        rows="dh" if half and config.format == "fp8_rowwise" else "d", tokens="gate_up" if in_place else "d_tokens"
    )


def forward_outputs(
    e: Experts, config: GroupedMMConfig, impl: Implementation, save: bool, prepared: bool = False
) -> dict[str, TensorSpec]:
    """``out`` [M, D]; with `save` also ``gate_up`` [M, 2H] and, unless `saves_input(config)`, the wgrad operands of x
    and h, ``x_tokens``, ``x_tokens_scale``, ``h_tokens``, ``h_tokens_scale`` (as in `pipeline.forward_outputs`), and,
    of weights that are not `prepared`, where `finds_maxima`, ``w13_amax`` int32 [G, D] and ``w2_amax`` [G, H], for
    `dgrad` and for the `pipeline.backward` of w2. Of an unsorted x also ``place`` int32 [M], for `dgrad`, and, if
    `saves_input(config)`, ``tokens`` int32 [M], for `wgrad`."""
    outputs = {"out": TensorSpec((e.M, e.D), e.out_dtype)}
    if save:
        outputs["gate_up"] = TensorSpec((e.M, 2 * e.H), e.x_dtype)
        for name, problem in (("x", e.input_problem), ("h", e.output_problem)):
            gemm = gemm_outputs(problem, config, impl, True)
            outputs |= {name + key.removeprefix("a"): gemm[key] for key in gemm if key != "out"}
        for name, C in (("w13_amax", e.D), ("w2_amax", e.H)):
            if not prepared and finds_maxima(config, impl, C):
                outputs[name] = TensorSpec((e.G, C), "int32")
        if e.k:
            names = ("place", "tokens") if saves_input(config) else ("place",)
            outputs |= dict.fromkeys(names, TensorSpec((e.M,), "int32"))
    return outputs


@lru_cache(maxsize=4096)
def forward_spec(
    experts: Experts, config: GroupedMMConfig, device: Device, save: bool = True, prepared: bool = False
) -> Spec:
    """Outputs: `forward_outputs`. `prepared`: the weights come so."""
    e, impl = experts, select(config, device)
    # What w1 and w3 multiply is dead when h is quantized.
    turns = ("in.a", "in.a_scale"), ("out.a", "out.a_scale", "out.kept")
    spec = Spec(forward_outputs(e, config, impl, save, prepared), turns=turns)
    if not save:
        spec.scratch["gate_up"] = TensorSpec((e.M, 2 * e.H), e.x_dtype)
    if impl.gemm == "emulated":
        return spec
    if config.format == "bf16":
        spec.scratch["hidden"] = TensorSpec((e.M, e.H), e.x_dtype)
        if e.k:
            spec.scratch["x_rows"] = TensorSpec((e.M, e.D), e.x_dtype)
    if e.k and "tokens" not in spec.outputs:
        spec.scratch["tokens"] = TensorSpec((e.M,), "int32")
    for part, problem in (("in", e.input_problem), ("out", e.output_problem)):
        for name, tensor in gemm_spec(problem, config, device, save, prepared).scratch.items():
            spec.scratch[name if is_map(name) else f"{part}.{name}"] = tensor
        spec.scratch.pop(f"{part}.b_amax", None)  # the weights lie along the contraction
    spec.scratch.pop("out.b", None)  # as many bytes as in.b
    if save and config.format == "fp8_rowwise" and not saves_input(config) and e.H <= LONGEST_ROW:
        spec.scratch["out.kept"] = TensorSpec((e.M, e.H), e.x_dtype)
    return spec


MAPS = f"tiles_{TOKEN_TILE}", f"groups_{TOKEN_TILE}"


def gives_maps(config: GroupedMMConfig, impl: Implementation) -> bool:
    """Whether `gradient` quantizes anything."""
    return impl.gemm != "emulated" and config.format != "bf16"


def gradient_outputs(
    e: Experts, config: GroupedMMConfig, impl: Implementation, need_dx: bool = True, need_dw: bool = True
) -> dict[str, TensorSpec]:
    """Those that are needed and not in place (`places`): ``d`` [M, 2H] and ``d_scale``, ``d_tokens`` and
    ``d_tokens_scale``, operands of the grouped GEMMs with [dg | du]. Tokens that are multiplied straight are bf16
    [M, 2H]; scales in tiles, [2, ...], are of either half, which may end inside one. And the MAPS that quantizing took,
    for `dgrad` and `wgrad`."""
    p, where, specs = e.joint_problem, places(config, impl, e.x_dtype), {}
    if gives_maps(config, impl):
        specs |= token_map(TOKEN_TILE, p)
    if need_dx and where.rows != "gate_up":
        specs |= rows_spec("d", 2 * e.H, e.x_dtype, p, config, impl)
        if where.rows != "d":
            specs.pop("d")
    if need_dw and where.tokens != "gate_up":
        specs |= tokens_spec("d_tokens", 2 * e.H, p, config, impl)
        if impl.straight_tokens:
            specs["d_tokens"] = TensorSpec((e.M, 2 * e.H), "bfloat16")
            specs.pop("d_tokens_scale")
        elif impl.scale_tiles:
            specs["d_tokens_scale"] = scale_tiles(2, rows=e.H, C=padded_tokens(e.M, e.G))
    return specs


@lru_cache(maxsize=4096)
def gradient_spec(
    experts: Experts, config: GroupedMMConfig, device: Device, need_dx: bool = True, need_dw: bool = True
) -> Spec:
    """Outputs: `gradient_outputs`."""
    e, impl = experts, select(config, device)
    spec = Spec(gradient_outputs(e, config, impl, need_dx, need_dw))
    if "d_tokens" in spec.outputs:
        spec.scratch.update(maxima_spec("d_tokens", 2 * e.H, e.joint_problem, config))
    return spec


@lru_cache(maxsize=4096)
def dgrad_spec(
    experts: Experts, config: GroupedMMConfig, device: Device, prepared: bool = False, amax_is_known: bool = False
) -> Spec:
    """Outputs: ``dx``, like x, in x_dtype. `amax_is_known`: the forward's ``w13_amax`` comes with the weights."""
    e, impl = experts, select(config, device)
    spec = Spec({"dx": TensorSpec((e.x_rows, e.D), e.x_dtype)})
    if impl.gemm == "emulated":
        return spec
    if e.k:
        spec.scratch["dx_rows"] = TensorSpec((e.M, e.D), e.x_dtype)
    spec.scratch.update(backward_spec(e.joint_problem, config, device, True, False, prepared, amax_is_known).scratch)
    if config.format == "bf16":
        spec.scratch["b"] = TensorSpec((e.G, 2 * e.H, e.D), "bfloat16")
        return spec
    for name in ("d", "d_scale", *MAPS):
        spec.scratch.pop(name, None)
    return spec


@lru_cache(maxsize=4096)
def wgrad_spec(experts: Experts, config: GroupedMMConfig, device: Device) -> Spec:
    """Outputs: ``dw1`` and ``dw3`` [G, H, D] in w_dtype."""
    e = experts
    outputs = {name: TensorSpec((e.G, e.H, e.D), e.w_dtype) for name in ("dw1", "dw3")}
    scratch = backward_spec(e.input_problem, config, device, False, True).scratch
    given = MAPS if gives_maps(config, select(config, device)) else ()
    spec = Spec(
        outputs, {name: s for name, s in scratch.items() if not name.startswith("d_tokens") and name not in given}
    )
    if e.k and saves_input(config) and select(config, device).gemm != "emulated":
        spec.scratch["x_rows"] = TensorSpec((e.M, e.D), e.x_dtype)
    return spec
