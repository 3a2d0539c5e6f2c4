"""Replaying calls, beside running them."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from triton import knobs

from tests.kernels.fake_cuda import MEMORY, ONE, Driver
from xmoe import config_from_recipe
from xmoe.kernels import launch, pipeline, replay
from xmoe.kernels.specs import Prepared


class Caller:
    """Calls that launch ONE on the last bytes of a tensor, and counts how often they were run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, *tensors: torch.Tensor, facts: Any = "facts", run: Any = None) -> None:
        def last_bytes() -> None:
            self.runs += 1
            launch.launch(ONE, (2,), tensors[-1][16:], BLOCK=1)
            if run is not None:
                run()

        replay.replayed((facts,), tensors, (), last_bytes)


@pytest.fixture
def caller(compiled: list[Any], monkeypatch: pytest.MonkeyPatch) -> Caller:
    monkeypatch.setattr(launch, "DIRECT", True)
    monkeypatch.setattr(replay, "_calls", {})
    launch.launch(ONE, (2,), MEMORY[torch.int8], BLOCK=1)  # which compiles
    return Caller()


def fresh(count: int = 5) -> list[torch.Tensor]:
    return [torch.zeros(64, dtype=torch.int8) for _ in range(count)]


def test_the_third_call_is_replayed_at_its_own_addresses(caller, compiled):
    tensors = fresh()
    for x in tensors:
        caller(MEMORY[torch.float32], x)
    assert caller.runs == 2
    assert [call[9] for call in compiled] == [x.data_ptr() + 16 for x in tensors]
    assert [call[:9] for call in compiled] == [compiled[0][:9]] * 5


@pytest.mark.parametrize(
    ("why", "run"),
    [
        ("allocates", lambda: torch.empty(1)),
        ("writes", lambda: MEMORY[torch.int32].zero_()),
        ("copies", lambda: MEMORY[torch.int32].contiguous().clone()),
        ("launches on what is not its own", lambda: launch.launch(ONE, (2,), MEMORY[torch.int8], BLOCK=1)),
        ("is launched by Triton", lambda: launch.launch(ONE, (2,), True, BLOCK=1)),
    ],
)
def test_a_call_that_is_more_than_its_launches_is_run(why, run, caller):
    for x in fresh():
        caller(x, run=run)
    assert caller.runs == 5, f"a call that {why}"


def test_views_are_no_obstacle(caller):
    for x in fresh():
        caller(x, run=lambda x=x: x.view(8, 8).mT.unsqueeze(0)[:, 1:].view(torch.uint8).split(2, 1))
    assert caller.runs == 2


def test_tensors_that_overlap_are_not_told_apart(caller):
    for x in fresh():
        caller(x[32:], x)
    assert caller.runs == 5
    for x in fresh():
        caller(x[:32], x[32:])
    assert caller.runs == 5 + 2


def test_a_tensor_that_comes_twice_is_one(caller, compiled):
    tensors = fresh()
    for x in tensors:
        caller(x[:32], x, x[:8], x)
    assert caller.runs == 2
    assert [call[9] for call in compiled] == [x.data_ptr() + 16 for x in tensors]
    x, y = fresh(2)
    caller(x[:32], x, x[:8], y)  # of the same layouts
    assert caller.runs == 3
    assert compiled[-1][9] == y.data_ptr() + 16


def test_weights_several_or_prepared_are_inputs(compiled, caller):
    runs = []

    def call(*inputs: Any) -> None:
        def run() -> None:
            runs.append(inputs)
            launch.launch(ONE, (2,), inputs[-1][0], BLOCK=1)

        replay.replayed(("weights",), inputs, (), run)

    x, w, scale = fresh(3)
    several, prepared = ((x, [w, scale]), (x, scale, [w]), ([x], [w])), (Prepared(w, scale), Prepared(w, None))
    for inputs in (*several, (x, None, [w]), *((x, p) for p in prepared), (x, scale, prepared[1])):
        for _ in range(4):
            call(*inputs)
        assert len(runs) == 2, "the third and the fourth call are replayed"
        runs.clear()
    assert {launched[9] for launched in compiled} == {w.data_ptr()}


def test_a_view_that_reaches_past_its_tensor_is_not_replayed(caller):
    for x in fresh():
        caller(x[:32], run=lambda x=x: launch.launch(ONE, (2,), x[16:48], BLOCK=1))
    assert caller.runs == 5


