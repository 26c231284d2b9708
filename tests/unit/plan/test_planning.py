"""Plans: each figure against a real module or plain arithmetic, and wrong input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import predict
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter

from pretrain.config import load
from pretrain.models import DiT, PackedText
from pretrain.models.cost import count_flops
from pretrain.plan.__main__ import main, parse
from pretrain.plan.figures import number
from pretrain.resilience.capacity import activation_bytes, state_bytes

PAPER = ["stage1_256", "stage2_512"]
SAMPLES = ["--samples", "140e6"]
Rows = list[dict[str, Any]]


def plan(tmp_path: Path, *words: str) -> Rows:
    """The figures that a command writes."""
    assert main([*words, *SAMPLES, "--out", str(tmp_path / "out")]) == 0
    content: dict[str, Rows] = json.loads((tmp_path / "out/plan.json").read_text())
    return content["figures"]


def value(figures: Rows, stage: str, name: str) -> Any:
    (found,) = [f["value"] for f in figures if f["about"].startswith(stage) and f["name"] == name]
    return found


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line of an error."""
    assert main([*words, *SAMPLES]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_parameters_and_flops_are_those_of_a_real_module(tmp_path: Path) -> None:
    figures = plan(tmp_path, "demo_256", "--caption-tokens", "9")
    config, _ = load("demo_256")
    c = config.model.backbone()
    model = DiT(c)
    assert value(figures, "demo_256", "parameters") == sum(p.numel() for p in model.parameters())
    latent = torch.zeros(2, c.latent_channels, 32, 32)
    text = PackedText.pack([torch.zeros(5, c.text_width), torch.zeros(13, c.text_width)])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = predict(model, latent, torch.zeros(2), text).sample_BCHW
        forward = counter.get_total_flops()
        output.sum().backward()
    assert value(figures, "demo_256", "FLOPs of an image, forward") == pytest.approx(forward / 2 / 1e12, rel=0.02)
    trained = value(figures, "demo_256", "FLOPs of an image, trained")
    assert trained == pytest.approx(counter.get_total_flops() / 2 / 1e12, rel=0.02)


def test_the_papers_schedule_on_32_gpus(tmp_path: Path) -> None:
    """Against the functions of a start's own checks, and arithmetic."""
    figures = plan(tmp_path, *PAPER, "--gpu", "h100", "--mfu", "0.5", "--price", "2", "--caption-tokens", "120")
    for stage, batch, steps in (("stage1_256", 2048, 50000), ("stage2_512", 1280, 10000)):
        config, deepspeed = load(stage)
        micro = deepspeed["train_micro_batch_size_per_gpu"]
        assert value(figures, stage, "largest micro-batch") == micro  # as the config's own comment says
        memory = state_bytes(config, deepspeed, 32) + activation_bytes(config, micro)
        assert value(figures, stage, f"memory at micro-batch {micro}") == pytest.approx(memory / 2**30)
        assert value(figures, stage, "images") == steps * batch
        assert value(figures, stage, "epochs") == pytest.approx(steps * batch / 140e6)
        step = batch * value(figures, stage, "FLOPs of an image, trained") / (32 * 989 * 0.5)
        assert value(figures, stage, "seconds of a step") == pytest.approx(step)
        assert value(figures, stage, "hours") == pytest.approx(steps * step / 3600)
        assert value(figures, stage, "GPU-days") == pytest.approx(steps * step / 3600 * 32 / 24)
        assert value(figures, stage, "money") == pytest.approx(steps * step / 3600 * 32 * 2)
        assert value(figures, stage, "samples") == pytest.approx(batch / step / 4)
    both = value(figures, "stage1_256", "money") + value(figures, "stage2_512", "money")
    assert value(figures, "all", "money, training") == pytest.approx(both)
    sample = 4 * 12 * (32**2 + 64**2) + 120 * 4096 * 2
    assert value(figures, "all", "shards") == pytest.approx(140e6 * sample / 1e12)
    reading = value(figures, "stage1_256", "samples") * sample / 1e9
    assert value(figures, "stage1_256", "reading") == pytest.approx(reading)


def test_token_routing_spares_flops_in_its_share_of_the_steps(tmp_path: Path) -> None:
    routed = ["routing.name=tread", "routing.until=0.5"]
    names = ("FLOPs of an image, forward", "FLOPs of an image, trained")
    config, _ = load("stage1_256", routed)
    shape = config.model.backbone()
    fewer = count_flops(shape, (16, 16), 80, routing=config.routing.build(shape)).total / 1e12
    forward, trained = (value(plan(tmp_path, "stage1_256", *routed), "stage1_256", name) for name in names)
    assert fewer < 0.7 * forward
    assert trained == pytest.approx(3 * (forward + fewer) / 2)


def test_a_batch_that_the_gpus_do_not_divide(tmp_path: Path) -> None:
    """1,280 images on 1,024 GPUs: 640 train, all are paid for."""
    figures = plan(tmp_path, *PAPER, "--nodes", "128", "--price", "1")
    about = {f["about"] for f in figures}
    assert any("on 1,024 × H100" in a and "idle" not in a for a in about)
    assert any("on 640 × H100 (384 more stand idle" in a for a in about)
    assert value(figures, "stage2_512", "money") == pytest.approx(1024 * value(figures, "stage2_512", "hours"))
    assert value(figures, "stage2_512", "largest micro-batch") == 2


def test_what_does_not_fit_is_recomputed(tmp_path: Path) -> None:
    """On a small GPU: not one image without recomputation, and the one-line plan of the time says so."""
    gpu = ("--gpu", "own", "--tflops", "100", "--memory", "10", "--bandwidth", "1")
    figures = plan(tmp_path, "stage2_512", *gpu)
    assert value(figures, "stage2_512", "largest micro-batch") == "none fits"
    images = value(figures, "stage2_512", "largest micro-batch with recompute")
    assert value(figures, "stage2_512", "micro-batch") == images > 1
    used = value(figures, "stage2_512", f"memory at micro-batch {images} with recompute")
    assert used < 8 < used + images * value(figures, "stage2_512", "activations of an image with recompute")


def test_every_figure_says_how_and_all_files_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = plan(tmp_path, "demo_256", "--price", "1")
    shown = capsys.readouterr().out
    assert all(f["how"] for f in figures)
    with (tmp_path / "out/plan.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(v) for k, v in f.items()} for f in figures] == rows
    text = (tmp_path / "out/plan.txt").read_text()
    assert shown.startswith(text.rstrip("\n"))
    assert all(f["how"] in text and number(f["value"]) in text for f in figures)
    assert value(figures, "all", "encoding") == "not known"  # of the small encoders


# ---- a run that was measured ----


def run_with(tmp_path: Path, curves: dict[str, list[float]]) -> Path:
    """A run directory with a point each five steps."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").touch()
    writer = SummaryWriter(str(run / "tensorboard"))
    for tag, values in curves.items():
        for i, v in enumerate(values):
            writer.add_scalar(tag, v, 5 * (i + 1))
    writer.close()
    return run


def test_the_mfu_of_a_run(tmp_path: Path) -> None:
    run = run_with(tmp_path, {"speed/mfu_percent": [1, 30, 32, 34], "speed/step_s": [9, 1, 1.1, 1]})
    figures = plan(tmp_path, "stage1_256", "--measured", str(run))
    assert value(figures, "stage1_256", "MFU") == pytest.approx(32)
    (how,) = {f["how"] for f in figures if f["name"] == "MFU"}
    assert str(run) in how
    figures = plan(tmp_path, "stage1_256", "--measured", str(run), "--mfu", "0.2")
    assert value(figures, "stage1_256", "MFU") == pytest.approx(20)


def test_a_run_without_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "stage1_256", "--measured", str(tmp_path / "none"))
    assert "none: no run, as " in said and "config.yaml is missing" in said
    run = run_with(tmp_path, {"speed/mfu_percent": [1, 2, 3, 4], "speed/step_s": [1, 1]})
    said = refusal(capsys, "stage1_256", "--measured", str(run))
    assert "its curve speed/step_s has 2 points, 4 are needed" in said
    assert f"python -m pretrain.train {run}/config.yaml" in said and "logging.every=5" in said


# ---- wrong input ----


def test_a_gpu_that_is_not_known(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, "stage1_256", "--gpu", "mi300x", "--memory", "192")
    assert said.startswith("plan: --gpu mi300x: not in the table (h100-pcie, ")
    assert "give --tflops (dense bf16, TFLOP/s), --memory (GiB) and --bandwidth (of its memory, TB/s)" in said
    assert said.endswith("missing: --tflops, --bandwidth")


def test_a_model_that_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    gpu = ("--gpu", "own", "--tflops", "100", "--memory", "6", "--bandwidth", "1")
    said = refusal(capsys, "stage1_256", *gpu)
    assert "stage1_256: its states take 6.2 GiB on each of 32 GPUs" in said and "take more GPUs" in said


def test_a_stage_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stage3", *SAMPLES]) == 1
    assert "stage3" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "said"), [
    (["model.recompute=true"], "no stage among model.recompute=true"),
    (["stage1_256", "stage1_256"], "give each stage once"),
    (["stage1_256", "--mfu", "40"], "40 must be a share above 0, at most 1: 0.4 is 40%"),
    (["stage1_256", "--nodes", "0"], "0 must be a whole number above 0"),
    (["stage1_256", "--price", "-1"], "-1 must be above 0"),
])  # fmt: skip
def test_wrong_usage(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*words, *SAMPLES])
    assert said in " ".join(capsys.readouterr().err.split())
