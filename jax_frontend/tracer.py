"""Flax's training run, opened for ``xmoe parity --train``."""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xmoe.fqn import dotted
from xmoe.jax_frontend.learner import FlaxLearner, Parameters
from xmoe.jax_frontend.model import Transformer, rotate
from xmoe.parity.trace import ROTATION, SOFTMAX, Inputs, Trace

Recorded = dict[str, tuple[tuple[jax.Array, ...], jax.Array]]
"""Inputs and output of each module, in the order in which they end."""


class FlaxTracer:
    """`FlaxLearner` with what its modules take and give.

    A program that also returns these is another program to XLA, which may round where the training step does not: what
    is recorded can differ from what the step computes by that.
    """

    def __init__(self, learner: FlaxLearner) -> None:
        self.learner = learner
        self._names: list[str] = []
        self._forward = jax.jit(self._recorded_losses)
        self._backward = jax.jit(self._recorded_gradients)
        self._replays = {
            excess: jax.jit(self._replay, compiler_options={"xla_allow_excess_precision": excess})
            for excess in (True, False)
        }
        self._update_step = jax.jit(lambda *given: learner._updated(*given)[0])

    def trace(self, tokens: np.ndarray, *, gradients: bool = False) -> Trace:
        parameters, found = self.learner._parameters, {}
        if gradients:
            found, (loss, recorded) = self._backward(parameters, tokens)
        else:
            loss, recorded = self._forward(parameters, tokens)
        arrays = {name: jax.tree.map(np.asarray, recorded[name]) for name in self._names}
        return Trace(
            inputs={name: inputs for name, (inputs, _) in arrays.items()},
            outputs={name: output for name, (_, output) in arrays.items()},
            loss=float(loss),
            gradients={name: np.asarray(gradient) for name, gradient in found.items()},
        )

    def replay(self, inputs: Inputs, *, excess_precision: bool = True) -> dict[str, np.ndarray]:
        found = self._replays[excess_precision](self.learner._parameters, dict(inputs))
        return {name: np.asarray(output) for name, output in found.items()}

    def update(self, gradients: Mapping[str, np.ndarray], learning_rate: float) -> dict[str, np.ndarray]:
        learner = self.learner
        found = self._update_step(learner._parameters, learner._moments, dict(gradients), np.float32(learning_rate))
        return {name: np.asarray(parameter) for name, parameter in found.items()}

    def _recorded_losses(self, parameters: Parameters, tokens: jax.Array) -> tuple[jax.Array, Recorded]:
        return self._objective(parameters, tokens)[1]

    def _recorded_gradients(self, parameters: Parameters, tokens: jax.Array) -> Any:
        return jax.grad(lambda p: self._objective(p, tokens), has_aux=True)(parameters)

    def _objective(self, parameters: Parameters, tokens: jax.Array) -> Any:
        """``(objective, (loss, what the modules did))``, the former two the learner's."""
        with recording(Transformer) as recorded:
            objective, loss = self.learner._objective(parameters, tokens)
        self._names = [*recorded]
        return objective, (loss, recorded)

    def _replay(self, parameters: Parameters, inputs: Inputs) -> dict[str, jax.Array]:
        modules = {dotted(path): module for path, module in nnx.iter_modules(self.learner._model(parameters))}
        found = {name: _first(modules[name](*arrays)) for name, arrays in inputs.items() if name in modules}
        for name, arrays in inputs.items():
            if name.endswith(ROTATION):
                q, k, cos, sin = arrays
                found[name] = jnp.stack([rotate(q, cos, sin), rotate(k, cos, sin)])
            elif name.endswith(SOFTMAX):
                found[name] = jax.nn.dot_product_attention(*arrays, is_causal=True)
        return found


@contextmanager
def recording(root: type[nnx.Module]) -> Iterator[Recorded]:
    """Inside, a call of a ``root`` module has every call of a module below it recorded, by its dotted path.

    Modules have no hooks, and are made anew inside every traced function: so their classes are patched meanwhile.
    """
    recorded: Recorded = {}
    patched: dict[type, Callable[..., Any]] = {}
    paths: dict[int, str] = {}

    def patch(cls: type) -> None:
        original = patched[cls] = cls.__call__

        @functools.wraps(original)
        def call(module: Any, *args: Any) -> Any:
            output = original(module, *args)
            if name := paths.get(id(module)):
                recorded[name] = tuple(jnp.asarray(x) for x in args if x is not None), _first(output)
            return output

        cls.__call__ = call

    original = root.__call__

    @functools.wraps(original)
    def call_root(model: Any, *args: Any) -> Any:
        modules = {path: module for path, module in nnx.iter_modules(model) if path}
        paths.update({id(module): dotted(path) for path, module in modules.items()})
        for cls in {type(module) for module in modules.values() if callable(module)} - patched.keys():
            patch(cls)
        return original(model, *args)

    root.__call__ = call_root  # type: ignore (of any arguments)
    try:
        yield recorded
    finally:
        root.__call__ = original
        for cls, method in patched.items():
            cls.__call__ = method


def _first(output: Any) -> jax.Array:
    return output[0] if isinstance(output, tuple) else output


make_tracer = FlaxTracer
