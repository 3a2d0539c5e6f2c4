"""Forward and backward of one grouped GEMM: what every frontend calls.

A frontend asks for a spec (the shapes and dtypes of outputs and scratch, from static shapes and the config), allocates
by it, and hands the tensors in by name. On a GPU nothing here allocates, synchronises or reads the environment, except
where the dispatch table names torch's or the emulated GEMM, which allocate.

M tokens, K contraction of the forward, N output features, G groups, Mp padded tokens (`xmoe.operands`).
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from xmoe.config import Accumulation, GroupedMMConfig
from xmoe.kernels import emulation
from xmoe.kernels.dispatch import Device, Elements, Implementation, select
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, TOKEN_TILE, QuantizedOperand, padded_tokens

try:
    import triton  # noqa: F401

    from xmoe.kernels import grouped_gemm, quantize, quantize_blocks, tiles, tuning

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Problem:
    """The static facts of one grouped GEMM. Dtypes are names ("bfloat16", "float32")."""

    M: int
    N: int
    K: int
    G: int
    a_dtype: str = "bfloat16"
    b_dtype: str = "bfloat16"
    out_dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be: its shape and its dtype's name."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Spec:
    """What a call writes: its outputs, and scratch whose content means nothing afterwards."""

    outputs: dict[str, TensorSpec] = field(default_factory=dict)
    scratch: dict[str, TensorSpec] = field(default_factory=dict)


@lru_cache
def device_of(type: str, index: int | None = None) -> Device:
    """The dispatch table's view of a torch device."""
    if type != "cuda":
        return Device(type, triton=HAS_TRITON)
    return Device(type, torch.cuda.get_device_capability(index), HAS_TRITON)


def saves_input(config: GroupedMMConfig) -> bool:
    """Whether the backward takes A itself (its wgrad is in bf16) instead of A's quantized wgrad operand."""
    return config.wgrad_with_hp or config.format == "bf16"


# --------------------------------------------------------------------------------------------------------------- specs


