"""The cases of ``xmoe bench overhead``: what launching costs, where the GPU has too little to do to hide it.

The host time of one op, forward and backward, and a step of a model of many small layers, eager and from a CUDA graph.
D = model width, H = hidden width of an expert, E = experts, T = tokens, k = experts that each token goes to.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xmoe.bench.exactness import Exactness, least_db
from xmoe.bench.harness import Case, System
from xmoe.bench.options import Options
from xmoe.bench.results import BF16
from xmoe.bench.workload import gemm_work
from xmoe.config import config_from_recipe
from xmoe.shapes import Shape, StackShape
from xmoe.torch_backend.bench import gpu
from xmoe.torch_backend.bench.exactness import compare
from xmoe.torch_backend.bench.grouped_mm import Entrant, Training, dims, entrants
from xmoe.torch_backend.bench.layer import moe, sharing
from xmoe.torch_backend.quantize import quantize_

HOST_FORWARD = "host time of one op, forward (goal: 80 µs)"
HOST_BACKWARD = "host time of one op, backward (goal: 200 µs)"
EAGER = "step of a model of MoE layers, eager"
CAPTURED = "step of a model of MoE layers, from a CUDA graph"

Results = dict[str, Tensor]
"""By name: "out", "dx", and a gradient for each parameter."""


# ------------------------------------------------------------------------------------------------- host time of one op


def host_forward_case(options: Options, shape: Shape, device: torch.device) -> Case:
    """The call of every entrant's forward, on operands that require grad."""
    training, timer = Training(shape, device), gpu.HostTimer(device)

    def forward_ms(entrant: Entrant) -> float:
        return timer(lambda: None, lambda _: entrant.fn(training.A, training.B, training.offs))

    return _host_case(HOST_FORWARD, options, shape, training, forward_ms)


def host_backward_case(options: Options, shape: Shape, device: torch.device) -> Case:
    """The call of ``backward()`` on every entrant's output, for the gradients of both operands."""
    training, timer = Training(shape, device), gpu.HostTimer(device)

    def forward(entrant: Entrant) -> Tensor:
        # Each on leaves of its own: a second backward through the same would add to the gradients of the first.
        A, B = (x.detach().requires_grad_() for x in (training.A, training.B))
        return entrant.fn(A, B, training.offs)

    def backward_ms(entrant: Entrant) -> float:
        return timer(lambda: forward(entrant), lambda out: out.backward(training.dOut))

    return _host_case(HOST_BACKWARD, options, shape, training, backward_ms)


