"""`xmoe.jax_frontend.ragged_dot` under jit, forward and backward, beside `jax.lax.ragged_dot` and tokamax.

M tokens, N output features, K contraction, G groups; lhs bf16 [M, K], rhs bf16 [G, K, N].
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from xmoe.bench.exactness import PEER_SLACK_DB, Exactness, judge, least_db
from xmoe.bench.harness import System
from xmoe.bench.options import Options
from xmoe.bench.workload import gemm_work, uneven_sizes
from xmoe.config import config_from_recipe
from xmoe.jax_frontend.bench.program import Program
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.shapes import Shape

RaggedDot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(lhs [M, K], rhs [G, K, N], group_sizes int32 [G]) → [M, N]."""
NAMES = ("out", "dA", "dB")
JAX = "jax.lax.ragged_dot bf16"
TOKAMAX = ("default", "triton")
"""Implementations of `tokamax.ragged_dot`; its default is the first that runs of Mosaic, Triton and XLA."""


class Problem:
    """The operands of one shape: N(0, 1) in bf16, uneven groups."""

    def __init__(self, shape: Shape) -> None:
        self.shape, sizes = shape, uneven_sizes(shape.M, shape.G)
        self._ends = tuple(sizes.cumsum().tolist())
        keys = jax.random.split(jax.random.key(0), 3)
        dims = ((shape.M, shape.K), (shape.G, shape.K, shape.N), (shape.M, shape.N))
        lhs, rhs, dout = (jax.random.normal(key, size, jnp.bfloat16) for key, size in zip(keys, dims, strict=True))
        self._operands = lhs, rhs, jnp.asarray(sizes), dout
        self._reference = dict(zip(NAMES, _dense(lhs, rhs, dout, self._ends), strict=True))

    def program(self, fn: RaggedDot, calls: int = 1) -> Program:
        """``calls`` forwards and backwards: () → [(out, dlhs, drhs)].

        All three are outputs: XLA would leave out a forward that nobody asks for. Each call waits for the one before,
        and none of its GEMMs is that of another to XLA, which would make one of equal ones.
        """

        def once(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dout: jax.Array) -> Any:
            out, backward = jax.vjp(lambda lhs, rhs: fn(lhs, rhs, group_sizes).astype(dout.dtype), lhs, rhs)
            return out, *backward(dout)

        def step(lhs: jax.Array, rhs: jax.Array, group_sizes: jax.Array, dout: jax.Array) -> Any:
            results = []
            for _ in range(calls):
                out, dlhs, drhs = once(lhs, rhs, group_sizes, dout)
                results.append((out, dlhs, drhs))
                lhs, dout = lhs + 0 * dlhs, dout + 0 * out
            return results

        return Program(step, *self._operands)

    def check(self, program: Program, least: float) -> Exactness:
        """The results of its first call against one bf16 product for each group, whole and by group.

        Raises `xmoe.bench.exactness.WrongResult`.
        """
        groups = list(zip((0, *self._ends), self._ends, strict=False))
        energies = {}
        for (name, want), got in zip(self._reference.items(), program()[0], strict=True):
            pairs = zip(got, want, strict=True) if want.ndim == 3 else ((got[a:b], want[a:b]) for a, b in groups)
            energies[name] = [energies_of(*pair) for pair in pairs]
        return judge(energies, least)


def systems(options: Options, shape: Shape, capability: tuple[int, int] | None) -> tuple[list[System], dict[str, str]]:
    """Forward and backward of every system, with both gradients; and those that cannot be tried: why."""
    problem = Problem(shape)
    found, missing = [], {}
    for name, recipe, make in _functions(options):
        try:
            program = problem.program(make())
        except Exception as error:  # an installation that does not fit this jax
            missing[name] = f"{type(error).__name__}: {str(error)[:160]}"
            continue
        least = least_db(config_from_recipe(recipe).format) - (0 if name.startswith("xmoe") else PEER_SLACK_DB)
        found.append(
            System(
                name=name,
                step=program,
                check=functools.partial(problem.check, program, least),
                peak=program.memory,
                work=gemm_work(recipe, shape.flops, capability),
            )
        )
    return found, missing


def _functions(options: Options) -> Iterator[tuple[str, str, Callable[[], RaggedDot]]]:
    """Names, recipes (or what comes closest) and what makes each function."""
    if "jax" in options.peers:
        yield JAX, "bf16", lambda: jax.lax.ragged_dot
    for implementation in TOKAMAX if "tokamax" in options.peers else ():
        yield f"tokamax bf16, {implementation}", "bf16", functools.partial(tokamax_ragged_dot, implementation)
    for recipe in options.recipes:
        yield f"xmoe {recipe}, JAX", recipe, lambda recipe=recipe: functools.partial(ragged_dot, config=recipe)


def tokamax_ragged_dot(implementation: str) -> RaggedDot:
    """`tokamax.ragged_dot` by one of `TOKAMAX`. Raises ImportError."""
    import tokamax  # type: ignore (optional)
    from absl import flags

    if not flags.FLAGS.is_parsed():  # its options are flags, and this process has no command line for them
        flags.FLAGS.mark_as_parsed()
    options = {} if implementation == "default" else {"implementation": implementation}
    return lambda lhs, rhs, group_sizes: tokamax.ragged_dot(lhs, rhs, group_sizes, **options)


@functools.partial(jax.jit, static_argnums=3)
def _dense(lhs: jax.Array, rhs: jax.Array, dout: jax.Array, ends: Sequence[int]) -> tuple[jax.Array, ...]:
    """(out, dlhs, drhs) by one bf16 product for each group."""
    groups = list(zip([0, *ends], ends, strict=False))
    out = [lhs[start:end] @ rhs[g] for g, (start, end) in enumerate(groups)]
    dlhs = [dout[start:end] @ rhs[g].T for g, (start, end) in enumerate(groups)]
    drhs = [lhs[start:end].T @ dout[start:end] for start, end in groups]
    return jnp.concatenate(out), jnp.concatenate(dlhs), jnp.stack(drhs)


def energies_of(got: jax.Array, want: jax.Array) -> list[float]:
    """Sums of squares: of the reference, of the difference."""
    return [float(x) for x in _energies(got, want)]


@jax.jit
def _energies(got: jax.Array, want: jax.Array) -> jax.Array:
    signal = want.astype(jnp.float32)
    return jnp.stack([jnp.square(signal).sum(), jnp.square(got.astype(jnp.float32) - signal).sum()])
