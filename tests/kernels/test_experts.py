"""SwiGLU experts in one piece against the grouped GEMMs and the SwiGLU that they are made of: the same bits."""

import numpy as np
import pytest
import torch

from tests.kernels.backends import INTERPRETER_WORKS
from tests.kernels.test_pipeline import NATIVE_MX, Float64Gemm, TritonGemm, poisoned
from xmoe import RECIPES, config_from_recipe, oracle
from xmoe.kernels import call, e4m3, emulation, experts, pipeline, replay
from xmoe.kernels.dispatch import Device, select
from xmoe.operands import whole_blocks
from xmoe.shapes import PATTERNS, offsets

if pipeline.HAS_TRITON:
    from xmoe.kernels import swiglu


class Run:
    """One forward and backward, on poisoned outputs and scratch, and the same from `pipeline`'s calls."""

    def __init__(
        self, recipe, pattern, *, dtype=torch.bfloat16, M=700, D=192, H=128, G=5, k=0, device=None, where="cuda"
    ):
        """`k`: x comes as tokens, k rows of each."""
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(shape, generator=generator).to(where, dtype)  # noqa: E731
        self.x, self.dout = draw(M, D), draw(M, D)
        self.w1, self.w2, self.w3 = draw(G, H, D) / D**0.5, draw(G, D, H) / H**0.5, draw(G, H, D) / D**0.5
        ends = offsets(pattern, M, G)
        self.offs = torch.from_numpy(ends).to(where)
        self.covered = oracle.token_layout(ends, M)[-1].end
        self.x[self.covered :] = float("nan")
        self.dout[self.covered :] = float("nan")
        name = str(dtype).removeprefix("torch.")
        self.config, self.where = config_from_recipe(recipe), where
        self.layouts: dict[int, pipeline.Layout] = {}  # of the specs, which are the same from call to call
        self.device = device or pipeline.device_of(where, 0)
        self.experts = experts.Experts(M, D, H, G, name, name, self.config.out_dtype or name, k)
        self.order = torch.randperm(M, generator=generator).to(where) if k else None
        self.tokens = draw(M // k, D) if k else self.x
        if k:
            self.x = self.tokens[self.order // k]
        self.places = experts.places(self.config, select(self.config, self.device), name)

    def _saved(self, x, outputs, name):
        if pipeline.saves_input(self.config):
            return (x,)
        return outputs[f"{name}_tokens"], outputs[f"{name}_tokens_scale"]

    def _tensors(self, spec):
        outputs = poisoned(spec.outputs, self.where)
        if not spec.scratch:
            return outputs, {}
        layout = self.layouts.setdefault(id(spec), pipeline.Layout(spec.scratch, turns=spec.turns))
        scratch = pipeline.Arena(layout, torch.device(self.where))
        scratch.memory.fill_(0xFF)
        return outputs, scratch

    def __call__(self) -> dict[str, torch.Tensor]:
        e, config, device, offs = self.experts, self.config, self.device, self.offs
        out, scratch = self._tensors(experts.forward_spec(e, config, device))
        weights = self.w1, self.w2, self.w3
        experts.forward(e, config, device, self.tokens, *weights, offs, out, scratch, self.order)
        got = {"out": out["out"], "gate_up": out["gate_up"].clone()}

        hidden = self.swiglu(out["gate_up"])
        spec = pipeline.backward_spec(e.output_problem, config, device, amax_is_known="w2_amax" in out)
        grads, scratch = self._tensors(spec)
        saved = self._saved(hidden, out, "h")
        of_w2, of_w13 = out.get("w2_amax"), out.get("w13_amax")
        pipeline.backward(e.output_problem, config, device, self.dout, saved, self.w2.mT, offs, grads, scratch, of_w2)
        got |= {"dh": grads["dA"].clone(), "dw2": grads["dB"].mT}

        saved = self._saved(self.tokens, out, "x")
        for needs in ((True, True), (True, False), (False, True)):
            tensors = {"dh": grads["dA"].clone(), "gate_up": out["gate_up"].clone()}
            left, scratch = self._tensors(experts.gradient_spec(e, config, device, *needs))
            experts.gradient(e, config, device, *tensors.values(), offs, *needs, left, scratch)
            tensors |= left
            maps = {name: left[name] for name in experts.MAPS if name in left}
            del left, scratch
            if needs[0]:
                dx, scratch = self._tensors(experts.dgrad_spec(e, config, device, amax_is_known=of_w13 is not None))
                d = tensors[self.places.rows], tensors.get("d_scale")
                experts.dgrad(
                    e, config, device, *d, (self.w1, self.w3), offs, dx, scratch, maps, of_w13, out.get("place")
                )
                got |= {f"dx, needs {needs}": dx["dx"]}
            if needs[1]:
                dw, scratch = self._tensors(experts.wgrad_spec(e, config, device))
                d = tensors[self.places.tokens], tensors.get("d_tokens_scale")
                experts.wgrad(e, config, device, *d, saved, offs, dw, scratch, maps, out.get("tokens"))
                got |= {f"{name}, needs {needs}": dw[name] for name in dw}
        got["d_gate_up"] = self.swiglu_gradient(grads["dA"], out["gate_up"])
        return got

    def swiglu(self, gate_up):
        if self.where == "cpu" and self.device.type == "cpu":
            return emulation.swiglu(gate_up)
        hidden = torch.empty_like(gate_up[:, : self.experts.H].contiguous())
        swiglu.swiglu(gate_up, hidden)
        return hidden

    def swiglu_gradient(self, dh, gate_up):
        if self.where == "cpu" and self.device.type == "cpu":
            return emulation.swiglu_gradient(dh, gate_up)
        d_gate_up = gate_up.clone()
        swiglu.swiglu_gradient_(dh, d_gate_up)
        return d_gate_up

    def _forward(self, problem, A, B):
        outputs, scratch = self._tensors(pipeline.forward_spec(problem, self.config, self.device))
        pipeline.forward(problem, self.config, self.device, A, B, self.offs, outputs, scratch)
        return outputs["out"], self._saved(A, outputs, "a")

    def _backward(self, problem, dout, saved, B):
        grads, scratch = self._tensors(pipeline.backward_spec(problem, self.config, self.device))
        pipeline.backward(problem, self.config, self.device, dout, saved, B, self.offs, grads, scratch)
        return grads["dA"], grads["dB"].mT

    def reference(self, d_gate_up) -> dict[str, torch.Tensor]:
        """From separate calls, given the gradient of gate_up (`test_swiglu` has that)."""
        e = self.experts
        (g, x), (u, _) = (self._forward(e.input_problem, self.x, w.mT) for w in (self.w1, self.w3))
        gate_up = torch.cat([g, u], 1)
        out, h = self._forward(e.output_problem, self.swiglu(gate_up), self.w2.mT)
        dh, dw2 = self._backward(e.output_problem, self.dout, h, self.w2.mT)
        joint = torch.cat([self.w1, self.w3], 1)
        dx, dw = self._backward(e.joint_problem, d_gate_up, x, joint.mT)
        if e.k:
            dx = emulation.gather_sum(dx, self.order.argsort(), e.k)
        expected = {"out": out, "gate_up": gate_up, "dh": dh, "dw2": dw2, "d_gate_up": d_gate_up}
        for needs in ((True, True), (True, False), (False, True)):
            if needs[0]:
                expected[f"dx, needs {needs}"] = dx
            if needs[1]:
                for name, half in zip(("dw1", "dw3"), dw.split(e.H, 1), strict=True):
                    expected[f"{name}, needs {needs}"] = half
        return expected

    def check(self):
        got = self()
        expected = self.reference(got["d_gate_up"])
        assert got.keys() == expected.keys()
        for name, x in got.items():
            assert torch.isfinite(x).all(), name
            if self.where == "cuda" and "emulated" in self.config.recipe:  # cuBLAS sums in an order that depends on N
                torch.testing.assert_close(x, expected[name])
            else:
                assert torch.equal(x, expected[name]), name
        for name in got:
            if not name.startswith("dw") and not (name.startswith("dx") and self.experts.k):
                assert not got[name][self.covered :].any(), name


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe, pattern):
    Run(recipe, pattern).check()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2, 7])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_as_the_router_saw_them(recipe, k):
    Run(recipe, "uneven", k=k).check()
    Run(recipe, "short", dtype=torch.float32, k=k).check()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil"])
