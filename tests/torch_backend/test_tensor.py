"""The weight wrapper: what it intercepts, and that it is a plain tensor to everything else."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests.torch_backend.compiling import BACKEND
from xmoe.config import FP8GroupedMMConfig, MXFP8GroupedMMConfig, config_from_recipe
from xmoe.torch_backend import ScaledGroupedMMTensor, scaled_grouped_mm

FP8 = FP8GroupedMMConfig()
OFFS = torch.tensor([30, 30, 70, 90], dtype=torch.int32)


def weight(dtype: torch.dtype = torch.float32, **kwargs: bool) -> nn.Parameter:
    return nn.Parameter(ScaledGroupedMMTensor(torch.randn(4, 48, 64, dtype=dtype), FP8), **kwargs)


def plain(x: Tensor) -> Tensor:
    return torch.empty_like(x.detach(), requires_grad=False).as_subclass(torch.Tensor).copy_(x.detach())


def activations() -> Tensor:
    return torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)


def is_wrapped(x: object) -> bool:
    return isinstance(x, ScaledGroupedMMTensor) and x.config == FP8


class Experts(nn.Module):
    """One grouped GEMM, as users write it."""

    def __init__(self, w: nn.Parameter) -> None:
        super().__init__()
        self.w = w

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.w.bfloat16().transpose(-2, -1), offs=offs).relu()


CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "positional": lambda A, B: torch._grouped_mm(A, B, OFFS),
    "keyword": lambda A, B: torch._grouped_mm(A, B, offs=OFFS),
    "all keywords": lambda A, B: torch._grouped_mm(A, mat2=B, offs=OFFS, bias=None, out_dtype=None),
    "out_dtype": lambda A, B: torch._grouped_mm(A, B, OFFS, out_dtype=torch.bfloat16),
    "aten": lambda A, B: torch.ops.aten._grouped_mm(A, B, OFFS),
    "aten overload": lambda A, B: torch.ops.aten._grouped_mm.default(A, B, OFFS),
    "functional": lambda A, B: F.grouped_mm(A, B, offs=OFFS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_intercepts(call: Callable[[Tensor, Tensor], Tensor]) -> None:
    A, w = activations(), weight(torch.bfloat16)
    expected = scaled_grouped_mm(A, plain(w).mT, OFFS, FP8)
    out = call(A, w.mT)
    assert torch.equal(out, expected)
    assert type(out) is torch.Tensor


def test_out_dtype_is_that_of_the_call() -> None:
    A, w = activations(), weight(torch.bfloat16)
    out = torch._grouped_mm(A, w.mT, offs=OFFS, out_dtype=torch.float32)
    assert torch.equal(out, scaled_grouped_mm(A, plain(w).mT, OFFS, FP8GroupedMMConfig(out_dtype="float32")))


def test_both_operands_wrapped() -> None:
    """The second one is the weight."""
    w = weight(torch.bfloat16)
    mx = ScaledGroupedMMTensor(plain(w), MXFP8GroupedMMConfig()).mT
    A = w.reshape(-1, 64)
    out = torch._grouped_mm(A, mx, offs=OFFS)
    assert torch.equal(out, scaled_grouped_mm(plain(A), plain(w).mT, OFFS, MXFP8GroupedMMConfig()))


def test_other_grouped_gemms_are_the_plain_op() -> None:
    """A 2D x 2D wgrad is not an expert layer's forward."""
    w = weight(torch.bfloat16, requires_grad=False)
    a, d, offs = torch.randn(64, 32), torch.randn(32, 64), torch.tensor([16, 32], dtype=torch.int32)
    a, d = a.bfloat16(), d.bfloat16()
    assert torch.equal(torch._grouped_mm(a, w[0, :32], offs=offs), torch._grouped_mm(a, plain(w)[0, :32], offs=offs))
    first = torch._grouped_mm(w[0, :32].t().contiguous(), d, offs=offs)
    assert torch.equal(first, torch._grouped_mm(plain(w)[0, :32].t().contiguous(), d, offs=offs))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda w: w.detach(),
    "data": lambda w: w.data,
    "clone": lambda w: w.clone(),
    "to dtype": lambda w: w.to(torch.bfloat16),
    "to device": lambda w: w.to("meta"),
    "bfloat16": lambda w: w.bfloat16(),
    "titan": lambda w: w.bfloat16().transpose(-2, -1),
    "mT": lambda w: w.mT,
    "permute": lambda w: w.permute(0, 2, 1),
    "slice": lambda w: w[1:3],
    "ellipsis": lambda w: w[..., :16],
    "chunk": lambda w: w.chunk(2)[1],
    "split": lambda w: torch.split(w, 2)[0],
    "view": lambda w: w.view(4, 64, 48),
    "contiguous": lambda w: w.mT.contiguous(),
    "empty_like": lambda w: torch.empty_like(w),
    "adjoint": lambda w: w.adjoint(),
    "torch.adjoint": lambda w: torch.adjoint(w),
    "mH": lambda w: w.mH,
    "moveaxis": lambda w: w.moveaxis(0, 2),
    "T of one": lambda w: w[1].T,
    "H of one": lambda w: w[1].H,
    "index_select": lambda w: w.index_select(0, torch.tensor([2, 0])),
    "torch.index_select": lambda w: torch.index_select(w, 1, torch.tensor([2, 0])),
    "cat": lambda w: torch.cat([w, w], dim=1),
    "cat by keyword": lambda w: torch.cat(tensors=(w, w)),
    "concat": lambda w: torch.concat((w, w.bfloat16())),
    "stack": lambda w: torch.stack([w, w]),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_views_and_copies_stay_wrapped(view: Callable[[Tensor], Tensor]) -> None:
    w = weight()
    out = view(w)
    assert is_wrapped(out)
    assert (out.shape, out.dtype, out.stride()) == ((p := view(plain(w))).shape, p.dtype, p.stride())


ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda w: w + 1,
    "mul": lambda w: w.mul(2),
    "norm": lambda w: w.norm(),
    "zeros_like": lambda w: torch.zeros_like(w),
    "cat with another": lambda w: torch.cat([w, torch.ones(4, 48, 64)]),
    "stack with another": lambda w: torch.stack([torch.ones(4, 48, 64), w]),
    "compare": lambda w: w > 0,
    "type_as another": lambda w: torch.ones(2, 3, 4, dtype=torch.bfloat16).type_as(w),
}


