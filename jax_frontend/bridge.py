"""The bridge: xmoe's kernels inside `jax.jit`, on XLA's buffers and stream, without a copy.

`jax.experimental.buffer_callback` hands device buffers to Python, DLPack makes torch tensors of them, and
`xmoe.kernels.pipeline` writes into those that XLA allocated, scratch included. On a GPU XLA records the launches of the
Triton kernels into a CUDA graph and replays it without Python.

Rules that the callbacks keep: they are cached per static configuration (a fresh closure would compile anew at every
call); they hold no tensor, write no input, and raise on no data, because an exception on one shard before a collective
hangs the others. All validation happens at trace time. torch and `xmoe.kernels` are imported here only, on first use.

M tokens, K contraction of the forward, N output features, G groups.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.buffer_callback import buffer_callback

from xmoe.config import GroupedMMConfig, KernelPreference
from xmoe.jax_frontend.emulation import Saved
from xmoe.jax_frontend.plan import ExpertsPlan, Plan
from xmoe.jax_frontend.varying import vary_over, varying_axes

if TYPE_CHECKING:
    import torch

    from xmoe.kernels import pipeline
    from xmoe.kernels.dispatch import Device, Implementation


def forward(
    plan: Plan, lhs: jax.Array, rhs: jax.Array, offs: jax.Array, *, save: bool, save_amax: bool = False
) -> tuple[jax.Array, Saved, jax.Array | None]:
    """out [M, N]; with ``save``, what `backward` needs of lhs (else ``()``); with ``save_amax``, if they come at no
    cost, the maxima that spare `backward` a pass over rhs."""
    got = _run(_forward_call(plan, save, save_amax and plan.transpose_rhs), lhs, rhs, offs)
    tokens = tuple(got[name] for name in ("a_tokens", "a_tokens_scale") if name in got)
    return got["out"], tokens or ((lhs,) if save else ()), got.get("b_amax")


def wgrad_operand(plan: Plan, lhs: jax.Array, offs: jax.Array) -> Saved:
    """What `backward` needs of lhs for drhs, without a forward."""
    if _pipeline().saves_input(plan.config):
        return (lhs,)
    got = _run(_save_call(plan), lhs, offs)
    return got["a_tokens"], got["a_tokens_scale"]


def backward(
    plan: Plan,
    dout: jax.Array,
    saved: Saved | None,
    rhs: jax.Array | None,
    offs: jax.Array,
    b_amax: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """dlhs where ``rhs`` is given, drhs where ``saved`` is; None in place of the other. ``b_amax``: of `forward`."""
    weights = [x for x in (rhs, b_amax) if x is not None and rhs is not None]
    call = _backward_call(plan, rhs is not None, saved is not None, amax_is_known=len(weights) > 1)
    grads = _run(call, dout, *weights, *(saved or ()), offs)
    return grads.get("dA"), grads.get("dB")


def has_kernels(config: GroupedMMConfig, platform: str) -> bool:
    """Whether the dispatch table has more than an emulation for ``config`` on ``platform``, "cpu" or "gpu".

    Raises `xmoe.kernels.dispatch.UnsupportedError` (a ValueError) if it cannot honour the kernel preference. On "gpu",
    ask `obstacle` first.
    """
    return implementation_of(config, platform).gemm != "emulated"


def without_kernels(config: GroupedMMConfig, platform: str) -> str:
    """Why `has_kernels` is False, and what would help; "" where it is True.

    Raises ImportError if that is for want of Triton alone: nobody with a GPU means to do without.
    """
    if platform == "gpu" and config.kernel_preference is not KernelPreference.EMULATED and not _device("gpu").triton:
        raise ImportError(
            "xmoe's kernels need Triton, which cannot be imported: pip install triton, or stay in JAX with "
            "implementation='jax'"
        )
    implementation = implementation_of(config, platform)
    if implementation.gemm != "emulated":
        return ""
    return "; ".join(text for text in (implementation.reason, implementation.advice) if text)


def obstacle(platform: str) -> str:
    """Why torch cannot run on the devices that JAX calls ``platform``, and what to install; "" where it can."""
    torch = _torch()
    if platform != "gpu" or torch.cuda.is_available():
        return ""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; reinstall it from PyPI, whose wheels have CUDA"
    return f"torch {torch.__version__} finds no GPU for its CUDA {torch.version.cuda}; update the GPU's driver"


def torch_from_jax(array: jax.Array) -> "torch.Tensor":
    """A torch tensor on the memory of ``array``: no copy. Do not write to it: JAX takes its arrays for constants."""
    return _torch().from_dlpack(array)


# --------------------------------------------------------------------------------------------------------------- calls


class _Call:
    """One callback with what XLA has to know of it."""

    def __init__(
        self,
        spec: "pipeline.Spec",
        function: Callable[..., None],
        plan: Plan | ExpertsPlan,
        aliases: dict[int, int] | None = None,
    ) -> None:
        """``aliases``: inputs that become outputs, by their positions; they come as outputs only."""
        self.aliases = aliases or {}
        shapes = {**spec.outputs, **{f"scratch.{name}": tensor for name, tensor in spec.scratch.items()}}
        self.outputs = (*spec.outputs,)
        self.shapes = [jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(tensor.dtype)) for tensor in shapes.values()]
        # Emulations wait for the device, and torch's GEMM allocates: neither can be recorded into a CUDA graph.
        recordable = implementation_of(plan.config, plan.platform).gemm == "triton"
        self.recordable = recordable and plan.config.command_buffer

        def callback(ctx: Any, buffers: Any, *inputs: Any) -> None:
            with _on_stream(ctx, buffers[0]):
                tensors = [_tensor(buffer) for buffer in buffers]
                outputs = dict(zip(spec.outputs, tensors, strict=False))
                scratch = dict(zip(spec.scratch, tensors[len(outputs) :], strict=True))
                own = (buffer for index, buffer in enumerate(inputs) if index not in self.aliases)
                function(outputs, scratch, *map(_tensor, own))

        self.callback = callback


def _run(call: _Call, *inputs: jax.Array) -> dict[str, jax.Array]:
    """The outputs (without the scratch) of ``call``, by name."""
    run = buffer_callback(
        call.callback, call.shapes, vmap_method="sequential", input_output_aliases=call.aliases,
        command_buffer_compatible=call.recordable,
    )  # fmt: skip
    axes = varying_axes(*inputs)  # buffer_callback forgets them
    return {name: vary_over(axes, x) for name, x in zip(call.outputs, run(*inputs), strict=False)}


@functools.lru_cache(maxsize=4096)
def _forward_call(plan: Plan, save: bool, save_amax: bool = False) -> _Call:
    pipeline = _pipeline()
    problem, config, device = _problem(plan), plan.config, _device(plan.platform)
    for gpu in _gpus(plan):
        pipeline.warm_up(problem, config, gpu)
    spec = pipeline.forward_spec(problem, config, device, save_tokens=save, save_amax=save_amax)

    def run(outputs: "pipeline.Tensors", scratch: "pipeline.Tensors", A: Any, B: Any, offs: Any) -> None:
        pipeline.forward(problem, config, device, A, B.mT if plan.transpose_rhs else B, offs, outputs, scratch)

    return _Call(spec, run, plan)


@functools.lru_cache(maxsize=4096)
def _save_call(plan: Plan) -> _Call:
    pipeline = _pipeline()
    problem, config, device = _problem(plan), plan.config, _device(plan.platform)
    for gpu in _gpus(plan):
        pipeline.warm_up_save(problem, config, gpu)

    def run(outputs: "pipeline.Tensors", scratch: "pipeline.Tensors", A: Any, offs: Any) -> None:
        pipeline.save(problem, config, device, A, offs, outputs, scratch)

    return _Call(pipeline.saved_spec(problem, config, device), run, plan)


@functools.lru_cache(maxsize=4096)
def _backward_call(plan: Plan, need_dA: bool, need_dB: bool, amax_is_known: bool) -> _Call:
    pipeline = _pipeline()
    problem, config, device = _problem(plan), plan.config, _device(plan.platform)
    for gpu in _gpus(plan):
        pipeline.warm_up(problem, config, gpu)
    spec = pipeline.backward_spec(problem, config, device, need_dA, need_dB, amax_is_known=amax_is_known)
    if need_dB and plan.transpose_rhs:  # XLA's buffer has the layout of rhs; the kernels get its [G, K, N] view
        outputs = {**spec.outputs, "dB": pipeline.TensorSpec(plan.rhs_shape, plan.rhs_dtype)}
        spec = pipeline.Spec(outputs, spec.scratch)

    def run(outputs: "dict[str, torch.Tensor]", scratch: "pipeline.Tensors", dout: Any, *rest: Any) -> None:
        *saved, offs = rest
        B = saved.pop(0) if need_dA else None
        b_amax = saved.pop(0) if amax_is_known else None
        if plan.transpose_rhs:
            B = None if B is None else B.mT
            outputs |= {"dB": outputs["dB"].mT} if need_dB else {}
        pipeline.backward(problem, config, device, dout, tuple(saved), B, offs, outputs, scratch, b_amax)

    return _Call(spec, run, plan)


# ------------------------------------------------------------------------------------------------------------- experts


def experts_forward(plan: ExpertsPlan, *inputs: jax.Array, save: bool) -> dict[str, jax.Array]:
    """The outputs of `experts.forward_outputs`, by name. ``inputs``: x, w1, w2, w3, offs and, with ``plan.k``, order,
    int32."""
    return _run(_experts_call(plan, "forward", save), *inputs)


class Gradient(NamedTuple):
    """What `experts.gradient` makes: operands of the backward's GEMMs, those that are needed, and their scales, None
    where there are none; and maps of the tokens, if any."""

    d: Any
    d_scale: jax.Array | None
    d_tokens: Any
    d_tokens_scale: jax.Array | None
    maps: tuple[jax.Array, ...] = ()


def experts_gradient(
    plan: ExpertsPlan, dh: jax.Array, gate_up: jax.Array, offs: jax.Array, need_dx: bool, need_dw: bool
) -> Gradient:
    """For `experts_dgrad` and `experts_wgrad`."""
    _pipeline()
    from xmoe.kernels import experts

    got = _run(_experts_call(plan, "gradient", need_dx, need_dw), offs, dh, gate_up)
    where = experts.places(plan.config, implementation_of(plan.config, plan.platform), plan.x_dtype)
    d, d_tokens = got[where.rows] if need_dx else None, got[where.tokens] if need_dw else None
    maps = tuple(got[name] for name in experts.MAPS if name in got)
    return Gradient(d, got.get("d_scale"), d_tokens, got.get("d_tokens_scale"), maps)


def experts_dgrad(
    plan: ExpertsPlan,
    gradient: Gradient,
    w1: jax.Array,
    w3: jax.Array,
    offs: jax.Array,
    w13_amax: jax.Array | None,
    place: jax.Array | None,
) -> jax.Array:
    """dx. ``w13_amax``, ``place``: of `experts_forward`."""
    rest = gradient.d_scale, w13_amax, place
    call = _experts_call(plan, "dgrad", *(x is not None for x in rest))
    return _run(call, gradient.d, w1, w3, offs, *gradient.maps, *(x for x in rest if x is not None))["dx"]


def experts_wgrad(
    plan: ExpertsPlan, gradient: Gradient, x_saved: Saved, offs: jax.Array, tokens: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """``(dw1, dw3)``. ``tokens``: of `experts_forward`."""
    rest = gradient.d_tokens_scale, tokens
    call = _experts_call(plan, "wgrad", *(x is not None for x in rest))
    got = _run(call, gradient.d_tokens, offs, *gradient.maps, *(x for x in rest if x is not None), *x_saved)
    return got["dw1"], got["dw3"]


def swiglu(gate_up: jax.Array, plan: ExpertsPlan) -> jax.Array:
    """h [M, H] of gate_up [M, 2H], by the kernel that the forward used."""
    return _run(_experts_call(plan, "swiglu"), gate_up)["h"]


@functools.lru_cache(maxsize=4096)
def _experts_call(plan: ExpertsPlan, stage: str, *flags: Any) -> _Call:
    """``flags``: of "forward", whether the backward's tensors are wanted; of "gradient", which operands are needed; of
    "dgrad" and "wgrad", which of their optional inputs there are."""
    pipeline = _pipeline()
    from xmoe.kernels import experts

    config, device = plan.config, _device(plan.platform)
    e = experts.Experts(plan.M, plan.D, plan.H, plan.G, plan.x_dtype, plan.w_dtype, plan.out_dtype, plan.k)
    for gpu in _gpus(plan):
        experts.warm_up(e, config, gpu)

    maps = [name for name in experts.MAPS if name in experts.gradient_spec(e, config, device).outputs]

    if stage == "forward":

        def forward(outputs: Any, scratch: Any, x: Any, w1: Any, w2: Any, w3: Any, offs: Any, *order: Any) -> None:
            experts.forward(e, config, device, x, w1, w2, w3, offs, outputs, scratch, *order)

        return _Call(experts.forward_spec(e, config, device, *flags), forward, plan)
    if stage == "gradient":
        need_dx, need_dw = flags
        spec = experts.gradient_spec(e, config, device, need_dx, need_dw)
        given = {
            "dh": pipeline.TensorSpec((plan.M, plan.H), plan.x_dtype),
            "gate_up": pipeline.TensorSpec((plan.M, 2 * plan.H), plan.x_dtype),
        }

        def gradient(outputs: Any, scratch: Any, offs: Any) -> None:
            dh, gate_up = outputs.pop("dh"), outputs.pop("gate_up")
            experts.gradient(e, config, device, dh, gate_up, offs, need_dx, need_dw, outputs, scratch)

        return _Call(pipeline.Spec({**given, **spec.outputs}, spec.scratch), gradient, plan, {1: 0, 2: 1})
    if stage == "dgrad":

        def dgrad(outputs: Any, scratch: Any, d: Any, w1: Any, w3: Any, offs: Any, *rest: Any) -> None:
            given, (scale, w13_amax, place) = dict(zip(maps, rest, strict=False)), _optional(flags, rest[len(maps) :])
            experts.dgrad(e, config, device, d, scale, (w1, w3), offs, outputs, scratch, given, w13_amax, place)

        return _Call(experts.dgrad_spec(e, config, device, amax_is_known=flags[1]), dgrad, plan)
    if stage == "wgrad":

        def wgrad(outputs: Any, scratch: Any, d_tokens: Any, offs: Any, *rest: Any) -> None:
            given, rest = dict(zip(maps, rest, strict=False)), rest[len(maps) :]
            (scale, tokens), saved = _optional(flags, rest), rest[sum(flags) :]
            experts.wgrad(e, config, device, d_tokens, scale, saved, offs, outputs, scratch, given, tokens)

        return _Call(experts.wgrad_spec(e, config, device), wgrad, plan)

    def hidden(outputs: Any, scratch: Any, gate_up: Any) -> None:
        experts.swiglu_into(gate_up, outputs["h"])

    return _Call(pipeline.Spec({"h": pipeline.TensorSpec((plan.M, plan.H), plan.x_dtype)}), hidden, plan)


def _optional(there: tuple[bool, ...], given: tuple[Any, ...]) -> tuple[Any, ...]:
    """The optional inputs, None in place of those that are not ``there``."""
    rest = iter(given)
    return tuple(next(rest) if is_there else None for is_there in there)


# ------------------------------------------------------------------------------------------------------------- devices


def _torch() -> Any:
    """torch, on first use."""
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"xmoe's kernels and to_torch need torch, which cannot be imported ({error}): "
            "pip install 'torch>=2.11,<2.14', or stay in JAX with ragged_dot(..., implementation='jax')"
        ) from error
    return torch


def _pipeline() -> Any:
    """`xmoe.kernels.pipeline`, on first use."""
    _torch()
    from xmoe.kernels import pipeline

    return pipeline


def _device(platform: str) -> "Device":
    """The dispatch table's view of ``platform``; the GPUs of one process are taken to be alike."""
    pipeline = _pipeline()
    return pipeline.device_of("cuda", 0) if platform == "gpu" else pipeline.device_of("cpu")


