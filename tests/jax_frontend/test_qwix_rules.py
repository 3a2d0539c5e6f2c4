"""`from_qwix_rules`: qwix's rules for quantized training, on objects with its fields."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import pytest

from xmoe import config_from_recipe
from xmoe.jax_frontend import from_qwix_rules


def rule(**fields: Any) -> SimpleNamespace:
    """A rule with qwix's fields, those that are given."""
    types = {"weight_qtype": "float8_e4m3fn", "act_qtype": jnp.float8_e4m3fn, "bwd_qtype": "float8_e4m3fn"}
    return SimpleNamespace(**{**types, **fields})


def test_qwix_rules() -> None:
    """The first rule whose path matches the parameter's module in full; slashes are dots, in classes too."""
    mapping = from_qwix_rules(
        [
            rule(module_path="decoder/dense.*", op_names=("dot_general",)),
            rule(module_path=r"decoder/layers_[^/]*/mlp"),
            rule(module_path=r"decoder\/layers_1/.*", weight_qtype=None),
            rule(module_path="encoder/.*", weight_qtype="mxfp8", act_qtype="mxfp8", bwd_qtype="mxfp8", tile_size=32),
            rule(module_path="encoder/.*"),
            rule(module_path=""),
        ]
    )
    assert mapping.resolve("decoder.layers_0.mlp.wi_0") == config_from_recipe("fp8_rowwise")
    assert mapping.resolve("decoder.layers_1.mlp.wi_0") == config_from_recipe("fp8_rowwise"), "the first decides"
    assert mapping.resolve("decoder.layers_1.other.w") is None
    assert mapping.resolve("decoder.layers_0.mlp.inner.w") is None, "the module's own parameters, not those inside it"
    assert mapping.resolve("decoder.layers_0.x.mlp.w") is None
    assert mapping.resolve("decoder.dense.w") is None
    assert mapping.resolve("encoder.moe.w") == config_from_recipe("mxfp8_rceil")
    assert mapping.resolve("w") == config_from_recipe("fp8_rowwise")
    assert from_qwix_rules([rule()]).resolve("any.thing") == config_from_recipe("fp8_rowwise")
    assert from_qwix_rules([rule()]).resolve("") == config_from_recipe("fp8_rowwise")


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_qtype": "int8"},
        {"act_qtype": None},
        {"bwd_qtype": None},
        {"bwd_qtype": jnp.float8_e5m2},
        {"tile_size": 128},
        {"bwd_weight_grad_tile_size": 0.5},
        {"act_static_scale": True},
        {"weight_calibration_method": "fixed,-1,1"},
        {"bwd_stochastic_rounding": "uniform"},
        {"disable_channelwise_axes": True},
        {"additional_qt_config": {"tile_size": 1}},
        {"module_path": "("},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_qwix_rules_that_no_recipe_follows(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"rules\[1\]: .*{next(iter(fields))}="):
        from_qwix_rules([rule(), rule(**fields)])
