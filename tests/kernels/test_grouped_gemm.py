"""Triton grouped GEMMs against the oracle on the same quantized operands, into poisoned outputs."""

import dataclasses
import functools

import numpy as np
import pytest
import torch

from tests.kernels.backends import arrays
from tests.kernels.test_quantize import token_map
from xmoe import config_from_recipe, oracle
from xmoe.kernels import grouped_gemm, grouped_gemm_hopper, specs, stages, tuning
from xmoe.kernels.dispatch import has_warp_specialized
from xmoe.kernels.emulation import to_scale_tiles
from xmoe.kernels.tuning import GemmTiles
from xmoe.operands import TOKEN_TILE

KERNEL_TIER_DB = 50
SMALL = GemmTiles(rows=32, cols=32, depth=32, warps=4, stages=2, band=2, parts=1)
BLOCKWISE = GemmTiles(rows=32, cols=64, depth=128, warps=4, stages=2, band=2, parts=2)

PATTERNS = {
    "uneven": (150, [30, 93, 150]),
    "empty groups": (150, [0, 70, 70, 150, 150]),
    "one group has all": (150, [0, 150, 150]),
    "short": (150, [30, 93, 140]),
    "one row": (150, [1, 2, 150]),
    "nothing": (150, [0, 0]),
    "no tokens": (0, [0, 0]),
    "bad offsets": (150, [90, -4, 1000, 20]),
}
pattern = pytest.mark.parametrize(("M", "ends"), PATTERNS.values(), ids=PATTERNS.keys())


