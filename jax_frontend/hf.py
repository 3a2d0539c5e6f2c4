"""Weights of a Flax `MoE` from and to the mixture-of-experts checkpoints of Hugging Face transformers.

Only the tensors of one layer are read, and of these no more than the devices of this process hold: safetensors files
are read by slices. D = model width, H = width of an expert, E = experts.
"""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

from xmoe.dtypes import dtype_name
from xmoe.fqn import dotted
from xmoe.jax_frontend.checks import check_integers
from xmoe.jax_frontend.hf_files import DTYPES, Source, open_checkpoint

if TYPE_CHECKING:
    from xmoe.jax_frontend.moe import MoE

Layout = Literal["qwen3_moe", "mixtral", "fused"]
"""How a checkpoint names the weights of a layer (`from_hf`)."""

ROUTER, GATE, DOWN, UP = "router.weight", "experts.w1", "experts.w2", "experts.w3"
PARAMETERS = (ROUTER, GATE, DOWN, UP)
"""What a checkpoint holds of an `MoE`, by the names of its parameters."""
SHOWN = 6
"""So many names are listed in a message."""


def from_hf(
    checkpoint: str | Path | Mapping[str, Any],
    layer: int,
    *,
    layout: Layout | None = None,
    like: Any = None,
    dtype: jax.typing.DTypeLike | None = None,
    prefix: str = "model.",
) -> dict[str, dict[str, jax.Array]]:
    """The experts and the router of one layer of a checkpoint, for ``flax.nnx.update(moe, from_hf(...))``.

    Returns ``{"router": {"weight": [E, D]}, "experts": {"w1": [E, H, D], "w2": [E, D, H], "w3": [E, H, D]}}``.

    Which weights there are is all that a checkpoint's tensors say. `MoE` is given the rest: ``normalize_scores`` is
    ``norm_topk_prob`` of a Qwen3-MoE's config.json and True for Mixtral, ``top_k`` is ``num_experts_per_tok``.

    Args:
        checkpoint: a folder with ``model.safetensors``, alone or in parts with ``model.safetensors.index.json``; one of
            these files; or the tensors by name, of NumPy, JAX or PyTorch (``model.state_dict()``).
        layer: the index of the decoder layer, from 0.
        layout: None: whichever the names fit. What follows ``model.layers.{layer}.`` is, for expert j,

            - "qwen3_moe" (OLMoE too): ``mlp.gate.weight`` and ``mlp.experts.{j}.gate_proj.weight``, ``up_proj``,
              ``down_proj``;
            - "mixtral": ``block_sparse_moe.gate.weight`` and ``block_sparse_moe.experts.{j}.w1.weight``, ``w2`` and
              ``w3``;
            - "fused", how transformers 5 holds either in memory (it writes the two above): ``mlp.gate.weight``,
              ``mlp.experts.gate_up_proj`` [E, 2H, D] and ``mlp.experts.down_proj`` [E, D, H].
        like: an `MoE`, its state or its nested parameters, of arrays or of `jax.ShapeDtypeStruct`: the results get its
            dtypes and shardings, and must have its shapes. With a sharding, each device's part is read by itself.
        dtype: of the results; None: those of ``like``, or else as stored.
        prefix: what the names begin with; "model.language_model." in some multimodal models.

    Raises:
        ValueError: a file, a name or a shape is missing or wrong, or a weight is quantized; it is named with the fix.
        ImportError: files need safetensors.
    """
    if dtype is not None:
        dtype = dtype_name(dtype, accepted=tuple(DTYPES.values()))
    check_integers(layer=layer)
    source = open_checkpoint(checkpoint)
    names = _find(source, layer, layout, prefix)
    shapes, stored = _check(source, names)
    wanted = {} if like is None else _parameters(like)
    if like is not None:
        _compare(shapes, wanted, names.layout)

    nested: dict[str, dict[str, jax.Array]] = {"router": {}, "experts": {}}
    for name, shape in shapes.items():
        target = wanted.get(name)
        to = jnp.dtype(dtype if dtype is not None else stored[name] if target is None else target.dtype)
        part, leaf = name.split(".")
        nested[part][leaf] = _load(source, names, name, shape, to, getattr(target, "sharding", None))
    return nested


