"""Two training runs side by side: the same model in PyTorch and in Flax, from the same weights on the same batches.

After every step: both losses, and how far the experts' outputs are apart on that step's batch. At the first step: the
first tensor in which the two part, the bytes of the experts' quantized operands, and what makes them part: every module
of Flax on the inputs that PyTorch recorded, and Flax's optimizer on PyTorch's gradients. A second PyTorch run, with one
weight changed by one rounding, says how far the model itself carries such a difference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from xmoe.config import GroupedMMConfig
from xmoe.parity.run import arrays_of
from xmoe.parity.systems import find_systems
from xmoe.parity.trace import EXPERTS, Array, Replayer, Trace, Tracer
from xmoe.testing import Comparison, Gemm, compare
from xmoe.train.config import TrainConfig
from xmoe.train.data import Corpus
from xmoe.train.model import initial_weights

Make = Callable[[TrainConfig, str, dict[str, Array]], Any]
"""(config, recipe, weights) → a `Tracer`."""


@dataclass(slots=True)
class ExpertsApart:
    """The outputs of one layer's experts, PyTorch's and the other's."""

    largest: float
    """The largest absolute difference of an element, over the slots that both send to one expert."""
    sqnr_db: float
    rerouted: int
    """Slots that the two send to different experts."""
    slots: int


@dataclass(slots=True)
class Step:
    """One step; 1 is the first."""

    step: int
    losses: dict[str, float]
    """"torch", "flax" and "neighbour", nats per byte."""
    experts: dict[str, ExpertsApart]
    """By the name of the layer's experts: PyTorch and Flax."""
    control: dict[str, ExpertsApart]
    """The same of PyTorch and its neighbour."""


@dataclass(slots=True)
class Part:
    """One tensor in which the frameworks differ."""

    step: int
    tensor: str
    found: Comparison


@dataclass(slots=True)
class Cause:
    """One computation of Flax on PyTorch's inputs, beside PyTorch's."""

    name: str
    found: Comparison
    rounded: Comparison | None = None
    """With ``xla_allow_excess_precision=False``: XLA rounds to bfloat16 where the program says so."""


@dataclass(slots=True)
class Run:
    """What the comparison of one recipe found."""

    recipe: str
    device: str
    steps: list[Step] = field(default_factory=list)
    first: Part | None = None
    """Where they part first, in the order of computation; None: nowhere."""
    operands: dict[str, Comparison] = field(default_factory=dict)
    """Of the first step, by layer and operand: as each framework has them."""
    same_inputs: dict[str, Comparison] = field(default_factory=dict)
    """The same of PyTorch's inputs, quantized by both."""
    causes: list[Cause] = field(default_factory=list)
    """In the order of computation; those without a difference too."""


def compare_training(
    config: TrainConfig,
    recipe: str,
    corpus: Corpus,
    make_torch: Make,
    make_flax: Make,
    progress: Callable[[Step], None] = lambda step: None,
) -> Run:
    """Train both and compare. ``make_flax`` gives a `Replayer`. The learners' device is that of ``config``."""
    weights = initial_weights(config)
    torch: Tracer = make_torch(config, recipe, weights)
    control: Tracer = make_torch(config, recipe, neighbour(weights, config.compute_dtype))
    flax: Replayer = make_flax(config, recipe, weights)
    run = Run(recipe, torch.learner.device)
    for step in range(1, config.steps + 1):
        batch = corpus.batch(config.seed, step, config.batch_size, config.seq_len)
        learning_rate = config.learning_rate_at(step - 1)
        of_torch, of_flax = (tracer.trace(batch, gradients=step == 1) for tracer in (torch, flax))
        near = control.trace(batch)
        if step == 1:
            run.causes = find_causes(of_torch, flax)
            operands = compare_operands(of_torch, of_flax, config.quantization(recipe), weights, config.device)
            run.operands, run.same_inputs = operands
            updated = flax.update(of_torch.gradients, learning_rate)
        if run.first is None:
            run.first = first_difference(step, of_torch, of_flax)
        losses = {
            name: float(tracer.learner.step(batch, learning_rate))
            for name, tracer in (("torch", torch), ("flax", flax), ("neighbour", control))
        }
        if step == 1:
            state = torch.learner.state()
            found = [Cause(f"optimizer: {name}", compare(state[f"weights.{name}"], x)) for name, x in updated.items()]
            run.causes += found
        run.steps.append(Step(step, losses, experts_apart(of_torch, of_flax), experts_apart(of_torch, near)))
        progress(run.steps[-1])
    return run


