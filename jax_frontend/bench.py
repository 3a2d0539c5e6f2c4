"""The JAX worker of ``xmoe bench``: `ragged_dot` under jit beside `jax.lax.ragged_dot` and tokamax.

M tokens, N output features, K contraction, G groups; lhs bf16 [M, K], rhs bf16 [G, K, N].
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xmoe.bench.events import Emit
from xmoe.bench.exactness import Exactness, judge, least_db
from xmoe.bench.harness import Case, NoMemory, System, Timer, run_cases
from xmoe.bench.options import Options
from xmoe.bench.report import BOTH
from xmoe.bench.results import Row
from xmoe.bench.workload import gemm_work, uneven_sizes
from xmoe.config import config_from_recipe
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.shapes import Shape

RaggedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(lhs [M, K], rhs [G, K, N], group_sizes int32 [G]) → [M, N]."""
Step = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
FLUSH_BYTES = 2**27
"""More than any GPU's L2 cache holds."""
NAMES = ("out", "dA", "dB")


def run(options: Options, emit: Emit) -> None:
    """Measure ``options`` on JAX's first GPU; without one a note says so."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        emit("note", text=f"JAX finds no GPU (its first device: {device.device_kind}), so its systems are left out.")
        return
    emit("note", text="JAX's rows: wall-clock means of calls enqueued together, less the cache flushes between them.")
    major, minor = device.compute_capability.split(".")
    measure_all(options, (int(major), int(minor)), WallTimer(), emit)


def measure_all(options: Options, capability: tuple[int, int] | None, timer: Timer, emit: Emit) -> list[Row]:
    """Every shape of ``options`` on the default device, which has ``capability`` (None: no GPU)."""
    shapes = [shape for shape in options.shapes if isinstance(shape, Shape)]
    makers = ((f"{shape.name} in JAX", functools.partial(case, options, shape, capability)) for shape in shapes)
    # XLA allocates a whole program at once: `memory_of` asks the program.
    return run_cases(makers, options.rounds, timer, NoMemory(), emit)


class WallTimer:
    """The host's clock around calls that are enqueued together; between them a write flushes the caches."""

    def __init__(self, round_ms: float = 150.0, flush_bytes: int = FLUSH_BYTES) -> None:
        """``round_ms``: about how long one timing takes (milliseconds)."""
        self._round_ms = round_ms
        self._buffer = jnp.zeros(flush_bytes, jnp.int8)
        self._touch = jax.jit(lambda x: x + 1, donate_argnums=0)

    def __call__(self, fn: Callable[[], Any]) -> float:
        estimate = self._wall(fn, 1)
        times = min(max(int(self._round_ms / max(estimate, 1e-3)), 3), 200)
        return max(self._wall(fn, times) - self._wall(lambda: None, times), 1e-6) / times

    def _wall(self, fn: Callable[[], Any], times: int) -> float:
        jax.block_until_ready(self._buffer)
        start, last = time.perf_counter(), None
        for _ in range(times):
            self._buffer = self._touch(self._buffer)
            last = fn()
        jax.block_until_ready((self._buffer, last))
        return (time.perf_counter() - start) * 1e3


def case(options: Options, shape: Shape, capability: tuple[int, int] | None) -> Case:
    """Forward and backward of every system, with both gradients."""
    sizes = uneven_sizes(shape.M, shape.G)
    group_sizes, ends = jnp.asarray(sizes), sizes.cumsum().tolist()
    keys = jax.random.split(jax.random.key(0), 3)
    dims = ((shape.M, shape.K), (shape.G, shape.K, shape.N), (shape.M, shape.N))
    lhs, rhs, dout = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, dims, strict=True))
    reference: dict[str, jax.Array] = dict(zip(NAMES, dense(lhs, rhs, dout, ends), strict=True))

    functions: dict[str, tuple[RaggedDot, str]] = {}
    missing: dict[str, str] = {}
    if "jax" in options.peers:
        functions["jax.lax.ragged_dot bf16"] = jax.lax.ragged_dot, "bf16"
    if "tokamax" in options.peers:
        try:
            functions["tokamax bf16"] = tokamax_ragged_dot(), "bf16"
        except Exception as error:  # an installation that does not fit this jax
            missing["tokamax bf16"] = f"{type(error).__name__}: {str(error)[:160]}"
    for recipe in options.recipes:
        functions[f"xmoe {recipe}, JAX"] = functools.partial(ragged_dot, config=recipe), recipe

    systems = []
    for name, (fn, recipe) in functions.items():
        program = Program(fn, (lhs, rhs, group_sizes, dout))
        least = least_db(config_from_recipe(recipe).format)
        systems.append(
            System(
                name=name,
                step=program,
                check=lambda program=program, least=least: compare(program(), reference, ends, least),
                peak=program.memory,
                work=gemm_work(recipe, shape.flops, capability),
            )
        )
    sides = {"M": shape.M, "N": shape.N, "K": shape.K, "G": shape.G}
    return Case(table=BOTH, shape=shape.name, dims=sides, tokens=shape.M, systems=systems, missing=missing)


