"""Run by test_pipeline.py in a process without the interpreter: compare the kernel specialisations that `warm_up` and a
real call ask Triton for. Launches are recorded, not run; exit status 1 names those that the warm-up missed."""

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import jit

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.kernels.fake_cuda import CPU, FakeCuda, pretend
from xmoe import config_from_recipe
from xmoe.kernels import experts, pipeline
from xmoe.kernels.dispatch import Device, select

launches: set[tuple[str, str, str]] = set()
binders: dict[jit.JITFunction, object] = {}


def record(self, *args, grid, warmup, **options):
    """In place of JITFunction.run. It returns nothing, so `xmoe.kernels.launch` asks it each time."""
    if self not in binders:
        binders[self] = jit.create_function_from_signature(self.signature, self.params, backend)
    _, specialization, _ = binders[self](*args, debug=False, **options)
    launches.add((self.fn.__name__, str(specialization), str(options)))


def recorded(call, *args) -> set[tuple[str, str, str]]:
    launches.clear()
    call(*args)
    return set(launches)


def real_call(
    p: pipeline.Problem, config, view: Device, transposed: bool, save: bool, needs: tuple[bool, bool]
) -> None:
    dtypes = [getattr(torch, name) for name in (p.a_dtype, p.b_dtype, p.out_dtype)]
    A, B, dOut = (
        torch.zeros(s, dtype=d) for s, d in zip([(p.M, p.K), (p.G, p.K, p.N), (p.M, p.N)], dtypes, strict=True)
    )
    B = B.mT.contiguous().mT if transposed else B
    offs = torch.full((p.G,), p.M, dtype=torch.int32)
    spec = pipeline.forward_spec(p, config, view, save, save_amax=transposed and needs[0])
    outputs = pipeline.allocate(spec.outputs, CPU)
    pipeline.forward(p, config, view, A, B, offs, outputs, pipeline.allocate(spec.scratch, CPU))
    saved = (outputs["a_tokens"], outputs["a_tokens_scale"]) if "a_tokens" in outputs else (A,)
    b_amax = outputs.get("b_amax")
    spec = pipeline.backward_spec(p, config, view, *needs, amax_is_known=b_amax is not None)
    grads = pipeline.allocate(spec.outputs, CPU)
    if transposed and "dB" in grads:
        grads["dB"] = grads["dB"].view(p.G, p.N, p.K).mT
    pipeline.backward(p, config, view, dOut, saved, B, offs, grads, pipeline.allocate(spec.scratch, CPU), b_amax)


def real_save(p: pipeline.Problem, config, view: Device) -> None:
    spec = pipeline.saved_spec(p, config, view)
    A, offs = torch.zeros(p.M, p.K, dtype=getattr(torch, p.a_dtype)), torch.full((p.G,), p.M, dtype=torch.int32)
    pipeline.save(p, config, view, A, offs, *(pipeline.allocate(some, CPU) for some in (spec.outputs, spec.scratch)))


