"""Every framework with every recipe, one process each: clean memory figures, and no two frameworks on one GPU."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from xmoe.environment import worker_environment
from xmoe.train.checkpoint import Result, RunFolder, all_folders
from xmoe.train.config import TrainConfig
from xmoe.train.data import load_corpus
from xmoe.train.files import UserError, require, write_atomically, writing
from xmoe.train.report import write_report

CONFIG_FILE = "config.toml"
REPLACEMENT = ".replacement"
"""The folder in --out where runs train that are to replace those it holds: a copy of --out's own layout."""
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


def check_recipes(config: TrainConfig, devices: Devices) -> set[str]:
    """Whose grouped GEMMs the runs get: "triton", "torch", "emulated".

    Raises UserError when a recipe can't run on its device under the kernel preference asked for.
    """
    from xmoe.kernels.dispatch import Device, UnsupportedError, select

    gemms: set[str] = set()
    for kind, capability in devices.values():
        for recipe in config.recipes:
            device = Device(kind, capability, find_spec("triton") is not None)
            try:
                gemms.add(select(config.quantization(recipe), device).gemm)
            except UnsupportedError as error:
                raise UserError(str(error)) from error
    return gemms


def stored_config(out: Path) -> Path:
    """The config.toml of the runs that --resume goes on with: those that are to replace others, if any has begun."""
    begun = any(folder.is_started() for folder in all_folders(out / REPLACEMENT))
    return (out / REPLACEMENT if begun else out) / CONFIG_FILE


def run(config: TrainConfig, out: Path, *, resume: bool = False, overwrite: bool = False) -> list[Result]:
    """Train everything that ``config`` names in processes of their own, and write the report into ``out``.

    Runs of other frameworks and recipes that ``out`` already holds with the same settings stay, and the report compares
    all of them. With ``resume``, finished runs are kept and started ones go on. With ``overwrite``, the runs that
    ``out`` holds are replaced, once all of the new ones are finished. Raises UserError or WorkerFailed;
    KeyboardInterrupt after the run in progress has saved its state.
    """
    load_corpus(config.data, config.seq_len)  # a bad file should stop this process, before any other starts
    place = stored_config(out).parent if resume else out
    folders, united = _folders(config, place), config
    holds_runs = any(folder.is_started() for folder in all_folders(place))
    if holds_runs and overwrite:
        place = out / REPLACEMENT
        folders = _folders(config, place)
    elif holds_runs or resume:
        united = _check_place(config, place, folders, resume=resume)
        if place != out:
            folders = _folders(united, place)  # none of them may be left behind
    if not resume:
        _remove(out / REPLACEMENT)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    write_atomically(place / CONFIG_FILE, united.to_toml().encode())
    for folder in folders:
        if not folder.result.exists():
            _worker("train", folder.framework, folder.recipe, str(place))
    if place != out:
        _replace_runs(out)
    return write_report(out)


def _folders(config: TrainConfig, place: Path) -> list[RunFolder]:
    return [RunFolder(place, framework, recipe) for framework in config.frameworks for recipe in config.recipes]


def _check_place(config: TrainConfig, place: Path, folders: list[RunFolder], *, resume: bool) -> TrainConfig:
    """``config`` with the frameworks and recipes added that ``place`` holds already, with the same settings.

    Raises UserError for other settings, damaged files, nothing to resume, or finished work without ``resume``.
    """
    started = [folder.path.name for folder in folders if folder.is_started()]
    if resume and not started:
        raise UserError(f"--resume: {place} holds no checkpoint of these runs; leave --resume out to start them")
    stored = TrainConfig.load(place / CONFIG_FILE)
    if changed := stored.differences(config):
        advice = "use the same settings" if resume else "choose another --out, or add --overwrite"
        raise UserError(f"{place} holds runs with other settings ({'; '.join(changed)}); {advice}")
    if started and not resume:
        raise UserError(
            f"{place} already holds {', '.join(started)}; "
            "add --resume to keep what is finished and go on with the rest, or --overwrite to train again"
        )
    for folder in all_folders(place):  # the report will need them: say so now rather than after hours of training
        folder.read_result()
        folder.read_metrics()
    return _united(config, stored)


def _replace_runs(out: Path) -> None:
    """Put the runs in OUT/REPLACEMENT, all finished, in place of those in ``out``; those with other settings go.

    They are copied, so that after a failure midway --resume does it again.
    """
    new = out / REPLACEMENT
    config = TrainConfig.load(new / CONFIG_FILE)
    for folder in _folders(config, new):
        RunFolder(out, folder.framework, folder.recipe).copy_from(folder)
    united = config
    try:
        stored = TrainConfig.load(out / CONFIG_FILE)
    except UserError:  # nobody can tell what the others were
        stored = None
    if stored and not stored.differences(config):
        united = _united(config, stored)
    else:
        for folder in all_folders(out):
            if folder.framework not in config.frameworks or folder.recipe not in config.recipes:
                folder.clear()
    write_atomically(out / CONFIG_FILE, united.to_toml().encode())
    _remove(new)


def _united(config: TrainConfig, stored: TrainConfig) -> TrainConfig:
    """``config`` with the frameworks and recipes of ``stored`` too."""
    frameworks, recipes = stored.frameworks + config.frameworks, stored.recipes + config.recipes
    return dataclasses.replace(config, frameworks=frameworks, recipes=recipes)


def _remove(folder: Path) -> None:
    with writing(folder):
        if folder.exists():
            shutil.rmtree(folder)


def _worker(*arguments: str, stdout: int | None = None) -> str:
    """Run ``python -m xmoe.train.worker`` to its end and return its captured output. Ctrl-C is passed on, once."""
    command = [sys.executable, "-m", "xmoe.train.worker", *arguments]
    with subprocess.Popen(command, stdout=stdout, text=True, env=worker_environment()) as process:
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
