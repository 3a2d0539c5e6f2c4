"""SwiGLU experts in one piece: what `xmoe.kernels.pipeline` is for one grouped GEMM, for the three of an expert.

M tokens sorted by expert, D model width, H hidden width, G experts held here, Mp padded tokens (`xmoe.operands`).
Weights are stored as PyTorch stores linear ones: w1, w3 [G, H, D], w2 [G, D, H], contiguous.

    g = x w1^T, u = x w3^T      h = silu(g) u      out = h w2^T

Beside three separate grouped GEMMs:
- x is quantized once for w1 and w3, and so are its tokens for both weight gradients;
- the gradient of x is one GEMM over [dg | du] and [w1 ; w3], of contraction 2H: one scale a row of both halves, one sum
  in float32. So an MX format asks for H % 32 == 0 and fp8_blockwise for H % 128 == 0 (`fuses`);
- h is rounded once, is not kept, and its gradient takes the place of what it was made of.

A step is `forward`, then `pipeline.backward` of w2 (`output_problem`), `dgrad` and `wgrad`: apart, so that a frontend
can let go of memory in between.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from xmoe.config import GroupedMMConfig
from xmoe.kernels import emulation, pipeline
from xmoe.kernels.dispatch import Device, Implementation, select
from xmoe.kernels.pipeline import HAS_TRITON, Problem, Spec, Tensors, TensorSpec, saves_input
from xmoe.operands import SCALE_BLOCKS, TOKEN_TILE, QuantizedOperand

if HAS_TRITON:
    from xmoe.kernels import swiglu


@dataclass(frozen=True, slots=True)
class Experts:
    """The static facts of a call. Dtypes are names; gate_up and h have that of x."""

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
    def output_problem(self) -> Problem:
        """h times w2."""
        return Problem(self.M, self.D, self.H, self.G, self.x_dtype, self.w_dtype, self.out_dtype)

    @property
    def joint_problem(self) -> Problem:
        """x times w1 and w3 side by side."""
        return Problem(self.M, 2 * self.H, self.D, self.G, self.x_dtype, self.w_dtype, self.x_dtype)


def fuses(config: GroupedMMConfig, H: int) -> bool:
    """Whether the halves of a contraction over 2H are whole blocks of scales."""
    return H % SCALE_BLOCKS.get(config.format, 1) == 0


# --------------------------------------------------------------------------------------------------------------- specs


def forward_outputs(e: Experts, config: GroupedMMConfig, impl: Implementation, save: bool) -> dict[str, TensorSpec]:
    """``out`` [M, D]; with `save` also ``gate_up`` [M, 2H] and, unless `saves_input(config)`, the wgrad operands of x
    and h: ``x_tokens``, ``x_tokens_scale``, ``h_tokens``, ``h_tokens_scale`` (as `pipeline.forward_outputs` has them)."""
    outputs = {"out": TensorSpec((e.M, e.D), e.out_dtype)}
    if not save:
        return outputs
    outputs["gate_up"] = TensorSpec((e.M, 2 * e.H), e.x_dtype)
    if not saves_input(config):
        outputs |= pipeline._tokens("x_tokens", e.D, e.output_problem, config, impl.straight_tokens)
        outputs |= pipeline._tokens("h_tokens", e.H, e.output_problem, config, impl.straight_tokens)
    return outputs


@lru_cache(maxsize=4096)
def forward_spec(experts: Experts, config: GroupedMMConfig, device: Device, save: bool = True) -> Spec:
    """Outputs: `forward_outputs`."""
    e, impl = experts, select(config, device)
    spec = Spec(forward_outputs(e, config, impl, save))
    if "gate_up" not in spec.outputs:
        spec.scratch["gate_up"] = TensorSpec((e.M, 2 * e.H), e.x_dtype)
    if impl.gemm == "emulated":
        return spec
    spec.scratch["hidden"] = TensorSpec((e.M, e.H), e.x_dtype)
    for part, problem, name in (("in", e.input_problem, "x"), ("out", e.output_problem, "h")):
        gemm = pipeline.forward_spec(problem, config, device, save)
        for key, tensor in gemm.scratch.items():
            key = key.replace("a_tokens", f"{name}_tokens") if key.startswith("a_tokens") else key
            key = name + key[1:] if key in ("a", "a_scale") else key
            spec.scratch[key if _is_map(key) else f"{part}.{key}"] = tensor
    return spec


def _is_map(name: str) -> bool:
    return name.startswith(("tiles_", "groups_"))


@lru_cache(maxsize=4096)
def dgrad_spec(experts: Experts, config: GroupedMMConfig, device: Device, need_dx: bool = True) -> Spec:
    """Outputs: ``dx`` [M, D] in x_dtype with `need_dx`; in fp8_rowwise also ``amax`` int32 [G, 2H], for `wgrad`."""
    e, impl = experts, select(config, device)
    spec = Spec()
    if need_dx:
        spec.outputs["dx"] = TensorSpec((e.M, e.D), e.x_dtype)
        if impl.gemm == "emulated":
            return spec
        if config.format == "fp8_rowwise" and not saves_input(config):
            spec.outputs["amax"] = TensorSpec((e.G, 2 * e.H), "int32")
        joint = pipeline.backward_spec(e.joint_problem, config, device, True, False)
        spec.scratch.update(joint.scratch)
        if config.format == "fp8_rowwise":
            spec.scratch.update(pipeline._map(TOKEN_TILE, e.joint_problem))
        if config.format == "bf16":
            spec.scratch["b"] = TensorSpec((e.G, 2 * e.H, e.D), "bfloat16")
    return spec
