"""Experts of an MoE layer on the devices of a mesh axis: tokens travel to their experts and back.

P devices of the axis, E experts, device p has G = E / P of them, from p * G; T tokens of a device that go to k experts
each, M = T * k slots (slot s is token s // k); D model width, H hidden width of an expert.

Exchanges, for each device:

| ``exchange`` | sends | receives | why |
|---|---|---|---|
| "ragged_all_to_all" | each slot's row to its expert's device | those rows | least traffic; TPU, GPUs of one process |
| "all_to_all" | the same, in blocks padded to M rows a peer | the same | CPU, GPUs of several processes |
| "all_gather" | its T tokens to every device | P * T tokens, then float32 sums | plain collectives; for P up to k |

With any of them the rows of an expert lie in the order of their slots, devices one after the other, which is the order
on a single device that has all tokens. So where only this axis shards tokens, outputs of the experts, their weights'
gradients and (but for "all_gather") y and the gradient of x have the bits of the single device, if its GEMM gives a row
the same bits wherever it lies. What differs, by rounding alone: "all_gather" adds a token's k rows in another order,
and the gradient of x in the dtype of x. With data axes the gradients of weights are sums over shards, each quantized
along its own tokens. With a tensor axis the scales of what runs along H (the hidden rows, dy w2^T, w2 along H) belong
to a shard of H: in the MX and block-wise formats they are those of the single device where H / shards is a multiple of
the block; in ``fp8_rowwise`` a row has one scale a shard, which is finer than one.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe.fqn import dotted
from xmoe.jax_frontend.checks import check_arrays, is_number
from xmoe.jax_frontend.exchange import Axis, Collective, slices
from xmoe.jax_frontend.exchange import exchange as exchange_rows
from xmoe.jax_frontend.experts import swiglu_experts
from xmoe.jax_frontend.permute import combine, permute_tokens, take
from xmoe.jax_frontend.plan import platform
from xmoe.jax_frontend.varying import vary_over, varying_axes
from xmoe.operands import FEATURE_MULTIPLE

Exchange = Literal["ragged_all_to_all", "all_to_all", "all_gather"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)

Experts = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]
"""(rows, group_sizes, order) -> rows sorted by expert, with the meanings of `swiglu_experts`; ``order`` may be None."""


class Applied(NamedTuple):
    """What `parallel_experts` gives."""

    y: jax.Array
    """float32 [T, D]: for each token the sum of its experts' rows times their scores."""
    dropped: jax.Array
    """float32 []: the fraction of this device's slots that found no room; always 0 without ``capacity``."""


def parallel_experts(
    experts: Experts,
    x: jax.Array,
    chosen: jax.Array,
    scores: jax.Array,
    *,
    num_experts: int,
    axis: Axis,
    tensor_axis: Axis | None = None,
    exchange: Exchange | None = None,
    capacity: float | None = None,
) -> Applied:
    """The experts of an MoE layer, from routed tokens to their weighted sums; inside `jax.shard_map`, differentiable.

    Args:
        experts: this device's G experts. Rows past the sum of ``group_sizes`` have to come out as zeros, as they do of
            `swiglu_experts` and `ragged_dot`.
        x: [T, D], this device's tokens; every device of ``axis`` has its own, T of them.
        chosen: [T, k], of any integer dtype, the experts of each token; ids outside of 0 .. E-1 go nowhere.
        scores: float32 [T, k], their weights.
        num_experts: E, a multiple of P.
        axis: the mesh axis (or axes) that experts and tokens are sharded over.
        tensor_axis: the axis that H is sharded over, whose devices have the same tokens: y is summed over it.
        exchange: see the module; None: "ragged_all_to_all" on TPUs, and on GPUs where there is one process only, else
            "all_to_all". (Between GPUs of several processes XLA refuses the ragged one.)
        capacity: the rows that a device has room for, as a multiple of M, which is a balanced load. None: P, the worst
            case, so that nothing is ever dropped. Where more rows come, every expert of every sender loses the same
            share of them, its last tokens first; a slot without room adds nothing to y. Which are lost is the same
            with every exchange. "all_gather" and "all_to_all" have worst-case buffers besides, for the exchange alone.

    Raises:
        ValueError: at trace time, naming the argument, its value and the fix.
    """
    method = _method(exchange)
    _check_tokens(x, chosen, scores)
    try:
        devices = jax.lax.axis_size(axis)
    except NameError:
        raise ValueError(
            f"axis={axis!r} is no axis of a jax.shard_map around this call; put one there, or use ExpertParallel"
        ) from None
    if num_experts <= 0 or num_experts % devices:
        raise ValueError(f"num_experts={num_experts} is not a positive multiple of the {devices} devices of {axis!r}")
    _check_capacity(capacity)
    slots = chosen.size
    room = devices * slots if capacity is None else min(devices * slots, math.ceil(capacity * slots))

    if tensor_axis is not None:  # here, so that gradients are summed over it by token, and not by row
        x, chosen, scores = (_vary_over(tensor_axis, a) for a in (x, chosen, scores))
    is_one = (chosen >= 0) & (chosen < num_experts)
    asked = jnp.where(is_one, chosen, num_experts).astype(jnp.int32).reshape(-1)
    counts = jax.lax.all_gather(_count(asked, num_experts), axis)  # [P, E]
    chosen, counts = (asked, counts) if room == devices * slots else _cut(asked, counts, room, axis)
    dropped = ((asked < num_experts) & (chosen == num_experts)).sum() / jnp.float32(max(1, slots))

    routed = _Routed(x, chosen, scores, counts.reshape(devices, devices, -1), room, axis)
    y = _by_all_gather(experts, routed) if method == "all_gather" else _by_all_to_all(experts, routed, method)
    if tensor_axis is not None:
        y, dropped = jax.lax.psum(y, tensor_axis), jax.lax.pmean(dropped, tensor_axis)
    return Applied(y, dropped)


