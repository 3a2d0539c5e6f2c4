"""The stages of one call on a GPU: quantize, map, multiply. What `pipeline` and `experts` are made of.

M tokens, K contraction of the forward, N output features, G groups.
"""

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from xmoe.config import Accumulation, GroupedMMConfig
from xmoe.kernels.dispatch import Device, Elements, select
from xmoe.kernels.specs import HAS_TRITON, Prepared, Problem, Tensors, Weights, gemm_tiles, map_tiles
from xmoe.operands import TOKEN_TILE

if HAS_TRITON:
    from xmoe.kernels import grouped_gemm, grouped_gemm_hopper, quantize, quantize_blocks, quantize_both, swiglu, tiles


@lru_cache
def programs(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Call:
    """The stages of one call: prepare, quantize, multiply. Reads sizes from the tensors, tile shapes from the
    problem."""

    def __init__(
        self,
        problem: Problem,
        config: GroupedMMConfig,
        device: Device,
        offs: torch.Tensor,
        scratch: Tensors,
        gated: bool = False,
        index: torch.Tensor | None = None,
    ):
        """`gated`: the activations that come are [M, 2K], for their SwiGLU [M, K]. In fp8_rowwise the pass over rows
        leaves that in ``kept`` of the scratch, for the tokens. `index` int32 [M]: of the activations that come row
        index[r] is row r."""
        self.problem, self.config, self.device = problem, config, device
        self.gated = gated
        self.source: dict[str, Any] = {"gated": gated, "index": index}
        """How the quantizers read the activations."""
        self.implementation = select(config, device)
        self.offs, self.scratch = offs, scratch
        self.precise = config.accumulation is Accumulation.PRECISE
        self.programs = programs(offs.device.index)

    def prepare(self, M: int, *tensors: Tensors) -> None:
        """The launch before the other stages, if there is anything to prepare: of all `tensors` (outputs, scratch) of a
        call the maps of M tokens, and zeros in the maxima, which are called "...amax"."""
        maps = {tile: _map(some, tile) for some in tensors for tile in map_tiles(some)}
        maxima = [some[name] for some in tensors for name in some if name.endswith("amax")]
        if maps or maxima:
            tiles.prepare(self.offs, M, maps, maxima)

    def map(self, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
        return _map(self.scratch, tile)

    def gemm_tiles(self, kernel: str, elements: Elements, out: torch.Tensor):
        dtype = str(out.dtype).removeprefix("torch.")
        return gemm_tiles(kernel, elements, self.problem, self.config, self.device, out.shape[-1], dtype)

    def rows_first(self, scale: torch.Tensor | None) -> torch.Tensor | None:
        return scale.mT if self.implementation.warp_specialized and scale is not None else scale

    def rows(
        self,
        name: str,
        x: torch.Tensor,
        dh: torch.Tensor | None = None,
        kept: torch.Tensor | None = None,
        *,
        exact: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The operand of x's rows; of those of its SwiGLU where x is `gated`. With dh [M, C/2], of those of x's
        gradient, given that of its SwiGLU; it takes the place of x for certain if that is `kept`. `exact`: x are values
        of MX operands, to be kept (under FLOOR the largest of a block may saturate)."""
        if self.config.format == "bf16":
            return self.cast(name, x), None
        data, scale = self._rows(name)
        dh = self._gradient(x, dh)
        map = self.map(TOKEN_TILE) if self.implementation.scale_tiles else None
        format = "mxfp8_rceil" if exact else self.config.format
        quantize.quantize_rows(x, format, data, scale, self.programs, map=map, dh=dh, kept=kept, **self.source)
        return data, scale

    def _rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.scratch[name], self.rows_first(self.scratch.get(f"{name}_scale"))

    def _gradient(self, x: torch.Tensor, dh: torch.Tensor | None) -> torch.Tensor | None:
        """dh, if the quantizer of x's rows takes it; if not, None, and the gradient is in place of x."""
        fuses = self.config.format == "fp8_rowwise" and x.dtype == torch.bfloat16 and x.shape[1] <= quantize.LONGEST_ROW
        if fuses or dh is None:
            return dh
        swiglu.swiglu_gradient_(dh, x)
        return None

    def weights(
        self, b: Weights, amax: torch.Tensor | None = None, columns: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The operand of b; `amax`, `columns` as in `quantize_weights`."""
        if isinstance(b, Prepared):
            return b
        parts = [b] if isinstance(b, torch.Tensor) else b
        (G, P, _), C = parts[0].shape, sum(part.shape[2] for part in parts)
        if self.config.format == "bf16":
            if len(parts) > 1:
                return torch.cat([part.mT for part in parts], 1, out=self.scratch["b"].view(G, C, P)).mT, None
            return (parts[0] if parts[0].dtype == torch.bfloat16 else self.scratch["b"].copy_(parts[0])), None
        return quantize_weights(parts, self.config, self.scratch, self.programs, amax, columns)

    def cast(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x if x.dtype == torch.bfloat16 else self.scratch[name].copy_(x)

    def tokens(
        self,
        name: str,
        x: torch.Tensor,
        tensors: Tensors,
        amax: torch.Tensor | None = None,
        amax_is_known: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The wgrad operand of x, `name` in `tensors`; amax as in `rows_and_amax`."""
        source = self.source
        if self.gated and amax_is_known:
            x, source = self.scratch["kept"], {}
        data, scale = tensors[name], self.rows_first(tensors.get(f"{name}_scale"))
        map = self.map(TOKEN_TILE)
        if self.implementation.straight_tokens:
            quantize_blocks.quantize_tokens_straight(x, self.config.format, data, scale, *map, **source)
        else:
            assert scale is not None, f"{name} has no scale"
            amax = self.scratch.get(f"{name}_amax") if amax is None else amax
            quantize.quantize_tokens(
                x, self.config.format, data, scale, amax, *map, amax_is_known=amax_is_known, **source
            )
        return data, scale

    def rows_and_tokens(self, name: str, x: torch.Tensor, tensors: Tensors, dh: torch.Tensor | None = None):
        """Both operands of x, the rows `name` of the scratch and the tokens `name`_tokens of `tensors`; with dh, of its
        gradient, as in `rows` (but that x may become anything)."""
        if quantize_both.fuses(self.config.format, x, self.implementation.straight_tokens):
            rows = self._rows(name)
            data, scale = tensors[f"{name}_tokens"], self.rows_first(tensors.get(f"{name}_tokens_scale"))
            map = self.map(TOKEN_TILE)
            quantize_both.quantize_rows_and_tokens(
                x, self.config.format, *rows, data, scale, *map, dh=dh, **self.source
            )
            return rows, (data, scale)
        amax = self.scratch.get(f"{name}_tokens_amax")
        rows, amax_is_known = self.rows_and_amax(name, x, amax, dh)
        return rows, self.tokens(f"{name}_tokens", x, tensors, amax, amax_is_known)

    def rows_and_amax(self, name: str, x: torch.Tensor, amax: torch.Tensor | None, dh: torch.Tensor | None = None):
        """(rows, whether `amax` was filled): with the maxima that `tokens` needs, where they come at no cost; dh as in
        `rows`."""
        if amax is None:
            return self.rows(name, x, dh), False
        data, scale = self._rows(name)
        dh = self._gradient(x, dh)
        columns, kept = (amax, self.map(TOKEN_TILE)[1]), None if dh is None else x
        kept = self.scratch.get("kept") if self.gated else kept
        known = quantize.quantize_rows(
            x, self.config.format, data, scale, self.programs, columns, dh=dh, kept=kept, **self.source
        )
        return (data, scale), known

    def grouped_mm(
        self,
        a: tuple[torch.Tensor, torch.Tensor | None],
        b: Weights,
        out: torch.Tensor,
        *,
        amax: torch.Tensor | None = None,
        columns: torch.Tensor | None = None,
    ) -> None:
        """out[M, P] = a[M, C] @ b[G, P, C]^T; `amax`, `columns` as in `quantize_weights`, unless b is prepared."""
        tuned = self.gemm_tiles("grouped_mm", self.implementation.elements, out)
        a_data, a_scale = a
        b_data, b_scale = self.weights(b, amax, columns)
        token_tiles, groups = self.map(tuned.rows)
        if self.implementation.gemm == "torch":
            _torch_grouped_mm(a_data, a_scale, b_data, b_scale, groups, out, not self.precise)
            return
        args = a_data, a_scale, b_data, b_scale, token_tiles, groups, out, tuned, self.programs
        if self.implementation.warp_specialized:
            grouped_gemm_hopper.grouped_mm(*args)
        else:
            grouped_gemm.grouped_mm(*args, self.precise, self.implementation.elements == "blockwise")

    def grouped_mm_tokens(self, a, a_scale, b, b_scale, groups, out: torch.Tensor) -> None:
        """out[G, K, N] from wgrad operands of A and dOut; an out that is stored [G, N, K] swaps them."""
        if out.stride(2) != 1:
            a, a_scale, b, b_scale, out = b, b_scale, a, a_scale, out.mT
        if self.implementation.gemm == "torch":
            _torch_grouped_mm_tokens(a, a_scale, b, b_scale, groups, out, not self.precise)
            return
        elements = self.implementation.wgrad_elements
        tuned = self.gemm_tiles("grouped_mm_tokens", elements, out)
        args = a, a_scale, b, b_scale, groups, out, tuned, self.programs
        if self.implementation.warp_specialized and elements == "blockwise":
            grouped_gemm_hopper.grouped_mm_tokens(*args)
        else:
            grouped_gemm.grouped_mm_tokens(*args, self.precise, elements == "blockwise")

    def wgrad_hp(self, A: torch.Tensor, dOut: torch.Tensor, dB: torch.Tensor) -> None:
        """dB from A and dOut in bf16, as they lie."""
        _, groups = self.map(TOKEN_TILE)
        self.grouped_mm_tokens(self.cast("a_hp", A), None, self.cast("d_hp", dOut), None, groups, dB)

    def saved_tokens(self, a: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The wgrad operand of A, from what the forward saved of it."""
        if not self.implementation.straight_tokens:
            return a[0], self.rows_first(a[1])
        data = self.scratch["a_tokens_bf16"]
        quantize_blocks.dequantize_tokens_straight(*a, data, *self.map(TOKEN_TILE))
        return data, None

    def wgrad(
        self,
        a: tuple[torch.Tensor, torch.Tensor | None],
        d: tuple[torch.Tensor, torch.Tensor | None],
        dB: torch.Tensor,
    ) -> None:
        """dB from the wgrad operands of A and dOut."""
        self.grouped_mm_tokens(*a, *d, self.map(TOKEN_TILE)[1], dB)


def _map(tensors: Tensors, tile: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[f"tiles_{tile}"], tensors[f"groups_{tile}"]


def quantize_weights(
    parts: Sequence[torch.Tensor],
    config: GroupedMMConfig,
    scratch: Tensors,
    programs: int,
    amax: torch.Tensor | None = None,
    columns: torch.Tensor | None = None,
) -> Prepared:
    """Weights [G, P, C] along C, those of several parts side by side, into the tensors of `weights_spec`.

    `amax` int32 [G, P]: the rows' maxima, where they are known; `columns` int32 [G, C]: receives those of the columns,
    which are the rows of the same weights along their other axis. Where `finds_maxima` of specs.py.
    """
    data, scale = scratch["b"], scratch.get("b_scale")
    if scale is None and parts[0].stride(2) != 1:  # bf16 in the layout of the weights
        data = data.view(data.shape[0], data.shape[2], data.shape[1]).mT
    known = amax is not None
    amax = amax if known else scratch.get("b_amax")
    quantize.quantize_weights(parts, config.format, data, scale, amax, programs, amax_is_known=known, columns=columns)
    return Prepared(data, scale)


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
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
