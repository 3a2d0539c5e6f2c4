"""``xmoe parity --train``: runs the comparison of training runs, and what it leaves: lines, JSON, a chart."""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xmoe.parity import report
from xmoe.parity.training import Cause, Run, Step, compare_training
from xmoe.testing import Comparison
from xmoe.train.config import TrainConfig
from xmoe.train.data import load_corpus
from xmoe.train.files import UserError, write_atomically, writing

if TYPE_CHECKING:
    from xmoe.parity.worker import Options

_COLORS = {"torch": "#C2410C", "flax": "#5E81AC", "neighbour": "#B7C0CE"}
_LABELS = {"torch": "PyTorch", "flax": "Flax", "neighbour": "PyTorch, one weight one rounding away"}


def compare(options: "Options") -> int:
    """Train with every recipe in both frameworks, print, and leave OUT/parity-RECIPE.json and .png; the exit status.

    0 if the quantized operands of the same inputs are equal at the first step, else 1: runs drift apart, bytes must
    not. Raises UserError.
    """
    from xmoe.jax_frontend import tracer as of_flax
    from xmoe.torch_backend import tracer as of_torch
    from xmoe.train.worker import learner_module

    config = TrainConfig(
        frameworks=("torch", "flax"), recipes=options.recipes, data=options.data, device=options.device,
        steps=options.steps, seed=options.seed,
    )  # fmt: skip
    learners = {framework: learner_module(framework) for framework in config.frameworks}
    devices = {framework: learner.probe()[0] for framework, learner in learners.items()}
    if config.device == "auto" and len(set(devices.values())) > 1:
        raise UserError(f"PyTorch runs on {devices['torch']} and Flax on {devices['flax']}; add --device cpu")
    corpus, out, status = load_corpus(config.data, config.seq_len), Path(options.out), 0
    of_recipes: dict[str, Any] = {}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    for recipe in config.recipes:
        print(recipe, flush=True)
        run = compare_training(
            config, recipe, corpus,
            lambda *args: of_torch.make_tracer(learners["torch"].make_learner(*args)),
            lambda *args: of_flax.make_tracer(learners["flax"].make_learner(*args)),
            _print_step,
        )  # fmt: skip
        print(*lines(run), sep="\n", flush=True)
        stem = out / f"parity-{recipe}"
        everything = {"facts": report.facts(), "config": dataclasses.asdict(config), **plain(run)}
        write_atomically(stem.with_suffix(".json"), report.dumps(everything))
        write_atomically(stem.with_suffix(".png"), chart(run))
        of_recipes[recipe] = everything
        print(f"  {stem}.json, {stem}.png")
        status |= any(not found.equal for found in run.same_inputs.values())
    if options.json is not None:
        write_atomically(Path(options.json), report.dumps(of_recipes))
    return int(status)


def _print_step(step: Step) -> None:
    """A line for the first steps, and then ever more seldom."""
    if step.step in (1, 2, 5) or step.step % (10 ** (len(str(step.step)) - 1)) == 0:
        largest = max(apart.largest for apart in step.experts.values())
        control = max(apart.largest for apart in step.control.values())
        print(
            f"  step {step.step}: loss PyTorch {step.losses['torch']:.5f}, Flax {step.losses['flax']:.5f}; experts "
            f"differ by up to {largest:.3g} (PyTorch from its neighbour: {control:.3g})",
            flush=True,
        )


