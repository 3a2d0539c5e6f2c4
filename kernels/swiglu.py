"""SwiGLU between the two GEMMs of an expert, and its derivative.

R rows, H = the expert's hidden width. ``gate_up`` [R, 2H] holds a row's H gates g and then its H values u:

    h  = silu(g) u                      silu(g) = g s, s = 1 / (1 + exp(-g))
    dg = dh u s (1 + g (1 - s))         du = dh silu(g)

All in float32 from the stored numbers, rounded once.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.launch import launch
from xmoe.kernels.tiles import cdiv

BLOCK = 1024
"""Elements of a program, of each of its inputs."""


@triton.jit
def swiglu_value(g, u):
    return g / (1.0 + tl.exp(-g)) * u


@triton.jit
def swiglu_gradient(dh, g, u):
    """(dg, du)"""
    s = 1.0 / (1.0 + tl.exp(-g))
    return dh * u * (s * (1.0 + g * (1.0 - s))), dh * (g * s)


@triton.jit
def read(ptr, to_up, inside, GATED: tl.constexpr):
    """What is stored at ptr; GATED, its SwiGLU with what is stored `to_up` elements further, rounded to its dtype."""
    x = tl.load(ptr, inside, 0.0)
    if GATED:
        up = tl.load(ptr + to_up, inside, 0.0)
        x = swiglu_value(x.to(tl.float32), up.to(tl.float32)).to(x.dtype)
    return x


@triton.jit(do_not_specialize=["R"])
def _swiglu(gate_up_ptr, out_ptr, R, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < H
    gate = gate_up_ptr + row * 2 * H + col
    tl.store(out_ptr + row * H + col, read(gate, H, inside, True), inside)


@triton.jit(do_not_specialize=["R"])
def _swiglu_gradient(dh_ptr, gate_up_ptr, R, H, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < H
    gate = gate_up_ptr + row * 2 * H + col
    g = tl.load(gate, inside, 0.0).to(tl.float32)
    u = tl.load(gate + H, inside, 0.0).to(tl.float32)
    dg, du = swiglu_gradient(tl.load(dh_ptr + row * H + col, inside, 0.0).to(tl.float32), g, u)
    tl.store(gate, dg.to(gate_up_ptr.dtype.element_ty), inside)
    tl.store(gate + H, du.to(gate_up_ptr.dtype.element_ty), inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [R, H] of gate_up [R, 2H], both contiguous, of one dtype (bf16 or fp32)."""
    R, H = out.shape
    assert gate_up.shape == (R, 2 * H), f"gate_up {gate_up.shape}: expected {(R, 2 * H)}"
    if R:
        launch(_swiglu, (R, cdiv(H, BLOCK)), gate_up, out, R, H, BLOCK=BLOCK)


def swiglu_gradient_(dh: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Puts the gradient of gate_up [R, 2H] in its place, given that of the output, dh [R, H]."""
    R, H = dh.shape
    assert gate_up.shape == (R, 2 * H), f"gate_up {gate_up.shape}: expected {(R, 2 * H)}"
    if R:
        launch(_swiglu_gradient, (R, cdiv(H, BLOCK)), dh, gate_up, R, H, BLOCK=BLOCK)
