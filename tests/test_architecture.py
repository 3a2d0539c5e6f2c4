"""The arrows between the rooms (docs/design.md, "Rooms"), read from the source of every file."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "xmoe": ROOT / "xmoe",
    "xmoe.kernels": ROOT / "kernels",
    "xmoe.torch_backend": ROOT / "torch_backend",
    "xmoe.jax_frontend": ROOT / "jax_frontend",
}
MAX_LINES = 500

TORCH = {"torch", "triton"}
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
OTHER_ROOMS = set(ROOMS) - {"xmoe"}
# What a room may not name: anywhere in its files, inside functions too.
FORBIDDEN = {
    "xmoe": {*TORCH, *JAX},
    "xmoe.kernels": {*JAX, "xmoe.torch_backend", "xmoe.jax_frontend"},
    "xmoe.torch_backend": {*JAX, "triton", "xmoe.jax_frontend"},
    "xmoe.jax_frontend": {*TORCH, "xmoe.kernels", "xmoe.torch_backend"},
}
# What a room may import from outside the project and the standard library, with whatever the extras leave optional.
THIRD_PARTY = {
    "xmoe": {"numpy", "ml_dtypes", *TORCH, *JAX},
    "xmoe/train": {"numpy", "rich", "matplotlib", "safetensors"},
    "xmoe/bench": {"numpy", "rich", "matplotlib"},
    "xmoe/parity": {"numpy", "matplotlib"},
    "xmoe.kernels": TORCH,
    "xmoe.torch_backend": {"torch", "numpy"},
    "torch_backend/bench": {"torch", "torchao", "transformers"},
    "torch_backend/torchao.py": {"torch", "torchao"},
    "torch_backend/titan": {"torch", "torchtitan"},
    "xmoe.jax_frontend": {"jax", "flax", "optax", "numpy", *TORCH},
    "jax_frontend/bench": {"jax", "flax", "tokamax", "absl"},
    "jax_frontend/hf_files.py": {"jax", "numpy", "safetensors"},
}
# Those that are imported inside functions only: `import xmoe.train.run` must do without, as --help does, until their
# extra has been looked for, and a benchmark without the peers that are not installed.
OPTIONAL = {"rich", "matplotlib", "safetensors", "torchao", "transformers", "tokamax", "absl"}
# Files that are for one of these, and that nothing imports where it may be missing.
INTEGRATIONS = {"xmoe/train/screen.py", "torch_backend/torchao.py"}
# The exceptions, and only inside functions.
DEFERRED = {"jax_frontend/bridge.py": {*TORCH, "xmoe.kernels"}}
# What the core may name inside functions. Importing it stays free of torch and jax (test_import_is_light).
CORE_DEFERRED = {*TORCH, *JAX, *OTHER_ROOMS}


def sources() -> list[tuple[str, Path]]:
    return [(room, path) for room, folder in ROOMS.items() for path in sorted(folder.rglob("*.py"))]


def module_name(room: str, path: Path) -> str:
    parts = path.relative_to(ROOMS[room]).with_suffix("").parts
    return ".".join((room, *parts[: -1 if parts[-1] == "__init__" else None]))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(tree: ast.Module, module: str, is_package: bool) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute module name, whether it is inside a function) of every import that runs, importlib's included."""

    def absolute(node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + is_package]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def visit(node: ast.AST, deferred: bool) -> Iterator[tuple[int, str, bool]]:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node)
            yield from ((node.lineno, f"{base}.{alias.name}", deferred) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                yield node.lineno, first.value, deferred
        inside = deferred or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside)

    yield from visit(tree, False)


def names(module: str, forbidden: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in forbidden)


def violations(room: str, relative: str, source: str, module: str, is_package: bool = False) -> list[str]:
    """The imports of one file that its room may not have."""
    found = []
    for line, target, deferred in imports(ast.parse(source), module, is_package):
        if names(target, FORBIDDEN[room]):
            allowed = CORE_DEFERRED if room == "xmoe" else DEFERRED.get(relative, set())
            if not (deferred and names(target, allowed)):
                found.append(f"{relative}:{line} imports {target}")
        elif room == "xmoe" and names(target, OTHER_ROOMS) and not deferred:
            found.append(f"{relative}:{line} imports {target} at import time")
    return found