def to_hf(module_or_state: Any, layer: int, *, layout: Layout, prefix: str = "model.") -> dict[str, np.ndarray]:
    """The inverse of `from_hf`: the tensors of one layer by the checkpoint's names, in the dtypes of the parameters.

    They are read-only views of the parameters on the host. Models with such names have SwiGLU experts and softmax
    scores: a layer with other options has no such checkpoint.
    ``safetensors.numpy.save_file(tensors, path, {"format": "pt"})`` writes them, those of several layers in one dict
    (``|``), as a file that transformers reads.

    Args:
        module_or_state: an `MoE`, or its state or nested parameters, which say nothing of its options. Sharded ones are
            gathered: all of their devices must belong to this process.
        layer, layout, prefix: as in `from_hf`.

    Raises:
        ValueError: a parameter has no place in the layout (a shared expert, a router's bias), or one is missing, or the
            options of an `MoE` are not those of a model with this layout.
    """
    from xmoe.jax_frontend.moe import MoE, RouterBias

    if layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} is not known; give one of {_listed(get_args(Layout))}")
    check_integers(layer=layer)
    weights = _parameters(module_or_state, RouterBias)
    _refuse_others(weights, "module_or_state", layout)
    if isinstance(module_or_state, MoE):
        _check_options(module_or_state, layout)
    if missing := [name for name in PARAMETERS if name not in weights]:
        raise ValueError(f"module_or_state has no {_listed(missing)}; give an MoE, or its state or parameters")
    arrays = {name: np.asarray(jax.device_get(weights[name])) for name in PARAMETERS}
    names = _Names(layout, f"{prefix}layers.{layer}.", *arrays[GATE].shape[:2])
    if layout == "fused":
        gate_up = np.concatenate([arrays[GATE], arrays[UP]], axis=1)
        return {names.router: arrays[ROUTER], names.at(GATE).tensor: gate_up, names.at(DOWN).tensor: arrays[DOWN]}
    tensors = {names.router: arrays[ROUTER]}
    for name in (GATE, DOWN, UP):
        tensors |= {names.at(name, expert).tensor: array for expert, array in enumerate(arrays[name])}
    return tensors


# --------------------------------------------------------------------------------------------------------------- names

BLOCKS: dict[Layout, str] = {"qwen3_moe": "mlp", "mixtral": "block_sparse_moe", "fused": "mlp"}
MATRICES: dict[Layout, dict[str, str]] = {
    "qwen3_moe": {GATE: "gate_proj", DOWN: "down_proj", UP: "up_proj"},
    "mixtral": {GATE: "w1", DOWN: "w2", UP: "w3"},
    "fused": {GATE: "gate_up_proj", DOWN: "down_proj", UP: "gate_up_proj"},
}


class _Place(NamedTuple):
    """Where the matrix of an expert is: in a tensor of its own (``expert`` None), or in one of all, from ``row`` on."""

    tensor: str
    expert: int | None = None
    row: int = 0


@dataclass(frozen=True, slots=True)
class _Names:
    """A layout's names of one layer."""

    layout: Layout
    layer: str
    """What they begin with, "model.layers.3."."""
    E: int = 0
    H: int = 0

    @property
    def block(self) -> str:
        return f"{self.layer}{BLOCKS[self.layout]}."

    @property
    def router(self) -> str:
        return f"{self.block}gate.weight"

    def at(self, name: str, expert: int = 0) -> _Place:
        """``name``: of `PARAMETERS`, not the router."""
        matrix = MATRICES[self.layout][name]
        if self.layout == "fused":
            return _Place(f"{self.block}experts.{matrix}", expert, self.H if name == UP else 0)
        return _Place(f"{self.block}experts.{expert}.{matrix}.weight")


