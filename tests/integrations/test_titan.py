"""torchtitan's own trainer on its debug models, on the CPU: `titan_worker` runs it, over gloo where there are ranks.

``make test-titan`` makes an environment for each of the two versions that these tests know.
"""

import os
import re
import socket
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from examples.titan_debug import write_assets

if find_spec("torchtitan") is None:
    pytest.skip("torchtitan is not installed", allow_module_level=True)

pytestmark = pytest.mark.timeout(900)  # a run starts one interpreter a rank: 10 seconds of a free core each
ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("titan_worker.py")
HAS_CONVERTERS = version("torchtitan").startswith("0.2.")
LINE = re.compile(r"step: *(\d+) .*?loss: *([\d.]+) .*?grad_norm: *([\d.]+)")

if HAS_CONVERTERS:
    ARGUMENTS = ("--model.name=deepseek_v3", "--model.flavor=debugmodel", "--optimizer.implementation=for-loop")
    ASSETS = ("--model.hf_assets_path={0}", "--training.dataset=c4_test", "--training.dataset_path={0}/data")
    IMPORTS = ("--job.custom_config_module", "--experimental.custom_import")
    XMOE = tuple(f"{name}=xmoe.torch_backend.titan" for name in IMPORTS)
    EXPERTS = (*XMOE, "--model.converters=quantize.grouped_mm.xmoe", "--quantize.grouped_mm.xmoe.recipe=mxfp8_rceil")
    LINEARS = (*XMOE, "--model.converters=quantize.linear.xmoe", "--quantize.linear.xmoe.recipe=tensorwise")
    FULL_AC, DUMP = ("--activation_checkpoint.mode=full",), "--job.dump_folder"
else:
    # What PyTorch 2.13 can shard; the default needs a newer one.
    ARGUMENTS = (
        *("--module=deepseek_v3", "--config=deepseek_v3_debugmodel"),
        *("--training.disable_cuda_graphs", "--parallelism.spmd_backend=partial_dtensor"),
    )
    ASSETS = ("--hf_assets_path={0}", "--dataloader.dataset=c4_test", "--dataloader.dataset_path={0}/data")
    OVERRIDES = "xmoe.torch_backend.titan.overrides"
    EXPERTS = ("--override.imports", f'{OVERRIDES}.grouped_experts={{"recipe": "mxfp8_rceil"}}')
    LINEARS = ("--override.imports", f'{OVERRIDES}.linears={{"recipe": "tensorwise"}}')
    # A word straight after --override.imports would be one more of them.
    FULL_AC, DUMP = ("--debug.seed=0", "activation_checkpoint:full"), "--dump_folder"

TRAINING = ("--training.local_batch_size=2", "--training.seq_len=32", "--metrics.log_freq=1", "--debug.seed=0")
EP, TP = ("--parallelism.expert_parallel_degree=2",), ("--parallelism.tensor_parallel_degree=2",)
COMPILE = ("--compile.enable", "--compile.backend=aot_eager")

Steps = dict[int, tuple[float, float]]
"""Loss and norm of the gradients, of every step."""


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    write_assets(folder, Path(__file__).read_text())
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def train(assets: Path, *arguments: str, steps: int = 2, ranks: int = 1, fails: bool = False) -> Steps | str:
    """The steps of a run; what it printed, if it is to fail."""
    given = (*ARGUMENTS, *(a.format(assets) for a in ASSETS), *TRAINING, f"--training.steps={steps}", *arguments)
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    on_cpu = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # torchtitan 0.2 pads tokens with a Triton kernel
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    environment = {**os.environ, **here, **on_cpu, **group}
    processes = []
    for rank in range(ranks):
        own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        command = [sys.executable, str(WORKER), *given]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=assets, env=own, **pipes))
    try:
        logs = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    succeeded = all(process.returncode == 0 for process in processes)
    assert succeeded != fails, logs[0][-3000:]
    return logs[0] if fails else {int(n): (float(loss), float(norm)) for n, loss, norm in LINE.findall(logs[0])}


def check_close(steps: Steps, others: Steps, rel: float) -> None:
    assert list(steps) == list(others) == list(range(1, len(others) + 1))
    for n in others:
        assert steps[n] == pytest.approx(others[n], rel=rel)


def check_quantized(steps: Steps, bf16: Steps) -> None:
    """Not bf16's losses and gradients, so the GEMMs were quantized; but next to them (measured: within 0.9%)."""
    check_close(steps, bf16, 0.02)
    assert all(steps[n] != bf16[n] for n in bf16)


@pytest.fixture(scope="module")
def one(assets: Path) -> Steps:
    """bf16 on one rank."""
    return train(assets)


def test_experts(assets: Path, one: Steps) -> None:
    """Values are made after the conversion, on the meta device; activation checkpointing is selective."""
    experts = train(assets, *EXPERTS)
    check_quantized(experts, one)
    check_close(train(assets, *EXPERTS, *FULL_AC), experts, 1e-3)


def test_linears(assets: Path, one: Steps) -> None:
    check_quantized(train(assets, *LINEARS), one)


def test_compile(assets: Path, one: Steps) -> None:
    check_quantized(train(assets, *EXPERTS, *COMPILE), one)


def test_two_ranks_and_resume(assets: Path, tmp_path: Path) -> None:
    """FSDP2, with and without expert parallelism; from a checkpoint, a run goes on as it did without a stop."""
    warmup = "--lr_scheduler.warmup_steps=2"
    bf16 = train(assets, warmup, steps=3, ranks=2)
    check_quantized(train(assets, *EXPERTS, warmup, steps=3, ranks=2), bf16)
    saving = (f"{DUMP}={tmp_path}", "--checkpoint.enable", "--checkpoint.interval=2", warmup)
    straight = train(assets, *EXPERTS, *EP, *saving, steps=3, ranks=2)
    check_quantized(straight, bf16)
    (tmp_path / "checkpoint" / "step-3").rename(tmp_path / "step-3")
    assert train(assets, *EXPERTS, *EP, *saving, steps=3, ranks=2) == {3: straight[3]}


def test_tensor_parallel(assets: Path) -> None:
    bf16 = train(assets, *TP, ranks=2)
    for what in (EXPERTS, LINEARS):
        check_quantized(train(assets, *TP, *what, ranks=2), bf16)


def test_bad_recipe(assets: Path) -> None:
    broken = tuple(argument.replace("mxfp8_rceil", "fp4") for argument in EXPERTS)
    assert "recipe='fp4' is not known; use one of bf16, fp8_rowwise" in train(assets, *broken, fails=True)


@pytest.mark.skipif(not HAS_CONVERTERS, reason="torchtitan 0.2 has converters")
def test_fqns_that_match_nothing(assets: Path) -> None:
    log = train(assets, *EXPERTS, "--quantize.grouped_mm.xmoe.fqns=expert,typo", fails=True)
    assert "quantize.grouped_mm.xmoe.fqns names typo, which no module with expert weights has in its name" in log
    assert "layers.1.moe.experts" in log