def tensor(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """A torch copy of an oracle array, fp8 included."""
    byte = torch.tensor(np.ascontiguousarray(array).view(np.uint8).ravel(), device=device)
    return byte.view(getattr(torch, array.dtype.name)).view(array.shape)


def tiles_for(backend, kernel: str, elements: str, M: int, G: int, heavy: bool = True) -> GemmTiles:
    if not backend.hardware:
        return BLOCKWISE if elements == "blockwise" else SMALL
    return tuning.lookup(kernel, elements, torch.cuda.get_device_capability(), M, G, 256, heavy)


def blockwise_gemms(backend):
    """(grouped_mm, grouped_mm_tokens) of "blockwise" operands on this GPU, as the dispatch table has them."""
    if backend.hardware and has_warp_specialized(torch.cuda.get_device_capability()):
        return grouped_gemm_hopper.grouped_mm, grouped_gemm_hopper.grouped_mm_tokens
    return (functools.partial(f, blockwise=True) for f in (grouped_gemm.grouped_mm, grouped_gemm.grouped_mm_tokens))


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(out: torch.Tensor, expected: np.ndarray) -> None:
    assert torch.isfinite(out).all()
    if expected.any():
        assert oracle.sqnr(expected, arrays(out)) >= KERNEL_TIER_DB
    else:
        assert not out.any()


def covered(M: int, ends: list[int]) -> int:
    """Rows that belong to a group."""
    return oracle.token_layout(ends, M)[-1].end


# The interpreter's bf16 is wrong (backends.py): it multiplies float16 and writes float32 instead.
def plain_dtype(backend) -> torch.dtype:
    return torch.bfloat16 if backend.hardware else torch.float16


@pytest.mark.parametrize("precise", [False, True], ids=["fast", "precise"])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pattern
def test_fp8(backend, M, ends, out_dtype, precise):
    if not backend.hardware and out_dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16")
    G, K, N = len(ends), 80, 48
    A, B = normal(M, K), normal(G, K, N)
    A[covered(M, ends) :] = float("nan")  # rows of no group
    a, b = oracle.quantize_rows(A.numpy(), "fp8_rowwise"), oracle.quantize_weights(B.numpy(), "K", "fp8_rowwise")
    tuned = tiles_for(backend, "grouped_mm", "fp8", M, G, heavy=precise or out_dtype is torch.float32)
    offs = torch.tensor(ends, dtype=torch.int32, device=backend.device)
    out = torch.full((M, N), float("nan"), dtype=out_dtype, device=backend.device)
    operands = [tensor(x, backend.device) for x in (a.data, a.scale, b.data, b.scale)]
    grouped_gemm.grouped_mm(*operands, *token_map(offs, M, tuned.rows), out, tuned, 5, precise)
    close(out, oracle.grouped_mm(a, b, ends))
    assert not out[covered(M, ends) :].any()


@pytest.mark.parametrize("precise", [False, True], ids=["fast", "precise"])
@pattern
def test_fp8_tokens(backend, M, ends, precise):
    G, K, N = len(ends), 80, 48
    A, D = normal(M, K), normal(M, N)
    a, d = (oracle.quantize_tokens(x.numpy(), ends, "fp8_rowwise") for x in (A, D))
    tuned = tiles_for(backend, "grouped_mm_tokens", "fp8", M, G)
    groups = token_map(torch.tensor(ends, dtype=torch.int32, device=backend.device), M)[1]
    out = torch.full((G, K, N), float("nan"), dtype=torch.float32, device=backend.device)
    operands = [tensor(x, backend.device) for x in (a.data, a.scale, d.data, d.scale)]
    grouped_gemm.grouped_mm_tokens(*operands, groups, out, tuned, 5, precise)
    close(out, oracle.grouped_mm_tokens(a, d, ends))
    for g, group in enumerate(oracle.token_layout(ends, M)):
        assert group.end > group.start or not out[g].any()


def spread(x: torch.Tensor) -> torch.Tensor:
    """Blocks of 16 along the last two axes that differ by powers of two, so that a wrong scale shows."""
    exponent = torch.arange(x.shape[-1]) // 16 * 3 + torch.arange(x.shape[-2])[:, None] // 16 * 5
    return x * torch.exp2((exponent % 17 - 8).float())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pattern
def test_blockwise(backend, M, ends, out_dtype):
    """Three blocks of the contraction, the last one short; columns in two blocks, tiles that end inside both."""
    if not backend.hardware and out_dtype is torch.bfloat16:
        pytest.skip("the interpreter truncates to bf16")
    G, K, N = len(ends), 272, 144
    A, B = spread(normal(M, K)), spread(normal(G, K, N))
    A[covered(M, ends) :] = float("nan")  # rows of no group
    a, b = oracle.quantize_rows(A.numpy(), "fp8_blockwise"), oracle.quantize_weights(B.numpy(), "K", "fp8_blockwise")
    tuned = tiles_for(backend, "grouped_mm", "blockwise", M, G, heavy=out_dtype is torch.float32)
    offs = torch.tensor(ends, dtype=torch.int32, device=backend.device)
    out = torch.full((M, N), float("nan"), dtype=out_dtype, device=backend.device)
    operands = [tensor(x, backend.device) for x in (a.data, a.scale, b.data, b.scale)]
    grouped_mm, _ = blockwise_gemms(backend)
    grouped_mm(*operands, *token_map(offs, M, tuned.rows), out, tuned, 5)
    close(out, oracle.grouped_mm(a, b, ends))
    assert not out[covered(M, ends) :].any()


@pytest.mark.parametrize(("M", "ends"), [*PATTERNS.values(), (400, [140, 140, 400])], ids=[*PATTERNS, "several tiles"])
def test_blockwise_tokens(backend, M, ends):
    G, K, N = len(ends), 80, 48
    A, D = spread(normal(M, K)), spread(normal(M, N))
    a, d = (oracle.quantize_tokens(x.numpy(), ends, "fp8_blockwise") for x in (A, D))
    tuned = tiles_for(backend, "grouped_mm_tokens", "blockwise", M, G)
    groups = token_map(torch.tensor(ends, dtype=torch.int32, device=backend.device), M)[1]
    out = torch.full((G, K, N), float("nan"), dtype=torch.float32, device=backend.device)
    operands = [tensor(x, backend.device) for x in (a.data, a.scale, d.data, d.scale)]
    _, grouped_mm_tokens = blockwise_gemms(backend)
    grouped_mm_tokens(*operands, groups, out, tuned, 5)
    close(out, oracle.grouped_mm_tokens(a, d, ends))
    for g, group in enumerate(oracle.token_layout(ends, M)):
        assert group.end > group.start or not out[g].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="for sm_90")
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape_class", ["many", "few"])
@pytest.mark.parametrize(("M", "ends"), [(1500, [300, 930, 1500]), (1500, [40, 40, 1111]), (0, [0])], ids=str)
def test_warp_specialized(M, ends, shape_class, out_dtype):
    """The bits of the Triton kernels, from more tiles than programs, with scales and outputs that lie apart."""
    G, K, N = len(ends), 656, 528
    device, offs = torch.device("cuda"), torch.tensor(ends, dtype=torch.int32, device="cuda")
    a = oracle.quantize_rows(spread(normal(M, K)).numpy(), "fp8_blockwise")
    b = oracle.quantize_weights(spread(normal(G, K, N)).numpy(), "K", "fp8_blockwise")
    a_tokens, d_tokens = (oracle.quantize_tokens(spread(normal(M, C)).numpy(), ends, "fp8_blockwise") for C in (K, N))
    a, b, a_tokens, d_tokens = ([tensor(x.data, device), tensor(x.scale, device)] for x in (a, b, a_tokens, d_tokens))
    a_scale, *tokens_scales = (x[1].mT.contiguous().mT for x in (a, a_tokens, d_tokens))
    triton_tiles = GemmTiles(rows=128, cols=128, depth=128, warps=8, stages=3, band=4, parts=1)
    for programs in (5, 132):
        poison = torch.full((M, 2 * N), float("nan"), dtype=out_dtype, device=device)
        want, out = poison[:, :N].clone(), poison[:, N:]
        grouped_gemm.grouped_mm(*a, *b, *token_map(offs, M, 128), want, triton_tiles, programs, blockwise=True)
        tuned = tuning.lookup("grouped_mm", "blockwise", (9, 0), 10**6 * (shape_class == "many"), G, N)
        if out_dtype is torch.float32:
            tuned = dataclasses.replace(tuned, stages=3)
        grouped_gemm_hopper.grouped_mm(a[0], a_scale, *b, *token_map(offs, M, tuned.rows), out, tuned, programs)
        assert torch.equal(out, want)
        assert poison[:, :N].isnan().all()
        want, out = (torch.full((G, K, N), float("nan"), dtype=out_dtype, device=device) for _ in range(2))
        groups = token_map(offs, M)[1]
        grouped_gemm.grouped_mm_tokens(*a_tokens, *d_tokens, groups, want, triton_tiles, programs, blockwise=True)
        operands = a_tokens[0], tokens_scales[0], d_tokens[0], tokens_scales[1]
        grouped_gemm_hopper.grouped_mm_tokens(*operands, groups, out, tuned, programs)
        assert torch.equal(out, want)