def lines(run: Run) -> list[str]:
    """What was found, for people."""
    text = []
    if run.first is None:
        text.append("  the runs do not part")
    else:
        text.append(f"  they part at step {run.first.step} in {run.first.tensor}: {run.first.found}")
    if run.operands:
        own, same = (_count(found.values()) for found in (run.operands, run.same_inputs))
        text.append(f"  the experts' quantized operands at step 1: {own}; of the same inputs: {same}")
    parting = [cause for cause in run.causes if not cause.found.equal]
    for cause in parting:
        if cause.name.startswith("optimizer"):
            continue
        text.append(f"  Flax on PyTorch's inputs, {cause.name}: {cause.found.sqnr_db:.1f} dB{_rounded(cause)}")
    if optimizer := [cause for cause in parting if cause.name.startswith("optimizer")]:
        least = min(cause.found.sqnr_db for cause in optimizer)
        text.append(f"  Flax's optimizer on PyTorch's gradients: {len(optimizer)} parameters differ by {least:.1f} dB")
    equal = [cause.name for cause in run.causes if cause.found.equal and not cause.name.startswith("optimizer")]
    text.append(f"  equal bytes on PyTorch's inputs: {', '.join(equal) or 'nothing'}")
    return text


def _rounded(cause: Cause) -> str:
    if cause.rounded is None or cause.rounded == cause.found:
        return ""
    other = "equal" if cause.rounded.equal else f"{cause.rounded.sqnr_db:.1f} dB"
    return f" ({other} with xla_allow_excess_precision=False)"


def _count(found: Any) -> str:
    found = list(found)
    equal = sum(x.equal for x in found)
    if equal == len(found):
        return f"all {equal} equal"
    bytes_, different = sum(x.size for x in found), sum(x.different for x in found)
    return f"{equal} of {len(found)} equal, {different} of {bytes_} elements differ"


def chart(run: Run) -> bytes:
    """Losses, their difference and that of the experts' outputs, over the steps: a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = [step.step for step in run.steps]
    figure = Figure(figsize=(16, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    losses, differences, experts = figure.subplots(1, 3)
    for name, color in _COLORS.items():
        curve = [step.losses[name] for step in run.steps]
        width = 4.0 if name == "torch" else 1.4  # a band under the others, which may coincide with it
        losses.plot(steps, curve, color=color, linewidth=width, label=_LABELS[name], zorder=1 if name == "torch" else 2)
        if name != "torch":
            gap = [abs(x - step.losses["torch"]) for x, step in zip(curve, run.steps, strict=True)]
            differences.plot(*_finite(steps, gap), color=color, linewidth=1.4, label=_LABELS[name])
    for found, style in (("experts", "-"), ("control", ":")):
        for i, name in enumerate(run.steps[0].experts):
            apart = [getattr(step, found)[name].largest for step in run.steps]
            color, what = list(_COLORS.values())[i % 2], "Flax" if found == "experts" else _LABELS["neighbour"]
            experts.plot(*_finite(steps, apart), color=color, linestyle=style, label=f"{name}: {what}")
    titles = (
        (losses, "loss", "cross-entropy, nats per byte"),
        (differences, "difference of the loss from PyTorch's", "nats per byte"),
        (experts, "experts' outputs, largest difference from PyTorch's", "absolute"),
    )
    for panel, title, unit in titles:
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.set_ylabel(unit)
        panel.grid(alpha=0.25)
        panel.legend(frameon=False, fontsize="small")
    for panel in (differences, experts):
        panel.set_yscale("symlog", linthresh=1e-6)
    figure.suptitle(f"{run.recipe} on {run.device}: PyTorch and Flax, same weights, same batches")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _finite(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """Those that are finite, as a chart can show."""
    kept = [(step, value) for step, value in zip(steps, values, strict=True) if value < float("inf")]
    return [step for step, _ in kept], [value for _, value in kept]


def plain(run: Run) -> dict[str, Any]:
    """A run as JSON can hold it: comparisons as in the report of operands, infinite dB as strings."""

    def of(x: Any) -> Any:
        if isinstance(x, Comparison):
            return report.comparison(x)
        if isinstance(x, float):
            return report.number(x)
        if dataclasses.is_dataclass(x):
            return {f.name: of(getattr(x, f.name)) for f in dataclasses.fields(x)}
        if isinstance(x, dict):
            return {key: of(value) for key, value in x.items()}
        return [of(value) for value in x] if isinstance(x, list) else x

    return of(run)
