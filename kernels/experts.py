"""SwiGLU experts in one piece: what `xmoe.kernels.pipeline` is for one grouped GEMM, for the three of an expert.

M tokens sorted by expert, D model width, H hidden width, G experts held here, Mp padded tokens (`xmoe.operands`).
Weights are stored as PyTorch stores linear ones: w1, w3 [G, H, D] and w2 [G, D, H], contiguous.

    g = x w1^T, u = x w3^T      h = silu(g) u      out = h w2^T

What three separate grouped GEMMs cannot have:
- x is quantized once for w1 and w3, and its tokens once for both weight gradients;
- h is rounded once, quantized as it is made, and not saved;
- the gradient of x is one GEMM over [dg | du] and [w1 ; w3], of contraction 2H: one scale a row for both halves, one
  sum in float32. So an MX format asks for H % 32 == 0 and fp8_blockwise for H % 128 == 0 (`whole_blocks`).

- the gradients of g and u are quantized as they are found, and are not kept in bf16 where no GEMM reads that.

A step is `forward`, `pipeline.backward` of w2 (`Experts.output_problem`), `gradient`, `dgrad` and `wgrad`: apart, so
that a frontend can let go of memory in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation, pipeline
from xmoe.kernels.call import Call, on_device
from xmoe.kernels.dispatch import Device, Implementation, select
from xmoe.kernels.replay import replayed
from xmoe.kernels.specs import (
    HAS_TRITON,
    Prepared,
    Problem,
    Spec,
    Tensors,
    TensorSpec,
    finds_maxima,
    is_map,
    maxima_spec,
    rows_spec,
    saves_input,
    scale_tiles,
    token_map,
    tokens_spec,
    with_maps,
)
from xmoe.operands import TOKEN_TILE, padded_tokens

if HAS_TRITON:
    from xmoe.kernels import swiglu
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


# --------------------------------------------------------------------------------------------------------------- specs


def _part(tensors: Tensors, part: str) -> dict[str, torch.Tensor]:
    """The tensors called "`part`.name", as name, and the maps."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix) or is_map(name)}


def forward_outputs(
    e: Experts, config: GroupedMMConfig, impl: Implementation, save: bool, prepared: bool = False
) -> dict[str, TensorSpec]:
    """``out`` [M, D]; with `save` also ``gate_up`` [M, 2H] and, unless `saves_input(config)`, the wgrad operands of x
    and h, ``x_tokens``, ``x_tokens_scale``, ``h_tokens``, ``h_tokens_scale`` (as in `pipeline.forward_outputs`), and,
    of weights that are not `prepared`, where `finds_maxima`, ``w13_amax`` int32 [G, D] and ``w2_amax`` [G, H], for
    `dgrad` and for the `pipeline.backward` of w2."""
    outputs = {"out": TensorSpec((e.M, e.D), e.out_dtype)}
    if save:
        outputs["gate_up"] = TensorSpec((e.M, 2 * e.H), e.x_dtype)
        for name, problem in (("x", e.input_problem), ("h", e.output_problem)):
            gemm = pipeline.forward_outputs(problem, config, impl, True)
            outputs |= {name + key.removeprefix("a"): gemm[key] for key in gemm if key != "out"}
        for name, C in (("w13_amax", e.D), ("w2_amax", e.H)):
            if not prepared and finds_maxima(config, impl, C):
                outputs[name] = TensorSpec((e.G, C), "int32")
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
    for part, problem in (("in", e.input_problem), ("out", e.output_problem)):
        for name, tensor in pipeline.forward_spec(problem, config, device, save, prepared).scratch.items():
            spec.scratch[name if is_map(name) else f"{part}.{name}"] = tensor
        spec.scratch.pop(f"{part}.b_amax", None)  # the weights lie along the contraction
    spec.scratch.pop("out.b", None)  # as many bytes as in.b
    if save and config.format == "fp8_rowwise" and not saves_input(config) and e.H <= LONGEST_ROW:
        spec.scratch["out.kept"] = TensorSpec((e.M, e.H), e.x_dtype)
    return spec


def gradient_outputs(
    e: Experts, config: GroupedMMConfig, impl: Implementation, need_dx: bool = True, need_dw: bool = True
) -> dict[str, TensorSpec]:
    """Those that are needed and not in place (`places`): ``d`` [M, 2H] and ``d_scale``, ``d_tokens`` and
    ``d_tokens_scale``, operands of the grouped GEMMs with [dg | du]. Tokens that are multiplied straight are bf16
    [M, 2H]; scales in tiles, [2, ...], are of either half, which may end inside one."""
    p, where, specs = e.joint_problem, places(config, impl, e.x_dtype), {}
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
    if impl.gemm != "emulated" and config.format != "bf16":
        spec.scratch.update(token_map(TOKEN_TILE, e.joint_problem))
        if "d_tokens" in spec.outputs:
            spec.scratch.update(maxima_spec("d_tokens", 2 * e.H, e.joint_problem, config))
    return spec


