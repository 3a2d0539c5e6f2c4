"""The `backend` fixture of the kernel tests."""

import pytest

from tests.kernels.backends import INTERPRETER_WORKS, Gpu, Interpreter
from xmoe.kernels import e4m3


@pytest.fixture(
    params=[pytest.param(Interpreter, id="interpreter"), pytest.param(Gpu, marks=pytest.mark.gpu, id="gpu")]
)
def backend(request: pytest.FixtureRequest):
    """The machine under the kernels."""
    if request.param.hardware != e4m3.HARDWARE:
        pytest.skip("this process has the kernels compiled; TRITON_INTERPRET=1 has them interpreted")
    if request.param is Interpreter and not INTERPRETER_WORKS:
        pytest.skip("this triton's interpreter needs numpy < 2.4")
    return request.param
