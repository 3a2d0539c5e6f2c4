"""TrainConfig: what it accepts, its TOML form, the schedule."""

from dataclasses import replace
from pathlib import Path

import pytest

from xmoe.config import RECIPES, KernelPreference, config_from_recipe
from xmoe.train.config import PRESETS, TrainConfig
from xmoe.train.files import UserError


@pytest.mark.parametrize("preset", PRESETS)
def test_toml_round_trip(tmp_path: Path, preset: str) -> None:
    config = TrainConfig.from_dict(PRESETS[preset] | {"data": ['a "quoted" name.txt', "b\\c"], "recipes": RECIPES})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert TrainConfig.load(path) == config


def test_partial_file_keeps_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[train]\nsteps = 7\nlearning_rate = 1\nrecipes = ["bf16"]\n')
    assert TrainConfig.load(path) == TrainConfig(steps=7, learning_rate=1.0, recipes=("bf16",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nstep = 3", "unknown key step; the keys are frameworks, recipes"),
        ("steps = 3", r"found steps; the file must hold a table \[train\]"),
        (
            "[train]\n[model]\n",
            r"found train, model; the file must hold a table \[train\], and may hold a \[quantize\]",
        ),
        ("[quantize]\n", r"found quantize; the file must hold a table \[train\]"),
        ('[train]\ndata = ["a\\u0000b"]', r"data: 'a\\x00b' holds a NUL character"),
        ("", "found nothing"),
        ("[train\n", "not valid TOML"),
        ("[train]\nsteps = true", "steps=True is not an integer"),
        ("[train]\nsteps = 1.5", "steps=1.5 is not an integer"),
        ("[train]\nsteps = 0", "steps=0 must be above 0"),
        ("[train]\nseed = -1", "seed=-1 must be 0 or more"),
        ("[train]\nlearning_rate = nan", "learning_rate=nan is not a number"),
        ('[train]\nrecipes = "bf16"', r'recipes=.bf16. is not a list of strings; write recipes = \["'),
        ("[train]\nrecipes = []", "recipes is empty; give one or more of bf16, fp8_rowwise"),
        ('[train]\nrecipes = ["fp4"]', "recipes: 'fp4' is not known; use bf16, fp8_rowwise"),
        ('[train]\ndevice = "tpu"', "device: 'tpu' is not known; use auto, cpu, cuda"),
        ("[train]\ndim = 48", "dim=48 is not a multiple of 32"),
        ("[train]\nheads = 3", "heads=3 does not cut dim=128"),
        ("[train]\ntop_k = 9", "top_k=9 is more than num_experts=8"),
        ("[train]\nbeta2 = 1.0", "beta2=1.0 must be below 1"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        TrainConfig.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_quantize_table_beside_it_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("[train]\nsteps = 7\n" + config_from_recipe("mxfp8_floor").to_toml())
    assert TrainConfig.load(path) == TrainConfig(steps=7)
    assert config_from_recipe("mxfp8_floor").from_toml(path.read_text()).recipe == "mxfp8_floor"


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; give a readable TOML file"):
        TrainConfig.load(tmp_path / "config.toml")


def test_kernel_preference_goes_to_every_recipe_that_names_none() -> None:
    config = TrainConfig(kernel_preference="triton")
    for recipe in RECIPES:
        expected = KernelPreference.EMULATED if "emulated" in recipe else KernelPreference.TRITON
        assert config.quantization(recipe) == replace(config_from_recipe(recipe), kernel_preference=expected)
        assert TrainConfig().quantization(recipe) == config_from_recipe(recipe)


def test_schedule() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[54] == pytest.approx(0.55, abs=0.01)
    assert TrainConfig(steps=1, warmup_steps=0, learning_rate=1.0).learning_rate_at(0) == 1.0


def test_differences_name_the_change() -> None:
    config = TrainConfig()
    assert config.differences(replace(config, seed=1, steps=5)) == ["steps 200, now 5", "seed 0, now 1"]
    assert config.differences(replace(config, recipes=("bf16",), frameworks=("flax",))) == []
