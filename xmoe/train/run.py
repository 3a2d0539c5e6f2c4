"""Every framework with every recipe, one process each: clean memory figures, and no two frameworks on one GPU."""

import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from xmoe.train.checkpoint import Result, RunFolder, all_folders
from xmoe.train.config import TrainConfig
from xmoe.train.data import load_corpus
from xmoe.train.files import UserError, require, write_atomically, writing
from xmoe.train.report import write_report

CONFIG_FILE = "config.toml"
Devices = dict[str, tuple[str, tuple[int, int] | None]]
"""Framework → "cpu" or "cuda" and the compute capability."""


class WorkerFailed(Exception):
    """A run's process has failed; it has told the user why, unless a signal ended it."""

    def __init__(self, status: int, message: str = "") -> None:
        super().__init__(message)
        self.status = status


def check_extras(config: TrainConfig) -> None:
    """Raise UserError, naming the extra, when a package that the run needs is not installed."""
    require("train", "rich", "matplotlib", "safetensors")
    if "flax" in config.frameworks:
        require("flax", "jax", "flax", "optax")


def find_devices(frameworks: tuple[str, ...], device: str) -> Devices:
    """What each framework would run on: "cpu" or "cuda", with the compute capability. Raises UserError.

    Each is asked in a process of its own, so that this one never opens the GPU.
    """
    if device == "cpu":
        return dict.fromkeys(frameworks, ("cpu", None))
    found = {}
    for framework in frameworks:
        answer = _worker("probe", framework, stdout=subprocess.PIPE)
        kind, capability = json.loads(answer.splitlines()[-1])
        found[framework] = kind, capability and tuple(capability)
    without = [framework for framework, (kind, _) in found.items() if kind != "cuda"]
    if without and (device == "cuda" or len(without) < len(found)):
        packages = {"torch": "a CUDA build of torch", "flax": 'a CUDA build of jax (pip install "jax[cuda13]")'}
        raise UserError(f"{without[0]} finds no NVIDIA GPU; install {packages[without[0]]}, or add --device cpu")
    return found


def check_recipes(config: TrainConfig, devices: Devices) -> None:
    """Raise UserError when a recipe can't run on its device under the kernel preference asked for."""
    from xmoe.kernels.dispatch import Device, UnsupportedError, select

    for kind, capability in devices.values():
        for recipe in config.recipes:
            try:
                select(config.quantization(recipe), Device(kind, capability, find_spec("triton") is not None))
            except UnsupportedError as error:
                raise UserError(str(error)) from error


def run(config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False) -> list[Result]:
    """Train everything that ``config`` names in processes of their own, and write the report into ``out``.

    With ``resume``, finished runs are kept and started ones go on. Runs of other frameworks and recipes that ``out``
    already holds with the same settings stay, and the report compares all of them. Raises UserError or WorkerFailed;
    KeyboardInterrupt after the run in progress has saved its state.
    """
    load_corpus(config.data, config.seq_len)  # a bad file should stop this process, before any other starts
    folders = [RunFolder(out, framework, recipe) for framework in config.frameworks for recipe in config.recipes]
    keeps_others = _check_out(config, out, folders, resume=resume, overwrite=overwrite)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    if not resume:
        for folder in folders if keeps_others else all_folders(out):
            folder.clear()
    write_atomically(out / CONFIG_FILE, config.to_toml().encode())
    for folder in folders:
        if not folder.result.exists():
            _worker("train", folder.framework, folder.recipe, str(out))
    return write_report(out)


def _check_out(config: TrainConfig, out: Path, folders: list[RunFolder], *, resume: bool, overwrite: bool) -> bool:
    """Whether ``out`` holds runs with the same settings. Raises UserError for others, or nothing to resume."""
    stored = out / CONFIG_FILE
    started = any(folder.checkpoint.exists() or folder.result.exists() for folder in folders)
    if resume and not (started and stored.exists()):
        raise UserError(f"--resume: {out} holds no checkpoint of these runs; leave --resume out to start them")
    if overwrite or not stored.exists():
        return False
    if changed := TrainConfig.load(stored).differences(config):
        advice = "use the same settings" if resume else "choose another --out, or add --overwrite"
        raise UserError(f"{out} holds runs with other settings ({'; '.join(changed)}); {advice}")
    return True


def _worker(*arguments: str, stdout: int | None = None) -> str:
    """Run ``python -m xmoe.train.worker`` to its end and return its captured output. Ctrl-C is passed on, once."""
    command = [sys.executable, "-m", "xmoe.train.worker", *arguments]
    # OpenMP threads that spin while they wait cost little on idle cores, but 3.5 times the step on busy ones (fp8
    # emulation on two cores with two other jobs: 0.96 s a step, waiting passively 0.27 s).
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    with subprocess.Popen(command, stdout=stdout, text=True, env=environment) as process:
        earlier = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            try:
                process.wait()
            except KeyboardInterrupt:
                process.kill()
            raise
        finally:
            signal.signal(signal.SIGTERM, earlier)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        advice = "; the machine may be out of memory, try a smaller --batch-size" if name == "SIGKILL" else ""
        raise WorkerFailed(1, f"the process of {' '.join(arguments[1:3])} was ended by {name}{advice}")
    if process.returncode:
        raise WorkerFailed(process.returncode)
    return output or ""
