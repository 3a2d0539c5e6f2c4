"""`combine`: against the expression that it replaces, and what autograd and torch.compile need."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from tests.cuda_graphs import recording
from tests.kernels.backends import INTERPRETER_WORKS
from xmoe.kernels import e4m3
from xmoe.torch_backend import combine, permute_tokens

T, K, D = 30, 3, 40
TYPES = [torch.bfloat16, torch.float32]


def problem(
    T: int = T, k: int = K, dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(T * k, D, device=device).to(dtype).requires_grad_()
    scores = torch.rand(T, k, device=device).requires_grad_()
    experts = torch.rand(T, 8, device=device).argsort(1)[:, :k]
    return x, scores, torch.argsort(experts.flatten(), stable=True)


def unfused(x: Tensor, scores: Tensor, order: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """In float32 from x on, so that autograd rounds once, too; Python's sum, since torch's has an order of its own."""
    rows = x.float()[torch.argsort(order)].view(*scores.shape, x.shape[1])
    return sum((rows * scores.unsqueeze(-1)).unbind(1), torch.zeros(())).to(dtype or x.dtype)


def gradient_of(out: Tensor) -> Tensor:
    return torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(out.dtype)


def step(function: Any, x: Tensor, scores: Tensor, order: Tensor, *dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of x and scores."""
    out = function(x, scores, order, *dtype)
    return [out, *torch.autograd.grad(out, (x, scores), gradient_of(out))]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """The bits of the output and of dx; of dscores, sums over D, all but the last few."""
    for a, b in zip(got[:2], want[:2], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_beside_autograd(k: int, dtype: torch.dtype, out_dtype: torch.dtype, order_dtype: torch.dtype) -> None:
    x, scores, order = problem(k=k, dtype=dtype)
    want = step(unfused, x, scores, order, out_dtype)
    assert_same(step(combine, x, scores, order.to(order_dtype), out_dtype), want)
    with torch.no_grad():
        assert torch.equal(combine(x, scores, order, out_dtype), want[0])


@pytest.mark.parametrize("needed", ["x", "scores"])
def test_one_gradient(needed: str) -> None:
    """The one that is asked for is the same; x is saved for that of the scores alone."""
    args = dict(zip(("x", "scores", "order"), problem(), strict=True))
    want = dict(zip(("x", "scores"), step(combine, **args)[1:], strict=True))[needed]
    saved: list[Tensor] = []
    for name in ("x", "scores"):
        args[name].requires_grad_(name == needed)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = combine(**args)
    assert any(t is args["x"] for t in saved) == (needed == "scores")
    (got,) = torch.autograd.grad(out, args[needed], gradient_of(out))
    assert torch.equal(got, want)


def test_odd_layouts_and_no_tokens() -> None:
    x, scores, order = problem()
    want = step(combine, x, scores, order)
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in (x, scores)]
    for a, b in zip(step(combine, *strided, order.repeat_interleave(2)[::2]), want, strict=True):
        assert torch.equal(a, b)
        assert a.is_contiguous()
    out = combine(x, scores, order)
    (dx,) = torch.autograd.grad(out.float().sum(), x)  # a gradient of stride 0
    assert torch.equal(dx, scores.flatten()[order].unsqueeze(1).expand_as(x).bfloat16())
    assert [t.shape for t in step(combine, *problem(0))] == [(0, D), (0, D), (0, K)]


def test_gradients_add_up_where_a_graph_stays() -> None:
    x, scores, order = problem()
    out = combine(x, scores, order)
    first = torch.autograd.grad(out, (x, scores), torch.ones_like(out), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, (x, scores), torch.ones_like(out))))


