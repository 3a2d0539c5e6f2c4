"""Run pyright on xmoe as it is installed: the rooms under one package.

pyright knows nothing of the checkout's layout (pyproject.toml, [tool.setuptools]), so this links the rooms into one
tree, checks that, and reports the paths of the checkout. Arguments are handed to pyright.
"""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "types"


def link_tree(packages: dict[str, str]) -> None:
    """Make TREE hold every package of `packages` (name -> folder) where an installation would put it."""
    shutil.rmtree(TREE, ignore_errors=True)
    for package, folder in packages.items():
        target = TREE.joinpath(*package.split("."))
        target.mkdir(parents=True, exist_ok=True)
        for source in (ROOT / folder).glob("*.py*"):
            if source.is_file():
                (target / source.name).symlink_to(source)


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = project["setuptools"]["package-dir"]
    link_tree(packages)
    # A Triton kernel is typed as the Python function that it is not: its arguments are of another kind than its
    # parameters, and a launch takes options of its own. Files that hold kernels are read, and not reported on.
    kernels = [str(path.relative_to(TREE)) for path in TREE.rglob("*.py") if "n.jit" in path.read_text()]
    settings = {**project["pyright"], "include": ["xmoe"], "exclude": kernels}
    (TREE / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, "--project", str(TREE), *sys.argv[1:]]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    output = result.stdout
    for package in sorted(packages, key=len, reverse=True):  # the innermost package first
        output = output.replace(str(TREE.joinpath(*package.split("."))) + os.sep, packages[package] + os.sep)
    print(output, end="")
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