@pytest.mark.parametrize("f", ARITHMETIC.values(), ids=ARITHMETIC.keys())
def test_arithmetic_gives_plain_tensors(f: Callable[[Tensor], Tensor]) -> None:
    w = weight()
    assert type(f(w)) is torch.Tensor
    assert torch.equal(f(w), f(plain(w)))


def test_join_of_two_configs_is_plain() -> None:
    w = weight()
    mx = ScaledGroupedMMTensor(plain(w), MXFP8GroupedMMConfig())
    for pair in ([w, mx], [mx, w]):
        assert type(torch.cat(pair)) is torch.Tensor


def test_fused_weights() -> None:
    """w1 and w3 of one expert layer in one GEMM."""
    A, w1, w3 = activations(), weight(torch.bfloat16), weight(torch.bfloat16)
    out = torch._grouped_mm(A, torch.cat([w1, w3], dim=1).mT, offs=OFFS)
    assert torch.equal(out, scaled_grouped_mm(A, torch.cat([plain(w1), plain(w3)], dim=1).mT, OFFS, FP8))
    out.sum().backward()
    assert w1.grad is not None
    assert w3.grad is not None


def test_in_place_keeps_the_wrapper() -> None:
    w = weight(requires_grad=False)
    before = w.data_ptr()
    for out in (w.mul_(2), w.copy_(torch.ones(4, 48, 64)), nn.init.normal_(w), w.zero_(), w.requires_grad_()):
        assert out is w
    assert is_wrapped(w)
    assert w.data_ptr() == before


