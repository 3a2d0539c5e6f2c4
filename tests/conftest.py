"""What all tests share: a fixed seed, the hypothesis profile, and which machine can run what."""

import importlib.util
import os
import random
import sys

import hypothesis
import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)

if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by triton.jit, so before any kernel module is imported

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    from tests.interpreter import quicken

    quicken()

hypothesis.settings.register_profile(
    "xmoe", deadline=None, max_examples=25, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("xmoe")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked ``gpu`` on a machine that cannot run them."""
    if HAS_GPU:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU of capability 8.9 or newer"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same global seeds, in whichever order the tests run."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (the global state is what is being pinned)
    torch.manual_seed(0)


def pytest_report_header() -> str:
    """The versions that a failure report needs."""
    versions = [f"torch {torch.__version__}", f"numpy {np.__version__}", f"python {sys.version.split()[0]}"]
    return ", ".join([*versions, f"gpu {torch.cuda.get_device_name() if HAS_GPU else 'none'}"])
