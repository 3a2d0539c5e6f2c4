"""JAX's transformations of `ragged_dot`, `ragged_dot_wgrad` and `swiglu_experts`: each gives what the plain call gives,
or says that it cannot."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.values import values
from xmoe.config import FP8GroupedMMConfig, MXFP8GroupedMMConfig
from xmoe.jax_frontend import OUTPUT_NAME, RESIDUAL_NAMES, functional, ragged_dot, ragged_dot_wgrad, swiglu_experts

M, K, N, G = 40, 32, 16, 3
SIZES = np.array([17, 0, 20], np.int32)  # three rows belong to nobody
A, B, DOUT = (jnp.asarray(values("normal", s, i)) for i, s in enumerate([(M, K), (G, K, N), (M, N)]))
W1, W3, W2 = (jnp.asarray(values("normal", s, i)) / 8 for i, s in enumerate([(G, 32, K), (G, 32, K), (G, K, 32)]))
policies = jax.checkpoint_policies
each_engine = pytest.mark.parametrize("engine", ["jax", "bridge"])
QUICK = {"jax": "bf16", "bridge": "fp8_rowwise"}
"""Of each engine a recipe that is quick to compile, for transformations that do not look inside."""


def dot_of(engine: str, **options: Any) -> Callable[..., jax.Array]:
    """`ragged_dot`, of lhs, rhs and, if they are others, the sizes."""

    def dot(lhs: jax.Array, rhs: jax.Array, sizes: Any = SIZES) -> jax.Array:
        return ragged_dot(
            lhs, rhs, jnp.asarray(sizes), **{"config": QUICK[engine], "implementation": engine, **options}
        )

    return dot


def loss_of(engine: str, **options: Any) -> Callable[..., jax.Array]:
    dot = dot_of(engine, **options)
    return lambda *args: (dot(*args).astype(jnp.float32) ** 2).sum()


@functools.cache
def gradients(engine: str) -> tuple[jax.Array, jax.Array]:
    return jax.jit(jax.grad(loss_of(engine), (0, 1)))(A, B)


def experts(x: jax.Array, w1: jax.Array, w2: jax.Array, w3: jax.Array, **options: Any) -> jax.Array:
    options = {"config": "fp8_rowwise", "implementation": "bridge", **options}
    return swiglu_experts(x, w1, w2, w3, jnp.asarray(SIZES), **options)


def assert_equal(got: Any, want: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, got, want)


def kernel_calls(function: Callable[..., Any], *args: Any) -> int:
    """How often the bridge is in the program of ``function`` that XLA gets."""
    return jax.jit(function).lower(*args).as_text().count("@xla_buffer_python_cpu_callback(")


# ------------------------------------------------------------------------------------------------------ rematerialising

OFFLOAD = policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[], names_which_can_be_offloaded=list(RESIDUAL_NAMES), offload_src="device",
    offload_dst="pinned_host",
)  # fmt: skip
POLICIES = {  # and how many forwards they take, where the backward does not need the output
    "none": (None, 2),
    "nothing_saveable": (policies.nothing_saveable, 2),
    "dots_saveable": (policies.dots_saveable, 2),
    "everything_saveable": (policies.everything_saveable, 1),
    "only ours": (policies.save_only_these_names(*RESIDUAL_NAMES), 1),
    "only xmoe_lhs": (policies.save_only_these_names("xmoe_lhs"), 1),  # on a CPU there are no maxima
    "only the output": (policies.save_only_these_names(OUTPUT_NAME), 2),
    "all but the output": (policies.save_anything_except_these_names(OUTPUT_NAME), 1),
    "ours, offloaded": (OFFLOAD, 1),
}


@pytest.mark.parametrize("name", POLICIES)
def test_checkpoint_policies_name_what_the_backward_needs(name: str) -> None:
    policy, forwards = POLICIES[name]
    loss = lambda a, b: (dot_of("bridge")(a, b) * DOUT).sum()  # noqa: E731
    step = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1))
    assert kernel_calls(step, A, B) == forwards + 1
    assert_equal(jax.jit(step)(A, B), _plain_step())


@functools.cache
def _plain_step() -> Any:
    return jax.jit(jax.value_and_grad(lambda a, b: (dot_of("bridge")(a, b) * DOUT).sum(), (0, 1)))(A, B)


def test_an_output_that_the_backward_needs_is_saved_by_its_name() -> None:
    loss = loss_of("bridge")  # whose gradient is twice the output
    for names, forwards in ((RESIDUAL_NAMES, 2), ((*RESIDUAL_NAMES, OUTPUT_NAME), 1)):
        policy = policies.save_only_these_names(*names)
        assert kernel_calls(jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1)), A, B) == forwards + 1


@pytest.mark.parametrize("missing", [None, "xmoe_x", "xmoe_gate_up", "xmoe_h", "xmoe_order"])
def test_names_of_the_experts_are_all_or_nothing(missing: str | None) -> None:
    """The backward is four calls, on a CPU too."""
    order = jnp.arange(M)[::-1]
    loss = lambda x, *w: experts(x, *w, order=order).sum()  # noqa: E731
    policy = policies.save_only_these_names(*(name for name in RESIDUAL_NAMES if name != missing))
    step = jax.value_and_grad(jax.checkpoint(loss, policy=policy), (0, 1, 2, 3))
    assert kernel_calls(step, A, W1, W2, W3) == (1 if missing is None else 2) + 4


@each_engine
@pytest.mark.parametrize("op", ["ragged_dot", "swiglu_experts"])
def test_names_are_those_documented(op: str, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    policy = policies.save_only_these_names(*RESIDUAL_NAMES)
    order = jnp.arange(M)
    recipe = "fp8_rowwise"
    of_experts = functools.partial(experts, implementation=engine, order=order)
    function, args, names = {
        "ragged_dot": (dot_of(engine, config=recipe), (A, B), ["xmoe_lhs"]),
        "swiglu_experts": (of_experts, (A, W1, W2, W3), ["xmoe_gate_up", "xmoe_h", "xmoe_order", "xmoe_x"]),
    }[op]
    jax.ad_checkpoint.print_saved_residuals(jax.checkpoint(lambda *a: function(*a).sum(), policy=policy), *args)
    lines = capsys.readouterr().out.splitlines()
    found = {name for name in RESIDUAL_NAMES for line in lines if f"'{name}'" in line}
    assert sorted(found) == names
    assert all("named" in line or "from the argument" in line or "from a constant" in line for line in lines)


@each_engine
def test_scan_over_checkpointed_layers(engine: str) -> None:
    f = loss_of(engine)
    policy = policies.save_only_these_names(*RESIDUAL_NAMES)

    def layers(a: jax.Array, bs: jax.Array) -> jax.Array:
        body = jax.checkpoint(lambda total, b: (total + f(a, b), None), policy=policy)
        return jax.lax.scan(body, 0.0, bs)[0]

    dlhs, drhs = jax.jit(jax.grad(layers, (0, 1)))(A, jnp.stack([B, B]))
    want = gradients(engine)
    assert_equal((dlhs, drhs[0], drhs[1]), (2 * want[0], want[1], want[1]))


@each_engine
def test_cond(engine: str) -> None:
    def branches(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.cond(a[0, 0] < jnp.inf, loss_of(engine), lambda a, b: 0.0, a, b)

    assert_equal(jax.jit(jax.grad(branches, (0, 1)))(A, B), gradients(engine))


# ----------------------------------------------------------------------------------------------------------------- vmap


@pytest.mark.parametrize(
    ("engine", "axes"),
    [
        ("jax", (0, None, 0)),
        *(("bridge", axes) for axes in ((0, None, 0), (None, 0, 0), (0, 0, None), (None, None, 0), (1, 2, 0))),
    ],
)
def test_vmap_is_a_loop_over_calls(engine: str, axes: tuple[int | None, ...]) -> None:
    """Each element has its own sizes and its own scales; a gradient of what all share is their sum."""
    stacks = jnp.stack([A, 2 * A[::-1]]), jnp.stack([B, -B]), jnp.stack([jnp.asarray(SIZES), SIZES[::-1]])
    args = [x[0] if axis is None else jnp.moveaxis(x, 0, axis) for x, axis in zip(stacks, axes, strict=True)]
    f = loss_of(engine)
    plain = jax.jit(jax.grad(f, (0, 1)))
    want = [plain(*(x[0 if axis is None else i] for x, axis in zip(stacks, axes, strict=True))) for i in range(2)]
    got = jax.jit(jax.vmap(jax.grad(f, (0, 1)), axes))(*args)
    summed = jax.jit(jax.grad(lambda *args: jax.vmap(f, axes)(*args).sum(), (0, 1)))(*args)
    for index, axis in enumerate(axes[:2]):
        each = [gradient[index] for gradient in want]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-4)
        close(got[index], jnp.stack(each))
        close(summed[index], each[0] + each[1] if axis is None else jnp.stack(each, axis))


def test_vmap_of_experts_and_wgrad() -> None:
    x, dout = jnp.stack([A, 2 * A[::-1]]), jnp.stack([DOUT, DOUT[::-1]])
    wgrad = functools.partial(
        ragged_dot_wgrad, group_sizes=jnp.asarray(SIZES), config="mxfp8_rceil", implementation="bridge"
    )
    got = jax.jit(jax.vmap(wgrad, (None, 0)))(A, dout)
    assert_equal(got, jnp.stack([jax.jit(wgrad)(A, d) for d in dout]))
    grads = jax.grad(lambda x, *w: (experts(x, *w) ** 2).sum(), (0, 1, 2, 3))
    got = jax.jit(jax.vmap(grads, (0, None, None, None)))(x, W1, W2, W3)
    for i in range(2):
        want = jax.jit(grads)(x[i], W1, W2, W3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-4), got, want)  # noqa: B023


# ------------------------------------------------------------------------------------------------------- compiling, x64


@each_engine
def test_x64_lowering_and_donation(engine: str) -> None:
    dot = dot_of(engine)
    want = jax.jit(dot)(A, B)
    assert_equal(jax.jit(dot).lower(A, B).compile()(A, B), want)
    donating = jax.jit(lambda a, b: (dot(a, b), 2 * a), donate_argnums=0)
    assert_equal(donating(A + 0, B), (want, 2 * A))
    with jax.enable_x64(True):
        sizes = jnp.asarray(SIZES, jnp.int64)
        assert_equal(jax.jit(dot)(A, B, sizes), want)
        if engine == "bridge":  # the other is slow to compile
            assert_equal(jax.jit(jax.grad(loss_of(engine), (0, 1)))(A, B, sizes), gradients(engine))


def test_shapes_without_a_computation() -> None:
    assert jax.eval_shape(dot_of("bridge"), A, B) == jax.ShapeDtypeStruct((M, N), jnp.float32)
    step = jax.value_and_grad(loss_of("bridge"), (0, 1))
    assert [x.shape for x in jax.tree.leaves(jax.eval_shape(step, A, B))] == [(), A.shape, B.shape]


def test_only_the_gradients_asked_for_are_computed() -> None:
    f, want = loss_of("bridge"), gradients("bridge")
    assert_equal(jax.jit(jax.grad(f, 0))(A, B), want[0])
    assert_equal(jax.jit(jax.grad(f, 1))(A, B), want[1])
    saved = jax.tree.leaves(jax.eval_shape(lambda a: jax.vjp(lambda a: f(a, B), a)[1], A))
    assert not any(x.dtype == jnp.float8_e4m3fn for x in saved), "dlhs alone needs no wgrad operand"


# ------------------------------------------------------------------------------------------------------------ shard_map


def mesh_2x4(*kinds: AxisType) -> Mesh:
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    return Mesh(devices, ("data", "model"), axis_types=kinds or (AxisType.Auto, AxisType.Auto))


def sharded(specs: Any, out_specs: Any, check_vma: bool, function: Callable[..., Any]) -> Callable[..., Any]:
    return jax.shard_map(function, mesh=mesh_2x4(), in_specs=specs, out_specs=out_specs, check_vma=check_vma)


@each_engine
@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_tokens_and_experts(engine: str, check_vma: bool) -> None:
    """Sums over an axis appear exactly where an operand is replicated."""
    lhs, rhs = jnp.concatenate([A, 2 * A]), jnp.concatenate([B, 2 * B[:1]])
    sizes = np.array([[30, 0, 3, 5], [9, 10, 3, 18]], np.int32)

    def shard(a: jax.Array, b: jax.Array, s: jax.Array) -> jax.Array:
        return jax.lax.psum(dot_of(engine, config="bf16")(a, b, s.reshape(-1)), "model")

    mapped = sharded((P("data"), P("model"), P("data", "model")), P("data"), check_vma, shard)
    got = jax.jit(jax.grad(lambda a, b: (mapped(a, b, sizes) ** 2).sum(), (0, 1)))(lhs, rhs)

    def alone(a: jax.Array, b: jax.Array) -> jax.Array:
        dot = dot_of("bridge", config="bf16")  # quick to compile
        rows = [sum(dot(a[i * M : (i + 1) * M], b[e, None], sizes[i, e, None]) for e in range(4)) for i in range(2)]
        return (jnp.concatenate(rows) ** 2).sum()

    want = jax.jit(jax.grad(alone, (0, 1)))(lhs, rhs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3), got, want)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_over_tokens_and_features(check_vma: bool) -> None:
    """N over "model", the weights' gradient summed over "data": what one device computes, shard by shard."""
    lhs, rhs = jnp.concatenate([A, 2 * A]), jnp.concatenate([B, -B, 2 * B, B + 1], axis=2)
    sizes = np.stack([SIZES, SIZES[::-1]])
    dot = dot_of("bridge")
    mapped = sharded(
        (P("data"), P(None, None, "model"), P("data")), P("data", "model"), check_vma,
        lambda a, b, s: dot(a, b, s.reshape(-1)),
    )  # fmt: skip

    def alone(a: jax.Array, b: jax.Array) -> jax.Array:
        rows = [
            jnp.concatenate([dot(a[i * M : (i + 1) * M], b[:, :, j : j + N], sizes[i]) for j in range(0, 4 * N, N)], 1)
            for i in range(2)
        ]
        return jnp.concatenate(rows)

    square = lambda f: lambda a, b: (f(a, b) ** 2).sum()  # noqa: E731
    assert_equal(jax.jit(mapped)(lhs, rhs, sizes), jax.jit(alone)(lhs, rhs))
    got = jax.jit(jax.grad(square(lambda a, b: mapped(a, b, sizes)), (0, 1)))(lhs, rhs)
    want = jax.jit(jax.grad(square(alone), (0, 1)))(lhs, rhs)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-3), got, want)


