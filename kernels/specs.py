"""Specs: what a call of `xmoe.kernels.pipeline` writes, worked out from static facts.

M tokens, K contraction of the forward, N output features, G groups, Mp padded tokens (`xmoe.operands`).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch

from xmoe.config import Accumulation, GroupedMMConfig
from xmoe.kernels.dispatch import Device, Elements, Implementation, select
from xmoe.operands import FP8_BLOCK, MX_BLOCK, SCALE_BLOCKS, TOKEN_TILE, padded_tokens, scale_tiles_shape

try:
    import triton  # noqa: F401

    from xmoe.kernels import tiles, tuning
    from xmoe.kernels.quantize import LONGEST_ROW

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

Tensors = Mapping[str, torch.Tensor]


class Prepared(NamedTuple):
    """Weights [G, P, C] quantized along C beforehand: ``data`` is bf16, without a scale, where bf16 is multiplied."""

    data: torch.Tensor
    scale: torch.Tensor | None


Weights = torch.Tensor | Sequence[torch.Tensor] | Prepared
"""[G, P, C], contraction C; several are side by side along it."""


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
    turns: tuple[tuple[str, ...], ...] = ()
    """Names of scratch, group after group: once one is written, those before it are dead. They may share memory."""


@lru_cache
def device_of(type: str, index: int | None = None) -> Device:
    """The dispatch table's view of a torch device."""
    if type != "cuda":
        return Device(type, triton=HAS_TRITON)
    return Device(type, torch.cuda.get_device_capability(index), HAS_TRITON)


def saves_input(config: GroupedMMConfig) -> bool:
    """Whether the backward takes A itself (its wgrad is in bf16) instead of A's quantized wgrad operand."""
    return config.wgrad_with_hp or config.format == "bf16"


def finds_maxima(config: GroupedMMConfig, impl: Implementation, row: int) -> bool:
    """Whether quantizing rows of so many elements finds at no cost the maxima of their columns, which quantizing the
    columns needs."""
    return config.format == "fp8_rowwise" and impl.gemm != "emulated" and row <= LONGEST_ROW


# --------------------------------------------------------------------------------------------------------------- specs