def test_blockwise_tiles_are_blocks(backend):
    """A step of another depth, or columns in two blocks of weights, would take one scale for two."""
    a, b = (torch.zeros(s, dtype=torch.float8_e4m3fn, device=backend.device) for s in ((16, 256), (1, 256, 256)))
    a_scale, b_scale = (torch.ones(s, device=backend.device) for s in ((16, 2), (1, 2, 2)))
    out, maps = torch.empty(16, 256, device=backend.device), (None, None)
    for wrong in (dataclasses.replace(BLOCKWISE, depth=64), dataclasses.replace(BLOCKWISE, cols=256)):
        with pytest.raises(AssertionError, match="one block"):
            grouped_gemm.grouped_mm(a, a_scale, b, b_scale, *maps, out, wrong, 1, blockwise=True)


@pytest.mark.parametrize("stored", ["GKN", "GNK", "half of a fused weight"])
@pattern
def test_plain(backend, M, ends, stored):
    """bf16 operands as they lie: B with K or N contiguous, its experts apart."""
    G, K, N = len(ends), 80, 48
    dtype = plain_dtype(backend)
    A, B = (x.to(backend.device, dtype) for x in (normal(M, K), normal(G, K, N)))
    A[covered(M, ends) :] = float("nan")
    if stored == "GNK":
        B = B.mT.contiguous().mT
    elif stored == "half of a fused weight":
        B = torch.cat([torch.full_like(B.mT, float("nan")), B.mT], 1)[:, N:].mT
    expected = np.zeros((M, N))
    for g, group in enumerate(oracle.token_layout(ends, M)):
        expected[group.start : group.end] = arrays(A[group.start : group.end]).astype(float) @ arrays(B[g])
    tuned = tiles_for(backend, "grouped_mm", "bf16", M, G)
    offs = torch.tensor(ends, dtype=torch.int32, device=backend.device)
    out = torch.full((M, N), float("nan"), dtype=torch.float32, device=backend.device)
    grouped_gemm.grouped_mm(A, None, B.mT, None, *token_map(offs, M, tuned.rows), out, tuned, 5)
    close(out, expected)


@pattern
def test_plain_tokens(backend, M, ends):
    """A poisoned token, of another group or of none, must not reach a group through its last, partial tile."""
    G, K, N = len(ends), 80, 48
    A, D = (x.to(backend.device, plain_dtype(backend)) for x in (normal(M, K), normal(M, N)))
    layout = oracle.token_layout(ends, M)
    tuned = tiles_for(backend, "grouped_mm_tokens", "bf16", M, G)
    groups = token_map(torch.tensor(ends, dtype=torch.int32, device=A.device), M)[1]
    for kept in range(G):
        mine = slice(layout[kept].start, layout[kept].end)
        a, d = torch.full_like(A, float("nan")), torch.full_like(D, float("nan"))
        a[mine], d[mine] = A[mine], D[mine]
        out = torch.full((G, K, N), 7.0, dtype=torch.float32, device=A.device)
        grouped_gemm.grouped_mm_tokens(a, None, d, None, groups, out, tuned, 5)
        close(out[kept], arrays(A[mine]).T.astype(float) @ arrays(D[mine]))
        for g, group in enumerate(layout):
            assert group.end > group.start or not out[g].any()