def strangers(folder: str, relative: str, source: str, module: str) -> list[str]:
    """The third-party imports of one file that its place (`place`) does not list."""
    found = []
    for line, target, deferred in imports(ast.parse(source), module, False):
        package = target.split(".")[0]
        if package in sys.stdlib_module_names or package == "xmoe":
            continue
        early = package in OPTIONAL and not deferred and relative not in INTEGRATIONS
        if package not in THIRD_PARTY[folder] or early:
            found.append(f"{relative}:{line} imports {target}")
    return found


def place(room: str, relative: str) -> str:
    """The narrowest of THIRD_PARTY's keys that holds a file: the file, its folder, or its room."""
    return next(key for key in (relative, relative.rpartition("/")[0], room) if key in THIRD_PARTY)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_rooms_are_there() -> None:
    assert {room for room, _ in sources()} == set(ROOMS)


@pytest.mark.parametrize(("room", "path"), [pytest.param(room, path, id=relative(path)) for room, path in sources()])
def test_import_arrows(room: str, path: Path) -> None:
    is_package = path.name == "__init__.py"
    assert violations(room, relative(path), path.read_text(), module_name(room, path), is_package) == []


@pytest.mark.parametrize(("room", "path"), [pytest.param(room, path, id=relative(path)) for room, path in sources()])
def test_third_party_imports(room: str, path: Path) -> None:
    listed = place(room, relative(path))
    assert strangers(listed, relative(path), path.read_text(), module_name(room, path)) == []


@pytest.mark.parametrize(
    ("folder", "file", "source", "caught"),
    [
        ("xmoe", "xmoe/a.py", "def f():\n    import rich", True),
        ("xmoe", "xmoe/a.py", "import ml_dtypes, tomllib, xmoe.toml", False),
        ("xmoe/train", "xmoe/train/a.py", "import matplotlib.figure", True),
        ("xmoe/train", "xmoe/train/a.py", "def f():\n    import matplotlib.figure", False),
        ("xmoe/train", "xmoe/train/screen.py", "import rich", False),
        ("xmoe/train", "xmoe/train/a.py", "def f():\n    import torch", True),
        ("xmoe/bench", "xmoe/bench/a.py", "import rich", True),
        ("xmoe/bench", "xmoe/bench/a.py", "def f():\n    import rich", False),
        ("xmoe.kernels", "kernels/a.py", "import numpy", True),
        ("xmoe.torch_backend", "torch_backend/a.py", "import einops", True),
        ("torch_backend/bench", "torch_backend/bench/a.py", "import torchao", True),
        ("torch_backend/bench", "torch_backend/bench/a.py", "def f():\n    import torchao", False),
        ("xmoe.torch_backend", "torch_backend/a.py", "def f():\n    import torchao", True),
        ("torch_backend/torchao.py", "torch_backend/torchao.py", "import torchao.core", False),
        ("torch_backend/torchao.py", "torch_backend/torchao.py", "import einops", True),
        ("xmoe.jax_frontend", "jax_frontend/a.py", "import optax", False),
        ("jax_frontend/bench", "jax_frontend/bench/a.py", "import tokamax", True),
    ],
)
def test_the_check_of_third_parties(folder: str, file: str, source: str, caught: bool) -> None:
    assert bool(strangers(folder, file, source, "xmoe.a")) == caught


