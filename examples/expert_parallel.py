"""Tokens per second of SwiGLU experts on one device, and sharded over all of them by each exchange.

    PYTHONPATH=. python examples/expert_parallel.py --shape deepseek_v3 --tokens 16384 --recipes bf16,fp8_rowwise
    PYTHONPATH=. JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 python examples/expert_parallel.py --shape tiny

Of several processes (hosts) each runs it, with its number and the address of the first one:

    PYTHONPATH=. python examples/expert_parallel.py --shape deepseek_v3 --coordinator HOST:PORT --processes 2 --rank 0

In a checkout, with a Python that has jax and flax: after ``make train`` .venv/bin/python. (Where xmoe is installed
PYTHONPATH is not needed.)

Forward and backward, with the gradients of tokens, scores and weights, from routed tokens to their weighted sums. One
device has all experts and ``--tokens`` tokens; of P devices each has 1 / P of the experts and as many tokens of its
own. So perfect scaling is P times the tokens per second. (One device needs the memory for all weights.)
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from xmoe.jax_frontend import ExpertParallel, combine, swiglu_experts
from xmoe.jax_frontend.expert_parallel import EXCHANGES

SHAPES = {  # D, H, E, k
    "deepseek_v3": (7168, 2048, 32, 8),  # with an eighth of its 256 experts, for one device to hold them
    "qwen3_30b": (2048, 768, 128, 8),
    "mixtral": (4096, 14336, 8, 2),
    "tiny": (64, 128, 8, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="deepseek_v3")
    parser.add_argument("--tokens", type=int, default=None, help="of each device (default: 16384, on a CPU 64)")
    parser.add_argument("--recipes", default="bf16,fp8_rowwise")
    parser.add_argument("--exchanges", default=None, help="of " + ", ".join(EXCHANGES) + " (default: all there are)")
    parser.add_argument("--capacity", type=float, default=2.0, help="times a balanced load; 0: the worst case")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0, where there are several")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--rank", type=int, help="the number of this process")
    options = parser.parse_args()
    if options.coordinator:
        jax.distributed.initialize(options.coordinator, options.processes, options.rank)

    on_cpu = jax.default_backend() == "cpu"
    D, H, E, k = SHAPES[options.shape]
    T = options.tokens or (64 if on_cpu else 16384)
    exchanges = options.exchanges.split(",") if options.exchanges else EXCHANGES[on_cpu or jax.process_count() > 1 :]
    mesh = jax.make_mesh((jax.device_count(),), ("expert",), axis_types=(AxisType.Auto,))
    show = print if jax.process_index() == 0 else lambda line: None
    show(
        f"{mesh.size} x {jax.devices()[0].device_kind}, jax {jax.__version__}: D={D} H={H} E={E} k={k}, "
        f"{T} tokens a device, capacity {options.capacity or 'of the worst case'}"
    )
    show(f"{'recipe':12} {'experts':22} {'ms':>9} {'tokens/s':>12} {'of ideal':>9} {'GiB':>7} {'dropped':>8}")
    for recipe in options.recipes.split(","):
        inputs = make_inputs(T, D, H, E, k, jax.local_devices()[0])
        ms, memory, _ = measure(lambda *a: (alone(*a, recipe), jnp.float32(0)), inputs, options.rounds)  # noqa: B023
        base = T / ms * 1e3
        show(f"{recipe:12} {'one device':22} {ms:9.2f} {base:12,.0f} {'':9} {memory:7.2f}")
        del inputs
        for exchange in exchanges if mesh.size > 1 else ():
            parallel = ExpertParallel(mesh=mesh, exchange=exchange, capacity=options.capacity or None)
            inputs = make_inputs(T * mesh.size, D, H, E, k, parallel)

            def sharded(x: jax.Array, scores: jax.Array, w: dict[str, jax.Array], chosen: jax.Array) -> Any:
                return tuple(parallel.swiglu_experts(x, chosen, scores, **w, config=recipe))  # noqa: B023

            ms, memory, dropped = measure(sharded, inputs, options.rounds)
            speed = T * mesh.size / ms * 1e3
            share = speed / base / mesh.size
            show(f"{recipe:12} {exchange:22} {ms:9.2f} {speed:12,.0f} {share:9.1%} {memory:7.2f} {dropped:8.2%}")
            del inputs


def make_inputs(T: int, D: int, H: int, E: int, k: int, where: Any) -> tuple[Any, ...]:
    """(x [T, D] bf16, scores [T, k], weights bf16 by name, chosen [T, k], dy [T, D]), made where they belong."""
    shapes = {"w1": (E, H, D), "w2": (E, D, H), "w3": (E, H, D)}
    if isinstance(where, ExpertParallel):
        tokens = NamedSharding(where.mesh, P(where.token_axes))
        weights = {name: NamedSharding(where.mesh, where.spec(name)) for name in shapes}
    else:
        tokens = jax.sharding.SingleDeviceSharding(where)
        weights = dict.fromkeys(shapes, tokens)

    def make() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 6)
        x, dy = (jax.random.normal(key, (T, D), jnp.bfloat16) for key in keys[:2])
        logits, chosen = jax.lax.top_k(jax.random.normal(keys[2], (T, E)), k)
        random = dict(zip(shapes, keys[3:], strict=True))
        w = {name: jax.random.normal(random[name], s, jnp.bfloat16) / s[2] ** 0.5 for name, s in shapes.items()}
        return x, jax.nn.softmax(logits), w, chosen, dy

    return jax.jit(make, out_shardings=(tokens, tokens, weights, tokens, tokens))()


def alone(x: jax.Array, scores: jax.Array, w: dict[str, jax.Array], chosen: jax.Array, recipe: str) -> jax.Array:
    """y [T, D] where one device has all experts."""
    slots = chosen.reshape(-1)
    order = jnp.argsort(slots, stable=True)
    sizes = (slots[:, None] == jnp.arange(w["w1"].shape[0])).sum(axis=0, dtype=jnp.int32)
    return combine(swiglu_experts(x, **w, group_sizes=sizes, config=recipe, order=order), scores, order)


def measure(layer: Callable[..., Any], inputs: tuple[Any, ...], rounds: int) -> tuple[float, float, float]:
    """Milliseconds (median) of a forward and backward, GiB of a device's outputs and temporaries, fraction dropped."""

    def step(x: jax.Array, scores: jax.Array, w: Any, chosen: jax.Array, dy: jax.Array) -> Any:
        y, backward, dropped = jax.vjp(lambda x, s, w: layer(x, s, w, chosen), x, scores, w, has_aux=True)
        return y.astype(x.dtype), backward(dy.astype(y.dtype)), dropped

    compiled = jax.jit(step).lower(*inputs).compile()
    *_, dropped = jax.block_until_ready(compiled(*inputs))
    times = []
    for _ in range(rounds + 1):  # the first one warms up
        start, last = time.perf_counter(), None
        for _ in range(3):
            last = compiled(*inputs)
        jax.block_until_ready(last)
        times.append((time.perf_counter() - start) / 3 * 1e3)
    analysis = compiled.memory_analysis()
    memory = 0 if analysis is None else analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return statistics.median(times[1:]), memory / 2**30, float(dropped)


if __name__ == "__main__":
    main()