def _host_case(
    table: str, options: Options, shape: Shape, training: Training, time_ms: Callable[[Entrant], float]
) -> Case:
    found, missing = entrants(options, training.ends)
    systems = [
        System(
            name=entrant.name,
            step=functools.partial(training.step, entrant.fn),
            check=functools.partial(training.check, entrant.fn, entrant),
            time=functools.partial(time_ms, entrant),
            peak=lambda: None,
            work={},
        )
        for entrant in found
    ]
    return Case(
        table=table, shape=shape.name, dims=dims(shape), tokens=shape.M, systems=systems, missing=missing, unit="µs",
        clean=training.clean,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ step of a model


class Stack(nn.Module):
    """``layers`` times x + MoE(norm(x)), in bf16: x [T, D] → (y [T, D], the layers' mean load-balance loss)."""

    def __init__(self, shape: StackShape, device: torch.device | str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(moe(shape, device) for _ in range(shape.layers))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        losses = []
        for layer in self.layers:
            y, loss = layer(F.rms_norm(x, x.shape[-1:]))
            x = x + y
            losses.append(loss)
        return x, torch.stack(losses).mean()


class Step:
    """Forward and backward of a `Stack` or one of its layers: x, dOut [T, D]. The gradients stay with the leaves."""

    def __init__(self, model: nn.Module, x: Tensor, dOut: Tensor) -> None:
        self._model, self._x, self._dOut = model, x, dOut
        self._leaves = {"dx": x} | {f"d{name}": parameter for name, parameter in model.named_parameters()}
        self._one = torch.ones((), device=x.device)  # float32, as the loss

    def __call__(self) -> Tensor:
        self.clean()
        out, loss = self._model(self._x)
        torch.autograd.backward((out, loss), (self._dOut, self._one))
        return out.detach()

    def clean(self) -> None:
        """Drops the gradients, at the same cost whether or not the weights are wrapped."""
        with torch._C.DisableTorchFunctionSubclass():
            for leaf in self._leaves.values():
                leaf.grad = None

    def results(self) -> Results:
        """Of a step: the output and all gradients, which it leaves to the caller."""
        found: dict[str, Tensor | None] = {"out": self()}
        found |= {name: leaf.grad for name, leaf in self._leaves.items()}
        self.clean()
        assert all(value is not None for value in found.values()), f"a gradient is missing: {found.keys()}"
        return found  # type: ignore (none is None)


def layer_results(stack: Stack, x: Tensor, dOut: Tensor) -> Results:
    """`Step.results` of every layer by itself, all on the same input.

    A chain's results say little about its layers: rounding in one makes the routers of the next choose other experts
    for some tokens. Measured with moe_16_layers in fp8_rowwise: weight gradients 20 to 9 dB from bf16's.
    """
    found = {}
    for i, layer in enumerate(stack.layers):
        found |= {f"layers.{i}.{name}": value for name, value in Step(layer, x, dOut).results().items()}
    return found


class CapturedStep:
    """A `Step` as a CUDA graph, captured at the first use."""

    def __init__(self, step: Step, device: torch.device) -> None:
        self._capture = functools.cache(lambda: gpu.capture(step.results, device))

    def __call__(self) -> None:
        replay, _ = self._capture()
        replay()

    def results(self) -> Results:
        """Of a replay, in the graph's memory."""
        replay, written = self._capture()
        for value in written.values():
            value.fill_(float("nan"))  # what a replay does not write shows
        replay()
        return written


def step_case(
    options: Options, shape: StackShape, device: torch.device, capability: tuple[int, int] | None, *, captured: bool
) -> Case:
    """A `Step` of a `Stack`, unconverted and with each recipe; or all of them ``captured``, each in one CUDA graph.

    There is no torchao: its kernels take no groups of any size, which a router makes.
    """
    base = Stack(shape, device)
    weights = {name: parameter.detach() for name, parameter in base.named_parameters()}
    x, dOut = (torch.randn(shape.tokens, shape.dim, device=device, dtype=torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    models: dict[str, tuple[Stack, str]] = {BF16: (base, "bf16")}
    for recipe in options.recipes:
        config = config_from_recipe(recipe)
        convert = functools.partial(quantize_, config=config, verbose=False)
        models[f"xmoe {recipe}"] = sharing(functools.partial(Stack, shape), weights, convert), recipe
    steps = {name: Step(model, x, dOut) for name, (model, _) in models.items()}
    reference = layer_results(base, x, dOut)

    def check(model: Stack, step: Step, replayed: CapturedStep | None, format: str) -> Exactness:
        note = ""
        if replayed is not None:
            eager, results = step.results(), replayed.results()
            compare(results, eager, (), least_db("bf16"), reference_name="the eager step's")
            equal = all(torch.equal(results[name], value) for name, value in eager.items())
            note = f"{'equal bits' if equal else 'other bits'} to eager's"
        return compare(layer_results(model, x, dOut), reference, (), least_db(format, layer=True), note)

    def clean() -> None:
        for step in steps.values():
            step.clean()

    systems = []
    for name, (model, recipe) in models.items():
        step = steps[name]
        replayed = CapturedStep(step, device) if captured else None
        systems.append(
            System(
                name=name,
                step=replayed or step,
                check=functools.partial(check, model, step, replayed, config_from_recipe(recipe).format),
                forward=None if captured else lambda model=model: model(x.clone())[0],
                peak=(lambda: None) if captured else None,  # a replay allocates nothing
                work=gemm_work(recipe, shape.flops, capability),
            )
        )
    letters = {"layers": shape.layers, "T": shape.tokens, "D": shape.dim, "H": shape.hidden, "E": shape.experts}
    return Case(
        table=CAPTURED if captured else EAGER, shape=shape.name, dims=letters | {"k": shape.top_k}, tokens=shape.tokens,
        systems=systems, clean=clean,
    )  # fmt: skip