@pytest.mark.parametrize(
    ("room", "file", "source", "caught"),
    [
        ("xmoe", "xmoe/a.py", "import torch", True),
        ("xmoe", "xmoe/a.py", "def f():\n    import torch", False),
        ("xmoe", "xmoe/a.py", "from . import kernels", True),
        ("xmoe", "xmoe/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch", False),
        ("xmoe.kernels", "kernels/a.py", "def f():\n    import jax.numpy", True),
        ("xmoe.kernels", "kernels/a.py", "from ..torch_backend import ops", True),
        ("xmoe.torch_backend", "torch_backend/a.py", "__import__('xmoe.jax_frontend')", True),
        ("xmoe.torch_backend", "torch_backend/a.py", "from xmoe.kernels import pipeline", False),
        ("xmoe.jax_frontend", "jax_frontend/ragged_dot.py", "def f():\n    from torch import nn", True),
        ("xmoe.jax_frontend", "jax_frontend/bridge.py", "import torch", True),
        ("xmoe.jax_frontend", "jax_frontend/bridge.py", "def f():\n    import torch", False),
        ("xmoe.jax_frontend", "jax_frontend/bridge.py", "def f():\n    from xmoe import torch_backend", True),
    ],
)
def test_the_check_itself(room: str, file: str, source: str, caught: bool) -> None:
    assert bool(violations(room, file, source, f"{room}.a")) == caught


@pytest.mark.parametrize("path", [pytest.param(path, id=relative(path)) for _, path in sources()])
def test_house_rules(path: Path) -> None:
    """No oversized file, no `assert` without a message, no write to the process's environment."""
    text = path.read_text()
    assert text.count("\n") <= MAX_LINES, f"{relative(path)}: split it, {MAX_LINES} lines are the most"
    for node in ast.walk(ast.parse(text)):
        where = f"{relative(path)}:{getattr(node, 'lineno', 0)}"
        assert not (isinstance(node, ast.Assert) and node.msg is None), f"{where}: assert without a message"
        assert not writes_environ(node), f"{where}: writes to os.environ"


def writes_environ(node: ast.AST) -> bool:
    """Whether `node` is an assignment to, a deletion from, or a mutating call on os.environ."""
    if isinstance(node, ast.Call):
        name = ast.unparse(node.func)
        return name.endswith(("putenv", "unsetenv")) or (
            "environ." in name and name.rsplit(".", 1)[1] in ("setdefault", "update", "pop", "clear", "popitem")
        )
    targets: list[ast.expr] = []
    if isinstance(node, (ast.Assign, ast.Delete)):
        targets = node.targets
    elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
        targets = [node.target]
    return any(ast.unparse(target).startswith(("os.environ", "environ[")) for target in targets)


@pytest.mark.parametrize(
    ("source", "caught"),
    [
        ("os.environ['A'] = '1'", True),
        ("os.environ.setdefault('A', '1')", True),
        ("del os.environ['A']", True),
        ("os.environ |= {}", True),
        ("value = os.environ.get('A')", False),
        ("env = {**os.environ, 'A': '1'}", False),
    ],
)
def test_writes_environ(source: str, caught: bool) -> None:
    assert any(writes_environ(node) for node in ast.walk(ast.parse(source))) == caught


def run_elsewhere(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter that has the checkout on its path and nothing else of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def test_import_is_light(tmp_path: Path) -> None:
    """`import xmoe` loads neither torch nor jax, and does not touch the environment."""
    code = (
        "import os, sys; before = dict(os.environ); import xmoe\n"
        f"print(sorted({ {*TORCH, *JAX}!r} & set(sys.modules)), dict(os.environ) == before)"
    )
    result = run_elsewhere(code, tmp_path)
    assert (result.stdout.strip(), result.stderr) == ("[] True", "")


def test_bare_checkout(tmp_path: Path) -> None:
    """The rooms are found from another folder, and a checkout on the path shadows nobody's `kernels`."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("mine = True")
    code = (
        "import kernels; assert kernels.mine\n"
        "import xmoe.kernels.dispatch, xmoe.torch_backend, sys\n"
        "print(sys.modules['xmoe.kernels.dispatch'].__file__, 'jax' in sys.modules)"
    )
    result = run_elsewhere(code, tmp_path)
    assert result.stdout.split() == [str(ROOT / "kernels" / "dispatch.py"), "False"], result.stderr
