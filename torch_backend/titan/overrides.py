"""torchtitan 0.3: overrides of its config tree, named in ``--override.imports``.

torchtitan 0.3 keeps the grouped GEMM of its experts in a method, so that a subclass can replace it. An override swaps a
module's config for that of such a subclass; parameters, their names, initialisation and sharding are the module's own.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts

from xmoe.config import GroupedMMConfig
from xmoe.torch_backend.grouped_mm import grouped_mm_by_key


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

    LowPrecision.__name__ = LowPrecision.__qualname__ = f"LowPrecision{base.__name__}"
    return LowPrecision