def test_shard_map_that_is_not_compiled() -> None:
    """The op compiles itself: output and gradients have the bits of the compiled program."""
    dot = dot_of("bridge")
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("n",))
    mapped = jax.shard_map(dot, mesh=mesh, in_specs=(P(), P(None, None, "n")), out_specs=P(None, "n"))
    arguments = A, jnp.concatenate([B, 2 * B], axis=2)

    def run(lhs: jax.Array, rhs: jax.Array) -> Any:
        out, vjp = jax.vjp(mapped, lhs, rhs)
        return out, *vjp(out)

    want = jax.jit(run)(*arguments)
    assert_equal(mapped(*arguments), want[0])
    assert_equal(run(*arguments), want)


# --------------------------------------------------------------------------------------------------------- what is not


def test_export_of_the_bridge_is_refused_and_that_of_plain_jax_is_not() -> None:
    with pytest.raises(NotImplementedError, match="serialization of host_callbacks is not yet implemented"):
        jax.export.export(jax.jit(dot_of("bridge")))(A, B)
    exported = jax.export.export(jax.jit(dot_of("jax")), platforms=("cpu", "cuda", "tpu"))(A, B)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_equal(jax.jit(exported.call)(A, B), jax.jit(dot_of("jax"))(A, B))


@each_engine
def test_forward_mode_is_refused(engine: str) -> None:
    dot = dot_of(engine)
    runs = (
        lambda a: jax.jvp(dot, (a, B), (A, B)),
        lambda a: jax.linearize(dot, a, B)[1](A, B),
        lambda a: jax.jacfwd(dot)(a, B),
    )
    for run in runs:
        with pytest.raises(TypeError, match=r"can't apply forward-mode .*jvp.* to a custom_vjp function"):
            jax.jit(run).lower(A)


