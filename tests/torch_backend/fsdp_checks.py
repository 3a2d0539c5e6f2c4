"""FSDP2 over converted models, on two ranks. Run by test_fsdp.py."""

import copy
import io
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tests.torch_backend.compiling import BACKEND
from tests.torch_backend.distributed import WORLD, Ranks, main
from xmoe import FqnToConfig
from xmoe.torch_backend import ScaledGroupedMMTensor, quantize_, scaled_grouped_mm, unquantize_
from xmoe.torch_backend import tensor as tensor_module

E, D, H = 5, 32, 48  # ranks hold 3 and 2 experts
OFFS = torch.tensor([3, 3, 9, 20, 24], dtype=torch.int32)
CONFIGS = FqnToConfig({r"re:.*\.w1": "fp8_rowwise", r"re:.*\.w2": "mxfp8_rceil"})
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(E, H, D) / 6)
        self.w2 = nn.Parameter(torch.randn(E, D, H) / 7)

    def forward(self, x: Tensor) -> Tensor:
        w1, w2 = (w.to_local() if isinstance(w, DTensor) else w for w in (self.w1, self.w2))
        h = F.silu(torch._grouped_mm(x.bfloat16(), w1.bfloat16().mT, offs=OFFS))
        return torch._grouped_mm(h, w2.bfloat16().mT, offs=OFFS).to(x.dtype)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.experts = nn.LayerNorm(D), Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def convert(model: nn.Module) -> None:
    quantize_(model, CONFIGS, verbose=False)


def shard(model: Model, ranks: Ranks, **options: object) -> None:
    for layer in model.layers:
        fully_shard(layer, mesh=ranks.mesh, **options)
    fully_shard(model, mesh=ranks.mesh, **options)


@contextmanager
def products() -> Iterator[list[str]]:
    """The config keys of the grouped GEMMs that run in low precision within it."""
    found: list[str] = []
    original = tensor_module.grouped_mm_by_key

    def counted(A: Tensor, B: Tensor, offs: Tensor, key: str) -> Tensor:
        found.append(key)
        return original(A, B, offs, key)

    tensor_module.grouped_mm_by_key = counted
    try:
        yield found
    finally:
        tensor_module.grouped_mm_by_key = original


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(26, D, generator=torch.Generator().manual_seed(10 * step + rank))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).float().square().mean()


