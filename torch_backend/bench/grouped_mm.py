"""The cases of ``xmoe bench grouped-mm``: the bare forward GEMM, and forward and backward with both gradients.

Random bf16 data and uneven groups. A [M, K], weights stored [G, N, K] as models store them.
"""

import functools
from collections.abc import Callable

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
from xmoe.torch_backend.grouped_mm import scaled_grouped_mm

GroupedMM = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(A [M, K], weights [G, N, K], offs int32 [G]) → [M, N]."""
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
                compare({"out": out}, {"out": other}, ends, _EQUAL_DB)
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


def forward_backward_case(
    options: Options, shape: Shape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """Forward and backward from bf16 operands: out [M, N], dA [M, K], dB [G, N, K]."""
    A, B, offs, ends = operands(shape, device)
    A.requires_grad_()
    B.requires_grad_()
    dOut = torch.randn(shape.M, shape.N, device=device, dtype=torch.bfloat16)

    def clean() -> None:
        A.grad = B.grad = None

    def step(fn: GroupedMM) -> Tensor:
        clean()
        out = fn(A, B, offs)
        out.backward(dOut)
        return out.detach()

    def results(fn: GroupedMM) -> dict[str, Tensor]:
        out = step(fn)
        dA, dB = A.grad, B.grad
        assert dA is not None, "A requires grad"
        assert dB is not None, "B requires grad"
        found = {"out": out, "dA": dA, "dB": dB}
        clean()
        return found

    def baseline(A: Tensor, B: Tensor, offs: Tensor) -> Tensor:
        return torch._grouped_mm(A, B.mT, offs)

    reference = results(baseline)
    functions: dict[str, tuple[GroupedMM, str, str]] = {BF16: (baseline, "bf16", "bf16")}
    for recipe in options.recipes:
        config = config_from_recipe(recipe)

        def ours(A: Tensor, B: Tensor, offs: Tensor, config=config) -> Tensor:
            return scaled_grouped_mm(A, B.mT, offs, config)

        functions[f"xmoe {recipe}"] = ours, recipe, config.format
    missing = {}
    if "torchao" in options.peers:
        if why := peers.obstacle([end - start for start, end in zip([0, *ends], ends, strict=False)]):
            missing[TORCHAO] = why
        else:
            torchao = peers.grouped_mm()
            functions[TORCHAO] = (lambda A, B, offs: torchao(A, B.mT, offs)), "fp8_rowwise", "fp8_rowwise"
    systems = []
    for compiled in (False, True) if options.compile else (False,):
        for name, (fn, recipe, format) in functions.items():
            run = torch.compile(fn, backend=backend, dynamic=False) if compiled else fn
            least, own = least_db(format), name.startswith("xmoe")
            systems.append(
                System(
                    name=name,
                    compiled=compiled,
                    step=lambda run=run: step(run),
                    check=lambda run=run, least=least, own=own: compare(
                        results(run), reference, ends, least, empty_experts=own
                    ),
                    forward=lambda run=run: run(A.clone(), B, offs),
                    work=gemm_work(recipe, shape.flops, capability),
                )
            )
    return Case(
        table=BOTH, shape=shape.name, dims=dims(shape), tokens=shape.M, systems=systems, missing=missing, clean=clean
    )


def dims(shape: Shape) -> dict[str, int]:
    """The shape's sizes by their letters."""
    return {"M": shape.M, "N": shape.N, "K": shape.K, "G": shape.G}
