"""`monitor`: what it counts is what the oracle says, and training does not notice it."""

import contextlib
import io
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xmoe import config_from_recipe, oracle
from xmoe.torch_backend import MoE, cache_weights, monitor, numerics, observe, quantize_, weight_cache

RECIPES = ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "mxfp8_floor", "mxfp8_rceil_wgrad_with_hp"]
D, G = 64, 4


class Experts(nn.Module):
    """Two linear maps an expert, through the grouped GEMM."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(G, 48, D, dtype=dtype) / 8)
        self.down = nn.Parameter(torch.randn(G, 48, D, dtype=dtype) / 8)

    def forward(self, x: Tensor, offs: Tensor) -> Tensor:
        up, down = self.up.to(x.dtype), self.down.to(x.dtype)
        return torch._grouped_mm(torch._grouped_mm(x, up.mT, offs=offs), down, offs=offs)


def converted(recipe: str, make: Callable[..., nn.Module] = Experts, **options: Any) -> Any:
    torch.manual_seed(3)
    model = make(**options)
    quantize_(model, recipe, verbose=False)
    return model


def moe(**options: Any) -> MoE:
    return MoE(D, options.pop("hidden", 128), G, 2, **options)


def recorded(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Any]:
    """The records of one step, by parameter."""
    with monitor(model, every=1) as handle:
        run().float().square().mean().backward()
        handle.step()
    return {record["parameter"]: record for record in handle.records}


# ------------------------------------------------------------------------------------------------------------ numbers


def counts(x: np.ndarray, operand: Any, offs: np.ndarray | None = None) -> dict[str, float]:
    """By the definitions, of an operand of the oracle and the float64 values in its layout."""
    data, values = operand.data.astype(np.float64), oracle.dequantize(operand, offs)
    saturated = (np.abs(data) == 448) & (np.abs(x) > np.abs(values))
    flushed = (data == 0) & (x != 0)
    return {"amax": np.abs(x).max(), "saturated": saturated.mean(), "flushed": flushed.mean()}


def db(x: np.ndarray, reference: np.ndarray) -> float:
    return 10 * math.log10(np.square(reference).sum() / np.square(reference - x).sum())


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "hp" not in recipe and recipe != "bf16"])
def test_counts_are_the_oracles(recipe: str) -> None:
    """Of every operand of a GEMM whose groups fill whole tiles, so that no operand has padding; with values that
    saturate and that vanish."""
    fmt = config_from_recipe(recipe).format
    model = converted(recipe, dtype=torch.float32)
    M = 128 * G
    x = (torch.randn(M, D) * torch.exp2(torch.randint(-30, 2, (M, D)).float())).requires_grad_()
    with torch.no_grad():
        model.up.mul_(torch.exp2(torch.randint(-25, 2, model.up.shape).float()))
    offs = (torch.arange(1, G + 1) * 128).int()
    gradient = torch.randn(M, 48) * torch.exp2(torch.randint(-30, 2, (M, 48)).float())
    with monitor(model, every=1) as handle:
        torch._grouped_mm(x, model.up.mT, offs=offs).backward(gradient)
        handle.step()
    (record,) = handle.records

    A, B, dOut = (t.detach().as_subclass(Tensor).double().numpy() for t in (x, model.up.mT, gradient))
    A32, B32, dOut32 = (t.astype(np.float32) for t in (A, B, dOut))
    ends = offs.numpy()
    a_tokens, d_tokens = (oracle.quantize_tokens(t, ends, fmt) for t in (A32, dOut32))
    padded = [np.zeros(t.data.shape) for t in (a_tokens, d_tokens)]
    padded[0][:, :M], padded[1][:, :M] = A.T, dOut.T
    wanted = {
        "fwd": {
            "activation": counts(A, oracle.quantize_rows(A32, fmt)),
            "weight": counts(B.transpose(0, 2, 1), oracle.quantize_weights(B32, "K", fmt)),
        },
        "dgrad": {
            "gradient": counts(dOut, oracle.quantize_rows(dOut32, fmt)),
            "weight": counts(B, oracle.quantize_weights(B32, "N", fmt)),
        },
        "wgrad": {
            "activation": counts(padded[0], a_tokens, ends),
            "gradient": counts(padded[1], d_tokens, ends),
        },
    }
    for operand, tokens in (("activation", a_tokens), ("gradient", d_tokens)):  # without the columns that hold no token
        for share in ("saturated", "flushed"):
            wanted["wgrad"][operand][share] *= tokens.data.shape[1] / M
    for gemm, operands in wanted.items():
        for operand, expected in operands.items():
            assert record[gemm][operand] == pytest.approx(expected, rel=1e-12), (gemm, operand)
    assert record["fwd"]["activation"]["flushed"] > (0 if fmt.startswith("mx") else 0.1)
    assert (record["fwd"]["activation"]["saturated"] > 0) == (fmt == "mxfp8_floor")


def test_sqnr_is_that_of_the_results() -> None:
    model, reference = converted("mxfp8_rceil"), converted("bf16")
    offs = torch.tensor([10, 10, 90, 120], dtype=torch.int32)
    results = []
    for each in (model, reference):
        torch.manual_seed(5)
        x = torch.randn(130, D, dtype=torch.bfloat16, requires_grad=True)
        with monitor(each, every=1) as handle:
            out = torch._grouped_mm(x, each.up.mT, offs=offs)
            out.backward(torch.randn_like(out))
            handle.step()
        grads = x.grad, each.up.grad
        results.append((handle.records[0], [t.detach().double().numpy() for t in (out, *grads)]))
    (record, found), (plain, wanted) = results
    for gemm, x, ref in zip(("fwd", "dgrad", "wgrad"), found, wanted, strict=True):
        assert record[gemm]["sqnr"] == pytest.approx(db(x, ref), abs=1e-9)
        assert 25 < record[gemm]["sqnr"] < 32
        assert set(plain[gemm]) == set(record[gemm]) - {"sqnr"}  # bf16 is what it would be compared with
        assert all(set(operand) == {"amax"} for operand in plain[gemm].values())


@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8_floor"])
def test_experts_as_one_op_are_their_three_gemms(recipe: str) -> None:
    """The fused layer against `torch._grouped_mm` on the same weights; alike but for the last bits of the SwiGLU, and
    for the row scales that the gradients of gate and up share."""
    layer = converted(recipe, moe, dtype=torch.bfloat16)
    x = torch.randn(96, D, dtype=torch.bfloat16, requires_grad=True)
    fused = recorded(layer, lambda: layer(x)[0])
    unfused = converted(recipe, moe, dtype=torch.bfloat16)
    for name in ("w1", "w2", "w3"):  # a module that takes w1 as [E, H, D] and multiplies by itself
        assert torch.equal(getattr(layer.experts, name), getattr(unfused.experts, name))

    def forward(x: Tensor, offs: Tensor, order: Tensor) -> Tensor:
        e, rows = unfused.experts, x[order // 2]
        g, u = (torch._grouped_mm(rows, w.mT, offs=offs) for w in (e.w1, e.w3))
        return torch._grouped_mm(nn.functional.silu(g) * u, e.w2.mT, offs=offs)

    unfused.experts.forward = forward
    apart = recorded(unfused, lambda: unfused(x)[0])
    assert list(fused) == list(apart) == ["experts.w1", "experts.w2", "experts.w3"]
    for name, record in fused.items():
        assert record["products"] == 1
        for gemm in ("fwd", "dgrad", "wgrad"):
            assert record[gemm]["sqnr"] == pytest.approx(apart[name][gemm]["sqnr"], abs=3)
        for operand in ("activation", "weight"):
            if name != "experts.w2":
                assert record["fwd"][operand] == apart[name]["fwd"][operand]
            assert record["fwd"][operand]["amax"] == pytest.approx(apart[name]["fwd"][operand]["amax"], rel=2**-7)
        for share in ("saturated", "flushed"):
            assert record["wgrad"]["gradient"][share] == pytest.approx(
                apart[name]["wgrad"]["gradient"][share], abs=2e-3
            )


def test_pieces_make_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x, offs = torch.randn(100, D), torch.tensor([7, 7, 90], dtype=torch.int32)
    x *= torch.exp2(torch.randint(-30, 2, x.shape).float())
    parts = slice(0, 32), slice(32, 64)
    for fmt in ("fp8_rowwise", "mxfp8_floor"):
        whole = numerics.of_rows(x, fmt, parts), numerics.of_tokens(x, offs, fmt)
        monkeypatch.setattr(numerics, "_PIECE", 300)
        assert (numerics.of_rows(x, fmt, parts), numerics.of_tokens(x, offs, fmt)) == whole
        monkeypatch.undo()
    assert whole[1].elements == 90 * D
    energies = numerics.energies(x, x + 1)
    monkeypatch.setattr(numerics, "_PIECE", 300)
    assert numerics.energies(x, x + 1) == pytest.approx(energies)
    assert energies.noise == pytest.approx(x.numel(), rel=1e-6)


def test_what_is_not_finite() -> None:
    """A NaN poisons its block: neither saturated nor flushed; amax and SQNR are None, and the line is valid JSON."""
    model = converted("mxfp8_rceil")
    lines = io.StringIO()
    with monitor(model, every=1, writer=lines) as handle:
        x = torch.randn(16, D, dtype=torch.bfloat16)
        x[3, 5] = torch.nan
        model(x, torch.tensor([4, 8, 8, 16], dtype=torch.int32)).sum().backward()
        handle.step()
    record = json.loads(lines.getvalue().splitlines()[0])
    assert record["fwd"]["activation"]["amax"] is record["fwd"]["sqnr"] is None
    assert record["fwd"]["activation"]["saturated"] == 0
    assert record["fwd"]["weight"]["amax"] > 0


def test_no_tokens() -> None:
    record = recorded(model := converted("fp8_rowwise"), lambda: model(torch.zeros(0, D), torch.zeros(G).int()))["up"]
    assert record["fwd"]["activation"] == {"amax": 0, "saturated": 0, "flushed": 0}
    assert record["fwd"]["sqnr"] is None


# ----------------------------------------------------------------------------------------------------------- training


def trained(recipe: str, every: int | None, run: Callable[..., Any], **options: Any) -> tuple[list[Any], list[Any]]:
    """Losses, gradients and final weights of a few steps, and the records."""
    model = converted(recipe, moe, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    records: list[Any] = []
    handle = monitor(model, every, records.append) if every else None
    bits: list[Any] = []
    for _ in range(3):
        x = torch.randn(48, D, dtype=torch.bfloat16, requires_grad=True)
        with cache_weights() if run is cached else contextlib.nullcontext():
            y, balance = run(model, x)
            loss = (y - x).float().square().mean() + 0.01 * balance
            loss.backward()
        bits += [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if handle:
            handle.step()
    if handle:
        handle.close()
    return [*bits, *(p.detach().as_subclass(Tensor) for p in model.parameters())], records


def plain(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def checkpointed(model: nn.Module, x: Tensor) -> Any:
    return checkpoint(model, x, use_reentrant=False)


def checkpointed_reentrant(model: nn.Module, x: Tensor) -> Any:
    return checkpoint(model, x, use_reentrant=True)


def cached(model: nn.Module, x: Tensor) -> Any:
    """Inside of `cache_weights` (`trained`)."""
    return model(x)


@pytest.mark.parametrize("run", [plain, checkpointed, checkpointed_reentrant, cached])
@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *((recipe, {"dtype": torch.bfloat16}) for recipe in RECIPES),
        ("fp8_rowwise", {"dtype": torch.float32}),  # cast on the way to the GEMM
        ("fp8_blockwise", {"dtype": torch.bfloat16, "hidden": 48}),  # three GEMMs
    ],
    ids=[*RECIPES, "cast", "three-gemms"],
)
def test_training_does_not_notice(recipe: str, options: dict[str, Any], run: Callable[..., Any]) -> None:
    """Every bit of losses, gradients and weights; and one product a parameter, however it is checkpointed."""
    unwatched, _ = trained(recipe, None, run, **options)
    watched, records = trained(recipe, 2, run, **options)
    for a, b in zip(unwatched, watched, strict=True):
        assert torch.equal(a, b)
    names = ["experts.w1", "experts.w2", "experts.w3"]
    found = [(record["step"], record["parameter"], record["products"]) for record in records]
    assert found == [(step, name, 1) for step in (0, 2) for name in names]


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"dtype": torch.float32}, {"hidden": 48}])
def test_the_weight_cache_stays_empty(options: dict[str, Any]) -> None:
    """What the monitor makes of the weights in a measured step is not kept there."""
    model = converted("fp8_blockwise", moe, **options)
    with monitor(model, every=1) as handle, cache_weights():
        for _ in range(2):
            model(torch.randn(16, D, dtype=torch.bfloat16))[0].sum().backward()
        assert weight_cache._active is not None
        assert weight_cache._active.entries == {}
        handle.step()
        assert {record["products"] for record in handle.records} == {2}


def test_steps_in_between_pay_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No observer is there, and no observing function is called."""
    model = converted("mxfp8_rceil", moe, dtype=torch.bfloat16)
    x = torch.randn(16, D, dtype=torch.bfloat16)
    with monitor(model, every=3, step=1) as handle:
        monkeypatch.setattr(observe, "_find", lambda weight: pytest.fail("a step that is not measured was observed"))
        for _ in range(2):
            assert not handle.sampling
            assert observe.observers == []
            model(x)[0].sum().backward()
            handle.step()
        monkeypatch.undo()
        assert handle.sampling
        model(x)[0].sum().backward()
        handle.step()
        assert {record["step"] for record in handle.records} == {3}
    assert observe.observers == []


