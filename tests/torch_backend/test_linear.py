"""Linears in low precision: values against the oracle and float64, and how the wrapped weight behaves."""

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.kernels.backends import arrays
from tests.torch_backend.compiling import BACKEND, assert_compiled_close
from xmoe.config import LINEAR_RECIPES, Float8LinearConfig, Gemm, LinearConfig, MXLinearConfig, any_config
from xmoe.kernels import pipeline, tensorwise
from xmoe.oracle import linear, linear_dgrad, linear_wgrad, sqnr
from xmoe.torch_backend import ScaledLinearTensor, cache_weights, scaled_linear
from xmoe.torch_backend.linear_ops import scheme

M, K, N = 100, 96, 64
FORMAT_DB = {
    "fp8_tensorwise": 28.3,
    "fp8_rowwise": 28.3,
    "fp8_blockwise": 28.0,
    "mxfp8_rceil": 28.3,
    "mxfp8_floor": 27.3,
}
"""On N(0, 1), measured 28.6, 28.5, 28.3, 28.5, 27.6. The backward with gradients in e5m2: 24.4."""
E5M2_DB, BF16_DB = 24.1, 50.0


def operands(dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K], dOut [M, N]."""
    x, weight, dOut = (torch.randn(shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    return x.requires_grad_(), weight, dOut


def wrapped(weight: Tensor, recipe: Any) -> nn.Parameter:
    return nn.Parameter(ScaledLinearTensor(weight, any_config(recipe)))


def step(x: Tensor, weight: Tensor, dOut: Tensor, recipe: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(out, dx, dweight) of a wrapped weight."""
    x, weight = x.detach().requires_grad_(), wrapped(weight, recipe)
    out = F.linear(x, weight)
    return out, *torch.autograd.grad(out, (x, weight), dOut)


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_forward_and_backward(recipe: str, dtype: torch.dtype) -> None:
    """To the last rounding the oracle's; as near to float64 as the format allows."""
    x, weight, dOut = operands(dtype)
    config = any_config(recipe)
    got = step(x, weight, dOut, config)
    assert [y.dtype for y in got] == [dtype] * 3
    assert all(type(y) is Tensor and y.is_contiguous() for y in got)
    a, w, d = map(arrays, (x, weight, dOut))
    want = linear(a, w, config), linear_dgrad(d, w, config), linear_wgrad(a, d, config)
    exact = [product.astype(np.float64) for product in (a @ w.T, d @ w, d.T @ a)]
    least = [FORMAT_DB[config.format]] * 3
    if getattr(config, "grad_dtype", None) == "e5m2":
        least[1:] = E5M2_DB, E5M2_DB
    if config.wgrad_with_hp:
        least[2] = BF16_DB
    for y, oracles, plain, db in zip(got, want, exact, least, strict=True):
        assert sqnr(oracles, arrays(y)) >= (52 if dtype == torch.bfloat16 else 130)
        assert sqnr(plain, arrays(y)) >= db


@pytest.mark.parametrize("grad_dtype", ["e4m3", "e5m2"])
def test_gradient_elements(grad_dtype: str) -> None:
    x, weight, dOut = operands(torch.float32)
    config = Float8LinearConfig(grad_dtype=grad_dtype)
    _, dx, dw = step(x, weight, dOut, config)
    a, w, d = map(arrays, (x, weight, dOut))
    assert sqnr(linear_dgrad(d, w, config), arrays(dx)) >= 130
    assert sqnr(linear_wgrad(a, d, config), arrays(dw)) >= 130
    assert (sqnr(d @ w, arrays(dx)) > 27) == (grad_dtype == "e4m3")


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_cublas"])
def test_weight_gradient_in_high_precision(recipe: str) -> None:
    x, weight, dOut = operands()
    config = dataclasses.replace(any_config(recipe), wgrad_with_hp=True)
    low, high = step(x, weight, dOut, recipe), step(x, weight, dOut, config)
    assert torch.equal(low[0], high[0])
    assert torch.equal(low[1], high[1])
    assert sqnr(arrays(dOut).T @ arrays(x), arrays(high[2])) >= BF16_DB