def full(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def losses_and_gradients(model: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """The loss of each rank's batch, and the mean of the gradients, in float32."""
    losses = [loss_of(model, batch(0, rank).to(dtype)) for rank in range(WORLD)]
    gradients = [[x.float() for x in torch.autograd.grad(loss, list(model.parameters()))] for loss in losses]
    return losses, [sum(of_ranks) / WORLD for of_ranks in zip(*gradients, strict=True)]


def compare(ranks: Ranks, make: Callable[[Model], None], reference_dtype: torch.dtype | None = None) -> None:
    """The sharded model's first loss and gradients are those of the converted model that is not sharded: bit for bit."""
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    convert(reference)
    if reference_dtype:
        reference.to(reference_dtype)
    make(model)
    expected, gradients = losses_and_gradients(reference, reference_dtype or torch.float32)
    for _ in range(2):  # what is gathered again is another all-gather into the same parameter
        model.zero_grad()
        with products() as keys:
            loss = loss_of(model, batch(0, ranks.rank))
        assert keys == ["fp8_rowwise", "mxfp8_rceil"] * 2, keys
        loss.backward()
        assert torch.equal(loss, expected[ranks.rank]), (loss, expected)
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert isinstance(p, DTensor), name
            assert type(p.grad.to_local()) is Tensor, type(p.grad.to_local())
            assert torch.equal(full(p.grad), gradient), name


def check_converted_before(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        convert(model)
        shard(model, ranks)

    compare(ranks, make)


def check_converted_after(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        shard(model, ranks)
        convert(model)

    compare(ranks, make)


def check_mixed_precision(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        convert(model)
        shard(model, ranks, mp_policy=BF16)

    compare(ranks, make, torch.bfloat16)


def check_options(ranks: Ranks) -> None:
    """Kept gathered, gathered anew, offloaded."""
    for options in ({"reshard_after_forward": False}, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}):

        def make(model: Model, options: dict[str, object] = options) -> None:
            convert(model)
            shard(model, ranks, **options)

        compare(ranks, make)


def check_meta_device(ranks: Ranks) -> None:
    """Converted and sharded on the meta device, then materialised and loaded."""

    def make(model: Model) -> None:
        values = model.state_dict()
        model.to("meta")
        convert(model)
        shard(model, ranks)
        model.to_empty(device="cpu")
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(model, values, options=options)

    compare(ranks, make)


def check_load_with_assign(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        plain = Model()
        plain.load_state_dict(model.state_dict())
        convert(model)
        for x in (model, plain):
            shard(x, ranks)
        with torch.no_grad():
            for p in model.parameters():
                p.zero_()
        model.load_state_dict(plain.state_dict(), assign=True)

    compare(ranks, make)


def check_activation_checkpointing(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        convert(model)
        for i, layer in enumerate(model.layers):
            model.layers[i] = checkpoint_wrapper(layer)
        shard(model, ranks)

    compare(ranks, make)


def check_compile(ranks: Ranks) -> None:
    """Compiled, whole, before it is sharded: FSDP's hooks stay outside."""
    counter = CompileCounterWithBackend(BACKEND)

    def make(model: Model) -> None:
        convert(model)
        for i, layer in enumerate(model.layers):
            model.layers[i] = torch.compile(layer, backend=counter, fullgraph=True)
        shard(model, ranks)

    model = Model()
    reference = copy.deepcopy(model)
    convert(reference)
    make(model)
    expected, loss = loss_of(reference, batch(0, ranks.rank)), loss_of(model, batch(0, ranks.rank))
    loss.backward()
    torch.testing.assert_close(loss, expected)
    targets = [str(node.target) for graph in counter.graphs for node in graph.graph.nodes]
    assert targets.count("xmoe.grouped_mm_forward.default") == 2 * counter.frame_count, targets
    frames = counter.frame_count
    loss_of(model, batch(1, ranks.rank)).backward()
    assert counter.frame_count == frames


def check_training(ranks: Ranks) -> None:
    """Clipped AdamW over sharded parameters ends where it ends over those of the mean of both ranks' gradients."""
    model = Model()
    reference = copy.deepcopy(model)
    convert(model)
    convert(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # before FSDP has replaced them: it knows none of these
    shard(model, ranks)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    expected = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    for step in range(3):
        loss_of(model, batch(step, ranks.rank)).backward()
        for rank in range(WORLD):
            (loss_of(reference, batch(step, rank)) / WORLD).backward()
        norms = [torch.nn.utils.clip_grad_norm_(x.parameters(), 0.1) for x in (model, reference)]
        torch.testing.assert_close(full(norms[0]), norms[1])
        for x in (optimizer, expected):
            x.step()
            x.zero_grad()
    for state in optimizer.state.values():
        assert type(state["exp_avg"].to_local()) is Tensor
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(full(p.detach()), q.detach().as_subclass(Tensor), msg=name)


def check_distributed_checkpoint(ranks: Ranks) -> None:
    """A sharded converted model's checkpoint in an unconverted one that is not sharded, and the other way around."""
    sharded, plain = Model(), Model()
    convert(sharded)
    shard(sharded, ranks)
    with torch.no_grad():
        for p in sharded.parameters():
            p.add_(1)
    values = {name: full(p.detach()) for name, p in sharded.named_parameters()}
    state = get_model_state_dict(sharded)
    assert all(type(x.to_local()) is Tensor for x in state.values())
    dcp.save(state, checkpoint_id=ranks.folder / "sharded")
    state = get_model_state_dict(plain)
    dcp.load(state, checkpoint_id=ranks.folder / "sharded")
    set_model_state_dict(plain, state)
    assert all(torch.equal(p, values[name]) for name, p in plain.named_parameters())
    assert not any(isinstance(p, ScaledGroupedMMTensor) for p in plain.parameters())

    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    dcp.save(get_model_state_dict(plain), checkpoint_id=ranks.folder / "plain")
    state = get_model_state_dict(sharded)
    dcp.load(state, checkpoint_id=ranks.folder / "plain")
    set_model_state_dict(sharded, state)
    assert all(torch.equal(full(p.detach()), values[name] + 1) for name, p in sharded.named_parameters())
    with products() as keys:
        loss_of(sharded, batch(0, ranks.rank)).backward()
    assert len(keys) == 4


def check_expert_parallel(ranks: Ranks) -> None:
    """Parameters sharded by ``distribute_tensor``, along any of their axes, before and after they are converted; also
    gathered by FSDP2 from such shards."""
    config = FqnToConfig({"w": "fp8_rowwise"})
    for dim, converted_first in itertools.product(range(3), (True, False)):
        model = nn.ParameterDict({"w": torch.randn(4, 32, 64)})
        whole = model["w"].detach().clone()
        if converted_first:
            quantize_(model, config, verbose=False)
        model["w"] = nn.Parameter(distribute_tensor(model["w"], ranks.mesh, [Shard(dim)]))
        if not converted_first:
            quantize_(model, config, verbose=False)
        B = model["w"].to_local().bfloat16().mT
        offs = torch.arange(5, 5 * B.shape[0] + 1, 5, dtype=torch.int32)
        A = torch.randn(5 * B.shape[0], B.shape[1], dtype=torch.bfloat16)
        shard_of = whole.chunk(WORLD, dim)[ranks.rank].bfloat16().mT
        expected = scaled_grouped_mm(A, shard_of.requires_grad_(), offs, "fp8_rowwise")
        out = torch._grouped_mm(A, B, offs=offs)
        assert torch.equal(out, expected)
        out.sum().backward()
        expected.sum().backward()
        gradient = model["w"].grad
        assert isinstance(gradient, DTensor)
        assert gradient.placements == (Shard(dim),)
        assert torch.equal(gradient.to_local(), shard_of.grad.mT.float())
        assert model["w"].shape == whole.shape
        with pytest.raises(ValueError, match=r"_grouped_mm got a DTensor .*weight.to_local\(\)"):
            torch._grouped_mm(A, model["w"].mT, offs=offs)
        twin = copy.deepcopy(model)
        twin.to(torch.bfloat16)
        assert isinstance(twin["w"].to_local(), ScaledGroupedMMTensor)
        stored = io.BytesIO()
        torch.save(model.state_dict(), stored)
        stored.seek(0)
        assert type(torch.load(stored, weights_only=True)["w"]) is DTensor
        unquantize_(model)
        assert type(model["w"]) is DTensor
        assert type(model["w"].to_local()) is Tensor


def check_dtensor_in_compiled_code(ranks: Ranks) -> None:
    """Refused: the compiler sees to_local()'s result as a plain tensor."""

    class Parallel(Experts):
        def forward(self, x: Tensor) -> Tensor:
            return torch._grouped_mm(x, self.w1.to_local().mT, offs=OFFS)

    x = torch.randn(26, D)
    for backend in (None, "eager", "inductor"):
        torch._dynamo.reset()
        model = Parallel()
        quantize_(model, "fp8_rowwise", verbose=False)
        model.w1 = nn.Parameter(distribute_tensor(model.w1, ranks.mesh, [Replicate()]))
        with products() as keys:
            if backend is None:
                model(x)
                assert keys == ["fp8_rowwise"]
            else:
                with pytest.raises(Exception, match="call to_local.. outside"):
                    torch.compile(model, backend=backend, fullgraph=True)(x)


def check_compiled_optimizer(ranks: Ranks) -> None:
    torch._dynamo.reset()
    model = nn.ParameterDict({"w": torch.randn(4, 32, 64)})
    quantize_(model, FqnToConfig({"w": "fp8_rowwise"}), verbose=False)
    fully_shard(model, mesh=ranks.mesh)
    w = model["w"]
    w.grad = torch.ones_like(w)
    optimizer = torch.optim.SGD([w], lr=1.0)
    expected = w.to_local() - 1
    torch.compile(optimizer.step, backend="eager")()
    assert torch.equal(w.to_local(), expected)


def check_expert_parallel_and_fsdp(ranks: Ranks) -> None:
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("dp", "ep"))
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    for x in (model, reference):
        convert(x)
    for layer in model.layers:
        for name, p in layer.experts.named_parameters():
            layer.experts.register_parameter(name, nn.Parameter(distribute_tensor(p, mesh["ep"], [Shard(0)])))
        fully_shard(layer.experts, mesh=mesh["dp"], mp_policy=BF16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            if isinstance(p, DTensor):
                p.to_local().copy_(q.chunk(WORLD, 0)[ranks.rank])
            else:
                p.copy_(q)
    x = batch(0, ranks.rank)
    with products() as keys:
        loss = loss_of(model, x)
    loss.backward()
    assert keys == ["fp8_rowwise", "mxfp8_rceil"] * 2
    assert torch.equal(loss, loss_of(reference, x))
    assert all(p.grad is not None for p in model.parameters())


def check_ddp(ranks: Ranks) -> None:
    """Data parallel replicas, their gradients the mean of both ranks'."""
    model = Model()
    convert(model)
    _, gradients = losses_and_gradients(model, torch.float32)
    for bucket_view in (False, True):
        model.zero_grad()
        replica = DistributedDataParallel(model, gradient_as_bucket_view=bucket_view)
        with products() as keys:
            loss_of(replica, batch(0, ranks.rank)).backward()
        assert len(keys) == 4
        for (name, p), gradient in zip(model.named_parameters(), gradients, strict=True):
            assert type(p.grad) is Tensor
            assert torch.equal(p.grad, gradient), name
        del replica


if __name__ == "__main__":
    main()