def _find(source: Source, layer: int, layout: Layout | None, prefix: str) -> _Names:
    """The names of ``layer`` with E and H. Raises ValueError if the layer is not there in that layout."""
    if layout is not None and layout not in get_args(Layout):
        raise ValueError(f"layout={layout!r} is not known; give one of {_listed(get_args(Layout))}, or None")
    names = source.names()
    for candidate in (layout,) if layout else get_args(Layout):
        found = _Names(candidate, f"{prefix}layers.{layer}.")
        first = found.at(GATE).tensor
        if first in names and found.router in names:
            E, rows = source.shape(found.router)[0], source.shape(first)[-2:][0]
            return _Names(candidate, found.layer, E, rows // 2 if candidate == "fused" else rows)
    asked = f"layout={layout!r}" if layout else f"any of the layouts {_listed(get_args(Layout))}"
    experts = sorted(name for name in names if ".experts." in name)
    there = f"its experts are {_listed(experts)}" if experts else f"it has no experts, but {_listed(sorted(names))}"
    raise ValueError(
        f"checkpoint has no experts at layer={layer} with prefix={prefix!r} in {asked}; {there}: give the layer, "
        "layout and prefix of these"
    )


def _check(source: Source, names: _Names) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes of the parameters. Raises ValueError if a tensor is missing or does not fit the others."""
    places = {name: [names.at(name, expert) for expert in range(names.E)] for name in (GATE, DOWN, UP)}
    needed = dict.fromkeys([names.router, *(place.tensor for several in places.values() for place in several)])
    there = source.names()
    if missing := [name for name in needed if name not in there]:
        raise ValueError(
            f"checkpoint lacks {len(missing)} of the {len(needed)} tensors of {names.block}: {_listed(missing)}; "
            f"{names.router} has E={names.E} rows, one for each expert. Download the checkpoint again, or "
            "give all tensors"
        )
    beyond = names.at(GATE, names.E).tensor
    if beyond not in needed and beyond in there:
        raise ValueError(f"checkpoint has {beyond}, but {names.router} has E={names.E} rows; they belong to two models")

    for tensor in needed:
        if source.dtype(tensor) not in DTYPES.values():
            raise ValueError(
                f"checkpoint has {tensor} in {source.dtype(tensor)}, which is no weight without its scales; dequantize "
                "the checkpoint to bfloat16 first, or take the one that it was made of"
            )

    D = source.shape(names.router)[-1]
    shapes = {ROUTER: (names.E, D), GATE: (names.E, names.H, D), DOWN: (names.E, D, names.H), UP: (names.E, names.H, D)}
    expected: dict[str, tuple[int, ...]] = {names.router: shapes[ROUTER]}
    for name, several in places.items():
        for place in several:
            expected[place.tensor] = shapes[name][1:] if place.expert is None else shapes[name]
    if names.layout == "fused":
        expected[names.at(GATE).tensor] = (names.E, 2 * names.H, D)
    for tensor, shape in expected.items():
        if source.shape(tensor) != shape:
            raise ValueError(
                f"checkpoint has {tensor} of shape {source.shape(tensor)}; {shape} goes with {names.router} "
                f"[{names.E}, {D}] and {names.at(GATE).tensor} {list(source.shape(names.at(GATE).tensor))}"
            )
    return shapes, {ROUTER: source.dtype(names.router)} | {n: source.dtype(p[0].tensor) for n, p in places.items()}


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


# ---------------------------------------------------------------------------------------------------------- parameters


def _parameters(module_or_state: Any, *kinds: type) -> dict[str, Any]:
    """The leaves by dotted name: of a Flax NNX module or state its `Param` and ``kinds``, of anything else all."""
    from flax import nnx

    state = module_or_state
    if isinstance(state, nnx.Module):
        state = nnx.state(state)
    if isinstance(state, nnx.State):
        state = nnx.to_pure_dict(nnx.filter_state(state, (nnx.Param, *kinds)))
    return {dotted(path): leaf for path, leaf in jax.tree.flatten_with_path(state)[0]}


def _refuse_others(weights: Mapping[str, Any], argument: str, layout: str) -> None:
    if "" in weights:
        raise ValueError(f"{argument} is a {type(weights['']).__name__}; give an MoE, or its state or parameters")
    if others := [name for name in weights if name not in PARAMETERS]:
        raise ValueError(
            f"{argument} has {_listed(others)}, which the layout {layout!r} has no names for; leave them out: give the "
            "other parameters as nested dicts"
        )


def _check_options(moe: "MoE", layout: Layout) -> None:
    """Raises ValueError for a layer that a model with this layout would not compute."""
    options = [
        ("score_function", moe.options.score_function, "softmax"),
        ("scaling_factor", moe.options.scaling_factor, 1),
        ("num_expert_groups", moe.options.num_expert_groups, None),
        ("activation", moe.experts.activation, "swiglu"),
        *([("normalize_scores", moe.options.normalize, True)] if layout == "mixtral" else ()),
    ]
    for name, value, theirs in options:
        if value != theirs:
            raise ValueError(
                f"module_or_state has {name}={value!r}, and models with the layout {layout!r} have {theirs!r}; to "
                "write its weights all the same give its parameters, nnx.state(moe, nnx.Param)"
            )


def _compare(shapes: Mapping[str, tuple[int, ...]], wanted: Mapping[str, Any], layout: str) -> None:
    """Raises ValueError if ``like`` is not of the checkpoint's shapes."""
    _refuse_others(wanted, "like", layout)
    if missing := [name for name in shapes if name not in wanted]:
        raise ValueError(f"like has no {_listed(missing)}; give an MoE with SwiGLU experts, or its state or parameters")
    E, H, D = shapes[GATE]
    for name, leaf in wanted.items():
        if tuple(leaf.shape) != shapes[name]:
            raise ValueError(
                f"like has {name} {tuple(leaf.shape)} and the checkpoint {shapes[name]}; make the layer as "
                f"MoE(dim={D}, hidden_dim={H}, num_experts={E}, ...)"
            )


def _load(
    source: Source, names: _Names, name: str, shape: tuple[int, ...], dtype: np.dtype, sharding: Any
) -> jax.Array:
    """One parameter, from no more of the checkpoint than the devices of this process hold."""

    @functools.cache  # replicas hold the same part
    def part(*bounds: tuple[int, int]) -> np.ndarray:
        (first, last), *matrix = bounds
        if name == ROUTER:
            return source.read(names.router, tuple(slice(*bound) for bound in bounds)).astype(dtype)
        out = np.empty([end - begin for begin, end in bounds], dtype)
        for row, expert in enumerate(range(first, last)):
            place = names.at(name, expert)
            rows, columns = (slice(*bound) for bound in matrix)
            index = slice(rows.start + place.row, rows.stop + place.row), columns
            out[row] = source.read(place.tensor, index if place.expert is None else (place.expert, *index))
        return out

    if sharding is None:
        return jnp.asarray(part(*((0, size) for size in shape)))

    def shard(index: Any) -> np.ndarray:
        return part(*(piece.indices(size)[:2] for piece, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, sharding, shard)
