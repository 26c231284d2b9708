"""FocusDiT's masks, mediators and FlexDiT's density together: trained, killed, resumed, handed over, exported, drawn."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from faults import at_step
from support import SMALL, end_with_the_first, fork_training, scalars, state_of

from pretrain.checkpoint.reader import newest
from pretrain.diffusion import step_budget
from pretrain.export import main as export
from pretrain.models import ComputeBudget, DiTConfig
from pretrain.pipeline import FocusDiTPipeline
from pretrain.sampling.trained_run import load_run

DENSE = (*SMALL, "model.preset=dit_tiny_deep", "checkpoint.every=3", "logging.every=1", "optimizer.lr=1e-3")
ALL = (
    *DENSE,
    "model.mask=adaln_single",
    "model.mask_dropout=0.1",
    "model.attention=mediators",
    "model.density=flexdit",
)


@pytest.fixture(scope="module")
def together(data_set: Path, train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all three, in two processes, with recomputed activations and previews."""
    run_dir = tmp_path_factory.mktemp("together") / "run"
    words = (*ALL, "model.recompute=true", "preview.every=4", "preview.steps=4")
    train("demo_256", *words, "steps=8", f"data.path={data_set}", f"run_dir={run_dir}", processes=2)
    return run_dir


def budgets(run_dir: Path) -> set[ComputeBudget]:
    trained = load_run(run_dir)
    config: DiTConfig = trained.pipeline.transformer.dit.config
    return {step_budget(config, trained.config.objective.build(), trained.config.seed, s).budget for s in range(8)}


def test_killed_and_gone_on_in_another_number_of_processes(
    together: Path, data_set: Path, train, tmp_path: Path
) -> None:
    """Killed, then resumed: bitwise the uninterrupted run on as many processes, and the same losses on another number."""
    assert len(budgets(together)) >= 4
    words = (*ALL, "steps=8", f"data.path={data_set}", f"run_dir={tmp_path / 'two'}")
    log, kill = tmp_path / "log", partial(at_step, 5, 1, "SIGKILL")
    processes = fork_training(log, "demo_256", *words, processes=2, before=kill)
    assert -signal.SIGKILL in end_with_the_first(processes), log.read_text()
    assert newest(tmp_path / "two").run_state.step == 3  # type: ignore[union-attr]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    assert "going on from" in train("demo_256", *words, processes=2).output
    expected = state_of(together)
    for name, value in state_of(tmp_path / "two").items():
        assert torch.equal(value, expected[name]), name
    train("demo_256", *words, f"run_dir={tmp_path / 'one'}")
    curve = scalars(together, "train/loss")
    assert list(curve) == list(range(1, 9)) and scalars(tmp_path / "two", "train/loss") == curve
    assert scalars(tmp_path / "one", "train/loss") == pytest.approx(curve, rel=2e-4)


def test_a_dense_models_weights_start_all_three(data_set: Path, train, tmp_path: Path) -> None:
    """The mapping is reported, and what is taken over is what was there; then 512 px follow with the same tables."""
    words = [f"data.path={data_set}", "optimizer.lr=1e-30", "steps=2"]
    train("demo_256", *DENSE, f"data.path={data_set}", "steps=3", f"run_dir={tmp_path / 'dense'}")
    given = [f"init_from={tmp_path / 'dense'}", f"run_dir={tmp_path / 'all'}"]
    output = train("demo_256", *ALL, *words, *given, processes=2).output
    assert "model.density: None → flexdit" in output
    assert "blocks.*.self_attention.value.weight (1): the last third of qkv's" in output
    assert "blocks.*.from_dense.weight (1): new, from their own start" in output
    dense, found = newest(tmp_path / "dense"), newest(tmp_path / "all")
    assert dense is not None and found is not None

    def value_and_qkv(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
        block = "blocks.0.self_attention"
        return found.parameter(kind, f"{block}.value.weight"), dense.parameter(kind, f"{block}.qkv.weight")[2 * 128 :]

    value, expected = value_and_qkv("master")
    torch.testing.assert_close(value, expected)
    average, before = value_and_qkv("ema")
    for decay in (1 / 10, 2 / 11):  # of the two steps since
        before = torch.lerp(before, expected, 1 - decay)
    torch.testing.assert_close(average, before)
    name = "blocks.3.self_attention.qkv.weight"
    torch.testing.assert_close(found.parameter("master", name), dense.parameter("master", name))
    torch.testing.assert_close(found.parameter("master", "blocks.5.from_dense.weight"), torch.eye(128))
    given = [f"init_from={tmp_path / 'all'}", f"run_dir={tmp_path / 'larger'}"]
    output = train("demo_512", *ALL, *words, *given).output
    assert "own start" not in output and "left behind" not in output
    name = "blocks.6.self_attention.gather_bias.16.map"
    torch.testing.assert_close(newest(tmp_path / "larger").parameter("master", name), found.parameter("master", name))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("model.density=dense",), "model.density: there flexdit, here dense"),
        (("model.mediators.numbers=[4]",), "model.mediators: there {'numbers': (4, 16)}, here {'numbers': (4,)}"),
    ],
)
def test_a_run_does_not_go_on_as_another_combination(words, problem, together: Path, data_set: Path, train) -> None:
    given = [*ALL, *words, "steps=9", f"data.path={data_set}", f"run_dir={together}"]
    finished = train("demo_256", *given, check=False)
    assert finished.codes == [1]
    assert problem in finished.output


def test_it_is_exported_and_draws_the_same(together: Path, tmp_path: Path) -> None:
    assert export(["--run", str(together), "--out", str(tmp_path / "export")]) in (0, None)
    exported = FocusDiTPipeline.from_pretrained(tmp_path / "export")

    def draw(pipeline: FocusDiTPipeline) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        pipeline.set_progress_bar_config(disable=True)
        output = pipeline("a red circle", num_inference_steps=4, generator=generator, output_type="latent")
        return output.images

    first = draw(exported)
    assert torch.isfinite(first).all()
    assert torch.equal(first, draw(exported))
    torch.testing.assert_close(first, draw(load_run(together).pipeline))
