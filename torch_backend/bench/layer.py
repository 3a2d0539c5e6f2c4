"""The cases of ``xmoe bench layer``: SwiGLU experts alone, the whole MoE layer, that of transformers' Qwen3-MoE.

D = model width, H = hidden width of an expert, E = experts; weights in bf16, shared by all systems of a case.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from xmoe.bench.exactness import least_db
from xmoe.bench.harness import Case, System
from xmoe.bench.options import Options
from xmoe.bench.results import BF16, TORCHAO
from xmoe.bench.workload import gemm_work, uneven_sizes
from xmoe.config import config_from_recipe
from xmoe.shapes import LayerShape, StackShape
from xmoe.torch_backend.bench import peers
from xmoe.torch_backend.bench.exactness import compare
from xmoe.torch_backend.moe import GroupedExperts, MoE
from xmoe.torch_backend.quantize import quantize_

Model = TypeVar("Model", bound=nn.Module)
EXPERTS = "SwiGLU experts, forward and backward"
LAYER = "MoE layer, forward and backward"
BLOCK = "transformers' Qwen3MoeSparseMoeBlock, forward and backward"
WEIGHT_STD = 0.02


def experts_case(
    options: Options, shape: LayerShape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """`GroupedExperts` on ``shape.rows`` rows that are sorted by expert."""
    sizes = uneven_sizes(shape.rows, shape.experts)
    offs = torch.from_numpy(sizes).cumsum(0, dtype=torch.int32)

    def make(where: torch.device | str) -> nn.Module:
        return GroupedExperts(shape.dim, shape.hidden, shape.experts, device=where, dtype=torch.bfloat16)

    x, on_device = _normal(shape.rows, shape.dim, device=device), offs.to(device)
    dims = {"rows": shape.rows, "D": shape.dim, "H": shape.hidden, "E": shape.experts}
    return _case(
        EXPERTS, options, shape, dims, capability, backend, make, x,
        call=lambda model, x: (model(x, on_device),), ends=offs.tolist(), sizes=lambda model: sizes.tolist(),
    )  # fmt: skip


def layer_case(
    options: Options, shape: LayerShape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """`MoE` on ``shape.tokens`` tokens: router, permutation, experts, combination, and the load-balance loss."""
    x = _normal(shape.tokens, shape.dim, device=device)

    def make(where: torch.device | str) -> nn.Module:
        return moe(shape, where)

    def sizes(model: nn.Module) -> list[int]:
        with torch.no_grad():
            return model.get_submodule("router")(x)[2].tolist()

    dims = {"T": shape.tokens, "D": shape.dim, "H": shape.hidden, "E": shape.experts, "k": shape.top_k}
    return _case(
        LAYER, options, shape, dims, capability, backend, make, x,
        call=lambda model, x: model(x), ends=(), sizes=sizes,
    )  # fmt: skip


def transformers_case(
    options: Options, shape: LayerShape, device: torch.device, capability: tuple[int, int] | None, backend: str
) -> Case:
    """As `layer_case`, of transformers' layer with its grouped GEMMs; converted, xmoe's experts implementation."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3  # type: ignore (optional)

    x = _normal(1, shape.tokens, shape.dim, device=device)

    def make(where: torch.device | str) -> nn.Module:
        config = qwen3.Qwen3MoeConfig(
            hidden_size=shape.dim, moe_intermediate_size=shape.hidden, num_experts=shape.experts,
            num_experts_per_tok=shape.top_k, norm_topk_prob=shape.top_k > 1,
            experts_implementation="grouped_mm",  # type: ignore (of every config)
        )  # fmt: skip
        with torch.device(where):
            return qwen3.Qwen3MoeSparseMoeBlock(config).bfloat16()

    def sizes(model: nn.Module) -> list[int]:
        with torch.no_grad():
            chosen = model.get_submodule("gate")(x)[-1]
        return torch.bincount(chosen.flatten(), minlength=shape.experts).tolist()

    dims = {"T": shape.tokens, "D": shape.dim, "H": shape.hidden, "E": shape.experts, "k": shape.top_k}
    return _case(
        BLOCK, options, shape, dims, capability, backend, make, x,
        call=lambda model, x: (model(x),), ends=(), sizes=sizes,
    )  # fmt: skip


