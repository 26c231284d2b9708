"""Models whose mediators and density change while they sample: the pipeline, the command, the search for ρ, pruning.

Letters: B images, S sampling steps, K blocks, N tokens.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from support import same_pictures

from pretrain import sample
from pretrain.analyze.__main__ import main as analyze
from pretrain.diffusion import FfnWork
from pretrain.models import DiT, preset
from pretrain.models.budget_choices import default_budget
from pretrain.models.cost import block_tokens, saved_flops
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.pipeline import FocusDiTPipeline, FocusDiTPipelineOutput, FocusDiTTransformer2DModel
from pretrain.sampling import pruning
from pretrain.schedulers import build_scheduler

pytestmark = pytest.mark.usefixtures("one_thread")

# 16 tokens at 128 px: the sparse grids are of 2 × 2 at t < ½, then 2 × 2 and 1 × 1.
BASE = replace(preset("dit_tiny_deep"), mask="adaln_single", mediators=MediatorsSection((1, 4, 16)))
KINDS: dict[str, dict[str, Any]] = {
    "mediators": {"attention": "mediators"},
    "flexdit": {"density": "flexdit"},
    "both": {"attention": "mediators", "density": "flexdit"},
}
PROMPTS = ["a red circle", "a large green square above a small blue triangle", "a star"]
STEPS = 7
RHO = (0.95, 0.9)


@pytest.fixture(scope="module", params=KINDS)
def pipe(request: pytest.FixtureRequest, tiny_pipeline: FocusDiTPipeline) -> FocusDiTPipeline:
    return make(tiny_pipeline, request.param)


@pytest.fixture(scope="module")
def folder(tiny_pipeline: FocusDiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with both, saved."""
    path = tmp_path_factory.mktemp("pipeline") / "both"
    make(tiny_pipeline, "both").save_pretrained(path)
    return path


