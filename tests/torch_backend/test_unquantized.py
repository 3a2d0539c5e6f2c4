"""Converted weights outside of the grouped GEMM: what runs quantized all the same, and what warns."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

from tests.torch_backend.compiling import BACKEND, assert_compiled_close
from xmoe.config import FP8GroupedMMConfig
from xmoe.torch_backend import ScaledGroupedMMTensor, quantize_, scaled_grouped_mm, swiglu_experts

FP8 = FP8GroupedMMConfig()
G, T, K, N = 3, 5, 32, 48


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """(A [G, T, K], w [G, K, N], the same wrapped)."""
    w = torch.randn(G, K, N, dtype=dtype)
    return torch.randn(G, T, K, dtype=dtype), w, ScaledGroupedMMTensor(w, FP8)


def expected(A: Tensor, w: Tensor) -> Tensor:
    """Of A [G, T, K]: groups of T rows."""
    offs = torch.arange(1, len(w) + 1, dtype=torch.int32) * A.shape[1]
    return scaled_grouped_mm(A.flatten(0, 1), w, offs, FP8).unflatten(0, A.shape[:2])


BATCHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bmm": torch.bmm,
    "bmm of keywords": lambda A, w: torch.bmm(mat2=w, input=A),
    "method": lambda A, w: A.bmm(w),
    "matmul": torch.matmul,
    "@": lambda A, w: A @ w,
    "grouped without offs": lambda A, w: torch._grouped_mm(A, w),
    "weight first": lambda A, w: torch.bmm(w.mT, A.mT).mT,
    "weight @": lambda A, w: (w.mT @ A.mT).mT,
    "stored [G, N, K]": lambda A, w: torch.bmm(A, w.mT.contiguous().transpose(1, 2)),
    "experts one by one": lambda A, w: torch.stack([A[g] @ w[g] for g in range(G)]),
    "mm": lambda A, w: torch.stack([torch.mm(a, e) for a, e in zip(A, w.unbind(), strict=True)]),
    "linear": lambda A, w: torch.stack([F.linear(A[g], w.mT[g]) for g in range(G)]),
}


@pytest.mark.parametrize("f", BATCHED.values(), ids=BATCHED.keys())
def test_equal_groups_and_single_experts(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    A, w, wrapped = operands()
    out = f(A, wrapped)
    assert type(out) is Tensor
    assert out.is_contiguous() or out.mT.is_contiguous()
    assert torch.equal(out, expected(A, w))


def test_every_expert_on_the_same_tokens() -> None:
    A, w, wrapped = operands()
    same = A[:1].expand(G, T, K)
    assert torch.equal(A[0] @ wrapped, expected(same, w))
    assert torch.equal(A[:1] @ wrapped, expected(same, w))


def test_leading_dimensions_and_bias_of_linear() -> None:
    A, w, wrapped = operands()
    bias = torch.randn(N, dtype=torch.bfloat16)
    out = F.linear(A.view(G, 1, T, K), wrapped[1].mT, bias)
    one = scaled_grouped_mm(A.flatten(0, 1), w[1:2], torch.tensor([G * T], dtype=torch.int32), FP8)
    assert torch.equal(out, one.view(G, 1, T, N) + bias)


def test_gradients() -> None:
    A, w, _ = operands(torch.float32)
    results = []
    for f in (lambda A, w: torch.bmm(A, w), expected):
        a, p = A.clone().requires_grad_(), nn.Parameter(w.clone())
        f(a, ScaledGroupedMMTensor(p, FP8).requires_grad_() if f is not expected else p).sin().sum().backward()
        results.append((a.grad, p))
    assert torch.equal(results[0][0], results[1][0])
    module = nn.Module()
    module.w = nn.Parameter(w.clone())
    quantize_(module, FP8, verbose=False)
    torch.bmm(A, module.w).sin().sum().backward()
    assert torch.equal(module.w.grad, results[1][1].grad)
    assert type(module.w.grad) is Tensor


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    """That of the plain operation; half precision is computed from its exact values in float32."""
    A, w, wrapped = operands(dtype)
    out = torch.bmm(A, wrapped)
    assert out.dtype == dtype
    if dtype == torch.float16:
        assert torch.equal(out, expected(A.float(), w.float()).half())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """As autocast does: batched GEMMs in its dtype, grouped ones in that of their operands."""
    A, w, wrapped = operands(torch.float32)
    with torch.autocast("cpu", dtype):
        assert torch.bmm(A, wrapped).dtype == F.linear(A, wrapped[0].mT).dtype == dtype
        offs = torch.tensor([4, 4, 12], dtype=torch.int32)
        grouped = F.grouped_mm(A.flatten(0, 1), wrapped, offs=offs)
        assert grouped.dtype == F.grouped_mm(A.flatten(0, 1), w, offs=offs).dtype == torch.float32
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            assert torch.equal(torch.bmm(A, wrapped), expected(A.bfloat16(), w.bfloat16()))


def test_empty() -> None:
    _, _, wrapped = operands()
    assert torch.bmm(torch.zeros(G, 0, K, dtype=torch.bfloat16), wrapped).shape == (G, 0, N)
    assert F.linear(torch.zeros(2, 0, K, dtype=torch.bfloat16), wrapped[0].mT).shape == (2, 0, N)


class Batched(nn.Module):
    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, A: Tensor) -> Tensor:
        return torch.bmm(A, self.w) + F.linear(A, self.w[1].mT)


def test_compile() -> None:
    A, w, _ = operands()
    eager, compiled = Batched(w.clone()), Batched(w.clone())
    plain = eager(A)
    for module in (eager, compiled):
        quantize_(module, FP8, verbose=False)
    out = torch.compile(compiled, backend=BACKEND, fullgraph=True)(A)
    assert_compiled_close(out, eager(A))
    assert not torch.equal(out, plain)
    for y in (out, eager(A)):
        y.sin().sum().backward()
    assert_compiled_close(compiled.w.grad, eager.w.grad)


class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(G, K, N)), nn.Parameter(torch.randn(G, N, K))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("etd,edf->etf", x, self.up)
        return torch.baddbmm(x, h.bfloat16(), self.down.bfloat16(), beta=0.0).to(x.dtype)


def test_warns_once_a_model_and_names_the_parameter() -> None:
    model, x = Einsum(), torch.randn(G, T, K, dtype=torch.bfloat16).float()
    quantize_(model, FP8, verbose=False)
    with pytest.warns(
        UserWarning, match=r"^einsum of the converted expert weights 'up' runs in high precision; multiply"
    ):
        torch.einsum("etd,edf->etf", x, model.up)
    with pytest.warns(UserWarning, match=r"^baddbmm of the converted expert weights 'down'"):
        torch.baddbmm(x.bfloat16(), x.new_zeros(G, T, N).bfloat16(), model.down.bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.einsum("etd,edf->etf", x, model.up)
        torch.einsum("etd,edf->etf", x.mT.reshape(x.shape), model.up)
        (model.up @ model.up.mT).sum().backward()  # a penalty, of weights alone


def test_warns_when_it_is_compiled() -> None:
    model = Einsum().bfloat16()
    quantize_(model, FP8, verbose=False)
    with pytest.warns(UserWarning, match=r"^(einsum|baddbmm) of the converted expert weights runs in high precision"):
        torch.compile(model, backend=BACKEND, fullgraph=True)(torch.randn(G, T, K, dtype=torch.bfloat16))


def test_warns_of_ops_of_other_libraries() -> None:
    library = torch.library.Library("somebodys", "FRAGMENT")
    library.define("moe(Tensor x, Tensor w) -> Tensor")
    library.impl("moe", torch.bmm, "CPU")
    A, _, wrapped = operands()
    with pytest.warns(UserWarning, match=r"^somebodys.moe of the converted expert weights runs in high precision"):
        torch.ops.somebodys.moe(A, wrapped)


class Hub(nn.Module):
    """As transformers' experts: the implementation stands in the config."""

    class config:
        _experts_implementation = "sonicmoe"

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(G, K, N))


