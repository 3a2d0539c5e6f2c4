"""xmoe for torchtitan 0.2.2 (model converters) and 0.3 (config overrides); docs/torchtitan.md has the commands.

torchtitan 0.2.2 imports this module by name, for the options that it adds (``--job.custom_config_module``) and for the
converters that it registers (``--experimental.custom_import``). torchtitan 0.3 imports `overrides`.
"""

from importlib.util import find_spec

try:
    HAS_CONVERTERS = find_spec("torchtitan.protocols.model_converter") is not None
except ModuleNotFoundError as error:
    raise ModuleNotFoundError('torchtitan is not installed; pip install "xmoe[titan]"', name="torchtitan") from error

if HAS_CONVERTERS:
    from xmoe.torch_backend.titan.converters import GroupedMMConverter, JobConfig, LinearConverter

    __all__ = ["GroupedMMConverter", "JobConfig", "LinearConverter"]
else:
    from xmoe.torch_backend.titan.overrides import grouped_experts, linears

    __all__ = ["grouped_experts", "linears"]
