"""One image's walk through the whole project, in the order of the README: from a tar's bytes to a point of a loss curve."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from support import SMALL, scalars

from data_prep import schema
from data_prep.encoders import pixels_to_floats
from data_prep.inputs.samples import Sample
from data_prep.inputs.tars import read_tar
from data_prep.pictures.images import cut, decode
from data_prep.shapes import scenes
from pretrain.config import load
from pretrain.data.loader import Loader
from pretrain.distributed.world import World


def test_one_image(shape_tars: Path, data_set: Path, train, tmp_path: Path) -> None:
    # tar → a sample with its caption
    sample = next(read_tar(shape_tars / "00000.tar"))
    assert isinstance(sample, Sample)
    scene = next(scenes(20, seed=5))
    assert sample.caption == scene.caption

    # sample → pixels of each resolution → floats
    pixels_HW3 = cut(sample.image, (256, 512)).pictures[256]
    assert pixels_HW3.shape == (256, 256, 3)
    picture_13HW = pixels_to_floats(torch.from_numpy(pixels_HW3)[None], torch.device("cpu"))
    assert picture_13HW.shape == (1, 3, 256, 256)
    assert -1 <= picture_13HW.min() < picture_13HW.max() <= 1

    # data set: the card adds up, and the loader finds the record by its key
    card = schema.Card.load(data_set)
    assert card.counts["read"] == card.counts["written"] == 20
    run = tmp_path / "run"
    words = [*SMALL, f"data.path={data_set}", f"run_dir={run}", "steps=5", "data.caption_dropout=0"]
    config, deepspeed = load("demo_256", words)
    backbone = config.model.backbone()
    loader = Loader(config, backbone, deepspeed["train_batch_size"], 2, World.alone())
    batches = [b for _, step in zip(range(loader.steps_per_epoch), loader, strict=False) for b in step]
    by_key = {key: (batch, i) for batch in batches for i, key in enumerate(batch.keys)}
    assert len(by_key) == 20
    batch, i = by_key[f"images/00000/{sample.key}"]

    # the record is what the encoders make of this picture and this caption
    from data_prep.encoders import TextEncoder, Vae

    expected = Vae("tiny").encode(picture_13HW)
    torch.testing.assert_close(batch.mean_BCHW[i].float(), expected.mean[0], rtol=2e-3, atol=2e-3)
    text = TextEncoder("tiny").encode([sample.caption], 300)[0][0]
    torch.testing.assert_close(batch.text.captions()[i], text, rtol=2e-2, atol=2e-2)

    # training: a checkpoint, what was used, and the loss in TensorBoard's event file
    train("demo_256", *words)
    losses = scalars(run, "train/loss")
    assert list(losses) == [1, 2, 3, 4, 5]
    assert losses[5] < losses[1]
    assert (run / "checkpoints" / "latest").read_text().strip() == "step_00000005"
    assert json.loads((run / "ds_config.json").read_text())["gradient_accumulation_steps"] == 2
    assert json.loads((run / "environment.json").read_text())["processes"] == 1
    assert scalars(run, "mask_mean/block_00")[5] > 0
    assert scalars(run, "speed/images_per_s")[5] > 0

    # the same weights, sampling
    from pretrain.sample import main

    assert main(["--run", str(run), "--prompt", sample.caption, "--out", str(tmp_path / "out"), "--steps", "2"]) == 0
    about = json.loads((tmp_path / "out" / "prompts.jsonl").read_text())
    assert about["prompt"] == sample.caption
    assert decode((tmp_path / "out" / about["file"]).read_bytes()).size == (256, 256)