@pytest.mark.usefixtures("dot_scaled")
@pytest.mark.parametrize("fmt", ["mxfp8_rceil", "mxfp8_floor"])
@pytest.mark.parametrize(("M", "ends"), [*PATTERNS.values(), (400, [140, 140, 400])], ids=[*PATTERNS, "several tiles"])
def test_native_mx(backend, M, ends, fmt):
    """The block-scaled kernel that sm_100 gets natively; on other GPUs Triton computes `tl.dot_scaled` through bf16.
    Scales in two tiles along either axis, which differ from block to block."""
    G, K, N = len(ends), 176, 144
    A, B, D = spread(normal(M, K)), spread(normal(G, K, N)), spread(normal(M, N))
    out_dtype = torch.bfloat16 if backend.hardware else torch.float32
    device, tuned = backend.device, GemmTiles(rows=128, cols=128, depth=128, warps=4, stages=2, band=8, parts=2)
    offs = torch.tensor(ends, dtype=torch.int32, device=device)
    a, b = oracle.quantize_rows(A.numpy(), fmt), oracle.quantize_weights(B.numpy(), "K", fmt)
    out = torch.full((M, N), float("nan"), dtype=out_dtype, device=device)
    data, scale = tensor(a.data, device), to_scale_tiles(tensor(a.scale, device), offs)
    weights, b_scale = tensor(b.data, device), to_scale_tiles(tensor(b.scale, device))
    grouped_gemm.grouped_mm(data, scale, weights, b_scale, *token_map(offs, M, tuned.rows), out, tuned, 5)
    close(out, oracle.grouped_mm(a, b, ends))
    a, d = (oracle.quantize_tokens(x.numpy(), ends, fmt) for x in (A, D))
    out = torch.full((G, K, N), float("nan"), dtype=out_dtype, device=device)
    operands = [f(tensor(x, device)) for op in (a, d) for f, x in ((torch.clone, op.data), (to_scale_tiles, op.scale))]
    grouped_gemm.grouped_mm_tokens(*operands, token_map(offs, M, TOKEN_TILE)[1], out, tuned, 5)
    close(out, oracle.grouped_mm_tokens(a, d, ends))


def test_tiles_by_the_waves_that_they_take():
    """Half as large where the last of a few waves would be nearly empty; never for many tokens of a wide output."""
    classes = tuning.table()["sm90"]["grouped_mm"]["fp8"]
    for M, G, P, name in (
        (8192, 16, 512, "half"),  # 144 tiles, two waves; 288 small ones, three
        (4096, 8, 2048, "half"),
        (4096, 8, 7168, "many"),
        (128000, 8, 8192, "many"),
        (131072, 128, 768, "many"),
        (16384, 128, 768, "few"),
    ):
        assert tuning.lookup("grouped_mm", "fp8", (9, 0), M, G, P) == classes[name], (M, G, P)
    assert tuning.lookup("grouped_mm", "fp8", (9, 0), 8192, 16, 512, heavy=True) == classes["heavy"]
    assert "half" not in tuning.table()["sm90"]["grouped_mm"]["blockwise"]


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
def test_tiles_of_every_class_give_the_same_bits(recipe, monkeypatch):
    config, M, N, K, G = config_from_recipe(recipe), 1000, 384, 512, 5
    A, B = normal(M, K).bfloat16().cuda(), normal(G, N, K).bfloat16().cuda().mT
    offs = torch.tensor([300, 300, 301, 700, 1000], dtype=torch.int32, device="cuda")
    outs = []
    for tiles in tuning.table()["sm90"]["grouped_mm"]["fp8" if recipe == "fp8_rowwise" else "bf16"].values():
        monkeypatch.setattr(tuning, "lookup", lambda *_, tiles=tiles: tiles)
        specs.forward_spec.cache_clear()
        gemm = stages.prepared_gemm(config, A, B, offs)
        gemm.launch()
        outs.append(gemm.out)
    specs.forward_spec.cache_clear()
    assert len(outs) > 3
    assert all(torch.equal(out, outs[0]) for out in outs)
