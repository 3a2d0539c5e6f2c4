"""PyTorch's training run, opened for ``xmoe parity --train``."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from xmoe.parity.trace import EXPERTS, ROTATION, SOFTMAX, Trace
from xmoe.testing import as_numpy
from xmoe.torch_backend.learner import TorchLearner
from xmoe.torch_backend.model import Attention, _rotate
from xmoe.torch_backend.parity import to_torch


class TorchTracer:
    """`TorchLearner` with what its modules take and give."""

    def __init__(self, learner: TorchLearner) -> None:
        self.learner = learner

    def trace(self, tokens: np.ndarray, *, gradients: bool = False) -> Trace:
        learner, trace = self.learner, Trace()
        with _recorded(learner._model, trace), torch.set_grad_enabled(gradients):
            loss, load_balance_loss = learner._losses(tokens)
        trace.loss = float(loss.detach())
        _inside_attention(learner._model, trace, learner._device)
        if gradients:
            (loss + learner._config.load_balance * load_balance_loss).backward()
            trace.gradients = {name: as_numpy(p.grad) for name, p in learner._parameters.items()}
            learner._optimizer.zero_grad()
        return trace


@contextmanager
def _recorded(model: nn.Module, trace: Trace) -> Iterator[None]:
    """Every module's inputs and (first) output go into ``trace``."""

    def record(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        arrays = tuple(as_numpy(x) for x in args if isinstance(x, Tensor))
        if name.endswith(EXPERTS):  # they take the ends of the groups
            arrays = arrays[0], np.diff(arrays[1], prepend=np.int32(0)), arrays[2]
        trace.inputs[name] = arrays
        trace.outputs[name] = as_numpy(output if isinstance(output, Tensor) else output[0])

    # The routers' modules compute other things in the two frameworks: they are compared as part of their layers.
    modules = [(name, module) for name, module in model.named_modules() if name and not name.endswith("router")]
    hooks = [module.register_forward_hook(partial(record, name)) for name, module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inside_attention(model: nn.Module, trace: Trace, device: torch.device) -> None:
    """Adds what attention does between its two matrices, from what they gave and took: the rotation of q and k, and the
    rest, softmax and both products."""
    for name, module in model.named_modules():
        if not isinstance(module, Attention):
            continue
        qkv, (attended,) = trace.outputs[f"{name}.qkv"], trace.inputs[f"{name}.out"]
        _, cos, sin = trace.inputs[name]
        B, S, D3 = qkv.shape
        q, k, v = np.moveaxis(qkv.reshape(B, S, 3, module.heads, D3 // 3 // module.heads), 2, 0)
        tables = to_torch(cos, device), to_torch(sin, device)
        rotated = [as_numpy(_rotate(to_torch(np.ascontiguousarray(x), device), *tables)) for x in (q, k)]
        trace.inputs |= {f"{name}{ROTATION}": (q, k, cos, sin), f"{name}{SOFTMAX}": (*rotated, v)}
        trace.outputs |= {f"{name}{ROTATION}": np.stack(rotated), f"{name}{SOFTMAX}": attended.reshape(v.shape)}


make_tracer = TorchTracer
