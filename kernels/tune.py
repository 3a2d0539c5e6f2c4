"""`python -m xmoe.kernels.tune`: measure tile shapes on this GPU and write its lines of tuning.toml.

For each kernel, element and shape class, the candidate with the least geometric mean of times over the class's shapes
(`xmoe.shapes.MODELS`, and the same with fewer tokens) wins. Candidates that do not fit the GPU drop out.
"""

import argparse
import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import cast

import torch
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from xmoe.kernels import grouped_gemm, grouped_gemm_hopper, tiles, tuning
from xmoe.kernels.dispatch import has_warp_specialized
from xmoe.kernels.tuning import GemmTiles
from xmoe.operands import FP8_BLOCK, SCALE_TILE_ROWS, TOKEN_TILE, padded_tokens, scale_tiles_shape
from xmoe.shapes import ALL, Shape, offsets

CLASSES = {
    "many": ("llama4_g8", "deepseek_v3_g8"),
    "few": ("llama4_g16", "deepseek_v3_g32", "qwen3_30b_a3b"),
    "heavy": ("llama4_g8", "deepseek_v3_g8"),
    "half": ("deepseek_v3_g8", "deepseek_v2_lite"),
}
"""Shapes that stand for a class; "few" takes them with 128 tokens a group, "half" with 512."""
TOKENS = {"few": 128, "half": 512}

ELEMENT_BYTES = {"fp8": 1, "blockwise": 1, "mx": 1, "bf16": 2}


