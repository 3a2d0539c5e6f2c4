"""Expert parallelism on 8 host devices: rows, results and gradients against a single device."""

import functools
import sys
from typing import Any
from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.jax_frontend.meshes import DY, MESHES, D, E, H, T, X, k, mesh_of, normal, sqnr
from xmoe import oracle
from xmoe.jax_frontend import (
    ExpertParallel,
    combine,
    parallel_experts,
    permute_tokens,
    swiglu_experts,
)
from xmoe.jax_frontend.exchange import exchange, slices

each_exchange = pytest.mark.parametrize("how", ["ragged_all_to_all", "all_to_all", "all_gather"])

WEIGHTS = {"w1": normal(2, E, H, D) / 6, "w2": normal(3, E, D, H) / 8, "w3": normal(4, E, H, D) / 6}
CHOSEN = jax.lax.top_k(normal(5, T, E) + jnp.arange(E) / 4, k)[1]  # uneven
SCORES = 2.0 ** -jax.random.randint(jax.random.key(6), (T, k), 0, 3).astype(jnp.float32)
"""Powers of two: products with them are exact, so a fused multiply-add gives no other bits."""


def ragged_all_to_all(
    operand: Any, output: Any, input_offsets: Any, send_sizes: Any, output_offsets: Any, recv_sizes: Any, *,
    axis_name: Any,
) -> jax.Array:  # fmt: skip
    """What the documentation of `jax.lax.ragged_all_to_all` says, for XLA's CPU backend, which has none. Sizes on which
    sender and receiver disagree poison the result."""
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    everyones = [jax.lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    for sender, (rows, *pieces) in enumerate(zip(*everyones, strict=True)):
        begins, sizes, there = (a.reshape(len(everyones[0]), -1)[me] for a in pieces)
        expected = recv_sizes.reshape(len(everyones[0]), -1)[sender]
        within = row[:, None] - there  # [rows, pieces]
        mine = (within >= 0) & (within < sizes)
        received = rows[jnp.clip((begins + within).max(1, where=mine, initial=0), 0, rows.shape[0] - 1)]
        output = jnp.where(mine.any(1, keepdims=True), received, output)
        output = jnp.where((expected == sizes).all(), output, jnp.nan)
    return output


@pytest.fixture
def _ragged_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    module = sys.modules[ExpertParallel.__module__]  # its name is a function's, too
    monkeypatch.setattr(module, "platform", lambda: "gpu")


def float32_experts(
    weights: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, order: jax.Array | None
) -> jax.Array:
    """SwiGLU experts without any quantization."""
    rows = rows if order is None else permute_tokens(rows, order)
    within = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]

    def dot(rows: jax.Array, weight: jax.Array) -> jax.Array:
        highest = jax.lax.Precision.HIGHEST
        rows = jax.lax.ragged_dot(jnp.where(within, rows, 0), weight.swapaxes(1, 2), sizes, precision=highest)
        return jnp.where(within, rows, 0)

    return dot(jax.nn.silu(dot(rows, weights["w1"])) * dot(rows, weights["w3"]), weights["w2"])


def fp8_experts(weights: dict[str, jax.Array], rows: jax.Array, sizes: jax.Array, order: jax.Array | None) -> jax.Array:
    w1, w2, w3 = (weights[name].astype(rows.dtype) for name in ("w1", "w2", "w3"))
    return swiglu_experts(rows, w1, w2, w3, sizes, config="fp8_rowwise", order=order, implementation="bridge")


def alone(
    experts: Any, weights: dict[str, jax.Array], x: jax.Array, scores: jax.Array, chosen: jax.Array = CHOSEN
) -> jax.Array:
    """A single device's y [T, D]; an expert that is none goes nowhere."""
    chosen = chosen.reshape(-1)
    sizes, order = (chosen[:, None] == jnp.arange(E)).sum(0), jnp.argsort(chosen, stable=True)
    return combine(experts(weights, x, sizes, order), scores, order)


def with_gradients(f: Any) -> Any:
    """(weights, x, scores, ...) -> y of f(weights, x, scores, ...) and its gradients with DY, by name."""

    def run(weights: Any, x: jax.Array, scores: jax.Array, *rest: Any) -> dict[str, jax.Array]:
        y, vjp = jax.vjp(lambda *a: f(*a, *rest), weights, x, scores)
        weights, x, scores = vjp(DY)
        return {"y": y, "x": x, "scores": scores, **weights}

    return jax.jit(run)


float32_alone = with_gradients(functools.partial(alone, float32_experts))