def test_warns_of_other_kernels_of_transformers() -> None:
    with pytest.warns(UserWarning, match=r"'sonicmoe' multiplies by 'gate_up_proj' with its own kernels"):
        quantize_(Hub(), FP8, verbose=False)


@pytest.mark.parametrize(("k", "n"), [(24, 40), (32, 42), (20, 48)])
@pytest.mark.parametrize("stored", ["KN", "NK"])
def test_odd_features_are_padded(k: int, n: int, stored: str) -> None:
    """Zeros change neither scales nor sums: the padded problem's numbers, and its gradients."""
    A, offs = torch.randn(20, k), torch.tensor([7, 7, 18], dtype=torch.int32)
    w = torch.randn(G, k, n) if stored == "KN" else torch.randn(G, n, k).mT
    a, b = A.clone().requires_grad_(), w.detach().requires_grad_()
    out = scaled_grouped_mm(a, b, offs, FP8)
    out.sin().sum().backward()
    wide_a, wide_b = F.pad(A, (0, -k % 16)).requires_grad_(), F.pad(w, (0, -n % 16, 0, -k % 16)).requires_grad_()
    wide = scaled_grouped_mm(wide_a, wide_b, offs, FP8)
    wide[:, :n].sin().sum().backward()
    assert out.is_contiguous()
    assert torch.equal(out, wide[:, :n])
    assert torch.equal(a.grad, wide_a.grad[:, :k])
    assert torch.equal(b.grad, wide_b.grad[:, :k, :n])


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil", "bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_the_grouped_gemm(recipe: str, dtype: torch.dtype) -> None:
    """Whose products the emulation computes in float32: in float16 those of e4m3 overflow."""
    A, w, _ = operands(torch.float32)
    x, w = A.flatten(0, 1).requires_grad_(), w.requires_grad_()
    offs = torch.tensor([5, 10, 15], dtype=torch.int32)
    expected = scaled_grouped_mm(x, w, offs, recipe)
    gradients = torch.autograd.grad(expected.sin().sum(), (x, w))
    with torch.autocast("cpu", dtype):
        out = scaled_grouped_mm(x, w, offs, recipe)
        assert torch.equal(out, expected)
        for a, b in zip(torch.autograd.grad(out.sin().sum(), (x, w)), gradients, strict=True):
            assert torch.equal(a, b)


