"""XLA programs, their memory and their time on JAX's default device."""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

FLUSH_BYTES = 2**27
"""More than any GPU's L2 cache holds."""
WARM_UPS = 3
"""Calls before a timing: XLA records the launches of a program that it has run before."""
MOST_CALLS = 1000
"""Enqueued together."""


class Program:
    """A function of arrays as one XLA program, compiled when it is first needed: () → what it computes."""

    def __init__(self, function: Callable[..., Any], *operands: Any) -> None:
        self._function, self._operands = function, operands

    @functools.cached_property
    def compiled(self) -> Any:
        """A `jax.stages.Compiled`."""
        return jax.jit(self._function).lower(*self._operands).compile()

    def __call__(self) -> Any:
        return self.compiled(*self._operands)

    def memory(self) -> int | None:
        """Bytes of the outputs and of XLA's temporaries; None where XLA does not say."""
        analysis = self.compiled.memory_analysis()
        return None if analysis is None else analysis.output_size_in_bytes + analysis.temp_size_in_bytes


class WallTimer:
    """The host's clock around calls that are enqueued together; between them a write flushes the caches."""

    def __init__(self, round_ms: float = 150.0, flush_bytes: int = FLUSH_BYTES) -> None:
        """``round_ms``: about how long one timing takes (milliseconds). ``flush_bytes`` 0: nothing is written."""
        self._round_ms = round_ms
        self._buffer = jnp.zeros(flush_bytes, jnp.int8)
        self._touch = jax.jit(lambda x: x + 1, donate_argnums=0)

    def __call__(self, fn: Callable[[], Any]) -> float:
        """Milliseconds of a call of ``fn``, which returns what it computes."""
        self._wall(fn, WARM_UPS)
        estimate = self._wall(fn, 1)
        times = min(max(int(self._round_ms / max(estimate, 1e-3)), 3), MOST_CALLS)
        return max(self._wall(fn, times) - self._wall(lambda: None, times), 1e-6) / times

    def _wall(self, fn: Callable[[], Any], times: int) -> float:
        jax.block_until_ready(self._buffer)
        start, last = time.perf_counter(), None
        for _ in range(times):
            if self._buffer.size:
                self._buffer = self._touch(self._buffer)
            last = fn()
        jax.block_until_ready((self._buffer, last))
        return (time.perf_counter() - start) * 1e3