@functools.cache
def single(experts: Any, dtype: str = "float32") -> dict[str, jax.Array]:
    return with_gradients(functools.partial(alone, experts))(WEIGHTS, X.astype(dtype), SCORES)


def on_mesh(experts: Any, how: Any, axes: str, dtype: str = "float32", **options: Any) -> dict[str, jax.Array]:
    tensor = "tensor" if "tensor" in MESHES[axes] else None
    parallel = ExpertParallel(mesh=mesh_of(MESHES[axes]), exchange=how, tensor_axis=tensor, **options)

    def f(weights: dict[str, jax.Array], x: jax.Array, scores: jax.Array) -> jax.Array:
        return parallel.apply(experts, weights, x, CHOSEN, scores).y

    return with_gradients(f)(WEIGHTS, X.astype(dtype), SCORES)


# ------------------------------------------------------------------------------------------------------------ exchange


@pytest.mark.parametrize("collective", ["ragged_all_to_all", "all_to_all"])
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_rows_travel_and_gradients_travel_back(collective: Any) -> None:
    rng = np.random.default_rng(0)
    devices, R, S = 4, 20, 40
    counts = rng.multinomial(17, [0.5, 0.3, 0.2, 0], devices).astype(np.int32)  # some are 0, and so is a column
    x, dy = rng.standard_normal((2, devices, S, 3), np.float32)
    x = x[:, :R]

    @functools.partial(jax.shard_map, mesh=mesh_of({"a": 4, "b": 2}), in_specs=P("a"), out_specs=P("a"))
    def run(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        outgoing, incoming = slices(jnp.asarray(counts), "a")
        move = functools.partial(exchange, outgoing=outgoing, incoming=incoming, axis="a", collective=collective)
        y, vjp = jax.vjp(lambda x: move(x, S), x[0])
        return y[None], vjp(dy[0])[0][None]

    want, want_dx = np.zeros((devices, S, 3), np.float32), np.zeros_like(x)
    filled = [0] * devices
    for sender in range(devices):
        first = 0
        for receiver, n in enumerate(counts[sender]):
            there = filled[receiver]
            want[receiver, there : there + n] = x[sender, first : first + n]
            want_dx[sender, first : first + n] = dy[receiver, there : there + n]
            first, filled[receiver] = first + n, there + n
    y, dx = jax.jit(run)(x, dy)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(dx, want_dx)


@pytest.mark.parametrize("check_vma", [True, False])
def test_ragged_exchange_lowers_for_gpus(check_vma: bool) -> None:
    """Two collectives, there and back, and none for offsets."""

    def run(x: jax.Array, counts: jax.Array) -> jax.Array:
        outgoing, incoming = slices(counts, "expert")
        f = functools.partial(
            exchange, size=16, outgoing=outgoing, incoming=incoming, axis="expert", collective="ragged_all_to_all"
        )
        return jax.grad(lambda x: (f(x) ** 2).sum())(x)

    mesh, specs = mesh_of({"expert": 8}), (P("expert"), P())
    mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=check_vma)
    arguments = jax.ShapeDtypeStruct((64, 4), jnp.float32), jax.ShapeDtypeStruct((8, 8), jnp.int32)
    text = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@ragged_all_to_all") == 2
    assert 'all_to_all"(' not in text


# ----------------------------------------------------------------------------------------------------- a single device


@pytest.mark.parametrize(
    ("how", "axes", "check_vma"),
    [
        ("ragged_all_to_all", "2x4", True),
        ("ragged_all_to_all", "2x2x2", False),
        ("all_to_all", "2x2x2", True),
        ("all_to_all", "8", False),
        ("all_gather", "2x4", False),
        ("all_gather", "2x2x2", True),
    ],
)
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_results_and_gradients_are_those_of_a_single_device(how: str, axes: str, check_vma: bool) -> None:
    got = sqnr(single(float32_experts), on_mesh(float32_experts, how, axes, check_vma=check_vma))
    assert min(got.values()) >= 120, got


@pytest.mark.parametrize("how", ["all_to_all", "all_gather"])
def test_quantized_experts_have_the_bits_of_a_single_device(how: str) -> None:
    """Where only experts are sharded; but `all_gather` adds up y, and in bf16 the gradient of x, in another order."""
    got = sqnr(single(fp8_experts, "bfloat16"), on_mesh(fp8_experts, how, "8", "bfloat16"))
    inexact = {"scores": 125} if how == "all_to_all" else {"y": 140, "scores": 125, "x": 45}
    assert all(got[name] >= least for name, least in inexact.items()), got
    assert {name for name, db in got.items() if db < np.inf} <= {*inexact}, got


