"""FSDP2 over converted models, on two ranks. Run by test_fsdp.py."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.torch_backend.distributed import WORLD, Ranks, main
from xmoe import FqnToConfig
from xmoe.torch_backend import ScaledGroupedMMTensor, quantize_
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


def train(model: nn.Module, ranks: Ranks, steps: int = 2) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of this rank, and the parameters after `steps` of clipped AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = loss_of(model, batch(step, ranks.rank))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: full(p.detach()).clone() for name, p in model.named_parameters()}


def compare(ranks: Ranks, make: Callable[[Model], None], reference_dtype: torch.dtype | None = None) -> None:
    """The sharded model's first loss and gradients are those of the converted model that is not sharded: bit for bit."""
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    convert(reference)
    if reference_dtype:
        reference.to(reference_dtype)
    make(model)
    gradients: dict[str, Tensor] = {}
    for rank in range(WORLD):
        x = batch(0, rank).to(reference_dtype or torch.float32)
        loss = loss_of(reference, x)
        parts = torch.autograd.grad(loss, list(reference.parameters()))
        for (name, _), part in zip(reference.named_parameters(), parts, strict=True):
            gradients[name] = gradients.get(name, 0) + part.float()
        if rank == ranks.rank:
            expected = loss
    for _ in range(2):  # what is gathered again is another all-gather into the same parameter
        model.zero_grad()
        with products() as keys:
            loss = loss_of(model, batch(0, ranks.rank))
        assert keys == ["fp8_rowwise", "mxfp8_rceil"] * 2, keys
        loss.backward()
        assert torch.equal(loss, expected), (loss, expected)
        for name, p in model.named_parameters():
            assert isinstance(p, DTensor), name
            assert type(p.grad.to_local()) is Tensor, type(p.grad.to_local())
            assert torch.equal(full(p.grad), gradients[name] / WORLD), name


def check_converted_before(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        convert(model)
        shard(model, ranks)

    compare(ranks, make)

def check_mp(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        convert(model)
        shard(model, ranks, mp_policy=BF16)

    compare(ranks, make, torch.bfloat16)

def check_after(ranks: Ranks) -> None:
    def make(model: Model) -> None:
        shard(model, ranks, mp_policy=BF16)
        convert(model)

    compare(ranks, make, torch.bfloat16)

if __name__ == "__main__":
    main()