def test_float32_and_long_rows(recipe):
    Run(recipe, "uneven", dtype=torch.float32).check()
    Run(recipe, "short", H=16384 + 128).check()  # rows that do not fit into registers


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil"])
def test_calls_that_come_again(recipe, monkeypatch):
    """On other memory: every result is kept."""
    monkeypatch.setattr(replay, "_calls", {})
    run = Run(recipe, "uneven")
    first, *others = [run() for _ in range(4)]
    for other in others:
        for name, x in other.items():
            assert torch.equal(x, first[name]), name
    run_each_time = {facts[0] for (facts, *_), call in replay._calls.items() if not call.steps}
    assert run_each_time == ({"dgrad"} if recipe == "bf16" else set())  # torch puts bf16 weights side by side


@pytest.mark.gpu
@pytest.mark.parametrize("H", [96, 128])
def test_native_mx(H):
    """A hidden width that ends inside a tile of scales, and one that does not."""
    Run("mxfp8_rceil", "uneven", device=NATIVE_MX, H=H).check()
    Run("mxfp8_rceil", "uneven", device=NATIVE_MX, H=H, k=2).check()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("pattern", ["short", "empty"])
@pytest.mark.parametrize("k", [0, 3])
def test_emulation(recipe, pattern, k):
    Run(recipe, pattern, M=150, D=48, H=128, k=k, where="cpu", device=Device("cpu")).check()


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.parametrize(
    ("recipe", "pattern", "k", "dtype"),
    [
        ("fp8_rowwise", "short", 0, torch.float32),
        ("fp8_rowwise", "uneven", 1, torch.bfloat16),  # k = 1: the interpreter would truncate sums
        ("fp8_blockwise", "empty", 3, torch.float32),
        ("fp8_blockwise", "empty", 1, torch.bfloat16),
        ("mxfp8_rceil", "uneven", 1, torch.bfloat16),
    ],
)
def test_in_the_interpreter(recipe, pattern, k, dtype, monkeypatch):
    monkeypatch.setattr(call, "programs", lambda index: 3)
    monkeypatch.setattr(call, "grouped_gemm_hopper", TritonGemm())
    H = 128 if recipe == "fp8_blockwise" else 32
    if recipe.startswith("mx"):
        monkeypatch.setattr(call, "grouped_gemm", Float64Gemm())
    Run(recipe, pattern, dtype=dtype, M=66, D=32, H=H, G=2, k=k, device=Device("cuda", (9, 0)), where="cpu").check()


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.usefixtures("dot_scaled")
@pytest.mark.parametrize("H", [96, 128])
def test_scale_tiles_in_the_interpreter(H, monkeypatch):
    """As `test_native_mx`, but for the MMA itself."""
    monkeypatch.setattr(call, "programs", lambda index: 3)
    Run("mxfp8_rceil", "uneven", dtype=torch.float32, M=66, D=32, H=H, G=2, device=NATIVE_MX, where="cpu").check()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_swiglu(backend):
    """The kernels and the emulation agree with float64 to a few roundings, far out too."""
    gates = torch.cat([torch.linspace(-100, 100, 2001), torch.tensor([-0.0, 1e-30, 3e4])]).view(4, 501)
    ups, dh = torch.randn(2, 4, 501, generator=torch.Generator().manual_seed(0)).to(backend.device)
    gate_up = torch.cat([gates.to(backend.device), ups], 1)
    g, u, d = (x.double().cpu().numpy() for x in (*gate_up.chunk(2, 1), dh))
    s = 1 / (1 + np.exp(-g))
    gradient = np.concatenate([d * u * s * (1 + g * (1 - s)), d * g * s], 1)

    out = torch.empty_like(dh)
    swiglu.swiglu(gate_up, out)
    for h in (out, emulation.swiglu(gate_up)):
        np.testing.assert_allclose(h.cpu(), g * s * u, rtol=1e-5, atol=1e-30)
    emulated = emulation.swiglu_gradient(dh, gate_up)
    swiglu.swiglu_gradient_(dh, gate_up)
    for x in (gate_up, emulated):
        np.testing.assert_allclose(x.cpu(), gradient, rtol=1e-5, atol=1e-6)


def test_which_widths_fuse():
    for fmt, multiple in (("bf16", 1), ("fp8_rowwise", 1), ("fp8_blockwise", 128), ("mxfp8_rceil", 32)):
        assert whole_blocks(fmt, 3 * multiple)
        assert whole_blocks(fmt, 3 * multiple + 16) == (16 % multiple == 0)
