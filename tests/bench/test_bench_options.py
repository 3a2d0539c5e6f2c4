"""What the command line asks for, and what it is told where that cannot be."""

import json
from pathlib import Path

import pytest

from xmoe import RECIPES
from xmoe.bench import options
from xmoe.bench.options import BASE_RECIPES, Options, find_peers, find_shapes, make_options
from xmoe.bench.workload import ALIGNMENT, gemm_work, uneven_sizes
from xmoe.operands import FORMATS
from xmoe.shapes import LAYERS, LLAMA4, MODELS, LayerShape, Shape, StackShape
from xmoe.train.files import UserError

GEMM = '[[shape]]\nname = "mine"\nM = 100\nN = 32\nK = 48\nG = 3\n'
LAYER = '[[shape]]\nname = "mine"\ntokens = 100\ndim = 32\nhidden = 48\nexperts = 4\ntop_k = 2\n'


def names(command: str, text: str) -> list[str]:
    return [shape.name for shape in find_shapes(command, text)]


def test_shapes_by_name_and_prefix() -> None:
    assert names("grouped-mm", "llama4") == [shape.name for shape in LLAMA4]
    assert names("grouped-mm", "deepseek-v3-g8, LLAMA4_g1,llama4_g1") == ["deepseek_v3_g8", "llama4_g1"]
    assert names("grouped-mm", "llama4_g1") == ["llama4_g1"]  # not llama4_g16
    assert names("quantize", "qwen3") == ["qwen3_30b_a3b"]
    assert names("layer", "llama4,deepseek-v3") == ["llama4_scout", "deepseek_v3"]
    assert names("layer", "all") == list(LAYERS)
    assert names("grouped-mm", "all") == [shape.name for shape in MODELS]
    assert names("overhead", "all") == ["tiny", "moe_16_layers"]
    assert names("overhead", "moe") == ["moe_16_layers"]


@pytest.mark.parametrize("text", ["nope", "", "llama4,", "one_tile", "no.toml,llama5"])
def test_unknown_shapes(text: str) -> None:
    with pytest.raises(
        UserError, match=r"--shapes: .*(is not known; use a name or the start of one: llama4_g1|No such)"
    ):
        find_shapes("grouped-mm", text)


def test_shapes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(GEMM + GEMM.replace("mine", "other"))
    assert find_shapes("grouped-mm", f"{path},llama4_g2")[:2] == (
        Shape("mine", 100, 32, 48, 3), Shape("other", 100, 32, 48, 3),
    )  # fmt: skip
    path.write_text(LAYER)
    assert find_shapes("layer", str(path)) == (LayerShape("mine", 100, 32, 48, 4, 2),)
    path.write_text(GEMM + LAYER.replace("mine", "stack") + "layers = 3\n")
    assert find_shapes("overhead", str(path)) == (
        Shape("mine", 100, 32, 48, 3), StackShape("stack", 3, 100, 32, 48, 4, 2),
    )  # fmt: skip


def test_tokens() -> None:
    asked = make_options("grouped-mm", shapes="llama4_g8,qwen3", tokens="4096, 96,4096")
    assert asked.shapes == (
        Shape("llama4_g8_m4096", 4096, 8192, 5120, 8), Shape("llama4_g8_m96", 96, 8192, 5120, 8),
        Shape("qwen3_30b_a3b_m4096", 4096, 768, 2048, 128), Shape("qwen3_30b_a3b_m96", 96, 768, 2048, 128),
    )  # fmt: skip
    assert Options.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    for text in ("", "0", "-4", "4e3", "4096,", "٤"):
        with pytest.raises(UserError, match=r"--tokens: '.*' is not a number of tokens; give integers of 1 or more"):
            make_options("grouped-mm", tokens=text)