def neighbour(weights: Mapping[str, Array], dtype: str) -> dict[str, Array]:
    """The same weights, but the largest of the first attention's output matrix goes to the next number of ``dtype``,
    that of the matmuls."""
    near = {name: array.copy() for name, array in weights.items()}
    matrix = near["blocks.0.attention.out.weight"]
    at = np.unravel_index(np.abs(matrix).argmax(), matrix.shape)
    matrix[at] = np.float32(np.nextafter(matrix[at].astype(dtype), np.dtype(dtype).type(np.inf)))
    return near


def experts_apart(a: Trace, b: Trace) -> dict[str, ExpertsApart]:
    """Of every layer."""
    found = {}
    for name in (name for name in a.outputs if name.endswith(EXPERTS)):
        (chosen_a, rows_a), (chosen_b, rows_b) = a.experts(name), b.experts(name)
        same = chosen_a == chosen_b
        x, y = (rows[same].astype(np.float64) for rows in (rows_a, rows_b))
        largest = float(np.abs(x - y).max(initial=0.0))
        found[name] = ExpertsApart(largest, compare(x, y).sqnr_db, int((~same).sum()), len(same))
    return found


def first_difference(step: int, a: Trace, b: Trace) -> Part | None:
    """Of the modules' outputs, the loss and the gradients, in the order in which they are computed."""
    pairs = [(name, a.outputs[name], b.outputs[name]) for name in a.outputs if name in b.outputs]
    pairs.append(("loss", np.array(a.loss), np.array(b.loss)))
    pairs += [(f"gradient of {name}", a.gradients[name], b.gradients[name]) for name in reversed([*a.gradients])]
    for name, x, y in pairs:
        found = compare(x, y, any_nan=True)
        if not found.equal:
            return Part(step, name, found)
    return None


def find_causes(trace: Trace, flax: Replayer) -> list[Cause]:
    """Flax's modules on PyTorch's inputs. Whole blocks, and what Flax has no counterpart of, are left out."""
    inputs = {name: x for name, x in trace.inputs.items() if not name.rpartition(".")[2].isdigit()}
    default, rounded = (flax.replay(inputs, excess_precision=excess) for excess in (True, False))
    return [
        Cause(name, *(compare(trace.outputs[name], found[name], any_nan=True) for found in (default, rounded)))
        for name in inputs
        if name in default
    ]


def compare_operands(
    a: Trace, b: Trace, config: GroupedMMConfig, weights: Mapping[str, Array], device: str
) -> tuple[dict[str, Comparison], dict[str, Comparison]]:
    """The quantized operands of every layer's x, w1, w2 and w3: each framework's, and both of ``a``'s x.

    Rows are in the order in which ``a`` routes them, so that another route does not move all of them.
    """
    if config.format == "bf16":
        return {}, {}
    systems = find_systems(config, device)
    of_torch = [system for system in systems if system.name.startswith("torch")][-1:]
    of_jax = [system for system in systems if system.name.startswith("jax")]
    own, same = {}, {}
    for name in (name for name in a.outputs if name.endswith(EXPERTS)):
        x, sizes, order = a.inputs[name]
        k = len(order) // len(x)
        other = b.inputs[name][0]
        gemms = {}
        for part in ("w1", "w2", "w3"):
            w = weights[f"{name}.{part}"].swapaxes(1, 2).astype(x.dtype)
            rows = x[order // k] if part == "w1" else np.zeros((0, w.shape[1]), x.dtype)
            ends = np.cumsum(sizes if part == "w1" else 0 * sizes, dtype=np.int32)
            gemms[part] = Gemm(rows, w, ends, np.zeros((len(rows), w.shape[2]), x.dtype))
        for part, inputs in gemms.items():
            theirs = inputs._replace(A=other[order // k]) if part == "w1" else inputs
            made = [_operands(of_torch, inputs), _operands(of_jax, theirs), _operands(of_jax, inputs)]
            for operand in (o for o in made[0] if o in made[1] and "dOut" not in o and (part == "w1" or "A " not in o)):
                label = f"{name}: {operand.replace('A ', 'x, ').replace('B along', f'{part} along')}"
                own[label], same[label] = (compare(made[0][operand], other[operand]) for other in made[1:])
    return own, same


def _operands(systems: list[Any], inputs: Gemm) -> dict[str, Array]:
    found = {}
    for system in systems:
        found |= arrays_of(system.operands(inputs))
    return found