def test_accumulation_of_each_gemm() -> None:
    """Two configs in the backward are two calls, with the same results where sums are exact in either."""
    config = Float8LinearConfig(granularity="rowwise", accumulation_grad_weight="precise")
    assert scheme(config.to_key()).keys == ["fp8_rowwise", "fp8_rowwise", "fp8_rowwise;accumulation=precise"]
    x, weight, dOut = operands()
    for one, two in zip(step(x, weight, dOut, "rowwise"), step(x, weight, dOut, config), strict=True):
        assert torch.equal(one, two)
    assert scheme("tensorwise").fast == [True, False, False]
    assert scheme("tensorwise;accumulation_grad_input=fast").fast == [True, True, False]


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_cublas_rceil"])
def test_poison(recipe: str) -> None:
    """A NaN poisons what shares its scale, and nothing else."""
    x, weight, dOut = operands()
    with torch.no_grad():
        x[3, 5] = float("nan")
    out, dx, _ = step(x, weight, dOut, recipe)
    rows = slice(None) if recipe == "tensorwise" else 3
    bad = torch.zeros(M, N, dtype=torch.bool)
    bad[rows] = True
    assert torch.equal(out.isnan(), bad)
    assert dx.isfinite().all()


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
@pytest.mark.parametrize("rows", [0, 1, 17])
def test_any_number_of_rows(recipe: str, rows: int) -> None:
    x, weight, dOut = (y.detach() for y in operands())
    out, dx, dw = step(x[:rows], weight, dOut[:rows], recipe)
    assert (out.shape, dx.shape, dw.shape) == ((rows, N), (rows, K), (N, K))
    assert all(y.isfinite().all() for y in (out, dx, dw))
    if not rows:
        assert not dw.any()


# --- What the plain module does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("shape", [(K,), (2, K), (2, 3, 4, K), (0, 5, K)], ids=str)
def test_leading_shapes_and_bias(recipe: str, shape: tuple[int, ...]) -> None:
    module = nn.Linear(K, N)
    nn.init.normal_(module.bias)
    plain = nn.Linear(K, N)
    plain.load_state_dict(module.state_dict())
    module.weight = wrapped(module.weight.detach(), recipe)
    x = torch.randn(shape)
    out = module(x)
    assert out.shape == plain(x).shape
    product = scaled_linear(x.reshape(-1, K), plain.weight, config=recipe)
    assert torch.equal(out, (product + plain.bias).reshape(out.shape))
    out.sum().backward()
    assert torch.equal(module.bias.grad, torch.full((N,), float(out[..., 0].numel())))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_cublas"])
def test_only_the_gradients_needed(recipe: str) -> None:
    x, weight, dOut = operands()
    want = step(x, weight, dOut, recipe)
    w = wrapped(weight, recipe)
    frozen = wrapped(weight, recipe).requires_grad_(False)
    F.linear(x, frozen).backward(dOut)
    assert frozen.grad is None
    assert torch.equal(x.grad, want[1])
    F.linear(x.detach(), w).backward(dOut)
    assert torch.equal(w.grad, want[2])
    assert not F.linear(x.detach(), frozen).requires_grad
    with torch.no_grad():
        assert torch.equal(F.linear(x, w), want[0])
    with torch.inference_mode():
        assert torch.equal(F.linear(x, w), want[0])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_products(recipe: str) -> None:
    """Every way to write the product is the same one."""
    x, weight, _ = operands()
    w, x, bias = wrapped(weight, recipe), x.detach(), torch.randn(N).bfloat16()
    want = F.linear(x, w)
    products = [x @ w.t(), x @ w.T, x.mm(w.t()), torch.mm(x, w.mT), torch.matmul(x, w.transpose(0, 1)), x.matmul(w.T)]
    products += [torch.mm(w, x.t()).t(), (w @ x.T).T, torch.matmul(x[None], w.t())[0]]
    for got in products:
        assert type(got) is Tensor
        assert torch.equal(got, want)
    assert torch.equal(torch.addmm(bias, x, w.t()), want + bias)
    assert torch.equal(torch.addmm(bias, x, w.t(), beta=0.5, alpha=2), want * 2 + bias * 0.5)
    assert torch.equal(torch.addmm(torch.full_like(bias, torch.nan), x, w.t(), beta=0), want)
    assert not torch.equal(want, F.linear(x, weight))