class Program:
    """A ragged dot with its gradients as one XLA program, compiled at the first call: () → (out, dlhs, drhs).

    All three are outputs: XLA would leave out a forward that nobody asks for.
    """

    def __init__(self, fn: RaggedDot, operands: tuple[jax.Array, ...]) -> None:
        def step(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dout: jax.Array) -> Any:
            out, backward = jax.vjp(lambda lhs, rhs: fn(lhs, rhs, group_sizes).astype(dout.dtype), lhs, rhs)
            return out, *backward(dout)

        self._step, self._operands = jax.jit(step), operands
        self._compiled: Any = None

    def __call__(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        if self._compiled is None:
            self._compiled = self._step.lower(*self._operands).compile()
        return self._compiled(*self._operands)

    def memory(self) -> int | None:
        """Bytes of the outputs and of XLA's temporaries; None where XLA does not say."""
        analysis = None if self._compiled is None else self._compiled.memory_analysis()
        if analysis is None:
            return None
        return analysis.output_size_in_bytes + analysis.temp_size_in_bytes


def tokamax_ragged_dot() -> RaggedDot:
    """`tokamax.ragged_dot`, as it chooses its implementation. Raises ImportError."""
    import tokamax  # type: ignore (optional)
    from absl import flags

    if not flags.FLAGS.is_parsed():  # its options are flags, and this process has no command line for them
        flags.FLAGS.mark_as_parsed()
    return lambda lhs, rhs, group_sizes: tokamax.ragged_dot(lhs, rhs, group_sizes)


@functools.partial(jax.jit, static_argnums=3)
def _dense(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, ends: tuple[int, ...]) -> tuple[jax.Array, ...]:
    groups = list(zip([0, *ends], ends, strict=False))
    out = [lhs[start:end] @ rhs[g] for g, (start, end) in enumerate(groups)]
    dlhs = [dout[start:end] @ rhs[g].T for g, (start, end) in enumerate(groups)]
    drhs = [lhs[start:end].T @ dout[start:end] for start, end in groups]
    return jnp.concatenate(out), jnp.concatenate(dlhs), jnp.stack(drhs)


def dense(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, ends: Sequence[int]) -> tuple[jax.Array, ...]:
    """(out, dlhs, drhs) by one bf16 product for each group: what the systems are held to."""
    return _dense(lhs, rhs, dout, tuple(ends))


def compare(
    results: Sequence[jax.Array], reference: dict[str, jax.Array], ends: Sequence[int], least: float
) -> Exactness:
    """Every result against the reference, whole and by group. Raises `xmoe.bench.exactness.WrongResult`."""
    groups = list(zip([0, *ends], ends, strict=False))
    energies = {}
    for (name, want), got in zip(reference.items(), results, strict=True):
        pairs = zip(got, want, strict=True) if want.ndim == 3 else ((got[a:b], want[a:b]) for a, b in groups)
        energies[name] = [[float(x) for x in _energies(*pair)] for pair in pairs]
    return judge(energies, least)


@jax.jit
def _energies(got: jax.Array, want: jax.Array) -> jax.Array:
    """float32 [2]: of the reference, of the difference."""
    signal = want.astype(jnp.float32)
    return jnp.stack([jnp.square(signal).sum(), jnp.square(got.astype(jnp.float32) - signal).sum()])