OPS: dict[str, Callable[..., Any]] = {
    "ragged_dot": lambda engine: loss_of(engine),
    "swiglu_experts": lambda engine: (
        lambda x, w1: (experts(x, w1, W2, W3, config=QUICK[engine], implementation=engine) ** 2).sum()
    ),
    "ragged_dot_wgrad": lambda engine: (
        lambda a, b: (
            ragged_dot_wgrad(a, b, jnp.asarray(SIZES), config=QUICK[engine], implementation=engine) ** 2
        ).sum()
    ),
}


@each_engine
@pytest.mark.parametrize("op", OPS)
def test_second_derivatives_are_refused(op: str, engine: str) -> None:
    """In plain JAX too, where the derivative of the quantizers' integers would be a silent zero."""
    loss, other = OPS[op](engine), {"ragged_dot": B, "swiglu_experts": W1, "ragged_dot_wgrad": DOUT}[op]
    of_first = lambda a: loss(a, other)  # noqa: E731
    squared_gradient = lambda a: (jax.grad(of_first)(a) ** 2).sum()  # noqa: E731
    for function in (jax.hessian(of_first), jax.jit(jax.grad(squared_gradient)), jax.hessian(jax.checkpoint(of_first))):
        with pytest.raises(ValueError, match=f"{op} can be differentiated once, .* use jax.lax.ragged_dot"):
            jax.eval_shape(function, A)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("op", ["ragged_dot", "swiglu_experts", "ragged_dot_wgrad"])
