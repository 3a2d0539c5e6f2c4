"""Scratch in one piece of memory."""

import itertools

import torch

from xmoe.kernels.specs import Arena, Layout, TensorSpec

SPECS = {
    "data": TensorSpec((3, 5), "float8_e4m3fn"),
    "scale": TensorSpec((3,), "float32"),
    "none": TensorSpec((0, 4), "float32"),
    "wide": TensorSpec((300, 2), "bfloat16"),
}
CPU = torch.device("cpu")


def test_an_arena_holds_its_tensors_apart():
    arena = Arena(Layout(SPECS), CPU)
    assert [*arena] == [*SPECS]
    assert "wide" in arena
    assert arena.get("other") is None
    for index, (name, spec) in enumerate(SPECS.items()):
        assert arena[name].shape == spec.shape
        assert arena[name].dtype == getattr(torch, spec.dtype)
        assert (arena[name].data_ptr() - arena.memory.data_ptr()) % Layout.ALIGNMENT == 0 or not arena[name].numel()
        arena[name].view(torch.uint8).fill_(index)
    for index, x in enumerate(arena.values()):
        assert (x.view(torch.uint8) == index).all()
    ends = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in arena.values() if x.numel())
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert ends[-1][1] <= arena.memory.data_ptr() + arena.memory.nbytes


def test_tensors_that_take_turns_share_memory():
    layout = Layout(SPECS, turns=(("data", "scale", "other"), ("wide",)))
    arena = Arena(layout, CPU)
    assert arena["data"].data_ptr() == arena["wide"].data_ptr()
    assert arena["scale"].data_ptr() == arena["data"].data_ptr() + Layout.ALIGNMENT
    assert layout.bytes == -(-arena["wide"].nbytes // Layout.ALIGNMENT) * Layout.ALIGNMENT
    assert {*arena} == {*SPECS}


def test_layouts_are_equal_to_themselves_alone():
    """They stand for their specs in the keys of calls that are replayed."""
    layout = Layout(SPECS)
    assert layout == layout
    assert layout != Layout(SPECS)
