"""``monitor``: what the recipes do to the numbers of a training run, layer by layer, every n steps."""

import json
import logging
import math
import os
from collections.abc import Callable
from typing import IO, Any, Self

from torch import Tensor, nn

from xmoe.torch_backend.numerics import Energy, Gemm, Tally
from xmoe.torch_backend.observe import observers
from xmoe.torch_backend.wrapper import unwrap, weight_class

logger = logging.getLogger(__name__)

Record = dict[str, Any]
Write = Callable[[Record], Any]


def monitor(model: nn.Module, every: int = 100, writer: Any = None, *, step: int = 0) -> "Monitor":
    """Measures the products of the parameters that ``quantize_`` converted, in every `every`-th training step:

        with xmoe.torch_backend.monitor(model, every=100, writer="numerics.jsonl") as numerics:
            for batch in batches:
                loss(model(batch)).backward()
                optimizer.step()
                numerics.step()

    A measured step gives a record for each parameter, under its name in the model:

        {"step": 0, "parameter": "experts.w1", "config": "mxfp8_floor", "products": 1,
         "fwd":   {"sqnr": 27.5, "activation": {"amax": 4.1, "saturated": 0.003, "flushed": 0.0}, "weight": {…}},
         "dgrad": {"sqnr": 27.6, "gradient": {…}, "weight": {…}},
         "wgrad": {"sqnr": 27.6, "activation": {…}, "gradient": {…}}}

    ``amax`` is the largest magnitude, ``saturated`` the share of elements that the cast to fp8 cuts off (beyond its
    largest number times their scale), ``flushed`` that of elements other than zero that become zero: counted in the
    bytes that the recipe makes, each operand along the contraction of its GEMM. ``sqnr`` is the signal-to-noise ratio,
    in dB, of the GEMM's result beside that of the bf16 recipe on the same operands. Operands and GEMMs in bf16 have
    ``amax`` only, a GEMM that the training does not need is left out, and what is not finite is None. The rows of all
    experts count together, and so do all products of a step (micro-batches), ``products`` of them; rows past the last
    offset do not.

    Training keeps its bits. Steps in between cost a look at an empty list for each product, and wait for nothing. A
    measured step takes several times as long, waits for the device, and keeps the operands of each product for the
    backward (under activation checkpointing they are recomputed). A product is measured in its backward: those
    without one (``torch.no_grad``, frozen layers before the first trained one) are not, nor is anything inside of
    ``torch.compile`` or a CUDA graph. Parameters that were not seen are named in a warning, once. To measure a compiled
    model, let ``with torch.compiler.set_stance("force_eager" if numerics.sampling else "default"):`` run its steps;
    what the compiler fuses is then rounded otherwise in these.

    Args:
        model: after ``quantize_``; wrappers around it (DDP, FSDP) change the names.
        every: steps from one measured step to the next.
        writer: a path, to which JSON lines are appended; a file (something with ``write(str)``); a TensorBoard
            SummaryWriter (something with ``add_scalar(tag, value, step)``: "experts.w1/fwd/activation/amax"); or a
            function of one record. None: see `Monitor.records`. With several processes give each its own, or None.
        step: the number of the first step, for a run that is resumed. Steps whose number `every` divides are measured.

    Raises:
        ValueError: no parameter of `model` is converted; `every` or `step` out of range; an unknown kind of writer.
        OSError: the file cannot be opened.
    """
    return Monitor(model, every, writer, step)


