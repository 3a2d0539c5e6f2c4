"""FSDP2: the checks of fsdp_checks.py."""

from pathlib import Path

import pytest

from tests.torch_backend import fsdp_checks
from tests.torch_backend.distributed import checks, results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return results(fsdp_checks.__file__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", checks(fsdp_checks))
def test_fsdp(found: dict[str, str], name: str) -> None:
    assert not found[name], found[name]