def implementation_of(config: GroupedMMConfig, platform: str) -> "Implementation":
    """The dispatch table's row for ``config`` on ``platform``. Raises as `has_kernels` does."""
    device = _device(platform)
    from xmoe.kernels.dispatch import select

    return select(config, device)


def _problem(plan: Plan) -> "pipeline.Problem":
    return _pipeline().Problem(plan.M, plan.N, plan.K, plan.G, plan.lhs_dtype, plan.rhs_dtype, plan.out_dtype)


def _gpus(plan: Plan | ExpertsPlan) -> list[Any]:
    """torch's devices that ``plan`` may run on, to compile and load its kernels on each of them now: none may compile
    while XLA records a graph. There are none on a CPU."""
    gpus = jax.local_devices(backend="gpu") if plan.platform == "gpu" else []
    return [_torch().device("cuda", gpu.local_hardware_id) for gpu in gpus]


def _tensor(buffer: Any) -> "torch.Tensor":
    return _torch().from_dlpack(buffer)


@contextlib.contextmanager
def _on_stream(ctx: Any, buffer: Any) -> Iterator[None]:
    """torch on the device and stream that XLA runs this callback on."""
    torch = _torch()
    kind, index = buffer.__dlpack_device__()
    with torch.no_grad():
        if kind != torch.utils.dlpack.DLDeviceType.kDLCUDA:
            with _one_thread:
                yield
            return
        with torch.cuda.device(index), torch.cuda.stream(torch.cuda.ExternalStream(ctx.stream, device=index)):
            yield


class _OneThread:
    """torch on the calling thread alone: its pool and XLA's, on the same cores, make milliseconds of microseconds.

    The number of torch's threads belongs to the calling thread, and the last one set anywhere is what new threads begin
    with. So of callbacks that overlap the first takes note of the number, and each gives it back to its own thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._threads = 0

    def __enter__(self) -> None:
        torch = _torch()
        with self._lock:
            if self._depth == 0:
                self._threads = torch.get_num_threads()
            self._depth += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        torch = _torch()
        with self._lock:
            self._depth -= 1
            torch.set_num_threads(self._threads)


_one_thread = _OneThread()