def test_other_layouts_names_and_facts_are_other_calls(caller, monkeypatch):
    x = torch.zeros(1024, dtype=torch.int8)
    variants = [
        lambda: caller(x), lambda: caller(x, facts="others"), lambda: caller(x[:512]), lambda: caller(x[1:513]),
        lambda: caller(x.view(torch.uint8)), lambda: caller(x[::2]), lambda: caller(fresh()[0], x),
        lambda: replay.replayed(("facts",), (), ({"a": x},), lambda: caller(x)),
        lambda: replay.replayed(("facts",), (), ({"b": x},), lambda: caller(x)),
    ]  # fmt: skip
    for variant in variants:
        variant()
    assert len(replay._calls) == len(variants)
    monkeypatch.setattr(Driver, "device", 1)
    caller(x)
    assert len(replay._calls) == len(variants) + 1


def test_threads_replay_the_same_call_side_by_side(caller, compiled):
    def replay_some(tensors: list[torch.Tensor]) -> None:
        for x in tensors * 50:
            caller(x)

    several = [fresh() for _ in range(4)]
    for x in several[0][:2]:
        caller(x)
    compiled.clear()
    with ThreadPoolExecutor(len(several)) as pool:
        list(pool.map(replay_some, several))
    assert caller.runs == 2
    expected = [x.data_ptr() + 16 for tensors in several for x in tensors] * 50
    assert sorted(call[9] for call in compiled) == sorted(expected)


def test_hooks_see_the_launches_of_a_replayed_call(caller, monkeypatch):
    x = fresh()[0]
    for _ in range(3):
        caller(x)
    monkeypatch.setattr(ONE, "pre_run_hooks", [lambda *args, **options: None])
    caller(x)
    monkeypatch.setattr(ONE, "pre_run_hooks", [])
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", print)
    caller(x)
    assert caller.runs == 2 + 2


def test_an_error_while_recording_leaves_nothing_behind(caller, compiled):
    def fail() -> None:
        raise RuntimeError("out of memory")

    x = fresh()[0]
    caller(x)
    with pytest.raises(RuntimeError, match="out of memory"):
        caller(x, run=fail)
    assert launch.recorder.launches is None
    for _ in range(3):
        caller(x)
    assert (caller.runs, len(compiled)) == (5, 5)


def test_the_oldest_calls_are_forgotten(caller, monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", 3)
    x = fresh()[0]
    for facts in range(5):
        caller(x, facts=facts)
    assert [key[0] for key in replay._calls] == [(2,), (3,), (4,)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("recipe", "prepared"),
    [
        *(
            (name, False)
            for name in ("bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil")
        ),
        *((name, True) for name in ("fp8_rowwise", "fp8_blockwise", "mxfp8_rceil")),
    ],
)
def test_replayed_calls_give_the_bits_of_run_ones(recipe, prepared, monkeypatch):
    """The same problem on other data, offsets and memory each time, beside a call that Triton launches."""
    config, M, K, N, G = config_from_recipe(recipe), 512, 128, 256, 4
    device = pipeline.device_of("cuda", 0)
    problem = pipeline.Problem(M, N, K, G)
    specs = [
        spec(problem, config, device, prepared=prepared) for spec in (pipeline.forward_spec, pipeline.backward_spec)
    ]
    layouts = [pipeline.Layout(spec.scratch) for spec in specs]
    monkeypatch.setattr(replay, "_calls", {})

    def step(A, B, dOut, offs) -> list[torch.Tensor]:
        outputs, grads = (pipeline.allocate(spec.outputs, A.device) for spec in specs)
        for x in (*outputs.values(), *grads.values()):
            x.view(torch.uint8).fill_(0x7F)
        scratch = [pipeline.Arena(layout, A.device) for layout in layouts]
        by_k, by_n = B, B
        if prepared:
            by_k, by_n = (pipeline.prepare_weights(problem, config, device, b) for b in (B.mT, B))
        pipeline.forward(problem, config, device, A, by_k, offs, outputs, scratch[0])
        saved = (A,) if pipeline.saves_input(config) else (outputs["a_tokens"], outputs["a_tokens_scale"])
        pipeline.backward(problem, config, device, dOut, saved, by_n, offs, grads, scratch[1])
        return [outputs["out"], *grads.values()]

    kept = []
    for ends in ([100, 100, 300, 512], [0, 512, 512, 512], [128, 256, 384, 500], [1, 2, 3, 4], [512] * 4):
        A, B, dOut = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((M, K), (G, K, N), (M, N)))
        args = A, B, dOut, torch.tensor(ends, dtype=torch.int32, device="cuda")
        got = step(*args)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(launch, "DIRECT", False)
            patch.setattr(launch, "KNOWN", False)
            want = step(*args)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True)), ends
        kept += [args, got]  # so that the next step has other memory
    assert all(call.steps for call in replay._calls.values())
