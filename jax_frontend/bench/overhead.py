"""What launching costs in JAX, where the GPU has too little to do to hide it: with recorded launches (CUDA graphs) and
without. One op, and a model of many small layers.

D = model width, H = hidden width of an expert, E = experts, T = tokens, k = experts that each token goes to.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from xmoe.bench.exactness import Exactness, judge, least_db
from xmoe.bench.harness import Case, System
from xmoe.bench.options import Options
from xmoe.bench.workload import gemm_work
from xmoe.config import GroupedMMConfig, config_from_recipe
from xmoe.jax_frontend.bench.program import Program, WallTimer
from xmoe.jax_frontend.bench.ragged_dot import JAX, Problem, RaggedDot, energies_of
from xmoe.jax_frontend.moe import MoE
from xmoe.jax_frontend.ragged_dot import ragged_dot
from xmoe.shapes import Shape, StackShape

CALLS = 10
"""Of an op in one program."""
OP = f"one op in JAX, forward and backward, {CALLS} in a program"
STEP = "step of a model of MoE layers in JAX"
Results = dict[str, jax.Array]
"""By name: "out", "dx", and a gradient for each parameter."""


def op_case(options: Options, shape: Shape, timer: WallTimer) -> Case:
    """A forward and backward of every system, timed in a program of `CALLS`."""
    problem = Problem(shape)

    def system(name: str, fn: RaggedDot, format: str) -> System:
        program = problem.program(fn, CALLS)
        return System(
            name=name, step=program, steps=CALLS, time=functools.partial(timer, program), peak=lambda: None, work={},
            check=functools.partial(problem.check, program, least_db(format)),
        )  # fmt: skip

    systems = [
        system(name, functools.partial(ragged_dot, config=config), config.format) for name, _, config in _ours(options)
    ]
    if "jax" in options.peers:
        systems.append(system(JAX, jax.lax.ragged_dot, "bf16"))
    dims = {"M": shape.M, "N": shape.N, "K": shape.K, "G": shape.G}
    return Case(table=OP, shape=shape.name, dims=dims, tokens=shape.M, systems=systems, unit="µs")


def _ours(options: Options) -> Iterator[tuple[str, str, GroupedMMConfig]]:
    """Every recipe with and without recorded launches: the system's name, the recipe's, the config."""
    for recipe in options.recipes:
        config = config_from_recipe(recipe)
        yield f"xmoe {recipe}, JAX", recipe, config
        yield f"xmoe {recipe}, JAX, command_buffer=False", recipe, dataclasses.replace(config, command_buffer=False)


# ------------------------------------------------------------------------------------------------------ step of a model


class Stack(nnx.Module):
    """``layers`` times x + MoE(norm(x)), in bf16: x [T, D] → (y [T, D], the layers' mean load-balance loss)."""

    def __init__(self, shape: StackShape, config: GroupedMMConfig, *, rngs: nnx.Rngs) -> None:
        sizes = shape.dim, shape.hidden, shape.experts, shape.top_k
        self.layers = nnx.List(
            [MoE(*sizes, config=config, param_dtype=jnp.bfloat16, rngs=rngs) for _ in range(shape.layers)]
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = []
        for layer in self.layers:
            y, loss = layer(
                x * jax.lax.rsqrt(jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)).astype(x.dtype)
            )
            x = x + y
            losses.append(loss)
        return x, jnp.stack(losses).mean()


def step_of(model: Any, x: jax.Array, dout: jax.Array) -> Program:
    """Forward and backward: () → `Results`."""
    graph, parameters = nnx.split(model)

    def step(parameters: Any, x: jax.Array, dout: jax.Array) -> Results:
        (out, loss), backward = jax.vjp(lambda parameters, x: nnx.merge(graph, parameters)(x), parameters, x)
        gradients, dx = backward((dout, jnp.ones_like(loss)))
        named = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}
        return {"out": out, "dx": dx, **named}

    return Program(step, parameters, x, dout)


def step_case(options: Options, shape: StackShape, capability: tuple[int, int] | None, timer: WallTimer) -> Case:
    """A step of a `Stack` of every recipe, all with the same weights.

    What is compared is a layer by itself: a chain's results say little about its layers, since rounding in one makes
    the routers of the next choose other experts for some tokens.
    """
    x, dout = (jax.random.normal(jax.random.key(seed), (shape.tokens, shape.dim), jnp.bfloat16) for seed in range(2))

    def stack(config: GroupedMMConfig) -> Stack:
        return Stack(shape, config, rngs=nnx.Rngs(0))

    reference = step_of(stack(config_from_recipe("bf16")).layers[0], x, dout)()

    def check(model: Stack, format: str) -> Exactness:
        results = step_of(model.layers[0], x, dout)()
        energies = {name: [energies_of(results[name], want)] for name, want in reference.items()}
        return judge(energies, least_db(format, layer=True))

    systems = []
    for name, recipe, config in _ours(options):
        model = stack(config)
        step = step_of(model, x, dout)
        systems.append(
            System(
                name=name, step=step, check=functools.partial(check, model, config.format), peak=step.memory,
                time=functools.partial(timer, step), work=gemm_work(recipe, shape.flops, capability),
            )
        )  # fmt: skip
    letters = {"layers": shape.layers, "T": shape.tokens, "D": shape.dim, "H": shape.hidden, "E": shape.experts}
    return Case(table=STEP, shape=shape.name, dims=letters | {"k": shape.top_k}, tokens=shape.tokens, systems=systems)