def moe(shape: LayerShape | StackShape, device: torch.device | str) -> MoE:
    """The layer of ``shape``, in bf16."""
    # A single score, normalised, is the constant 1, and the router's gradient rounding noise.
    return MoE(
        shape.dim, shape.hidden, shape.experts, shape.top_k, normalize_scores=shape.top_k > 1, device=device,
        dtype=torch.bfloat16,
    )  # fmt: skip


def sharing(
    make: Callable[[torch.device | str], Model], weights: dict[str, Tensor], convert: Callable[[nn.Module], None]
) -> Model:
    """Another model of ``make(device)``, with the same ``weights`` in the same memory, converted."""
    model = make("meta")
    model.load_state_dict(weights, assign=True)
    convert(model)
    return model


def _case(
    table: str,
    options: Options,
    shape: LayerShape,
    dims: dict[str, int],
    capability: tuple[int, int] | None,
    backend: str,
    make: Callable[[torch.device | str], nn.Module],
    x: Tensor,
    call: Callable[[nn.Module, Tensor], tuple[Tensor, ...]],
    ends: Sequence[int],
    sizes: Callable[[nn.Module], list[int]],
) -> Case:
    """``call(model, x)`` gives the output, and perhaps a loss beside it; ``sizes(model)`` the tokens of each expert."""
    base = make(x.device)
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=WEIGHT_STD)
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    x.requires_grad_()
    dOut = _normal(*x.shape, device=x.device)

    def convert_with_torchao(model: nn.Module) -> None:
        peers.convert(model, lambda module, _: any(p.ndim == 3 for p in module.parameters(recurse=False)))

    models: dict[str, tuple[nn.Module, str, str]] = {BF16: (base, "bf16", "bf16")}
    for recipe in options.recipes:
        config = config_from_recipe(recipe)
        model = sharing(make, weights, lambda model, config=config: quantize_(model, config, verbose=False))
        models[f"xmoe {recipe}"] = model, recipe, config.format
    missing = {}
    if "torchao" in options.peers:
        if why := peers.obstacle(sizes(base)):
            missing[TORCHAO] = why
        else:
            model = sharing(make, weights, convert_with_torchao)
            models[TORCHAO] = model, "fp8_rowwise", "fp8_rowwise"

    def clean() -> None:
        x.grad = None
        for model, _, _ in models.values():
            model.zero_grad()

    def step(model: nn.Module) -> Tensor:
        clean()
        out, *losses = call(model, x)
        torch.autograd.backward((out, *losses), (dOut, *map(torch.ones_like, losses)))
        return out.detach()

    def results(model: nn.Module) -> dict[str, Tensor]:
        found = {"out": step(model), "dx": x.grad}
        for name, parameter in model.named_parameters():
            found[f"d{name.removeprefix('_orig_mod.')}"] = parameter.grad
        assert all(value is not None for value in found.values()), f"a gradient is missing: {found.keys()}"
        clean()
        return found  # type: ignore (none is None)

    reference = results(base)
    systems = []
    for compiled in (False, True) if options.compile else (False,):
        for name, (model, recipe, format) in models.items():
            run: nn.Module = torch.compile(model, backend=backend, dynamic=False) if compiled else model  # type: ignore
            least, own = least_db(format, layer=True), name.startswith("xmoe")
            systems.append(
                System(
                    name=name,
                    compiled=compiled,
                    step=lambda run=run: step(run),
                    check=lambda run=run, least=least, own=own: compare(
                        results(run), reference, ends, least, empty_experts=own
                    ),
                    forward=lambda run=run: call(run, x.clone())[0],
                    work=gemm_work(recipe, shape.flops, capability),
                )
            )
    return Case(
        table=table,
        shape=shape.name,
        dims=dims,
        tokens=x.shape[:-1].numel(),
        systems=systems,
        missing=missing,
        clean=clean,
    )


def _normal(*shape: int, device: torch.device) -> Tensor:
    return torch.randn(shape, device=device, dtype=torch.bfloat16)