def candidates(element: str, warp_specialized: bool) -> Iterator[GemmTiles]:
    """Tile shapes worth a try: 128 bytes of the contraction a step, as TMA swizzles them; also a block of scales."""
    depth = 128 // ELEMENT_BYTES[element]
    if warp_specialized:
        for rows, stages, band, parts in itertools.product((256, 128), (3, 4, 5), (4, 8, 16), (1, 2)):
            yield GemmTiles(rows, FP8_BLOCK, depth, 8, stages, band, parts)
        return
    for (rows, cols, warps), stages, band in itertools.product(
        [(128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (64, 256, 8), (64, 128, 4)], (3, 4, 5), (4, 8, 16)
    ):
        if element == "mx" and (rows != SCALE_TILE_ROWS or cols % SCALE_TILE_ROWS):
            continue
        for parts in (1, 2) if cols == 256 else (1,):
            yield GemmTiles(rows, cols, depth, warps, stages, band, parts)


def problem(kernel: str, element: str, shape: Shape, out_dtype: torch.dtype) -> Callable[[GemmTiles], None]:
    """A launch of `kernel` on random operands of `shape`."""
    M, N, K, G = shape[1:]
    offs = torch.from_numpy(offsets("uneven", M, G)).cuda()
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    groups = torch.empty(G + 1, tiles.TILE_FIELDS, dtype=torch.int32, device="cuda")
    dtype = torch.bfloat16 if element == "bf16" else torch.float8_e4m3fn

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16).to(dtype)

    blockwise = element == "blockwise"
    warp_specialized = blockwise and has_warp_specialized(torch.cuda.get_device_capability())

    def scales(*rows: int, C: int, blocks_first: bool = False) -> torch.Tensor | None:
        if element == "bf16":
            return None
        if element == "fp8":
            return torch.rand(rows, device="cuda") + 0.5
        if blockwise:
            x = torch.exp2(torch.randint(-2, 3, (*rows, -(-C // FP8_BLOCK)), device="cuda").float())
            return x.mT.contiguous().mT if blocks_first and warp_specialized else x
        shape = *rows[:-1], *scale_tiles_shape(rows[-1], C)
        return torch.full(shape, 127, dtype=torch.uint8, device="cuda").view(torch.float8_e8m0fnu)

    if kernel == "grouped_mm":
        a, b, out = random(M, K), random(G, N, K), torch.empty(M, N, dtype=out_dtype, device="cuda")
        b_lines = -(-N // FP8_BLOCK) if blockwise else N
        a_rows = padded_tokens(M, G) if element == "mx" else M
        a_scale, b_scale = scales(a_rows, C=K, blocks_first=True), scales(G, b_lines, C=K)

        def launch(t: GemmTiles) -> None:
            token_tiles = torch.empty(tiles.max_tiles(M, G, t.rows), 4, dtype=torch.int32, device="cuda")
            tiles.prepare(offs, M, {t.rows: (token_tiles, groups)})
            args = a, a_scale, b, b_scale, token_tiles, groups, out, t, programs
            if warp_specialized:
                grouped_gemm_hopper.grouped_mm(*args)
            else:
                grouped_gemm.grouped_mm(*args, blockwise=blockwise)

        return launch

    Mp = padded_tokens(M, G)
    a, b = (random(M, C) if element == "bf16" else random(C, Mp) for C in (N, K))
    a_scale, b_scale = (scales(G, C, C=0) if element == "fp8" else scales(C, C=Mp, blocks_first=True) for C in (N, K))
    out = torch.empty(G, N, K, dtype=out_dtype, device="cuda")
    token_tiles = torch.empty(tiles.max_tiles(M, G, TOKEN_TILE), 4, dtype=torch.int32, device="cuda")
    tiles.prepare(offs, M, {TOKEN_TILE: (token_tiles, groups)})

    def launch_tokens(t: GemmTiles) -> None:
        args = a, a_scale, b, b_scale, groups, out, t, programs
        if warp_specialized:
            grouped_gemm_hopper.grouped_mm_tokens(*args)
        else:
            grouped_gemm.grouped_mm_tokens(*args, blockwise=blockwise)

    return launch_tokens


def best(kernel: str, element: str, shape_class: str) -> GemmTiles:
    """The fastest candidate; prints what each took."""
    logs: dict[GemmTiles, float] = {}
    warp_specialized = element == "blockwise" and has_warp_specialized(torch.cuda.get_device_capability())
    for name in CLASSES[shape_class]:
        shape = ALL[name]
        if shape_class in TOKENS:
            shape = shape._replace(M=TOKENS[shape_class] * shape.G)
        launch = problem(kernel, element, shape, torch.float32 if shape_class == "heavy" else torch.bfloat16)
        for t in candidates(element, warp_specialized):
            two_accumulators = element == "blockwise" or (shape_class == "heavy" and element == "fp8")
            if two_accumulators and t.rows * t.cols > 128 * 128 and not warp_specialized:
                continue  # these would spill
            if element == "blockwise" and kernel == "grouped_mm" and t.cols > FP8_BLOCK:
                continue  # a tile's columns share one block of weights
            if shape_class == "half" and t.rows * t.cols != 128 * 128:
                continue
            try:
                timed = do_bench(lambda t=t, launch=launch: launch(t), warmup=10, rep=40, return_mode="median")
                ms = cast(float, timed)
            except OutOfResources:
                ms = math.inf
            logs[t] = logs.get(t, 0.0) + math.log(ms)
        del launch
        torch.cuda.empty_cache()
    ranked = sorted(logs, key=lambda t: logs[t])
    if logs[ranked[0]] == math.inf:
        raise SystemExit(f"no candidate of {kernel} {element} {shape_class} fits this GPU")
    for t in ranked[:3]:
        print(
            f"{kernel} {element} {shape_class} {math.exp(logs[t] / len(CLASSES[shape_class])):.3f} ms {t}", flush=True
        )
    return ranked[0]


def write(capability: tuple[int, int], found: dict[tuple[str, str, str], GemmTiles]) -> None:
    """Put the lines into tuning.toml. A new architecture starts from those that it fell back on."""
    data = {a: {k: {e: dict(c) for e, c in es.items()} for k, es in ks.items()} for a, ks in tuning.table().items()}
    arch = f"sm{capability[0] * 10 + capability[1]}"
    own = data.setdefault(arch, copy.deepcopy(data[tuning.arch(capability)]))
    for (kernel, element, shape_class), t in found.items():
        own[kernel].setdefault(element, {})[shape_class] = t
    comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), tuning.TABLE.open()))
    measured = sorted({*tuning.measured(), *([arch] if found else [])})
    lines = [comment, f"\nmeasured = {json.dumps(measured)}\n"]
    for arch_name, kernels in data.items():
        for kernel, elements in kernels.items():
            for element, classes in elements.items():
                lines.append(f"\n[{arch_name}.{kernel}.{element}]\n")
                for name, t in classes.items():
                    fields = ", ".join(f"{k} = {v}" for k, v in asdict(t).items())
                    lines.append(f"{name} = {{ {fields} }}\n")
    new = tuning.TABLE.with_suffix(".new")
    new.write_text("".join(lines))
    new.replace(tuning.TABLE)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--kernels", default="grouped_mm,grouped_mm_tokens")
    parser.add_argument("--elements", help="fp8,blockwise,bf16 (default: what this GPU's table has)")
    parser.add_argument("--classes", default=",".join(CLASSES))
    args = parser.parse_args()
    capability = torch.cuda.get_device_capability()
    own = tuning.table()[tuning.arch(capability)]
    found = {}
    for kernel in args.kernels.split(","):
        for element in args.elements.split(",") if args.elements else own[kernel]:
            for shape_class in args.classes.split(","):
                if shape_class == "half" and (kernel != "grouped_mm" or element not in ("fp8", "bf16")):
                    continue  # elsewhere tiles are no larger, or their number does not matter
                found[kernel, element, shape_class] = best(kernel, element, shape_class)
    write(capability, found)
    print(f"wrote {len(found)} lines to {tuning.TABLE}")


if __name__ == "__main__":
    main()
