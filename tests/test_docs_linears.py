"""The examples of docs/linears.md run as they stand."""

import re

import pytest

from tests.test_readme import ROOT, run
from xmoe import LINEAR_RECIPES, FqnToConfig

TEXT = (ROOT / "docs" / "linears.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


def test_examples(tmp_path) -> None:
    train, leave_out = blocks("python")
    losses = [float(line.split()[1]) for line in run(train, tmp_path).splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.01
    assert run(leave_out, tmp_path).strip() == leave_out.strip().rsplit("# ", 1)[1]


def test_file() -> None:
    (text,) = blocks("toml")
    assert [config.recipe for config in FqnToConfig.from_toml(text).fqn_to_config.values()] == [
        "mxfp8_rceil", "mxfp8_cublas_rceil",
    ]  # fmt: skip


@pytest.mark.parametrize("recipe", LINEAR_RECIPES)
def test_every_recipe_is_there(recipe: str) -> None:
    assert f"`{recipe}`" in TEXT