@lru_cache(maxsize=4096)
def dgrad_spec(
    experts: Experts, config: GroupedMMConfig, device: Device, prepared: bool = False, amax_is_known: bool = False
) -> Spec:
    """Outputs: ``dx`` [M, D] in x_dtype. `amax_is_known`: the forward's ``w13_amax`` comes with the weights."""
    e, impl = experts, select(config, device)
    spec = Spec({"dx": TensorSpec((e.M, e.D), e.x_dtype)})
    if impl.gemm == "emulated":
        return spec
    spec.scratch.update(
        pipeline.backward_spec(e.joint_problem, config, device, True, False, prepared, amax_is_known).scratch
    )
    if config.format == "bf16":
        spec.scratch["b"] = TensorSpec((e.G, 2 * e.H, e.D), "bfloat16")
        return spec
    for name in ("d", "d_scale"):
        spec.scratch.pop(name, None)
    return spec


@lru_cache(maxsize=4096)
def wgrad_spec(experts: Experts, config: GroupedMMConfig, device: Device) -> Spec:
    """Outputs: ``dw1`` and ``dw3`` [G, H, D] in w_dtype."""
    e = experts
    outputs = {name: TensorSpec((e.G, e.H, e.D), e.w_dtype) for name in ("dw1", "dw3")}
    scratch = pipeline.backward_spec(e.input_problem, config, device, False, True).scratch
    return Spec(outputs, {name: s for name, s in scratch.items() if not name.startswith("d_tokens")})


# --------------------------------------------------------------------------------------------------------------- calls


