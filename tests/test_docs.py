"""The pages of docs/: their examples run as they stand, in order, and what they name and link to exists."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python(?: (?P<needs>\w+))?\n(?P<code>.*?)^```", flags=re.DOTALL | re.MULTILINE)
"""An example; a word after "python" is a package that it needs and that may be missing."""
EXAMPLES = [
    pytest.param(page, match["code"], match["needs"], id=f"{page.stem}-{number}")
    for page in sorted(DOCS.glob("*.md"))
    for number, match in enumerate(BLOCK.finditer(page.read_text()), 1)
]


@pytest.mark.parametrize(("page", "code", "needs"), EXAMPLES)
def test_example(page: Path, code: str, needs: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any warning of ours is an error."""
    if needs is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pytest.importorskip(needs)
            if importlib.util.find_spec(f"xmoe.torch_backend.{needs}"):
                importlib.import_module(f"xmoe.torch_backend.{needs}")  # what it imports of that package warns too
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([\w./-]+)\)", re.sub(r"`[^`]*`", "", page.read_text())):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_names_of_the_migration_table() -> None:
    names = set(re.findall(r"`(xmoe(?:\.\w+)+)`", (DOCS / "torchao.md").read_text()))
    assert len(names) > 10
    for name in names - {"xmoe.torch_backend"}:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda example: example.stem)
def test_commands_work_in_a_checkout(example: Path) -> None:
    """Where nothing is installed: each command that is shown finds xmoe."""
    command = re.compile(rf"((?:[A-Z_]+=\S+ )*)python (examples/{example.name})")
    pages = [ROOT / "README.md", *DOCS.glob("*.md"), example]
    shown = [found for page in pages for found in command.finditer(page.read_text())]
    assert shown
    for found in shown:
        assert "PYTHONPATH=. " in found[1], found[0]
    environment = {**os.environ, "PYTHONPATH": "."}
    subprocess.run([sys.executable, shown[0][2], "--help"], cwd=ROOT, env=environment, check=True, capture_output=True)