def _operand(
    name: str, lead: tuple[int, ...], C: int, format: str, elements: Elements, blocks_first: bool = False
) -> dict[str, TensorSpec]:
    """The tensors of an operand [*lead, C] that is quantized along C."""
    if elements == "bf16":
        return {name: TensorSpec((*lead, C), "bfloat16")}
    scale = TensorSpec(lead, "float32")
    if format != "fp8_rowwise":
        dtype = "float32" if format == "fp8_blockwise" else "float8_e8m0fnu"
        shape = (*lead, -(-C // SCALE_BLOCKS[format]))
        scale = TensorSpec(shape[::-1] if blocks_first else shape, dtype)
    return {name: TensorSpec((*lead, C), "float8_e4m3fn"), f"{name}_scale": scale}


def scale_tiles(*lead: int, rows: int, C: int) -> TensorSpec:
    """The scales of [*lead, rows, C] in tiles. Where the rows are tokens, each group begins a tile, as it does in a
    wgrad operand."""
    return TensorSpec((*lead, *scale_tiles_shape(rows, C)), "float8_e8m0fnu")


def weights_spec(
    out: int, contraction: int, p: Problem, config: GroupedMMConfig, impl: Implementation
) -> dict[str, TensorSpec]:
    """The operand of weights [G, out, contraction], and what making it takes."""
    if config.format == "bf16":
        return {} if p.b_dtype == "bfloat16" else {"b": TensorSpec((p.G, out, contraction), "bfloat16")}
    specs = _operand("b", (p.G, out), contraction, config.format, impl.elements)
    if config.format == "fp8_rowwise":
        specs["b_amax"] = TensorSpec((p.G, out), "int32")
    if config.format == "fp8_blockwise":
        specs["b_scale"] = TensorSpec((p.G, -(-out // FP8_BLOCK), -(-contraction // FP8_BLOCK)), "float32")
    if impl.scale_tiles:
        specs["b_scale"] = scale_tiles(p.G, rows=out, C=contraction)
    return specs


def rows_spec(name: str, C: int, dtype: str, p: Problem, config: GroupedMMConfig, impl: Implementation):
    if config.format == "bf16":
        return {} if dtype == "bfloat16" else {name: TensorSpec((p.M, C), "bfloat16")}
    specs = _operand(name, (p.M,), C, config.format, impl.elements, impl.warp_specialized)
    if impl.scale_tiles:
        specs[f"{name}_scale"] = scale_tiles(rows=padded_tokens(p.M, p.G), C=C)
    return specs


def tokens_spec(name: str, C: int, p: Problem, config: GroupedMMConfig, impl: Implementation) -> dict[str, TensorSpec]:
    """The wgrad operand, in 8 bits."""
    Mp = padded_tokens(p.M, p.G)
    if impl.straight_tokens:
        scale = TensorSpec((Mp // MX_BLOCK, C), "float8_e8m0fnu")
        return {name: TensorSpec((p.M, C), "float8_e4m3fn"), f"{name}_scale": scale}
    specs = _operand(name, (C,), Mp, config.format, "fp8", impl.warp_specialized)
    if config.format == "fp8_rowwise":
        specs[f"{name}_scale"] = TensorSpec((p.G, C), "float32")
    if impl.scale_tiles:
        specs[f"{name}_scale"] = scale_tiles(rows=C, C=Mp)
    return specs


def maxima_spec(name: str, C: int, p: Problem, config: GroupedMMConfig) -> dict[str, TensorSpec]:
    return {f"{name}_amax": column_maxima(p.G, C)} if config.format == "fp8_rowwise" else {}


def column_maxima(G: int, C: int) -> TensorSpec:
    """Of C columns in G groups of tokens: several for each, which the programs that find them share out, because atomic
    maxima at one address take 50 ns each. At [8192, 1024] in one group on an H200 they were 89 of 98 us."""
    return TensorSpec((max(1, 16 >> (G - 1).bit_length()), G, C), "int32")


def _at_least_one(count: int) -> int:
    return torch.sym_max(1, count)  # pyright: ignore[reportReturnType] (an int of ints)


def token_map(tile: int, p: Problem) -> dict[str, TensorSpec]:
    """The map of `tile`-token tiles; GEMM and quantizer share it where their tiles are alike."""
    return {
        f"tiles_{tile}": TensorSpec((_at_least_one(tiles.max_tiles(p.M, p.G, tile)), tiles.TILE_FIELDS), "int32"),
        f"groups_{tile}": TensorSpec((p.G + 1, tiles.TILE_FIELDS), "int32"),
    }


def map_tiles(names: Iterable[str]) -> list[int]:
    """The tokens of the tiles whose maps are among the `names` of tensors."""
    return [int(name.removeprefix("tiles_")) for name in names if name.startswith("tiles_")]


def is_map(name: str) -> bool:
    """Whether a tensor of that name belongs to a `token_map`."""
    return name.startswith(("tiles_", "groups_"))


def with_maps(spec: Spec, like: Spec, p: Problem) -> dict[str, TensorSpec]:
    """The scratch of `spec`, which is that of p, with maps of other tiles: those of `like`."""
    rest = {name: tensor for name, tensor in spec.scratch.items() if not is_map(name)}
    return rest | {name: tensor for tile in map_tiles(like.scratch) for name, tensor in token_map(tile, p).items()}


def forward_outputs(
    p: Problem, config: GroupedMMConfig, impl: Implementation, save_tokens: bool, save_amax: bool = False
) -> dict[str, TensorSpec]:
    """``out`` [M, N]; with `save_tokens`, unless `saves_input(config)`, the wgrad operand of A: ``a_tokens`` and
    ``a_tokens_scale``: e4m3 [K, Mp] and float32 [G, K] or [K, Mp/128] (`warp_specialized`: [Mp/128, K]) or E8M0
    [K, Mp/32] (`scale_tiles`: [ceil(K/128), Mp/128, 512]), or, where the implementation keeps tokens straight, e4m3
    [M, K] and E8M0 [Mp/32, K]. In 8 bits whatever the wgrad multiplies: that is what lives until the backward. With
    `save_amax`, of weights that come with K contiguous, where `finds_maxima`: ``b_amax`` int32 [G, K], which spares the
    backward a pass over the weights."""
    outputs = {"out": TensorSpec((p.M, p.N), p.out_dtype)}
    if save_tokens and not saves_input(config):
        outputs |= tokens_spec("a_tokens", p.K, p, config, impl)
    if save_amax and finds_maxima(config, impl, p.K):
        outputs["b_amax"] = TensorSpec((p.G, p.K), "int32")
    return outputs


@lru_cache(maxsize=4096)
def forward_spec(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    save_tokens: bool = True,
    prepared: bool = False,
    save_amax: bool = False,
    rows: bool = False,
) -> Spec:
    """Outputs: `forward_outputs`. `prepared`: the weights come so, and have no maxima to save; `rows`: so does A."""
    p, impl = problem, select(config, device)
    spec = Spec(forward_outputs(p, config, impl, save_tokens, save_amax and not prepared))
    if impl.gemm == "emulated":
        return spec
    if "a_tokens" in spec.outputs:
        spec.scratch.update(maxima_spec("a_tokens", p.K, p, config) | token_map(TOKEN_TILE, p))
    if not rows:
        spec.scratch.update(rows_spec("a", p.K, p.a_dtype, p, config, impl))
    if not prepared:
        spec.scratch.update(weights_spec(p.N, p.K, p, config, impl))
    if "b_amax" in spec.outputs:
        spec.scratch.pop("b_amax")  # for weights that lie the other way round
    tuned = gemm_tiles("grouped_mm", impl.elements, p, config, device, p.N, p.out_dtype)
    spec.scratch.update(token_map(tuned.rows, p))
    return spec


@lru_cache(maxsize=4096)
def saved_spec(problem: Problem, config: GroupedMMConfig, device: Device) -> Spec:
    """Outputs: ``a_tokens`` and ``a_tokens_scale`` of `forward_outputs`, without the GEMM; nothing where the backward
    takes A itself. Of `problem` N, and the dtypes but that of A, do not matter."""
    p, impl = problem, select(config, device)
    outputs = forward_outputs(p, config, impl, save_tokens=True)
    del outputs["out"]
    if not outputs or impl.gemm == "emulated":
        return Spec(outputs)
    return Spec(outputs, maxima_spec("a_tokens", p.K, p, config) | token_map(TOKEN_TILE, p))


@lru_cache(maxsize=4096)
def backward_spec(
    problem: Problem,
    config: GroupedMMConfig,
    device: Device,
    need_dA: bool = True,
    need_dB: bool = True,
    prepared: bool = False,
    amax_is_known: bool = False,
) -> Spec:
    """Outputs: ``dA`` [M, K] and ``dB`` [G, K, N], those needed, in the dtypes of A and B. The gradient of the output
    comes in `problem.out_dtype`. `amax_is_known`: the forward's ``b_amax`` comes with the weights."""
    p, impl = problem, select(config, device)
    spec = Spec()
    if need_dA:
        spec.outputs["dA"] = TensorSpec((p.M, p.K), p.a_dtype)
    if need_dB:
        spec.outputs["dB"] = TensorSpec((p.G, p.K, p.N), p.b_dtype)
    if impl.gemm == "emulated":
        return spec
    if need_dA:
        spec.scratch.update(rows_spec("d", p.N, p.out_dtype, p, config, impl))
        if not prepared:
            spec.scratch.update(weights_spec(p.K, p.N, p, config, impl))
        if amax_is_known:
            spec.scratch.pop("b_amax", None)
        tuned = gemm_tiles("grouped_mm", impl.elements, p, config, device, p.K, p.a_dtype)
        spec.scratch.update(token_map(tuned.rows, p))
    if need_dB:
        spec.scratch.update(token_map(TOKEN_TILE, p))
        if saves_input(config):
            for name, C, dtype in (("a_hp", p.K, p.a_dtype), ("d_hp", p.N, p.out_dtype)):
                if dtype != "bfloat16":
                    spec.scratch[name] = TensorSpec((p.M, C), "bfloat16")
        elif impl.straight_tokens:
            spec.scratch["a_tokens_bf16"] = TensorSpec((p.M, p.K), "bfloat16")
            spec.scratch["d_tokens"] = TensorSpec((p.M, p.N), "bfloat16")
        else:
            spec.scratch.update(tokens_spec("d_tokens", p.N, p, config, impl) | maxima_spec("d_tokens", p.N, p, config))
        if "d_tokens" in spec.scratch:
            spec.scratch.pop("d", None)  # dead when d_tokens are written, and no larger
    return spec


def gemm_tiles(
    kernel: str, elements: Elements, p: Problem, config: GroupedMMConfig, device: Device, columns: int, out: str
):
    """Of an output with so many columns, of dtype `out`."""
    assert device.capability is not None, f"Triton GEMMs need a compute capability, got {device}"
    precise = config.accumulation is Accumulation.PRECISE and elements != "blockwise"  # which is so at any rate
    heavy = out == "float32" or precise
    return tuning.lookup(kernel, elements, device.capability, p.M, p.G, columns, heavy)


def allocate(specs: Mapping[str, TensorSpec], device: torch.device) -> dict[str, torch.Tensor]:
    """Uninitialised tensors by their specs."""
    return {name: torch.empty(s.shape, dtype=getattr(torch, s.dtype), device=device) for name, s in specs.items()}


# --------------------------------------------------------------------------------------------------------------- memory


class Layout:
    """Where each tensor of some specs lies in one piece of memory; groups that take `turns`, on the same stretch. Equal
    to itself alone."""

    ALIGNMENT = 256
    """Bytes. TMA asks for 16."""

    def __init__(self, specs: Mapping[str, TensorSpec], turns: Sequence[Sequence[str]] = ()):
        self.places: dict[str, tuple[int, int, tuple[int, ...], torch.dtype]] = {}
        """Name -> (first byte, byte past the last, shape, dtype)."""
        apart = {name for group in turns for name in group}
        first = self._place(specs, [name for name in specs if name not in apart], 0)
        self.bytes = max([first, *(self._place(specs, [n for n in group if n in specs], first) for group in turns)])

    def _place(self, specs: Mapping[str, TensorSpec], names: Sequence[str], start: int) -> int:
        """One after the other from `start` on; the first byte free after them."""
        for name in names:
            dtype = getattr(torch, specs[name].dtype)
            end = start + math.prod(specs[name].shape) * dtype.itemsize
            self.places[name] = start, end, specs[name].shape, dtype
            start = -(-end // self.ALIGNMENT) * self.ALIGNMENT
        return start


class Arena(Mapping[str, torch.Tensor]):
    """Uninitialised tensors by a layout: one allocation, and a view for each that is asked for. (An allocation takes
    2 us of host time, a view 3; `xmoe.kernels.replay` asks for none.)"""

    def __init__(self, layout: Layout, device: torch.device):
        self.layout = layout
        self.memory = torch.empty(layout.bytes, dtype=torch.uint8, device=device)
        self._views: dict[str, torch.Tensor] = {}

    def __getitem__(self, name: str) -> torch.Tensor:
        view = self._views.get(name)
        if view is None:
            start, end, shape, dtype = self.layout.places[name]
            view = self._views[name] = self.memory[start:end].view(dtype).view(shape)
        return view

    def __contains__(self, name: object) -> bool:
        return name in self.layout.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout.places)

    def __len__(self) -> int:
        return len(self.layout.places)
