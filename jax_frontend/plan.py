"""What is static about one `ragged_dot`: its sizes, dtypes, config and implementation, checked once, at trace time."""

import functools
import logging
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType

from xmoe.config import GroupedMMConfig, KernelPreference, as_config
from xmoe.dtypes import dtype_name
from xmoe.jax_frontend.checks import check_arrays, check_booleans
from xmoe.jax_frontend.permute import slots_of_token
from xmoe.operands import FEATURE_MULTIPLE

_log = logging.getLogger(__name__)

Engine = Literal["bridge", "jax"]

DTYPES = ("bfloat16", "float32")
"""Of lhs, rhs and the output."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The static facts of one call: out [M, N] = lhs [M, K] @ rhs [G, K, N] (or [G, N, K] with ``transpose_rhs``)."""

    M: int
    N: int
    K: int
    G: int
    lhs_dtype: str
    rhs_dtype: str
    out_dtype: str
    transpose_rhs: bool
    config: GroupedMMConfig
    engine: Engine
    platform: str
    """"cpu", "gpu" or "tpu": what the trace is for."""

    @property
    def rhs_shape(self) -> tuple[int, int, int]:
        return (self.G, self.N, self.K) if self.transpose_rhs else (self.G, self.K, self.N)


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """The static facts of one `swiglu_experts`: x [M, D] (with k [M / k, D], not sorted), w1 and w3 [G, H, D], w2
    [G, D, H]."""

    M: int
    D: int
    H: int
    G: int
    x_dtype: str
    w_dtype: str
    out_dtype: str
    config: GroupedMMConfig
    engine: Engine
    platform: str
    k: int = 0

    @property
    def of_output(self) -> Plan:
        """The GEMM of h and w2."""
        return self._gemm(self.D, self.H, self.out_dtype)

    @property
    def of_input(self) -> Plan:
        """The GEMM of x and w1 or w3."""
        return self._gemm(self.H, self.D, self.x_dtype)

    def _gemm(self, N: int, K: int, out_dtype: str) -> Plan:
        return Plan(
            self.M, N, K, self.G, self.x_dtype, self.w_dtype, out_dtype, True, self.config, self.engine, self.platform
        )


def platform() -> str:
    """Of the device that a trace is for: "cpu", "gpu" or "tpu"; that is `jax.default_device`, as far as it is set."""
    config: Any = jax.config
    device = config.jax_default_device
    name = jax.default_backend() if device is None else getattr(device, "platform", device)
    return "gpu" if name in ("cuda", "gpu") else name


def make_plan(
    lhs: jax.Array,
    rhs: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: Any,
    config: Any,
    transpose_rhs: bool,
    implementation: str | None,
    group_offset: jax.Array | None = None,
) -> Plan:
    """Checks a call. Raises ValueError naming the argument, its value and the fix."""
    config = as_config(config)
    check_arrays(lhs=lhs, rhs=rhs, group_sizes=group_sizes)
    check_booleans(transpose_rhs=transpose_rhs)
    if lhs.ndim != 2:
        raise ValueError(f"lhs has shape {lhs.shape}; give [M, K], with leading axes flattened by reshape(-1, K)")
    if rhs.ndim != 3 or rhs.shape[0] == 0:
        raise ValueError(f"rhs has shape {rhs.shape}; give [G, K, N], or [G, N, K] with transpose_rhs=True")
    G, K, N = (rhs.shape[0], rhs.shape[2], rhs.shape[1]) if transpose_rhs else rhs.shape
    M = lhs.shape[0]
    if lhs.shape[1] != K:
        layout = "[G, N, K]" if transpose_rhs else "[G, K, N]"
        raise ValueError(
            f"lhs has K={lhs.shape[1]} columns (shape {lhs.shape}) and rhs, as {layout}, K={K} (shape {rhs.shape}); "
            f"give equal K, or transpose_rhs={not transpose_rhs}"
        )
    _check_features(f"of rhs (shape {rhs.shape}) ", K=K, N=N)
    _check_sizes(group_sizes, G, "group of rhs", group_offset)
    lhs_dtype, rhs_dtype = dtype_name(lhs.dtype, "lhs.dtype", DTYPES), dtype_name(rhs.dtype, "rhs.dtype", DTYPES)
    if preferred_element_type is not None:
        out_dtype = dtype_name(preferred_element_type, "preferred_element_type", DTYPES)
    else:
        out_dtype = dtype_name(config.out_dtype or lhs_dtype, "config.out_dtype", DTYPES)
    where = platform()
    engine = _engine(config, implementation, where, lhs=lhs, rhs=rhs, group_sizes=group_sizes)
    return Plan(M, N, K, G, lhs_dtype, rhs_dtype, out_dtype, bool(transpose_rhs), config, engine, where)


