"""A trained run's ways out: export and pruning, by their commands, and the pictures that come from them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import SMALL, draw_in_a_new_process

from pretrain import export, prune, sample
from pretrain.checkpoint.reader import newest
from pretrain.models import PRESETS
from pretrain.models.cost import count_parameters
from pretrain.pipeline import FocusDiTPipeline, warn_of_guidance
from pretrain.sampling import drawing, pruning

PROMPTS = ["a large red circle on the left on a white background", "a small blue square on a black background"]


@pytest.fixture(scope="module")
def run(data_set: Path, train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five real steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    words = [*SMALL, f"data.path={data_set}", f"run_dir={folder}", "steps=5", "optimizer.lr=0.01", "preview.steps=3"]
    words.append("optimizer.more_ema_decays=[0.2]")
    train("demo_256", *words)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def drawn(folder: Path) -> list[np.ndarray]:
    """The pictures of a sampling run, in order."""
    return [pixels(folder / json.loads(line)["file"]) for line in (folder / "prompts.jsonl").read_text().splitlines()]


def test_guidance_of_a_model_that_dropped_no_captions_is_warned_of(run, prompts, tmp_path, caplog):
    """Once, however many batches: such a run has seen no empty caption; the one above has."""
    warn_of_guidance.cache_clear()
    shutil.copytree(run, tmp_path / "run")
    kept = tmp_path / "run" / "config.yaml"
    text = kept.read_text()
    assert "caption_dropout: 0.1\n" in text
    kept.write_text(text.replace("caption_dropout: 0.1\n", "caption_dropout: 0.0\n"))
    exported = tmp_path / "export"
    assert export.main(["--run", str(tmp_path / "run"), "--out", str(exported)]) == 0
    sources = [
        ("--run", run, "3"),
        *(("--run", tmp_path / "run", g) for g in "13"),
        *(("--model", exported, g) for g in "14"),
    ]
    said = []
    for option, folder, guidance in sources:
        words = ["--prompts", str(prompts), "--batch-size", "1", "--steps", "1", "--overwrite"]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="pretrain.pipeline"):
            assert (
                sample.main([option, str(folder), *words, "--guidance", guidance, "--out", str(tmp_path / "out")]) == 0
            )
        said.append(sum(f"guidance_scale {guidance}: this model was trained" in r.message for r in caplog.records))
    assert said == [0, 0, 1, 0, 1]


@pytest.mark.parametrize("encoders", ["copy", "reference"])
def test_an_export_gives_the_runs_pixels_in_a_new_process(run, prompts, tmp_path, encoders):
    """One machine, as many threads, the same batch, and weights that lie alike: the same bits."""
    assert sample.main(["--run", str(run), "--prompts", str(prompts), "--out", str(tmp_path / "from_run")]) == 0
    out = tmp_path / "export"
    assert export.main(["--run", str(run), "--out", str(out), "--encoders", encoders]) == 0
    assert (out / "text_encoder").exists() == (out / "vae").exists() == (encoders == "copy")
    for there, expected in zip(
        draw_in_a_new_process(out, tmp_path / "there", PROMPTS), drawn(tmp_path / "from_run"), strict=True
    ):
        assert np.array_equal(np.asarray(there), expected)


def test_a_colleague_may_read_all_files(run, data_set, prompts, tmp_path):
    """As the umask says: runs, data sets, exports, pruned models and pictures."""
    before = os.umask(0o027)  # the run and the data set are of the shell's
    try:
        assert export.main(["--run", str(run), "--out", str(tmp_path / "export")]) == 0
        words = ["--prompts", str(prompts), "--remove", "1", "--steps", "1"]
        assert prune.main(["--run", str(run), "--out", str(tmp_path / "pruned"), *words]) == 0
        assert sample.main(["--model", str(tmp_path / "pruned"), *words[:2], "--out", str(tmp_path / "pictures")]) == 0
    finally:
        os.umask(before)
    made = {path: 0o027 for name in ("export", "pruned", "pictures") for path in (tmp_path / name).rglob("*")}
    made |= {path: before for folder in (run, data_set) for path in folder.rglob("*")}
    assert {path.suffix for path in made} >= {".safetensors", ".json", ".mds", ".png", ".jsonl"}
    modes = {path: oct(path.stat().st_mode & 0o777) for path in made}
    wrong = {p: m for p, m in modes.items() if m != oct((0o777 if p.is_dir() else 0o666) & ~made[p])}
    assert wrong == {}


def test_the_export_says_where_it_comes_from(run, tmp_path):
    out = tmp_path / "export"
    assert export.main(["--run", str(run), "--out", str(out), "--dtype", "bf16", "--weights", "master"]) == 0
    origin = json.loads((out / "training.json").read_text())
    assert (origin["step"], origin["images"], origin["weights"]) == (5, 20, "master")
    fingerprint = json.loads((run / "dataset.json").read_text())["fingerprint"]
    assert origin["data"]["fingerprint"] == fingerprint
    card = (out / "README.md").read_text()
    for words in (fingerprint, "5 steps (20 images)", f'from_pretrained("{out}")', "last (not averaged)", "lr: 0.01"):
        assert words in card, words
    transformer = FocusDiTPipeline.from_pretrained(out, torch_dtype=torch.bfloat16).transformer
    expected = newest(run).parameters("master")
    for name, value in transformer.dit.state_dict().items():
        assert torch.equal(value, expected[name].bfloat16()), name


def test_another_average_by_its_name(run, tmp_path, capsys):
    out, trained = tmp_path / "export", newest(run)
    assert export.main(["--run", str(run), "--out", str(out), "--weights", "ema_0.2"]) == 0
    assert json.loads((out / "training.json").read_text())["weights"] == "ema_0.2"
    found = FocusDiTPipeline.from_pretrained(out).transformer.dit.state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.parameters("ema_0.2").items())
    assert any(not torch.equal(found[name], value) for name, value in trained.parameters("ema").items())
    capsys.readouterr()
    assert export.main(["--run", str(run), "--out", str(tmp_path / "no"), "--weights", "ema_0.5"]) == 1
    (line,) = [words for words in capsys.readouterr().err.splitlines() if "--weights" in words]
    has = "has master, ema, ema_0.2 (optimizer.more_ema_decays adds averages)"
    assert line == f"export: --weights ema_0.5: {trained.path} {has}"


def test_other_encoders_than_the_referenced_ones_are_refused(run, tmp_path):
    out = tmp_path / "export"
    assert export.main(["--run", str(run), "--out", str(out), "--encoders", "reference"]) == 0
    index = json.loads((out / "model_index.json").read_text())
    index["references"]["vae"]["fingerprint"] = "0" * 64
    (out / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"the vae tiny is not the one that this model was trained with"):
        FocusDiTPipeline.from_pretrained(out)


def test_pruning_by_its_command(run, prompts, tmp_path, capsys):
    out = tmp_path / "pruned"
    words = ["--run", str(run), "--prompts", str(prompts), "--remove", "1", "--out", str(out)]
    assert prune.main(words) == 0
    report = json.loads((out / "prune.json").read_text())
    means = report["mean_by_block"]
    assert report["removed_ffns"] == [means.index(min(means))]
    per_step = torch.tensor(report["mean_by_step_and_block"])
    assert per_step.shape == (3, 2)
    assert per_step.mean(0).tolist() == pytest.approx(means)

    pipe = FocusDiTPipeline.from_pretrained(out)
    dit = pipe.transformer.dit
    assert dit.config.removed_ffns == tuple(report["removed_ffns"])
    assert sum(p.numel() for p in dit.parameters()) == report["parameters_after"] == count_parameters(dit.config).total
    assert report["parameters_after"] < report["parameters_before"]
    assert Image.open(out / "before_after.png").size[0] > 700
    assert Image.open(out / "prune.png").size[0] > 700
    assert f"{100 * report['share_left']:.1f}%" in capsys.readouterr().out
    assert f"{100 * report['share_left']:.1f}%" in (out / "README.md").read_text()

    # what is left computes what the whole model computes with those FFNs' updates at zero
    whole = drawing.load_pipeline(
        sample.parse(["--run", str(run), "--prompt", "x", "--out", "x"]), torch.device("cpu")
    )[0]
    for block in report["removed_ffns"]:
        whole.transformer.dit.blocks[block].scale_shift_table.data[5] = 0
        whole.transformer.dit.time_modulation.weight.data[5 * 256 :] = 0
        whole.transformer.dit.time_modulation.bias.data[5 * 256 :] = 0
    smaller = pipe.transformer.dit
    smaller.time_modulation.load_state_dict(whole.transformer.dit.time_modulation.state_dict())
    pictures = [
        p(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt", num_inference_steps=2).images
        for p in (whole, pipe)
    ]
    torch.testing.assert_close(*pictures, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("export", "no run"),
        ("export", "out is there"),
        ("prune", "no run"),
        ("prune", "out is there"),
        ("prune", "too many"),
        ("prune", "no steps"),
        ("prune", "no prompts"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_drawn(run, prompts, tmp_path, capsys, monkeypatch, command, problem):
    monkeypatch.setattr(FocusDiTPipeline, "__call__", lambda *_, **__: pytest.fail("pictures were drawn"))
    out = tmp_path / "out"
    words = ["--run", str(run), "--out", str(out)]
    if command == "prune":
        words += ["--prompts", str(prompts), "--remove", "3" if problem == "too many" else "1", "--steps", "1"]
    if problem == "no steps":
        words[-1] = "0"
    if problem == "no prompts":
        words[words.index(str(prompts))] = str(tmp_path / "nowhere.txt")
    if problem == "no run":
        words[1] = str(tmp_path / "nowhere")
    elif problem == "out is there":
        out.mkdir()
    assert {"export": export, "prune": prune}[command].main(words) == 1
    complaint = capsys.readouterr().err
    assert complaint.startswith(f"{command}: ")
    assert complaint.count("\n") == 1
    expected = {
        "no run": "no run at",
        "out is there": "is there already",
        "too many": "--remove 3: the model has 2 FFNs; give a number from 1 to 2",
        "no steps": "--steps 0: must be at least 1",
        "no prompts": "no prompts file",
    }
    assert expected[problem] in complaint
    assert not list(tmp_path.glob(".writing*"))


@pytest.mark.parametrize(("means", "removed", "count", "expected"), [
    ([0.5, 0.1, 0.3], [], 1, [1]),
    ([0.5, 0.1, 0.3], [], 2, [1, 2]),
    ([0.5, 0.1, 0.3], [1], 1, [2]),
    ([0.5, 0.1, 0.3], [], 3, [0, 1, 2]),
])  # fmt: skip
def test_the_least_are_of_the_lowest_mean(means, removed, count, expected):
    steps = torch.tensor(means) + torch.tensor([[0.05], [-0.05]])
    assert pruning.lowest_blocks(steps, removed, count) == expected


def test_a_model_without_masks_is_not_pruned():
    with pytest.raises(ValueError, match="no query masks"):
        pruning.check_removable(PRESETS["dit_tiny"], 1)
    pruned = replace(PRESETS["focusdit_tiny"], removed_ffns=(0,))
    pruning.check_removable(pruned, 1)
    with pytest.raises(ValueError, match=r"--remove 2: the model has 1 FFNs; give a number from 1 to 1"):
        pruning.check_removable(pruned, 2)
