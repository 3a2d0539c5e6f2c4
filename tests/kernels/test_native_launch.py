"""Taking Triton's launcher apart, and keeping descriptors. (What is launched then: replay_launches.py.)"""

from types import SimpleNamespace
from typing import Any

import pytest
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from tests.kernels.fake_cuda import MEMORY, Driver
from xmoe.kernels import launch, native_launch
from xmoe.kernels.launch import Descriptor
from xmoe.kernels.native_launch import Box, encoding, native, tensor_map

META = {"swizzle": 3, "elem_size": 1, "elem_type": 8, "block_size": [128, 64], "fp4_padded": False}


class Function:
    """In C."""

    def __call__(self, *args: Any) -> None:
        raise AssertionError("nothing is launched here")


@pytest.fixture(autouse=True)
def utils(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver's functions: `fill` gives what it is given, anew each time."""
    made = SimpleNamespace(fill_tma_descriptor=lambda *args: [*args], fill_tma_descriptor_tiled=lambda *args: [*args])
    monkeypatch.setattr(Driver, "utils", made, raising=False)
    monkeypatch.setattr(driver, "_active", Driver())
    return made


def loaded(*meta: Any, launcher: type = nvidia.CudaLauncher, **changes: Any) -> SimpleNamespace:
    """A compiled kernel of a parameter and descriptors."""
    made, signature = (
        launcher.__new__(launcher),
        {"x": "*bf16", **{str(i): "tensordesc<i8[1]>" for i, _ in enumerate(meta)}},
    )
    made.launch = nvidia.wrap_handle_tensordesc(Function(), signature, list(meta))
    made.global_scratch_size = made.profile_scratch_size = 0
    made.launch_cooperative_grid, made.launch_pdl = False, True
    made.arg_annotations, made.kernel_signature = ["x"], b"\x01"
    vars(made).update(changes)
    metadata = SimpleNamespace(target=SimpleNamespace(arch=90))
    return SimpleNamespace(run=made, function=5, packed_metadata=(4, 1, 0), metadata=metadata)


def test_a_known_launcher_is_taken_apart():
    found = native(loaded(META, {**META, "swizzle": 2}))
    assert found is not None
    assert isinstance(found.launch, Function)
    assert found.fixed[:3] == (5, False, True)
    assert [box.swizzle for box in found.boxes] == [3, 2]
    assert found.boxes[0][1:] == (90, 3, 1, 10, (128, 64)), "the type is the host's: 10 for the device's 8"
    assert native(loaded()).boxes == ()


class Other(nvidia.CudaLauncher):
    pass


@pytest.mark.parametrize(
    ("meta", "changes"),
    [
        ((META,), {"global_scratch_size": 16}),
        ((META,), {"profile_scratch_size": 16}),
        ((META,), {"launcher": Other}),
        ((META,), {"launch": lambda *args: None}),
        ((META, None), {}),
        (({**META, "fp4_padded": True},), {}),
        (({**META, "interleave": 0},), {}),
        (({name: META[name] for name in META if name != "swizzle"},), {}),
    ],
)
def test_a_launcher_that_is_not_known_stays_whole(meta, changes):
    assert native(loaded(*meta, **changes)) is None


@pytest.mark.parametrize("name", ["launch", "launch_pdl", "profile_scratch_size"])
def test_a_launcher_that_lacks_something_stays_whole(name):
    compiled = loaded(META)
    delattr(compiled.run, name)
    assert native(compiled) is None


def test_a_tensor_map_is_made_once_for_the_same_facts(utils):
    boxes = [Box(utils.fill_tma_descriptor, 90, 3, 1, 10, block) for block in ((128, 64), (64, 64))]
    facts = [
        (box, shape, strides, address)
        for box in (*boxes, boxes[0]._replace(architecture=100), boxes[0]._replace(swizzle=0))
        for shape in ((256, 64), (128, 64))
        for strides in ((64, 1), (128, 1))
        for address in (1024, 2048)
    ]
    maps = [tensor_map(encoding(*rest), address) for *rest, address in facts]
    assert len({id(each) for each in maps}) == len(facts)
    assert all(tensor_map(encoding(*rest), a) is each for (*rest, a), each in zip(facts, maps, strict=True))
    for (box, shape, strides, address), each in zip(facts, maps, strict=True):
        assert each == [address, box.swizzle, 1, 10, box.block, shape, strides, 0]


def test_what_is_kept_is_bounded():
    assert native_launch.encoding.cache_info().maxsize <= 4096
    assert native_launch.tensor_map.cache_info().maxsize <= 16384


def test_a_map_that_cannot_be_made_is_an_error_each_time(utils):
    def refuse(*args: Any) -> None:
        raise RuntimeError("Failed to create tensor map descriptor")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="tensor map"):
            tensor_map(encoding(Box(refuse, 90, 3, 1, 10, (128, 64)), (256, 64), (64, 1)), 1024)


@pytest.mark.parametrize("nested", [False, True])
def test_each_descriptor_is_expanded_by_its_own_box(nested, utils):
    calls: list[Any] = []
    boxes = tuple(Box(utils.fill_tma_descriptor, 90, swizzle, 1, 10, (8, 32)) for swizzle in (3, 2))
    compiled = launch.Compiled(lambda *args: calls.append(args), ("fixed",), nested, boxes, (None,), None)
    x, y = (
        Descriptor(MEMORY[dtype], (8, size), (64, 1), (8, 32)) for dtype, size in zip(MEMORY, (32, 64), strict=False)
    )
    launch.start(compiled, (3, 2, 1), 7, [x, 11, y])
    of_x, of_y = (
        [d.base.data_ptr(), swizzle, 1, 10, (8, 32), d.shape, d.strides, 0] for d, swizzle in ((x, 3), (y, 2))
    )
    arguments = of_x, 8, 32, 64, 1, 11, of_y, 8, 64, 64, 1, None
    assert calls == [(3, 2, 1, 7, "fixed", *([arguments] if nested else arguments))]
