"""`xmoe doctor`: what it says about this machine, and what it would about others."""

import json
import os
import subprocess
import sys

import pytest

import xmoe
from xmoe.config import LINEAR_RECIPES, RECIPES
from xmoe.kernels import doctor
from xmoe.kernels.dispatch import Device


def test_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it on this machine; the version is there in a bare checkout too, which has no metadata."""
    find = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda package: None if package == "xmoe" else find(package))
    assert doctor.run(json=True) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["xmoe"] == xmoe.__version__
    assert [row["recipe"] for row in facts["recipes"]] == list(RECIPES)
    assert [row["recipe"] for row in facts["linears"]] == list(LINEAR_RECIPES)
    assert facts["jax_finds"].endswith(("(cpu)", "(gpu)"))
    monkeypatch.setattr(doctor, "report", lambda: facts)
    doctor.run()
    text = capsys.readouterr().out
    assert f"JAX       {facts['jax_finds']}\n" in text
    assert f"xmoe {xmoe.__version__}" in text


def test_only_another_process_loads_jax() -> None:
    code = "import sys; from xmoe.kernels import doctor; doctor.report(); print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "False\n", done.stderr


def test_jax_that_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "no_such_platform")
    assert "no_such_platform" in (doctor.jax_devices() or "")
    monkeypatch.setattr(doctor, "_version", lambda _: None)
    assert doctor.jax_devices() is None


@pytest.mark.parametrize(
    ("found", "torch_has_gpu", "has_plugin", "advice"),
    [
        (None, True, False, 'pip install "xmoe[jax]"'),
        ("cpu (cpu)", False, False, None),
        ("NVIDIA H200 (gpu)", True, True, None),
        ("cpu (cpu)", True, False, 'pip install "xmoe[cuda]"'),
        ("RuntimeError: no cuDNN", True, True, "though it has a CUDA plugin"),
        ("NVIDIA H200 (gpu)", False, True, "install the CUDA build of torch"),
    ],
)
def test_jax_advice(found: str | None, torch_has_gpu: bool, has_plugin: bool, advice: str | None) -> None:
    given = doctor.jax_advice(found, torch_has_gpu, has_plugin)
    assert given == [] if advice is None else (len(given) == 1 and advice in given[0])


@pytest.mark.parametrize("device", [Device("cpu"), Device("cuda", (8, 0)), Device("cuda", (9, 0), triton=False)])
def test_no_advice_to_take_auto_where_auto_is_emulated(device: Device) -> None:
    for row in doctor.table(device):
        assert row["by_preference"]["auto"] == "emulated"
        assert "kernel_preference=auto" not in row["advice"]


def test_linears() -> None:
    """On a Hopper GPU with Triton: rowwise by the grouped GEMM's kernels, tensorwise by cuBLAS."""
    names = {row["recipe"]: row["name"] for row in doctor.linear_table(Device("cuda", (9, 0)))}
    assert (names["rowwise"], names["tensorwise"]) == ("triton-fp8", "torch-tensorwise")
    assert names["mxfp8_emulated"] == "emulated"
    assert {row["name"] for row in doctor.linear_table(Device("cpu"))} == {"emulated"}
