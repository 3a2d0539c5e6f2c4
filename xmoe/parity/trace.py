"""What a model computes on the way, recorded by either framework under the same names.

T = tokens, k = experts of each token, M = T·k rows, D = model width, E = experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from xmoe.train.loop import Learner

Array = NDArray[Any]
Inputs = Mapping[str, tuple[Any, ...]]
"""Of modules, by name. Of experts: x [T, D], the tokens of each expert int32 [E], order [M]."""
EXPERTS = ".moe.experts"
"""How the names of experts end."""
ROTATION, SOFTMAX = ".rotation", ".softmax"
"""What attention does between its matrices, after its own name: no modules, so recorded by PyTorch alone."""


@dataclass(slots=True)
class Trace:
    """One batch through one model."""

    inputs: dict[str, tuple[Array, ...]] = field(default_factory=dict)
    outputs: dict[str, Array] = field(default_factory=dict)
    """In the order in which modules end. Of experts [M, D], sorted by expert."""
    loss: float = float("nan")
    """The batch's cross-entropy, nats per byte."""
    gradients: dict[str, Array] = field(default_factory=dict)
    """Of the parameters, before clipping."""

    def experts(self, name: str) -> tuple[NDArray[np.int64], Array]:
        """The expert of every slot int64 [M] and its output [M, D], by slot: slot s is token s // k."""
        _, sizes, order = self.inputs[name]
        rows = self.outputs[name]
        chosen, by_slot = np.empty(len(rows), np.int64), np.empty_like(rows)
        chosen[order] = np.repeat(np.arange(len(sizes)), sizes)
        by_slot[order] = rows
        return chosen, by_slot


class Tracer(Protocol):
    """A learner, opened."""

    learner: Learner

    def trace(self, tokens: Array, *, gradients: bool = False) -> Trace:
        """The model as it is, on a batch uint8 [B, S + 1]."""
        ...


class Replayer(Tracer, Protocol):
    """One that also computes on what another framework recorded."""

    def replay(self, inputs: Inputs, *, excess_precision: bool = True) -> dict[str, Array]:
        """Every module's output on these inputs, each by itself."""
        ...

    def update(self, gradients: Mapping[str, Array], learning_rate: float) -> dict[str, Array]:
        """The parameters after the step that these gradients give; nothing is changed."""
        ...