@pytest.mark.parametrize("name", ["x", "scores"])
def test_second_derivative(name: str) -> None:
    """The first is the same with a graph, the second that of the operations in torch."""
    args = dict(zip(("x", "scores", "order"), problem(dtype=torch.float32), strict=True))
    plain = dict(zip(("x", "scores"), step(combine, **args)[1:], strict=True))[name]
    second = []
    for function in (combine, unfused):
        out = function(**args)
        (got,) = torch.autograd.grad(out, args[name], gradient_of(out) * out, create_graph=True)
        second.append(torch.autograd.grad(got.square().sum(), (args["x"], args["scores"])))
    out = combine(**args)
    (got,) = torch.autograd.grad(out, args[name], gradient_of(out), create_graph=True)
    torch.testing.assert_close(got, plain)
    for x, y in zip(*second, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_change_of_what_is_saved_is_noticed() -> None:
    x, scores, order = problem()
    out = combine(x, scores, order)
    with torch.no_grad():
        scores.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(use_reentrant: bool) -> None:
    x, scores, order = problem()
    want = step(combine, x, scores, order)
    out = checkpoint(combine, x, scores, order, use_reentrant=use_reentrant)
    out.backward(gradient_of(out))
    assert all(map(torch.equal, (out, x.grad, scores.grad), want))


@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_compile_with_any_number_of_tokens(out_dtype: torch.dtype | None) -> None:
    """One graph, forward and backward, with eager's bits; no compilation after the second size."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: combine(*args, out_dtype).relu(), backend=backend, fullgraph=True)
    for tokens in (30, 21, 50, 400):
        args = problem(tokens)
        eager = step(lambda *args: combine(*args, out_dtype).relu(), *args)
        for a, b in zip(step(compiled, *args), eager, strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert backend.frame_count <= 2


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, scores, order = problem(dtype=dtype)
    ops = torch.ops.xmoe
    torch.library.opcheck(ops.combine.default, (x, scores, order))
    torch.library.opcheck(ops.combine.default, (x, scores, order, torch.float32))
    x, scores = x.detach(), scores.detach()
    out, place = ops.combine.default(x, scores, order)
    for saved, dx_dtype in ((x, dtype), (None, dtype), (x, None)):
        torch.library.opcheck(ops.combine_backward.default, (out, saved, scores, place, dx_dtype))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        out, dx, dscores = step(combine, *problem(), torch.float32)
    assert (out.shape, out.dtype) == ((T, D), torch.float32)
    assert (dx.shape, dx.dtype) == ((T * K, D), torch.bfloat16)
    assert (dscores.shape, dscores.dtype) == ((T, K), torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[0]}, r"x has shape \(40,\); give the experts' rows, \[M, D\]"),
        (
            {"x": lambda x: x.double()},
            r"x is torch\.float64; cast it to torch\.bfloat16, torch\.float16 or torch\.float32",
        ),
        ({"x": lambda x: x[1:]}, r"x has M=89 rows and scores \(30, 3\) T\*k=90 slots; give a row of x for each"),
        ({"scores": lambda s: s.flatten()}, r"scores has shape \(90,\); give the k scores of each token, \[T, k\]"),
        ({"scores": lambda s: s[:, :0]}, r"scores has shape \(30, 0\); give the k scores"),
        ({"scores": lambda s: s.bfloat16()}, r"scores is torch\.bfloat16; cast it with scores\.float\(\)"),
        ({"order": lambda o: o.float()}, r"order is torch\.float32; give torch\.int64 or torch\.int32"),
        ({"order": lambda o: o[:7]}, r"order has shape \(7,\); give the slot of each of the M=90 rows of x, \(90,\)"),
        ({"order": lambda o: o.to("meta")}, "x, scores and order are on cpu, cpu, meta; move them to one device"),
        ({"scores": lambda s: None}, r"scores is None; give a torch\.Tensor"),
        (
            {"dtype": lambda _: torch.float64},
            r"dtype is torch\.float64; give torch\.bfloat16, torch\.float16 or torch\.float32, or None",
        ),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    args: dict[str, Any] = dict(zip(("x", "scores", "order"), problem(), strict=True)) | {"dtype": None}
    args |= {name: f(args[name]) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        combine(**args)


@pytest.mark.skipif(e4m3.HARDWARE or not INTERPRETER_WORKS, reason="for a working interpreter")
@pytest.mark.parametrize("needed", [("x", "scores"), ("x",), ("scores",)], ids=str)
def test_kernels_in_the_interpreter(needed: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the op with its kernels, for one gradient or both, has the bits of the emulation."""
    x, scores, order = problem(dtype=torch.float32)
    want = dict(zip(("out", "x", "scores"), step(combine, x, scores, order), strict=True))
    monkeypatch.setattr(importlib.import_module("xmoe.torch_backend.combine"), "_has_kernels", lambda x: True)
    leaves = {"x": x.requires_grad_("x" in needed), "scores": scores.requires_grad_("scores" in needed)}
    out = combine(x, scores, order)
    gradients = torch.autograd.grad(out, [leaves[name] for name in needed], gradient_of(out))
    got = {"out": out, **dict(zip(needed, gradients, strict=True))}
    for name, value in got.items():
        if name == "scores":
            torch.testing.assert_close(value, want[name], rtol=1e-5, atol=1e-5)
        else:
            assert torch.equal(value, want[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [1, 2, 8])
def test_on_a_gpu(k: int, dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    """The kernels have the bits of the emulation on a CPU."""
    x, scores, order = problem(500, k, dtype)
    want = step(combine, x, scores, order, out_dtype)
    on_gpu = [t.detach().cuda() for t in (x, scores, order)]
    for leaf in on_gpu[:2]:
        leaf.requires_grad_()
    got = step(combine, *on_gpu, out_dtype)
    assert all(t.is_cuda for t in got)
    assert_same([t.cpu() for t in got], want)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
def test_step_does_not_wait_and_replays() -> None:
    """Forward and backward: no host sync; and a CUDA graph of them gives eager's bits for values that it has not
    seen."""
    tensors = problem(500, 4, device="cuda")

    def run() -> list[Tensor]:
        out, *gradients = step(combine, *tensors)
        return [out.detach(), *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        try:
            torch.cuda.set_sync_debug_mode("error")
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with recording(graph):
        replayed = run()
    with torch.no_grad():
        for tensor, new in zip(tensors, problem(500, 4, device="cuda"), strict=True):
            tensor.copy_(new)
    for value in replayed:
        value.fill_(float("nan"))
    graph.replay()
    assert all(map(torch.equal, replayed, run()))


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_permute_tokens(dtype: torch.dtype, k: int) -> None:
    """Indexing, and the sum of each token's gradients, rounded once."""
    T, D = 20, 48
    x, order = torch.randn(T, D).to(dtype).requires_grad_(), torch.randperm(T * k)
    dout = torch.randn(T * k, D).to(dtype)
    out = permute_tokens(x, order)
    assert torch.equal(out, x[order // k])
    (dx,) = torch.autograd.grad(out, x, dout)
    rows = dout[order.argsort()].double().view(T, k, D).sum(1)
    torch.testing.assert_close(dx.double(), rows, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert torch.equal(permute_tokens(x, order.int()), out)
    torch.library.opcheck(
        torch.ops.xmoe.permute_tokens.default, (x, order), test_utils=("test_autograd_registration", "test_faketensor")
    )


def test_permute_no_tokens_and_bad_ones() -> None:
    none = permute_tokens(torch.zeros(0, 16, requires_grad=True), torch.zeros(0, dtype=torch.int64))
    none.sum().backward()
    assert none.shape == (0, 16)
    with pytest.raises(ValueError, match=r"order has M=7 slots and x T=3 tokens; give T\*k slots"):
        permute_tokens(torch.zeros(3, 16), torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(1, 3, 16\); give the tokens"):
        permute_tokens(torch.zeros(1, 3, 16), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="order is None; give"):
        permute_tokens(torch.zeros(3, 16), None)


def test_permute_second_derivative() -> None:
    x, order = torch.randn(4, 16, requires_grad=True), torch.randperm(8)
    (dx,) = torch.autograd.grad(permute_tokens(x, order).pow(3).sum(), x, create_graph=True)
    torch.testing.assert_close(dx, 2 * 3 * x.square())
    (second,) = torch.autograd.grad(dx.sum(), x)
    torch.testing.assert_close(second, 12 * x)


def test_float16() -> None:
    x, scores, order = problem(dtype=torch.float16)
    torch.testing.assert_close(combine(x, scores, order), unfused(x, scores, order))
    assert torch.equal(permute_tokens(x, order), x[order])