class _Routed(NamedTuple):
    """This device's tokens, and where they and those of the others go."""

    x: jax.Array
    """[T, D]."""
    chosen: jax.Array
    """int32 [M]: the expert of each slot, E of one that goes nowhere."""
    scores: jax.Array
    """float32 [T, k]."""
    counts: jax.Array
    """int32 [P, P, G], sender, receiver and its experts: the slots that go there. The same on every device."""
    room: int
    """The rows that a device has room for."""
    axis: Axis


def _by_all_to_all(experts: Experts, routed: _Routed, collective: Collective) -> jax.Array:
    x, chosen, scores, counts, room, axis = routed
    order = jnp.argsort(chosen, stable=True)  # by expert, so by device; those that go nowhere last
    outgoing, incoming = slices(counts.sum(axis=2), axis)
    rows = permute_tokens(x, order)
    rows = exchange_rows(rows, room, outgoing, incoming, axis=axis, collective=collective)

    mine = counts[:, jax.lax.axis_index(axis)]  # [sender, expert]: rows arrive in this order
    place, by_expert = _transposition(mine, room)
    out = experts(rows, mine.sum(axis=0), by_expert)
    out = take(1, out, place, by_expert)  # as they came
    out = exchange_rows(out, chosen.size, incoming, outgoing, axis=axis, collective=collective)
    return combine(out, scores, order)


def _by_all_gather(experts: Experts, routed: _Routed) -> jax.Array:
    x, chosen, scores, counts, room, axis = routed
    me, local = jax.lax.axis_index(axis), counts.shape[2]
    x, chosen, scores = (jax.lax.all_gather(a, axis, tiled=True) for a in (x, chosen, scores))
    owner = chosen - me * local
    order = jnp.argsort(jnp.where((owner >= 0) & (owner < local), owner, local), stable=True)
    sizes = counts[:, me].sum(axis=0)
    if room == chosen.size:
        out = experts(x, sizes, order)
    else:
        out = experts(permute_tokens(x, order)[:room], sizes, None)
        out = jnp.pad(out, ((0, chosen.size - room), (0, 0)))
    return jax.lax.psum_scatter(combine(out, scores, order), axis, tiled=True)


