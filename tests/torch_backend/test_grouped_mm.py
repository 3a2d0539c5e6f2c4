"""The custom ops and the functions on them: values against the oracle, and what autograd and torch.compile need."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.torch_backend.layouts import LAYOUTS
from xmoe import oracle, shapes
from xmoe.config import (
    RECIPES,
    FP8GroupedMMConfig,
    FP8GroupedMMRecipe,
    GroupedMMConfig,
    KernelPreference,
    MXFP8GroupedMMConfig,
    ScaleCalculationMode,
    config_from_recipe,
)
from xmoe.operands import FORMATS
from xmoe.torch_backend import (
    _to_fp8_rowwise_then_scaled_grouped_mm,
    _to_mxfp8_then_scaled_grouped_mm,
    ops,
    scaled_grouped_mm,
    to_fp8_rowwise_then_scaled_grouped_mm,
    to_mxfp8_then_scaled_grouped_mm,
)

KERNEL_TIER = {torch.bfloat16: 50.0, torch.float32: 120.0}
"""dB by output dtype: rounding to bf16 leaves 55, float32 sums of these lengths more than 130."""
FP8 = FP8GroupedMMConfig()


def problem(
    M: int = 100,
    K: int = 64,
    N: int = 48,
    offs: tuple[int, ...] = (30, 30, 70, 90),
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    """A [M, K], weights [G, N, K], offs: rows 90 to 99 belong to nobody, group 1 is empty."""
    A = torch.randn(M, K).to(dtype).requires_grad_()
    W = torch.randn(len(offs), N, K).to(dtype).requires_grad_()
    return A, W, torch.tensor(offs, dtype=torch.int32)


def numpy(x: Tensor) -> np.ndarray:
    return x.detach().float().numpy()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pattern", list(shapes.PATTERNS))
def test_against_the_oracle(recipe: str, dtype: torch.dtype, pattern: str) -> None:
    config, offs = config_from_recipe(recipe), shapes.offsets(pattern, 100, 4)
    A, W, ends = problem(offs=tuple(offs.tolist()), dtype=dtype)
    B = W.mT
    out = scaled_grouped_mm(A, B, ends, config)
    dOut = torch.randn(out.shape).to(dtype)
    dA, dW = torch.autograd.grad(out, (A, W), dOut)
    assert out.dtype == dA.dtype == dW.dtype == dtype

    a, b, d = numpy(A), numpy(B), numpy(dOut)
    bound = KERNEL_TIER[dtype]
    for got, expected, groups in (
        (out, oracle.forward(a, b, offs, config), offs),
        (dA, oracle.dgrad(d, b, offs, config), offs),
        (dW.mT, oracle.wgrad(a, d, offs, config), None),
    ):
        assert min(oracle.sqnr_per_group(expected, numpy(got), groups)) >= bound
    end = int(offs[-1])
    assert not out[end:].any()
    assert not dA[end:].any()
    assert not dW[np.diff(offs, prepend=0) == 0].any()


@pytest.mark.parametrize("recipe", FORMATS)
def test_format_error_per_expert(recipe: str) -> None:
    """Against float64 on the original values, N(0, 1): 28.5 dB for e4m3, 27.6 under FLOOR, each expert by itself."""
    A, W, offs = problem(M=400, K=256, N=128, offs=(100, 116, 300, 400), dtype=torch.float32)
    out = scaled_grouped_mm(A, W.mT, offs, config_from_recipe(recipe))
    a, w = A.detach().double().numpy(), W.detach().double().numpy()
    exact = np.concatenate([a[s:e] @ w[g].T for g, (s, e) in enumerate([(0, 100), (100, 116), (116, 300), (300, 400)])])
    expected = 27.6 if recipe == "mxfp8_floor" else 28.5
    for db in oracle.sqnr_per_group(exact, numpy(out), offs.numpy()):
        assert abs(db - expected) < 0.5


@pytest.mark.parametrize("function", [to_fp8_rowwise_then_scaled_grouped_mm, _to_fp8_rowwise_then_scaled_grouped_mm])
def test_to_fp8_rowwise(function: Callable[..., Tensor]) -> None:
    A, W, offs = problem()
    assert torch.equal(function(A, W.mT, offs), scaled_grouped_mm(A, W.mT, offs, FP8))
    fields: dict[str, Any] = {"out_dtype": torch.float32, "kernel_preference": "emulated", "wgrad_with_hp": True}
    check_fields(function(A=A, B_t=W.mT, offs=offs, **fields), A, W, offs, FP8GroupedMMConfig(**fields))


@pytest.mark.parametrize("function", [to_mxfp8_then_scaled_grouped_mm, _to_mxfp8_then_scaled_grouped_mm])
@pytest.mark.parametrize("by_name", [True, False])
def test_to_mxfp8(function: Callable[..., Tensor], by_name: bool) -> None:
    A, W, offs = problem()
    assert torch.equal(function(A, W.mT, offs), scaled_grouped_mm(A, W.mT, offs, MXFP8GroupedMMConfig()))
    fields: dict[str, Any] = {
        "out_dtype": torch.float32,
        "kernel_preference": KernelPreference.EMULATED,
        "wgrad_with_hp": True,
        "scale_calculation_mode": ScaleCalculationMode.FLOOR,
    }
    out = function(A=A, B_t=W.mT, offs=offs, **fields) if by_name else function(A, W.mT, offs, *fields.values())
    check_fields(out, A, W, offs, MXFP8GroupedMMConfig(**fields))


def check_fields(out: Tensor, A: Tensor, W: Tensor, offs: Tensor, config: GroupedMMConfig) -> None:
    """Of the forward and, where wgrad_with_hp shows, of the weight's gradient."""
    expected = scaled_grouped_mm(A, W.mT, offs, config)
    dOut = torch.randn_like(out)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)
    assert torch.equal(*(torch.autograd.grad(x, W, dOut)[0] for x in (out, expected)))