def test_data_shards_are_quantized_by_themselves() -> None:
    """Weights' gradients are the sum of what each data shard's single device would have."""
    got = on_mesh(fp8_experts, "all_to_all", "2x4", "bfloat16")
    half, parts = T // 2, []
    for rows in (slice(half), slice(half, T)):

        def f(weights: Any, x: jax.Array, scores: jax.Array, rows: slice = rows) -> Any:
            return (alone(fp8_experts, weights, x, scores, CHOSEN[rows]) * DY[rows]).sum()

        grads = jax.jit(jax.grad(f))(WEIGHTS, X[rows].astype(jnp.bfloat16), SCORES[rows])
        parts.append(grads)
    want = jax.tree.map(jnp.add, *parts)
    assert sqnr(want, got) == dict.fromkeys(want, np.inf)
    whole = single(fp8_experts, "bfloat16")
    np.testing.assert_array_equal(got["y"], whole["y"])
    np.testing.assert_array_equal(got["x"], whole["x"])


def test_a_tensor_axis_has_scales_of_its_own() -> None:
    got = sqnr(single(fp8_experts, "bfloat16"), on_mesh(fp8_experts, "all_to_all", "2x2x2", "bfloat16"))
    assert min(got.values()) >= 45, got
    assert got["y"] < np.inf


# ------------------------------------------------------------------------------------------------------------ capacity


@each_exchange
@pytest.mark.usefixtures("_ragged_on_cpu")
def test_what_has_no_room_is_dropped_and_nothing_else(how: Any) -> None:
    """Of an expert with too many rows each sender loses its last ones, by the same share."""
    devices, slots, capacity = 8, T // 8 * k, 1.2
    room = int(np.ceil(slots * capacity))
    chosen = np.asarray(CHOSEN).reshape(devices, slots).copy()
    chosen[0, :4] = [-1, E, 100, -7]  # nobody's
    kept, dropped = chosen.copy(), 0
    kept[(kept < 0) | (kept >= E)] = E
    for expert in range(E):  # of one device each
        counts = (chosen == expert).sum(axis=1)
        ends = np.cumsum(counts)
        if ends[-1] > room:
            share = np.float32(room) / np.float32(ends[-1])
            given = np.diff(np.minimum((ends * share).astype(np.int64), room), prepend=0)
            assert given.sum() <= room, "an oracle that overflows"
            for sender in range(devices):
                lost = np.flatnonzero(chosen[sender] == expert)[given[sender] :]
                kept[sender, lost] = E
                dropped += len(lost)
    assert 10 < dropped < 60
    parallel = ExpertParallel(mesh=mesh_of(MESHES["8"]), exchange=how, capacity=capacity)

    def run(weights: Any, x: jax.Array, scores: jax.Array) -> Any:
        def f(*arguments: Any) -> Any:
            weights, x, scores = arguments
            return tuple(parallel.apply(float32_experts, weights, x, jnp.asarray(chosen.reshape(T, k)), scores))

        y, vjp, fraction = jax.vjp(f, weights, x, scores, has_aux=True)
        weights, x, scores = vjp(DY)
        return {"y": y, "x": x, "scores": scores, **weights}, fraction

    got, fraction = jax.jit(run)(WEIGHTS, X, SCORES)
    np.testing.assert_allclose(fraction, dropped / (T * k), rtol=1e-6)
    want = float32_alone(WEIGHTS, X, SCORES, jnp.asarray(kept.reshape(T, k)))
    assert min(sqnr(want, got).values()) >= 120


