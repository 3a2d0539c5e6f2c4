"""The command line: every wrong input ends in one line that says what to do, and a status that is not zero."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from xmoe import cli
from xmoe.config import RECIPES
from xmoe.train import run
from xmoe.train.config import TrainConfig

TINY = ("--steps=4", "--batch-size=2", "--seq-len=32", "--device=cpu", "--checkpoint-every=2")
SETTINGS = "[train]\nlayers = 1\ndim = 32\nheads = 2\nnum_experts = 4\nhidden_dim = 32\neval_batches = 2\n"


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(SETTINGS)
    return path


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    status = cli.main(["train", *map(str, arguments)])
    captured = capsys.readouterr()
    assert status == 1
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("xmoe: error: ")
    return captured.err


def test_bad_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out", "--device", "cpu")
    missing = tmp_path / "missing.txt"
    assert f"{missing}: No such file or directory; give readable" in error_of(capsys, *out, "--data", missing)
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert f"{empty}: the file is empty" in error_of(capsys, *out, "--data", empty)
    empty.write_text("not much")
    assert "holds 8 bytes, too short for --seq-len 128" in error_of(capsys, *out, "--data", empty)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "bf16,fp4"], "recipes: 'fp4' is not known; use bf16, fp8_rowwise, "),
        (["--recipe", ""], "recipes: '' is not known; use bf16, fp8_rowwise, "),
        (["--framework", "jax"], "--framework 'jax' is not known; use torch, flax or both"),
        (["--framework", ""], "--framework '' is not known; use torch, flax or both"),
        (["--kernel-preference", "cuda"], "kernel_preference: 'cuda' is not known; use auto, triton, torch, emulated"),
        (["--compute-dtype", "fp8"], "compute_dtype: 'fp8' is not known; use bfloat16, float32"),
        (["--steps", "0"], "steps=0 must be above 0"),
        (["--kernel-preference", "triton"], "kernel_preference=triton cannot run bf16 on cpu"),
        (["--kernel-preference", "triton", "--recipe", "mxfp8_rceil"], "triton cannot run mxfp8_rceil on cpu"),
        (["--resume"], "holds no checkpoint of these runs; leave --resume out"),
        (["--config", "no.toml"], "no.toml: No such file or directory; give a readable TOML file"),
    ],
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:  # fmt: skip
    assert message in error_of(capsys, "--device", "cpu", "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_bad_key_in_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: Path) -> None:
    settings.write_text(SETTINGS + "expert_count = 8\n")
    message = error_of(capsys, "--config", settings, "--out", tmp_path / "out", "--device", "cpu")
    assert f"{settings}: unknown key expert_count; the keys are frameworks, recipes, " in message


def test_place_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path) -> None:
    message = error_of(capsys, *TINY, "--data", text_file, "--out", text_file / "inside")
    assert f"cannot write {text_file / 'inside'}: Not a directory; choose another --out" in message


def test_missing_package(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module, extra, arguments in (("flax", "flax", ["--framework", "flax"]), ("rich", "train", [])):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
        monkeypatch.setattr("importlib.util.find_spec", lambda name, gone=module: None if name == gone else object())
        message = error_of(capsys, "--device", "cpu", *arguments)
        assert f'{module} not installed; run: pip install "xmoe[{extra}]"' in message


def test_options_go_before_the_file_and_the_file_before_the_preset(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Path
) -> None:
    configs: list[TrainConfig] = []
    monkeypatch.setattr(run, "run", lambda config, *_, **__: configs.append(config) or sys.exit(0))
    settings.write_text(SETTINGS + "steps = 11\nseed = 5\n")
    arguments = f"--config {settings} --preset base --steps 12 --framework both --device cpu".split()
    with pytest.raises(SystemExit):
        cli.main(["train", *arguments, "--recipe", "bf16, fp8_rowwise", "--data", "a", "b", "--data", "c"])
    (config,) = configs
    assert config.data == tuple(str(Path(name).absolute()) for name in "abc")
    assert (config.steps, config.seed, config.dim, config.batch_size) == (12, 5, 32, 64)
    assert (config.frameworks, config.recipes) == (("torch", "flax"), ("bf16", "fp8_rowwise"))


@pytest.mark.parametrize(
    ("answers", "device", "message"),
    [
        ({"torch": "cuda", "flax": "cuda"}, "auto", None),
        ({"torch": "cpu", "flax": "cpu"}, "auto", None),
        ({"torch": "cuda", "flax": "cpu"}, "auto", "flax finds no NVIDIA GPU; install a CUDA build of jax"),
        ({"torch": "cpu"}, "cuda", "torch finds no NVIDIA GPU; install a CUDA build of torch, or add --device cpu"),
    ],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, answers: dict[str, str], device: str, message: str | None) -> None:
    capabilities = {"cuda": (9, 0), "cpu": None}

    def probe(_: str, framework: str, **__: object) -> str:
        kind = answers[framework]
        return f"a library's chatter\n{json.dumps([kind, capabilities[kind]])}\n"

    monkeypatch.setattr(run, "_worker", probe)
    if message:
        with pytest.raises(run.UserError, match=message):
            run.find_devices(tuple(answers), device)
        return
    devices = run.find_devices(tuple(answers), device)
    assert devices == {framework: (kind, capabilities[kind]) for framework, kind in answers.items()}
    gemms = run.check_recipes(TrainConfig(recipes=RECIPES), devices)
    assert gemms == ({"emulated", "triton"} if "cuda" in answers.values() else {"emulated"})


def test_a_gpu_with_kernels_gets_the_larger_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[TrainConfig] = []
    monkeypatch.setattr(run, "run", lambda config, *_, **__: configs.append(config) or sys.exit(0))
    for kind, capability, dim in (("cuda", (9, 0), 512), ("cuda", (8, 0), 128), ("cpu", None, 128)):
        monkeypatch.setattr(run, "find_devices", lambda *_, found=(kind, capability): {"torch": found})
        with pytest.raises(SystemExit):
            cli.main(["train"])
        assert configs.pop().dim == dim


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    (commands,) = (a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert {"train", "bench", "doctor", "parity"} == set(commands.choices)
    for arguments, parser in (([], cli._parser()), *(([name], parser) for name, parser in commands.choices.items())):
        with pytest.raises(SystemExit, match="0"):
            cli.main([*arguments, "--help"])
        lines = [line.split() for line in capsys.readouterr().out.split("\noptions:\n")[1].splitlines()]
        described = {word.rstrip(",") for words in lines for word in words[:3]}
        for action in parser._actions:
            assert set(action.option_strings) <= described
            assert action.help or not action.option_strings, action


def test_a_path_with_a_nul_character(capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("--data", "--out", "--config"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["train", option, "a\0b"])
        assert f"argument {option}: a path holds no NUL character" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, "--xla_gpu_deterministic_ops=true"),
        ("--xla_a=1", "--xla_a=1 --xla_gpu_deterministic_ops=true"),
        ("--xla_gpu_deterministic_ops=false", "--xla_gpu_deterministic_ops=false"),
    ],
)
def test_workers_are_deterministic(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    if before:
        monkeypatch.setenv("XLA_FLAGS", before)
    environment = run.worker_environment()
    assert (environment["XLA_FLAGS"], environment["CUBLAS_WORKSPACE_CONFIG"]) == (after, ":4096:8")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert run.worker_environment()["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_reader_that_has_gone() -> None:
    """As in `xmoe doctor --json | true`."""
    code = (
        "import sys; from xmoe import cli; cli._doctor = lambda _: print('x' * 9) or 0; sys.exit(cli.main(['doctor']))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


HEARS_CTRL_C = (
    "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "runpy.run_module('xmoe', run_name='__main__')"
)
"""``python -m xmoe``, also where a shell has started the tests in the background, which makes them ignore Ctrl-C."""


def xmoe(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HEARS_CTRL_C, *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


# Each of these starts processes that import torch: a few seconds.


def test_the_whole_command(tmp_path: Path, text_file: Path, settings: Path) -> None:
    """Both runs in their own processes; then a resume that has nothing left to do; then other settings."""
    out = tmp_path / "out"
    arguments = [
        "train",
        *TINY,
        "--config",
        settings,
        "--data",
        text_file,
        "--out",
        out,
        "--recipe",
        "bf16,fp8_rowwise",
    ]
    process = xmoe(*arguments)
    stdout, stderr = process.communicate(timeout=120)
    assert (process.returncode, stderr) == (0, "")
    assert stdout.endswith(f"curves: {out / 'loss.png'}\n")
    assert "held-out loss" in stdout
    assert {path.name for path in out.iterdir()} == {
        "config.toml", "metrics.jsonl", "loss.png", "torch-bf16", "torch-fp8_rowwise",
    }  # fmt: skip
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(line["recipe"], line["step"]) for line in lines if "loss" in line] == [
        (recipe, step) for recipe in ("bf16", "fp8_rowwise") for step in range(1, 5)
    ]
    assert TrainConfig.load(out / "config.toml").recipes == ("bf16", "fp8_rowwise")

    before = (out / "torch-bf16" / "result.json").stat().st_mtime_ns
    assert cli.main(["train", "--out", str(out), "--resume"]) == 0
    assert (out / "torch-bf16" / "result.json").stat().st_mtime_ns == before


def test_other_settings_do_not_mix(capsys: pytest.CaptureFixture[str], tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    (out / "torch-bf16").mkdir(parents=True)
    (out / "torch-bf16" / "result.json").touch()
    config = TrainConfig(data=(str(text_file),), device="cpu", recipes=("bf16",))
    (out / "config.toml").write_text(config.to_toml())
    common = ("--out", out, "--data", text_file, "--device", "cpu", "--recipe", "bf16", "--seed", 1)
    message = error_of(capsys, *common)
    assert "holds runs with other settings (seed 0, now 1); choose another --out, or add --overwrite" in message
    message = error_of(capsys, *common, "--resume")
    assert "holds runs with other settings (seed 0, now 1); use the same settings" in message


def test_ctrl_c_ends_quietly_and_can_be_resumed(tmp_path: Path, text_file: Path, settings: Path) -> None:
    out = tmp_path / "out"
    arguments = [*TINY, "--steps=100000", "--config", settings, "--data", text_file, "--out", out, "--recipe", "bf16"]
    process = xmoe("train", *arguments)
    metrics = out / "torch-bf16" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped after step" in stderr
    assert "Traceback" not in stderr
    assert (out / "torch-bf16" / "checkpoint.safetensors").exists()


def test_full_disk_in_a_worker(tmp_path: Path, text_file: Path, settings: Path) -> None:
    """A real limit on the size of files stands in for the full disk: the write of the checkpoint fails midway."""
    out = tmp_path / "out"
    arguments = [*TINY, "--config", settings, "--data", text_file, "--out", out, "--recipe", "bf16"]
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); "
    main = "from xmoe.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limit + main, "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert result.returncode == 1
    checkpoint = out / "torch-bf16" / "checkpoint.safetensors"
    assert result.stderr == (
        f"xmoe: error: cannot write {checkpoint}: File too large; free some space, or choose another --out\n"
    )
    assert {path.name for path in (out / "torch-bf16").iterdir()} == {"metrics.jsonl"}