def test_baseline_is_bf16() -> None:
    A, W, offs = problem()
    assert torch.equal(scaled_grouped_mm(A, W.mT, offs), scaled_grouped_mm(A, W.mT, offs, config_from_recipe("bf16")))
    reference = torch._grouped_mm(A, W.mT, offs=offs)[:90]
    assert oracle.sqnr(numpy(reference), numpy(scaled_grouped_mm(A, W.mT, offs)[:90])) >= KERNEL_TIER[torch.bfloat16]


@pytest.mark.parametrize("config", ["fp8_rowwise", FP8GroupedMMRecipe.FP8_ROWWISE, None])
@pytest.mark.parametrize("compiled", [False, True])
def test_config_by_recipe(config: str | None, compiled: bool) -> None:
    A, W, offs = problem()

    def layer(A: Tensor, W: Tensor, offs: Tensor) -> Tensor:
        return scaled_grouped_mm(A, W.mT, offs, config)

    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    expected = scaled_grouped_mm(A, W.mT, offs, FP8 if config else config_from_recipe("bf16"))
    assert torch.equal(run(A, W, offs), expected)


@pytest.mark.parametrize("inputs", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_out_dtype(inputs: torch.dtype, out_dtype: torch.dtype) -> None:
    A, W, offs = problem(dtype=inputs)
    out = to_mxfp8_then_scaled_grouped_mm(A, W.mT, offs, out_dtype)
    out.sum().backward()
    assert (out.dtype, A.grad.dtype, W.grad.dtype) == (out_dtype, inputs, inputs)


def test_mixed_inputs() -> None:
    A, W, offs = problem()
    W32 = W.detach().float().requires_grad_()
    out = scaled_grouped_mm(A, W32.mT, offs, FP8)
    assert torch.equal(out, scaled_grouped_mm(A, W.mT, offs, FP8))
    out.sum().backward()
    assert (A.grad.dtype, W32.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("M", [0, 1])
def test_few_tokens(M: int) -> None:
    A, W, offs = problem(M=M, offs=(0, M, M))
    out = scaled_grouped_mm(A, W.mT, offs, FP8)
    out.sum().backward()
    assert out.shape == (M, 48)
    assert not W.grad[[0, 2]].any()
    assert bool(W.grad[1].any()) == bool(M)


@pytest.mark.parametrize("transposed", [True, False])
def test_weight_gradient_has_the_layout_of_the_weight(transposed: bool) -> None:
    A, W, offs = problem()
    B = (W.mT if transposed else W.mT.contiguous()).detach().requires_grad_()
    scaled_grouped_mm(A, B, offs, FP8).sum().backward()
    assert B.grad.stride() == B.stride()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_layout_of_the_inputs_does_not_matter(
    recipe: str, layout: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same values as from contiguous inputs, which is what the kernels get to see where they multiply by TMA."""
    A, W, offs = problem()
    inputs = [layout(x.detach()) for x in (A, W.mT, torch.randn(100, 48).bfloat16(), offs)]
    seen: list[Tensor] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(ops.pipeline, name, recording(getattr(ops.pipeline, name), seen))
    expected, got = (
        forward_and_backward(config_from_recipe(recipe), *xs) for xs in ([x.contiguous() for x in inputs], inputs)
    )
    assert all(torch.equal(x, y) for x, y in zip(expected, got, strict=True))
    assert len(seen) > 6
    for x in seen:
        assert x.is_contiguous() or (x.ndim == 3 and x.mT.is_contiguous())
        assert x.dtype != torch.bfloat16 or x.data_ptr() % 16 == 0


def forward_and_backward(config: GroupedMMConfig, A: Tensor, B: Tensor, dOut: Tensor, offs: Tensor) -> list[Tensor]:
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    out = scaled_grouped_mm(A, B, offs, config)
    return [out, *torch.autograd.grad(out, (A, B), dOut)]


def recording(function: Callable[..., None], seen: list[Tensor]) -> Callable[..., None]:
    """The function, with the tensors among its arguments kept in `seen`."""

    def record(problem: Any, config: Any, device: Any, *args: Any) -> None:
        for x in args:  # outputs and scratch are the op's own
            seen.extend(x if isinstance(x, tuple) else [x] if isinstance(x, Tensor) else [])
        function(problem, config, device, *args)

    return record


def test_weights_that_tma_can_read_are_not_copied() -> None:
    A, W, offs = problem()
    seen: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops.pipeline, "forward", recording(ops.pipeline.forward, seen))
        for B in (W.mT, W.mT.contiguous(), W.mT[..., :32], torch.cat([W, W], 1)[:, 48:].mT):
            scaled_grouped_mm(A, B, offs, FP8)
            assert any(x.data_ptr() == B.data_ptr() for x in seen)


@pytest.mark.parametrize(("need_A", "need_W"), [(True, False), (False, True)])
def test_only_the_needed_gradient(need_A: bool, need_W: bool) -> None:
    A, W, offs = problem()
    out = scaled_grouped_mm(A, W.mT, offs, FP8)
    dA, dW = torch.autograd.grad(out, (A, W), torch.ones_like(out))
    A.requires_grad_(need_A), W.requires_grad_(need_W)
    scaled_grouped_mm(A, W.mT, offs, FP8).backward(torch.ones_like(out))
    assert (A.grad is not None, W.grad is not None) == (need_A, need_W)
    assert torch.equal(A.grad if need_A else W.grad, dA if need_A else dW)


def saved_for_backward(run: Callable[[], Any]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (saved.append(x), x)[1], lambda x: x):
        run()
    return saved


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved(recipe: str) -> None:
    """A in 8 bits where the wgrad is quantized, A itself where it is not; neither if the weight needs no gradient."""
    config = config_from_recipe(recipe)
    A, W, offs = problem()
    saved = saved_for_backward(lambda: scaled_grouped_mm(A, W.mT, offs, config))
    keeps_A = config.format == "bf16" or config.wgrad_with_hp
    assert any(x.data_ptr() == A.data_ptr() for x in saved) == keeps_A
    assert any(x.dtype == torch.float8_e4m3fn for x in saved) != keeps_A
    W.requires_grad_(False)
    saved = saved_for_backward(lambda: scaled_grouped_mm(A, W.mT, offs, config))
    assert {x.data_ptr() for x in saved} == {W.data_ptr(), offs.data_ptr()}


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_opcheck(recipe: str, dynamic: bool) -> None:
    A, W, offs = problem()
    B = W.detach().mT.requires_grad_()
    key = config_from_recipe(recipe).to_key()
    schema, aot = "test_schema", "test_aot_dispatch_dynamic" if dynamic else "test_aot_dispatch_static"
    both = ("test_autograd_registration", "test_faketensor")
    # With 8-bit outputs torch's AOT check fails on summing them, with 8-bit inputs its schema check on scaling them.
    fp8 = recipe == "fp8_rowwise"
    forward_op, backward_op = torch.ops.xmoe.grouped_mm_forward.default, torch.ops.xmoe.grouped_mm_backward.default
    torch.library.opcheck(forward_op, (A, B, offs, key, True), test_utils=(*both, schema, *([] if fp8 else [aot])))
    out, *tokens, _ = forward_op(A.detach(), B.detach(), offs, key, True)
    args = (out, tokens if fp8 else [A.detach()], B.detach(), offs, key, torch.bfloat16, True, True)
    torch.library.opcheck(backward_op, args, test_utils=(*both, aot, *([] if fp8 else [schema])))


class Names(TorchDispatchMode):
    """Which of our ops it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "xmoe":
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grad", [True, False])
def test_modes_are_shown_the_ops(grad: bool) -> None:
    """And without one the implementations are called at once, with the same results."""
    A, W, offs = problem()
    want = scaled_grouped_mm(A, W.mT, offs, FP8)
    with torch.set_grad_enabled(grad), Names() as names:
        out = scaled_grouped_mm(A, W.mT, offs, FP8)
        if grad:
            out.sum().backward()
    assert torch.equal(out, want)
    assert names.seen == ["xmoe::grouped_mm_forward", "xmoe::grouped_mm_backward"][: 1 + grad]


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_rceil"])
def test_compile_with_any_number_of_tokens(recipe: str) -> None:
    """One graph, forward and backward, equal to eager bit for bit; no compilation after the second size."""
    config = config_from_recipe(recipe)
    compiled_frames = CompileCounterWithBackend("aot_eager")

    def layer(A: Tensor, W: Tensor, offs: Tensor) -> Tensor:
        return scaled_grouped_mm(A, W.mT, offs, config).relu()

    compiled = torch.compile(layer, backend=compiled_frames, fullgraph=True)
    for M in (100, 90, 130, 1000):
        A, W, offs = problem(M=M)
        grads = []
        for f in (layer, compiled):
            out = f(A, W, offs)
            grads.append([out, *torch.autograd.grad(out, (A, W), torch.ones_like(out))])
        for eager, traced in zip(*grads, strict=True):
            assert torch.equal(eager, traced)
            assert eager.stride() == traced.stride()
    assert compiled_frames.frame_count <= 2


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    A, W, offs = problem()

    def layer(A: Tensor, W: Tensor) -> Tensor:
        return scaled_grouped_mm(A, W.mT, offs, FP8).relu()

    expected = torch.autograd.grad(layer(A, W).sum(), (A, W))
    checkpoint(layer, A, W, use_reentrant=use_reentrant).sum().backward()
    assert torch.equal(A.grad, expected[0])
    assert torch.equal(W.grad, expected[1])


def test_no_grad_saves_nothing_and_agrees() -> None:
    A, W, offs = problem()
    with torch.no_grad():
        out = scaled_grouped_mm(A, W.mT, offs, FP8)
    assert out.grad_fn is None
    assert torch.equal(out, scaled_grouped_mm(A, W.mT, offs, FP8))


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_that_a_transform_has_left_behind(grad: bool) -> None:
    A, W, offs = problem()
    left: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        left.append(x * 2)
        return left[0].float().sum()

    torch.func.grad(double)(A.detach())
    with torch.set_grad_enabled(grad):
        got, want = (scaled_grouped_mm(x, W.mT, offs, FP8) for x in (left[0], A.detach() * 2))
    assert torch.equal(got, want)


def test_two_runs_give_the_same_bits() -> None:
    A, W, offs = problem()
    runs = [torch.autograd.grad(scaled_grouped_mm(A, W.mT, offs, FP8).sum(), (A, W)) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_dynamo_does_not_trace_into_the_ops() -> None:
    """A graph break in a loop makes Dynamo skip the frame, and try the frames that it calls."""
    A, W, offs = problem()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def twice(A: Tensor, B: Tensor) -> Tensor:
        for _ in range(2):
            torch._dynamo.graph_break()
            out = torch.ops.xmoe.grouped_mm_forward(A, B, offs, FP8.to_key(), True)[0]
        return out.sum()

    torch.compile(twice, backend=backend)(A, W.mT).backward()
    assert not graphs


def test_double_backward_raises() -> None:
    A, W, offs = problem()
    (dA,) = torch.autograd.grad(scaled_grouped_mm(A, W.mT, offs, FP8).sum(), A, create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="grouped_mm_backward"):
        dA.sum().backward()


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_poison_stays_where_it_is(recipe: str, poison: float) -> None:
    config = config_from_recipe(recipe)
    A, W, offs = problem()
    with torch.no_grad():
        A[40, 5] = poison  # group 2
        A[95] = poison  # a row of no group
    out = scaled_grouped_mm(A, W.mT, offs, config)
    dOut = torch.randn_like(out)
    dOut[95] = poison
    dA, dW = torch.autograd.grad(out, (A, W), dOut)
    bad_rows = ~out.isfinite().all(1)
    assert bad_rows.nonzero().flatten().tolist() == [40]
    assert dA.isfinite().all()
    bad = ~dW.isfinite()
    assert bad[2, :, 5].all()
    assert bad.sum() == 48

    with torch.no_grad():
        A[40, 5] = 0
        W[3, 7, 9] = poison  # expert 3, output 7, input 9
    out = scaled_grouped_mm(A, W.mT, offs, config)
    dA, dW = torch.autograd.grad(out, (A, W), torch.randn_like(out))
    block = config.format == "fp8_blockwise"  # a weight's is 128 x 128: here all of the expert
    assert (~out.isfinite()).nonzero()[:, 1].unique().tolist() == (list(range(48)) if block else [7])
    assert (~out.isfinite()).nonzero()[:, 0].min() >= 70
    assert dW.isfinite().all()
    assert (~dA.isfinite()).nonzero()[:, 0].min() >= 70
    assert (~dA.isfinite()).nonzero()[:, 1].unique().tolist() == (list(range(64)) if block else [9])
