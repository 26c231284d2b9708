"""Two processes against one, with real DeepSpeed over gloo: the same global batch gives the same result."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import SMALL, scalars

from pretrain.checkpoint.reader import newest

BF16 = ("deepspeed.bf16.enabled=true", "deepspeed.data_types.grad_accum_dtype=fp32")


@pytest.mark.parametrize(("precision", "tolerance"), [((), 2e-5), (BF16, 2e-2)], ids=["fp32", "bf16"])
def test_two_ranks_equal_one(precision, tolerance, data_set: Path, train, tmp_path: Path) -> None:
    # Dropout of the mask follows from the rank, so it is off here; all other randomness is the sample's own.
    words = [*SMALL, *precision, f"data.path={data_set}", "steps=4", "model.mask_dropout=0", "optimizer.lr=1e-4"]
    for processes in (1, 2):
        train("demo_256", *words, f"run_dir={tmp_path / str(processes)}", processes=processes)
    one, two = (newest(tmp_path / n) for n in "12")
    assert one is not None and two is not None
    assert two.state["world"] == 2
    assert one.state["progress"]["images"] == two.state["progress"]["images"] == 16
    losses = [scalars(tmp_path / n, "train/loss") for n in "12"]
    assert list(losses[0]) == [1, 2, 3, 4]
    for step in losses[0]:
        assert losses[0][step] == pytest.approx(losses[1][step], rel=tolerance)
    start = 1e-4 * 4  # what AdamW can move a weight by in these steps
    for kind in ("master", "ema"):
        for name, value in one.parameters(kind).items():
            # Where a gradient is next to nothing, rounding decides its sign, and with it AdamW's whole step.
            close = torch.isclose(value, two.parameter(kind, name), rtol=tolerance, atol=tolerance * 1e-2)
            assert close.float().mean() > (0.999 if not precision else 0.6), (kind, name)
            torch.testing.assert_close(value, two.parameter(kind, name), rtol=0, atol=2 * start)


def test_preview_on_two_ranks_leaves_the_weights_alone(data_set: Path, train, tmp_path: Path) -> None:
    """Drawing with the averaged weights puts the masters' rounding back, bit for bit."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small red circle at the top on a blue background\n" * 3)
    words = [*SMALL, *BF16, f"data.path={data_set}", "steps=3"]
    drawing = ["preview.every=1", f"preview.prompts={prompts}", "preview.steps=2"]
    train("demo_256", *words, f"run_dir={tmp_path / 'plain'}", processes=2)
    train("demo_256", *words, *drawing, f"run_dir={tmp_path / 'drawing'}", processes=2)
    plain, drawn = newest(tmp_path / "plain"), newest(tmp_path / "drawing")
    assert plain is not None and drawn is not None
    for name, value in plain.parameters("master").items():
        assert torch.equal(value, drawn.parameter("master", name)), name


def test_a_world_size_that_does_not_divide(data_set: Path, train, tmp_path: Path) -> None:
    words = [*SMALL, f"data.path={data_set}", f"run_dir={tmp_path}", "deepspeed.train_batch_size=6", "guard.seconds=10"]
    finished = train("demo_256", *words, "deepspeed.train_micro_batch_size_per_gpu=2", processes=2, check=False)
    assert finished.codes == [1, 1]
    assert "2 processes × micro-batch 2 do not divide the global batch of 6" in finished.output
    assert "with 2 processes, micro-batches that do: 1, 3" in finished.output