def test_products_of_a_step_count_together() -> None:
    model = converted("mxfp8_floor", moe, dtype=torch.bfloat16)
    batches = torch.randn(2, 32, D, dtype=torch.bfloat16)
    batches[1] *= 8
    one, other = (recorded(model, lambda x=x: model(x)[0])["experts.w1"] for x in batches)
    both = recorded(model, lambda: torch.cat([model(x)[0] for x in batches]))["experts.w1"]
    assert both["products"] == 2
    found, a, b = (record["fwd"]["activation"] for record in (both, one, other))
    assert found["amax"] == max(a["amax"], b["amax"])
    assert found["saturated"] == pytest.approx((a["saturated"] + b["saturated"]) / 2)
    low, high = sorted((one["fwd"]["sqnr"], other["fwd"]["sqnr"]))
    assert low <= both["fwd"]["sqnr"] <= high


def test_frozen_parameters_and_inputs() -> None:
    model = converted("fp8_rowwise")
    model.down.requires_grad_(False)
    offs = torch.tensor([4, 8, 8, 16], dtype=torch.int32)
    found = recorded(model, lambda: model(torch.randn(16, D, dtype=torch.bfloat16), offs))
    assert [gemm for gemm in ("fwd", "dgrad", "wgrad") if gemm in found["up"]] == ["fwd", "wgrad"]
    assert [gemm for gemm in ("fwd", "dgrad", "wgrad") if gemm in found["down"]] == ["fwd", "dgrad"]