def test_wrapping_shares_storage() -> None:
    x = torch.randn(2, 16, 16)
    assert ScaledGroupedMMTensor(x, FP8).data_ptr() == x.data_ptr()
    again = ScaledGroupedMMTensor(ScaledGroupedMMTensor(x, FP8), MXFP8GroupedMMConfig())
    assert again.config == MXFP8GroupedMMConfig()
    assert again.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("data", "config", "message"),
    [
        (torch.zeros(16, 16), FP8, r"data has shape \(16, 16\); only expert weights with 3 dimensions"),
        (torch.zeros(1, 16, 16, dtype=torch.int32), FP8, r"data is torch.int32; only floating-point"),
        (torch.zeros(1, 16, 16), "fp8_rowwise", r"config is 'fp8_rowwise'; give a GroupedMMConfig"),
    ],
)
def test_bad_arguments(data: Tensor, config: FP8GroupedMMConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScaledGroupedMMTensor(data, config)


def test_gradients_are_plain_and_equal() -> None:
    model, A = Experts(weight()), activations()
    reference = plain(model.w).requires_grad_()
    model(A, OFFS).sum().backward()
    dA, A.grad = A.grad, None
    scaled_grouped_mm(A, reference.bfloat16().mT, OFFS, FP8).relu().sum().backward()
    assert type(model.w.grad) is torch.Tensor
    assert torch.equal(model.w.grad, reference.grad)
    assert torch.equal(dA, A.grad)


@pytest.mark.parametrize("kind", [{}, {"foreach": True}, {"fused": True}], ids=["default", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_optimizer_step(optimizer: type[torch.optim.Optimizer], kind: dict[str, bool]) -> None:
    wrapped = weight()
    reference = nn.Parameter(plain(wrapped))
    for w in (wrapped, reference):
        w.grad = torch.ones(4, 48, 64)
        torch.nn.utils.clip_grad_norm_([w], 1.0)
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        step = optimizer([w], lr=1e-2, **options, **kind)
        step.step()
        states = [x for x in step.state[w].values() if isinstance(x, Tensor)]
        assert states
        assert all(type(x) is torch.Tensor for x in states)
    assert is_wrapped(wrapped)
    assert torch.equal(plain(wrapped), reference.detach())


def test_parameter() -> None:
    w = weight()
    assert isinstance(w, nn.Parameter)
    assert w.is_leaf
    assert w.requires_grad
    assert "Parameter, fp8_rowwise, tensor([[[" in repr(w)
    assert not weight(requires_grad=False).requires_grad


def test_deepcopy() -> None:
    model = Experts(weight())
    model(activations(), OFFS).sum().backward()
    twin = copy.deepcopy(model)
    assert is_wrapped(twin.w)
    assert isinstance(twin.w, nn.Parameter)
    assert torch.equal(twin.w, model.w)
    assert torch.equal(twin.w.grad, model.w.grad)
    assert twin.w.data_ptr() != model.w.data_ptr()
    tied = nn.ModuleList([model, model])
    twins = copy.deepcopy(tied)
    assert twins[0].w is twins[1].w


def test_state_dict_loads_into_an_unconverted_model_and_back() -> None:
    converted, unconverted = Experts(weight()), Experts(nn.Parameter(torch.zeros(4, 48, 64)))
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state["w"]) is torch.Tensor
    unconverted.load_state_dict(state)
    assert torch.equal(unconverted.w, plain(converted.w))

    again = Experts(weight())
    again.load_state_dict(unconverted.state_dict())
    assert is_wrapped(again.w)
    assert torch.equal(plain(again.w), unconverted.w)


def test_pickled_module_stays_converted() -> None:
    model = pickle.loads(pickle.dumps(Experts(weight())))
    assert is_wrapped(model.w)
    assert isinstance(model.w, nn.Parameter)


def test_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = Experts(weight())
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    assert torch.equal(safetensors.load_file(tmp_path / "model.safetensors")["w"], plain(model.w))


def test_module_moves() -> None:
    model = Experts(weight())
    assert is_wrapped(model.to(torch.bfloat16).w)
    assert is_wrapped(model.to("meta").w)
    model.to_empty(device="cpu")
    assert is_wrapped(model.w)
    assert isinstance(model.w, nn.Parameter)
    assert model.w.dtype == torch.bfloat16


def test_functional_call() -> None:
    model, A = Experts(weight()), activations()
    swapped = {"w": model.w.detach() * 0 + 1}
    plain_out = torch.func.functional_call(model, swapped, (A, OFFS))
    assert torch.equal(plain_out[:90], torch._grouped_mm(A, swapped["w"].bfloat16().mT, offs=OFFS).relu()[:90])
    swapped = {"w": ScaledGroupedMMTensor(swapped["w"], FP8)}
    out = torch.func.functional_call(model, swapped, (A, OFFS))
    assert torch.equal(out, scaled_grouped_mm(A, plain(swapped["w"]).bfloat16().mT, OFFS, FP8).relu())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit, inside inductor
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
def test_compile(recipe: str) -> None:
    """The interception is traced: no graph break, the op in the graph, gradients bit-equal to eager's."""
    config = config_from_recipe(recipe)
    model = Experts(nn.Parameter(ScaledGroupedMMTensor(torch.randn(4, 48, 64), config)))
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for M in (100, 120, 95):
        A = torch.randn(M, 64, dtype=torch.bfloat16, requires_grad=True)
        results = []
        for f in (model, compiled):
            out = f(A, OFFS)
            results.append([out, *torch.autograd.grad(out.sum(), (A, model.w))])
        assert all(torch.equal(x, y) and type(y) is torch.Tensor for x, y in zip(*results, strict=True))
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert "xmoe.grouped_mm_forward.default" in targets
    assert counter.frame_count <= 2


@pytest.mark.parametrize("form", ["mT", "mH", "data", "T", "H", "moveaxis", "adjoint"])
def test_compiled_views(form: str) -> None:
    """Attributes and methods that turn a parameter around are traced, and so is the product with what they give."""
    model = nn.ParameterList([nn.Parameter(weight(torch.bfloat16))])
    assert is_wrapped(model[0])
    A = activations()

    def product(A: Tensor) -> Tensor:
        if form in "TH":
            return A @ getattr(model[0][1], form)
        turned = getattr(model[0].mT.data.mT if form == "data" else model[0], "mT" if form == "data" else form)
        turned = turned(1, 2) if form == "moveaxis" else turned() if form == "adjoint" else turned
        return torch._grouped_mm(A, turned, offs=OFFS)

    counter = CompileCounterWithBackend(BACKEND)
    assert torch.equal(torch.compile(product, backend=counter, fullgraph=True)(A), product(A))
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert "xmoe.grouped_mm_forward.default" in targets


def test_products_without_experts() -> None:
    """Of no expert nothing is multiplied, as with plain weights."""
    w = weight(torch.bfloat16)
    out = torch.bmm(torch.randn(0, 3, 64, dtype=torch.bfloat16), w.mT[torch.zeros(0, dtype=torch.long)])
    assert type(out) is torch.Tensor
    assert (out.shape, out.dtype) == ((0, 3, 48), torch.bfloat16)


def test_compile_fused_weights() -> None:
    """A join is traced too."""
    w1, w3 = weight(torch.bfloat16), weight(torch.bfloat16)

    def layer(A: Tensor) -> Tensor:
        return torch._grouped_mm(A, torch.cat([w1, w3], dim=1).mT, offs=OFFS)

    counter = CompileCounterWithBackend(BACKEND)
    A = activations()
    assert torch.equal(torch.compile(layer, backend=counter, fullgraph=True)(A), layer(A))
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert "xmoe.grouped_mm_forward.default" in targets