@pytest.mark.parametrize(
    ("command", "text", "message"),
    [
        ("grouped-mm", "shape = 3", r"has no \[\[shape\]\] table; add some, with name, M, N, K, G"),
        ("grouped-mm", "x = ", "is not valid TOML"),
        ("grouped-mm", LAYER, r"the keys of a \[\[shape\]\] are name, M, N, K, G; found"),
        ("grouped-mm", GEMM.replace("K = 48", "K = 40"), "K=40 of 'mine'; give a multiple of 16"),
        ("grouped-mm", GEMM.replace("M = 100", "M = 0"), "M=0 of 'mine'; give an integer of 1 or more"),
        ("grouped-mm", GEMM.replace("G = 3", "G = true"), "G=True of 'mine'; give an integer"),
        ("grouped-mm", GEMM.replace('"mine"', "7"), "name=7; give a string"),
        ("layer", LAYER.replace("top_k = 2", "top_k = 5"), "top_k=5 of 'mine'; give at most experts"),
        ("overhead", LAYER, "are name, M, N, K, G, or name, layers, tokens, dim, hidden, experts, top_k; found"),
        ("overhead", LAYER + "layers = 0", "layers=0 of 'mine'; give an integer of 1 or more"),
    ],
)
def test_bad_files(tmp_path: Path, command: str, text: str, message: str) -> None:
    path = tmp_path / "shapes.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        find_shapes(command, str(path))


def test_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_is_installed", lambda package: package != "tokamax")
    assert find_peers("grouped-mm", None) == ("torch", "torchao", "jax")
    assert find_peers("layer", None) == ("torch", "torchao", "transformers")
    assert find_peers("grouped-mm", "jax, torch,jax") == ("jax", "torch")
    with pytest.raises(UserError, match="--peers: tokamax is not installed; run: pip install tokamax"):
        find_peers("grouped-mm", "torch,tokamax")
    with pytest.raises(UserError, match="--peers: 'jax' is not a peer of layer; use torch, torchao, transformers"):
        find_peers("layer", "jax")


def test_recipes_and_rounds() -> None:
    assert set(BASE_RECIPES) == {"bf16", *FORMATS}
    assert make_options("quantize").recipes == BASE_RECIPES
    assert make_options("layer", recipes=" mxfp8_rceil,bf16,bf16").recipes == ("mxfp8_rceil", "bf16")
    with pytest.raises(UserError, match="--recipes: 'fp4' is not known; use bf16, "):
        make_options("layer", recipes="bf16,fp4")
    with pytest.raises(UserError, match="--rounds 0: give 1 or more"):
        make_options("layer", rounds=0)


@pytest.mark.parametrize("command", options.COMMANDS)
def test_options_travel_as_json(command: str) -> None:
    asked = make_options(command, rounds=3)
    assert Options.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked


@pytest.mark.parametrize(("M", "G"), [(128000, 8), (131072, 128), (4096, 128), (64, 8), (100, 3), (7, 4)])
def test_groups_are_uneven_and_aligned(M: int, G: int) -> None:
    sizes = uneven_sizes(M, G)
    assert sizes.sum() == M
    assert sizes.min() >= 0
    assert not any(sizes[:-1] % ALIGNMENT)
    assert M < 100 or len(set(sizes)) > 2


def test_work_counts_what_the_device_multiplies() -> None:
    assert gemm_work("bf16", 10, (9, 0)) == {"bf16": 30}
    assert gemm_work("fp8_rowwise", 10, (9, 0)) == {"fp8": 30}
    assert gemm_work("fp8_rowwise", 10, (9, 0), backward=False) == {"fp8": 10}
    assert gemm_work("fp8_rowwise_wgrad_with_hp", 10, (9, 0)) == {"fp8": 20, "bf16": 10}
    assert gemm_work("mxfp8_rceil", 10, (9, 0)) == {"bf16": 30}
    assert gemm_work("mxfp8_rceil", 10, (10, 0)) == {"fp8": 30}
    for recipe in RECIPES:
        assert sum(gemm_work(recipe, 10, None).values()) == 30
