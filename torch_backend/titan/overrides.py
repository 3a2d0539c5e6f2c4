"""torchtitan 0.3: overrides of its config tree, named in ``--override.imports``.

torchtitan 0.3 keeps the grouped GEMM of its experts in a method, so that a subclass can replace it. An override swaps a
module's config for that of such a subclass; parameters, their names, initialisation and sharding are the module's own.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.linear import Linear  # pyright: ignore[reportMissingImports]
from torchtitan.models.common.moe import GroupedExperts  # pyright: ignore[reportMissingImports]

from xmoe.config import GroupedMMConfig, LinearConfig
from xmoe.operands import FEATURE_MULTIPLE
from xmoe.torch_backend.grouped_gemm import grouped_mm_by_key
from xmoe.torch_backend.titan.tensor_parallel import linear


@override(target=GroupedExperts.Config, description="experts' grouped GEMMs in low precision (xmoe)")
def grouped_experts(cfg: Any, recipe: str = "fp8_rowwise", **fields: Any) -> Any:
    """The config of the same experts with their grouped GEMMs in the precision of `recipe`.

    Args:
        cfg: ``GroupedExperts.Config`` or a subclass of it that keeps its grouped GEMMs in ``_grouped_mm``.
        recipe: one of ``xmoe.RECIPES``.
        fields: other fields of the recipe's config, ``{"recipe": "fp8_rowwise", "accumulation": "precise"}``.

    Raises:
        ValueError: an unknown recipe or field.
    """
    config = GroupedMMConfig.from_dict({"recipe": recipe, **fields})
    return derive(cfg, _low_precision(type(cfg)._owner).Config, xmoe_config=config.to_key())


@cache
def _low_precision(base: Any) -> Any:
    """The subclass of a ``GroupedExperts`` class that multiplies under ``config.xmoe_config``, a config's key."""

    class LowPrecision(base):
        @dataclass(kw_only=True, slots=True)
        class Config(base.Config):
            xmoe_config: str

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.xmoe_config: str = config.xmoe_config

        def _grouped_mm(self, *, A: Tensor, B_t: Tensor, offs: Tensor) -> Tensor:
            return grouped_mm_by_key(A, B_t, offs, self.xmoe_config)

        def extra_repr(self) -> str:
            return ", ".join(filter(None, (super().extra_repr(), f"xmoe_config={self.xmoe_config!r}")))

    return _named(LowPrecision, base)


@override(
    target=Linear.Config,
    fqns=["*.attention.*", "*.feed_forward.*", "*.shared_experts.*"],
    description="linears in low precision (xmoe)",
)
def linears(cfg: Any, recipe: str = "rowwise", **fields: Any) -> Any:
    """The config of the same linear with its GEMMs in the precision of `recipe`; of attention, feed-forward and shared
    experts, not of the router and the head. One with a size that is not a multiple of 16 stays as it is.

    Args:
        cfg: ``Linear.Config``; a subclass of it has a forward of its own and stays as it is.
        recipe: one of ``xmoe.config.LINEAR_RECIPES``.
        fields: other fields of the recipe's config.

    Raises:
        ValueError: an unknown recipe or field.
    """
    config = LinearConfig.from_dict({"recipe": recipe, **fields})
    fits = config.pad_inner_dim or cfg.in_features % FEATURE_MULTIPLE == cfg.out_features % FEATURE_MULTIPLE == 0
    if type(cfg) is not Linear.Config or not fits:
        return cfg
    return derive(cfg, LowPrecisionLinear.Config, xmoe_config=config.to_key())


class LowPrecisionLinear(Linear):
    """torchtitan's linear, multiplying under ``config.xmoe_config``, a config's key."""

    @dataclass(kw_only=True, slots=True)
    class Config(Linear.Config):
        xmoe_config: str

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.xmoe_config: str = config.xmoe_config

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]; plain tensors and DTensors."""
        return linear(input, self.weight, self.bias, self.xmoe_config)


def _named(cls: Any, base: Any) -> Any:
    cls.__name__ = cls.__qualname__ = f"LowPrecision{base.__name__}"
    cls.Config.__qualname__ = f"{cls.__name__}.Config"
    return cls
