"""Compile every Triton kernel ahead of time for sm_89, sm_90, sm_100 and sm_120, without a GPU, and look at the result.

For each: shared and tensor memory under the device's limits, no spills (sm_90, sm_100), and in its PTX the tensor-core
instructions that the kernel is for (wgmma e4m3 / bf16 on sm_90; tcgen05 on sm_100, block-scaled for MXFP8, its scales
copied from shared to tensor memory).

    python scripts/aot_check.py [--only PATTERN] [--sm 90]
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

if os.environ.get("TRITON_INTERPRET"):
    sys.exit("unset TRITON_INTERPRET: the interpreter does not compile")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from xmoe.kernels import (
    dequantize,
    grouped_gemm,
    grouped_gemm_hopper,
    permute,
    quantize,
    quantize_blocks,
    quantize_both,
    quantize_columns,
    quantize_rows_fp8,
    quantize_tensor,
    swiglu,
    tiles,
    tuning,
)
from xmoe.kernels.dispatch import has_warp_specialized
from xmoe.operands import FP8_BLOCK, MX_BLOCK, TOKEN_TILE

SHARED_MEMORY = {89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes a block can have (CUDA C++ Programming Guide, table of technical specifications)."""
SCALES_FROM_REGISTERS = r"ttng\.tmem_(?:alloc|store) %.*tensor<\w*xi8"
"""How Triton's GPU dialect writes a tensor of bytes to tensor memory; from shared memory it is `ttng.tmem_copy`."""
TENSOR_MEMORY = 512
"""Columns of a multiprocessor (PTX ISA, tensor memory addressing)."""


@dataclass(frozen=True)
class Case:
    """One specialisation of one kernel."""

    name: str
    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    sm: int
    warps: int = 4
    stages: int = 3
    instructions: tuple[str, ...] = ()
    """Regular expressions that the PTX must contain."""
    divisible: tuple[str, ...] = field(default=())
    """Arguments known to be multiples of 16."""
    registers: int | None = None
    """A thread's, at the launch; None leaves it to the compiler."""
    spills: int = 0
    """Bytes a thread may spill, where a schedule that does was measured to be the fastest (on sm_90)."""
    fma: bool = True
    """Whether a product and a sum may become one instruction."""


