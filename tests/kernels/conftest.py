"""Fixtures of the kernel tests: the machine under the kernels, or one that no kernel reaches."""

from typing import Any

import pytest
import triton.language as tl

from tests.kernels.backends import INTERPRETER_WORKS, Gpu, Interpreter, interpreted_dot_scaled
from xmoe.kernels import e4m3


@pytest.fixture(
    params=[pytest.param(Interpreter, id="interpreter"), pytest.param(Gpu, marks=pytest.mark.gpu, id="gpu")]
)
def backend(request: pytest.FixtureRequest):
    """The machine under the kernels."""
    if request.param.hardware != bool(e4m3.HARDWARE):
        pytest.skip("this process has the kernels compiled; TRITON_INTERPRET=1 has them interpreted")
    if request.param is Interpreter and not INTERPRETER_WORKS:
        pytest.skip("this triton's interpreter needs numpy < 2.4")
    return request.param


@pytest.fixture
def dot_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the interpreter the block-scaled MMA that it lacks."""
    if not e4m3.HARDWARE:
        monkeypatch.setattr(tl, "dot_scaled", interpreted_dot_scaled)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A device that no kernel reaches; the arguments of Triton's own launches."""
    from triton.runtime import JITFunction, driver

    from tests.kernels.fake_cuda import Driver
    from xmoe.kernels import launch

    seen: list[Any] = []
    monkeypatch.setattr(driver, "_active", Driver())
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, grid, warmup, **options: seen.append(args))
    monkeypatch.setattr(launch, "_compiled", {})
    return seen


@pytest.fixture
def compiled(fake_gpu: list[Any], monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Where the direct launches go; Triton's own still go to `fake_gpu`."""
    from triton.runtime import JITFunction

    from tests.kernels.fake_cuda import FakeCompiled

    calls: list[Any] = []

    def run(self: JITFunction, *args: Any, **_: Any) -> FakeCompiled:
        fake_gpu.append(args)
        return FakeCompiled(self, calls)

    monkeypatch.setattr(JITFunction, "run", run)
    return calls