def _operand(name: str, lead: tuple[int, ...], C: int, format: str, elements: Elements) -> dict[str, TensorSpec]:
    """The tensors of an operand [*lead, C] that is quantized along C."""
    if elements == "bf16":
        return {name: TensorSpec((*lead, C), "bfloat16")}
    scale = TensorSpec(lead, "float32")
    if format != "fp8_rowwise":
        dtype = "float32" if format == "fp8_blockwise" else "float8_e8m0fnu"
        scale = TensorSpec((*lead, -(-C // SCALE_BLOCKS[format])), dtype)
    return {name: TensorSpec((*lead, C), "float8_e4m3fn"), f"{name}_scale": scale}


def _weights(out: int, contraction: int, p: Problem, config: GroupedMMConfig, impl: Implementation):
    if config.format == "bf16":
        return {} if p.b_dtype == "bfloat16" else {"b": TensorSpec((p.G, out, contraction), "bfloat16")}
    specs = _operand("b", (p.G, out), contraction, config.format, impl.elements)
    if config.format == "fp8_rowwise":
        specs["b_amax"] = TensorSpec((p.G, out), "int32")
    if config.format == "fp8_blockwise":
        specs["b_scale"] = TensorSpec((p.G, -(-out // FP8_BLOCK), -(-contraction // FP8_BLOCK)), "float32")
    return specs


def _rows(name: str, C: int, dtype: str, p: Problem, config: GroupedMMConfig, impl: Implementation):
    if config.format == "bf16":
        return {} if dtype == "bfloat16" else {name: TensorSpec((p.M, C), "bfloat16")}
    return _operand(name, (p.M,), C, config.format, impl.elements)


def _tokens(name: str, C: int, p: Problem, config: GroupedMMConfig, straight: bool) -> dict[str, TensorSpec]:
    """The wgrad operand, in 8 bits."""
    Mp = padded_tokens(p.M, p.G)
    if straight:
        scale = TensorSpec((Mp // MX_BLOCK, C), "float8_e8m0fnu")
        return {name: TensorSpec((p.M, C), "float8_e4m3fn"), f"{name}_scale": scale}
    specs = _operand(name, (C,), Mp, config.format, "fp8")
    if config.format == "fp8_rowwise":
        specs[f"{name}_scale"] = TensorSpec((p.G, C), "float32")
    return specs


def _tokens_scratch(name: str, C: int, p: Problem, config: GroupedMMConfig) -> dict[str, TensorSpec]:
    return {f"{name}_amax": TensorSpec((p.G, C), "int32")} if config.format == "fp8_rowwise" else {}


def _map(tile: int, p: Problem) -> dict[str, TensorSpec]:
    """The map of `tile`-token tiles; GEMM and quantizer share it where their tiles are alike."""
    return {
        f"tiles_{tile}": TensorSpec((max(1, tiles.max_tiles(p.M, p.G, tile)), tiles.TILE_FIELDS), "int32"),
        f"groups_{tile}": TensorSpec((p.G + 1, tiles.TILE_FIELDS), "int32"),
    }


def forward_outputs(p: Problem, config: GroupedMMConfig, impl: Implementation, save_tokens: bool):
    """``out`` [M, N]; with `save_tokens`, unless `saves_input(config)`, the wgrad operand of A: ``a_tokens`` and
    ``a_tokens_scale``: e4m3 [K, Mp] and float32 [G, K] or [K, Mp/128] or E8M0 [K, Mp/32], or, where the implementation
    keeps tokens straight, e4m3 [M, K] and E8M0 [Mp/32, K]. In 8 bits whatever the wgrad multiplies: that is what lives
    until the backward."""
    out = {"out": TensorSpec((p.M, p.N), p.out_dtype)}
    if not save_tokens or saves_input(config):
        return out
    return out | _tokens("a_tokens", p.K, p, config, impl.straight_tokens)


@lru_cache(maxsize=4096)
def forward_spec(problem: Problem, config: GroupedMMConfig, device: Device, save_tokens: bool = True) -> Spec:
    """Outputs: `forward_outputs`."""
    p, impl = problem, select(config, device)
    spec = Spec(forward_outputs(p, config, impl, save_tokens))
    if impl.gemm == "emulated":
        return spec
    if "a_tokens" in spec.outputs:
        spec.scratch.update(_tokens_scratch("a_tokens", p.K, p, config) | _map(TOKEN_TILE, p))
    spec.scratch.update(_rows("a", p.K, p.a_dtype, p, config, impl) | _weights(p.N, p.K, p, config, impl))
    spec.scratch.update(_map(_gemm_tiles("grouped_mm", impl.elements, p, config, device, p.out_dtype).rows, p))
    return spec


@lru_cache(maxsize=4096)
def backward_spec(
    problem: Problem, config: GroupedMMConfig, device: Device, need_dA: bool = True, need_dB: bool = True
) -> Spec:
    """Outputs: ``dA`` [M, K] and ``dB`` [G, K, N], those needed, in the dtypes of A and B. The gradient of the output
    comes in `problem.out_dtype`."""
    p, impl = problem, select(config, device)
    spec = Spec()
    if need_dA:
        spec.outputs["dA"] = TensorSpec((p.M, p.K), p.a_dtype)
    if need_dB:
        spec.outputs["dB"] = TensorSpec((p.G, p.K, p.N), p.b_dtype)
    if impl.gemm == "emulated":
        return spec
    if need_dA:
        spec.scratch.update(_rows("d", p.N, p.out_dtype, p, config, impl) | _weights(p.K, p.N, p, config, impl))
        spec.scratch.update(_map(_gemm_tiles("grouped_mm", impl.elements, p, config, device, p.a_dtype).rows, p))
    if need_dB:
        spec.scratch.update(_map(TOKEN_TILE, p))
        if saves_input(config):
            for name, C, dtype in (("a_hp", p.K, p.a_dtype), ("d_hp", p.N, p.out_dtype)):
                if dtype != "bfloat16":
                    spec.scratch[name] = TensorSpec((p.M, C), "bfloat16")
        elif impl.straight_tokens:
            spec.scratch["a_tokens_bf16"] = TensorSpec((p.M, p.K), "bfloat16")
            spec.scratch["d_tokens"] = TensorSpec((p.M, p.N), "bfloat16")
        else:
            spec.scratch.update(
                _tokens("d_tokens", p.N, p, config, False) | _tokens_scratch("d_tokens", p.N, p, config)
            )
    return spec


# --------------------------------------------------------------------------------------------------------------- calls


@lru_cache
def _programs(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _gemm_tiles(kernel: str, elements: Elements, p: Problem, config: GroupedMMConfig, device: Device, out: str):
    assert device.capability is not None, f"Triton GEMMs need a compute capability, got {device}"
    precise = config.accumulation is Accumulation.PRECISE and elements != "blockwise"  # which is so at any rate
    heavy = out == "float32" or precise
    return tuning.lookup(kernel, elements, device.capability, p.M, p.G, heavy)


class _Call:
    """The stages of one call: quantize, map, multiply. Reads sizes from the tensors, tile shapes from the problem."""

    def __init__(
        self,
        problem: Problem,
        config: GroupedMMConfig,
        device: Device,
        offs: torch.Tensor,
        scratch: Tensors,
        gated: bool = False,
    ):
        """`gated`: the activations that come are [M, 2K], for their SwiGLU [M, K]."""
        self.problem, self.config, self.device, self.gated = problem, config, device, gated
        self.implementation = select(config, device)
        self.offs, self.scratch = offs, scratch
        self.precise = config.accumulation is Accumulation.PRECISE
        self.programs = _programs(offs.device.index)
        self.mapped: set[int] = set()

    def map(self, M: int, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        token_tiles, groups = self.scratch[f"tiles_{tile}"], self.scratch[f"groups_{tile}"]
        if tile not in self.mapped:
            tiles.map_tiles(self.offs, M, tile, token_tiles, groups)
            self.mapped.add(tile)
        return token_tiles, groups

    def gemm_tiles(self, kernel: str, elements: Elements, out: torch.Tensor):
        dtype = str(out.dtype).removeprefix("torch.")
        return _gemm_tiles(kernel, elements, self.problem, self.config, self.device, dtype)

    def rows(self, name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The operand of x's rows; of those of its SwiGLU where x is `gated`."""
        if self.config.format == "bf16":
            return self.cast(name, x), None
        data, scale = self.scratch[name], self.scratch.get(f"{name}_scale")
        quantize.quantize_rows(x, self.config.format, data, scale, self.programs, gated=self.gated)
        return data, scale

    def weights(self, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """b [G, P, C], contraction C."""
        if self.config.format == "bf16":
            return (b if b.dtype == torch.bfloat16 else self.scratch["b"].copy_(b)), None
        data, scale = self.scratch["b"], self.scratch.get("b_scale")
        if scale is None and b.stride(2) != 1:  # bf16 in the layout of b
            data = data.view(b.shape[0], b.shape[2], b.shape[1]).mT
        quantize.quantize_weights(b, self.config.format, data, scale, self.scratch.get("b_amax"), self.programs)
        return data, scale

    def cast(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.bfloat16 else self.scratch[name].copy_(x)

    def tokens(
        self, name: str, x: torch.Tensor, tensors: Tensors, amax: torch.Tensor | None = None, amax_is_known: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The wgrad operand of x, `name` in `tensors`; amax as in `rows_and_amax`."""
        data, scale = tensors[name], tensors.get(f"{name}_scale")
        map = self.map(x.shape[0], TOKEN_TILE)
        if self.implementation.straight_tokens:
            quantize_blocks.quantize_tokens_straight(x, self.config.format, data, scale, *map, gated=self.gated)
        else:
            assert scale is not None, f"{name} has no scale"
            amax = self.scratch.get(f"{name}_amax") if amax is None else amax
            quantize.quantize_tokens(
                x, self.config.format, data, scale, amax, *map, amax_is_known=amax_is_known, gated=self.gated
            )
        return data, scale

    def rows_and_tokens(self, name: str, x: torch.Tensor, tensors: Tensors):
        """Both operands of x, the rows `name` of the scratch and the tokens `name`_tokens of `tensors`."""
        amax = self.scratch.get(f"{name}_tokens_amax")
        rows, amax_is_known = self.rows_and_amax(name, x, amax)
        return rows, self.tokens(f"{name}_tokens", x, tensors, amax, amax_is_known)

    def rows_and_amax(self, name: str, x: torch.Tensor, amax: torch.Tensor | None):
        """(rows, whether `amax` was filled): with the maxima that `tokens` needs, where they come at no cost."""
        if self.config.format != "fp8_rowwise":
            return self.rows(name, x), False
        assert amax is not None, "fp8_rowwise needs amax"
        rows = self.scratch[name], self.scratch[f"{name}_scale"]
        _, groups = self.map(x.shape[0], TOKEN_TILE)
        columns = amax, groups
        return rows, quantize.quantize_rows(x, self.config.format, *rows, self.programs, columns, gated=self.gated)

    def grouped_mm(self, a: tuple[torch.Tensor, torch.Tensor | None], b: torch.Tensor, out: torch.Tensor) -> None:
        """out[M, P] = a[M, C] @ b[G, P, C]^T, b still to be quantized along C."""
        tuned = self.gemm_tiles("grouped_mm", self.implementation.elements, out)
        a_data, a_scale = a
        b_data, b_scale = self.weights(b)
        token_tiles, groups = self.map(a_data.shape[0], tuned.rows)
        if self.implementation.gemm == "torch":
            _torch_grouped_mm(a_data, a_scale, b_data, b_scale, groups, out, not self.precise)
            return
        grouped_gemm.grouped_mm(
            a_data, a_scale, b_data, b_scale, token_tiles, groups, out, tuned, self.programs, self.precise,
            self.implementation.elements == "blockwise",
        )  # fmt: skip

    def grouped_mm_tokens(self, a, a_scale, b, b_scale, groups, out: torch.Tensor) -> None:
        """out[G, K, N] from wgrad operands of A and dOut; an out that is stored [G, N, K] swaps them."""
        if out.stride(2) != 1:
            a, a_scale, b, b_scale, out = b, b_scale, a, a_scale, out.mT
        if self.implementation.gemm == "torch":
            _torch_grouped_mm_tokens(a, a_scale, b, b_scale, groups, out, not self.precise)
            return
        elements = self.implementation.wgrad_elements
        tuned = self.gemm_tiles("grouped_mm_tokens", elements, out)
        grouped_gemm.grouped_mm_tokens(
            a, a_scale, b, b_scale, groups, out, tuned, self.programs, self.precise, elements == "blockwise"
        )

    def wgrad_hp(self, A: torch.Tensor, dOut: torch.Tensor, dB: torch.Tensor) -> None:
        """dB from A and dOut in bf16, as they lie."""
        _, groups = self.map(dOut.shape[0], TOKEN_TILE)
        self.grouped_mm_tokens(self.cast("a_hp", A), None, self.cast("d_hp", dOut), None, groups, dB)

    def wgrad(
        self,
        a: tuple[torch.Tensor, torch.Tensor],
        d: tuple[torch.Tensor, torch.Tensor | None],
        M: int,
        dB: torch.Tensor,
    ) -> None:
        """dB from the wgrad operands of A, as saved, and of dOut."""
        token_tiles, groups = self.map(M, TOKEN_TILE)
        a_data, a_scale = a
        if self.implementation.straight_tokens:
            a_data, a_scale = self.scratch["a_tokens_bf16"], None
            quantize_blocks.dequantize_tokens_straight(*a, a_data, token_tiles, groups)
        self.grouped_mm_tokens(a_data, a_scale, *d, groups, dB)


def _on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device: make it the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _ends(groups: torch.Tensor) -> torch.Tensor:
    return groups[:-1, 1].contiguous()


def _torch_grouped_mm(a, a_scale, b, b_scale, groups, out, fast: bool) -> None:
    ends = _ends(groups)
    if a_scale is None:
        result = torch._grouped_mm(a, b.mT, ends)
    else:
        result = torch._scaled_grouped_mm(
            a, b.mT, a_scale, b_scale, ends, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    out.copy_(result)
    rows = torch.arange(out.shape[0], device=out.device)
    out.masked_fill_((rows >= groups[-1, 0])[:, None], 0.0)


def _torch_grouped_mm_tokens(a, a_scale, b, b_scale, groups, out, fast: bool) -> None:
    if a_scale is not None:
        ends = groups[1:, 2] * TOKEN_TILE
        result = torch._scaled_grouped_mm(
            a, b.mT, a_scale.flatten(), b_scale.flatten(), ends, out_dtype=torch.bfloat16, use_fast_accum=fast
        )
    else:
        result = torch._grouped_mm(a.mT, b, _ends(groups))
    out.copy_(result)
    out.masked_fill_((groups[:-1, 0] == groups[:-1, 1])[:, None, None], 0.0)


def forward(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    A: torch.Tensor,
    B: torch.Tensor,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Write the outputs of `forward_spec`.

    Args:
        A: bf16 or fp32 [M, K].
        B: bf16 or fp32 [G, K, N], any strides that leave K or N contiguous.
        offs: int32 [G], cumulative group ends; any values (docs/design.md).
        outputs, scratch: by the names of `forward_spec`, contiguous; ``a_tokens`` is written where it is given.
    """
    if select(config, device).gemm == "emulated":
        _emulated_forward(config, A, B, offs, outputs)
        return
    with _on_device(offs):
        call = _Call(problem, config, device, offs, scratch)
        a = call.rows_and_tokens("a", A, outputs)[0] if "a_tokens" in outputs else call.rows("a", A)
        call.grouped_mm(a, B.mT, outputs["out"])


def backward(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    dOut: torch.Tensor,
    A_saved: tuple[torch.Tensor, ...],
    B: torch.Tensor,
    offs: torch.Tensor,
    outputs: Tensors,
    scratch: Tensors,
) -> None:
    """Write the outputs of `backward_spec`, those that `outputs` names.

    Args:
        dOut: bf16 or fp32 [M, N].
        A_saved: (A,) if `saves_input(config)`, else (a_tokens, a_tokens_scale); unused, and may be (), without ``dB``.
        B, offs: as in `forward`.
        outputs: ``dA`` contiguous; ``dB`` [G, K, N] contiguous, or the transposed view of a contiguous [G, N, K].
    """
    if select(config, device).gemm == "emulated":
        _emulated_backward(config, dOut, A_saved, B, offs, outputs)
        return
    with _on_device(offs):
        call = _Call(problem, config, device, offs, scratch)
        d = d_tokens = None
        if "dA" in outputs and "d_tokens" in scratch:
            d, d_tokens = call.rows_and_tokens("d", dOut, scratch)
        if "dA" in outputs:
            call.grouped_mm(d or call.rows("d", dOut), B, outputs["dA"])
        if "dB" not in outputs:
            return
        if saves_input(config):
            call.wgrad_hp(A_saved[0], dOut, outputs["dB"])
        else:
            a, a_scale = A_saved
            d_tokens = d_tokens or call.tokens("d_tokens", dOut, scratch)
            call.wgrad((a, a_scale), d_tokens, dOut.shape[0], outputs["dB"])


def _emulated_forward(config: GroupedMMConfig, A, B, offs: torch.Tensor, outputs: Tensors) -> None:
    out = outputs["out"]
    if config.format == "bf16":
        emulation.grouped_mm_bf16(A, B, offs, out=out)
        return
    a = emulation.quantize_rows(A, config.format, axis="K")
    emulation.grouped_mm(a, emulation.quantize_weights(B, "K", config.format), offs, out=out)
    if "a_tokens" in outputs:
        tokens = emulation.quantize_tokens(A, offs, config.format)
        _copy_bytes(outputs["a_tokens"], tokens.data)
        _copy_bytes(outputs["a_tokens_scale"], tokens.scale)


def _emulated_backward(config: GroupedMMConfig, dOut, A_saved, B, offs: torch.Tensor, outputs: Tensors) -> None:
    fmt, ends = config.format, offs.clamp(0, dOut.shape[0])
    if "dA" in outputs:
        if fmt == "bf16":
            emulation.grouped_mm_bf16(dOut, B.mT, offs, out=outputs["dA"])
        else:
            d = emulation.quantize_rows(dOut, fmt, axis="N")
            emulation.grouped_mm(d, emulation.quantize_weights(B, "N", fmt), offs, out=outputs["dA"])
    if "dB" in outputs:
        if saves_input(config):
            emulation.grouped_mm_tokens_bf16(A_saved[0], dOut, offs, out=outputs["dB"])
        else:
            data, scale = A_saved
            a = QuantizedOperand(data, scale, "tokens", fmt)
            emulation.grouped_mm_tokens(a, emulation.quantize_tokens(dOut, offs, fmt), ends, out=outputs["dB"])


def _copy_bytes(out: torch.Tensor, x: torch.Tensor) -> None:
    """copy_ without an fp8 cast kernel in between."""
    byte = torch.uint8 if x.element_size() == 1 else x.dtype
    out.view(byte).copy_(x.view(byte))


# -------------------------------------------------------------------------------------------------------------- set-up


def allocate(specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialised tensors by their specs."""
    return {name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device=device) for name, s in specs.items()}


@lru_cache(maxsize=4096)
def warm_up(problem: Problem, config: GroupedMMConfig, device: torch.device) -> None:
    """Compile and load every kernel that `problem` will launch, forward and backward, for either gradient or both and
    weights stored [G, K, N] or [G, N, K], so that a first launch may be recorded into a CUDA graph. Runs the calls on
    16 tokens of one expert; does nothing off CUDA."""
    if device.type != "cuda":
        return
    view = device_of(device.type, device.index)
    if select(config, view).gemm == "emulated":
        return
    M = 16
    small = replace(problem, M=M, G=1)
    names = {**forward_spec(problem, config, view).scratch, **backward_spec(problem, config, view).scratch}
    used = {int(name.removeprefix("tiles_")) for name in names if name.startswith("tiles_")}
    maps = {name: spec for tile in used for name, spec in _map(tile, small).items()}

    A = torch.zeros(M, problem.K, dtype=getattr(torch, problem.a_dtype), device=device)
    B = torch.zeros(1, problem.K, problem.N, dtype=getattr(torch, problem.b_dtype), device=device)
    dOut = torch.zeros(M, problem.N, dtype=getattr(torch, problem.out_dtype), device=device)
    offs = torch.full((1,), M, dtype=torch.int32, device=device)
    for b in (B, B.mT.contiguous().mT):
        saved = (A,)
        for save_tokens in (False, True):
            spec = forward_spec(small, config, view, save_tokens)
            outputs = allocate(spec.outputs, device)
            forward(problem, config, view, A, b, offs, outputs, allocate(spec.scratch | maps, device))
        if not saves_input(config):
            saved = (outputs["a_tokens"], outputs["a_tokens_scale"])
        for needs in ((True, False), (False, True), (True, True)):
            spec = backward_spec(small, config, view, *needs)
            grads = allocate(spec.outputs, device)
            if "dB" in grads and b is not B:
                grads["dB"] = grads["dB"].view(1, problem.N, problem.K).mT
            backward(problem, config, view, dOut, saved, b, offs, grads, allocate(spec.scratch | maps, device))
    with _on_device(offs):
        for tile in used:  # the one kernel that is specialised by G
            map = allocate(_map(tile, replace(problem, M=M)), device)
            no_tokens = torch.zeros(problem.G, dtype=torch.int32, device=device)
            tiles.map_tiles(no_tokens, M, tile, map[f"tiles_{tile}"], map[f"groups_{tile}"])
    torch.cuda.synchronize(device)