def test_automatic_sharding_is_refused_at_trace_time(op: str, kind: AxisType) -> None:
    mesh = mesh_2x4(kind, kind)
    x = jax.device_put(A, NamedSharding(mesh, P("data")))
    run = {
        "ragged_dot": lambda x: dot_of("bridge")(x, B),
        "swiglu_experts": lambda x: experts(x, W1, W2, W3),
        "ragged_dot_wgrad": lambda x: ragged_dot_wgrad(x, DOUT, jnp.asarray(SIZES), implementation="bridge"),
    }[op]
    name = "x" if op == "swiglu_experts" else "lhs"
    for call in (jax.jit(lambda x: run(2 * x)), run, jax.jit(lambda y: run(x + y))):
        with pytest.raises(
            ValueError, match=rf"^{name} is on a mesh with {kind.name} axes: 'data'.*; .* inside jax\.shard_map"
        ):
            call(x)


def test_automatic_axes_beside_those_of_shard_map_are_refused() -> None:
    mesh = mesh_2x4()
    run = lambda a, b: dot_of("bridge")(a, b)  # noqa: E731
    partly = jax.shard_map(run, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"), axis_names={"data"})
    with pytest.raises(ValueError, match=r"with Auto axes: 'model'; .* all axes of the mesh"):
        jax.eval_shape(jax.jit(partly), jnp.concatenate([A, A]), B)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="with Auto axes: 'data', 'model';"):
        jax.eval_shape(run, A, B)