def _count(chosen: jax.Array, num_experts: int) -> jax.Array:
    """int32 [E]: the slots of each expert."""
    return (chosen[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)


def _transposition(counts: jax.Array, rows: int) -> tuple[jax.Array, jax.Array]:
    """``(place, order)`` int32 [rows], each the inverse of the other, where ``counts`` [senders, G] rows come by sender
    and expert and are wanted by expert and sender: row r goes to ``place[r]``, and rows past the last one stay.

    What a stable sort by expert would give, from the few ends of segments.
    """

    def ends(counts: jax.Array) -> jax.Array:
        return jnp.cumsum(counts.reshape(-1), dtype=jnp.int32)

    come, wanted = ends(counts), ends(counts.T)
    shift = wanted.reshape(counts.T.shape).T.reshape(-1) - come  # of each segment that comes
    back = -shift.reshape(counts.shape).T.reshape(-1)
    row = jnp.arange(rows, dtype=jnp.int32)

    def moved(ends: jax.Array, shift: jax.Array) -> jax.Array:
        segment = jnp.searchsorted(ends, row, side="right", method="scan_unrolled")
        return row + jnp.where(segment < ends.size, shift[jnp.minimum(segment, ends.size - 1)], 0)

    return moved(come, shift), moved(wanted, back)


def _cut(chosen: jax.Array, counts: jax.Array, room: int, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """``chosen`` [M] with E in place of what has no room, and ``counts`` [P, E] of the slots that have."""
    devices, num_experts = counts.shape
    asked = counts.reshape(devices, devices, -1).swapaxes(0, 1).reshape(devices, -1)  # [receiver, sender and expert]
    ends = jnp.cumsum(asked, axis=1, dtype=jnp.int32)
    total = ends[:, -1:]
    # Shrunk ends never decrease nor pass `room`, however they are rounded: no buffer can overflow.
    shrunk = jnp.minimum((ends * (room / jnp.maximum(total, 1).astype(jnp.float32))).astype(jnp.int32), room)
    shrunk = jnp.where(total > room, shrunk, ends)
    given = jnp.minimum(jnp.diff(shrunk, axis=1, prepend=0), asked)
    given = given.reshape(devices, devices, -1).swapaxes(0, 1).reshape(devices, num_experts)

    me = jax.lax.axis_index(axis)
    order = jnp.argsort(chosen, stable=True)
    begins = jnp.cumsum(counts[me]) - counts[me]
    nobody = chosen == num_experts
    expert = jnp.where(nobody, 0, chosen)
    rank = jnp.argsort(order) - begins[expert]  # of a slot among its expert's
    return jnp.where(nobody | (rank >= given[me][expert]), num_experts, chosen), given


# ---------------------------------------------------------------------------------------------------------- on a mesh


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """How a layer's experts and tokens lie on ``mesh``: hashable, so a static argument or attribute.

    Tokens are sharded over ``data_axes`` and ``axis``, experts over ``axis``, H over ``tensor_axis``.

    Args:
        mesh: of all devices that compute the layer.
        axis: the axis of the experts.
        data_axes: axes that only tokens are sharded over, one name or several, as in a `jax.sharding.PartitionSpec`;
            it becomes a tuple. None: all that are neither of the others.
        tensor_axis: the axis that H is sharded over; None: it is not.
        exchange, capacity: as in `parallel_experts`.
        check_vma: of `jax.shard_map`.

    Raises:
        ValueError: an argument does not fit; it is named with its value and the fix.
    """

    mesh: Mesh
    axis: str = "expert"
    data_axes: str | tuple[str, ...] | None = None
    tensor_axis: str | None = None
    exchange: Exchange | None = None
    capacity: float | None = None
    check_vma: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh | AbstractMesh):
            raise ValueError(f"mesh is {self.mesh!r}; give a jax.sharding.Mesh, such as that of jax.make_mesh")
        names = self.mesh.axis_names
        if self.data_axes is not None:
            several = (self.data_axes,) if isinstance(self.data_axes, str) else tuple(self.data_axes)
            object.__setattr__(self, "data_axes", several)
        tensor_axes = () if self.tensor_axis is None else (self.tensor_axis,)
        for argument, axes in (
            ("axis", (self.axis,)),
            ("tensor_axis", tensor_axes),
            ("data_axes", self.data_axes or ()),
        ):
            for name in axes:
                if not isinstance(name, str):
                    raise ValueError(f"{argument}={getattr(self, argument)!r}: {name!r} is not the name of one axis")
                if name not in names:
                    raise ValueError(f"{argument}={getattr(self, argument)!r} is not of the mesh; its axes are {names}")
        if len({*self.token_axes, self.tensor_axis}) != len(self.token_axes) + 1:
            raise ValueError(
                f"axis={self.axis!r}, data_axes={self.data_axes} and tensor_axis={self.tensor_axis!r} share an axis; "
                "give each axis one of these parts"
            )
        method = _method(self.exchange)
        if method == "ragged_all_to_all" and platform() == "gpu" and _is_between_processes(self.mesh, self.axis):
            raise ValueError(
                f"exchange={method!r} moves rows between the GPUs of one process, and those of axis={self.axis!r} "
                "belong to several; use 'all_to_all' or None"
            )
        _check_capacity(self.capacity)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The axes that tokens are sharded over, outermost first."""
        data = self.data_axes
        if data is None:
            data = tuple(name for name in self.mesh.axis_names if name not in (self.axis, self.tensor_axis))
        return (*data, self.axis)

    def spec(self, name: str, layers: int = 0) -> P:
        """Of the weight called ``name``: "w2" is [E, D, H], all others ("w1", "w3") are [E, H, D]. Before these come
        ``layers`` axes, not sharded, where layers are stacked."""
        own = (self.axis, None, self.tensor_axis) if name == "w2" else (self.axis, self.tensor_axis)
        return P(*(None,) * layers, *own)

    def check_weight(self, name: str, shape: tuple[int, ...]) -> None:
        """Raises ValueError if the mesh does not divide a weight of ``shape``, [..., E, H, D] or [..., E, D, H]."""
        if len(shape) < 3:
            raise ValueError(f"{name} has shape {shape}; give the weights of all experts, three axes")
        E, H = shape[-3], shape[-1 if name.endswith("w2") else -2]
        for letter, size, axis, multiple in (("E", E, self.axis, 1), ("H", H, self.tensor_axis, FEATURE_MULTIPLE)):
            if axis is None:
                continue
            devices = self.mesh.shape[axis]
            if size % (devices * multiple):
                each = f", {multiple} for each of them" if multiple > 1 else ""
                raise ValueError(
                    f"{name} has shape {shape}: {letter}={size} is not a multiple of {devices * multiple}, for the "
                    f"{devices} devices of {axis!r}{each}; use fewer devices, or another {letter}"
                )

    def apply(
        self,
        experts: Callable[[Any, jax.Array, jax.Array, jax.Array | None], jax.Array],
        weights: dict[str, jax.Array],
        x: jax.Array,
        chosen: jax.Array,
        scores: jax.Array,
    ) -> Applied:
        """`parallel_experts` on whole arrays: x [T, D] of all tokens, ``weights`` of all E experts, by name.

        ``experts`` takes a device's share of ``weights`` and what `Experts` take. ``dropped`` is that of all slots.
        """
        _check_tokens(x, chosen, scores)
        shards = math.prod(self.mesh.shape[name] for name in self.token_axes)
        if x.shape[0] % shards:
            raise ValueError(
                f"x has T={x.shape[0]} tokens, which {self.token_axes} do not divide into {shards}; pad the batch"
            )
        specs = {name: self.spec(name) for name in weights}
        for name, weight in weights.items():
            self.check_weight(name, weight.shape)
        E, *others = {weight.shape[0] for weight in weights.values()}
        if others:
            raise ValueError(f"weights are of {E} and of {others[0]} experts; give all of them the same E")

        def local(weights: Any, x: jax.Array, chosen: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Here, so that gradients are summed over shards in the weights' own dtype.
            weights = jax.tree.map(functools.partial(_vary_over, self.token_axes), weights)
            applied = parallel_experts(
                lambda rows, sizes, order: experts(weights, rows, sizes, order),
                x, chosen, scores, num_experts=E, axis=self.axis, tensor_axis=self.tensor_axis,
                exchange=self.exchange, capacity=self.capacity,
            )  # fmt: skip
            return applied.y, jax.lax.pmean(applied.dropped, self.token_axes)

        tokens = P(self.token_axes)
        mapped = jax.shard_map(
            local, mesh=self.mesh, in_specs=(specs, tokens, tokens, tokens), out_specs=(tokens, P()),
            check_vma=self.check_vma,
        )  # fmt: skip
        # Where nobody else compiles it, it is compiled here as one program: alone, `shard_map` compiles each operation.
        return Applied(*jax.jit(mapped)(weights, x, chosen, scores))

    def swiglu_experts(
        self,
        x: jax.Array,
        chosen: jax.Array,
        scores: jax.Array,
        w1: jax.Array,
        w2: jax.Array,
        w3: jax.Array,
        *,
        config: Any = None,
        implementation: Literal["bridge", "jax"] | None = None,
    ) -> Applied:
        """`apply` with SwiGLU experts, w1 and w3 [E, H, D], w2 [E, D, H]; the rest as in `xmoe`'s op of that name."""

        def experts(w: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, order: jax.Array | None) -> jax.Array:
            return swiglu_experts(
                rows, w["w1"], w["w2"], w["w3"], sizes, config=config, order=order, implementation=implementation
            )

        return self.apply(experts, {"w1": w1, "w2": w2, "w3": w3}, x, chosen, scores)


def expert_parallel(moe: Any, mesh: Mesh, axis: str = "expert", **options: Any) -> Any:
    """The NNX `MoE` ``moe``, converted in place to run on ``mesh``, with its experts sharded over ``axis``. The router,
    and what else it has, runs under XLA's automatic sharding.

    Names, shapes and gradients of its parameters stay as they are; they are put on the mesh here, the experts' sharded
    and all others replicated, so make the optimizer afterwards. Give it tokens sharded over ``token_axes`` of its
    attribute ``parallel``, and call it under `jax.jit` or `flax.nnx.jit`. ``moe.parallel = None`` undoes it.

    Args:
        moe: a `xmoe.jax_frontend.MoE`; also several, stacked by `flax.nnx.vmap` for `flax.nnx.scan`.
        mesh, axis, options: of `ExpertParallel`.

    Raises:
        ValueError: an argument does not fit; it is named with its value and the fix.
    """
    from flax import linen, nnx

    from xmoe.jax_frontend.moe import MoE

    if isinstance(moe, linen.Module):
        raise ValueError(
            f"moe is the Linen module {type(moe).__name__}, whose variables are not in it; make its layers as "
            "linen.MoE(..., parallel=ExpertParallel(mesh=mesh))"
        )
    if not isinstance(moe, MoE):
        modules = nnx.iter_modules(moe) if isinstance(moe, nnx.Module) else ()
        inside = [dotted(path) for path, module in modules if isinstance(module, MoE)]
        found = f"; give each of its MoE layers: {', '.join(inside)}" if inside else " and has none in it; give one"
        raise ValueError(f"moe is a {type(moe).__name__}, which is no xmoe.jax_frontend.MoE{found}")
    if not isinstance(mesh, Mesh):
        raise ValueError(f"mesh is {mesh!r}; give a jax.sharding.Mesh, such as that of jax.make_mesh")
    parallel = ExpertParallel(mesh=mesh, axis=axis, **options)
    check_automatic(mesh)
    for path, variable in nnx.to_flat_state(nnx.state(moe)):
        spec = P()
        if path[0] == "experts":
            parallel.check_weight(dotted(path), variable.shape)
            spec = parallel.spec(str(path[-1]), layers=variable.ndim - 3)
        variable.set_value(jax.device_put(variable[...], NamedSharding(mesh, spec)))
    moe.parallel = parallel
    return moe


# -------------------------------------------------------------------------------------------------------------- checks


def _method(exchange: str | None) -> Exchange:
    if exchange is None:
        ragged = platform() == "tpu" or (platform() == "gpu" and jax.process_count() == 1)
        return "ragged_all_to_all" if ragged else "all_to_all"
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange={exchange!r} is not known; use one of {', '.join(EXCHANGES)}, or None")
    if exchange == "ragged_all_to_all" and platform() == "cpu":
        raise ValueError(f"exchange={exchange!r} has no implementation on a CPU in XLA; use 'all_to_all' or None")
    return exchange


def _is_between_processes(mesh: Mesh | AbstractMesh, axis: str) -> bool:
    """Whether devices of several processes share their rows along ``axis``."""
    if not isinstance(mesh, Mesh):
        return False
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), -1).reshape(-1, mesh.shape[axis])
    return any(len({device.process_index for device in row}) > 1 for row in devices)


