"""How one array differs from another, down to the byte: arrays of NumPy, PyTorch or JAX; numpy alone is imported."""

import math
import sys
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from xmoe import oracle


def as_numpy(x: Any) -> NDArray[Any]:
    """A NumPy, PyTorch or JAX array (of any device) as a NumPy array of the same dtype and bytes.

    bfloat16 and the 8-bit floats get the dtypes of ml_dtypes.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return np.asarray(x)
    name = str(x.dtype).removeprefix("torch.")
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    return x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().view(dtype).reshape(tuple(x.shape))


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one array differs from another of its shape."""

    equal: bool
    """One dtype and the same bytes."""
    different: int
    """Elements that differ: in their bytes, or, between dtypes, in their values."""
    size: int
    sqnr_db: float
    """Of the finite elements, the first array as the reference: inf where they are equal, -inf where a NaN or Inf
    stands in one array and not in the other."""
    worst: tuple[int, ...] | None = None
    """The element that differs most: NaN or Inf against a number first; None where nothing differs."""
    values: tuple[float, float] | None = None
    """Its two values."""
    bytes: tuple[str, str] | None = None
    """Its bytes in hexadecimal, the most significant first, as a debugger would show the number."""

    def __str__(self) -> str:
        if self.worst is None:
            return f"equal, {self.size} elements" if self.equal else "equal values of different dtypes"
        assert self.values is not None, "there is a worst element"
        assert self.bytes is not None, "there is a worst element"
        (a, b), (a_bytes, b_bytes) = self.values, self.bytes
        at = f"[{', '.join(map(str, self.worst))}]"
        return (
            f"{self.different} of {self.size} elements differ, {self.sqnr_db:.1f} dB; "
            f"worst {at}: {a:.9g} (0x{a_bytes}) and {b:.9g} (0x{b_bytes})"
        )


def compare(a: Any, b: Any, *, any_nan: bool = False) -> Comparison:
    """Compare two arrays of one shape; ``a`` is the reference of the SQNR. Nothing is asserted.

    Args:
        a, b: NumPy, PyTorch or JAX arrays.
        any_nan: a NaN equals any NaN. The bits of a computed NaN are nobody's promise; those of quantized operands are.

    Raises:
        ValueError: the shapes differ.
    """
    a, b = as_numpy(a), as_numpy(b)
    if a.shape != b.shape:
        raise ValueError(f"b has shape {b.shape} and a {a.shape}; give arrays of one shape")
    a64, b64 = _float64(a), _float64(b)
    both_nan = np.isnan(a64) & np.isnan(b64)
    same_value = (a64 == b64) | both_nan
    if a.dtype == b.dtype:
        differs = (_bytes(a) != _bytes(b)).any(-1)
        if any_nan:
            differs &= ~both_nan
    else:
        differs = ~same_value
    different = int(differs.sum())
    sqnr = _sqnr(a64, b64, same_value)
    if not different:
        return Comparison(a.dtype == b.dtype, 0, a.size, sqnr)
    worst = _worst(a64, b64, differs, same_value)
    values = float(a64[worst]), float(b64[worst])
    return Comparison(False, different, a.size, sqnr, worst, values, (_hex(a[worst]), _hex(b[worst])))


def _float64(x: NDArray[Any]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def _bytes(x: NDArray[Any]) -> NDArray[np.uint8]:
    """[..., itemsize]."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).reshape(*x.shape, x.dtype.itemsize)


def _hex(x: Any) -> str:
    return np.asarray(x).tobytes()[:: -1 if sys.byteorder == "little" else 1].hex()


def _sqnr(a: NDArray[np.float64], b: NDArray[np.float64], same_value: NDArray[np.bool_]) -> float:
    finite = np.isfinite(a) & np.isfinite(b)
    if not (finite | same_value).all():
        return -math.inf
    return oracle.sqnr(a[finite], b[finite])


def _worst(
    a: NDArray[np.float64], b: NDArray[np.float64], differs: NDArray[np.bool_], same_value: NDArray[np.bool_]
) -> tuple[int, ...]:
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a - b)
    distance = np.where(np.isnan(distance), np.inf, distance)  # a NaN against a number, or two infinities
    distance = np.where(same_value, 0.0, distance)  # other bytes of the same value: -0 and 0
    return tuple(int(i) for i in np.unravel_index(np.where(differs, distance, -1.0).argmax(), a.shape))
