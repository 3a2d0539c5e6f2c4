"""SwiGLU experts in one piece: what `xmoe.kernels.pipeline` is for one grouped GEMM, for the three of an expert.

M rows sorted by expert, D model width, H hidden width, G experts held here, Mp padded tokens (`xmoe.operands`).
Weights are stored as PyTorch stores linear ones: w1, w3 [G, H, D] and w2 [G, D, H], rows contiguous.

    g = x w1^T, u = x w3^T      h = silu(g) u      out = h w2^T

What three separate grouped GEMMs cannot have:
- x is quantized once for w1 and w3, and its tokens once for both weight gradients;
- h is rounded once, quantized as it is made, and not saved;
- the gradient of x is one GEMM over [dg | du] and [w1 ; w3], of contraction 2H: one scale a row for both halves, one
  sum in float32. So an MX format asks for H % 32 == 0 and fp8_blockwise for H % 128 == 0 (`whole_blocks`);
- x may come unsorted, T tokens for M = T k rows: the quantizers read it through the permutation (`permute.py`), and
  the gradients of a token's k rows are added up in the end;
- the gradients of g and u are quantized as they are found, and kept in bf16 only for a GEMM in bf16 and for the second
  pass of `fp8_rowwise`, over the tokens.

A step is `forward`, `pipeline.backward` of w2 (`Experts.output_problem`), `gradient`, `dgrad` and `wgrad`: apart, so
that a frontend can let go of memory in between.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation, pipeline
from xmoe.kernels.call import Call, on_device
from xmoe.kernels.dispatch import Device, select
from xmoe.kernels.experts_specs import (
    MAPS,
    Experts,
    Places,
    dgrad_spec,
    forward_outputs,
    forward_spec,
    gradient_outputs,
    gradient_spec,
    places,
    wgrad_spec,
)
from xmoe.kernels.replay import replayed
from xmoe.kernels.specs import HAS_TRITON, Prepared, Spec, Tensors, is_map, saves_input, with_maps

if HAS_TRITON:
    from xmoe.kernels import permute, swiglu

__all__ = [
    "MAPS", "Experts", "Places", "dgrad", "dgrad_spec", "forward", "forward_outputs", "forward_spec", "gradient",
    "gradient_outputs", "gradient_spec", "places", "prepare_weights", "swiglu_into", "warm_up", "wgrad", "wgrad_spec",
]  # fmt: skip


def _part(tensors: Tensors, part: str) -> dict[str, torch.Tensor]:
    """The tensors called "`part`.name", as name, and the maps."""
    prefix = f"{part}."
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix) or is_map(name)}


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
    order: torch.Tensor | None = None,
) -> None:
    """Write the outputs of `forward_spec`.

    Args:
        x: bf16 or fp32 [M, D] or, with ``order``, [M / k, D], contiguous.
        w1, w2, w3: bf16 or fp32, [G, H, D], [G, D, H], [G, H, D], rows contiguous; or prepared (`prepare_weights`).
        offs: int32 [G], cumulative group ends; any values (docs/design.md).
        outputs, scratch: by the names of `forward_spec`, contiguous.
        order: int32 or int64 [M], the slot of each row (`permute.py`), if x is not sorted.
    """
    e = experts
    gate_up = outputs["gate_up"] if "gate_up" in outputs else scratch["gate_up"]
    if select(config, device).gemm == "emulated":
        _emulated_forward(e, config, x, w1, w2, w3, offs, gate_up, outputs, order)
        return

    def run() -> None:
        source, index = x, None
        if order is not None:
            index = outputs["tokens"] if "tokens" in outputs else scratch["tokens"]
            permute.invert(order, e.k, index, outputs.get("place"))
            if config.format == "bf16":
                permute.gather(x, index, scratch["x_rows"])
                source, index = scratch["x_rows"], None
        inner = Call(e.input_problem, config, device, offs, _part(scratch, "in"), index=index)
        inner.prepare(outputs["out"].shape[0], outputs, scratch)
        rows = _rows(inner, source, outputs, "x")
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
        replayed(("experts", e, config, device), (x, w1, w2, w3, offs, order), (outputs, scratch), run)


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
        call.prepare(dh.shape[0], outputs, scratch)
        need_tokens, tiled = need_dw and not saves_input(config), call.implementation.scale_tiles
        if need_dx and need_tokens and not tiled:
            call.rows_and_tokens("d", gate_up, tensors, dh)
            return
        if need_dx:
            call.rows("d", gate_up, dh, gate_up if need_dw else None)
        else:
            swiglu.swiglu_gradient_(dh, gate_up)
        if need_tokens and tiled:
            halves = _halves(call, e, tensors["d_tokens"], tensors["d_tokens_scale"])
            for d, (data, scale) in zip(gate_up.split(e.H, 1), halves, strict=True):
                call.tokens("d", d, {"d": data, "d_scale": cast(torch.Tensor, scale)})
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
    maps: Tensors,
    w13_amax: torch.Tensor | None = None,
    place: torch.Tensor | None = None,
) -> None:
    """Write the outputs of `dgrad_spec`.

    Args:
        d, d_scale: the rows that `gradient` has left, with their scale if they have one.
        w13: (w1, w3), or both prepared side by side (`prepare_weights`).
        maps: the MAPS of `gradient`, by name, if it gave them.
        w13_amax, place: the forward's, if it gave them.
    """
    e = experts
    if select(config, device).gemm == "emulated":
        joint = w13 if isinstance(w13, Prepared) else torch.cat(list(w13), 1).mT
        rows = {"dA": outputs["dx"] if place is None else d.new_empty(d.shape[0], e.D)}
        pipeline.backward(e.joint_problem, config, device, d, (), joint, offs, rows, {})
        if place is not None:
            outputs["dx"].copy_(emulation.gather_sum(rows["dA"], place, e.k))
        return

    def run() -> None:
        call = Call(e.joint_problem, config, device, offs, {**scratch, **maps})
        call.prepare(d.shape[0], scratch)
        data = d
        if places(config, call.implementation, e.x_dtype).rows == "dh":
            data = d.view(torch.float8_e4m3fn)
        rows = call.rows("d", d) if config.format == "bf16" else (data, call.rows_first(d_scale))
        weights = w13 if isinstance(w13, Prepared) else [w.mT for w in w13]
        dx = outputs["dx"] if place is None else scratch["dx_rows"]
        call.grouped_mm(rows, weights, dx, amax=w13_amax)
        if place is not None:
            permute.gather_sum(dx, place, outputs["dx"])

    with on_device(offs):
        replayed(("dgrad", e, config, device), (d, d_scale, w13, w13_amax, offs, place), (outputs, scratch, maps), run)


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
    maps: Tensors,
    tokens: torch.Tensor | None = None,
) -> None:
    """Write the outputs of `wgrad_spec`.

    Args:
        d_tokens, d_tokens_scale: the tokens that `gradient` has left, with their scale if they have one.
        x_saved: ``(x,)`` if `saves_input(config)`, else ``(x_tokens, x_tokens_scale)``.
        maps: the MAPS of `gradient`, by name, if it gave them.
        tokens: the forward's, if it gave one.
    """
    e = experts
    grads = outputs["dw1"].mT, outputs["dw3"].mT
    if select(config, device).gemm == "emulated":
        x_saved = x_saved if tokens is None else (emulation.gather(x_saved[0], tokens),)
        for d, grad in zip(d_tokens.split(e.H, 1), grads, strict=True):
            pipeline.backward(e.input_problem, config, device, d, x_saved, grad, offs, {"dB": grad}, {})
        return

    def run() -> None:
        call = Call(e.joint_problem, config, device, offs, {**scratch, **maps})
        call.prepare(e.M, scratch)
        if saves_input(config):
            x = x_saved[0]
            if tokens is not None:
                permute.gather(x, tokens, scratch["x_rows"])
                x = scratch["x_rows"]
            for d, grad in zip(d_tokens.split(e.H, 1), grads, strict=True):
                call.wgrad_hp(x, d, grad)
            return
        x, x_scale = x_saved
        a = call.saved_tokens((x, x_scale))
        for half, grad in zip(_halves(call, e, d_tokens, d_tokens_scale), grads, strict=True):
            call.wgrad(a, half, grad)

    with on_device(offs):
        replayed(
            ("wgrad", e, config, device),
            (d_tokens, d_tokens_scale, x_saved, offs, tokens),
            (outputs, scratch, maps),
            run,
        )


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
    scale = scale.mT if call.implementation.warp_specialized else scale
    return [(data[own], scale[own]) for own in both]


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
    small = replace(e, M=16 * max(1, e.k), G=1)

    def tensors(spec: Callable[..., Spec], *args: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        own, of_all = (spec(experts, config, view, *args) for experts in (small, e))
        scratch = with_maps(own, of_all, small.input_problem)
        return pipeline.allocate(own.outputs, device), pipeline.allocate(scratch, device)

    order = torch.zeros(small.M, dtype=torch.int32, device=device) if e.k else None
    x = torch.zeros(small.x_rows, e.D, dtype=getattr(torch, e.x_dtype), device=device)
    w1 = torch.zeros(1, e.H, e.D, dtype=getattr(torch, e.w_dtype), device=device)
    w2, offs = w1.mT.contiguous(), torch.full((1,), small.M, dtype=torch.int32, device=device)
    for save in (False, True):
        outputs, scratch = tensors(forward_spec, save)
        forward(e, config, view, x, w1, w2, w1, offs, outputs, scratch, order)
    h = x.new_zeros(small.M, e.H)
    swiglu_into(outputs["gate_up"], h)
    where = places(config, select(config, view), e.x_dtype)
    for needs in ((True, False), (False, True), (True, True)):
        d, scratch = tensors(gradient_spec, *needs)
        gradient(e, config, view, h, outputs["gate_up"], offs, *needs, d, scratch)
    maps = {name: d.pop(name) for name in MAPS if name in d}
    d |= {"dh": h, "gate_up": outputs["gate_up"]}
    grads, scratch = tensors(dgrad_spec)
    dgrad(
        e,
        config,
        view,
        d[where.rows],
        d.get("d_scale"),
        (w1, w1),
        offs,
        grads,
        scratch,
        maps,
        None,
        outputs.get("place"),
    )
    saved = (x,) if saves_input(config) else (outputs["x_tokens"], outputs["x_tokens_scale"])
    dw, scratch = tensors(wgrad_spec)
    wgrad(
        e, config, view, d[where.tokens], d.get("d_tokens_scale"), saved, offs, dw, scratch, maps, outputs.get("tokens")
    )
    torch.cuda.synchronize(device)


def swiglu_into(gate_up: torch.Tensor, h: torch.Tensor) -> None:
    """h [M, H] = silu(g) u of gate_up [M, 2H], contiguous, on a GPU: what an input-saving config's backward needs."""
    with on_device(gate_up):
        swiglu.swiglu(gate_up, h)


def _emulated_forward(
    e: Experts, config: GroupedMMConfig, x, w1, w2, w3, offs, gate_up, outputs: Tensors, order: torch.Tensor | None
) -> None:
    def multiply(a: torch.Tensor, w: torch.Tensor | Prepared, name: str, out: torch.Tensor) -> None:
        tensors = {"out": out}
        if f"{name}_tokens" in outputs:
            tensors |= {"a_tokens": outputs[f"{name}_tokens"], "a_tokens_scale": outputs[f"{name}_tokens_scale"]}
        pipeline.emulated_forward(config, a, w if isinstance(w, Prepared) else w.mT, offs, tensors)

    if order is not None:
        tokens, place = emulation.invert(order, e.k)
        x = emulation.gather(x, tokens)
        for name, tensor in (("tokens", tokens), ("place", place)):
            if name in outputs:
                outputs[name].copy_(tensor)
    gates, ups = gate_up.split(gate_up.shape[1] // 2, 1)
    multiply(x, w1, "x", gates)
    multiply(x, w3, "", ups)
    multiply(emulation.swiglu(gate_up), w2, "h", outputs["out"])