def test_the_dtype_is_that_of_the_plain_operation() -> None:
    weight = torch.randn(N, K)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        x = torch.randn(M, K, dtype=dtype, requires_grad=True)
        w = wrapped(weight.to(dtype), "rowwise")
        out = F.linear(x, w, torch.zeros(N, dtype=dtype))
        out.sum().backward()
        assert {out.dtype, x.grad.dtype, w.grad.dtype} == {dtype}
    x, w = torch.randn(M, K, requires_grad=True), wrapped(weight, "tensorwise")
    with torch.autocast("cpu", torch.bfloat16):
        out = F.linear(x, w, torch.zeros(N))
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), wrapped(weight.bfloat16(), "tensorwise")))
    out.sum().backward()
    assert {x.grad.dtype, w.grad.dtype} == {torch.float32}


def test_other_operations_see_a_plain_tensor() -> None:
    w = wrapped(torch.randn(N, K), "tensorwise")
    assert type(w + 1) is Tensor
    assert type(F.embedding(torch.tensor([3]), w)) is Tensor
    assert isinstance(w[:32], ScaledLinearTensor)
    assert w[:32].config == any_config("tensorwise")


# --- Graphs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_checkpointing_and_cached_weights(recipe: str, reentrant: bool) -> None:
    x, weight, dOut = operands()
    want = step(x, weight, dOut, recipe)[1:]
    w = wrapped(weight, recipe)
    for cached in (False, True):
        x.grad = w.grad = None
        if cached:
            with cache_weights():
                checkpoint(F.linear, x, w, use_reentrant=reentrant).backward(dOut)
        else:
            checkpoint(F.linear, x, w, use_reentrant=reentrant).backward(dOut)
        assert torch.equal(x.grad, want[0])
        assert torch.equal(w.grad, want[1])


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_selective_checkpointing(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy sees the cast and the GEMM: with their results saved, the recomputation makes neither."""
    x, weight, dOut = operands()
    want, w = step(x, weight, dOut, recipe)[1:], wrapped(weight, recipe)
    module, name = (tensorwise, "cast") if recipe == "tensorwise" else (pipeline, "forward")
    seen, calls, called = set(), [], getattr(module, name)

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op.namespace != "xmoe" and op is not torch.ops.aten.mm.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        seen.add(str(op))
        return CheckpointPolicy.MUST_SAVE

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return called(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    out = checkpoint(F.linear, x, w, use_reentrant=False, context_fn=contexts)
    before = len(calls)
    out.backward(dOut)
    if recipe == "tensorwise":  # x and the weight; the gradient and, along its other axis, the weight
        assert ("xmoe.cast_tensor.default" in seen, before, len(calls)) == (True, 2, 4)
    else:
        assert ("xmoe.grouped_mm_forward.default" in seen, before, len(calls)) == (True, 1, 1)
    assert torch.equal(x.grad, want[0])
    assert torch.equal(w.grad, want[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, inside inductor
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "mxfp8_cublas_rceil"])
def test_compile(recipe: str) -> None:
    """One graph for any number of rows, bias and padding included."""
    config = any_config(recipe)
    module = nn.Linear(K - 6, N, dtype=torch.bfloat16)
    module.weight = wrapped(module.weight.detach(), type(config).from_dict({**config.to_dict(), "pad_inner_dim": True}))
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(module, backend=counter, fullgraph=True)
    for rows in (32, 50, 17):
        x = torch.randn(2, rows, K - 6, dtype=torch.bfloat16, requires_grad=True)
        results = []
        for f in (module, compiled):
            out = f(x)
            results.append([out, *torch.autograd.grad(out.float().square().sum(), (x, *module.parameters()))])
        for eager, fused in zip(*results, strict=True):
            assert_compiled_close(fused, eager)
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert "xmoe.linear.default" in targets
    assert counter.frame_count <= 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_compiler_sees_the_maxima_and_the_gemm() -> None:
    """Of a tensorwise linear only the cast is opaque."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    x, weight, dOut = operands()
    compiled = torch.compile(scaled_linear, backend=aot_autograd(fw_compiler=backend), fullgraph=True)
    compiled(x, weight.requires_grad_(), config="tensorwise").backward(dOut)
    assert len(graphs) == 2  # forward and backward
    for graph in graphs:
        targets = [str(node.target) for node in graph.graph.nodes]
        assert any("amax" in target for target in targets)
        assert "xmoe.cast_tensor.default" in targets
        assert "xmoe.linear.default" not in targets


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_second_derivatives_are_refused(recipe: str) -> None:
    x, weight, _ = operands()
    (dx,) = torch.autograd.grad(F.linear(x, wrapped(weight, recipe)).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="xmoe::linear have no derivative; drop create_graph=True"):
        dx.sum().backward()


# --- Sizes and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_padding(recipe: str) -> None:
    """Odd sizes give what the padded weight gives."""
    config = any_config(recipe)
    config = type(config).from_dict({**config.to_dict(), "pad_inner_dim": True})
    x, weight, dOut = (torch.randn(shape) for shape in ((M, 90), (50, 90), (M, 50)))
    got = step(x, weight, dOut, config)
    wider = F.pad(x, (0, 6)), F.pad(weight, (0, 6, 0, 14)), F.pad(dOut, (0, 14))
    want = step(*wider, config)
    for a, b, cut in zip(got, want, ((M, 50), (M, 90), (50, 90)), strict=True):
        assert torch.equal(a, b[: cut[0], : cut[1]])


@pytest.mark.parametrize(
    ("x", "weight", "config", "message"),
    [
        (
            (4, 90),
            (64, 90),
            "rowwise",
            r"in_features=90 is not a positive multiple of 16: use 80 or 96, or use pad_inner",
        ),
        ((4, 96), (50, 96), "tensorwise", r"out_features=50 is not a positive multiple of 16: use 48 or 64"),
        ((4, 8), (64, 8), "tensorwise", r"in_features=8 is not a positive multiple of 16: use 16"),
        ((4, 32), (64, 96), "rowwise", r"input has 32 columns and weight has in_features=96, shape \(64, 96\)"),
        ((4, 96), (64, 96), "fp8_rowwise", "'fp8_rowwise' is not a recipe of LinearConfig; use FP8GroupedMMConfig"),
        ((4, 96), (64, 96), 3, "config=3 is not a config; give a LinearConfig or one of tensorwise, rowwise"),
        (
            (4, 96),
            (64, 96),
            Float8LinearConfig(kernel_preference="triton"),
            "kernel_preference=triton has no tensorwise GEMM.*granularity=rowwise",
        ),
        (
            (4, 96),
            (64, 96),
            Float8LinearConfig(kernel_preference="torch"),
            "kernel_preference=torch cannot run tensorwise on cpu",
        ),
    ],
)
def test_errors(x: tuple[int, ...], weight: tuple[int, ...], config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_linear(torch.zeros(x), torch.zeros(weight), config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "rowwise"}, r"bias is str; give a torch\.Tensor, and config=… by keyword"),
        ({"bias": torch.zeros(N + 1)}, rf"bias has shape \({N + 1},\); give \({N},\)"),
        ({"weight": torch.zeros(2, N, K)}, r"weight has shape \(2, 64, 96\); give that of a linear"),
        ({"input": torch.tensor(1.0)}, r"input is a scalar"),
        ({"input": None}, r"input is None; give a torch\.Tensor"),
        ({"config": any_config("fp8_rowwise")}, r"config is a FP8GroupedMMConfig, for experts; give a LinearConfig"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    x, weight, _ = operands()
    with pytest.raises(ValueError, match=message):
        scaled_linear(**{"input": x, "weight": weight, "bias": None, "config": "rowwise", **change})


def test_dtype_of_the_input_stays() -> None:
    x, weight, _ = operands()
    assert scaled_linear(x, weight, torch.zeros(N), "rowwise").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "message"), [(torch.float64, "input is torch.float64; cast it"), (torch.int32, "input is torch.int32")]
)
def test_wrong_dtype(dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        scaled_linear(torch.zeros(4, K, dtype=dtype), torch.zeros(N, K))


def test_what_cannot_be_wrapped() -> None:
    with pytest.raises(ValueError, match=r"only linear weights with 2 dimensions can be wrapped"):
        ScaledLinearTensor(torch.zeros(2, 16, 16), any_config("rowwise"))
    with pytest.raises(ValueError, match=r"give a LinearConfig, such as that of 'rowwise'"):
        ScaledLinearTensor(torch.zeros(16, 16), any_config("fp8_rowwise"))


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_grouped_configs(recipe: str) -> None:
    """Every GEMM but a tensorwise one is that of an expert config of the same format."""
    config = any_config(recipe)
    assert isinstance(config, LinearConfig)
    for gemm in Gemm:
        grouped = config.grouped(gemm)
        assert (grouped is None) == (config.format == "fp8_tensorwise")
        if grouped is not None:
            assert grouped.format == config.format
            assert grouped.wgrad_with_hp == config.wgrad_with_hp
    assert MXLinearConfig(scale_calculation_mode="rceil") == any_config("mxfp8_cublas_rceil")
