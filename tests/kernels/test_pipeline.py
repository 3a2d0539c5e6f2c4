"""Forward and backward on a GPU: every line of the dispatch table against the oracle, and no hidden work."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cuda_graphs import recording
from tests.kernels.backends import INTERPRETER_WORKS, arrays
from xmoe import RECIPES, config_from_recipe, oracle
from xmoe.kernels import call, e4m3, grouped_gemm, pipeline
from xmoe.kernels.dispatch import Device, UnsupportedError, select
from xmoe.operands import padded_tokens, scale_tiles_shape
from xmoe.shapes import PATTERNS, offsets

KERNEL_TIER_DB = 50
M, K, N, G = 700, 192, 144, 5
NATIVE_MX = Device("cuda", (10, 0))
"""sm_100's lines of the table; on another GPU Triton computes their `tl.dot_scaled` through bf16."""


def poisoned(specs: dict[str, pipeline.TensorSpec], where: str) -> dict[str, torch.Tensor]:
    """Tensors by their specs, every byte 0xFF: NaN in each float format."""
    tensors = pipeline.allocate(specs, torch.device(where))
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(0xFF)
    return tensors


class Run:
    """One forward and backward on poisoned outputs and scratch."""

    def __init__(
        self, config, pattern, *, dtype=torch.bfloat16, stored="GKN", device=None, M=M, K=K, N=N, seed=0, where="cuda",
        save_amax=True,
    ):  # fmt: skip
        """`save_amax`: where weights that are stored so give them, their maxima go from the forward to the backward."""
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(where, dtype)  # noqa: E731
        self.A, self.B, self.dOut = draw(M, K), draw(G, K, N), draw(M, N)
        if stored == "GNK":
            self.B = self.B.mT.contiguous().mT
        self.config, self.M = config, M
        self.ends = offsets(pattern, M, G)
        self.offs = torch.from_numpy(self.ends).to(where)
        self.covered = oracle.token_layout(self.ends, M)[-1].end
        self.A[self.covered :] = float("nan")
        self.dOut[self.covered :] = float("nan")
        name = str(dtype).removeprefix("torch.")
        self.problem = pipeline.Problem(M, N, K, G, name, name, config.out_dtype or name)
        self.device = device or pipeline.device_of("cuda", 0)
        save_amax = save_amax and stored == "GNK"
        forward = pipeline.forward_spec(self.problem, config, self.device, save_amax=save_amax)
        known = "b_amax" in forward.outputs
        assert known == (
            save_amax and config.format == "fp8_rowwise" and select(config, self.device).gemm != "emulated"
        )
        backward = pipeline.backward_spec(self.problem, config, self.device, amax_is_known=known)
        self.outputs, self.scratch = poisoned(forward.outputs, where), poisoned(forward.scratch, where)
        self.grads, self.grad_scratch = poisoned(backward.outputs, where), poisoned(backward.scratch, where)
        if stored == "GNK":
            self.grads["dB"] = self.grads["dB"].view(G, N, K).mT

    def __call__(self):
        pipeline.forward(self.problem, self.config, self.device, self.A, self.B, self.offs, self.outputs, self.scratch)
        saved = (self.A,)
        if not pipeline.saves_input(self.config):
            saved = (self.outputs["a_tokens"], self.outputs["a_tokens_scale"])
        pipeline.backward(
            self.problem, self.config, self.device, self.dOut, saved, self.B, self.offs, self.grads, self.grad_scratch,
            self.outputs.get("b_amax"),
        )  # fmt: skip
        return self.outputs["out"], self.grads["dA"], self.grads["dB"]

    def check(self):
        out, dA, dB = self()
        A, B, dOut = (arrays(x) for x in (self.A, self.B, self.dOut))
        expected = (
            oracle.forward(A, B, self.ends, self.config),
            oracle.dgrad(dOut, B, self.ends, self.config),
            oracle.wgrad(A, dOut, self.ends, self.config),
        )
        for name, got, want in zip(("out", "dA", "dB"), (out, dA, dB), expected, strict=True):
            assert torch.isfinite(got).all(), name
            parts = (
                range(G) if name == "dB" else [slice(g.start, g.end) for g in oracle.token_layout(self.ends, self.M)]
            )
            for part in parts:  # per expert: a whole-tensor gate misses a dead small one
                if np.any(want[part]):
                    assert oracle.sqnr(want[part], arrays(got[part])) >= KERNEL_TIER_DB, (name, part)
                else:
                    assert not got[part].any(), (name, part)
        assert not out[self.covered :].any()
        assert not dA[self.covered :].any()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, pattern):
    Run(config_from_recipe(recipe), pattern).check()


