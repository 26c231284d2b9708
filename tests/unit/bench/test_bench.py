"""The benchmarks run and print what they count; what they time is not tested."""

import json
import re
from dataclasses import replace

import pytest
import torch

from pretrain.bench import methods, plan
from pretrain.bench.__main__ import main
from pretrain.bench.timing import padded, side_by_side
from pretrain.config import load
from pretrain.models import PRESETS, preset
from pretrain.models.cost import count_flops, count_parameters

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--preset", "dit_tiny", "--depth", "0", "--tokens-per-side", "4", "--rounds", "1"]


def test_things_are_timed_in_turn_and_the_first_round_does_not_count():
    order = []
    took = side_by_side({n: lambda n=n: order.append(n) for n in "ab"}, rounds=2, device=torch.device("cpu"))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert set(took) == {"a", "b"}


def test_padding():
    text, keep = padded([torch.ones(2, 3), torch.ones(4, 3)], 5)
    assert text.shape == (2, 5, 3)
    assert torch.equal(text.sum((1, 2)), torch.tensor([6.0, 12.0]))
    assert keep.tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]


def test_step_and_sample(capsys):
    assert main(["step", *SMALL]) == 0
    assert len(re.findall(r"ratio \d+\.\d\d", capsys.readouterr().out)) == 2
    assert main(["sample", *SMALL]) == 0
    said = capsys.readouterr().out
    assert re.search(r"FocusDiT / DiT +\d+\.\d\d +\(with the shared FFN \d+\.\d\d\)", said)
    assert re.search(r"DiT / PixArt padded to 300 +\d+\.\d\d", said)


def test_methods_side_by_side(capsys, monkeypatch):
    """Every part, small; the shares of FLOPs are those that cost.py counts."""
    base = replace(preset("dit_tiny_deep"), patch=2)
    monkeypatch.setitem(PRESETS, "small", base)
    xl = replace(base, text_width=0)
    monkeypatch.setattr(methods, "XL", (xl, replace(xl, density="flexdit")))
    monkeypatch.setattr(methods, "XL_GRID", (8, 8))
    words = ["sample", "--models", "dit", "flexdit", "mediators", "focusdit", *SMALL[2:], "--preset", "small"]
    assert main([*words, "--tokens-per-side", "8", "--steps", "2", "--caption-tokens", "5"]) == 0
    _, forward, sampling, large, alone = capsys.readouterr().out.split("\n\n")
    flops = {
        changes: count_flops(replace(base, **dict(changes)), (8, 8), 5).total
        for changes in [(), (("density", "flexdit"),)]
    }
    assert re.search(r"dit +\d+\.\d ms +1\.00 +1\.00 +1\.00×", forward)
    share = min(flops.values()) / max(flops.values())
    assert re.search(rf"flexdit, mean over the noise levels +\d+\.\d ms +\d+\.\d\d +{share:.2f} ", forward)
    assert forward.count("flexdit at noise") == 4 and forward.count("mediators n = ") == 2
    assert [line.split()[0] for line in sampling.splitlines()[2:]] == ["dit", "flexdit", "mediators", "focusdit"]
    assert large.count("FlexDiT at noise") == 4
    assert re.search(r"full +\d+\.\d ms +1\.00 .* \d+\.\d\d×", alone)
    assert len(re.findall(r"n = \d+ .* 4\.00×", alone)) == 2, "FLOPs linear in the tokens"


def test_skip_counts_the_flops(capsys, tmp_path):
    """With thresholds at quantiles of the masks, about so much of the work is saved, and all of it at 1."""
    words = ["--preset", "focusdit_tiny", *SMALL[2:], "--tokens-per-side", "16", "--out", str(tmp_path)]
    assert main(["skip", *words]) == 0
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line.startswith("        ")]
    saved = [float(row[2].rstrip("%")) for row in rows]
    deviation = [float(row[4]) for row in rows]
    token, layer = saved[:7], saved[7:]
    assert token == pytest.approx([0, 10, 25, 50, 75, 90, 100], abs=8)
    assert layer == sorted(layer)
    assert (layer[0], layer[-1]) == (0, 100)
    assert deviation[0] == deviation[7] == 0
    assert deviation[6] == deviation[13] > 0.01, "nothing is left either way"
    assert (tmp_path / "skip.png").stat().st_size > 10_000
    counts = json.loads((tmp_path / "skip.json").read_text())
    assert [len(points) for points in counts.values()] == [7, 7]
    half = torch.tensor(counts["token"][3]["saved_SK"])
    assert half.shape == (1, 2)
    every = torch.tensor(counts["token"][6]["saved_SK"])
    assert (half.sum() / every.sum()).item() == pytest.approx(counts["token"][3]["saved"], abs=1e-6)