def test_what_is_on_every_device_for_certain_and_plain_jax_are_not_refused() -> None:
    explicit, auto = mesh_2x4(AxisType.Explicit, AxisType.Explicit), mesh_2x4()
    copies = jax.device_put(A, NamedSharding(explicit, P()))
    assert_equal(jax.jit(dot_of("bridge"))(copies, B), jax.jit(dot_of("bridge"))(A, B))
    split = jax.device_put(A, NamedSharding(auto, P("data")))
    assert jax.eval_shape(dot_of("jax"), split, B).shape == (M, N)
    for spec in (P("data"), P()):  # plain JAX on Explicit axes; what is advised works
        with pytest.raises(
            ValueError, match=r"lhs .* Explicit axes: 'data', 'model'; .*AxisType\.Auto.* device holds\)$"
        ):
            dot_of("jax")(jax.device_put(A, NamedSharding(explicit, spec)), B)


# ---------------------------------------------------------------------------------------------------------------- debug

DEBUG = FP8GroupedMMConfig(debug=True)
BAD = jnp.array([30, -1, 30], jnp.int32)


@pytest.mark.parametrize("op", ["ragged_dot", "swiglu_experts", "unfused experts", "ragged_dot_wgrad"])
def test_debug_reports_bad_sizes_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    mx = MXFP8GroupedMMConfig(debug=True)
    of_48 = [jnp.ones((G, 48, K)), jnp.ones((G, K, 48)), jnp.ones((G, 48, K))]  # 48 is no multiple of 32
    run = {
        "ragged_dot": lambda s: ragged_dot(A, B, s, config=DEBUG, implementation="bridge"),
        "swiglu_experts": lambda s: swiglu_experts(A, W1, W2, W3, s, config=DEBUG, implementation="bridge"),
        "unfused experts": lambda s: swiglu_experts(A, *of_48, s, config=mx, implementation="bridge"),
        "ragged_dot_wgrad": lambda s: ragged_dot_wgrad(A, DOUT, s, config=DEBUG, implementation="bridge"),
    }[op]
    with caplog.at_level(logging.ERROR):
        jax.block_until_ready(jax.jit(run)(jnp.asarray(SIZES)))
        jax.effects_barrier()
        assert not caplog.records
        jax.block_until_ready(jax.jit(run)(BAD))
        jax.effects_barrier()
    (record,) = caplog.records
    assert record.getMessage().startswith("group_sizes=[30, -1, 30], in sum 59: give sizes of 0 or more")