@pytest.mark.gpu
@pytest.mark.parametrize("stored", ["GKN", "GNK"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("accumulation", ["fast", "precise"])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil"])
def test_dtypes_layouts_accumulation(recipe, accumulation, dtype, stored):
    config = dataclasses.replace(config_from_recipe(recipe), accumulation=accumulation)
    Run(config, "uneven", dtype=dtype, stored=stored).check()


class TritonGemm:
    """In place of `grouped_gemm_hopper`, which the interpreter cannot run: what it computes, from its layout."""

    def grouped_mm(self, a, a_scale, b, b_scale, *args):
        grouped_gemm.grouped_mm(a, a_scale.contiguous(), b, b_scale, *args, blockwise=True)

    def grouped_mm_tokens(self, a, a_scale, b, b_scale, *args):
        grouped_gemm.grouped_mm_tokens(a, a_scale.contiguous(), b, b_scale.contiguous(), *args, blockwise=True)


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.parametrize(("pattern", "stored"), [("short", "GKN"), ("empty", "GNK")])
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_in_the_interpreter(recipe, pattern, stored, monkeypatch):
    """The whole pipeline without a GPU, in the recipes whose arithmetic the interpreter has right (backends.py)."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    monkeypatch.setattr(call, "grouped_gemm_hopper", TritonGemm())
    run = Run(config_from_recipe(recipe), pattern, dtype=torch.float32, stored=stored,
              device=Device("cuda", (9, 0)), M=150, K=48, N=32, where="cpu")  # fmt: skip
    run.check()


def test_maxima_from_the_forward_change_no_bit(backend, monkeypatch):
    """They are what the backward would find, and it finds them no more."""
    options = {"dtype": torch.bfloat16}
    if not backend.hardware:
        monkeypatch.setattr(call, "programs", lambda index: 3)
        options = {"dtype": torch.float32, "device": Device("cuda", (9, 0)), "where": "cpu", "M": 70, "K": 48, "N": 32}
    config = config_from_recipe("fp8_rowwise")
    known, found = (Run(config, "short", stored="GNK", save_amax=flag, **options) for flag in (True, False))
    for x, y in zip(known(), found(), strict=True):
        assert torch.equal(x, y)
    assert torch.equal(known.outputs["b_amax"], found.grad_scratch["b_amax"])
    assert "b_amax" not in {**known.scratch, **known.grad_scratch, **found.outputs}


class Float64Gemm:
    """In place of `grouped_gemm`, whose bf16 operands the interpreter multiplies wrongly."""

    def grouped_mm(self, a, a_scale, b, b_scale, tiles, groups, out, *_):
        assert a_scale is b_scale is None
        out.zero_()
        for expert, (start, end) in zip(b.double(), groups[:-1, :2].tolist(), strict=True):
            out[start:end] = a[start:end].double() @ expert.mT

    def grouped_mm_tokens(self, a, a_scale, b, b_scale, groups, out, *_):
        assert a_scale is b_scale is None
        for g, (start, end) in enumerate(groups[:-1, :2].tolist()):
            out[g] = a[start:end].double().mT @ b[start:end].double()


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.parametrize(
    ("recipe", "pattern", "stored"), [("mxfp8_rceil", "short", "GNK"), ("mxfp8_floor", "uneven", "GKN")]
)
def test_mx_through_bf16_in_the_interpreter(recipe, pattern, stored, monkeypatch):
    """All but the GEMMs themselves."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    monkeypatch.setattr(call, "grouped_gemm", Float64Gemm())
    Run(config_from_recipe(recipe), pattern, dtype=torch.float32, stored=stored, device=Device("cuda", (9, 0)),
        M=150, K=48, N=32, where="cpu").check()  # fmt: skip


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.usefixtures("dot_scaled")
@pytest.mark.parametrize(
    ("recipe", "pattern", "stored"),
    [("mxfp8_rceil", "short", "GNK"), ("mxfp8_floor", "uneven", "GKN"), ("mxfp8_rceil_wgrad_with_hp", "empty", "GKN")],
)
def test_scale_tiles_in_the_interpreter(recipe, pattern, stored, monkeypatch):
    """sm_100's path but for the MMA itself; K and N end inside a tile of scales, and inside a block."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    if recipe.endswith("hp"):
        monkeypatch.setattr(grouped_gemm, "grouped_mm_tokens", Float64Gemm().grouped_mm_tokens)
    Run(config_from_recipe(recipe), pattern, dtype=torch.float32, stored=stored, device=NATIVE_MX,
        M=300, K=48, N=144, where="cpu").check()  # fmt: skip


SAVED_ON = {
    "fp8_rowwise": (Device("cuda", (9, 0)), Device("cpu")),
    "fp8_blockwise": (Device("cuda", (9, 0)), Device("cuda", (8, 9))),
    "mxfp8_rceil": (Device("cuda", (9, 0)), NATIVE_MX),
}


@pytest.mark.usefixtures("dot_scaled")
@pytest.mark.parametrize(
    ("recipe", "device"), [(recipe, d) for recipe, each in SAVED_ON.items() for d in each], ids=str
)
def test_what_is_saved_alone_is_what_the_forward_saves(recipe, device, backend, monkeypatch):
    config, options = config_from_recipe(recipe), {}
    if not backend.hardware or device.type == "cpu":
        monkeypatch.setattr(call, "programs", lambda index: 3)
        monkeypatch.setattr(call, "grouped_gemm_hopper", TritonGemm())
        monkeypatch.setattr(
            call.grouped_gemm, "grouped_mm", lambda *args, **options: None
        )  # only what is saved matters
        options = {"dtype": torch.float32, "M": 150, "K": 48, "N": 32, "where": "cpu"}
    run = Run(config, "short", device=device, **options)
    pipeline.forward(run.problem, config, device, run.A, run.B, run.offs, run.outputs, run.scratch)
    spec = pipeline.saved_spec(run.problem, config, device)
    saved, scratch = (poisoned(tensors, run.A.device.type) for tensors in (spec.outputs, spec.scratch))
    pipeline.save(run.problem, config, device, run.A, run.offs, saved, scratch)
    assert set(saved) == {"a_tokens", "a_tokens_scale"}
    for name, got in saved.items():
        want, got = (x.view(torch.uint8) for x in (run.outputs[name], got))
        if select(config, device).straight_tokens:  # rows of nobody, and their scales, are never read
            blocks = sum(4 * -(-(g.end - g.start) // 128) for g in oracle.token_layout(run.ends, run.M))
            used = run.covered if name == "a_tokens" else blocks
            want, got = want[:used], got[:used]
        assert torch.equal(want, got), name


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise_wgrad_with_hp"])
def test_nothing_is_saved_where_the_backward_takes_the_input(recipe):
    problem, config = pipeline.Problem(M, N, K, G), config_from_recipe(recipe)
    for device in (Device("cuda", (9, 0)), Device("cpu")):
        assert pipeline.saved_spec(problem, config, device) == pipeline.Spec()
    pipeline.save(problem, config, Device("cpu"), torch.empty(M, K), torch.empty(G), {}, {})


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_floor"])
def test_no_tokens(recipe):
    Run(config_from_recipe(recipe), "uneven", M=0).check()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp"])
def test_torch_engine(recipe, pattern):
    config = dataclasses.replace(config_from_recipe(recipe), kernel_preference="torch")
    Run(config, pattern).check()


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", ["mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_with_hp"])
def test_native_mx(recipe, pattern):
    Run(config_from_recipe(recipe), pattern, device=NATIVE_MX).check()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "bf16"])
def test_bad_offsets_stay_inside(recipe):
    run = Run(config_from_recipe(recipe), "uneven")
    run.offs = torch.tensor([90, -4, 2**31 - 1, -(2**31), 20], dtype=torch.int32, device="cuda")
    run.ends, run.covered = run.offs.cpu().numpy(), M
    run.A.nan_to_num_(1.0), run.dOut.nan_to_num_(1.0)
    run.check()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_rceil", "fp8_rowwise_wgrad_with_hp"])
def test_neither_allocates_nor_waits_and_replays_in_a_graph(recipe):
    run = Run(config_from_recipe(recipe), "uneven")
    eager = [x.clone() for x in run()]
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with recording(graph):
        results = run()
    for x in results:
        x.fill_(float("nan"))
    graph.replay()
    for got, want in zip(results, eager, strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8_rceil"])
def test_poison_stays_in_its_group(recipe):
    clean, hit = Run(config_from_recipe(recipe), "uneven"), Run(config_from_recipe(recipe), "uneven")
    groups = oracle.token_layout(hit.ends, M)
    row = groups[2].start
    hit.A[row, 5] = float("nan")
    hit.dOut[row, 7] = float("inf")
    (out, dA, dB), (clean_out, clean_dA, clean_dB) = hit(), clean()
    others = torch.arange(M, device="cuda") != row
    assert torch.isnan(out[row]).all()
    assert torch.isnan(dA[row]).all()
    assert torch.equal(out[others], clean_out[others])
    assert torch.equal(dA[others], clean_dA[others])
    for g in {0, 1, 3, 4}:
        assert torch.equal(dB[g], clean_dB[g])
    assert torch.isnan(dB[2, 5]).all()
    assert torch.isnan(dB[2, :, 7]).all()


def test_unsupported_preferences_say_what_to_do():
    for preference, recipe, device in (
        ("triton", "fp8_rowwise", Device("cpu")),
        ("torch", "bf16", Device("cuda", (8, 0))),
        ("torch", "mxfp8_rceil", Device("cuda", (9, 0))),
        ("torch", "fp8_rowwise", Device("cuda", (8, 9))),
        ("torch", "fp8_blockwise", Device("cuda", (9, 0))),
    ):
        config = dataclasses.replace(config_from_recipe(recipe), kernel_preference=preference)
        with pytest.raises(
            UnsupportedError, match=rf"kernel_preference={preference} cannot run {recipe}.*; use kernel_pre"
        ):
            select(config, device)


@pytest.mark.parametrize(
    ("capability", "fp8", "mx"),
    [
        (None, "emulated", "emulated"),
        ((8, 0), "emulated", "emulated"),
        ((8, 9), "triton-fp8", "triton-mx-via-bf16"),
        ((9, 0), "triton-fp8", "triton-mx-via-bf16"),
        ((10, 0), "triton-fp8", "triton-mx"),
        ((12, 0), "triton-fp8", "triton-mx-via-bf16"),
    ],
)
def test_dispatch(capability, fp8, mx):
    device = Device("cuda" if capability else "cpu", capability)
    assert select(config_from_recipe("fp8_rowwise"), device).name == fp8
    blockwise = "gluon-blockwise" if capability == (9, 0) else fp8.replace("fp8", "blockwise")
    assert select(config_from_recipe("fp8_blockwise"), device).name == blockwise
    assert select(config_from_recipe("mxfp8_rceil"), device).name == mx
    assert select(config_from_recipe("mxfp8_emulated_rceil"), device).name == "emulated"
    precise = dataclasses.replace(config_from_recipe("mxfp8_rceil"), accumulation="precise")
    assert select(precise, device).name != "triton-mx"
    assert select(config_from_recipe("fp8_rowwise"), dataclasses.replace(device, triton=False)).name == "emulated"


@pytest.mark.parametrize("recipe", RECIPES)
def test_spec_of_what_is_saved(recipe):
    """Saved for the backward: one byte an element and its scales, or A itself; tokens last, unless MMAs are in bf16;
    scales in tiles where the MMAs take them so."""
    config = config_from_recipe(recipe)
    problem = pipeline.Problem(M, N, K, G)
    cpu, sm90, sm100 = (
        pipeline.forward_spec(problem, config, device).outputs
        for device in (Device("cpu"), Device("cuda", (9, 0)), Device("cuda", (10, 0)))
    )
    mx = recipe in ("mxfp8_rceil", "mxfp8_floor")
    assert mx or cpu == sm100
    assert ("a_tokens" in cpu) != pipeline.saves_input(config)
    Mp = padded_tokens(M, G)
    if mx:
        assert sm100["a_tokens"] == cpu["a_tokens"]
        assert sm100["a_tokens_scale"] == pipeline.TensorSpec(scale_tiles_shape(K, Mp), "float8_e8m0fnu")
        assert cpu["a_tokens"] == pipeline.TensorSpec((K, Mp), "float8_e4m3fn")
        assert sm90["a_tokens"] == pipeline.TensorSpec((M, K), "float8_e4m3fn")
        assert sm90["a_tokens_scale"].shape == cpu["a_tokens_scale"].shape[::-1]
    elif recipe == "fp8_blockwise":
        assert sm90["a_tokens"] == cpu["a_tokens"]
        assert sm90["a_tokens_scale"].shape == cpu["a_tokens_scale"].shape[::-1]
    else:
        assert cpu == sm90
    if recipe == "fp8_blockwise":
        assert cpu["a_tokens"] == pipeline.TensorSpec((K, Mp), "float8_e4m3fn")
        assert cpu["a_tokens_scale"] == pipeline.TensorSpec((K, Mp // 128), "float32")
    assert "a_tokens" not in pipeline.forward_spec(problem, config, Device("cpu"), save_tokens=False).outputs


def test_warm_up_compiles_what_a_call_launches():
    """Every (kernel, specialisation) of a real call is among its warm-up's. Recorded on the CPU, never compiled."""
    script = Path(__file__).with_name("record_launches.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