def make(tiny: FocusDiTPipeline, kind: str) -> FocusDiTPipeline:
    """A pipeline around random weights, as after some training; its steps are equal (a shift of 1)."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        dit = DiT(replace(BASE, **KINDS[kind])).eval()
        for parameter in dit.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    parts = {"transformer": FocusDiTTransformer2DModel.of(dit), "scheduler": build_scheduler("flow", 1.0)}
    pipeline = FocusDiTPipeline(**tiny.components | parts, resolution=128, steps=STEPS, guidance=3.0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipe: FocusDiTPipeline, pictures: range = range(3), **more: Any) -> FocusDiTPipelineOutput:
    generators = [torch.Generator().manual_seed(i) for i in pictures]
    return pipe([PROMPTS[i] for i in pictures], generator=generators, output_type="latent", **more)


# ---- the pipeline ----


def test_switching_leaves_the_sample_finite_and_deterministic(pipe):
    """Numbers and grids change with the noise level; with the masks, and FFNs left out."""
    config = pipe.transformer.dit.config
    first, again = (draw(pipe, output_query_masks=True, skip_threshold=0.8) for _ in range(2))
    assert first.images.isfinite().all()
    assert torch.equal(first.images, again.images)
    assert first.query_masks.shape == (3, STEPS, 8, 16)
    assert torch.equal(first.query_masks, again.query_masks)
    levels_S = [1 - s / STEPS for s in range(STEPS)]
    budgets = [default_budget(config, t) for t in levels_S]
    assert len(set(budgets)) > 2
    if config.attention == "mediators":
        assert first.mediators_BS.tolist() == [[budget.get("mediators") for budget in budgets]] * 3
    else:
        assert first.mediators_BS is None
    work = first.ffn_work
    assert isinstance(work, FfnWork)
    assert work.tokens_SK.tolist() == [[6 * n for n in block_tokens(config, (4, 4), b)] for b in budgets]
    assert (work.kept_SK <= work.tokens_SK).all() and 0 < work.kept_SK.sum() < work.tokens_SK.sum()


def test_each_picture_by_its_own_changes(tiny_pipeline):
    """Together and alone, and twice the same; other numbers make other pictures."""
    pipe = make(tiny_pipeline, "both")
    first, again = (draw(pipe, mediator_rho=RHO, output_query_masks=True) for _ in range(2))
    assert torch.equal(first.images, again.images) and first.images.isfinite().all()
    numbers = first.mediators_BS.tolist()
    assert len({tuple(row) for row in numbers}) > 1, "the batch was divided"
    for i in range(3):
        alone = draw(pipe, range(i, i + 1), mediator_rho=RHO, output_query_masks=True)
        torch.testing.assert_close(alone.images, first.images[i : i + 1], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(alone.query_masks, first.query_masks[i : i + 1], rtol=1e-3, atol=1e-3)
        assert alone.mediators_BS.tolist() == numbers[i : i + 1]
    fixed = [draw(pipe, mediators=n) for n in (1, 4, 16)]
    assert [(out.mediators_BS == n).all().item() for out, n in zip(fixed, (1, 4, 16), strict=True)] == [True] * 3
    drawn = [first, draw(pipe), *fixed]
    assert all((a.images - b.images).abs().max() > 1e-3 for i, a in enumerate(drawn) for b in drawn[:i])


# ---- the command that draws ----


def command(folder: Path, out: Path, *words: str) -> list[str]:
    return ["--model", str(folder), "--out", str(out), *(f"--prompt={prompt}" for prompt in PROMPTS), *words]


def pictures(out: Path) -> list[Image.Image]:
    return [Image.open(path) for path in sorted(out.glob("[0-9]*[0-9a-f].png")) if not path.stem.endswith("_masks")]


def test_the_commands_options_reach_the_pipeline(folder, tiny_pipeline, tmp_path):
    pipe, seeds = make(tiny_pipeline, "both"), [torch.Generator().manual_seed(i) for i in range(3)]
    words = ["--mediator-rho", *map(str, RHO)]
    for batch in ("1", "3"):
        assert sample.main(command(folder, tmp_path / batch, *words, "--save-masks", "--batch-size", batch)) == 0
    assert same_pictures(pictures(tmp_path / "1"), pictures(tmp_path / "3"))
    assert same_pictures(pictures(tmp_path / "3"), pipe(PROMPTS, generator=seeds, mediator_rho=RHO).images)
    settings = json.loads(pictures(tmp_path / "3")[0].text["focusdit"])["settings"]  # type: ignore[attr-defined]
    assert (settings["mediators"], settings["mediator_rho"]) == (None, list(RHO))
    assert len(list((tmp_path / "3").glob("*_masks.png"))) == 3

    assert sample.main(command(folder, tmp_path / "fixed", "--mediators", "4")) == 0
    assert not same_pictures(pictures(tmp_path / "fixed"), pictures(tmp_path / "3"))


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--mediators", "5"], "mediators: 5 is none of 1, 4, 16, which this model can do"),
        (
            ["--mediator-rho", "0.9"],
            "mediator ρ 0.9: expected 2, one fewer than the model's numbers of mediators (1, 4, 16)",
        ),
        (["--mediator-rho", "0.9", "0"], "mediator ρ 0.9, 0: expected finite numbers above 0"),
        (
            ["--mediators", "4", "--mediator-rho", "0.9", "0.8"],
            "a fixed number of mediators and mediator ρ, which change it, exclude each other; give one",
        ),
    ],
)
def test_bad_options_are_one_line(folder, tmp_path, capsys, words, mend):
    assert sample.main(command(folder, tmp_path, *words)) == 1
    assert f"sample: {mend}" in capsys.readouterr().err.splitlines()


def test_every_kind_of_block_is_compiled(pipe):
    """By diffusers' `compile_repeated_blocks`."""
    kinds = {type(block).__name__ for block in pipe.transformer.dit.blocks}
    assert kinds <= set(pipe.transformer._repeated_blocks)


# ---- the search for ρ ----


