"""Operands that come quantized: their bytes are multiplied, and what is not quantized gets its gradient."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests.kernels.backends import arrays, same_bytes
from tests.torch_backend.compiling import BACKEND, assert_compiled_close
from xmoe import LINEAR_RECIPES, RECIPES, config_from_recipe, oracle
from xmoe.config import LinearConfig, any_config
from xmoe.shapes import offsets
from xmoe.torch_backend import (
    QuantizedOperand,
    dequantize,
    operand_gemm,
    permute_tokens,
    quantize_activations,
    quantize_weights,
    scaled_grouped_mm,
    scaled_linear,
    swiglu_experts,
)

M, K, N, G = 300, 160, 144, 5
QUANTIZING = [recipe for recipe in RECIPES if recipe != "bf16"]
FORMATS = ["fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "mxfp8_floor"]

pytestmark = [pytest.mark.filterwarnings(f"ignore:.*{part}") for part in ("TensorFloat32", "script_method")]  # inductor


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def tensors(device: str, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [M, K], weights [G, N, K], offs (tokens of no group at the end), dOut [M, N]."""
    generator = torch.Generator().manual_seed(0)
    A, W, dOut = (torch.randn(s, generator=generator).to(device, dtype) for s in ((M, K), (G, N, K), (M, N)))
    return A, W, torch.from_numpy(offsets("uneven", M - 20, G)).to(device), dOut


def step(A: Any, B: Any, offs: Tensor, dOut: Tensor, config: Any) -> tuple[Tensor, ...]:
    """(out, and the gradients of those of A and B_t that are tensors)."""
    leaves = [x for x in (A, B) if isinstance(x, Tensor)]
    for leaf in leaves:
        leaf.requires_grad_()
    out = scaled_grouped_mm(A, B, offs, config)
    return out.detach(), *torch.autograd.grad(out, leaves, dOut.to(out.dtype))


def assert_equal(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> None:
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y), (x - y).abs().max()


