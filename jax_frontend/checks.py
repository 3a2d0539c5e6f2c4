"""Checks of arguments that several functions share: ValueError names the argument, its value and the fix."""

from numbers import Integral, Real
from typing import Any

import jax
import numpy as np


def check_arrays(*, variables: bool = False, **arrays: Any) -> None:
    """Refuses lists, scalars and None in place of arrays; with ``variables`` those of Flax are arrays too."""
    for name, array in arrays.items():
        if not (isinstance(array, jax.Array | np.ndarray) or (variables and hasattr(array, "__jax_array__"))):
            raise ValueError(f"{name} is a {type(array).__name__}; give an array, jnp.asarray({name})")


def check_booleans(**values: Any) -> None:
    """Refuses what is merely true or false in an ``if``, such as "no"."""
    for name, value in values.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name}={value!r} is not a boolean; use True or False")


def check_integers(**values: Any) -> None:
    """Refuses booleans, and floats whatever their value. NumPy's integers are integers."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError(f"{name}={value!r} is not an integer; give one")


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or NumPy; a boolean is none."""
    return isinstance(value, Real) and not isinstance(value, bool)