@pytest.fixture
def search(tiny_pipeline: FocusDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command over a run of a model; gives its exit code, and the run's folder."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))

    def run(pipe: FocusDiTPipeline, *words: str) -> tuple[int, Path]:
        monkeypatch.setattr("pretrain.sampling.trained_run.load_run", lambda *asked: SimpleNamespace(pipeline=pipe))
        given = ["--run", str(tmp_path), "--prompts", str(tmp_path / "prompts.txt"), "--steps", "8", "--pictures", "2"]
        return analyze(["mediators", *given, "--device", "cpu", *words]), tmp_path / "analyze"

    return run


def test_the_search_proposes_what_is_cheapest_within_the_tolerance(search, tiny_pipeline, capsys):
    code, out = search(make(tiny_pipeline, "both"), "--grid", "0.9", "1.1", "--tolerance", "0.5")
    assert code == 0
    said = capsys.readouterr().out
    found = json.loads((out / "mediators.json").read_text())
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == [
        "16 at all steps", "by noise level", "1 at all steps", "4 at all steps", "ρ 1.1 1.1", "ρ 1.1 0.9", "ρ 0.9 0.9"
    ]  # fmt: skip
    assert all(name in said for name in rows)
    reference, fewest = rows["16 at all steps"], rows["1 at all steps"]
    assert (reference["flops"], reference["distance"]) == (1, 0)
    assert all(fewest["flops"] <= row["flops"] <= 1 and row["distance"] >= 0 for row in rows.values())
    assert fewest["distance"] > 0
    assert rows["ρ 1.1 1.1"]["mean_mediators_by_step"][:5] == [1] * 5
    assert rows["by noise level"]["mean_mediators_by_step"] == [1, 1, 1, 4, 4, 4, 16, 16]
    assert torch.tensor(found["changes_of_reference"]).shape == (2, 8)
    within = [row for row in found["rows"] if row["rho"] and row["distance"] <= 0.5]
    assert found["proposed_rho"] == min(within, key=lambda row: (row["flops"], row["distance"]))["rho"]
    assert "the cheapest switching is --mediator-rho " in said
    assert "1 at all steps: " in said and "as good without switching" in said, "it is cheaper, and as near"
    assert Image.open(out / "mediators.png").width > 1000


def test_a_grid_of_the_references_own_changes(search, tiny_pipeline, capsys):
    """Where nothing is within the tolerance, that is said."""
    code, out = search(make(tiny_pipeline, "mediators"), "--tolerance", "1e-9", "--pictures", "2", "--steps", "12")
    said = capsys.readouterr().out
    assert code == 0 and "no ρ of this grid is within 1e-09; the nearest, ρ " in said
    assert "16 at all steps: 100.0% of the FLOPs at a distance of 0.000" in said
    found = json.loads((out / "mediators.json").read_text())
    assert found["proposed_rho"] is None
    assert len({row["flops"] for row in found["rows"] if row["rho"]}) > 1, "they switch at different steps"


@pytest.mark.parametrize(
    ("kind", "words", "mend"),
    [
        ("flexdit", [], "was trained with full attention: there are no mediators to switch between"),
        ("mediators", ["--steps", "5"], "--steps 5: no change is compared before the 5th; give 6 at least"),
        ("mediators", ["--grid", "0.9", "0"], "--grid 0.0: must be finite and above 0"),
        ("mediators", ["--tolerance", "nan"], "--tolerance nan: must be above 0"),
        ("mediators", ["--pictures", "0"], "--pictures 0: must be at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_one_line(search, tiny_pipeline, capsys, kind, words, mend):
    code, out = search(make(tiny_pipeline, kind), *words)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1 and line.startswith("analyze: ") and mend in line
    assert not out.exists()


# ---- pruning ----


def test_pruning_a_block_of_the_sparse_grid(tiny_pipeline):
    """The means are over the tokens of the picture; the block's query mask stays, and it has nothing left to skip."""
    pipe = make(tiny_pipeline, "both")
    means_SK = pruning.measure_masks(pipe, PROMPTS, 4, 2, seed=0).means_SK
    masks = pipe(PROMPTS, num_inference_steps=4, generator=[torch.Generator().manual_seed(i) for i in range(3)],
                 output_type="latent", output_query_masks=True).query_masks  # fmt: skip
    torch.testing.assert_close(means_SK, masks.mean((0, 3)), rtol=1e-3, atol=1e-4)
    smaller = pruning.without_ffns(pipe.transformer.dit, [2, 3])  # the first module's two first
    pipe.register_modules(transformer=FocusDiTTransformer2DModel.of(smaller))
    drawn = draw(pipe, skip_threshold=1.0, output_query_masks=True)
    assert drawn.images.isfinite().all()
    assert drawn.query_masks.shape == (3, STEPS, 8, 16)
    saved_SK = saved_flops(smaller.config, drawn.ffn_work.kept_SK, drawn.ffn_work.tokens_SK)
    assert (saved_SK > 0).all(0).tolist() == [True, True, False, False, True, True, True, True]
