"""`xmoe bench`: what is wrong is one line, and what was recorded is printed."""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from xmoe import cli
from xmoe.bench import options, run
from xmoe.bench.report import BEGIN, END

ROOT = Path(__file__).parent.parent.parent
RECORDED = ROOT / "benchmarks" / "results" / "2026-11-21-grouped_mm.json"


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a failing command prints."""
    status = cli.main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("xmoe: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["grouped-mm", "--shapes", "gpt2"],
            "--shapes: 'gpt2' is not known; use a name or the start of one: llama4_g1",
        ),
        (["layer", "--shapes", "gpt2"], "the start of one: llama4_scout, deepseek_v3, qwen3_30b_a3b"),
        (
            ["quantize", "--shapes", "no.toml"],
            "--shapes: no.toml: No such file or directory; give a readable TOML file",
        ),
        (["grouped-mm", "--recipes", "fp4"], "--recipes: 'fp4' is not known; use bf16, fp8_rowwise"),
        (["layer", "--peers", "tokamax"], "--peers: 'tokamax' is not a peer of layer; use torch, torchao"),
        (["layer", "--rounds", "0"], "--rounds 0: give 1 or more"),
        (["report", "no.json"], "no.json: No such file or directory; give a result file of xmoe bench"),
    ],
)
def test_errors(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    out = [] if arguments[0] == "report" else ["--out", tmp_path / "out"]
    assert message in error_of(capsys, *arguments, *out)
    assert not (tmp_path / "out").exists()


def test_a_peer_that_is_not_installed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_is_installed", lambda package: package == "torch")
    message = error_of(capsys, "grouped-mm", "--peers", "torch,jax")
    assert '--peers: jax is not installed; run: pip install "xmoe[jax,cuda]"' in message


def test_out_that_cannot_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = error_of(capsys, "quantize", "--out", tmp_path / "file" / "inside")
    assert f"cannot write {tmp_path / 'file' / 'inside'}: Not a directory; choose another --out" in message


def test_options_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[options.Options, Path]] = []
    monkeypatch.setattr(run, "run", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(options, "_is_installed", lambda package: package in ("torch", "jax"))
    monkeypatch.chdir(tmp_path)
    arguments = "grouped-mm --shapes qwen3 --recipes bf16,fp8_rowwise --compile --rounds 2"
    assert cli.main(["bench", *arguments.split()]) == 0
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    assert cli.main(["bench", "quantize", "--shapes", "qwen3"]) == 0
    for command in ("layer", "overhead"):
        assert cli.main(["bench", command, "--rounds", "3"]) == 0
    (first, out), (second, checkout), (third, _), (fourth, _) = asked
    assert (first.command, first.recipes, first.peers) == ("grouped-mm", ("bf16", "fp8_rowwise"), ("torch", "jax"))
    assert (first.compile, first.rounds, out) == (True, 2, Path("runs/bench"))
    assert (second.peers, second.compile, checkout) == ((), False, Path("benchmarks/results"))
    given = [(o.command, o.rounds) for o in (second, third, fourth)]
    assert given == [("quantize", 5), ("layer", 3), ("overhead", 3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path: Path) -> None:
    """The worker says so, whichever command has started it."""
    result = subprocess.run(
        [sys.executable, "-m", "xmoe", "bench", "grouped-mm", "--out", str(tmp_path)],
        cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "xmoe: error: xmoe bench measures an NVIDIA GPU and torch finds none" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["bench", "report", str(RECORDED)]) == 0
    assert capsys.readouterr().out == RECORDED.with_suffix(".md").read_text()
    (tmp_path / "results").mkdir()
    copy = Path(shutil.copy(RECORDED, tmp_path / "results" / "run.json"))
    readme = tmp_path / "README.md"
    readme.write_text(f"# x\n{BEGIN}\n{END}\n")
    assert cli.main(["bench", "report", str(copy), "--readme", str(readme)]) == 0
    assert "(results/run.md)" in readme.read_text()
    readme.write_text("# x\n")
    capsys.readouterr()
    assert "add the lines <!-- speed: begin -->" in error_of(capsys, "report", copy, "--readme", readme)


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    def commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
        (found,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        return dict(found.choices)

    whats = commands(commands(cli._parser())["bench"])
    assert set(whats) == {*options.COMMANDS, "report"}
    assert set(cli._BENCH_COMMANDS) == set(options.COMMANDS)
    for name, parser in whats.items():
        with pytest.raises(SystemExit, match="0"):
            cli.main(["bench", name, "--help"])
        text = capsys.readouterr().out
        for action in parser._actions:
            assert action.help
            assert all(option in text for option in action.option_strings)
        peers = next((action.help or "" for action in parser._actions if "--peers" in action.option_strings), "")
        assert all(peer in peers for peer in options.PEERS_OF.get(name, ()))
