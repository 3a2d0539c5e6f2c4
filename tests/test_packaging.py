"""pyproject.toml, the constraints and the folders agree. What the wheel itself holds: scripts/wheel_smoke.py."""

import importlib
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import xmoe

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
ROOMS = ("xmoe", "kernels", "torch_backend", "jax_frontend")


def test_every_package_is_listed() -> None:
    """setuptools drops an unlisted nested package from the wheel without a word."""
    folders = {path.parent.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert set(SETUPTOOLS["package-dir"].values()) == folders
    assert set(SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])


def test_every_data_file_is_listed() -> None:
    patterns = {SETUPTOOLS["package-dir"][package]: set(globs) for package, globs in SETUPTOOLS["package-data"].items()}
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts:
                folder = path.parent.relative_to(ROOT).as_posix()
                assert any(path.match(glob) for glob in patterns.get(folder, ())), f"{path} would not be in the wheel"


def test_kernels_stays_a_namespace() -> None:
    """With an __init__.py, a checkout on sys.path would shadow an installed package called kernels."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_one_version() -> None:
    assert PROJECT["version"] == xmoe.__version__


def pins() -> dict[str, str]:
    lines = [
        line for name in ("constraints.txt", "constraints-cpu.txt") for line in (ROOT / name).read_text().split("\n")
    ]
    return dict(line.split("==") for line in lines if re.match(r"[\w-]+==", line))


@pytest.mark.parametrize(("name", "version"), pins().items())
def test_pins_lie_in_the_declared_ranges(name: str, version: str) -> None:
    declared = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    ranges = [r.specifier for r in map(Requirement, declared) if r.name == name]
    assert ranges or name == "jaxlib", f"{name} is pinned and nothing asks for it"  # jaxlib follows jax
    assert all(Version(version) in specifier for specifier in ranges)


def test_cuda_builds_choose_their_own_triton() -> None:
    assert "triton" not in (ROOT / "constraints.txt").read_text()


def test_the_core_needs_no_jax() -> None:
    names = {Requirement(requirement).name for requirement in PROJECT["dependencies"]}
    assert names == {"numpy", "ml_dtypes", "torch", "triton"}


def test_extras_that_messages_name() -> None:
    """Wherever a source or the README says `xmoe[…]`, or names an extra to `require`, that extra exists."""
    files = [*(path for room in ROOMS for path in (ROOT / room).rglob("*.py")), ROOT / "README.md"]
    text = "\n".join(path.read_text() for path in files)
    named = {extra for extras in re.findall(r"xmoe\[([a-z,]+)\]", text) for extra in extras.split(",")}
    named |= set(re.findall(r"\brequire\(\"(\w+)\"", text))
    assert {"jax", "flax", "cuda", "train"} <= named
    assert named <= set(PROJECT["optional-dependencies"])


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/setup_env.py, with an index for the CPU builds that answers."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("setup_env")
    monkeypatch.setattr(module, "reachable", lambda url: True)
    return module


def test_cpu_machines_get_the_cpu_build(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = ["-c", str(ROOT / "constraints-cpu.txt")]
    assert setup_env.pip_options(gpu=False) == [*constraints, "--extra-index-url", setup_env.CPU_INDEX]
    monkeypatch.setattr(setup_env, "reachable", lambda url: False)
    assert setup_env.pip_options(gpu=False) == constraints


def test_gpu_machines_get_the_cuda_build(setup_env: ModuleType) -> None:
    assert setup_env.pip_options(gpu=True) == ["-c", str(ROOT / "constraints.txt")]


@pytest.mark.parametrize(
    ("script", "found"),
    [("echo 'GPU 0: NVIDIA H200'", True), ("echo 'No devices were found'", False), ("exit 9", False), (None, False)],
)
def test_has_gpu(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str | None, found: bool
) -> None:
    if script:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\n{script}\n")
        smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_env.has_gpu() == found


@pytest.mark.parametrize("version", [(3, 10, 1), (3, 14, 0)])
def test_wrong_python_is_named(
    setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int]
) -> None:
    monkeypatch.setattr(setup_env.sys, "version_info", version)
    with pytest.raises(SystemExit, match=rf"is {version[0]}\.{version[1]}: name another with `make PYTHON="):
        setup_env.check_python()


def test_missing_ensurepip_says_what_to_install(setup_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match=r"apt install python3\.\d+-venv"):
        setup_env.check_python()