class Monitor:
    """The handle of `monitor`: call `step` after every training step, and `close` at the end (or use ``with``)."""

    records: list[Record]
    """Of the last measured step, in the order of the model's parameters."""

    def __init__(self, model: nn.Module, every: int, writer: Any, step: int) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r} is not a positive number of steps; give 1 to measure all of them")
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step={step!r} is no step's number; give the number of the next step, from 0")
        self._model, self._every, self._step = model, every, step
        self._warned = self._closed = False
        self.records = []
        self._file: IO[str] | None = None
        if not self._converted():
            raise ValueError("model has no converted parameter; call quantize_(model, ...) before monitor(model)")
        self._write = self._writer(writer)
        if any(getattr(module, "_compiled_call_impl", None) for module in model.modules()) or hasattr(
            model, "_orig_mod"
        ):
            self._warn("model is compiled")
        self._begin()

    @property
    def sampling(self) -> bool:
        """Whether the current step is measured."""
        return not self._closed and self._step % self._every == 0

    def step(self) -> None:
        """Ends a training step. After a measured one its records are written."""
        if self._closed:
            raise ValueError("this monitor is closed; make a new one, with step= the number of the next step")
        if self.sampling:
            self._end()
        self._step += 1
        self._begin()

    def close(self) -> None:
        """Stops measuring; a step that has not ended is dropped. May be called again."""
        if self._closed:
            return
        self._closed = True
        if self in observers:
            observers.remove(self)
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------------------ sampling

    def _begin(self) -> None:
        self._sums: dict[str, _Sum] = {}
        if self.sampling:
            self._names = self._converted()
            observers.append(self)

    def _end(self) -> None:
        observers.remove(self)
        if missing := [name for name in self._names if name not in self._sums]:
            self._warn(f"step {self._step} had no product with a gradient of {', '.join(missing)}")
        order = {name: index for index, name in enumerate(self._names)}
        found = sorted(self._sums.items(), key=lambda item: order.get(item[0], len(order)))
        self.records = [s.record(self._step, name) for name, s in found]
        for record in self.records:
            self._write(record)

    def _converted(self) -> dict[str, tuple[nn.Module, str]]:
        """Every converted parameter, a tied one once: its name in the model, its module, and its name there."""
        found, seen = {}, set()
        for module_name, module in self._model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if weight_class(parameter) is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    found[f"{module_name}.{name}".removeprefix(".")] = module, name
        return found

    def name_of(self, weight: Tensor) -> str | None:
        """The parameter that a plain tensor is a view of, or that autograd says it is computed of; of several joined to
        one all, "w1 + w3"."""
        if (name := self._owner(weight)) is not None:
            return name
        names = [self._owner(leaf) for leaf in _leaves(weight)]
        return " + ".join(dict.fromkeys(name for name in names if name is not None)) or None

    def _owner(self, x: Tensor) -> str | None:
        address = x.data_ptr()
        for name, (module, attribute) in self._names.items():
            parameter = unwrap(_local(getattr(module, attribute)))  # FSDP puts another in its place for the forward
            start = parameter.data_ptr()
            if x.device == parameter.device and start <= address < start + parameter.nbytes:
                return name
        return None

    def record(self, name: str, config_key: str, gemms: dict[str, Gemm]) -> None:
        """Adds what was measured of one product."""
        self._sums.setdefault(name, _Sum(config_key)).add(gemms)

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(
                "monitor: %s. It sees products that run eagerly and take part in a backward, of weights that reach them"
                " unchanged (not of biases or embeddings), not those in torch.compile or in a CUDA graph: let"
                ' torch.compiler.set_stance("force_eager") run the steps that it measures',
                what,
            )

    # ------------------------------------------------------------------------------------------------------- writing

    def _writer(self, writer: Any) -> Write:
        if writer is None:
            return lambda record: None
        if isinstance(writer, str | os.PathLike):
            self._file = open(writer, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
            return _to_lines(self._file)
        if hasattr(writer, "add_scalar"):
            return _to_tensorboard(writer)
        if hasattr(writer, "write"):
            return _to_lines(writer)
        if callable(writer):
            return writer
        raise ValueError(f"writer={writer!r} is no path, file, SummaryWriter or function; give one of these, or None")


class _Sum:
    """Of all products of a parameter in a step."""

    def __init__(self, config_key: str) -> None:
        self.config_key, self.products = config_key, 0
        self.operands: dict[str, dict[str, Tally]] = {}
        self.energy: dict[str, Energy] = {}

    def add(self, gemms: dict[str, Gemm]) -> None:
        self.products += 1
        for gemm, (operands, energy) in gemms.items():
            tallies = self.operands.setdefault(gemm, {})
            for operand, tally in operands.items():
                tallies[operand] = tallies[operand].plus(tally) if operand in tallies else tally
            if energy is not None:
                self.energy[gemm] = self.energy[gemm].plus(energy) if gemm in self.energy else energy

    def record(self, step: int, name: str) -> Record:
        record: Record = {"step": step, "parameter": name, "config": self.config_key, "products": self.products}
        for gemm, operands in self.operands.items():
            found: Record = {"sqnr": _sqnr(self.energy[gemm])} if gemm in self.energy else {}
            record[gemm] = found | {operand: _shares(tally) for operand, tally in operands.items()}
        return record


def _shares(tally: Tally) -> Record:
    amax = {"amax": _finite(tally.amax)}
    if tally.saturated is None or tally.flushed is None:
        return amax
    elements = tally.elements or 1
    return amax | {"saturated": tally.saturated / elements, "flushed": tally.flushed / elements}


def _sqnr(energy: Energy) -> float | None:
    """In dB."""
    return _finite(10 * math.log10(energy.signal / energy.noise)) if energy.signal > 0 and energy.noise > 0 else None


def _finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a DTensor; anything else as it is."""
    return getattr(parameter, "_local_tensor", parameter)


def _leaves(x: Tensor) -> list[Tensor]:
    """The leaf tensors that x is computed of, in autograd's graph: of a weight a few casts, views and joins away."""
    leaves, nodes, seen = [], [x.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        nodes += [following for following, _ in reversed(node.next_functions)]
    return leaves


def _to_lines(file: Any) -> Write:
    def write(record: Record) -> None:
        file.write(json.dumps(record, allow_nan=False) + "\n")
        if hasattr(file, "flush"):
            file.flush()

    return write


def _to_tensorboard(writer: Any) -> Write:
    def write(record: Record) -> None:
        for gemm in ("fwd", "dgrad", "wgrad"):
            for name, value in record.get(gemm, {}).items():
                scalars = {f"{name}/{key}": x for key, x in value.items()} if isinstance(value, dict) else {name: value}
                for scalar, x in scalars.items():
                    if x is not None:
                        writer.add_scalar(f"{record['parameter']}/{gemm}/{scalar}", x, record["step"])

    return write
