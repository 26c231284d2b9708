"""A run and an export made by version 0.1.0 before its files moved into rooms: they load, compute the same, and are gone on from.

`tests/earlier/` holds them: FocusDiT's masks and shared FFN, mediators and FlexDiT together, in the names of that time
(`model.split`, `guard.after`, …), trained for three steps in two processes; and latents that the export drew then. Only the
preset's widths were made smaller (`use_earlier_preset`).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import EARLIER, state_of, use_earlier_preset

from pretrain.checkpoint.reader import Checkpoint
from pretrain.config import Config
from pretrain.models.mixers.flexdit import FlexDiTSection
from pretrain.models.mixers.mediators import MediatorsSection
from pretrain.pipeline import FocusDiTPipeline
from pretrain.sampling.trained_run import load_run

pytestmark = pytest.mark.usefixtures("earlier_preset")


def draw(pipeline: FocusDiTPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        "a large red circle on a white background",
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        output_query_masks=True,
    )
    assert isinstance(output.images, torch.Tensor) and output.query_masks is not None  # type: ignore[union-attr]
    return output.images, output.query_masks  # type: ignore[union-attr]


def test_the_export_draws_what_it_drew() -> None:
    """Within what other processors' products differ by."""
    expected = load_file(EARLIER / "expected.safetensors")
    latents, masks = draw(FocusDiTPipeline.from_pretrained(EARLIER / "export"))
    torch.testing.assert_close(latents, expected["latents"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(masks, expected["query_masks"], rtol=1e-3, atol=1e-3)


def test_the_run_loads_with_its_settings_under_todays_names() -> None:
    trained = load_run(EARLIER / "run")
    config: Config = trained.config
    assert config.guard.min_history == 50
    backbone = config.model.backbone()
    assert backbone.mediators == MediatorsSection(numbers=(1, 4))
    assert backbone.flexdit == FlexDiTSection(split=(0, 1, 1, 1), sparsity=(0.3, 0.8))
    exported = load_file(EARLIER / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    found = trained.pipeline.transformer.state_dict()
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in found)


def test_its_checkpoint_says_what_the_run_had_done() -> None:
    found = Checkpoint(EARLIER / "run" / "checkpoints" / "step_00000003")
    found.verify()
    state = found.run_state
    assert (state.step, state.updates, state.images) == (3, 3, 12)
    assert len(state.history.losses) == len(state.history.groups) == 3
    assert set(state.history.groups) <= {0, 1, 2, 3}


def test_a_new_run_starts_from_it(data_set: Path, train, tmp_path: Path) -> None:
    """All weights and moments are taken over as they were: with a learning rate of nearly 0 they stay."""
    shutil.copytree(EARLIER / "run", tmp_path / "earlier")
    words = ["model.preset=dit_tiny_deep", "model.mask=adaln_single", "model.ffn=shared", "model.attention=mediators"]
    words += ["model.mediators.numbers=[1,4]", "model.density=flexdit", "model.flexdit.split=[0,1,1,1]"]
    words += ["deepspeed.train_batch_size=4", "deepspeed.train_micro_batch_size_per_gpu=2", "preview.every=0"]
    words += ["steps=1", "optimizer.warmup_steps=0", "optimizer.lr=1e-30", "carry_moments=true"]
    words += ["optimizer.name=adamw", "model.heads=null"]
    given = [f"init_from={tmp_path / 'earlier'}", f"run_dir={tmp_path / 'new'}", f"data.path={data_set}"]
    output = train("demo_256", *words, *given, before=use_earlier_preset).output
    assert "its weights and average, the optimizer's moments too" in output
    before, after = state_of(tmp_path / "earlier"), state_of(tmp_path / "new")
    masters = [name for name in before if name.startswith("master/")]
    assert masters and all(torch.equal(before[name], after[name]) for name in masters)
    assert not any(torch.equal(before[name], after[name]) for name in before if name == "exp_avg/final.proj.weight")