def test_names_of_joined_and_single_experts() -> None:
    model = converted("mxfp8_rceil")
    x, offs = torch.randn(16, D, dtype=torch.bfloat16), torch.tensor([4, 8, 8, 16], dtype=torch.int32)
    joined = recorded(model, lambda: torch._grouped_mm(x, torch.cat([model.up, model.down], 1).mT, offs=offs))
    assert list(joined) == ["up + down"]
    assert list(recorded(model, lambda: nn.functional.linear(x, model.down[1]))) == ["down"]


def test_another_models_weights_are_left_alone() -> None:
    model, other = converted("fp8_rowwise"), converted("fp8_rowwise")
    x, offs = torch.randn(16, D, dtype=torch.bfloat16), torch.tensor([4, 8, 8, 16], dtype=torch.int32)
    assert recorded(model, lambda: other(x, offs) + model(x, offs)).keys() == {"up", "down"}
    with monitor(model, every=1) as one, monitor(other, every=1) as two:
        other(x, offs).sum().backward()
        one.step()
        two.step()
        assert (one.records, len(two.records)) == ([], 2)


def test_no_grad_is_not_measured(caplog: pytest.LogCaptureFixture) -> None:
    model = converted("fp8_rowwise")
    with monitor(model, every=1) as handle, torch.no_grad():
        model(torch.randn(16, D, dtype=torch.bfloat16), torch.tensor([4, 8, 8, 16], dtype=torch.int32))
        handle.step()
        handle.step()
    assert handle.records == []
    assert caplog.text.count("step 0 had no product with a gradient of up, down") == 1
    assert "step 1" not in caplog.text  # once


