"""SwiGLU between the two GEMMs of an expert, and its derivative.

R rows, H = the expert's hidden width. ``gate_up`` [R, 2H] holds a row's H gates g and then its H values u:

    h  = silu(g) u                      silu(g) = g s, s = 1 / (1 + exp(-g))
    dg = dh u s (1 + g (1 - s))         du = dh silu(g)

All in float32 from the stored numbers, rounded once.
"""

import torch
import triton
import triton.language as tl

from xmoe.kernels.e4m3 import hardware
from xmoe.kernels.launch import launch
from xmoe.kernels.tiles import cdiv

BLOCK = 1024
"""Elements of a program, of each of its inputs."""


@triton.jit
def sigmoid(x, HARDWARE: tl.constexpr):
    """1 / (1 + exp(-x)) of float32: four instructions, to 2^-21 or so (PTX ISA: ex2.approx 2^-22.5, rcp.approx 1 ulp);
    below -87 it is 0. By Triton's exp and division, eleven."""
    if HARDWARE:
        y = tl.inline_asm_elementwise(
            """{ .reg .f32 e;
            mul.f32 e, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 e, e;
            add.f32 e, e, 0f3F800000;
            rcp.approx.ftz.f32 $0, e; }""",
            "=f,f", (x,), dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        y = 1.0 / (1.0 + tl.exp(-x))
    return y


@triton.jit
def read(ptr, to_up, inside, GATED: tl.constexpr, HARDWARE: tl.constexpr):
    """What is stored at ptr; GATED, its SwiGLU with what is stored `to_up` elements further, rounded to its dtype."""
    x = tl.load(ptr, inside, 0.0)
    if GATED:
        g = x.to(tl.float32)
        u = tl.load(ptr + to_up, inside, 0.0).to(tl.float32)
        x = (g * sigmoid(g, HARDWARE) * u).to(x.dtype)
    return x


@triton.jit
def read_gradient(dh_ptr, gate_ptr, to_up, inside, HARDWARE: tl.constexpr):
    """(dg, du) of what is stored at dh_ptr, at gate_ptr and `to_up` elements further, rounded to its dtype."""
    dh = tl.load(dh_ptr, inside, 0.0).to(tl.float32)
    x = tl.load(gate_ptr, inside, 0.0)
    g = x.to(tl.float32)
    u = tl.load(gate_ptr + to_up, inside, 0.0).to(tl.float32)
    s = sigmoid(g, HARDWARE)
    return (dh * u * (s * (1.0 + g * (1.0 - s)))).to(x.dtype), (dh * (s * g)).to(x.dtype)


@triton.jit
def read_half_gradient(dh_ptr, gate_ptr, to_up, half, inside, HARDWARE: tl.constexpr):
    """dg (`half` 0) or du (1) of `read_gradient`, to the bit."""
    dh = tl.load(dh_ptr, inside, 0.0).to(tl.float32)
    x = tl.load(gate_ptr, inside, 0.0)
    g = x.to(tl.float32)
    u = tl.load(gate_ptr + to_up, inside & (half == 0), 1.0).to(tl.float32)
    s = sigmoid(g, HARDWARE)
    return (dh * u * (s * tl.where(half == 0, 1.0 + g * (1.0 - s), g))).to(x.dtype)


@triton.jit(do_not_specialize=["R"])
def _swiglu(gate_up_ptr, out_ptr, R, H, BLOCK: tl.constexpr, HARDWARE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < H
    gate = gate_up_ptr + row * 2 * H + col
    tl.store(out_ptr + row * H + col, read(gate, H, inside, True, HARDWARE), inside)


@triton.jit(do_not_specialize=["R"])
def _swiglu_gradient(dh_ptr, gate_up_ptr, R, H, BLOCK: tl.constexpr, HARDWARE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < H
    gate = gate_up_ptr + row * 2 * H + col
    dg, du = read_gradient(dh_ptr + row * H + col, gate, H, inside, HARDWARE)
    tl.store(gate, dg, inside)
    tl.store(gate + H, du, inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor) -> None:
    """out [R, H] of gate_up [R, 2H], both contiguous, of one dtype (bf16 or fp32)."""
    R, H = out.shape
    assert gate_up.shape == (R, 2 * H), f"gate_up {gate_up.shape}: expected {(R, 2 * H)}"
    if R:
        launch(_swiglu, (R, cdiv(H, BLOCK)), gate_up, out, R, H, BLOCK=BLOCK, HARDWARE=hardware(gate_up))


def swiglu_gradient_(dh: torch.Tensor, gate_up: torch.Tensor) -> None:
    """Puts the gradient of gate_up [R, 2H] in its place, given that of the output, dh [R, H]."""
    R, H = dh.shape
    assert gate_up.shape == (R, 2 * H), f"gate_up {gate_up.shape}: expected {(R, 2 * H)}"
    if R:
        launch(_swiglu_gradient, (R, cdiv(H, BLOCK)), dh, gate_up, R, H, BLOCK=BLOCK, HARDWARE=hardware(gate_up))