def forward(
    experts: Experts,
    config: GroupedMMConfig,
    device: Device,
    x: torch.Tensor,
    w1: torch.Tensor | Prepared,
    w2: torch.Tensor | Prepared,
    w3: torch.Tensor | Prepared,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Write the outputs of `forward_spec`.

    Args:
        x: bf16 or fp32 [M, D], contiguous.
        w1, w2, w3: bf16 or fp32, [G, H, D], [G, D, H], [G, H, D], contiguous; or all prepared (`prepare_weights`).
        offs: int32 [G], cumulative group ends; any values (docs/design.md).
        outputs, scratch: by the names of `forward_spec`, contiguous.
    """
    e = experts
    gate_up = outputs["gate_up"] if "gate_up" in outputs else scratch["gate_up"]
    if select(config, device).gemm == "emulated":
        _emulated_forward(config, x, w1, w2, w3, offs, gate_up, outputs)
        return

    def run() -> None:
        inner = Call(e.input_problem, config, device, offs, _part(scratch, "in"))
        inner.prepare(x.shape[0], outputs, scratch)
        rows = _rows(inner, x, outputs, "x")
        for w, half in zip((w1, w3), gate_up.split(e.H, 1), strict=True):
            inner.grouped_mm(rows, w, half, columns=outputs.get("w13_amax"))
        of_h = _part(scratch, "out")
        if "in.b" in scratch:
            of_h["b"] = scratch["in.b"].view(-1, e.D, e.H)
        outer = Call(e.output_problem, config, device, offs, of_h, gated=True)
        if config.format == "bf16":
            swiglu.swiglu(gate_up, scratch["hidden"])
            rows = outer.rows("a", scratch["hidden"])
        else:
            rows = _rows(outer, gate_up, outputs, "h")
        outer.grouped_mm(rows, w2, outputs["out"], columns=outputs.get("w2_amax"))

    with on_device(offs):
        replayed(("experts", e, config, device), (x, w1, w2, w3, offs), (outputs, scratch), run)


def _rows(call, x: torch.Tensor, outputs: Tensors, name: str):
    """The rows of x, and its tokens into those of `outputs`."""
    if f"{name}_tokens" not in outputs:
        return call.rows("a", x)
    tokens = {"a_tokens": outputs[f"{name}_tokens"], "a_tokens_scale": outputs[f"{name}_tokens_scale"]}
    return call.rows_and_tokens("a", x, tokens)[0]


def gradient(
    experts: Experts,
    config: GroupedMMConfig,
    device: Device,
    dh: torch.Tensor,
    gate_up: torch.Tensor,
    offs: torch.Tensor,
    need_dx: bool,
    need_dw: bool,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Of the gradient of gate_up [M, 2H], given that of h, dh [M, H], make what `dgrad` and `wgrad` multiply, those of
    them that are needed: the outputs of `gradient_spec`, or in the `places` of dh and gate_up, which may become
    anything if they are not."""
    e = experts
    if select(config, device).gemm == "emulated":
        gate_up.copy_(emulation.swiglu_gradient(dh, gate_up))
        return

    def run() -> None:
        if config.format == "bf16":
            swiglu.swiglu_gradient_(dh, gate_up)
            return
        where, tensors = places(config, select(config, device), e.x_dtype), {**scratch, **outputs}
        if where.rows == "dh":
            tensors["d"] = dh.view(torch.float8_e4m3fn)
        if where.tokens == "gate_up":
            tensors["d_tokens"] = gate_up
        call = Call(e.joint_problem, config, device, offs, tensors)
        call.prepare(dh.shape[0], scratch)
        need_tokens, tiled = need_dw and not saves_input(config), call.implementation.scale_tiles
        if need_dx and need_tokens and not tiled:
            call.rows_and_tokens("d", gate_up, tensors, dh)
            return
        if need_dx:
            call.rows("d", gate_up, dh)
        else:
            swiglu.swiglu_gradient_(dh, gate_up)
        if need_tokens and tiled:
            halves = _halves(call, e, tensors["d_tokens"], tensors["d_tokens_scale"])
            for d, (data, scale) in zip(gate_up.split(e.H, 1), halves, strict=True):
                call.tokens("d", d, {"d": data, "d_scale": scale})
        elif need_tokens:
            call.tokens("d_tokens", gate_up, tensors)

    facts = "gradient", e, config, device, need_dx, need_dw
    with on_device(offs):
        replayed(facts, (dh, gate_up, offs), (outputs, scratch), run)


def dgrad(
    experts: Experts,
    config: GroupedMMConfig,
    device: Device,
    d: torch.Tensor,
    d_scale: torch.Tensor | None,
    w13: Sequence[torch.Tensor] | Prepared,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
    w13_amax: torch.Tensor | None = None,
) -> None:
    """Write the outputs of `dgrad_spec`.

    Args:
        d, d_scale: the rows that `gradient` has left, with their scale if they have one.
        w13: (w1, w3), or both prepared side by side (`prepare_weights`).
        w13_amax: the forward's, if it gave one.
    """
    e = experts
    if select(config, device).gemm == "emulated":
        joint = w13 if isinstance(w13, Prepared) else torch.cat(list(w13), 1).mT
        pipeline.backward(e.joint_problem, config, device, d, (), joint, offs, {"dA": outputs["dx"]}, {})
        return

    def run() -> None:
        call = Call(e.joint_problem, config, device, offs, scratch)
        call.prepare(d.shape[0], scratch)
        data = d
        if places(config, call.implementation, e.x_dtype).rows == "dh":
            data = d.view(torch.float8_e4m3fn)
        rows = call.rows("d", d) if config.format == "bf16" else (data, call.rows_first(d_scale))
        weights = w13 if isinstance(w13, Prepared) else [w.mT for w in w13]
        call.grouped_mm(rows, weights, outputs["dx"], amax=w13_amax)

    with on_device(offs):
        replayed(("dgrad", e, config, device), (d, d_scale, w13, w13_amax, offs), (outputs, scratch), run)


def wgrad(
    experts: Experts,
    config: GroupedMMConfig,
    device: Device,
    d_tokens: torch.Tensor,
    d_tokens_scale: torch.Tensor | None,
    x_saved: tuple[torch.Tensor, ...],
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Write the outputs of `wgrad_spec`.

    Args:
        d_tokens, d_tokens_scale: the tokens that `gradient` has left, with their scale if they have one.
        x_saved: ``(x,)`` if `saves_input(config)`, else ``(x_tokens, x_tokens_scale)``.
    """
    e = experts
    grads = outputs["dw1"].mT, outputs["dw3"].mT
    if select(config, device).gemm == "emulated":
        for d, grad in zip(d_tokens.split(e.H, 1), grads, strict=True):
            pipeline.backward(e.input_problem, config, device, d, x_saved, grad, offs, {"dB": grad}, {})
        return

    def run() -> None:
        call = Call(e.joint_problem, config, device, offs, scratch)
        call.prepare(e.M, scratch)
        if saves_input(config):
            for d, grad in zip(d_tokens.split(e.H, 1), grads, strict=True):
                call.wgrad_hp(x_saved[0], d, grad)
            return
        x, x_scale = x_saved
        a = call.saved_tokens((x, x_scale))
        for half, grad in zip(_halves(call, e, d_tokens, d_tokens_scale), grads, strict=True):
            call.wgrad(a, half, grad)

    with on_device(offs):
        replayed(("wgrad", e, config, device), (d_tokens, d_tokens_scale, x_saved, offs), (outputs, scratch), run)


def prepare_weights(
    experts: Experts,
    config: GroupedMMConfig,
    device: Device,
    w1: torch.Tensor,
    w2: torch.Tensor,
    w3: torch.Tensor,
) -> tuple[Prepared, Prepared, Prepared, Prepared, Prepared]:
    """For any number of steps: w1, w2, w3 of `forward`, w2 of its `pipeline.backward`, w13 of `dgrad`. Not for bf16."""
    amax = pipeline.no_maxima(config, device, w1)
    of_w1, of_w3 = (pipeline.prepare_weights(experts.input_problem, config, device, w, columns=amax) for w in (w1, w3))
    joint = pipeline.prepare_weights(experts.joint_problem, config, device, [w1.mT, w3.mT], amax=amax)
    of_w2, of_w2_dgrad = pipeline.prepare_both(experts.output_problem, config, device, w2.mT)
    return of_w1, of_w2, of_w3, of_w2_dgrad, joint


def _halves(call: Call, e: Experts, data: torch.Tensor, scale: torch.Tensor | None):
    """The wgrad operands of dg and du in that of both."""
    both = slice(0, e.H), slice(e.H, 2 * e.H)
    if call.implementation.straight_tokens:
        return [(data[:, own], None) for own in both]
    assert scale is not None, "a wgrad operand in 8 bits has scales"
    if call.implementation.scale_tiles:
        return [(data[own], scale[half]) for half, own in enumerate(both)]
    if call.config.format == "fp8_rowwise":
        return [(data[own], scale[:, own]) for own in both]
    return [(data[own], call.rows_first(scale)[own]) for own in both]


@lru_cache(maxsize=4096)
def warm_up(experts: Experts, config: GroupedMMConfig, device: torch.device) -> None:
    """`pipeline.warm_up` for all that a step of `experts` launches."""
    e = experts
    if device.type != "cuda":
        return
    view = pipeline.device_of(device.type, device.index)
    if select(config, view).gemm == "emulated":
        return
    pipeline.warm_up(e.output_problem, config, device)
    small = replace(e, M=16, G=1)

    def tensors(spec: Callable[..., Spec], *args: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        own, of_all = (spec(experts, config, view, *args) for experts in (small, e))
        scratch = with_maps(own, of_all, small.input_problem)
        return pipeline.allocate(own.outputs, device), pipeline.allocate(scratch, device)

    x = torch.zeros(small.M, e.D, dtype=getattr(torch, e.x_dtype), device=device)
    w1 = torch.zeros(1, e.H, e.D, dtype=getattr(torch, e.w_dtype), device=device)
    w2, offs = w1.mT.contiguous(), torch.full((1,), small.M, dtype=torch.int32, device=device)
    for save in (False, True):
        outputs, scratch = tensors(forward_spec, save)
        forward(e, config, view, x, w1, w2, w1, offs, outputs, scratch)
    h = x.new_zeros(small.M, e.H)
    swiglu_into(outputs["gate_up"], h)
    where = places(config, select(config, view), e.x_dtype)
    for needs in ((True, False), (False, True), (True, True)):
        d, scratch = tensors(gradient_spec, *needs)
        gradient(e, config, view, h, outputs["gate_up"], offs, *needs, d, scratch)
    d |= {"dh": h, "gate_up": outputs["gate_up"]}
    grads, scratch = tensors(dgrad_spec)
    dgrad(e, config, view, d[where.rows], d.get("d_scale"), (w1, w1), offs, grads, scratch)
    saved = (x,) if saves_input(config) else (outputs["x_tokens"], outputs["x_tokens_scale"])
    dw, scratch = tensors(wgrad_spec)
    wgrad(e, config, view, d[where.tokens], d.get("d_tokens_scale"), saved, offs, dw, scratch)
    torch.cuda.synchronize(device)


def swiglu_into(gate_up: torch.Tensor, h: torch.Tensor) -> None:
    """h [M, H] = silu(g) u of gate_up [M, 2H], contiguous, on a GPU: what an input-saving config's backward needs."""
    with on_device(gate_up):
        swiglu.swiglu(gate_up, h)


def _emulated_forward(config: GroupedMMConfig, x, w1, w2, w3, offs, gate_up, outputs: Tensors) -> None:
    def multiply(a: torch.Tensor, w: torch.Tensor | Prepared, name: str, out: torch.Tensor) -> None:
        tensors = {"out": out}
        if f"{name}_tokens" in outputs:
            tensors |= {"a_tokens": outputs[f"{name}_tokens"], "a_tokens_scale": outputs[f"{name}_tokens_scale"]}
        pipeline.emulated_forward(config, a, w if isinstance(w, Prepared) else w.mT, offs, tensors)

    gates, ups = gate_up.split(gate_up.shape[1] // 2, 1)
    multiply(x, w1, "x", gates)
    multiply(x, w3, "", ups)
    multiply(emulation.swiglu(gate_up), w2, "h", outputs["out"])
