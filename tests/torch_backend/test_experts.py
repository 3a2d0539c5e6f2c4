"""SwiGLU experts as one op: against the grouped GEMMs that they replace, and what autograd and torch.compile need."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from xmoe import RECIPES, config_from_recipe
from xmoe.kernels import emulation
from xmoe.oracle import sqnr
from xmoe.torch_backend import ScaledGroupedMMTensor, permute_tokens, scaled_grouped_mm, swiglu_experts
from xmoe.torch_backend.moe import GroupedExperts

M, D, H, G = 100, 64, 128, 4
NAMES = ("x", "w1", "w2", "w3")


def problem(
    M: int = M, H: int = H, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, w1, w2, w3 and offs: expert 1 has no rows, the last tenth of the rows no expert."""
    x = torch.randn(M, D).to(dtype).requires_grad_()
    w1, w3 = ((torch.randn(G, H, D) / 8).to(dtype).requires_grad_() for _ in range(2))
    w2 = (torch.randn(G, D, H) / 8).to(dtype).requires_grad_()
    offs = torch.tensor([M * 3 // 10, M * 3 // 10, M * 7 // 10, M * 9 // 10], dtype=torch.int32)
    return x, w1, w2, w3, offs


def step(function: Any, *args: Any) -> list[Tensor]:
    """The output, and the gradients of the first four arguments."""
    out = function(*args)
    return [out, *torch.autograd.grad(out, args[:4], torch.ones_like(out) / 8)]


def separate(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs: Tensor, config: Any) -> Tensor:
    g, u = (scaled_grouped_mm(x, w.mT, offs, config) for w in (w1, w3))
    return scaled_grouped_mm(F.silu(g) * u, w2.mT, offs, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_beside_separate_gemms(recipe: str, dtype: torch.dtype) -> None:
    """The same up to the rounding of h and the scales of the joint gradient: closer than both are to bf16."""
    args = *problem(dtype=dtype), config_from_recipe(recipe)
    one, three = step(swiglu_experts, *args), step(separate, *args)
    exact = step(separate, *(x.detach().float().requires_grad_() for x in args[:4]), args[4], None)
    for name, a, b, c in zip(("out", *NAMES), one, three, exact, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        a, b, c = (x.detach().float().numpy() for x in (a, b, c))
        between, beside = sqnr(b, a), sqnr(c, a)
        assert between >= (46 if recipe == "bf16" else 34), (name, between)
        assert beside >= (46 if recipe == "bf16" else 21), (name, beside)


@pytest.mark.parametrize("recipe", RECIPES)
def test_forward_has_the_bits_of_its_gemms(recipe: str) -> None:
    x, w1, w2, w3, offs = problem()
    config = config_from_recipe(recipe)
    gate_up = torch.cat([scaled_grouped_mm(x, w.mT, offs, config) for w in (w1, w3)], 1)
    expected = scaled_grouped_mm(emulation.swiglu(gate_up), w2.mT, offs, config)
    assert torch.equal(swiglu_experts(x, w1, w2, w3, offs, config), expected)
    with torch.no_grad():
        assert torch.equal(swiglu_experts(x, w1, w2, w3, offs, config), expected)
    assert not expected[M * 9 // 10 :].any()


def slots(k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.randperm(M, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("recipe", RECIPES)
def test_tokens_as_the_router_saw_them(recipe: str, k: int) -> None:
    """With an order: what `permute_tokens` and the op give, bit for bit."""
    x, *weights, offs = problem()
    x = x.detach()[: M // k].requires_grad_()
    order = slots(k)

    def sorted_first(x: Tensor, *rest: Any) -> Tensor:
        return swiglu_experts(permute_tokens(x, order), *rest)

    expected = step(sorted_first, x, *weights, offs, recipe)
    for given in (order, order.int()):
        for a, b in zip(step(swiglu_experts, x, *weights, offs, recipe, given), expected, strict=True):
            assert torch.equal(a, b)
    assert expected[1].shape == x.shape


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "mxfp8_rceil"])
def test_compile_with_any_number_of_tokens_in_any_order(recipe: str) -> None:
    backend = CompileCounterWithBackend("aot_eager")

    def call(x: Tensor, *rest: Any) -> Tensor:
        return swiglu_experts(x, *rest[:-1], recipe, rest[-1]).relu()

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    for rows in (100, 90, 130, 1000):
        x, *weights, offs = problem(rows)
        args = x.detach()[: rows // 2].requires_grad_(), *weights, offs, torch.randperm(rows)
        for a, b in zip(step(call, *args), step(compiled, *args), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert backend.frame_count <= 2


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (torch.zeros(M), "order is torch.float32; give torch.int64 or torch.int32"),
        ([0] * M, "order is list; give a torch.Tensor"),
        (torch.zeros(M - 1, dtype=torch.int64), r"order has M=99 slots and x T=50 tokens; give T\*k slots"),
        (torch.zeros(2, M // 2, dtype=torch.int64), r"order has shape \(2, 50\); give \[M\]"),
    ],
)
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])  # H = 48 of the second does not fuse
def test_bad_orders(order: Tensor, message: str, recipe: str) -> None:
    x, w1, w2, w3, offs = problem(H=48)
    with pytest.raises(ValueError, match=message):
        swiglu_experts(x[: M // 2], w1, w2, w3, offs, recipe, order)


@pytest.mark.parametrize("recipe", ["mxfp8_rceil", "fp8_blockwise"])
def test_width_of_broken_blocks(recipe: str) -> None:
    """Where the halves of 2H are not whole blocks: three GEMMs, bit for bit."""
    args = *problem(H=48), config_from_recipe(recipe)
    for one, three in zip(step(swiglu_experts, *args), step(separate, *args), strict=True):
        assert torch.equal(one, three)
    (x, *rest), order = args, slots(1)
    expected = step(lambda x, *rest: separate(permute_tokens(x, order), *rest), x, *rest)
    for one, three in zip(step(swiglu_experts, x, *rest, order), expected, strict=True):
        assert torch.equal(one, three)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp"])
def test_backward_twice(recipe: str) -> None:
    """The backward writes over what the forward kept, but not where the graph stays."""
    *args, offs = problem()
    out = swiglu_experts(*args, offs, recipe)
    first = torch.autograd.grad(out, args, torch.ones_like(out), retain_graph=True)
    second = torch.autograd.grad(out, args, torch.ones_like(out))
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(out, args, torch.ones_like(out))


@pytest.mark.parametrize("name", NAMES)
def test_no_second_derivative(name: str) -> None:
    """Says so, and only where one is asked for."""
    *tensors, offs = problem()
    args = dict(zip(NAMES, tensors, strict=True))
    plain = step(swiglu_experts, *tensors, offs, "fp8_rowwise")[1 + NAMES.index(name)]
    out = swiglu_experts(*tensors, offs, "fp8_rowwise")
    (gradient,) = torch.autograd.grad(out, args[name], torch.ones_like(out) / 8, create_graph=True)
    assert torch.equal(gradient, plain)
    with pytest.raises(NotImplementedError, match="no derivative; drop create_graph=True"):
        gradient.float().square().sum().backward()


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "mxfp8_rceil"])
@pytest.mark.parametrize("needed", [("x",), ("w1",), ("w2",), ("w3",), ("w1", "w2", "w3"), ("x", "w2")], ids=str)
def test_some_gradients(recipe: str, needed: tuple[str, ...]) -> None:
    *tensors, offs = problem()
    every = dict(zip(NAMES, step(swiglu_experts, *tensors, offs, recipe)[1:], strict=True))
    for name, tensor in zip(NAMES, tensors, strict=True):
        tensor.requires_grad_(name in needed)
    out = swiglu_experts(*tensors, offs, recipe)
    out.backward(torch.ones_like(out) / 8)
    for name, tensor in zip(NAMES, tensors, strict=True):
        assert (tensor.grad is not None) == (name in needed)
        assert tensor.grad is None or torch.equal(tensor.grad, every[name]), name


def test_what_is_saved() -> None:
    """gate_up, one byte for every element of x and h, the scales, and the operands themselves."""
    x, w1, w2, w3, offs = problem()
    operands = {id(tensor) for tensor in (x, w1, w2, w3, offs)}
    for recipe, needs, tokens in (("fp8_rowwise", "x12", 4), ("fp8_rowwise", "x", 0), ("bf16", "x12", 0)):
        saved: list[Tensor] = []
        for tensor, name in ((x, "x"), (w1, "1"), (w2, "2"), (w3, "3")):
            tensor.requires_grad_(name in needs)
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved: kept.append(t) or t, lambda t: t):
            swiglu_experts(x, w1, w2, w3, offs, recipe)
        new = [tensor for tensor in saved if id(tensor) not in operands]
        assert len(new) == 1 + tokens
        assert sum(tensor.shape == (M, 2 * H) for tensor in new) == 1
        assert sum(tensor.dtype == torch.float8_e4m3fn for tensor in new) == tokens // 2


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(recipe: str, use_reentrant: bool) -> None:
    args = *problem(), recipe
    kept = step(swiglu_experts, *args)
    out = checkpoint(swiglu_experts, *args, use_reentrant=use_reentrant)
    out.backward(torch.ones_like(out) / 8)
    for tensor, expected in zip(args[:4], kept[1:], strict=True):
        assert torch.equal(tensor.grad, expected)


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "mxfp8_rceil"])
def test_compile_with_any_number_of_tokens(recipe: str) -> None:
    """One graph, forward and backward, equal to eager bit for bit; no compilation after the second size."""
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: swiglu_experts(*args, recipe).relu(), backend=backend, fullgraph=True)
    for rows in (100, 90, 130, 1000):
        args = problem(rows)
        eager = step(lambda *args: swiglu_experts(*args, recipe).relu(), *args)
        for a, b in zip(eager, step(compiled, *args), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
    assert backend.frame_count <= 2


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise"])
def test_opcheck(recipe: str) -> None:
    *tensors, offs = problem()
    key = config_from_recipe(recipe).to_key()
    both = ("test_autograd_registration", "test_faketensor")
    ops = torch.ops.xmoe
    torch.library.opcheck(ops.swiglu_experts_forward.default, (*tensors, offs, key, True), test_utils=both)
    x, w1, w2, w3 = (tensor.detach() for tensor in tensors)
    _, gate_up, *tokens = ops.swiglu_experts_forward.default(x, w1, w2, w3, offs, key, True)
    dh = torch.randn(M, H).bfloat16()
    schema = (*both, "test_schema")
    args = dh, gate_up.clone(), w1, offs, key, True, True
    torch.library.opcheck(ops.swiglu_experts_gradient.default, args, test_utils=schema)
    empty, dtype = x.new_empty(0), x.dtype
    torch.library.opcheck(
        ops.swiglu_experts_dgrad.default, (gate_up, empty, w1, w3, offs, key, dtype, [empty, empty]), test_utils=schema
    )
    saved = [x] if recipe == "bf16" else tokens[:2]
    wgrad = ops.swiglu_experts_wgrad.default
    torch.library.opcheck(wgrad, (gate_up, empty, saved, w1, offs, key, dtype, [empty, empty], M), test_utils=both)
    torch.library.opcheck(ops.swiglu.default, (gate_up,), test_utils=schema)


def test_no_tokens_and_odd_layouts() -> None:
    for out in step(swiglu_experts, *problem(0), "fp8_rowwise"):
        assert not out.any()
    x, w1, w2, w3, offs = problem()
    expected = step(swiglu_experts, x, w1, w2, w3, offs, "fp8_rowwise")
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in (x, w1, w2, w3)]
    for a, b in zip(expected, step(swiglu_experts, *strided, offs, "fp8_rowwise"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil"])
def test_halves_of_one_weight(recipe: str, device: str) -> None:
    """Gate and up as views of one parameter [G, 2H, D] have the bits of two parameters."""
    x, w1, w2, w3, offs = (t.detach().to(device).requires_grad_(t.is_floating_point()) for t in problem())
    expected = step(swiglu_experts, x, w1, w2, w3, offs, recipe)
    w13 = torch.cat([w1.detach(), w3.detach()], 1).requires_grad_()
    gate, up = w13.chunk(2, dim=1)
    assert not gate.is_contiguous()
    out = swiglu_experts(x.detach(), gate, w2, up, offs, recipe)
    assert torch.equal(out, expected[0])
    out.backward(torch.ones_like(out) / 8)
    assert torch.equal(w13.grad, torch.cat([expected[2], expected[4]], 1))


def test_module_uses_it_where_all_weights_are_wrapped_alike() -> None:
    x, w1, w2, w3, offs = problem()
    experts = GroupedExperts(D, H, G, dtype=torch.bfloat16)
    for name, w in (("w1", w1), ("w2", w2), ("w3", w3)):
        setattr(experts, name, torch.nn.Parameter(ScaledGroupedMMTensor(w.detach(), config_from_recipe("fp8_rowwise"))))
    assert torch.equal(experts(x, offs), swiglu_experts(x, w1, w2, w3, offs, "fp8_rowwise"))
    other = ScaledGroupedMMTensor(w2.detach(), config_from_recipe("mxfp8_rceil"))
    experts.w2 = torch.nn.Parameter(other)
    g, u = (scaled_grouped_mm(x, w.mT, offs, "fp8_rowwise") for w in (w1, w3))
    assert torch.equal(experts(x, offs), scaled_grouped_mm(F.silu(g) * u, w2.mT, offs, "mxfp8_rceil"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": lambda x: x[None]}, r"x has shape \(1, 100, 64\); flatten"),
        ({"x": lambda x: x[:, :48]}, "x has D=48 columns and w1"),
        ({"w1": lambda w: w[0]}, r"w1 has shape \(128, 64\); give \[G, H, D\]"),
        ({"w2": lambda w: w.mT}, r"w2 has shape \(4, 128, 64\); give \[4, 64, 128\]"),
        ({"w3": lambda w: w[:2]}, r"w3 has shape \(2, 128, 64\); give \[4, 128, 64\]"),
        ({"w2": lambda w: w.float()}, "w2 is torch.float32 and w1 torch.bfloat16; cast them to one dtype"),
        ({"x": lambda x: x.half()}, "x is torch.float16; cast it"),
        ({"offs": lambda o: o.long()}, r"offs is torch.int64 \(4,\); give int32 \(4,\)"),
        ({"offs": lambda o: o[:3]}, r"offs is torch.int32 \(3,\); give int32 \(4,\)"),
        ({"w3": lambda w: None}, "w3 is None; give a torch.Tensor"),
    ],
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    args = dict(zip((*NAMES, "offs"), problem(), strict=True))
    args |= {name: f(args[name].detach()) for name, f in change.items()}
    with pytest.raises(ValueError, match=message):
        swiglu_experts(**args, config="fp8_rowwise")


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil"])  # H = 48 of the second does not fuse
def test_bad_arguments_of_any_width(recipe: str) -> None:
    x, w1, w2, w3, offs = (tensor.detach() for tensor in problem(H=48))
    with pytest.raises(ValueError, match=r"w1 has shape \(48,\); give \[G, H, D\]"):
        swiglu_experts(x, w1[0, :, 0], w2, w3, offs, recipe)
    with pytest.raises(ValueError, match=r"w2 is torch\.float32 and w1 torch\.bfloat16"):
        swiglu_experts(x, w1, w2.float(), w3, offs, recipe)
