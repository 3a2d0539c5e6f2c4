"""What a training run is: model, data, optimiser and the recipes to compare. One TOML file holds all of it."""

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from xmoe import toml
from xmoe.config import RECIPES, GroupedMMConfig, KernelPreference, config_from_recipe
from xmoe.train.files import UserError

FRAMEWORKS = ("torch", "flax")
VOCABULARY = 256
"""Tokens are bytes."""

_CHOICES = {
    "frameworks": FRAMEWORKS,
    "recipes": RECIPES,
    "device": ("auto", "cpu", "cuda"),
    "kernel_preference": tuple(KernelPreference),
    "compute_dtype": ("bfloat16", "float32"),
}
_MAY_BE_ZERO = {"seed", "shared_hidden_dim", "warmup_steps", "weight_decay", "load_balance", "eval_every"}
_MULTIPLES_OF_32 = ("dim", "hidden_dim", "shared_hidden_dim")
"""So that no recipe sees a short MX block, and GEMM rows are whole 16-byte words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """A training run. Raises UserError for a wrong value, naming the field, the value and what is accepted."""

    frameworks: tuple[str, ...] = ("torch",)
    recipes: tuple[str, ...] = ("bf16", "fp8_rowwise")
    """Every framework trains every recipe."""
    data: tuple[str, ...] = ()
    """Text files; none: the Python standard library's source."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""
    kernel_preference: str = "auto"
    """Of every recipe that does not name its own."""
    compute_dtype: str = "bfloat16"
    """Of activations and matmuls. Weights, norms, router, loss and optimiser state are float32."""

    layers: int = 2
    dim: int = 128
    heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    hidden_dim: int = 256
    """Of each expert."""
    shared_hidden_dim: int = 0
    """Of the expert that every token visits; 0: none."""
    seq_len: int = 128

    steps: int = 200
    batch_size: int = 8
    """Sequences in a step."""
    learning_rate: float = 3e-3
    """At its peak; a linear warm-up leads to it and a cosine leads down to a tenth of it."""
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0
    """The global gradient norm is cut to this."""
    load_balance: float = 0.01
    """Weight of the layers' mean load-balance loss."""
    seed: int = 0

    eval_every: int = 0
    """Steps between evaluations on the held-out text; 0: only at the end."""
    eval_batches: int = 8
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in _MULTIPLES_OF_32:
            if getattr(self, name) % 32:
                raise UserError(f"{name}={getattr(self, name)} is not a multiple of 32")
        if self.dim % (2 * self.heads):
            raise UserError(f"heads={self.heads} does not cut dim={self.dim} into heads of even width")
        if self.top_k > self.num_experts:
            raise UserError(f"top_k={self.top_k} is more than num_experts={self.num_experts}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise UserError(f"{name}={getattr(self, name)} must be below 1")

    def quantization(self, recipe: str) -> GroupedMMConfig:
        """The config of ``recipe``, under this run's kernel preference unless the recipe names its own."""
        config = config_from_recipe(recipe)
        if config.kernel_preference is not KernelPreference.AUTO:
            return config
        return dataclasses.replace(config, kernel_preference=KernelPreference(self.kernel_preference))

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over ``warmup_steps``, then a cosine down to a tenth of the peak at the last step."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps - 1)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, progress))))

    def differences(self, other: "TrainConfig", *, ignore: Sequence[str] = ("frameworks", "recipes")) -> list[str]:
        """The fields in which ``other`` is another experiment, as "seed 0, now 1". Two of them only choose its runs."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return [f"{name} {a}, now {b}" for name, a, b in pairs if a != b and name not in ignore]

    def to_toml(self) -> str:
        """The run as a file's text: one table, ``[train]``."""
        return toml.dumps({"train": {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """A run from its fields. Raises UserError for an unknown one, naming those there are."""
        accepted = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in accepted]
        if unknown:
            raise UserError(f"unknown key {', '.join(unknown)}; the keys are {', '.join(accepted)}")
        return cls(**fields)

    @classmethod
    def load(cls, path: Path) -> Self:
        """The run in a TOML file that holds all of its fields that differ from the defaults. Raises UserError."""
        return cls.from_dict(load_fields(path))


PRESETS: dict[str, dict[str, Any]] = {
    "small": {},
    "base": {
        "layers": 6,
        "dim": 512,
        "heads": 8,
        "hidden_dim": 768,
        "seq_len": 512,
        "steps": 500,
        "batch_size": 64,
        "learning_rate": 5e-4,
        "warmup_steps": 100,
        "eval_every": 100,
        "eval_batches": 32,
        "checkpoint_every": 250,
    },
}
""""small" is made for two CPU cores (1.8 million parameters), "base" for a GPU (63 million)."""


def load_fields(path: Path) -> dict[str, Any]:
    """The ``[train]`` table of a TOML file. Raises UserError, naming the file.

    A ``[quantize]`` table (``GroupedMMConfig.from_toml``) may stand beside it and says nothing to a training run, which
    takes its recipes by name.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}") from error
    strangers = document.keys() - {"train", "quantize"}
    if strangers or not isinstance(document.get("train"), dict):
        found = ", ".join(document) or "nothing"
        raise UserError(f"{path}: found {found}; the file must hold a table [train], and may hold a [quantize] beside")
    try:
        TrainConfig.from_dict(document["train"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return document["train"]


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """``value`` in the field's type and range, else UserError."""
    name, choices = field.name, _CHOICES.get(field.name)
    if isinstance(field.default, tuple):
        if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
            raise UserError(f'{name}={value!r} is not a list of strings; write {name} = ["...", "..."]')
        value = tuple(dict.fromkeys(value))
        if nul := [item for item in value if "\0" in item]:
            raise UserError(f"{name}: {nul[0]!r} holds a NUL character; leave it out")
        if not value and name != "data":
            raise UserError(f"{name} is empty; give one or more of {', '.join(choices or ())}")
    elif type(field.default) is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{name}={value!r} is not a number")
        value = float(value)
    elif type(value) is not type(field.default):
        kind = {int: "an integer", str: "a string"}[type(field.default)]
        raise UserError(f"{name}={value!r} is not {kind}")
    if choices:
        for item in value if isinstance(value, tuple) else (value,):
            if item not in choices:
                raise UserError(f"{name}: {item!r} is not known; use {', '.join(choices)}")
    elif isinstance(value, int | float) and (value < 0 or (value == 0 and name not in _MAY_BE_ZERO)):
        raise UserError(f"{name}={value} must be {'0 or more' if name in _MAY_BE_ZERO else 'above 0'}")
    return value
