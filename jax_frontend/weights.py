"""Weights between a Flax NNX module and the state dict of its PyTorch twin, on the same memory where both allow it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from xmoe.fqn import dotted
from xmoe.jax_frontend import bridge

if TYPE_CHECKING:
    import torch


def to_torch(module_or_state: Any) -> "dict[str, torch.Tensor]":
    """The parameters of a Flax NNX module, and its routers' biases, as a PyTorch state dict ("experts.w1": tensor); or
    all that is in a state or in nested dicts.

    The tensors share memory with the arrays: read them, or load them (``load_state_dict`` copies). JAX takes its
    arrays for constants, so nothing may write to them, an optimizer neither. Training on needs ``.clone()``.

    Raises:
        ValueError: something in it is no array.
    """
    from flax import nnx

    from xmoe.jax_frontend.moe import RouterBias

    state = module_or_state
    if isinstance(state, nnx.Module):
        state = nnx.state(state, (nnx.Param, RouterBias))
    leaves, _ = jax.tree.flatten_with_path(nnx.to_pure_dict(state) if isinstance(state, nnx.State) else state)
    arrays = {dotted(path): leaf for path, leaf in leaves}
    for name, leaf in arrays.items():
        if not isinstance(leaf, jax.Array | np.ndarray):
            where = f"has {name}={leaf!r}, which is no array" if name else f"is {leaf!r}"
            raise ValueError(f"module_or_state {where}; give a Flax NNX module, its state, or nested dicts of arrays")
    return {name: bridge.torch_from_jax(array) for name, array in arrays.items()}


def from_torch(state_dict: "Mapping[str, torch.Tensor]") -> dict[Any, Any]:
    """A PyTorch state dict as nested dicts of JAX arrays, for ``flax.nnx.update(layer, from_torch(state_dict))``.

    On a GPU the arrays share memory with the tensors. On a CPU they do where the tensor begins at a multiple of 64
    bytes, which PyTorch's allocator always gives but a slice may not; else JAX copies. While an array that shares
    memory is in use nothing may write to its tensor: give ``tensor.clone()`` where training goes on in PyTorch.

    Raises:
        ValueError: it is no mapping, or something in it is no tensor.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is a {type(state_dict).__name__}; give tensors by name, module.state_dict()")
    nested: dict[Any, Any] = {}
    for name, tensor in state_dict.items():
        if not hasattr(tensor, "detach"):
            raise ValueError(f"state_dict[{name!r}] is a {type(tensor).__name__}; give a torch.Tensor")
        *parents, leaf = (int(part) if part.isdigit() else part for part in name.split("."))
        level = nested
        for part in parents:
            level = level.setdefault(part, {})
        level[leaf] = jax.dlpack.from_dlpack(tensor.detach())
    return nested
