"""The older names: the new configs, and warnings whose advice works."""

import re

import pytest

import xmoe
from xmoe.legacy import MoEScalingType, MoETrainingConfig


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        ({}, "fp8_rowwise"),
        ({"scaling_type": MoEScalingType.FP8_ROWWISE}, "fp8_rowwise"),
        ({"scaling_type": MoEScalingType.MXFP8}, "mxfp8_rceil"),
        ({"scaling_type": "mxfp8"}, "mxfp8_rceil"),
    ],
)
def test_gives_the_new_config_and_says_how_to_write_it(arguments, recipe):
    with pytest.warns(DeprecationWarning, match="MoETrainingConfig.* is deprecated; write ") as caught:
        config = MoETrainingConfig(**arguments)
    assert config == xmoe.config_from_recipe(recipe)
    assert caught[0].filename == __file__
    advice = re.search(r"; write (.*)$", str(caught[0].message))
    assert advice, "the warning gives no replacement"
    assert eval(advice[1], vars(xmoe)) == config


def test_unknown_scaling_type():
    with pytest.raises(ValueError, match=r"scaling_type='int8' is not known; use one of fp8_rowwise, mxfp8$"):
        MoETrainingConfig(scaling_type="int8")
