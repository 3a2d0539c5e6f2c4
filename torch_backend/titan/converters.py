"""torchtitan 0.2.2: the model converters ``quantize.grouped_mm.xmoe`` and ``quantize.linear.xmoe``, and their options.

torchtitan builds the model on the meta device, converts it, distributes it, and only then gives it values; so these
converters see whole parameters, and what they wrap must stay wrapped through DTensor, FSDP2 and ``to_empty``.
"""

from dataclasses import dataclass, field

import torchtitan.protocols.model_converter as model_converter  # pyright: ignore[reportMissingImports]
from torch import nn
from torchtitan.config import JobConfig as TitanJobConfig  # pyright: ignore[reportMissingImports]
from torchtitan.distributed import ParallelDims  # pyright: ignore[reportMissingImports]

from xmoe.config import LinearConfig, config_from_recipe
from xmoe.torch_backend.linear_filter import filter_fqns
from xmoe.torch_backend.quantize import quantize_
from xmoe.torch_backend.titan.tensor_parallel import run_local

GROUPED_MM = "quantize.grouped_mm.xmoe"
LINEAR = "quantize.linear.xmoe"


@dataclass
class GroupedMMOptions:
    """``[quantize.grouped_mm.xmoe]``"""

    fqns: list[str] = field(default_factory=lambda: ["experts"])
    """Parts of module names, comma-separated: expert weights in a module whose name contains one are converted."""

    recipe: str = "fp8_rowwise"
    """The recipe of their grouped GEMMs, one of ``xmoe.RECIPES``."""


@dataclass
class GroupedMM:
    """``[quantize.grouped_mm]``"""

    xmoe: GroupedMMOptions = field(default_factory=GroupedMMOptions)


@dataclass
class LinearOptions:
    """``[quantize.linear.xmoe]``"""

    recipe: str = "rowwise"
    """The recipe of the linears' GEMMs, one of ``xmoe.config.LINEAR_RECIPES``."""

    filter_fqns: list[str] = field(default_factory=lambda: ["output", "router.gate"])
    """Parts of names, comma-separated: linears whose name contains one stay as they are, and so do those with a size
    that is not a multiple of 16. "auto_filter_small_kn" leaves out those that are too small to gain speed."""


@dataclass
class Linear:
    """``[quantize.linear]``"""

    xmoe: LinearOptions = field(default_factory=LinearOptions)


@dataclass
class Quantize:
    """``[quantize]``"""

    grouped_mm: GroupedMM = field(default_factory=GroupedMM)
    linear: Linear = field(default_factory=Linear)


@dataclass
class JobConfig:
    """What ``--job.custom_config_module xmoe.torch_backend.titan`` adds to torchtitan's options."""

    quantize: Quantize = field(default_factory=Quantize)


class GroupedMMConverter:
    """``quantize.grouped_mm.xmoe``: `quantize_` on the expert weights of the modules that ``fqns`` names.

    Raises ValueError where ``recipe`` is not known, or an entry of ``fqns`` names no module with expert weights.
    """

    def __init__(self, job_config: TitanJobConfig, parallel_dims: ParallelDims) -> None:
        # Without the config module, torchtitan has no such options, and refuses them too.
        self.options = getattr(job_config.quantize.grouped_mm, "xmoe", GroupedMMOptions())
        self.config = config_from_recipe(self.options.recipe)

    def convert(self, model: nn.Module) -> None:
        """Converts `model` in place."""
        fqns = self.options.fqns
        names = [name.rpartition(".")[0] for name, p in model.named_parameters() if p.ndim == 3]
        if missing := [fqn for fqn in fqns if not any(fqn in name for name in names)] or ([] if fqns else ["nothing"]):
            raise ValueError(
                f"{GROUPED_MM}.fqns names {', '.join(missing)}, which no module with expert weights has in its name; "
                f"give parts of {', '.join(names) or 'module names (this model has no experts)'}"
            )
        quantize_(model, self.config, filter_fn=lambda _, name: any(fqn in name for fqn in fqns))

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing: scales are computed in each forward and backward."""


class LinearConverter:
    """``quantize.linear.xmoe``: `quantize_` on all linears but those that ``filter_fqns`` names.

    Raises ValueError where ``recipe`` is not known, or no linear is left.
    """

    def __init__(self, job_config: TitanJobConfig, parallel_dims: ParallelDims) -> None:
        self.options = getattr(job_config.quantize.linear, "xmoe", LinearOptions())
        self.config = LinearConfig.from_recipe(self.options.recipe)
        self.tensor_parallel = parallel_dims.tp_enabled

    def convert(self, model: nn.Module) -> None:
        """Converts `model` in place."""
        quantize_(model, self.config, filter_fn=filter_fqns(self.options.filter_fqns, recipe=self.config))
        if self.tensor_parallel:
            run_local(model)

    def post_optimizer_hook(self, model: nn.Module | list[nn.Module]) -> None:
        """Nothing: scales are computed in each forward and backward."""


model_converter.register_model_converter(GroupedMMConverter, GROUPED_MM)
model_converter.register_model_converter(LinearConverter, LINEAR)