def test_compiled(caplog: pytest.LogCaptureFixture) -> None:
    """A warning, and the fix that it names; no recompilation when a step is measured."""
    model = converted("mxfp8_rceil", moe, dtype=torch.bfloat16)
    traced = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend)
    x = torch.randn(16, D, dtype=torch.bfloat16)
    compiled(x)[0].sum().backward()
    graphs = len(traced)
    with monitor(model, every=1) as handle:
        compiled(x)[0].sum().backward()
        handle.step()
        assert handle.records == []
        assert 'torch.compiler.set_stance("force_eager")' in caplog.text
        with torch.compiler.set_stance("force_eager" if handle.sampling else "default"):
            compiled(x)[0].sum().backward()
        handle.step()
        assert [record["parameter"] for record in handle.records] == ["experts.w1", "experts.w2", "experts.w3"]
    assert len(traced) == graphs
    caplog.clear()
    monitor(compiled).close()
    assert "monitor: model is compiled" in caplog.text


# ------------------------------------------------------------------------------------------------- writers and the API


def test_writers(tmp_path: Path) -> None:
    model = converted("mxfp8_rceil")
    x, offs = torch.randn(16, D, requires_grad=True), torch.tensor([4, 8, 8, 16], dtype=torch.int32)

    class SummaryWriter:
        scalars: dict[str, tuple[float, int]]

        def __init__(self) -> None:
            self.scalars = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.scalars[tag] = scalar_value, global_step

    board, file, records = SummaryWriter(), io.StringIO(), []
    path = tmp_path / "numerics.jsonl"
    path.write_text('{"step": -1}\n')
    for writer in (board, file, records.append, path):
        with monitor(model, every=5, writer=writer, step=10) as handle:
            model(x, offs).float().sum().backward()
            handle.step()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": -1}, *records]  # appended
    assert [json.loads(line) for line in file.getvalue().splitlines()] == records
    assert board.scalars["up/fwd/sqnr"] == (records[0]["fwd"]["sqnr"], 10)
    assert board.scalars["down/dgrad/gradient/flushed"] == (records[1]["dgrad"]["gradient"]["flushed"], 10)
    assert len(board.scalars) == 2 * 3 * (1 + 2 * 3)


