"""The tensors of a checkpoint by name: of safetensors files, read slice by slice, or in memory."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""What safetensors calls the dtypes that weights may have."""
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Source(Protocol):
    """Tensors by name; their dtypes have NumPy's names, where NumPy has one."""

    def names(self) -> frozenset[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray: ...


def open_checkpoint(checkpoint: str | Path | Mapping[str, Any]) -> Source:
    """``checkpoint``: as in `xmoe.jax_frontend.from_hf`. Raises ValueError if there is none."""
    if isinstance(checkpoint, Mapping):
        return _Tensors(checkpoint)
    path = Path(checkpoint)
    if path.is_dir():
        path = next((path / name for name in (INDEX, WHOLE) if (path / name).is_file()), path)
    if not path.is_file() or path.suffix not in (".json", ".safetensors"):
        raise ValueError(
            f"checkpoint={str(checkpoint)!r} is no safetensors file, nor a folder with {WHOLE} or {INDEX}; give one, "
            "as model.save_pretrained writes it"
        )
    if path.suffix == ".safetensors":
        return _Files.of(path)
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        return _Files({name: path.parent / file for name, file in weight_map.items()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"checkpoint's {path} has no weight_map ({error!r}); download it again") from error


class _Tensors:
    """Those in memory, of NumPy, JAX or PyTorch."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._array = functools.lru_cache(maxsize=1)(self._to_numpy)  # all experts of a fused tensor, one by one

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> str:
        return str(self._tensors[name].dtype).removeprefix("torch.")

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        return self._array(name)[index]

    def _to_numpy(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if hasattr(tensor, "detach"):  # PyTorch's, whose bfloat16 NumPy does not take
            tensor = jax.dlpack.from_dlpack(tensor.detach())
        return np.asarray(tensor)


class _Files:
    """Those of safetensors files, which are opened (mapped into memory) when they are first needed."""

    def __init__(self, file_of: Mapping[str, Path]) -> None:
        self._file_of = file_of
        self._open = functools.cache(_open)

    @classmethod
    def of(cls, path: Path) -> "_Files":
        return cls(dict.fromkeys(_open(path).keys(), path))

    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        stored: str = self._slice(name).get_dtype()
        return DTYPES.get(stored, stored)

    def read(self, name: str, index: tuple[int | slice, ...]) -> np.ndarray:
        return self._slice(name)[index]

    def _slice(self, name: str) -> Any:
        path = self._file_of[name]
        try:
            return self._open(path).get_slice(name)
        except _safetensors().SafetensorError as error:
            raise ValueError(f"checkpoint's {path} lacks {name}, which {INDEX} says it has; download both") from error


def _open(path: Path) -> Any:
    try:
        return _safetensors().safe_open(path, framework="numpy")
    except (_safetensors().SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint's {path} cannot be read ({error}); download it again") from error


def _safetensors() -> Any:
    """safetensors, on first use."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f'from_hf needs safetensors to read files ({error}): pip install "xmoe[flax]"') from error
    return safetensors
