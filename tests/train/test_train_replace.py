"""Which runs a second command into the same --out keeps, refuses, goes on with or replaces.

Workers are stood in for: they write a run's files, or fail.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xmoe.train import run
from xmoe.train.checkpoint import Result, RunFolder
from xmoe.train.config import TrainConfig
from xmoe.train.files import UserError


class Workers:
    """Stands in for ``run._worker``; the run named ``fails`` stops after its first checkpoint."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: list[str] = []
        self.fails = ""
        monkeypatch.setattr(run, "_worker", self)

    def __call__(self, _: str, framework: str, recipe: str, place: str) -> str:
        config = TrainConfig.load(Path(place, run.CONFIG_FILE))
        folder = RunFolder(Path(place), framework, recipe)
        self.ran.append(folder.path.name)
        folder.create()
        folder.clear()
        folder.save({"weights.w": np.zeros(1, np.float32)}, 1, "digest")
        folder.log(step=1, loss=2.0, learning_rate=1e-3, seconds=0.1)
        if folder.path.name == self.fails:
            raise run.WorkerFailed(1)
        folder.log(step=1, heldout_loss=float(config.seed))
        folder.finish(
            Result(
                framework=framework, recipe=recipe, device="cpu", steps=1, loss=2.0, heldout_loss=float(config.seed),
                tokens_per_second=1.0, peak_memory=1,
            )
        )  # fmt: skip
        return ""


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> Workers:
    return Workers(monkeypatch)


@pytest.fixture
def config(config: TrainConfig) -> TrainConfig:
    return dataclasses.replace(config, recipes=("bf16", "fp8_rowwise"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def held(out: Path) -> dict[str, float]:
    """Finished runs and the seeds that they were trained with."""
    return {path.parent.name: RunFolder(out, *path.parent.name.split("-")).read_result().heldout_loss  # type: ignore
            for path in out.glob("*/result.json")}  # fmt: skip


def seeded(config: TrainConfig, seed: int) -> TrainConfig:
    return dataclasses.replace(config, seed=seed)


def test_finished_runs_are_not_trained_again_unasked(workers: Workers, config: TrainConfig, out: Path) -> None:
    run.run(config, out)
    with pytest.raises(UserError, match=r"already holds torch-bf16, torch-fp8_rowwise; add --resume .* or --overwrite"):
        run.run(config, out)
    workers.ran.clear()
    run.run(config, out, resume=True)
    assert workers.ran == []


@pytest.mark.parametrize("seed", [0, 1])
def test_overwrite_keeps_the_old_runs_until_all_new_ones_are_done(
    workers: Workers, config: TrainConfig, out: Path, seed: int
) -> None:
    """With the same settings and with others; a failure, then a resume."""
    run.run(config, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    workers.fails = "torch-fp8_rowwise"
    with pytest.raises(run.WorkerFailed):
        run.run(seeded(config, seed), out, overwrite=True)
    assert {path: path.read_bytes() for path in before} == before

    workers.fails = ""
    workers.ran.clear()
    stored = TrainConfig.load(run.stored_config(out))
    assert stored == seeded(config, seed)
    run.run(stored, out, resume=True)
    assert workers.ran == ["torch-fp8_rowwise"]
    assert held(out) == {"torch-bf16": seed, "torch-fp8_rowwise": seed}
    assert TrainConfig.load(run.stored_config(out)) == seeded(config, seed)
    assert not (out / run.REPLACEMENT).exists()


def test_a_resume_of_one_run_leaves_no_other_behind(workers: Workers, config: TrainConfig, out: Path) -> None:
    run.run(config, out)
    workers.fails = "torch-bf16"
    with pytest.raises(run.WorkerFailed):
        run.run(seeded(config, 1), out, overwrite=True)
    workers.fails = ""
    run.run(dataclasses.replace(config, seed=1, recipes=("bf16",)), out, resume=True)
    assert held(out) == {"torch-bf16": 1, "torch-fp8_rowwise": 1}


def test_overwrite_of_a_failed_overwrite(workers: Workers, config: TrainConfig, out: Path) -> None:
    run.run(config, out)
    workers.fails = "torch-bf16"
    with pytest.raises(run.WorkerFailed):
        run.run(seeded(config, 1), out, overwrite=True)
    workers.fails = ""
    run.run(seeded(config, 2), out, overwrite=True)
    assert held(out) == {"torch-bf16": 2, "torch-fp8_rowwise": 2}


def test_overwrite_drops_runs_with_other_settings_only(workers: Workers, config: TrainConfig, out: Path) -> None:
    run.run(config, out)
    one = dataclasses.replace(config, recipes=("bf16",))
    run.run(one, out, overwrite=True)
    assert held(out) == {"torch-bf16": 0, "torch-fp8_rowwise": 0}
    assert TrainConfig.load(out / run.CONFIG_FILE).recipes == ("bf16", "fp8_rowwise")
    run.run(seeded(one, 1), out, overwrite=True)
    assert held(out) == {"torch-bf16": 1}
    assert TrainConfig.load(out / run.CONFIG_FILE).recipes == ("bf16",)


def test_the_file_names_every_run_that_the_report_shows(workers: Workers, config: TrainConfig, out: Path) -> None:
    for recipe in ("bf16", "mxfp8_rceil"):
        results = run.run(dataclasses.replace(config, recipes=(recipe,)), out)
    assert [result.recipe for result in results] == ["bf16", "mxfp8_rceil"]
    assert TrainConfig.load(out / run.CONFIG_FILE).recipes == ("bf16", "mxfp8_rceil")


def test_a_run_that_left_nothing_is_no_obstacle(workers: Workers, config: TrainConfig, out: Path) -> None:
    out.mkdir()
    (out / run.CONFIG_FILE).write_text(config.to_toml())
    run.run(seeded(config, 1), out)
    assert held(out) == {"torch-bf16": 1, "torch-fp8_rowwise": 1}


@pytest.mark.parametrize("name", ["metrics.jsonl", "result.json", "config.toml"])
def test_damaged_files_are_found_before_training(
    workers: Workers, config: TrainConfig, out: Path, name: str
) -> None:  # fmt: skip
    run.run(config, out)
    workers.ran.clear()
    (path,) = out.glob(name) if name == "config.toml" else out.glob(f"torch-bf16/{name}")
    path.write_text("{}\n")
    more = dataclasses.replace(config, recipes=("mxfp8_rceil",))
    with pytest.raises(UserError, match=str(path)):
        run.run(more, out)
    assert workers.ran == []
    run.run(config, out, overwrite=True)
    assert held(out) == {"torch-bf16": 0, "torch-fp8_rowwise": 0}


def test_full_disk_while_replacing(
    workers: Workers, config: TrainConfig, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails midway; --resume then finishes without training."""
    run.run(config, out)
    copy: Callable[..., None] = RunFolder.copy_from

    def fails(folder: RunFolder, other: RunFolder) -> None:
        if folder.recipe != "bf16":
            raise UserError("cannot write: No space left on device")
        copy(folder, other)

    monkeypatch.setattr(RunFolder, "copy_from", fails)
    with pytest.raises(UserError, match="No space left"):
        run.run(seeded(config, 1), out, overwrite=True)
    monkeypatch.setattr(RunFolder, "copy_from", copy)
    workers.ran.clear()
    run.run(TrainConfig.load(run.stored_config(out)), out, resume=True)
    assert workers.ran == []
    assert held(out) == {"torch-bf16": 1, "torch-fp8_rowwise": 1}