# --- Quantizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", FORMATS)
def test_quantizers(device: str, recipe: str, dtype: torch.dtype) -> None:
    """The oracle's bytes, whichever way the weights lie; and back."""
    A, W, *_ = tensors(device, dtype)
    a = quantize_activations(A.view(3, M // 3, K), recipe)
    want = oracle.quantize_rows(arrays(A), recipe)
    assert (a.axis, a.format, a.data.shape) == ("K", recipe, (3, M // 3, K))
    assert same_bytes(a.data.view(M, K), want.data)
    assert same_bytes(a.scale.reshape(want.scale.shape), want.scale)
    want_values = torch.from_numpy(oracle.dequantize(want)).to(torch.bfloat16)
    torch.testing.assert_close(dequantize(a).cpu().view(M, K), want_values, rtol=0, atol=0)
    assert quantize_activations(A[0], recipe).scale.shape == a.scale.shape[2:]
    assert torch.equal(dequantize(quantize_activations(A[0], recipe)), dequantize(a).view(M, K)[0])
    want = oracle.quantize_weights(arrays(W.mT), "K", recipe)
    want_values = torch.from_numpy(oracle.dequantize(want)).float()
    for B in (W.mT, W.mT.contiguous()):
        b = quantize_weights(B, recipe)
        assert same_bytes(b.data, want.data)
        assert same_bytes(b.scale, want.scale)
        assert torch.equal(dequantize(b, torch.float32).cpu(), want_values)


@pytest.mark.parametrize("recipe", ["rowwise", "blockwise", "mxfp8_cublas_rceil", "tensorwise"])
def test_quantizers_of_linears(device: str, recipe: str) -> None:
    A, W, *_ = tensors(device)
    format = any_config(recipe).format
    w, x = quantize_weights(W[0], recipe), quantize_activations(A, recipe)
    assert (w.data.shape, x.data.shape) == ((N, K), (M, K))
    for operand, values in ((w, W[0]), (x, A)):
        assert operand.format == format
        assert oracle.sqnr(arrays(values), arrays(dequantize(operand))) > 30


# --- Grouped GEMMs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", QUANTIZING)
def test_same_bits_as_unquantized(device: str, recipe: str) -> None:
    """The forward of the values that were quantized; the gradients of those of the operand."""
    A, W, offs, dOut = tensors(device)
    a, b = quantize_activations(A, recipe), quantize_weights(W.mT, recipe)
    out = scaled_grouped_mm(A, W.mT, offs, recipe)
    _, dA, _ = step(A.clone(), dequantize(b).mT, offs, dOut, recipe)
    _, _, dB = step(dequantize(a), W.mT, offs, dOut, recipe)
    assert_equal(step(A.clone(), b, offs, dOut, recipe), (out, dA))
    assert_equal(step(a, W.mT.detach(), offs, dOut, recipe), (out, dB))
    assert torch.equal(scaled_grouped_mm(a, b, offs, recipe), out)
    assert not out[int(offs[-1]) :].any()


@pytest.mark.parametrize("recipe", FORMATS)
def test_float32(device: str, recipe: str) -> None:
    """What is not quantized keeps its dtype; a config's goes first."""
    A, W, offs, dOut = tensors(device, torch.float32)
    b = quantize_weights(W.mT, recipe)
    out, dA = step(A, b, offs, dOut, recipe)
    assert out.dtype == dA.dtype == torch.float32
    assert torch.equal(out, scaled_grouped_mm(A.detach(), W.mT, offs, recipe))
    config = dataclasses.replace(config_from_recipe(recipe), out_dtype="float32")
    assert scaled_grouped_mm(quantize_activations(A, config), b, offs, config).dtype == torch.float32


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise"])
def test_scales_that_are_no_powers_of_two(device: str, recipe: str) -> None:
    """The bytes of another library's quantizer, amax / 448, are multiplied as they are."""
    A, W, offs, _ = tensors(device)
    block = 128 if recipe == "fp8_blockwise" else K
    blocks = F.pad(A.float(), (0, -K % block)).unflatten(1, (-1, block))
    scale = blocks.abs().amax(-1) / 448
    data = (blocks / scale.unsqueeze(-1)).flatten(1)[:, :K].to(torch.float8_e4m3fn)
    a = QuantizedOperand(data, scale if recipe == "fp8_blockwise" else scale[:, 0], "K", recipe)
    b = quantize_weights(W.mT, recipe)
    values = (data.float() * scale.repeat_interleave(block, 1)[:, :K]).double()
    weights, start, want = dequantize(b, torch.float32).double(), 0, torch.zeros(M, N, dtype=torch.float64)
    for g, end in enumerate(offs.tolist()):
        want[start:end] = (values[start:end] @ weights[g].T).cpu()
        start = end
    assert oracle.sqnr(want.numpy(), arrays(scaled_grouped_mm(a, b, offs, recipe))) >= 50


@pytest.mark.parametrize("recipe", FORMATS)
def test_layouts_in_memory(device: str, recipe: str) -> None:
    """Data and scales with strides, and from any byte on, as out of a message."""
    A, W, offs, dOut = tensors(device)
    a, b = quantize_activations(A, recipe), quantize_weights(W.mT, recipe)

    def moved(x: Tensor) -> Tensor:
        """x from a byte on that no kernel likes."""
        message = torch.empty(x.nbytes + 8, dtype=torch.uint8, device=x.device)[8:]
        return message.copy_(x.contiguous().view(-1).view(torch.uint8)).view(x.dtype).view(x.shape)

    def transposed(x: Tensor) -> Tensor:
        return x.mT.contiguous().mT if x.ndim > 1 else torch.stack([x, x], 1)[:, 0]

    for change in (moved, transposed):
        assert_equal(step(A.clone(), b.map(change), offs, dOut, recipe), step(A.clone(), b, offs, dOut, recipe))
        assert_equal(step(a.map(change), W.mT.detach(), offs, dOut, recipe), step(a, W.mT.detach(), offs, dOut, recipe))
        assert torch.equal(dequantize(a.map(change)), dequantize(a))


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])
def test_nothing_is_made_for_a_backward_that_does_not_come(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    A, W, offs, _ = tensors("cpu")
    a, made = quantize_activations(A, recipe), []
    values = operand_gemm.values
    monkeypatch.setattr(operand_gemm, "values", lambda *args: made.append(1) or values(*args))
    W.requires_grad_()
    with torch.no_grad():
        scaled_grouped_mm(a, W.mT, offs, recipe)
    scaled_grouped_mm(a, W.detach().mT, offs, recipe)
    assert not made
    scaled_grouped_mm(a, W.mT, offs, recipe)
    assert made == [1]


def test_retained_graphs_and_checkpoints() -> None:
    A, W, offs, dOut = tensors("cpu")
    a = quantize_activations(A, "fp8_rowwise")
    W.requires_grad_()
    out = scaled_grouped_mm(a, W.mT, offs, "fp8_rowwise")
    (first,) = torch.autograd.grad(out, W, dOut, retain_graph=True)
    (second,) = torch.autograd.grad(out, W, dOut)
    again = checkpoint(lambda: scaled_grouped_mm(a, W.mT, offs, "fp8_rowwise"), use_reentrant=False)
    assert_equal(torch.autograd.grad(again, W, dOut), (first,))
    assert torch.equal(first, second)


def test_no_tokens(device: str) -> None:
    A, W, offs, _ = tensors(device)
    a, zero = quantize_activations(A[:0], "fp8_rowwise"), torch.zeros_like(offs)
    out, dB = step(a, W.mT, zero, torch.zeros(0, N, device=device), "fp8_rowwise")
    assert out.shape == (0, N)
    assert not dB.any()


def test_compile(device: str) -> None:
    """Without graph breaks, quantizers included."""
    A, W, offs, dOut = tensors(device)

    def run(A: Tensor, W: Tensor, recipe: str) -> Tensor:
        a, b = quantize_activations(A, recipe), quantize_weights(W.mT, recipe)
        return scaled_grouped_mm(a, W.mT, offs, recipe) + scaled_grouped_mm(A, b, offs, recipe)

    def linear(A: Tensor, W: Tensor, recipe: str) -> Tensor:
        a, w = quantize_activations(A, recipe), quantize_weights(W[0], recipe)
        return scaled_linear(a, W[0], None, recipe) + scaled_linear(A, w, None, recipe)

    def experts(A: Tensor, W: Tensor, recipe: str) -> Tensor:
        a, w2 = quantize_activations(A, recipe), W.mT[:, :, :N].contiguous()
        w1, w3 = (quantize_weights(W.mT, recipe) for _ in range(2))
        return (
            swiglu_experts(a, w1, w2, w3, offs, recipe) @ A.new_ones(K, N)
            + swiglu_experts(A, w1, w2, w3, offs, recipe)[:, :N]
        )

    for function, recipe in (
        (run, "fp8_rowwise"),
        (run, "mxfp8_rceil"),
        (experts, "fp8_rowwise"),
        *((linear, recipe) for recipe in ("rowwise", "blockwise", "tensorwise", "mxfp8_cublas")),
    ):
        results = []
        for form in (function, torch.compile(function, fullgraph=True, backend=BACKEND)):
            a, w = A.detach().requires_grad_(), W.detach().requires_grad_()
            out = form(a, w, recipe)
            results.append((out.detach(), *torch.autograd.grad(out, (a, w), dOut)))
        for eager, compiled in zip(*results, strict=True):
            assert_compiled_close(compiled, eager)


def test_gradients_have_no_derivative() -> None:
    A, W, offs, _ = tensors("cpu")
    W.requires_grad_()
    out = scaled_grouped_mm(quantize_activations(A, "fp8_rowwise"), W.mT, offs, "fp8_rowwise")
    (gradient,) = torch.autograd.grad(out.sum(), W, create_graph=True)
    with pytest.raises(NotImplementedError, match="drop create_graph=True"):
        gradient.sum().backward()


# --- Linears ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_linear(device: str, recipe: str) -> None:
    A, W, _, dOut = tensors(device)
    x, weight, dOut = A.view(2, M // 2, K), W[0], dOut.view(2, M // 2, N)
    bias = torch.randn(N, device=device)
    config = LinearConfig.from_recipe(recipe)

    def run(x: Any, weight: Any) -> tuple[Tensor, ...]:
        leaves = [leaf.detach().requires_grad_() for leaf in (x, weight) if isinstance(leaf, Tensor)]
        args, left = [], list(leaves)
        for one in (x, weight):
            args.append(left.pop(0) if isinstance(one, Tensor) else one)
        out = scaled_linear(*args, bias, config)
        gradients = torch.autograd.grad(out, leaves, dOut.to(out.dtype)) if leaves else ()
        return out.detach(), *gradients

    qx, qw = quantize_activations(x, config), quantize_weights(weight, config)
    if config.format != "fp8_tensorwise":
        row = qx.map(lambda part: part[0, 0])
        torch.testing.assert_close(scaled_linear(row, qw, bias, config), run(x, weight)[0][0, 0])
    assert scaled_linear(x.half(), qw, None, config).dtype == torch.float16
    out = run(x, weight)[0]
    assert_equal(run(x, qw), (out, run(x, dequantize(qw))[1]))
    assert_equal(run(qx, weight), (out, run(dequantize(qx), weight)[2]))
    assert_equal(run(qx, qw), (out,))


# --- Experts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", FORMATS)
def test_experts(device: str, recipe: str) -> None:
    """Three grouped GEMMs, sorted or in the order of their slots."""
    generator = torch.Generator().manual_seed(0)
    T, D, H, k = 64, 160, 128, 2
    draw = lambda *shape: torch.randn(shape, generator=generator).to(device, torch.bfloat16) / shape[-1] ** 0.5  # noqa: E731
    x, w1, w2, w3 = draw(T, D), draw(G, H, D), draw(G, D, H), draw(G, H, D)
    order = torch.randperm(T * k, generator=generator).to(device)
    offs = torch.from_numpy(offsets("uneven", T * k, G)).to(device)
    operands = [quantize_weights(w.mT, recipe) for w in (w1, w2, w3)]
    assert [operand.data.shape for operand in operands] == [w.shape for w in (w1, w2, w3)]
    rows = permute_tokens(x, order)
    gates, ups = (scaled_grouped_mm(rows, w.mT, offs, recipe) for w in (w1, w3))
    want = scaled_grouped_mm(F.silu(gates) * ups, w2.mT, offs, recipe)
    given = quantize_activations(x, recipe)
    for tokens in (x, given):
        assert torch.equal(swiglu_experts(tokens, *operands, offs, recipe, order), want)
    assert torch.equal(swiglu_experts(quantize_activations(rows, recipe), *operands, offs, recipe), want)
    for weights in (operands, (w1, w2, w3)):  # the gradients, of the operands' values
        results = []
        for of_operands in (True, False):
            leaf = (x if weights is operands else dequantize(given)).clone().requires_grad_()
            ws = [w.detach().requires_grad_() if isinstance(w, Tensor) else w for w in weights]
            leaves = [leaf] if weights is operands else ws
            if of_operands:
                out = swiglu_experts(leaf if weights is operands else given, *ws, offs, recipe, order)
            else:
                one, two, three = (w if isinstance(w, Tensor) else dequantize(w) for w in ws)
                rows = permute_tokens(leaf, order)
                gates, ups = (scaled_grouped_mm(rows, w.mT, offs, recipe) for w in (one, three))
                out = scaled_grouped_mm(F.silu(gates) * ups, two.mT, offs, recipe)
            results.append((out.detach(), *torch.autograd.grad(out.sum(), leaves)))
        assert_equal(*results)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_transforms_are_refused() -> None:
    A, W, offs, _ = tensors("cpu")
    a = quantize_activations(A, "fp8_rowwise")

    def run(scale: Tensor) -> Tensor:
        return scaled_grouped_mm(changed(a, scale=scale), W.mT, offs, "fp8_rowwise")

    for call in (
        lambda: torch.func.vmap(run)(a.scale.expand(2, -1)),
        lambda: torch.func.vmap(lambda x: quantize_activations(x, "fp8_rowwise").data)(A.expand(2, -1, -1)),
    ):
        with pytest.raises(NotImplementedError, match=r"transforms of torch\.func"):
            call()


def test_errors() -> None:
    A, W, offs, _ = tensors("cpu")
    a, b = quantize_activations(A, "fp8_rowwise"), quantize_weights(W.mT, "fp8_rowwise")
    for message, run in (
        (r"A.format is 'fp8_rowwise' and the config's 'mxfp8_rceil'", lambda: mm(a, W.mT, "mxfp8_rceil")),
        (r"A is quantized and config=bf16 is not; give dequantize\(A\)", lambda: mm(a, W.mT, None)),
        (r"A.axis is 'tokens'; quantize it along K", lambda: mm(changed(a, axis="tokens"), W.mT)),
        (r"B_t.data is .*; give torch.float8_e4m3fn of 3 dimensions", lambda: mm(A, a)),
        (r"A.scale is torch.float32 \(300, 1\); give torch.float32 \(300,\)", lambda: mm(widened(a), W.mT)),
        (r"A has K=160 columns and B_t \(5, 144, 160\) has K=144", lambda: mm(a, W)),
        (r"K=24 of A is not a positive multiple of 16", lambda: mm(changed(a, data=a.data[:, :24]), W[..., :24].mT)),
        (r"operand.scale is torch.float32 \(1,\); give torch.float32 \(300,\)",
         lambda: dequantize(changed(a, scale=a.scale[:1]))),
        (r"operand.format is 'fp4'", lambda: dequantize(changed(a, format="fp4"))),
        (r"operand.data is torch.uint8", lambda: dequantize(changed(a, data=a.data.view(torch.uint8)))),
        (r"w1.format is 'mxfp8_rceil' and the config's 'fp8_rowwise'",
         lambda: swiglu_experts(A, quantize_weights(W.mT, "mxfp8_rceil"), b, b, offs, "fp8_rowwise")),
        (r"K=18 of x is not a positive multiple of 16", lambda: quantize_activations(A[:, :18], "fp8_rowwise")),
        (r"N=24 of weight is not a positive", lambda: quantize_weights(W[:, :24].mT, "fp8_rowwise")),
        (r"offs is QuantizedOperand", lambda: scaled_grouped_mm(A, W.mT, b)),
        (r"config=bf16 quantizes nothing", lambda: quantize_activations(A, "bf16")),
        (r"weight has shape \(144, 160\); fp8_rowwise quantizes weights B_t",
         lambda: quantize_weights(W[0], "fp8_rowwise")),
        (r"x is torch.float16", lambda: quantize_activations(A.half(), "fp8_rowwise")),
        (r"weight.format is 'fp8_rowwise' and the config's 'fp8_tensorwise'",
         lambda: scaled_linear(A, quantize_weights(W[0], "rowwise"), None, "tensorwise")),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            run()


def mm(A: Any, B: Any, config: str | None = "fp8_rowwise") -> Tensor:
    return scaled_grouped_mm(A, B, torch.from_numpy(offsets("uneven", M, G)), config)


def changed(operand: QuantizedOperand[Tensor], **fields: Any) -> QuantizedOperand[Tensor]:
    return dataclasses.replace(operand, **fields)


def widened(operand: QuantizedOperand[Tensor]) -> QuantizedOperand[Tensor]:
    return changed(operand, scale=operand.scale[:, None])
