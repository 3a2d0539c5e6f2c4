"""``xmoe parity``: the contract holds here, a broken one is found and told, and training runs are compared."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xmoe import cli, oracle, testing
from xmoe.config import config_from_recipe
from xmoe.jax_frontend.learner import FlaxLearner
from xmoe.jax_frontend.tracer import FlaxTracer
from xmoe.kernels import emulation
from xmoe.kernels.dispatch import Device, select
from xmoe.parity import contract, report, run, systems, worker
from xmoe.parity.layouts import from_scale_tiles, tokens_operand
from xmoe.parity.training import Run, compare_training
from xmoe.parity.training_report import chart, lines, plain
from xmoe.shapes import ALL
from xmoe.testing import as_numpy, assert_same_bytes, gemm
from xmoe.torch_backend.learner import TorchLearner
from xmoe.torch_backend.tracer import TorchTracer
from xmoe.train.config import TrainConfig
from xmoe.train.data import load_corpus

DOCS = Path(__file__).parent.parent.parent / "docs" / "parity.md"
CASES = [
    case
    for case in run.make_cases([ALL["least_features"]])
    if case.name.endswith(("/uneven/normal", "/empty/normal", "/short/tiny", "/short/huge", "/short/poisoned"))
]


@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "mxfp8_rceil_wgrad_with_hp"])
def test_the_contract_holds_on_a_cpu(recipe: str) -> None:
    findings = run.compare_recipe(recipe, CASES, "cpu")
    assert [f.array for f in findings if not f.holds] == []
    pairs = {f.pair for f in findings if f.what == "results"}
    assert len(pairs) == 6
    bridged = [f for f in findings if f.pair == ("torch-emulated", "jax-bridge") and f.what == "results"]
    assert [(f.rule, f.equal) for f in bridged] == [(contract.SAME_CODE, len(CASES))] * 3
    arrays = {f.array for f in findings if f.what == "operands"}
    assert len(arrays) == {"bf16": 0, "fp8_rowwise": 12}.get(recipe, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["bf16", "fp8_rowwise", "fp8_blockwise", "mxfp8_rceil", "mxfp8_floor_wgrad_with_hp"])
def test_the_contract_holds_on_a_gpu(recipe: str) -> None:
    findings = run.compare_recipe(recipe, run.make_cases([ALL["short_block_of_128"]]), "auto")
    assert [(f.pair, f.array, str(f.worst)) for f in findings if not f.holds] == []
    assert ("torch-triton", "jax-bridge") in {f.pair for f in findings if f.rule is contract.SAME_CODE}


class Spoiled:
    """The oracle, with one element of one array wrong."""

    name, runs = "jax", "spoiled"

    def __init__(self, array: str, value: float) -> None:
        self._oracle, self._array, self._value = systems.Oracle(config_from_recipe("fp8_rowwise")), array, value

    def operands(self, inputs: testing.Gemm) -> dict[str, Any]:
        made = self._oracle.operands(inputs)
        if self._array in made:
            made[self._array].data[1, 2] = self._value
        return made

    def results(self, inputs: testing.Gemm) -> dict[str, Any]:
        results = self._oracle.results(inputs)
        if self._array in results:
            results[self._array][1, 2] = self._value
        return results


@pytest.mark.parametrize(
    ("array", "value", "told"),
    [
        ("A rows", 3.25, "A rows data of least_features/uneven/normal: 1 of 640 elements differ"),
        ("out", np.nan, "out of least_features/uneven/normal: 1 of 640 elements differ, -inf dB; worst [1, 2]: "),
    ],
)
def test_a_broken_contract_is_found_and_told(array: str, value: float, told: str) -> None:
    pair = [systems.Oracle(config_from_recipe("fp8_rowwise")), Spoiled(array, value)]
    cases = [case for case in CASES if case.name.endswith("normal")]
    findings = run.compare_systems("fp8_rowwise", pair, cases)
    assert [f.array.split(" data")[0] for f in findings if not f.holds] == [array]
    text = "\n".join(report.lines(findings))
    assert "BROKEN" in text
    assert told in text
    facts = json.loads(report.dumps(report.to_json(findings, cases, [])))
    assert facts["holds"] is False
    (broken,) = (f for f in facts["findings"] if not f["holds"])
    assert (broken["worst"]["index"], len(broken["broken_cases"])) == ([1, 2], 2)
    assert len(broken["worst"]["bytes"][1]) == (2 if array == "A rows" else 16)


def test_the_table_of_the_docs() -> None:
    assert contract.contract_table() in DOCS.read_text()
    for name, what in contract.SYSTEMS.items():
        assert f"- `{name}`: {what}" in DOCS.read_text()


def test_the_command(tmp_path: Path) -> None:
    """In a process of its own, as users start it, with the JSON that CI reads."""
    path = tmp_path / "parity.json"
    arguments = ["parity", "--recipe", "mxfp8_rceil", "--shapes", "least_features", "--device=cpu", f"--json={path}"]
    done = subprocess.run([sys.executable, "-m", "xmoe", *arguments], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("the contract holds\n")
    facts = json.loads(path.read_text())
    assert facts["holds"] is True
    assert len(facts["cases"]) == 10
    assert {tuple(f["pair"]) for f in facts["findings"]} >= {("oracle", "jax"), ("torch-emulated", "jax-bridge")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "bf16,fp4"], "--recipe 'fp4' is not known; use all, bf16, "),
        (["--shapes", "odd"], "--shapes 'odd' is not known; use llama4_g1, "),
        (["--dtype", "float16"], "--dtype 'float16' is not known; use bfloat16 or float32"),
        (["--device", "tpu"], "--device 'tpu' is not known; use auto or cpu"),
        (["--train", "--steps", "0"], "--steps 0: give 1 or more"),
        (["--seed", "-1"], "--seed -1: give 0 or more"),
    ],
)
def test_wrong_options(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["parity", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"xmoe: error: {message}")
    assert (captured.out, captured.err.count("\n")) == ("", 1)


def test_a_broken_contract_is_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pair = [systems.Oracle(config_from_recipe("fp8_rowwise")), Spoiled("out", 1e6)]
    monkeypatch.setattr(run, "find_systems", lambda config, device: pair)
    options = worker.make_options(recipe="fp8_rowwise", shapes="least_features")
    assert worker.main(json.dumps(dataclasses.asdict(options))) == 1
    assert capsys.readouterr().out.endswith("the contract is BROKEN for fp8_rowwise\n")


# ------------------------------------------------------------------------------------------------------ saved operands


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("recipe", ["fp8_rowwise", "fp8_blockwise", "mxfp8_rceil"])
def test_saved_tokens_of_every_gpu(recipe: str, capability: tuple[int, int]) -> None:
    """What a forward saves there, made of the oracle's operand, is the oracle's operand again."""
    config, inputs = config_from_recipe(recipe), gemm(ALL["short_block_of_128"], "short")
    layout = select(config, Device("cuda", capability))
    want = oracle.quantize_tokens(inputs.A, inputs.offs, recipe)
    data, scale, M = want.data, want.scale, len(inputs.A)
    if layout.straight_tokens:
        data, scale = oracle.tokens_to_rows(data, inputs.offs, M), scale.T
    elif layout.scale_tiles:
        byte = torch.from_numpy(np.ascontiguousarray(scale).view(np.uint8).copy())
        scale = as_numpy(emulation.to_scale_tiles(byte.view(torch.float8_e8m0fnu)))
        assert_same_bytes(from_scale_tiles(scale, *want.scale.shape), np.ascontiguousarray(want.scale))
    elif layout.warp_specialized:
        scale = scale.T
    assert_same_bytes(tokens_operand(data, scale, inputs.offs, M, recipe, layout), want)


# ------------------------------------------------------------------------------------------------------------- training


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two steps of a tiny model in both frameworks."""
    path = tmp_path_factory.mktemp("parity") / "text.py"
    path.write_bytes(b"".join(b"def f%d(x): return x + %d\n" % (i, i * i % 97) for i in range(200)))
    config = TrainConfig(
        data=(str(path),), device="cpu", layers=1, dim=32, heads=2, num_experts=4, top_k=2, hidden_dim=32, seq_len=32,
        batch_size=2, steps=2, warmup_steps=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare_training(
            config, "fp8_rowwise", load_corpus(config.data, config.seq_len),
            lambda *args: TorchTracer(TorchLearner(*args)), lambda *args: FlaxTracer(FlaxLearner(*args)),
        )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def test_training_runs_stay_near(trained: Run) -> None:
    """Losses of bfloat16 runs; measured: 4e-3 at most (tests/train/test_train_learners.py holds longer ones)."""
    assert [step.step for step in trained.steps] == [1, 2]
    for step in trained.steps:
        assert abs(step.losses["torch"] - step.losses["flax"]) < 2e-2
        assert step.experts.keys() == step.control.keys() == {"blocks.0.moe.experts"}
        for apart in (*step.experts.values(), *step.control.values()):
            assert apart.slots == 2 * 32 * 2
            assert 0 <= apart.rerouted <= 16


def test_bytes_of_the_first_step(trained: Run) -> None:
    """Those of the weights, and all of the same activations, are equal."""
    assert len(trained.operands) == 16
    assert all(found.equal for found in trained.same_inputs.values())
    assert all(found.equal for name, found in trained.operands.items() if "along" in name)


def test_what_makes_them_part(trained: Run) -> None:
    """On the same inputs attention's softmax parts them; experts, norms and matrices keep within a rounding or two."""
    causes = {cause.name: cause for cause in trained.causes}
    assert causes["embed"].found.equal
    assert causes["blocks.0.attention.softmax"].found.sqnr_db < 65
    for name in ("blocks.0.moe.experts", "blocks.0.moe_norm", "blocks.0.attention.qkv", "head", "norm"):
        assert causes[name].found.sqnr_db > 70, name
    optimizer = [cause for name, cause in causes.items() if name.startswith("optimizer")]
    assert len(optimizer) == 11
    assert min(cause.found.sqnr_db for cause in optimizer) > 130
    assert trained.first is not None
    assert trained.first.step == 1
    assert "attention" in trained.first.tensor


def test_report_of_training_runs(trained: Run) -> None:
    text = "\n".join(lines(trained))
    assert "they part at step 1 in blocks.0.attention" in text
    assert "of the same inputs: all 16 equal" in text
    json.dumps(plain(trained), allow_nan=False)
    assert chart(trained).startswith(b"\x89PNG")
