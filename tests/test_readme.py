"""The examples of the README run as they stand, and train."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def run(example: str, tmp_path: Path) -> str:
    """What it prints; any warning is an error."""
    script = tmp_path / "example.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}")
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_three_short_examples() -> None:
    assert len(EXAMPLES) == 3
    for example in EXAMPLES:
        assert sum(bool(line.strip()) for line in example.split("\n")) <= 20


@pytest.mark.parametrize("example", [EXAMPLES[0], EXAMPLES[2]], ids=["torch", "flax"])
def test_example_trains(example: str, tmp_path: Path) -> None:
    losses = [float(line.split()[1]) for line in run(example, tmp_path).splitlines()]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.01, losses


def test_example_of_the_ops(tmp_path: Path) -> None:
    """Beside the experts of each token in bfloat16, one by one."""
    check = """
expected = torch.zeros(T, D)
for t in range(T):
    for score, e in zip(scores[t], experts[t]):
        token = x[t].float()
        h = torch.nn.functional.silu(w1[e].float() @ token) * (w3[e].float() @ token)
        expected[t] += score * (w2[e].float() @ h)
print(((y.float() - expected).norm() / expected.norm()).item())
"""
    assert float(run(EXAMPLES[1] + check, tmp_path)) < 0.1


def test_links_and_recipes_exist() -> None:
    from xmoe import RECIPES

    for target in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / target).exists(), f"README links to {target}"
    named = set(re.findall(r"`((?:bf16|fp8_|mxfp8_)\w*)`", README)) - {"mxfp8_emulated_"}
    assert named <= set(RECIPES), named - set(RECIPES)