def check_automatic(mesh: Mesh) -> None:
    """Raises ValueError for a mesh that a layer cannot run on."""
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"mesh has axis_types={mesh.axis_types}; the layer around its experts is sharded automatically: give "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto,) * n)"
        )


def _check_capacity(capacity: float | None) -> None:
    if capacity is not None and not (is_number(capacity) and 0 < capacity < math.inf):
        raise ValueError(
            f"capacity={capacity!r} is not a positive number; give a multiple of a balanced load such as 1.5, or None"
        )


def _check_tokens(x: jax.Array, chosen: jax.Array, scores: jax.Array) -> None:
    check_arrays(x=x, chosen=chosen, scores=scores)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; give the tokens, [T, D]")
    if chosen.ndim != 2 or chosen.shape[0] != x.shape[0] or chosen.shape[1] == 0:
        raise ValueError(f"chosen has shape {chosen.shape}; give [T, k], T={x.shape[0]} as x has")
    if not jnp.issubdtype(chosen.dtype, jnp.integer):
        raise ValueError(f"chosen is {chosen.dtype}; give integers, as jax.lax.top_k does")
    if scores.shape != chosen.shape:
        raise ValueError(f"scores has shape {scores.shape}; give {chosen.shape}, one for each of chosen")
    if scores.dtype != jnp.float32:
        raise ValueError(f"scores is {scores.dtype}; give scores.astype(jnp.float32)")


def _vary_over(axis: Axis, x: jax.Array) -> jax.Array:
    """x, varying over ``axis``; as it is where `shard_map` does not keep track (check_vma=False)."""
    return vary_over(varying_axes(jax.lax.axis_index(axis)), x)