def real_experts(e: experts.Experts, config, view: Device, save: bool) -> None:
    def tensors(spec: pipeline.Spec) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return pipeline.allocate(spec.outputs, CPU), pipeline.allocate(spec.scratch, CPU)

    x, w, out = (getattr(torch, name) for name in (e.x_dtype, e.w_dtype, e.out_dtype))
    order = torch.arange(e.M, dtype=torch.int32) if e.k else None
    a = torch.zeros(e.x_rows, e.D, dtype=x)
    w1, w2 = torch.zeros(e.G, e.H, e.D, dtype=w), torch.zeros(e.G, e.D, e.H, dtype=w)
    offs = torch.full((e.G,), e.M, dtype=torch.int32)
    outputs, scratch = tensors(experts.forward_spec(e, config, view, save))
    experts.forward(e, config, view, a, w1, w2, w1, offs, outputs, scratch, order)
    if not save:
        return
    h = torch.zeros(e.M, e.H, dtype=x)
    h_saved, x_saved = (h,), (a,)
    if pipeline.saves_input(config):
        experts.swiglu_into(outputs["gate_up"], h)
    else:
        h_saved, x_saved = ((outputs[f"{name}_tokens"], outputs[f"{name}_tokens_scale"]) for name in "hx")
    w2_amax, w13_amax = outputs.get("w2_amax"), outputs.get("w13_amax")
    grads, scratch = tensors(pipeline.backward_spec(e.output_problem, config, view, amax_is_known=w2_amax is not None))
    grads["dB"] = grads["dB"].view(e.G, e.D, e.H).mT
    dout = torch.zeros(e.M, e.D, dtype=out)
    pipeline.backward(e.output_problem, config, view, dout, h_saved, w2.mT, offs, grads, scratch, w2_amax)
    where = experts.places(config, select(config, view), e.x_dtype)
    left, scratch = tensors(experts.gradient_spec(e, config, view))
    experts.gradient(e, config, view, h, outputs["gate_up"], offs, True, True, left, scratch)
    left |= {"dh": h, "gate_up": outputs["gate_up"]}
    maps = {name: left[name] for name in experts.MAPS if name in left}
    dx, scratch = tensors(experts.dgrad_spec(e, config, view, amax_is_known=w13_amax is not None))
    d, weights = (left[where.rows], left.get("d_scale")), (w1, w1)
    experts.dgrad(e, config, view, *d, weights, offs, dx, scratch, maps, w13_amax, outputs.get("place"))
    dw, scratch = tensors(experts.wgrad_spec(e, config, view))
    d = left[where.tokens], left.get("d_tokens_scale")
    experts.wgrad(e, config, view, *d, x_saved, offs, dw, scratch, maps, outputs.get("tokens"))


jit.JITFunction.run = record
pretend()

# Of the dtypes of a, b and the output every two in every combination, and float32 throughout.
DTYPES = [
    tuple({"b": "bfloat16", "f": "float32"}[letter] for letter in letters)
    for letters in ("bbb", "bff", "fbf", "ffb", "fff")
]
missed = []
for capability in ((9, 0), (10, 0)):
    backend = CUDABackend(GPUTarget("cuda", capability[0] * 10, 32))
    view = Device("cuda", capability)
    pipeline.device_of = lambda *_, view=view: view
    pipeline.warm_up.cache_clear()
    pipeline.warm_up_save.cache_clear()
    experts.warm_up.cache_clear()
    binders.clear()
    for recipe in ("bf16", "fp8_rowwise", "fp8_rowwise_wgrad_with_hp", "fp8_blockwise", "mxfp8_rceil"):
        config = config_from_recipe(recipe)
        for M, G in ((16, 1), (2048, 1), (1000, 1), (1000, 8), (2048, 4)):
            for dtypes in DTYPES:
                problem = pipeline.Problem(M, 64, 48, G, *dtypes)
                warm = recorded(pipeline.warm_up, problem, config, FakeCuda())
                assert warm, "the warm-up launched nothing"
                real = recorded(real_save, problem, config, view)
                assert bool(real) != pipeline.saves_input(config), "saving launches something, if it saves anything"
                missed += [
                    (recipe, problem, "save", name)
                    for name, *_ in real - recorded(pipeline.warm_up_save, problem, config, FakeCuda())
                ]
                for transposed in (False, True):
                    for save, *needs in ((True, True, True), (True, False, True), (False, True, False)):
                        real = recorded(real_call, problem, config, view, transposed, save, needs)
                        missed += [(recipe, problem, transposed, needs, name) for name, *_ in real - warm]
        for M, G, k in ((2048, 1, 0), (1000, 8, 1), (2048, 4, 2)):
            for dtypes in DTYPES:
                e = experts.Experts(M, 48, 128, G, *dtypes, k)
                warm = recorded(experts.warm_up, e, config, FakeCuda()) | recorded(
                    pipeline.warm_up.__wrapped__, e.output_problem, config, FakeCuda()
                )
                for save in (True, False):
                    real = recorded(real_experts, e, config, view, save)
                    missed += [(recipe, e, save, name) for name, *_ in real - warm]
print(*missed, sep="\n")
sys.exit(bool(missed))
