"""The cases of ``xmoe bench grouped-mm``: the bare forward GEMM, and forward and backward with both gradients.

Random bf16 data and uneven groups. A [M, K], weights stored [G, N, K] as models store them.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xmoe.bench.exactness import Exactness, least_db
from xmoe.bench.harness import Case, System
from xmoe.bench.options import BASE_RECIPES, Options
from xmoe.bench.report import BOTH, FORWARD
from xmoe.bench.results import BF16, TORCHAO
from xmoe.bench.workload import gemm_work, uneven_sizes
from xmoe.config import config_from_recipe
from xmoe.kernels import stages
from xmoe.shapes import Shape
from xmoe.torch_backend.bench import peers
from xmoe.torch_backend.bench.exactness import compare
from xmoe.torch_backend.grouped_gemm import scaled_grouped_mm
from xmoe.torch_backend.weight_cache import cache_weights

GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(A [M, K], weights [G, N, K], offs int32 [G]) → [M, N]."""
MICRO_BATCHES = 8
"""That share quantized weights, with ``options.cached``."""
_EQUAL_DB = 50.0
"""Two GEMMs on the same quantized operands agree to this at least: the kernel tier."""


def operands(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """A [M, K] and weights [G, N, K], N(0, 1) in bf16; offs int32 [G], and the same as a list."""
    A = torch.randn(shape.M, shape.K, device=device, dtype=torch.bfloat16)
    B = torch.randn(shape.G, shape.N, shape.K, device=device, dtype=torch.bfloat16)
    offs = torch.from_numpy(uneven_sizes(shape.M, shape.G)).cumsum(0, dtype=torch.int32)
    return A, B, offs.to(device), offs.tolist()


def forward_case(options: Options, shape: Shape, device: torch.device, capability: tuple[int, int] | None) -> Case:
    """The forward GEMM on operands that are quantized before, xmoe's and torch's on the same bytes."""
    A, B, offs, ends = operands(shape, device)
    reference = torch._grouped_mm(A, B.mT, offs)

    def system(
        name: str, step: Callable[[], Tensor], recipe: str, least: float, twin: Callable[[], Tensor] | None = None
    ) -> System:
        def check() -> Exactness:
            out, note = step(), ""
            if twin is not None:
                other = twin()
                equal = torch.equal(out, other)
                compare({"out": out}, {"out": other}, ends, _EQUAL_DB, reference_name="xmoe's")
                note = f"{'equal bits' if equal else 'other bits'} to xmoe's"
            return compare({"out": out}, {"out": reference}, ends, least, note)

        work = gemm_work(recipe, shape.flops, capability, backward=False)
        return System(name=name, step=step, check=check, work=work)

    systems = [system(BF16, lambda: torch._grouped_mm(A, B.mT, offs), "bf16", least_db("bf16"))]
    for recipe in (r for r in options.recipes if r in BASE_RECIPES):
        format = config_from_recipe(recipe).format
        gemm = functools.cache(functools.partial(stages.prepared_gemm, config_from_recipe(recipe), A, B.mT, offs))

        def ours(gemm: Callable[[], stages.PreparedGemm] = gemm) -> Tensor:
            gemm().launch()
            return gemm().out

        systems.append(system(f"xmoe {recipe}", ours, recipe, least_db(format)))
        if recipe == "fp8_rowwise" and "torch" in options.peers:

            def torchs(gemm: Callable[[], stages.PreparedGemm] = gemm) -> Tensor:
                a, a_scale, b, b_scale = gemm().operands
                assert a_scale is not None, "fp8_rowwise has scales"
                assert b_scale is not None, "fp8_rowwise has scales"
                return torch._scaled_grouped_mm(
                    a, b.mT, a_scale, b_scale, offs, out_dtype=torch.bfloat16, use_fast_accum=True
                )

            systems.append(system("torch._scaled_grouped_mm", torchs, recipe, least_db(format), twin=ours))
    return Case(table=FORWARD, shape=shape.name, dims=dims(shape), tokens=shape.M, systems=systems)


class Training:
    """Forward and backward from bf16 operands that require grad: out [M, N], dA [M, K], dB [G, N, K]."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        self.A, self.B, self.offs, self.ends = operands(shape, device)
        self.A.requires_grad_()
        self.B.requires_grad_()
        self.dOut = torch.randn(shape.M, shape.N, device=device, dtype=torch.bfloat16)
        self._reference = self._results(baseline)

    def clean(self) -> None:
        """Drops the gradients."""
        self.A.grad = self.B.grad = None

    def step(self, fn: GroupedMM) -> Tensor:
        """The output; the gradients stay with the operands."""
        self.clean()
        out = fn(self.A, self.B, self.offs)
        out.backward(self.dOut)
        return out.detach()

    def check(self, fn: GroupedMM, entrant: "Entrant") -> Exactness:
        """``fn``, which is the entrant's own or made from it, against `baseline`. Raises WrongResult."""
        least = least_db(config_from_recipe(entrant.recipe).format)
        return compare(self._results(fn), self._reference, self.ends, least, empty_experts=entrant.own)

    def _results(self, fn: GroupedMM) -> dict[str, Tensor]:
        out = self.step(fn)
        dA, dB = self.A.grad, self.B.grad
        assert dA is not None, "A requires grad"
        assert dB is not None, "B requires grad"
        self.clean()
        return {"out": out, "dA": dA, "dB": dB}


@dataclass(frozen=True, slots=True)
class Entrant:
    """A differentiable grouped GEMM, and the recipe that it runs or that is closest to what it runs."""

    name: str
    fn: GroupedMM
    recipe: str

    @property
    def own(self) -> bool:
        """Whether it is xmoe's."""
        return self.name.startswith("xmoe")


def baseline(A: Tensor, B: Tensor, offs: Tensor) -> Tensor:
    """`BF16`."""
    return torch._grouped_mm(A, B.mT, offs)


def entrants(options: Options, ends: Sequence[int]) -> tuple[list[Entrant], dict[str, str]]:
    """The baseline, every recipe and torchao where asked for; and those that cannot run groups with these ends: why."""
    found = [Entrant(BF16, baseline, "bf16")]
    for recipe in options.recipes:
        config = config_from_recipe(recipe)

        def ours(A: Tensor, B: Tensor, offs: Tensor, config=config) -> Tensor:
            return scaled_grouped_mm(A, B.mT, offs, config)

        found.append(Entrant(f"xmoe {recipe}", ours, recipe))
    if "torchao" not in options.peers:
        return found, {}
    if why := peers.obstacle([end - start for start, end in zip([0, *ends], ends, strict=False)]):
        return found, {TORCHAO: why}
    torchao = peers.grouped_mm()
    found.append(Entrant(TORCHAO, lambda A, B, offs: torchao(A, B.mT, offs), "fp8_rowwise"))
    return found, {}


def forward_backward_case(
    options: Options, shape: Shape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """`Training` of every entrant, with ``options.compile`` also by torch.compile."""
    training = Training(shape, device)
    found, missing = entrants(options, training.ends)
    systems = []
    for compiled in (False, True) if options.compile else (False,):
        for entrant in found:
            run = torch.compile(entrant.fn, backend=backend, dynamic=False) if compiled else entrant.fn
            systems.append(
                System(
                    name=entrant.name,
                    compiled=compiled,
                    step=functools.partial(training.step, run),
                    check=functools.partial(training.check, run, entrant),
                    forward=lambda run=run: run(training.A.clone(), training.B, training.offs),
                    work=gemm_work(entrant.recipe, shape.flops, capability),
                )
            )
    systems += [_cached(training, entrant, shape, capability) for entrant in found if options.cached and entrant.own]
    return Case(
        table=BOTH, shape=shape.name, dims=dims(shape), tokens=shape.M, systems=systems, missing=missing,
        clean=training.clean,
    )  # fmt: skip


def _cached(training: Training, entrant: Entrant, shape: Shape, capability: tuple[int, int] | None) -> System:
    """Over MICRO_BATCHES whose weights are quantized once."""

    def steps() -> None:
        with cache_weights():
            for _ in range(MICRO_BATCHES):
                training.step(entrant.fn)

    def cached(A: Tensor, B: Tensor, offs: Tensor) -> Tensor:
        with cache_weights():
            entrant.fn(A, B, offs)
            return entrant.fn(A, B, offs)

    return System(
        name=f"{entrant.name}, weights cached over {MICRO_BATCHES}", step=steps, steps=MICRO_BATCHES,
        check=functools.partial(training.check, cached, entrant),
        work=gemm_work(entrant.recipe, shape.flops, capability),
    )  # fmt: skip


def dims(shape: Shape) -> dict[str, int]:
    """The shape's sizes by their letters."""
    return {"M": shape.M, "N": shape.N, "K": shape.K, "G": shape.G}
