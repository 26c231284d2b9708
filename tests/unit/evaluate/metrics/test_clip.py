"""cmmd and clipscore: against plain references and torchmetrics, on a small random CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.metrics import cmmd

CAPTIONS = ["a red cat", "two dogs", "", "Ünïcode", "a very long caption of thirty eight letters in all is cut"]


def result(out: Path, metric: str) -> dict[str, Any]:
    return json.loads((out / f"{metric}.json").read_text())


def words(metric: str, folder: Path, out: Path, *more: object) -> list[str]:
    return ["--pictures", str(folder), "--metrics", metric, "--device", "cpu", "--out", str(out), *map(str, more)]


def plain_discrepancy(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Pair by pair, as the definitions say it: biased, unbiased."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.exp(-((a - b) ** 2).sum() / (2 * 10**2)))

    n, m = len(x), len(y)
    cross = 2 * sum(k(a, b) for a in x for b in y) / (n * m)
    biased = sum(k(a, b) for a in x for b in x) / n**2 + sum(k(a, b) for a in y for b in y) / m**2 - cross
    unbiased = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1)) - cross
    unbiased += sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return 1000 * biased, 1000 * unbiased


# ---- cmmd ----


def test_the_discrepancy_is_that_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cmmd, "BLOCK", 7)
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 6)), rng.standard_normal((15, 6)) + 0.5
    x, y = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, y))
    found = cmmd.discrepancy(torch.from_numpy(x), torch.from_numpy(y))
    assert found == pytest.approx(plain_discrepancy(x, y), rel=1e-9)
    assert cmmd.discrepancy(torch.from_numpy(x), torch.from_numpy(x))[0] == pytest.approx(0, abs=1e-12)


def test_cmmd_of_pictures(folders: tuple[Path, Path], clip_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--cmmd-model", clip_folder, "--cmmd-reference"]
    assert main(words("cmmd", folders[0], out, *more, folders[1])) == 0
    found = result(out, "cmmd")

    model = CLIPModel.from_pretrained(clip_folder).eval()
    mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    embeddings = []
    for folder in folders:
        pixels = [
            (np.asarray(Image.open(p).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)) / 255 - mean) / std
            for p in sorted(folder.iterdir())
        ]
        with torch.no_grad():
            some = model.get_image_features(torch.tensor(np.stack(pixels)).permute(0, 3, 1, 2).float())
        embeddings.append((some / some.norm(dim=-1, keepdim=True)).double().numpy())
    biased, unbiased = plain_discrepancy(*embeddings)
    assert found["values"]["cmmd"] == {"value": pytest.approx(biased, rel=1e-3), "count": 5, "sem": None}
    assert found["values"]["unbiased"]["value"] == pytest.approx(unbiased, rel=1e-3)
    assert found["notes"]["reference"]["count"] == 4

    (file,) = (out / "reference").iterdir()
    np.save(tmp_path / "plain.npy", embeddings[1].astype(np.float32))
    for reference in (file, tmp_path / "plain.npy"):
        assert main(words("cmmd", folders[0], out, *more, reference)) == 0
        assert result(out, "cmmd")["values"]["cmmd"]["value"] == pytest.approx(biased, rel=1e-3)


def test_the_middle_square() -> None:
    image = Image.new("RGB", (90, 30), "red")
    image.paste("blue", (30, 0, 60, 30))
    assert set(cmmd.middle_square(image, 10).get_flattened_data()) == {(0, 0, 255)}


@pytest.mark.parametrize(
    ("array", "line"),
    [
        (np.eye(4, 7), "embeddings are (4, 7), expected (pictures, 12) of this CLIP"),
        (np.eye(4, 12) * 3, "embeddings are not of length 1"),
        (np.zeros(12), "embeddings are (12,), expected (pictures, 12)"),
    ],
)
def test_embeddings_of_another_model_are_refused(
    array: np.ndarray,
    line: str,
    folders: tuple[Path, Path],
    clip_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    np.save(tmp_path / "a.npy", array)
    more = ["--cmmd-model", clip_folder, "--cmmd-reference", tmp_path / "a.npy"]
    assert main(words("cmmd", folders[0], tmp_path / "out", *more)) == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith("evaluate: cmmd: --cmmd-reference ") and line in said


# ---- clipscore ----


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": caption}) + "\n" for caption in CAPTIONS))
    return path


def test_clipscore_is_torchmetrics(
    folders: tuple[Path, Path], clip_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    more = ["--clipscore-model", clip_folder, "--prompts", prompts]
    assert main(words("clipscore", folders[0], tmp_path / "out", *more)) == 0
    found = result(tmp_path / "out", "clipscore")
    assert found["values"]["clipscore"]["count"] == 5
    assert found["notes"] == {"captions cut to 40 tokens": 1}
    assert found["scorer"]["weights"].keys() == {"model.safetensors"}
    assert found["scorer"]["resize"]["crop_size"] == {"height": 32, "width": 32}

    (records,) = (tmp_path / "out/records").rglob("*.jsonl")
    scores = [json.loads(line)["record"]["score"] for line in records.read_text().split("\n") if line]
    # torchmetrics loses the end token of a long caption: here it gets what is left of it.
    captions = [*CAPTIONS[:4], "a very long caption of thirty eight letters in"]
    tokenizer = CLIPTokenizerFast.from_pretrained(clip_folder)
    assert len(tokenizer(captions[4]).input_ids) == 40
    pictures = [torch.from_numpy(np.array(Image.open(p))).permute(2, 0, 1) for p in sorted(folders[0].iterdir())]
    processor = CLIPProcessor(CLIPImageProcessor.from_pretrained(clip_folder), tokenizer)

    def parts() -> tuple[CLIPModel, CLIPProcessor]:
        return CLIPModel.from_pretrained(clip_folder).eval(), processor

    from torchmetrics.functional.multimodal import clip_score

    with torch.no_grad():
        expected = [float(clip_score(*pair, parts)) for pair in zip(pictures, captions, strict=True)]
        mean = float(clip_score(pictures, captions, parts))
    assert [max(score, 0.0) for score in scores] == pytest.approx(expected, abs=1e-3)
    assert found["values"]["clipscore"]["value"] == pytest.approx(mean, abs=1e-3)
    assert any(expected)


# ---- what cannot be had ----


@pytest.mark.parametrize("metric", ["cmmd", "clipscore"])
@pytest.mark.parametrize(
    ("model", "reason"), [((), "no CLIP; give --{}-model FOLDER"), (("./gone",), "no weights at ./gone")]
)
def test_without_a_clip_it_is_not_run(
    metric: str, model: tuple[str, ...], reason: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    more = [f"--{metric}-model", *model] if model else []
    assert main(words(metric, folders[0], tmp_path / "out", *more)) == 0
    found = result(tmp_path / "out", metric)
    assert found["status"] == "not run" and reason.format(metric) in found["reason"]


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        ("config", "holds no CLIP that can be loaded: its config.json says model_type 't5'"),
        ("weights", "holds no CLIP that can be loaded: "),
        ("pickle", "holds no safetensors but pickles"),
        ("processor", "holds no CLIPImageProcessor: "),
    ],
)
def test_a_damaged_clip_is_one_line(
    damage: str,
    line: str,
    folders: tuple[Path, Path],
    clip_folder: Path,
    prompts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clip = shutil.copytree(clip_folder, tmp_path / "clip")
    if damage == "config":
        (clip / "config.json").write_text('{"model_type": "t5"}')
    elif damage == "weights":
        (clip / "model.safetensors").write_bytes(b"x" * 100)
    elif damage == "pickle":
        (clip / "model.safetensors").rename(clip / "pytorch_model.bin")
    else:
        (clip / "preprocessor_config.json").write_text("{")
    more = ["--clipscore-model", clip, "--prompts", prompts]
    assert main(words("clipscore", folders[0], tmp_path / "out", *more)) == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith("evaluate: clipscore: ") and line in said