@pytest.mark.parametrize("op", ["swiglu_experts", "unfused experts", "experts of a layer"])
def test_debug_reports_an_order_that_is_no_permutation_once(op: str, caplog: pytest.LogCaptureFixture) -> None:
    mx = MXFP8GroupedMMConfig(debug=True)
    of_48 = [jnp.ones((G, 48, K)), jnp.ones((G, K, 48)), jnp.ones((G, 48, K))]  # 48 is no multiple of 32
    sizes, plain = jnp.asarray(SIZES), functional.Weights(W1, W2, None)
    run = {
        "swiglu_experts": lambda o: swiglu_experts(A, W1, W2, W3, sizes, config=DEBUG, order=o),
        "unfused experts": lambda o: swiglu_experts(A, *of_48, sizes, config=mx, order=o),
        "experts of a layer": lambda o: functional.apply_experts(
            A, plain, sizes, o, functional.ExpertConfigs(None, DEBUG, None), "gelu"
        ),
    }[op]
    order = jnp.arange(M)[::-1]
    with caplog.at_level(logging.ERROR):
        jax.block_until_ready(jax.jit(run)(order))
        jax.effects_barrier()
        assert not caplog.records
        jax.block_until_ready(jax.jit(run)(order.at[:2].set(M)))
        jax.effects_barrier()
    (record,) = caplog.records
    assert record.getMessage().startswith("order is no permutation of 0 to M-1=39: 2 of these are not in it, 38 first;")


def test_debug_in_shard_map_reports_from_the_shards_that_are_bad(caplog: pytest.LogCaptureFixture) -> None:
    """And none raises: what comes after, a sum over the shards, would wait for ever."""
    sizes = jnp.stack([jnp.asarray(SIZES)] * 7 + [BAD])

    def shard(s: jax.Array) -> jax.Array:
        out = ragged_dot(A, B, s.reshape(-1), config=DEBUG, implementation="bridge")
        return jax.lax.psum(out, ("data", "model"))

    mapped = sharded(P(("data", "model")), P(), True, shard)
    with caplog.at_level(logging.ERROR):
        jax.block_until_ready(jax.jit(mapped)(sizes))
        jax.effects_barrier()
    (record,) = caplog.records
    assert record.getMessage().startswith("group_sizes=[30, -1, 30]")
