"""A converted model in the hands of everything else that trains, saves, copies and transforms models."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.torch_backend.compiling import BACKEND
from xmoe import FP8GroupedMMConfig, FqnToConfig
from xmoe.torch_backend import MoE, ScaledGroupedMMTensor, quantize_, scaled_grouped_mm, unquantize_
from xmoe.torch_backend.ops import grouped_mm_forward

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # inside inductor and forward mode
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),  # of torch.export.load in 2.11
]

FP8 = FP8GroupedMMConfig()
OFFS = torch.tensor([3, 3, 9, 20], dtype=torch.int32)


class Experts(nn.Module):
    """Two GEMMs, the second one's weights row-major, [E, K, N]; rows past the last offset belong to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 48, 32) / 6)
        self.down = nn.Parameter(torch.randn(4, 48, 32) / 7)

    def forward(self, x: Tensor) -> Tensor:
        h = torch._grouped_mm(x.bfloat16(), self.up.bfloat16().mT, OFFS).relu()
        return torch._grouped_mm(h, self.down.bfloat16(), OFFS)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(32), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(self.norm(x))


def converted(model: nn.Module | None = None) -> Any:
    model = model or Model()
    quantize_(model, FP8, verbose=False)
    return model


def inputs(rows: int = 20) -> Tensor:
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(1))


def is_converted(model: nn.Module) -> bool:
    """Whether all of its experts run quantized: by the bits of what comes out."""
    experts = model.experts
    x, (up, down) = inputs().bfloat16(), (w.detach().as_subclass(Tensor).bfloat16() for w in experts.parameters())
    h = scaled_grouped_mm(x, up.mT, OFFS, FP8).relu()
    quantized = torch.equal(experts(x), scaled_grouped_mm(h, down, OFFS, FP8))
    h = torch._grouped_mm(x, up.mT, OFFS).relu()
    plain = torch.equal(experts(x)[:20], torch._grouped_mm(h, down, OFFS)[:20])
    assert quantized != plain
    assert quantized == all(isinstance(w, ScaledGroupedMMTensor) for w in experts.parameters())
    return quantized


def loss_of(model: nn.Module) -> Tensor:
    return model(inputs()).float().square().mean()


def gradients(model: nn.Module, loss: Callable[[nn.Module], Tensor] = loss_of) -> list[Tensor]:
    return list(torch.autograd.grad(loss(model), list(model.parameters())))


def equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().as_subclass(Tensor).clone() for p in model.parameters()]


# ------------------------------------------------------------------------------------------ the objects that they were


def test_parameters_stay_the_objects_that_they_are() -> None:
    model = Model()
    up = model.experts.up
    up.tag, reference, seen = "mine", weakref.ref(up), []
    up.grad = torch.ones_like(up)
    up.register_hook(lambda gradient: seen.append(type(gradient)))
    up.register_post_accumulate_grad_hook(lambda p: seen.append(p))
    converted(model)
    assert model.experts.up is up is reference()
    assert (type(up).__name__, up.tag) == ("ScaledGroupedMMTensor", "mine")
    assert isinstance(up, nn.Parameter)
    loss_of(model).backward()
    assert seen[0] is Tensor
    assert seen[1] is up
    assert not torch.equal(up.grad, torch.ones_like(up.grad))


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}], ids=["foreach", "fused"])
def test_an_optimizer_made_before_trains_the_same(options: dict[str, bool]) -> None:
    first, second = Model(), Model()
    second.load_state_dict(first.state_dict())
    early = torch.optim.AdamW(first.parameters(), lr=1e-2, **options)
    loss_of(first).backward()  # and it has made a step before
    early.step()
    converted(second)
    late = torch.optim.AdamW(second.parameters(), lr=1e-2, **options)
    for p, q in zip(second.parameters(), first.parameters(), strict=True):
        p.grad = q.grad.clone()
    late.step()
    converted(first)
    for model, optimizer in ((first, early), (second, late)):
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
    assert equal(values(first), values(second))
    assert is_converted(first)
    for optimizer in (early, late):
        assert {type(x) for state in optimizer.state.values() for x in state.values()} == {Tensor}


def test_a_graph_from_before_still_gives_gradients() -> None:
    model = Model()
    loss = loss_of(model)
    expected = gradients(model)
    converted(model)
    loss.backward()
    assert equal([p.grad for p in model.parameters()], expected)


def test_compiled_before_it_is_converted() -> None:
    model = Model()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True)
    before = compiled(inputs())
    converted(model)
    assert torch.equal(compiled(inputs()), model(inputs()))
    assert not torch.equal(compiled(inputs())[:20], before[:20])