def make_wgrad_plan(
    lhs: jax.Array,
    dout: jax.Array,
    group_sizes: jax.Array,
    preferred_element_type: Any,
    config: Any,
    transpose_rhs: bool,
    implementation: str | None,
) -> Plan:
    """Checks a call of `ragged_dot_wgrad`; the plan is that of the `ragged_dot` whose weight gradient it is. Raises
    ValueError naming the argument, its value and the fix."""
    config = as_config(config)
    check_arrays(lhs=lhs, dout=dout, group_sizes=group_sizes)
    check_booleans(transpose_rhs=transpose_rhs)
    for name, array, shape in (("lhs", lhs, "[M, K]"), ("dout", dout, "[M, N]")):
        if array.ndim != 2:
            raise ValueError(f"{name} has shape {array.shape}; give {shape}, with leading axes flattened by reshape")
    if lhs.shape[0] != dout.shape[0]:
        raise ValueError(f"lhs has shape {lhs.shape} and dout {dout.shape}; give the same M rows of both")
    (M, K), N = lhs.shape, dout.shape[1]
    _check_features("", K=K, N=N)
    if group_sizes.ndim != 1 or group_sizes.shape[0] == 0:
        raise ValueError(f"group_sizes has shape {group_sizes.shape}; give [G], one size for each group of rows")
    _check_sizes(group_sizes, group_sizes.shape[0], "group of rows")
    lhs_dtype, dout_dtype = dtype_name(lhs.dtype, "lhs.dtype", DTYPES), dtype_name(dout.dtype, "dout.dtype", DTYPES)
    rhs_dtype = dtype_name(preferred_element_type or lhs_dtype, "preferred_element_type", DTYPES)
    where, G = platform(), group_sizes.shape[0]
    engine = _engine(config, implementation, where, lhs=lhs, dout=dout, group_sizes=group_sizes)
    return Plan(M, N, K, G, lhs_dtype, rhs_dtype, dout_dtype, bool(transpose_rhs), config, engine, where)


def make_experts_plan(
    x: jax.Array,
    w1: jax.Array,
    w2: jax.Array,
    w3: jax.Array,
    group_sizes: jax.Array,
    config: Any,
    implementation: str | None,
    order: jax.Array | None = None,
) -> ExpertsPlan:
    """Checks a call. Raises ValueError naming the argument, its value and the fix."""
    config = as_config(config)
    arrays: dict[str, Any] = {"x": x, "w1": w1, "w2": w2, "w3": w3, "group_sizes": group_sizes}
    arrays |= {} if order is None else {"order": order}
    check_arrays(**arrays)
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; give [M, D], with leading axes flattened by reshape(-1, D)")
    if w1.ndim != 3 or w1.shape[0] == 0:
        raise ValueError(f"w1 has shape {w1.shape}; give [G, H, D] with at least one expert")
    G, H, D = w1.shape
    if x.shape[1] != D:
        raise ValueError(
            f"x has D={x.shape[1]} columns (shape {x.shape}) and w1 D={D} (shape {w1.shape}); give equal D"
        )
    for name, w, shape in (("w3", w3, (G, H, D)), ("w2", w2, (G, D, H))):
        if w.shape != shape:
            raise ValueError(f"{name} has shape {w.shape}; give {shape}, to go with w1 {w1.shape}")
        if w.dtype != w1.dtype:
            raise ValueError(f"{name} is {w.dtype} and w1 {w1.dtype}; cast them to one dtype")
    _check_features("", D=D, H=H)
    _check_sizes(group_sizes, G, "expert")
    x_dtype, w_dtype = dtype_name(x.dtype, "x.dtype", DTYPES), dtype_name(w1.dtype, "w1.dtype", DTYPES)
    out_dtype = dtype_name(config.out_dtype or x_dtype, "config.out_dtype", DTYPES)
    where = platform()
    engine = _engine(config, implementation, where, **arrays)
    k = 0 if order is None else slots_of_token(x, order)
    M = k * x.shape[0] if k else x.shape[0]
    return ExpertsPlan(M, D, H, G, x_dtype, w_dtype, out_dtype, config, engine, where, k)


def _check_features(where: str, **sizes: int) -> None:
    for name, size in sizes.items():
        if size == 0 or size % FEATURE_MULTIPLE:
            raise ValueError(
                f"{name}={size} {where}is not a positive multiple of {FEATURE_MULTIPLE}; pad it with zeros"
            )


def _check_sizes(group_sizes: jax.Array, G: int, of: str, group_offset: jax.Array | None = None) -> None:
    if group_offset is not None:
        check_arrays(group_offset=group_offset)
        if group_offset.shape not in ((), (1,)) or not jnp.issubdtype(group_offset.dtype, jnp.integer):
            raise ValueError(
                f"group_offset is {group_offset.dtype} of shape {group_offset.shape}; give one integer, shape (1,)"
            )
        if group_sizes.ndim != 1 or group_sizes.shape[0] < G:
            raise ValueError(
                f"group_sizes has shape {group_sizes.shape}; with group_offset give the sizes of all groups, of which "
                f"rhs holds {G}"
            )
        _check_offset(group_offset, group_sizes.shape[0] - G)
    elif group_sizes.shape != (G,):
        raise ValueError(f"group_sizes has shape {group_sizes.shape}; give ({G},), one size for each {of}")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes is {group_sizes.dtype}; give group_sizes.astype(jnp.int32)")