class Delta(nn.Module):
    """As of low-rank adapters."""

    def forward(self, w: Tensor) -> Tensor:
        return w + 1


def test_parametrized_weights_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    """They are computed anew for each product, by operations that give plain tensors."""
    model = Einsum()
    parametrize.register_parametrization(model, "up", Delta())
    model.linear = parametrizations.weight_norm(nn.Linear(K, N))  # of two parameters
    quantize_(model, FP8, verbose=False)
    assert type(model.parametrizations.up.original) is nn.Parameter
    assert isinstance(model.down, ScaledGroupedMMTensor)
    assert "left alone: up is parametrized" in caplog.text
    assert "linear" not in caplog.text  # nobody asked for it
    caplog.clear()
    with pytest.raises(ValueError, match=r"^model has no nn.Linear|matches none"):
        quantize_(model, "rowwise", filter_fn=lambda _, name: name != "", verbose=False)
    assert "left alone: linear.weight is parametrized" in caplog.text
    assert "up" not in caplog.text


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
def test_meta_tensors(recipe: str) -> None:
    """Shapes alone."""
    module = nn.Module()
    module.w = nn.Parameter(torch.randn(G, K, N))
    quantize_(module, recipe, verbose=False)
    module.to("meta")
    out = torch.bmm(torch.randn(G, T, K, device="meta"), module.w)
    assert (out.shape, out.device.type) == ((G, T, N), "meta")
    out.sum().backward()
    assert module.w.grad.shape == (G, K, N)


def test_flop_counter() -> None:
    """18 M H D operations in a step of SwiGLU experts, 6 M N K of one GEMM: as of plain weights."""
    x, offs = torch.randn(40, 64), torch.tensor([10, 25, 40], dtype=torch.int32)
    w1, w3 = (torch.randn(G, 32, 64, requires_grad=True) for _ in range(2))
    w2 = torch.randn(G, 64, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        swiglu_experts(x.requires_grad_(), w1, w2, w3, offs, "fp8_rowwise").sum().backward()
    assert counter.get_total_flops() == 18 * 40 * 32 * 64
    order = torch.randperm(80)
    with FlopCounterMode(display=False) as counter:
        swiglu_experts(x, w1, w2, w3, 2 * offs, "mxfp8_rceil", order).sum().backward()
    assert counter.get_total_flops() == 18 * 80 * 32 * 64
    A, w, wrapped = operands()
    for weight in (w.requires_grad_(), wrapped.requires_grad_()):
        with FlopCounterMode(display=False) as counter:
            torch.bmm(A.requires_grad_(), weight).sum().backward()
        assert counter.get_total_flops() == 6 * G * T * K * N