@pytest.mark.parametrize(("how", "capacity"), [("all_to_all", None), ("all_to_all", 0.01), ("all_gather", 7.9)])
def test_everybody_to_one_device(how: Any, capacity: float | None) -> None:
    chosen = jnp.full((T, k), 5)
    parallel = ExpertParallel(mesh=mesh_of(MESHES["8"]), exchange=how, capacity=capacity)
    y, dropped = jax.jit(lambda: parallel.apply(float32_experts, WEIGHTS, X, chosen, SCORES))()
    kept = {None: T * k, 0.01: 1, 7.9: 190}[capacity]
    np.testing.assert_allclose(dropped, 1 - kept / (T * k), rtol=1e-5, atol=1e-7)
    if capacity is None:
        want = float32_alone(WEIGHTS, X, SCORES, chosen)["y"]
        assert oracle.sqnr(np.asarray(want), y) >= 120


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"axis": "model"}, r"axis='model' is not of the mesh; its axes are \('expert',\)"),
        ({"tensor_axis": "model"}, "tensor_axis='model' is not of the mesh"),
        ({"data_axes": ("expert",)}, r"share an axis"),
        ({"exchange": "ring"}, "exchange='ring' is not known; use one of ragged_all_to_all"),
        ({"exchange": "ragged_all_to_all"}, "no implementation on a CPU in XLA; use 'all_to_all'"),
        ({"tensor_axis": ("expert",)}, r"tensor_axis=\('expert',\): \('expert',\) is not the name of one axis"),
        ({"data_axes": "expert"}, r"data_axes=\('expert',\) and .* share an axis"),
        ({"data_axes": "data"}, r"data_axes=\('data',\) is not of the mesh"),
        ({"T": 60}, r"T=60 tokens, which \('expert',\) do not divide into 8; pad the batch"),
        ({"E": 4}, r"w1 has shape \(4, 64, 32\): E=4 is not a multiple of 8, for the 8 devices of 'expert'"),
        ({"chosen": CHOSEN[:8]}, r"chosen has shape \(8, 3\); give \[T, k\], T=64"),
        ({"chosen": SCORES}, "chosen is float32; give integers"),
        ({"scores": SCORES[:, :2]}, r"scores has shape \(64, 2\); give \(64, 3\)"),
        ({"scores": SCORES.astype(jnp.bfloat16)}, "scores is bfloat16"),
        ({"chosen": CHOSEN.tolist()}, "chosen is a list; give an array"),
        ({"x": X[None]}, r"x has shape \(1, 64, 32\)"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], match: str) -> None:
    rows = slice(options.pop("T", T))
    experts = options.pop("E", E)
    weights = {name: weight[:experts] for name, weight in WEIGHTS.items()}
    given = {"x": X[rows], "chosen": CHOSEN[rows], "scores": SCORES[rows]}
    given |= {name: options.pop(name) for name in [*options] if name in given}
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(
            lambda: ExpertParallel(mesh=mesh_of(MESHES["8"]), **options).apply(float32_experts, weights, **given)
        )


def test_gpus_of_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows travel by the exchange that reaches them."""
    monkeypatch.setattr(sys.modules[ExpertParallel.__module__], "platform", lambda: "gpu")
    parallel = ExpertParallel(mesh=mesh_of(MESHES["8"]))

    def program() -> str:
        return str(jax.make_jaxpr(lambda: parallel.apply(float32_experts, WEIGHTS, X, CHOSEN, SCORES))())

    assert "ragged_all_to_all" in program()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert "ragged_all_to_all" not in program()
    assert "all_to_all" in program()

    gpus = np.array([Mock(id=i, process_index=i // 2) for i in range(4)]).reshape(2, 2)
    options: Any = {"axis": "expert", "exchange": "ragged_all_to_all"}
    ExpertParallel(mesh=jax.sharding.Mesh(gpus, ("data", "expert")), **options)
    with pytest.raises(
        ValueError, match="between the GPUs of one process, and those of axis='expert' belong to several"
    ):
        ExpertParallel(mesh=jax.sharding.Mesh(gpus, ("expert", "data")), **options)


@pytest.mark.parametrize("capacity", [0, -1, float("nan"), float("inf"), "2", True])
def test_a_capacity_that_is_none(capacity: Any) -> None:
    with pytest.raises(ValueError, match=f"capacity={capacity!r} is not a positive number; give a multiple .* or None"):
        ExpertParallel(mesh=mesh_of(MESHES["8"]), capacity=capacity)
    run = functools.partial(parallel_experts, None, num_experts=E, axis="expert", capacity=capacity)
    with pytest.raises(ValueError, match="axis='expert' is no axis of a jax"):
        run(X, CHOSEN, SCORES)
    mapped = jax.shard_map(run, mesh=mesh_of(MESHES["8"]), in_specs=P("expert"), out_specs=P("expert"))
    with pytest.raises(ValueError, match=f"capacity={capacity!r} is not a positive number"):
        jax.eval_shape(mapped, X, CHOSEN, SCORES)


def test_names_of_axes_as_a_partition_spec_takes_them() -> None:
    several = ExpertParallel(mesh=mesh_of(MESHES["2x4"]), data_axes=("data",))
    for data_axes in ("data", ["data"]):
        one = ExpertParallel(mesh=mesh_of(MESHES["2x4"]), data_axes=data_axes)  # type: ignore[arg-type]
        assert one == several
        assert hash(one) == hash(several)
        assert one.token_axes == ("data", "expert")
