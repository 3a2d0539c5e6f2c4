"""The kernels' own path of the benchmark: in Triton's interpreter, and on a GPU."""

import dataclasses

import pytest
import torch

from tests.bench.conftest import Events
from tests.kernels.backends import INTERPRETER_WORKS
from xmoe import RECIPES, config_from_recipe
from xmoe.bench.exactness import WrongResult
from xmoe.bench.options import COMMANDS, Options
from xmoe.bench.report import BOTH, FORWARD
from xmoe.bench.results import BF16
from xmoe.kernels import call, e4m3, pipeline, stages
from xmoe.kernels.dispatch import Device
from xmoe.operands import FORMATS
from xmoe.shapes import LayerShape, Shape
from xmoe.torch_backend.bench.exactness import compare
from xmoe.torch_backend.bench.grouped_mm import operands
from xmoe.torch_backend.bench.quantize import check_bytes
from xmoe.torch_backend.bench.run import CudaMemory, CudaTimer, measure_all

HOPPER = Device("cuda", (9, 0))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipeline of sm_90, its kernels interpreted."""
    if e4m3.HARDWARE or not INTERPRETER_WORKS:
        pytest.skip("for a working interpreter")
    monkeypatch.setattr(call, "programs", lambda index: 3)
    monkeypatch.setattr(pipeline, "device_of", lambda *_: HOPPER)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("format", FORMATS)
def test_quantizers(format: str) -> None:
    """What the kernels write is what the emulation says, and a byte more or less is seen."""
    A, B, offs, _ = operands(Shape("s", 200, 64, 48, 3), torch.device("cpu"))
    found = {stage.name: stage for stage in stages.quantizers(config_from_recipe(format), A, B.mT, offs)}
    names = {"rows", "tokens", "rows and tokens", "weights K", "weights N"}
    if format.startswith("mxfp8"):
        names |= {"rows as bf16", "tokens, straight", "rows as bf16 and tokens, straight"}
        names |= {"weights K as bf16", "weights N as bf16"}
    assert set(found) == names
    for stage in found.values():
        assert check_bytes(stage).note == "equal bytes"
        moved = sum(x.nbytes for x in (stage.source, *stage.outputs))
        assert stage.nbytes == moved > stage.source.nbytes * 1.4
    idle = dataclasses.replace(found["tokens"], launch=lambda: None)
    with pytest.raises(WrongResult, match="bytes of output 0"):
        check_bytes(idle)


@pytest.mark.usefixtures("hopper")
def test_prepared_gemm() -> None:
    """Twice, so that a stale tile map would show; the interpreter truncates its bf16 outputs, worth 40 dB."""
    A, B, offs, ends = operands(Shape("s", 200, 64, 48, 3), torch.device("cpu"))
    gemm = stages.prepared_gemm(config_from_recipe("fp8_rowwise"), A, B.mT, offs)
    reference = {"out": torch._grouped_mm(A, B.mT, offs)}
    for _ in range(2):
        gemm.out.fill_(float("nan"))
        gemm.launch()
        assert compare({"out": gemm.out}, reference, ends, 27).sqnr < 31
    a, a_scale, b, b_scale = gemm.operands
    assert (a.shape, b.shape) == ((200, 48), (3, 64, 48))
    assert a_scale is not None
    assert b_scale is not None


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # inductor warns about torch, itself and the GPU
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "overhead"])
def test_on_a_gpu(command: str, compiled: bool) -> None:
    """Every recipe is right, timed, and its memory counted."""
    shape = LayerShape("s", 1024, 512, 256, 4, 2) if command == "layer" else Shape("s", 2048, 512, 256, 4)
    recipes = tuple(recipe for recipe in RECIPES if "emulated" not in recipe)
    if compiled:
        recipes = ("bf16", "fp8_rowwise")
    device, events = torch.device("cuda", 0), Events()
    options = Options(command, (shape,), recipes, ("torch",), compile=compiled and command != "quantize", rounds=2)
    sizes = {"M": 4096, "N": 1024, "K": 1024, "copy_bytes": 2**26}
    measure_all(options, device, CudaTimer(device, 5), CudaMemory(device), events, ceiling_sizes=sizes)
    rows = events.rows()
    assert rows
    assert events.of("note") == []
    for (table, _, system, _), row in rows.items():
        if system == "torch._scaled_grouped_mm" and torch.cuda.get_device_capability()[0] != 9:
            continue
        assert row.ms, (system, row.note)
        assert len(row.rounds_ms) == 2
        assert row.peak_bytes is not None
        if table not in (FORWARD, "quantizers"):
            assert row.saved_bytes_per_token is not None
    if command == "grouped-mm":  # A in bf16; its wgrad operand in 8 bits, each of 4 groups padded to 128 tokens
        assert rows[BOTH, "s", BF16, False].saved_bytes_per_token == 2 * 256
        saved = rows[BOTH, "s", "xmoe fp8_rowwise", False].saved_bytes_per_token
        assert saved is not None
        assert 256 <= saved <= 256 * 1.3 + 16
