"""Grouped GEMM on one GPU: the bare fp8 forward beside torch's, and fwd + bwd of every recipe beside its peers.

Random bf16 data, uneven groups (multiples of 32), medians, everything in one process. A system is timed only after its
results agree with the bf16 GEMM to the accuracy of its format.

    python -m benchmarks.grouped_mm [--shapes llama4_g8,deepseek_v3] [--recipes fp8_rowwise]
"""

import torch

from benchmarks import common
from xmoe import config_from_recipe
from xmoe.kernels import grouped_gemm, quantize, tiles, tuning
from xmoe.shapes import Shape
from xmoe.torch_backend import scaled_grouped_mm

try:
    from torchao.prototype.moe_training import _to_fp8_rowwise_then_scaled_grouped_mm as torchao_fp8
except ImportError:
    torchao_fp8 = None

RECIPES = "bf16,fp8_rowwise,fp8_rowwise_wgrad_with_hp,mxfp8_rceil"


def forward_gemm(shape: Shape) -> list[list]:
    """The fp8 rowwise GEMM alone, operands already quantized: ours and torch._scaled_grouped_mm in turns."""
    M, N, K, G = shape[1:]
    offs = common.uneven_offs(shape)
    empty = lambda *size, dtype=torch.float32: torch.empty(size, dtype=dtype, device="cuda")  # noqa: E731
    a, a_scale = empty(M, K, dtype=torch.float8_e4m3fn), empty(M)
    b, b_scale = empty(G, N, K, dtype=torch.float8_e4m3fn), empty(G, N)
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    A, B = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for size in ((M, K), (G, N, K)))
    quantize.quantize_rows(A, "fp8_rowwise", a, a_scale, programs)
    quantize.quantize_weights(B, "fp8_rowwise", b, b_scale, None, programs)
    tuned = tuning.lookup("grouped_mm", "fp8", torch.cuda.get_device_capability(), M, G)
    token_tiles = empty(tiles.max_tiles(M, G, tuned.rows), tiles.TILE_FIELDS, dtype=torch.int32)
    groups = empty(G + 1, tiles.TILE_FIELDS, dtype=torch.int32)
    out = torch.full((M, N), float("nan"), dtype=torch.bfloat16, device="cuda")

    def ours():
        tiles.map_tiles(offs, M, tuned.rows, token_tiles, groups)
        grouped_gemm.grouped_mm(a, a_scale, b, b_scale, token_tiles, groups, out, tuned, programs)
        return out

    def peer():
        return torch._scaled_grouped_mm(a, b.mT, a_scale, b_scale, offs, out_dtype=torch.bfloat16, use_fast_accum=True)

    equal = torch.equal(ours(), peer())
    rows = []
    for name, fn in (
        ("xmoe", ours),
        ("torch._scaled_grouped_mm", peer),
        ("xmoe", ours),
        ("torch._scaled_grouped_mm", peer),
    ):
        ms = common.median_ms(fn)
        verdict = "equal bits" if equal else "bits differ"
        rows.append(common.progress([shape.name, M, N, K, G, name, ms, shape.flops / ms / 1e9, verdict]))
    return rows


def forward_backward(shape: Shape, recipes: list[str]) -> list[list]:
    """fwd + bwd from bf16 operands, both gradients."""
    M, N, K, G = shape[1:]
    offs = common.uneven_offs(shape)
    A = torch.randn(M, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    B = torch.randn(G, N, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dOut = torch.randn(M, N, device="cuda", dtype=torch.bfloat16)

    systems = {"torch bf16": lambda: torch._grouped_mm(A, B.mT, offs)}
    for recipe in recipes:
        config = config_from_recipe(recipe)
        systems[f"xmoe {recipe}"] = lambda config=config: scaled_grouped_mm(A, B.mT, offs, config)
    if torchao_fp8 is not None:
        systems["torchao fp8_rowwise"] = lambda: torchao_fp8(A, B.mT, offs, pad_token_groups_for_grouped_mm=False)

    def step(fn):
        A.grad = B.grad = None
        out = fn()
        out.backward(dOut)
        return out.detach(), A.grad, B.grad

    reference = step(systems["torch bf16"])
    rows, base = [], None
    for name, fn in systems.items():
        try:
            results = step(fn)
            for got, want in zip(results, reference, strict=True):
                error = ((got.float() - want.float()).norm() / want.float().norm()).item()
                if not error < 0.06:  # e4m3 with one scale a row: 28 dB, 0.04
                    raise RuntimeError(f"wrong by {error:.3g}")
            del results, got, want
            A.grad = B.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step(fn)
            peak = (torch.cuda.max_memory_allocated() - before) / 2**30
            ms, spread = common.spread_ms(lambda fn=fn: step(fn))
        except Exception as error:  # a peer that cannot run a shape is a row of the table
            fault = f"{type(error).__name__}: {str(error)[:60]}"
            rows.append(common.progress([shape.name, M, N, K, G, name, fault, "", "", ""]))
            continue
        base = base or ms
        rows.append(common.progress([shape.name, M, N, K, G, name, ms, spread, base / ms, peak]))
    return rows


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--recipes", default=RECIPES, help="recipes of the fwd + bwd table, with commas between them")
    args = parser.parse_args()
    forward, both = [], []
    for shape in common.shapes(args.shapes.split(",")):
        forward += forward_gemm(shape)
        torch.cuda.empty_cache()
        both += forward_backward(shape, args.recipes.split(","))
        torch.cuda.empty_cache()
    common.save(
        "grouped_mm",
        {
            "fp8 rowwise forward GEMM, operands quantized": (
                ["shape", "M", "N", "K", "G", "system", "ms", "TFLOP/s", "against the peer"], forward),
            "fwd + bwd": (
                ["shape", "M", "N", "K", "G", "system", "ms", "spread ms", "x torch bf16", "peak GiB"], both),
        },
        args.out,
    )  # fmt: skip


if __name__ == "__main__":
    main()