def test_picture(capsys):
    words = ["--presets", "focusdit_tiny", "--resolutions", "64", "--steps", "2", "--rounds", "1"]
    assert main(["picture", *words]) == 0
    assert re.search(r"64 px  focusdit_tiny +\d+\.\d+ s", capsys.readouterr().out)


def test_checkpoint(capsys):
    assert main(["checkpoint", *SMALL[:-1], "1"]) == 0
    said = capsys.readouterr().out
    assert ": 16.0" in said or ": 16.1" in said  # four fp32 values, and a header
    assert re.search(r"in the background +training stands still for +\d+\.\d+ s +ratio \d", said)
    assert re.search(r"spike guard, watchdog and logging .*: \d+\.\d\d%", said)


def test_skip_by_a_model_without_masks(capsys):
    assert main(["skip", *SMALL]) == 1
    assert "no query masks" in capsys.readouterr().err


def test_the_shapes_checker_is_shown_right_and_wrong_pictures(capsys):
    assert main(["shapes", "--pictures", "6"]) == 0
    accuracy, wrong, *confusion, speed = capsys.readouterr().out.strip().split("\n\n")
    assert re.search(r"\| none( \| 1\.000){11} \|", accuracy)
    assert re.search(r"\| pair \| swapped colours .* \*\*1\.000\*\* \|$", wrong, re.MULTILINE)
    assert [table.split(" | ")[0] for table in confusion] == ["| number", "| shape", "| place", "| direction"]
    assert re.fullmatch(r"\d+\.\d ms to recognise a picture of 512 px", speed)


def test_start(capfd, tmp_path):
    """Two processes make a loader of made shards; nothing of it stays."""
    assert main(["start", "--shards", "292", "--sets", "2", "--processes", "2", "--folder", str(tmp_path)]) == 0
    first, _, *rows = capfd.readouterr().out.splitlines()
    assert first.startswith("292 shards, 2 sets, indexes of ")
    assert [row.split()[0] for row in rows] == ["0", "1"]
    assert not list(tmp_path.iterdir())


def test_a_simulated_step_is_the_sum_of_its_ingredients() -> None:
    """One process: passes and optimizer; several: the buckets, the exchange and the gather besides, at the rate of a bucket."""
    alone = {"passes": 0.3, "optimizer": 0.1}
    assert plan.simulated_step(1, alone, jitter=0.0) == pytest.approx(plan.MICRO_BATCHES * 0.3 + 0.1)
    free = alone | {"buckets": 1e-9, "latency": 0.0}
    assert plan.simulated_step(4, free, jitter=0.0) == pytest.approx(plan.MICRO_BATCHES * 0.3 + 0.1, abs=1e-3)
    shape = load(plan.STAGE)[0].model.backbone()
    at_once = len(plan.buckets_of(shape, muon=False, bucket_size=plan.BUCKET, processes=4))
    slow = alone | {"buckets": 0.5 * at_once, "latency": 0.0}
    buckets = count_parameters(shape).total / plan.BUCKET
    # Reduced, gathered, and exchanged: 1/4 of all, but whole, where a ring moves 3/4.
    collectives = 0.5 * buckets * (2 + (1 / 4) / (3 / 4))
    assert plan.simulated_step(4, slow, jitter=0.0) == pytest.approx(
        plan.MICRO_BATCHES * 0.3 + 0.1 + collectives, rel=1e-3
    )


def test_the_table_of_simulated_steps() -> None:
    lines = plan.table({1: [{"passes": [0.3, 0.3], "optimizer": [0.1], "step": [1.4, 1.4, 9.0]}]}).splitlines()
    assert lines[-1].split() == ["1", "300.0", "100.0", "0.0", "0.0", "1400.0", "700.0", "0.50"]


def test_jitter_is_what_differs_between_processes_not_what_slows_all() -> None:
    assert plan.jitter_of([[0.3, 0.9, 0.3], [0.3, 0.9, 0.3]]) == 0
    assert plan.jitter_of([[0.9, 1.8], [1.1, 2.2]]) == pytest.approx(0.2 / 2**0.5)
    assert plan.jitter_of([[0.3, 0.9]]) == 0


def test_the_planner_beside_measured_steps(capfd):
    assert main(["plan", "--processes", "1", "--rounds", "1", "--steps", "1"]) == 0
    measured, simulated, ratio = (float(word) for word in capfd.readouterr().out.splitlines()[-1].split()[-3:])
    assert ratio == pytest.approx(simulated / measured, abs=0.01)