def _check_offset(group_offset: jax.Array, most: int) -> None:
    """Raises ValueError for an offset whose value is known, and not 0 to ``most``."""
    if isinstance(group_offset, Tracer) or not getattr(group_offset, "is_fully_addressable", True):
        return
    if not 0 <= (first := int(np.asarray(group_offset).reshape(()))) <= most:
        raise ValueError(
            f"group_offset={first} is out of range; give 0 to {most}, which is the groups of group_sizes less those of "
            "rhs"
        )


def _engine(config: GroupedMMConfig, implementation: str | None, where: str, **operands: jax.Array) -> Engine:
    """Whose kernels run. Raises ValueError where these cannot, or cannot on ``operands``."""
    engine = _engine_on(config, implementation, where)
    check_placement(engine, **operands)
    return engine


def check_placement(engine: Engine, **operands: jax.Array) -> None:
    """Raises ValueError for an operand that automatic sharding splits, or, on the bridge, may split: XLA's partitioner
    knows nothing of a callback, gathers whole operands on every device, and has each do all of the work. And for one on
    a mesh with Explicit axes, where plain JAX would have to say how each intermediate result is sharded.

    What a trace shows is an operand's mesh, with the kind of its axes: Explicit ones with what they split, Auto ones
    without. Not seen: arrays that come without a mesh, and are given one later, by ``in_shardings`` or a constraint.
    """
    around = jax.sharding.get_abstract_mesh()
    for name, array in operands.items():
        sharding: Any = getattr(jax.typeof(array), "sharding", None)
        meshes = [around] if sharding is None else [sharding.mesh, around]
        split = [] if sharding is None else [
            axis for part in sharding.spec for axis in (part if isinstance(part, tuple) else (part,))
        ]  # fmt: skip
        auto = [axis for mesh in meshes for axis in _axes(mesh, AxisType.Auto)] if engine == "bridge" else []
        explicit = [axis for mesh in meshes for axis in _axes(mesh, AxisType.Explicit)]
        if engine == "bridge":
            explicit = [axis for axis in explicit if axis in split]
        automatic = "make the mesh with axis_types=(jax.sharding.AxisType.Auto,) * n, or " if engine == "jax" else ""
        for kind, axes, instead in (
            ("Explicit", explicit, automatic), ("Auto", auto, "use implementation='jax', or "),
        ):  # fmt: skip
            if axes:
                raise ValueError(
                    f"{name} is on a mesh with {kind} axes: {', '.join(map(repr, dict.fromkeys(axes)))}; xmoe works on "
                    f"what is local: {instead}call it inside jax.shard_map over all axes of the mesh (in_specs=P() for "
                    "what every device holds)"
                )


def _axes(mesh: Any, kind: AxisType) -> list[str]:
    """The axes of ``mesh``, of one kind, that have more than one device."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return [axis for axis, its_kind in kinds if its_kind is kind and mesh.shape[axis] > 1]


def _engine_on(config: GroupedMMConfig, implementation: str | None, where: str) -> Engine:
    preference = config.kernel_preference
    if implementation not in (None, "bridge", "jax"):
        raise ValueError(f"implementation={implementation!r} is not known; use 'bridge', 'jax' or None (by the device)")
    named = preference in (KernelPreference.TRITON, KernelPreference.TORCH)
    if named and (where != "gpu" or implementation == "jax"):
        on_jax = implementation == "jax"
        reason = "implementation='jax' has none" if on_jax else f"JAX's default device is a {where.upper()}"
        raise ValueError(
            f"kernel_preference={preference} asks for GPU kernels, but {reason}; use kernel_preference=auto or emulated"
        )
    if implementation == "bridge" and where not in ("cpu", "gpu"):
        raise ValueError(f"implementation='bridge' runs on GPU and CPU, not on {where}; use implementation='jax'")
    if implementation is None and (where != "gpu" or preference is KernelPreference.EMULATED):
        implementation = "jax"
    if implementation == "jax":
        return "jax"
    from xmoe.jax_frontend import bridge

    if obstacle := bridge.obstacle(where):
        if implementation is None and not named:
            _warn_once(f"xmoe runs in plain JAX, far slower than xmoe's kernels: {obstacle}")
            return "jax"
        asked, other = f"kernel_preference={preference}", "kernel_preference=auto"
        if not named:
            asked, other = "implementation='bridge'", "implementation='jax'"
        raise ValueError(f"{asked} needs torch on the GPU, but {obstacle}, or use {other}")
    if (reason := bridge.without_kernels(config, where)) and implementation is None:
        _warn_once(f"xmoe runs in plain JAX, far slower than xmoe's kernels: {reason}")
        return "jax"
    return "bridge"


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)
