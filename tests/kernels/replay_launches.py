"""Run by test_launch.py in a process without the interpreter: what the function in C is given by direct launches and by
replayed ones, beside what it is given by Triton's own launcher for the same tensors. Nothing is compiled or run; exit
status 1 names what differs."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.backends.nvidia.driver import CudaLauncher
from triton.compiler import CompiledKernel
from triton.runtime import _allocation, jit

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernels import fake_cuda, fake_launcher
from tests.kernels.fake_cuda import CPU, Driver
from tests.kernels.fake_launcher import launched
from xmoe import config_from_recipe
from xmoe.kernels import experts, launch, pipeline, replay
from xmoe.kernels.dispatch import Device, select

TARGET = GPUTarget("cuda", 90, 32)
NOT_REPLAYED = {
    *(("bf16", call, "float32") for call in ("forward", "backward", "experts", "dgrad", "wgrad")),
    *(("fp8_rowwise_wgrad_with_hp", call, "float32") for call in ("backward", "wgrad")),
    ("bf16", "dgrad", "bfloat16"),
}
"""(recipe, call, dtype) whose operands torch casts to bf16, or puts side by side."""
by_triton = through_launcher = scratch = 0
binders: dict[jit.JITFunction, Any] = {}
functions: dict[tuple[str, ...], int] = {}


class Compiled(CompiledKernel):
    """A kernel, loaded, for arguments of a kind: `function` is another one for each kind."""

    def __init__(self, kernel: jit.JITFunction, specialization: list[Any], options: dict[str, Any]):
        self.src, self.metadata = SimpleNamespace(fn=kernel), SimpleNamespace(target=TARGET)
        self.function = functions.setdefault((kernel.fn.__name__, str(specialization), str(options)), len(functions))
        self.packed_metadata = (4, 1, self.function)
        signature = {param.name: kind for param, (kind, *_) in zip(kernel.params, specialization, strict=True)}
        self.module, self._run = "loaded", fake_launcher.launcher(kernel, signature, options, scratch)


def run_by_triton(self: jit.JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Compiled:
    """In place of JITFunction.run."""
    global by_triton
    by_triton += 1
    if self not in binders:
        binders[self] = jit.create_function_from_signature(self.signature, self.params, CUDABackend(TARGET))
    bound, specialization, _ = binders[self](*args, debug=False, **options)
    compiled = Compiled(self, specialization, options)
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    place = *(*grid, 1, 1)[:3], Driver.stream, compiled.function, compiled.packed_metadata
    compiled.run(*place, None, *hooks, *bound.values())
    return compiled


def counted(self: CudaLauncher, *args: Any, call: Callable[..., None] = CudaLauncher.__call__) -> None:
    """In place of CudaLauncher.__call__."""
    global through_launcher
    through_launcher += 1
    call(self, *args)


def noted(call: Callable[[], None]) -> tuple[list[tuple[Any, ...]], int, int]:
    """The launches of a call, how many of them Triton was asked for, and how many went through its launcher."""
    global by_triton, through_launcher
    launched.clear()
    by_triton = through_launcher = 0
    call()
    return list(launched), by_triton, through_launcher


def tensor(dtype: str, *shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=getattr(torch, dtype))


layouts: dict[int, pipeline.Layout] = {}


def scratch_of(spec: pipeline.Spec, arena: bool) -> pipeline.Tensors:
    """As JAX gives it, a buffer each, or as torch does, in an arena."""
    if not arena:
        return pipeline.allocate(spec.scratch, CPU)
    return pipeline.Arena(layouts.setdefault(id(spec), pipeline.Layout(spec.scratch)), CPU)


def grouped_mm(config: Any, view: Device, dtypes: tuple[str, str, str], stored: str, arena: bool, prepared: bool):
    """Forward and backward, on tensors of their own."""
    p = pipeline.Problem(1000, 64, 48, 8, *dtypes)
    A, B, dOut = tensor(dtypes[0], p.M, p.K), tensor(dtypes[1], p.G, p.K, p.N), tensor(dtypes[2], p.M, p.N)
    forward = pipeline.forward_spec(p, config, view, prepared=prepared, save_amax=stored == "GNK")
    known = "b_amax" in forward.outputs
    backward = pipeline.backward_spec(p, config, view, prepared=prepared, amax_is_known=known)
    outputs, grads, offs = (
        pipeline.allocate(forward.outputs, CPU),
        pipeline.allocate(backward.outputs, CPU),
        OFFS.clone(),
    )
    if stored == "GNK":
        B, grads["dB"] = B.mT.contiguous().mT, grads["dB"].view(p.G, p.N, p.K).mT
    by_k, by_n = pipeline.prepare_both(p, config, view, B) if prepared else (B, B)
    b_amax = outputs.get("b_amax")
    saved = (A,) if pipeline.saves_input(config) else (outputs["a_tokens"], outputs["a_tokens_scale"])
    scratch = scratch_of(forward, arena), scratch_of(backward, arena)
    return (
        lambda: pipeline.forward(p, config, view, A, by_k, offs, outputs, scratch[0]),
        lambda: pipeline.backward(p, config, view, dOut, saved, by_n, offs, grads, scratch[1], b_amax),
    )


def one_gradient(config: Any, view: Device, dtypes: tuple[str, str, str], stored: str, arena: bool, prepared: bool):
    """Backward for dA and for dB, with no more than each needs."""
    p = pipeline.Problem(1000, 64, 48, 8, *dtypes)
    A, B, dOut = tensor(dtypes[0], p.M, p.K), tensor(dtypes[1], p.G, p.K, p.N), tensor(dtypes[2], p.M, p.N)
    b, offs = pipeline.prepare_weights(p, config, view, B) if prepared else B, OFFS.clone()
    tokens = pipeline.allocate(pipeline.forward_spec(p, config, view).outputs, CPU)
    saved = (A,) if pipeline.saves_input(config) else (tokens["a_tokens"], tokens["a_tokens_scale"])
    specs = [pipeline.backward_spec(p, config, view, *needs, prepared) for needs in ((True, False), (False, True))]
    (dA, dB), scratch = (pipeline.allocate(spec.outputs, CPU) for spec in specs), [scratch_of(s, arena) for s in specs]
    return (
        lambda: pipeline.backward(p, config, view, dOut, (), b, offs, dA, scratch[0]),
        lambda: pipeline.backward(p, config, view, dOut, saved, None, offs, dB, scratch[1]),
    )


def swiglu_experts(config: Any, view: Device, dtypes: tuple[str, str, str], _: str, arena: bool, prepared: bool):
    """Every stage but w2's backward, on tensors of their own."""
    e = experts.Experts(1000, 64, 128, 8, *dtypes)
    x, dh, offs = tensor(dtypes[0], e.M, e.D), tensor(dtypes[0], e.M, e.H), OFFS.clone()
    w1, w2, w3 = (tensor(dtypes[1], e.G, *shape) for shape in ((e.H, e.D), (e.D, e.H), (e.H, e.D)))
    w13 = w1, w3
    if prepared:
        w1, w2, w3, _, w13 = experts.prepare_weights(e, config, view, w1, w2, w3)
    forward = experts.forward_spec(e, config, view, prepared=prepared)
    specs = (
        forward,
        experts.gradient_spec(e, config, view),
        experts.dgrad_spec(e, config, view, prepared=prepared, amax_is_known="w13_amax" in forward.outputs),
        experts.wgrad_spec(e, config, view),
    )
    out, left, dx, dw = (pipeline.allocate(spec.outputs, CPU) for spec in specs)
    scratch = [scratch_of(spec, arena) for spec in specs]
    given = {"dh": dh, "gate_up": out["gate_up"]}
    where = experts.places(config, select(config, view), e.x_dtype)
    rows = (left | given)[where.rows], left.get("d_scale")
    tokens = (left | given)[where.tokens], left.get("d_tokens_scale")
    maps = {name: left[name] for name in experts.MAPS if name in left}
    saved = (x,) if pipeline.saves_input(config) else (out["x_tokens"], out["x_tokens_scale"])
    return (
        lambda: experts.forward(e, config, view, x, w1, w2, w3, offs, out, scratch[0]),
        lambda: experts.gradient(e, config, view, *given.values(), offs, True, True, left, scratch[1]),
        lambda: experts.dgrad(e, config, view, *rows, w13, offs, dx, scratch[2], maps, out.get("w13_amax")),
        lambda: experts.wgrad(e, config, view, *tokens, saved, offs, dw, scratch[3], maps),
    )


