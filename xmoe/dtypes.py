"""Framework-neutral dtype names: "bfloat16" and "float32" from strings, torch, numpy and JAX dtypes."""

from typing import Any

import numpy as np

HIGH_PRECISION = ("bfloat16", "float32")
"""The dtypes of activations, weights, gradients and outputs."""

_ALIASES = {"bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def dtype_name(dtype: Any, argument: str = "dtype", accepted: tuple[str, ...] = HIGH_PRECISION) -> str:
    """The neutral name of ``dtype``: a string, a torch dtype, or anything that ``numpy.dtype`` takes (so JAX's too).

    Raises ValueError naming ``argument``, the value and the ``accepted`` names. Imports neither torch nor jax: a torch
    dtype is recognised by its printed form, "torch.bfloat16".
    """
    text = str(dtype)
    if isinstance(dtype, str) or text.startswith("torch."):
        name = text.removeprefix("torch.")
        name = _ALIASES.get(name, name)
    else:
        try:
            name = "unknown" if dtype is None else np.dtype(dtype).name
        except TypeError:
            name = "unknown"
    if name not in accepted:
        raise ValueError(f"{argument}={dtype!r} is not supported; use one of {', '.join(accepted)}")
    return name