@pytest.mark.parametrize("tie", [False, True])
def test_unquantize(tie: bool) -> None:
    model, untouched = Model(), Model()
    if tie:
        model.experts.down = untouched.experts.down = model.experts.up
    untouched.load_state_dict(model.state_dict())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    converted(model)
    loss_of(model).backward()
    gradient, address = model.experts.up.grad, model.experts.up.data_ptr()
    unquantize_(model)
    assert all(p is parameters[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert {type(p) for p in parameters.values()} == {nn.Parameter}
    assert model.experts.up.grad is gradient
    assert model.experts.up.data_ptr() == address
    assert vars(model.experts).keys() == vars(untouched.experts).keys()
    for name, value in vars(untouched.experts).items():
        assert type(vars(model.experts)[name]) is type(value), name
        if isinstance(value, dict) and name != "_parameters":
            assert vars(model.experts)[name] == value, name
    assert "_is_param" not in vars(model.experts.up)
    if not tie:
        assert not is_converted(model)
        assert equal(model(inputs())[:20], untouched(inputs())[:20])
        assert is_converted(converted(model))
    unquantize_(untouched)  # nothing to do


def test_other_parameters_are_refused() -> None:
    class Mine(nn.Parameter):
        pass

    model = Model()
    model.experts.up = Mine(torch.zeros(4, 48, 32))
    with pytest.raises(ValueError, match=r"up is a Mine; give an nn.Parameter"):
        converted(model)


# ---------------------------------------------------------------------------------------------------- copies and files


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_copies_of_a_module_keep_its_conversion(copy_of: Callable[[nn.Module], Any]) -> None:
    model = converted()
    twin = copy_of(model)
    assert is_converted(twin)
    assert equal(values(model), values(twin))
    twin.load_state_dict(Model().state_dict(), assign=True)
    assert is_converted(twin)
    unquantize_(twin)
    assert is_converted(model)
    assert not is_converted(twin)


def test_average_of_weights() -> None:
    model = converted()
    average = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    before = values(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    average.update_parameters(model)
    for got, old in zip(values(average.module), before, strict=True):
        torch.testing.assert_close(got, old + 0.5)
    assert is_converted(average.module)


def test_state_dict_is_plain() -> None:
    model = converted()
    assert {type(x) for x in model.state_dict().values()} == {Tensor}
    assert model.state_dict()["experts.up"].data_ptr() == model.experts.up.data_ptr()
    assert model.state_dict(keep_vars=True)["experts.up"] is model.experts.up


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("source", [False, True])
@pytest.mark.parametrize("target", [False, True])
def test_loading_converts_nothing_and_unconverts_nothing(assign: bool, source: bool, target: bool) -> None:
    first, second = (converted() if convert else Model() for convert in (source, target))
    second.load_state_dict(first.state_dict(), assign=assign)
    assert is_converted(second) == target
    assert is_converted(first) == source
    assert equal(values(first), values(second))
    assert (first.experts.up.data_ptr() == second.experts.up.data_ptr()) == assign


def through_torch_save(state: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_safetensors(state: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(state, folder / "model.safetensors")
    return safetensors.load_file(folder / "model.safetensors")


def through_dcp(state: dict[str, Tensor], folder: Any) -> dict[str, Tensor]:
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)
    loaded = {name: torch.zeros_like(x) for name, x in state.items()}
    dcp.load(loaded, checkpoint_id=folder / "dcp", no_dist=True)
    return loaded


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("through", [through_torch_save, through_safetensors, through_dcp])
@pytest.mark.parametrize("assign", [False, True])
def test_checkpoints(through: Callable[..., dict[str, Tensor]], assign: bool, tmp_path: Any) -> None:
    """Of a converted model in an unconverted one, and back."""
    first, second, third = converted(), Model(), converted()
    second.load_state_dict(through(first.state_dict(), tmp_path), assign=assign)
    (tmp_path / "back").mkdir()
    third.load_state_dict(through(second.state_dict(), tmp_path / "back"), assign=assign)
    assert equal(values(first), values(second))
    assert equal(values(first), values(third))
    assert (is_converted(second), is_converted(third)) == (False, True)


@pytest.mark.parametrize("swap", [False, True])
def test_moves(swap: bool) -> None:
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with torch.device("meta"):
            model = Model()
        converted(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                nn.init.normal_(p, std=0.2)
        assert is_converted(model.to(torch.float64).to(torch.bfloat16).float())
        before = values(model)
        loss_of(model).backward()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    if swap:  # which keeps the objects
        optimizer.step()
        assert not equal(values(model), before)


# ---------------------------------------------------------------------------------------------------- calls, transforms


SAVE_PRODUCTS = partial(
    create_selective_checkpoint_contexts,
    lambda ctx, op, *args, **kwargs: (
        CheckpointPolicy.MUST_SAVE
        if op is torch.ops.xmoe.grouped_mm_forward.default
        else CheckpointPolicy.PREFER_RECOMPUTE
    ),
)


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"use_reentrant": True}, 4),
        ({"use_reentrant": False}, 4),
        ({"use_reentrant": False, "context_fn": SAVE_PRODUCTS}, 2),
    ],
    ids=["reentrant", "not reentrant", "selective"],
)
def test_activation_checkpointing(options: dict[str, Any], calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same gradients; a policy sees the op, so that its output can be kept instead of computed twice."""
    model = converted()
    expected = gradients(model)
    count = []
    spy = lambda *args: count.append(1) or grouped_mm_forward(*args)  # noqa: E731
    monkeypatch.setattr("xmoe.torch_backend.ops.grouped_mm_forward", spy)
    x = inputs().requires_grad_()  # reentrant checkpointing gives gradients to what is inside through its inputs
    checkpoint(model, x, **options).float().square().mean().backward()
    assert equal([p.grad for p in model.parameters()], expected)
    if "context_fn" not in options:
        assert len(count) == calls


@pytest.mark.parametrize("kind", ["plain", "detached", "parameters"])
def test_functional_call(kind: str) -> None:
    """The module's precision is the module's, whatever tensors it is lent; they come back as they were."""
    model = converted()
    lent = {
        "plain": {name: x.clone().requires_grad_() for name, x in model.state_dict().items()},
        "detached": {name: p.detach() for name, p in model.named_parameters()},
        "parameters": dict(model.named_parameters()),
    }[kind]
    types, objects = {name: type(x) for name, x in lent.items()}, dict(lent)
    out = torch.func.functional_call(model, lent, (inputs(),))
    assert torch.equal(out, model(inputs()))
    assert {name: type(x) for name, x in lent.items()} == types
    assert all(lent[name] is x for name, x in objects.items())
    if kind == "plain":
        out.float().square().mean().backward()
        assert equal([x.grad for x in lent.values()], gradients(model))
    assert is_converted(model)


def by_vmap(model: nn.Module) -> Any:
    return torch.func.vmap(model)(torch.stack([inputs(), inputs()]))


def by_ensemble(model: nn.Module) -> Any:
    x = inputs()
    state = {name: torch.stack([x, x]) for name, x in model.state_dict().items()}
    return torch.func.vmap(lambda state: torch.func.functional_call(model, state, (x,)))(state)


def by_grad(model: nn.Module) -> Any:
    state = dict(model.named_parameters())
    return torch.func.grad(lambda state: torch.func.functional_call(model, state, (inputs(),)).sum())(state)


def by_jvp(model: nn.Module) -> Any:
    return torch.func.jvp(model, (inputs(),), (inputs(),))


def by_forward_mode(model: nn.Module) -> Any:
    with torch.autograd.forward_ad.dual_level():
        return model(torch.autograd.forward_ad.make_dual(inputs(), inputs()))


def by_vmap_of_experts(model: nn.Module) -> Any:
    moe = converted(MoE(32, 48, 4, 2))
    return torch.func.vmap(lambda x: moe.experts(x, OFFS))(torch.stack([inputs(), inputs()]))


TRANSFORMS = [by_vmap, by_ensemble, by_grad, by_jvp, by_forward_mode, by_vmap_of_experts]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform: Callable[[nn.Module], Any], frozen: bool) -> None:
    model = converted()
    model.requires_grad_(not frozen)
    with pytest.raises(NotImplementedError, match=r"neither the transforms of torch.func .* use backward\(\)"):
        transform(model)
    assert is_converted(model)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """The exported program runs the quantized products, for any number of tokens."""
    model = converted()
    shapes = ({0: torch.export.Dim("M", min=20)},)
    program = torch.export.export(model, (inputs(),), strict=strict, dynamic_shapes=shapes)
    products = [node for node in program.graph.nodes if node.target is torch.ops.xmoe.grouped_mm_forward.default]
    assert len(products) == 2
    assert torch.equal(program.module()(inputs(40)), model(inputs(40)))
    assert is_converted(model)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(inputs(40)), model(inputs(40)))


def test_export_of_a_layer() -> None:
    moe = converted(MoE(32, 48, 4, 2))
    program = torch.export.export(moe, (inputs(),))
    assert any(node.target is torch.ops.xmoe.swiglu_experts_forward.default for node in program.graph.nodes)
    assert torch.equal(program.module()(inputs())[0], moe(inputs())[0])


def test_compile_has_no_graph_breaks() -> None:
    """A whole layer, two kinds of experts, forward and backward: two graphs for any number of tokens, none broken."""
    torch._dynamo.reset()
    counters.clear()
    moe = MoE(32, 48, 4, 2, shared_hidden_dim=16)
    quantize_(moe, FqnToConfig({"experts": "fp8_rowwise"}), verbose=False)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(moe, backend=counter)
    for rows in (20, 33, 50, 7):
        x = torch.randn(rows, 32, dtype=torch.bfloat16, requires_grad=True)
        y, loss = compiled(x)
        (y.float().square().mean() + loss).backward()
    assert counter.frame_count <= 2
    assert not counters["graph_break"]
    assert all(type(p.grad) is Tensor for p in moe.parameters())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_functional_call(fullgraph: bool) -> None:
    """Dynamo alone: aot_eager's checks of custom ops reject tensor subclasses that are no parameters."""
    torch._dynamo.reset()
    model, x = converted(), inputs()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def call(state: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, state, (x,))

    assert torch.equal(torch.compile(call, backend="eager", fullgraph=fullgraph)(state, x), model(x))
    assert is_converted(model)