def check(make: Callable[..., tuple[Callable[[], None], ...]], *args: Any) -> list[str]:
    """What differs: each call is run, recorded and replayed, on other tensors each time."""
    versions, wrong = [make(*args) for _ in range(3)], []
    for index, (first, second, third) in enumerate(zip(*versions, strict=True)):
        for name, call, most in (("first", first, 99), ("recorded", second, 0), ("replayed", third, 0)):
            got, asked, through = noted(call)
            launch.KNOWN = False
            launch.DIRECT = False
            want, _, all_launches = noted(call)
            launch.KNOWN = launch.DIRECT = True
            expected = all_launches if scratch else asked
            if got != want or not want or asked > most or through != expected:
                wrong.append(
                    f"{make.__name__}{args} {index} {name}: {len(got)} launches, {asked} of them by Triton, {through} "
                    f"instead of {expected} through its launcher"
                )
    return wrong


assert launch.DIRECT, f"triton is not known here: {launch.KNOWN=}"
fake_cuda.pretend()
fake_launcher.pretend()
jit.JITFunction.run = run_by_triton
CudaLauncher.__call__ = counted
_allocation.set_allocator(lambda size, alignment, stream: size)
OFFS = torch.full((8,), 1000, dtype=torch.int32)
RECIPES = "bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil"
wrong, unreplayed = [], set()
# With scratch, which Triton's launcher allocates, everything goes through that, from wherever it is launched.
for capability, scratch, recipes in (((9, 0), 0, RECIPES), ((10, 0), 0, RECIPES), ((9, 0), 16, RECIPES[3:4])):  # noqa: B007
    view = Device("cuda", capability)
    launch._compiled.clear()
    for recipe in recipes:
        config = config_from_recipe(recipe)
        for dtypes in (("bfloat16",) * 3, ("float32",) * 3):
            cases = ("GKN", True, False), ("GNK", True, False), ("GNK", False, False)
            if recipe != "bf16":
                cases += ("GKN", True, True), ("GNK", False, True)
            for stored, arena, prepared in cases:
                for make in (grouped_mm, one_gradient, swiglu_experts):
                    replay._calls.clear()
                    wrong += check(make, config, view, dtypes, stored, arena, prepared)
                    unreplayed |= {(recipe, key[0][0], dtypes[0]) for key, c in replay._calls.items() if not c.steps}
wrong += [f"{case}: replayed or not, unlike NOT_REPLAYED" for case in sorted(unreplayed ^ NOT_REPLAYED)]
if not any(kernel.fn.__name__ == "_blockwise" for kernel in binders):
    wrong.append("nothing was launched in Gluon")
print(*wrong, sep="\n")
sys.exit(bool(wrong))