def quantizer_cases(sm: int) -> Iterator[Case]:
    i8, u8, f32, i32 = "*i8", "*u8", "*fp32", "*i32"
    pointers = dict.fromkeys((name for name in tiles._prepare.arg_names if name.endswith("_ptr")), i32)
    yield Case("prepare", tiles._prepare, pointers, {"LANES": tiles.LANES, "BLOCK": tiles.BLOCK}, sm)
    for dtype in ("bf16", "fp32"):
        x = {"x_ptr": f"*{dtype}"}
        for C in (768, 2048, 5120, 7168, 8192, 16384):
            for amax in ("of groups", "of matrices", ""):
                pieces = quantize_rows_fp8.row_pieces(C)
                warps, _, stages = quantize_rows_fp8.row_schedule(pieces, 2 if dtype == "bf16" else 4, False)
                yield Case(f"rows_fp8[{dtype},{pieces},amax={amax}]", quantize_rows_fp8._rows_fp8,
                           x | {"data_ptr": i8, "scale_ptr": f32, "amax_ptr": i32, "groups_ptr": i32},
                           ({} if amax else {"amax_ptr": None}) | ({} if amax == "of groups" else {"groups_ptr": None})
                           | {"kept_ptr": None, "dh_ptr": None, "stride_xc": 1, "AMAX": bool(amax), "PIECES": pieces,
                              "STAGES": stages, "HARDWARE": 2},
                           sm, warps, divisible=("stride_xg", "stride_xr", "C"))  # fmt: skip
        yield Case(f"long_rows_fp8[{dtype}]", quantize_rows_fp8._long_rows_fp8, x | {"data_ptr": i8, "scale_ptr": f32},
                   {"stride_xc": 1, "BLOCK_C": 4096, "HARDWARE": 2}, sm, divisible=("stride_xr", "C"))  # fmt: skip
        for fmt, bf16_out in (("rceil", False), ("floor", False), ("rceil", True)):
            tiled = sm == 100 and not bf16_out
            mx = {"SCALING": "mx", "RCEIL": fmt == "rceil", "DEQUANTIZE": bf16_out, "HARDWARE": 2}
            data = {"data_ptr": "*bf16" if bf16_out else i8}
            scale = {"scale_ptr": None} if bf16_out else {}
            for ragged in (True, False) if tiled else (False,):
                label = f"{dtype},{fmt},bf16_out={bf16_out}" + (f",scale_tiles,ragged={ragged}" if tiled else "")
                yield rows_case(label, x | data | {"scale_ptr": u8}, mx | scale | {"SCALE_TILES": tiled}, ragged, sm)
            for ragged in (True, False):
                if not bf16_out:
                    yield columns_case(f"{dtype},{fmt},ragged={ragged}", x | {"scale_ptr": u8},
                                       {"SCALING": "mx", "RCEIL": mx["RCEIL"], "HARDWARE": 2, "amax_ptr": None,
                                        "SCALE_TILES": tiled},
                                       ragged, sm)  # fmt: skip
                if ragged or bf16_out:
                    yield Case(f"columns_straight[{dtype},{fmt},ragged={ragged},bf16_out={bf16_out}]",
                               quantize_blocks.columns_straight,
                               x | data | {"scale_ptr": u8, "tiles_ptr": i32, "groups_ptr": i32},
                               {"RCEIL": mx["RCEIL"], "DEQUANTIZE": bf16_out, "HARDWARE": 2} | scale
                               | ({} if ragged else {"tiles_ptr": None, "groups_ptr": None})
                               | {"stride_xc": 1, "RAGGED": ragged, "BLOCK_R": TOKEN_TILE,
                                  "BLOCK_C": quantize_blocks.straight_block(2, False)}, sm, 1,
                               divisible=("stride_xg", "stride_xr", "C", "stride_dg", "R"))  # fmt: skip
        blockwise = {"SCALING": "blockwise", "RCEIL": False, "HARDWARE": 2}
        yield rows_case(f"{dtype},blockwise", x | {"data_ptr": i8, "scale_ptr": f32},
                        blockwise | {"DEQUANTIZE": False, "SCALE_TILES": False}, False, sm)  # fmt: skip
        yield Case(f"square_blocks[{dtype}]", quantize_blocks.square_blocks, x | {"data_ptr": i8, "scale_ptr": f32},
                   {"stride_xc": 1, "BLOCK": FP8_BLOCK, "HARDWARE": 2}, sm, quantize.SQUARE_WARPS,
                   divisible=("stride_xg", "stride_xp", "P", "C"))  # fmt: skip
        for ragged in (True, False):
            maps = {"tiles_ptr": i32, "groups_ptr": i32, "amax_ptr": i32}
            yield Case(f"columns_amax[{dtype},ragged={ragged}]", quantize_columns.columns_amax, x | maps,
                       ({} if ragged else {"tiles_ptr": None, "groups_ptr": None})
                       | {"stride_xc": 1, "RAGGED": ragged, "BLOCK_R": TOKEN_TILE, "BLOCK_C": 64, "HARDWARE": 2},
                       sm, divisible=("stride_xr", "C"))  # fmt: skip
            rowwise = blockwise | {"SCALING": "rowwise", "SCALE_TILES": False}
            yield columns_case(f"{dtype},rowwise,ragged={ragged}", x | {"scale_ptr": f32}, rowwise, ragged, sm)
            yield columns_case(f"{dtype},blockwise,ragged={ragged}", x | {"scale_ptr": f32},
                               blockwise | {"amax_ptr": None, "SCALE_TILES": False}, ragged, sm)  # fmt: skip
    for label, scaling, rceil in (("blockwise", "blockwise", True), ("rceil", "mx", True), ("floor", "mx", False)):
        mx = scaling == "mx"
        data = {"rows_ptr": "*bf16", "data_ptr": i8, "scale_ptr": u8} if mx else {"rows_ptr": i8, "data_ptr": i32}
        yield Case(f"rows_and_tokens[{label}]", quantize_both.rows_and_tokens,
                   {"x_ptr": "*bf16", "rows_scale_ptr": f32, "scale_ptr": f32} | data
                   | {"tiles_ptr": i32, "groups_ptr": i32},
                   {"SCALING": scaling, "RCEIL": rceil, "dh_ptr": None, "stride_xc": 1,
                    "BLOCK_C": quantize_both.BLOCK_C, "HARDWARE": 2} | ({"rows_scale_ptr": None} if mx else {}),
                   sm, divisible=("stride_xr", "stride_dc", "C"))  # fmt: skip
    yield Case("dequantize_straight", quantize_blocks.dequantize_straight,
               {"data_ptr": i8, "scale_ptr": u8, "out_ptr": "*bf16", "tiles_ptr": i32, "groups_ptr": i32},
               {"BLOCK_R": TOKEN_TILE, "BLOCK_C": 512, "HARDWARE": 2}, sm, 1, divisible=("C",))  # fmt: skip
    vectors = r"ld\.global\S*\.v[24]\.b32", r"st\.global\S*\.v4\.b32"
    blocks = {"rowwise": (1, dequantize.BLOCK_C), "blockwise": (FP8_BLOCK, FP8_BLOCK), "mx": (1, MX_BLOCK)}
    for fmt, (lines, size) in blocks.items():
        for out in ("*bf16", "*fp32"):
            yield Case(f"dequantize[{fmt},{out[1:]}]", dequantize._dequantize,
                       {"data_ptr": i8, "scale_ptr": u8 if fmt == "mx" else f32, "out_ptr": out},
                       {"LINES": lines, "SIZE": size, "MX": fmt == "mx", "BLOCK_R": dequantize.BLOCK_R,
                        "BLOCKS": dequantize.BLOCK_C // size, "HARDWARE": 2}, sm,
                       instructions=vectors, divisible=("C",))  # fmt: skip


def tensor_cases(sm: int) -> Iterator[Case]:
    """Casts must be the instruction's, where there is one that rounds once."""
    for dtype, block in (("bf16", 128), ("fp32", 64)):
        x, hardware = {"x_ptr": f"*{dtype}", "maxima_ptr": "*fp32"}, 2 if sm != 89 else int(dtype == "bf16")
        yield Case(f"tensor_maxima[{dtype}]", quantize_tensor.tensor_maxima, x,
                   {"PART": quantize_tensor.PART, "HARDWARE": hardware}, sm, 8)  # fmt: skip
        for e5m2 in (False, True):
            casts = (rf"cvt\.rn\.satfinite\.{'e5m2' if e5m2 else 'e4m3'}x2\.f(16x2|32)",) if hardware else ()
            for absent in ((), ("rows_ptr",), ("columns_ptr",)):
                yield Case(f"cast_tensor[{dtype},e5m2={e5m2},without={absent}]", quantize_tensor.cast_tensor,
                           x | {"rows_ptr": "*i8", "columns_ptr": "*i32", "scale_ptr": "*fp32"},
                           dict.fromkeys(absent) | {"E5M2": e5m2, "LANES": quantize_tensor.LANES,
                                                    "BLOCK_R": quantize_tensor.ROWS, "BLOCK_C": block,
                                                    "HARDWARE": hardware},
                           sm, instructions=casts, divisible=("C",))  # fmt: skip


def swiglu_cases(sm: int) -> Iterator[Case]:
    for dtype in ("*bf16", "*fp32"):
        yield Case(f"swiglu[{dtype}]", swiglu._swiglu, {"gate_up_ptr": dtype, "out_ptr": dtype},
                   {"BLOCK": swiglu.BLOCK, "HARDWARE": 2}, sm, divisible=("H",))  # fmt: skip
        yield Case(f"swiglu_gradient[{dtype}]", swiglu._swiglu_gradient, {"dh_ptr": dtype, "gate_up_ptr": dtype},
                   {"BLOCK": swiglu.BLOCK, "HARDWARE": 2}, sm, divisible=("H",))  # fmt: skip


def permute_cases(sm: int) -> Iterator[Case]:
    """Rows must be read and written 16 bytes at a time, and added up without fused multiply-adds."""
    i32, f32 = "*i32", "*fp32"
    reads, writes, unfused = r"ld\.global\S*\.v4\.b32", r"st\.global\S*\.v4\.b32", r"\A(?![\s\S]*fma\.rn\.f32)"
    for order in (i32, "*i64"):
        types = {"order_ptr": order, "tokens_ptr": i32, "place_ptr": i32}
        yield Case(f"invert[{order[1:]}]", permute._invert, types, {"BLOCK": permute.INVERT_BLOCK}, sm, permute.WARPS)
    for dtype, size in (("*bf16", 2), ("*fp32", 4)):
        types = dict.fromkeys(("x_ptr", "out_ptr", "dout_ptr", "dx_ptr"), dtype)
        types |= {"tokens_ptr": i32, "place_ptr": i32, "scores_ptr": f32, "dscores_ptr": f32}
        yield Case(f"gather[{dtype[1:]}]", permute._gather, types,
                   {"ROWS": permute.ROWS, "BLOCK": permute.block(size)}, sm, permute.WARPS,
                   instructions=(reads, writes), divisible=("stride_xt", "D"))  # fmt: skip
        for k in (1, 2, 4, 8, 17):
            for name, absent in (("combine", ()), ("gather_sum", ("scores_ptr",))):
                yield Case(f"{name}[{dtype[1:]},k={k}]", permute._combine, types,
                           permute.schedule(k, size) | dict.fromkeys(absent), sm, permute.WARPS,
                           instructions=(reads, writes, unfused), divisible=("D",), fma=False)  # fmt: skip
            for name, absent in (
                ("combine_backward", ()),
                ("combine_backward_dx", ("x_ptr", "dscores_ptr")),
                ("combine_backward_dscores", ("dx_ptr",)),
                ("scatter", ("x_ptr", "scores_ptr", "dscores_ptr")),
            ):
                yield Case(f"{name}[{dtype[1:]},k={k}]", permute._combine_backward, types,
                           permute.backward_schedule(k, size) | dict.fromkeys(absent), sm, permute.WARPS,
                           instructions=(reads,) if "dx_ptr" in absent else (reads, writes),
                           divisible=("D",))  # fmt: skip


def rows_case(label: str, types: dict[str, str], constants: dict[str, Any], ragged: bool, sm: int) -> Case:
    types = types | {"tiles_ptr": "*i32", "groups_ptr": "*i32"}
    constants = constants | ({} if ragged else {"tiles_ptr": None, "groups_ptr": None})
    block_c = quantize_blocks.ROW_BLOCKS
    constants = constants | {"stride_xc": 1, "RAGGED": ragged, "BLOCK_R": 4096 // block_c, "BLOCK_C": block_c}
    return Case(f"rows_blocks[{label}]", quantize_blocks.rows_blocks, types, constants, sm,
                divisible=("stride_xg", "stride_xr", "C"))  # fmt: skip


def columns_case(label: str, types: dict[str, str], constants: dict[str, Any], ragged: bool, sm: int) -> Case:
    types = types | dict.fromkeys(("data_ptr", "tiles_ptr", "groups_ptr", "amax_ptr"), "*i32")
    constants = constants | ({} if ragged else {"tiles_ptr": None, "groups_ptr": None})
    block, warps = quantize_columns.column_blocks(constants["SCALING"], ragged, 2 if types["x_ptr"] == "*bf16" else 4)
    constants = constants | {"stride_xc": 1, "RAGGED": ragged, "BLOCK_R": TOKEN_TILE, "BLOCK_C": block}
    return Case(f"columns[{label}]", quantize_columns.columns, types, constants, sm, warps,
                divisible=("stride_xg", "stride_xr", "stride_dt", "stride_dc", "C", "R"))  # fmt: skip


def sources(case: Case) -> Iterator[Case]:
    """The quantizer as it reads a tensor, and, unless that is a weight, rows of it that lie anywhere, a SwiGLU's two
    halves, or these and their gradient."""
    if "GATED" not in case.kernel.arg_names:
        yield case
        return
    case = replace(case, constants=case.constants | {"GATED": False, "index_ptr": None})
    if case.kernel is quantize_both.rows_and_tokens:
        yield from both_operands(case)
        return
    yield case
    of_rows = case.kernel is quantize_rows_fp8._rows_fp8
    ragged, amax, by_group = (case.constants.get(name, True) for name in ("RAGGED", "AMAX", "groups_ptr"))
    if (not ragged or (of_rows and amax and by_group is None)) and case.kernel is not quantize_blocks.rows_blocks:
        return
    x, size = case.types["x_ptr"], 2 if case.types["x_ptr"] == "*bf16" else 4
    yield replace(with_pointers(case, ",permuted", {"index_ptr": "*i32"}), spills=8 if size == 4 else 0)
    gated = replace(case, name=f"{case.name},gated", constants=case.constants | {"GATED": True})
    if of_rows or case.kernel is quantize_blocks.columns_straight:
        gated = replace(gated, spills=40)
    if case.kernel is quantize_blocks.columns_straight:
        gated.constants["BLOCK_C"] = quantize_blocks.straight_block(size, True)
    if of_rows:
        pieces = case.constants["PIECES"]
        warps, _, gated.constants["STAGES"] = quantize_rows_fp8.row_schedule(pieces, size, True)
        gated = replace(gated, warps=warps)
        if amax:
            gated = with_pointers(gated, "", {"kept_ptr": x})
        if 2 * sum(pieces) <= quantize_rows_fp8.LONGEST_ROW and size == 2:
            warps, _, stages = quantize_rows_fp8.row_schedule(pieces, size, gradient=True)
            for name, kept in ((",gradient", {"kept_ptr": x}), *[(",gradient, not kept", {})] * (not amax)):
                gradient = with_pointers(case, name, {"dh_ptr": x, **kept})
                yield replace(gradient, warps=warps, spills=40, constants=gradient.constants | {"STAGES": stages})
    yield gated


def both_operands(case: Case) -> Iterator[Case]:
    """`sources` of the quantizer of rows and tokens."""
    scaling = case.constants["SCALING"]
    plain, gated, gradient = (
        replace(
            case, name=case.name + name, warps=block_r // rows, registers=registers, spills=192 if registers else 0,
            constants=case.constants | {"GATED": name == ",gated", "BLOCK_R": block_r, "ROWS": rows},
        )
        for name in ("", ",gated", ",gradient")
        for block_r, rows, registers in [quantize_both.schedule(scaling, name == ",gated", name == ",gradient")]
    )  # fmt: skip
    gradient = with_pointers(gradient, "", {"dh_ptr": "*bf16"})
    yield from (plain, with_pointers(plain, ",permuted", {"index_ptr": "*i32"}), gated, gradient)
    if scaling == "mx":
        in_place = with_pointers(gradient, " in place", {"data_ptr": "*bf16"})
        yield replace(in_place, constants=in_place.constants | {"scale_ptr": None})


def with_pointers(case: Case, name: str, types: dict[str, str]) -> Case:
    """`case` with arguments that it may go without."""
    constants = {key: value for key, value in case.constants.items() if key not in types}
    return replace(case, name=case.name + name, types=case.types | types, constants=constants)


def with_cast(case: Case) -> Case:
    """The quantizer as it is launched: with the cast instruction that makes e4m3 of its input, if it has one."""
    if "HARDWARE" not in case.constants or "x_ptr" not in case.types or case.kernel is quantize_columns.columns_amax:
        return case
    if case.sm != 89:
        return replace(case, instructions=(r"cvt\.rn\.satfinite\.e4m3x2\.f32",))
    if case.types["x_ptr"] == "*fp32":
        return replace(case, constants=case.constants | {"HARDWARE": 0})
    constants = case.constants | {"HARDWARE": 1}
    return replace(case, constants=constants, instructions=(r"cvt\.rn\.satfinite\.e4m3x2\.f(16x2|32)",))


INSTRUCTIONS = {
    (89, "fp8"): (r"mma\.sync\S*e4m3",),
    (89, "bf16"): (r"mma\.sync\S*bf16",),
    (90, "fp8"): (r"wgmma\.mma_async\S*e4m3",),
    (90, "bf16"): (r"wgmma\.mma_async\S*bf16",),
    (100, "fp8"): (r"tcgen05\.mma\S*f8f6f4",),
    (100, "bf16"): (r"tcgen05\.mma\S*f16",),
    (100, "mx"): (r"tcgen05\.mma\S*mxf8f6f4\.block_scale", r"tcgen05\.cp\S*32x128b"),
    (120, "fp8"): (r"mma\.sync\S*e4m3",),
    (120, "bf16"): (r"mma\.sync\S*bf16",),
}


def gemm_cases(sm: int) -> Iterator[Case]:
    table = tuning.table()[f"sm{sm}"]
    warp_specialized = {"blockwise"} if has_warp_specialized((sm // 10, sm % 10)) else set()
    for kernel in ("grouped_mm", "grouped_mm_tokens"):
        for elements in warp_specialized:
            for shape_class, t in table[kernel][elements].items():
                yield hopper_case(kernel, t, "fp32" if shape_class == "heavy" else "bf16", shape_class)
    for elements, classes in table["grouped_mm"].items():
        for shape_class, t in classes.items() if elements not in warp_specialized else ():
            for contraction_last in (True, False) if elements == "bf16" else (True,):
                block = [1, t.cols, t.depth] if contraction_last else [1, t.depth, t.cols]
                for out, precise in loads(shape_class, elements):
                    yield gemm_case("grouped_mm", grouped_gemm._grouped_mm, elements, t, sm, out, precise,
                                    [t.rows, t.depth], block,
                                    {"B_CONTRACTION_LAST": contraction_last, "BLOCK_M": t.rows, "BLOCK_P": t.cols,
                                     "BLOCK_C": t.depth}, f"{shape_class},last={contraction_last}")  # fmt: skip
    for elements, classes in table["grouped_mm_tokens"].items():
        for shape_class, t in classes.items() if elements not in warp_specialized else ():
            a, b = [t.rows, t.depth], [t.cols, t.depth]
            if elements == "bf16":
                a, b = a[::-1], b[::-1]
            for out, precise in loads(shape_class, elements):
                yield gemm_case("grouped_mm_tokens", grouped_gemm._grouped_mm_tokens, elements, t, sm, out, precise, a,
                                b, {"TOKEN_TILE": TOKEN_TILE, "BLOCK_P": t.rows, "BLOCK_Q": t.cols, "BLOCK_M": t.depth},
                                shape_class)  # fmt: skip


def hopper_case(name: str, t: tuning.GemmTiles, out: str, shape_class: str) -> Case:
    operand, layout = grouped_gemm_hopper.OPERAND_LAYOUT, grouped_gemm_hopper.OUT_LAYOUTS[32 if out == "fp32" else 16]
    types = {
        "a_desc": f"tensordesc<fp8e4nv[{t.rows}, {t.depth}],{operand}>",
        "b_desc": f"tensordesc<fp8e4nv[{t.cols}, {t.depth}],{operand}>",
        "out_desc": f"tensordesc<{out}[1, 1, 64, {t.cols // t.parts}],{layout}>",
        "out_ptr": f"*{out}", "a_scale_ptr": "*fp32", "b_scale_ptr": "*fp32", "tiles_ptr": "*i32", "groups_ptr": "*i32",
    }  # fmt: skip
    constants = {
        "TOKENS": name == "grouped_mm_tokens", "STAGES": t.stages, "BAND": t.band, "PROGRAMS": 132, "stride_ar": 1,
        "LOADER_REGISTERS": grouped_gemm_hopper.LOADER_REGISTERS,
        "CONSUMER_REGISTERS": grouped_gemm_hopper.CONSUMER_REGISTERS,
    }  # fmt: skip
    label = f"{name}[blockwise,{out},{shape_class},warp-specialized]"
    return Case(label, grouped_gemm_hopper._blockwise, types, constants, 90, grouped_gemm_hopper.WARPS,
                instructions=INSTRUCTIONS[90, "fp8"], divisible=("S", "stride_out"),
                registers=grouped_gemm_hopper.LAUNCH_REGISTERS)  # fmt: skip


def loads(shape_class: str, elements: str) -> tuple[tuple[str, bool], ...]:
    """(output type, precise) of the launches that a line of the tuning table serves."""
    if shape_class != "heavy":
        return (("bf16", False),)
    if elements in ("mx", "blockwise"):  # `select` gives precise MX to the bf16 kernels; blockwise is precise anyway
        return (("fp32", False),)
    return ("fp32", False), ("bf16", True), ("fp32", True)


def gemm_case(name, kernel, elements, t, sm, out, precise, a_block, b_block, constants, label) -> Case:
    dtype = "bf16" if elements == "bf16" else "fp8e4nv"
    scaling = {"fp8": "rowwise", "blockwise": "blockwise", "mx": "mx", "bf16": "none"}[elements]
    scale_types = ["*fp32"] * 2
    if elements == "mx":
        scale_types = [f"tensordesc<u8[{size // 128}, {t.depth // 128}, 2, 256]>" for size in (t.rows, t.cols)]
    no_scales = {"a_scales": None, "b_scales": None} if elements == "bf16" else {}
    types = {
        "a_desc": f"tensordesc<{dtype}{a_block}>", "b_desc": f"tensordesc<{dtype}{b_block}>",
        "out_desc": f"tensordesc<{out}[1, 1, {t.rows}, {t.cols // t.parts}]>", "out_ptr": f"*{out}",
        "a_ptr": f"*{dtype}", "b_ptr": f"*{dtype}", "a_scales": scale_types[0], "b_scales": scale_types[1],
        "tiles_ptr": "*i32", "groups_ptr": "*i32",
    }  # fmt: skip
    constants = constants | no_scales | {"SCALING": scaling, "PRECISE": precise, "PROGRAMS": 132, "BAND": t.band,
                                         "STAGES": t.stages if scaling == "blockwise" else None,
                                         "PARTS": t.parts}  # fmt: skip
    instructions = INSTRUCTIONS[sm, "fp8" if elements == "blockwise" else elements]
    label = f"{name}[{elements},{out},{label}{',precise' if precise else ''}]"
    return Case(label, kernel, types, constants, sm, t.warps, t.stages, instructions,
                ("P", "Q", "C", "stride_out", "stride_a", "stride_b"))  # fmt: skip


def compile_case(case: Case) -> list[str]:
    """The case's faults, none if all is well."""
    signature, attributes = {}, {}
    for index, name in enumerate(case.kernel.arg_names):
        if name in case.constants:
            signature[name] = "constexpr"
            continue
        signature[name] = case.types.get(name, "i32")
        if signature[name].startswith("*") or name in case.divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if case.kernel.is_gluon() else ASTSource)(
        case.kernel, signature, case.constants, attributes
    )
    target = GPUTarget("cuda", case.sm, 32)
    try:
        options = {"num_warps": case.warps, "num_stages": case.stages, "maxnreg": case.registers}
        options["enable_fp_fusion"] = case.fma
        kernel = triton.compile(source, target=target, options=options)
    except Exception as error:
        return [f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}"]
    faults = []
    if kernel.metadata.shared > SHARED_MEMORY[case.sm]:
        faults.append(f"{kernel.metadata.shared} bytes of shared memory, {SHARED_MEMORY[case.sm]} allowed")
    if (columns := kernel.metadata.tmem_size or 0) > TENSOR_MEMORY:
        faults.append(f"{columns} columns of tensor memory, {TENSOR_MEMORY} allowed")
    for instruction in case.instructions:
        if not re.search(instruction, kernel.asm["ptx"]):
            faults.append(f"no {instruction} in the PTX")
    if re.search(SCALES_FROM_REGISTERS, kernel.asm["ttgir"]):
        faults.append("scales pass through registers")
    if case.sm in (90, 100) and (spilled := spills(kernel.asm["cubin"])) > case.spills:
        faults.append(f"{spilled} bytes of stack (spilled registers)")
    return faults


def spills(cubin: bytes) -> int:
    """Bytes of local memory a thread, from cuobjdump's resource usage."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))


_cases: list[Case] = []


def _faults(index: int) -> list[str]:
    return compile_case(_cases[index])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="compile the cases whose name contains this")
    parser.add_argument("--sm", type=int, choices=SHARED_MEMORY, help="compile for this architecture only")
    args = parser.parse_args()
    start = time.perf_counter()
    for sm in [args.sm] if args.sm else SHARED_MEMORY:
        quantizers = (with_cast(variant) for case in quantizer_cases(sm) for variant in sources(case))
        cases = (*quantizers, *tensor_cases(sm), *swiglu_cases(sm), *permute_cases(sm), *gemm_cases(sm))
        _cases.extend(case for case in cases if args.only in case.name)
    failed = 0
    with multiprocessing.get_context("fork").Pool() as pool:  # forked: kernels cannot be sent
        for case, faults in zip(_cases, pool.imap(_faults, range(len(_cases))), strict=True):
            failed += bool(faults)
            print(f"sm_{case.sm} {case.name}: {'; '.join(faults) or 'ok'}", flush=True)
    total = len(_cases)
    print(f"{total - failed} of {total} kernels compile as they should, {time.perf_counter() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
