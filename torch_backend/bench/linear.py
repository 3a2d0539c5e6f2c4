"""The cases of ``xmoe bench linear``: layer norm, linear and sigmoid, forward and backward.

M = rows, K = in_features, N = out_features; everything in bf16, weights shared by all systems of a case.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from xmoe.bench.exactness import Exactness, least_db
from xmoe.bench.harness import Case, System
from xmoe.bench.options import Options
from xmoe.bench.report import LINEAR
from xmoe.bench.results import BF16
from xmoe.bench.workload import Work
from xmoe.config import Gemm, LinearConfig
from xmoe.kernels.dispatch import Device, select
from xmoe.shapes import LinearShape
from xmoe.torch_backend.bench import peers
from xmoe.torch_backend.bench.exactness import compare
from xmoe.torch_backend.bench.layer import WEIGHT_STD, sharing
from xmoe.torch_backend.quantize import quantize_


def case(
    options: Options, shape: LinearShape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """Unconverted, with each recipe of ours and with torchao's of the same name; with ``options.compile`` also by
    torch.compile."""

    def make(where: torch.device | str) -> nn.Sequential:
        linear = nn.Linear(shape.K, shape.N, bias=False, device=where, dtype=torch.bfloat16)
        return nn.Sequential(nn.LayerNorm(shape.K, device=where, dtype=torch.bfloat16), linear, nn.Sigmoid())

    base = make(device)
    nn.init.normal_(base.get_parameter("1.weight"), std=WEIGHT_STD)
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    x, dOut = (torch.randn(shape.M, C, device=device, dtype=torch.bfloat16) for C in (shape.K, shape.N))
    x.requires_grad_()

    models: dict[str, tuple[nn.Module, LinearConfig | None]] = {BF16: (base, None)}
    missing = {}
    for recipe in options.recipes:
        config = LinearConfig.from_recipe(recipe)
        model = sharing(make, weights, functools.partial(quantize_, config=config, verbose=False))
        models[f"xmoe {recipe}"] = model, config
        if "torchao" in options.peers and recipe in peers.TORCHAO_LINEARS:
            try:
                model = sharing(make, weights, functools.partial(peers.convert_linears, recipe=recipe))
            except Exception as error:  # an installation that does not fit this torch
                missing[f"torchao {recipe}"] = f"{type(error).__name__}: {str(error)[:160]}"
            else:
                models[f"torchao {recipe}"] = model, config

    def clean() -> None:
        x.grad = None
        for model, _ in models.values():
            model.zero_grad()

    def step(model: Callable[[Tensor], Tensor]) -> Tensor:
        clean()
        out = model(x)
        out.backward(dOut)
        return out.detach()

    def results(run: Callable[[Tensor], Tensor], model: nn.Module) -> dict[str, Tensor]:
        found = {"out": step(run), "dx": x.grad} | {f"d{name}": p.grad for name, p in model.named_parameters()}
        assert all(value is not None for value in found.values()), f"a gradient is missing: {found.keys()}"
        clean()
        return found  # type: ignore (none is None)

    reference = results(base, base)

    def check(run: Callable[[Tensor], Tensor], model: nn.Module, config: LinearConfig | None) -> Exactness:
        # A layer's bound, less for gradients in e5m2 (one bit less) through the activation: 21.8 dB of K = 28672.
        least = least_db("bf16") if config is None else least_db(config.format, layer=True) - 2
        return compare(results(run, model), reference, (), least)

    systems = []
    for compiled in (False, True) if options.compile else (False,):
        for name, (model, config) in models.items():
            run = torch.compile(model, backend=backend, dynamic=False) if compiled else model
            systems.append(
                System(
                    name=name,
                    compiled=compiled,
                    step=functools.partial(step, run),
                    check=functools.partial(check, run, model, config),
                    forward=lambda run=run: run(x.clone()),
                    work=work(config, shape.flops, capability),
                )
            )
    dims = {"M": shape.M, "K": shape.K, "N": shape.N}
    return Case(
        table=LINEAR, shape=shape.name, dims=dims, tokens=shape.M, systems=systems, missing=missing, clean=clean
    )


def work(config: LinearConfig | None, flops: float, capability: tuple[int, int] | None) -> Work:
    """The operations of the three GEMMs, by the elements that the device multiplies; all bf16 where it has no fp8."""
    found: Work = {}
    for gemm in Gemm:
        kind = "bf16"
        if config is not None and capability is not None:
            grouped = config.grouped(gemm)
            elements = "fp8"
            if grouped is not None:
                chosen = select(grouped, Device("cuda", capability))
                elements = chosen.wgrad_elements if gemm is Gemm.GRAD_WEIGHT else chosen.elements
            kind = "bf16" if elements == "bf16" else "fp8"
        found[kind] = found.get(kind, 0.0) + flops
    return found
