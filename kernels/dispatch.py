"""The dispatch table: which implementation a config gets on a device, and why.

`select` is a pure function of (config, device), so that every line of the table can be tested without the device.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from xmoe.config import Accumulation, GroupedMMConfig, KernelPreference

Elements = Literal["fp8", "blockwise", "mx", "bf16"]


class UnsupportedError(ValueError):
    """The device cannot run the config under the kernel preference asked for; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Device:
    """What the dispatch table asks of a device."""

    type: str
    """"cuda" or "cpu" (or another torch device type)."""
    capability: tuple[int, int] | None = None
    """CUDA compute capability; None off CUDA."""
    triton: bool = True
    """Whether Triton can be imported."""

    def __str__(self) -> str:
        return self.type if self.capability is None else f"sm_{self.capability[0]}{self.capability[1]}"


@dataclass(frozen=True, slots=True)
class Implementation:
    """One line of the dispatch table."""

    name: str
    gemm: Literal["triton", "torch", "emulated"]
    """Whose grouped GEMM runs. The quantizers are Triton's unless this is "emulated"."""
    elements: Elements
    """What fwd and dgrad multiply: e4m3 with scales for the sum ("fp8") or for each 128-long partial sum ("blockwise"),
    e4m3 that the tensor core scales ("mx"), or bf16 (dequantized exactly)."""
    wgrad_elements: Elements
    reason: str
    advice: str = ""
    """What would give a faster implementation; empty where there is none."""
    warp_specialized: bool = False
    """Whether the "blockwise" GEMMs are those of `grouped_gemm_hopper`, in Gluon, Triton's lower language. Their scales
    lie block after block: [ceil(C/128), M] of rows, [Mp/128, C] of a wgrad operand."""

    @property
    def straight_tokens(self) -> bool:
        """Whether the wgrad operands of an MX format keep the layout of their tensors: its bf16 MMAs read either order,
        where those of 8 bits want the tokens last."""
        return self.gemm == "triton" and self.wgrad_elements == "bf16"

    @property
    def scale_tiles(self) -> bool:
        """Whether the scales of all operands lie in the tensor core's tiles (`xmoe.operands.SCALE_TILE_ROWS`)."""
        return self.elements == "mx"


def _emulated(reason: str, advice: str) -> Implementation:
    return Implementation("emulated", "emulated", "bf16", "bf16", reason, advice)


_GPU = "an NVIDIA GPU of compute capability 8.9 or higher (Ada, Hopper, Blackwell)"
_GPU_ADVICE = f"{_GPU} runs the Triton kernels"


def has_warp_specialized(capability: tuple[int, int]) -> bool:
    """Whether `grouped_gemm_hopper` has "blockwise" GEMMs for this GPU: setmaxnreg and wgmma are sm_90's alone."""
    return capability == (9, 0)


@lru_cache
def select(config: GroupedMMConfig, device: Device) -> Implementation:
    """The implementation that `config` gets on `device`.

    Raises:
        UnsupportedError: the kernel preference names an implementation that the device or the recipe does not have.
    """
    preference, fmt = config.kernel_preference, config.format
    if preference is KernelPreference.EMULATED:
        return _emulated("asked for (kernel_preference=emulated)", "")

    capability = device.capability if device.type == "cuda" else None
    if capability is None or capability < (8, 9):
        if preference is KernelPreference.AUTO:
            return _emulated(
                "no CUDA device" if capability is None else f"{device} has no fp8 tensor cores", _GPU_ADVICE
            )
        raise UnsupportedError(
            f"kernel_preference={preference} cannot run {config.recipe} on {device}: it needs {_GPU}; "
            "use kernel_preference=auto or emulated"
        )

    if not device.triton:
        if preference is KernelPreference.AUTO:
            return _emulated("Triton is not installed", "pip install triton")
        raise UnsupportedError(f"kernel_preference={preference} needs Triton for the quantizers: pip install triton")

    wgrad = "bf16" if config.wgrad_with_hp else None
    if preference is KernelPreference.TORCH:
        if fmt == "bf16":
            return Implementation("torch-bf16", "torch", "bf16", "bf16", "torch._grouped_mm, as asked")
        if fmt == "fp8_rowwise" and capability[0] == 9:
            reason = "torch._scaled_grouped_mm, as asked; it rounds float32 outputs to bf16 first"
            return Implementation("torch-fp8", "torch", "fp8", wgrad or "fp8", reason)
        raise UnsupportedError(
            f"kernel_preference=torch cannot run {config.recipe} on {device}: torch's scaled grouped GEMM "
            + ("has no blockwise scales" if fmt == "fp8_blockwise" else "is wired up for fp8_rowwise on sm_90 only")
            + "; use kernel_preference=auto or triton"
        )

    if fmt == "bf16":
        return Implementation("triton-bf16", "triton", "bf16", "bf16", "bf16 tensor cores")
    unit = {9: "wgmma", 10: "tcgen05"}.get(capability[0], "mma")
    if fmt == "fp8_blockwise":
        reason = f"fp8 {unit} on {device}, scaled and summed in float32 every 128"
        if has_warp_specialized(capability):
            reason += "; warps with roles, in Gluon"
            return Implementation(
                "gluon-blockwise", "triton", "blockwise", wgrad or "blockwise", reason, warp_specialized=True
            )
        return Implementation("triton-blockwise", "triton", "blockwise", wgrad or "blockwise", reason)
    if fmt == "fp8_rowwise":
        return Implementation("triton-fp8", "triton", "fp8", wgrad or "fp8", f"fp8 {unit} on {device}")
    if capability[0] == 10 and config.accumulation is Accumulation.FAST:
        return Implementation("triton-mx", "triton", "mx", wgrad or "mx", f"block-scaled tcgen05 on {device}")
    lacking = "precise accumulation" if capability[0] == 10 else f"block-scaled MMA for {device}"
    return Implementation(
        "triton-mx-via-bf16", "triton", "bf16", "bf16",
        f"no {lacking} here; e4m3 x E8M0 is exact in bf16, so bf16 MMAs have MXFP8's numerics",
        "sm_100 (B200) multiplies MXFP8 natively; fp8_rowwise is faster on this GPU",
    )  # fmt: skip
