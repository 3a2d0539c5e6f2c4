"""The quantizers on one GPU: bytes counted (each input read once, each output written once), time, fraction of the copy
bandwidth of this very GPU.

    python -m benchmarks.quantize [--shapes llama4_g8,deepseek_v3_g8]
"""

from collections.abc import Callable

import torch

from benchmarks import common
from xmoe.kernels import pipeline, quantize, tiles
from xmoe.operands import TOKEN_TILE, padded_tokens
from xmoe.shapes import Shape

FORMATS = ("fp8_rowwise", "mxfp8_rceil")


def copy_bandwidth() -> float:
    """Bytes a millisecond of a device-to-device copy, read and written."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / common.median_ms(lambda: target.copy_(source))


def quantizers(shape: Shape) -> list[tuple[str, int, Callable[[], None]]]:
    """(name, bytes, launch) of every quantizer that a forward and backward runs."""
    M, N, K, G = shape[1:]
    A = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    B = torch.randn(G, N, K, device="cuda", dtype=torch.bfloat16)
    offs = common.uneven_offs(shape)
    Mp = padded_tokens(M, G)
    specs = {
        "tiles": pipeline.TensorSpec((tiles.max_tiles(M, G, TOKEN_TILE), tiles.TILE_FIELDS), "int32"),
        "groups": pipeline.TensorSpec((G + 1, tiles.TILE_FIELDS), "int32"),
        "amax": pipeline.TensorSpec((G, max(N, K)), "int32"),
    }
    scratch = pipeline.allocate(specs, A.device)
    tiles.map_tiles(offs, M, TOKEN_TILE, scratch["tiles"], scratch["groups"])
    maps = scratch["tiles"], scratch["groups"]
    programs = torch.cuda.get_device_properties(0).multi_processor_count
    rows = []
    for fmt in FORMATS:
        mx = fmt != "fp8_rowwise"

        def output(*shape: int, scales: tuple[int, ...], mx: bool = mx) -> tuple[torch.Tensor, torch.Tensor]:
            data = torch.empty(shape, dtype=torch.float8_e4m3fn, device="cuda")
            scale_dtype = torch.float8_e8m0fnu if mx else torch.float32
            return data, torch.empty(scales, dtype=scale_dtype, device="cuda")

        row_out = output(M, K, scales=(M, -(-K // 32)) if mx else (M,))
        token_out = output(K, Mp, scales=(K, Mp // 32) if mx else (G, K))
        k_out = output(G, N, K, scales=(G, N, -(-K // 32)) if mx else (G, N))
        n_out = output(G, K, N, scales=(G, K, -(-N // 32)) if mx else (G, K))
        k_amax, n_amax = scratch["amax"][:, :N].contiguous(), scratch["amax"][:, :K].contiguous()
        for name, x, out, launch in (
            ("rows", A, row_out, lambda f=fmt, o=row_out: quantize.quantize_rows(A, f, *o, programs)),
            ("tokens", A, token_out, lambda f=fmt, o=token_out, s=n_amax: quantize.quantize_tokens(A, f, *o, s, *maps)),
            (
                "rows and tokens",
                A,
                row_out + token_out,
                lambda f=fmt, r=row_out, t=token_out, s=n_amax: quantize.quantize_rows_and_tokens(
                    A, f, r, t, s, *maps, programs
                ),
            ),
            ("weights K", B, k_out, lambda f=fmt, o=k_out, s=k_amax: quantize.quantize_weights(B, f, *o, s, programs)),
            (
                "weights N",
                B,
                n_out,
                lambda f=fmt, o=n_out, s=n_amax: quantize.quantize_weights(B.mT, f, *o, s, programs),
            ),
        ):
            rows.append((f"{fmt} {name}", x.nbytes + sum(t.nbytes for t in out), launch))
    return rows


def main() -> None:
    args = common.arguments(str(__doc__)).parse_args()
    bandwidth = copy_bandwidth()
    rows = [["", "device copy", 2**33, 2**33 / bandwidth, 1.0]]
    for shape in common.shapes(args.shapes.split(",")):
        for name, nbytes, launch in quantizers(shape):
            ms = common.median_ms(launch)
            rows.append(common.progress([shape.name, name, nbytes, ms, nbytes / ms / bandwidth]))
        torch.cuda.empty_cache()
    common.save("quantize", {"quantizers": (["shape", "quantizer", "bytes", "ms", "fraction of copy"], rows)}, args.out)


if __name__ == "__main__":
    main()