def test_close_and_errors(tmp_path: Path) -> None:
    model = converted("fp8_rowwise")
    handle = monitor(model, writer=tmp_path / "numerics.jsonl")
    handle.close()
    handle.close()
    assert observe.observers == []
    with pytest.raises(ValueError, match="this monitor is closed"):
        handle.step()
    with pytest.raises(ValueError, match="model has no converted parameter; call quantize_"):
        monitor(Experts())
    for arguments, message in (
        ({"every": 0}, "every=0 is not a positive number of steps"),
        ({"step": -1}, "step=-1 is no step's number"),
        ({"writer": 3}, "writer=3 is no path, file, SummaryWriter or function"),
    ):
        with pytest.raises(ValueError, match=message):
            monitor(model, **arguments)
    with pytest.raises(OSError, match="No such file"):
        monitor(model, writer=tmp_path / "missing" / "numerics.jsonl")
    assert observe.observers == []


def test_an_error_in_a_measured_step_ends_the_measuring() -> None:
    model = converted("fp8_rowwise")
    with pytest.raises(ValueError, match="K=48"), monitor(model):
        model(torch.randn(16, 48, dtype=torch.bfloat16), torch.tensor([4, 8, 8, 16], dtype=torch.int32))
    assert observe.observers == []


def test_double_backward_is_refused() -> None:
    model = converted("fp8_rowwise")
    x = torch.randn(16, D, dtype=torch.bfloat16, requires_grad=True)
    with monitor(model):
        out = model(x, torch.tensor([4, 8, 8, 16], dtype=torch.int32))
        (gradient,) = torch.autograd.grad(out.float().square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            gradient.sum().backward()


def test_logger_is_the_modules(caplog: pytest.LogCaptureFixture) -> None:
    model = converted("fp8_rowwise")
    with monitor(model, every=1) as handle:
        handle.step()
    assert caplog.record_tuples[0][:2] == ("xmoe.torch_backend.monitor", logging.WARNING)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu(recipe: str) -> None:
    """The same bits; measured steps count what the emulation counts, and the others never wait for the device."""

    def run(watched: bool) -> tuple[list[Tensor], list[Any]]:
        model = converted(recipe, moe, dtype=torch.bfloat16).cuda()
        records: list[Any] = []
        handle = monitor(model, 2, records.append) if watched else None
        bits: list[Tensor] = []
        for step in range(4):
            x = torch.randn(256, D, dtype=torch.bfloat16).cuda().requires_grad_()
            torch.cuda.set_sync_debug_mode("error" if step == 3 else "default")  # an odd step, everything compiled
            try:
                model(x)[0].float().square().mean().backward()
                if handle and step == 3:
                    handle.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            bits += [x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
            if handle and step < 3:
                handle.step()
        if handle:
            handle.close()
        return bits, records

    unwatched, _ = run(False)
    watched, records = run(True)
    assert all(torch.equal(a, b) for a, b in zip(unwatched, watched, strict=True))
    assert [record["step"] for record in records] == [0, 0, 0, 2, 2, 2]
    if recipe != "bf16":
        assert all(25 < record[gemm]["sqnr"] < 33 for record in records for gemm in ("fwd", "dgrad"))
