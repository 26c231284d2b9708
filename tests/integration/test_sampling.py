"""`pretrain.sample`: the same pictures in every batch, by any number of processes, after a kill; safe names; one-line errors."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import die_in_sampling
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support import Opened, ended, fork, levels, same_pictures

from pretrain.pipeline import FocusDiTPipeline
from pretrain.sample import main
from pretrain.schedulers import build_scheduler

COLOURS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
PROMPTS = [f"a {colour} {shape} on a {'white' if i % 2 else 'black'} background" for i, (colour, shape) in
           enumerate((c, s) for c in COLOURS for s in SHAPES)]  # fmt: skip
SETTINGS = ("--steps", "6", "--seed", "100")


@pytest.fixture(scope="module")
def folder(tiny_pipeline_folder: Path) -> Path:
    return tiny_pipeline_folder


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 16 prompts, a line each, with an empty line that does not count."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join([*PROMPTS[:3], "", *PROMPTS[3:]]) + "\n")
    return path


@pytest.fixture(scope="module")
def sixteen(folder: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 16 pictures, drawn by one process in batches of 4."""
    out = tmp_path_factory.mktemp("sixteen")
    assert main(command(folder, out, "--prompts", str(prompts), *SETTINGS, "--batch-size", "4")) == 0
    return out


def command(folder: Path, out: Path, *words: str) -> list[str]:
    return ["--model", str(folder), "--out", str(out), *words]


def drawn(out: Path) -> list[Path]:
    return sorted(path for path in out.glob("[0-9]*.png") if not path.stem.endswith("_masks"))


def pictures(out: Path) -> list[Image.Image]:
    return [Image.open(path) for path in drawn(out)]


def times(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in drawn(out)}


def only(out: Path, pattern: str = "0*[0-9a-f].png") -> Path:
    (path,) = out.glob(pattern)
    return path


def about(path: Path) -> dict[str, Any]:
    """What a picture says of itself."""
    with Image.open(path) as image:
        return json.loads(image.text["focusdit"])  # type: ignore[attr-defined]


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str]):
    """The line on stderr with which the command ends in exit code 1."""

    def run(words: list[str]) -> str:
        capsys.readouterr()
        assert main(words) == 1
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line and "Loading pipeline components" not in line]
        assert line.startswith("sample: ")
        return line.removeprefix("sample: ")

    return run


# ---- the same pictures ----


def test_a_picture_is_that_of_its_prompt_and_seed(sixteen, tiny_pipeline):
    assert len(drawn(sixteen)) == 16
    for number in (0, 9):
        generator = [torch.Generator().manual_seed(100 + number)]
        alone = tiny_pipeline(PROMPTS[number], generator=generator, num_inference_steps=6).images
        assert same_pictures(alone, pictures(sixteen)[number : number + 1])


@pytest.mark.parametrize("batch", [1, 16])
def test_in_any_batch(folder, prompts, sixteen, tmp_path, batch):
    assert main(command(folder, tmp_path, "--prompts", str(prompts), *SETTINGS, "--batch-size", str(batch))) == 0
    assert [path.name for path in drawn(tmp_path)] == [path.name for path in drawn(sixteen)]
    assert same_pictures(pictures(tmp_path), pictures(sixteen))


@pytest.mark.parametrize(
    "names", [("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS")]
)
def test_by_two_processes(names, folder, prompts, sixteen, tmp_path):
    """Of torchrun, or of srun."""
    words = command(folder, tmp_path, "--prompts", str(prompts), *SETTINGS, "--batch-size", "3")
    logs = [tmp_path / f"log_{rank}" for rank in range(2)]
    launched = [dict(zip(names, (str(rank), str(rank), "2"), strict=True)) for rank in range(2)]
    processes = [fork(log, main, words, **env) for log, env in zip(logs, launched, strict=True)]
    codes, said = ended(processes), [log.read_text() for log in logs]
    assert codes == [0, 0], said
    assert all("8 of 8 pictures" in lines for lines in said), "each drew its half"
    assert "16 pictures in" in "".join(said), "the last one summed up"
    assert same_pictures(pictures(tmp_path), pictures(sixteen))
    assert (tmp_path / "prompts.jsonl").read_text() == (sixteen / "prompts.jsonl").read_text()
    assert (tmp_path / "index.html").exists() and (tmp_path / "grid.png").exists()


def test_after_a_kill_in_the_middle(folder, prompts, sixteen, tmp_path):
    words = command(folder, tmp_path, "--prompts", str(prompts), *SETTINGS, "--batch-size")
    log = tmp_path / "log"
    assert ended([fork(log, die_in_sampling, 4, [*words, "1"])]) == [-signal.SIGKILL], log.read_text()
    kept = times(tmp_path)
    assert len(kept) == 3
    assert not (tmp_path / "index.html").exists()

    assert main([*words, "4"]) == 0
    assert kept.items() <= times(tmp_path).items(), "pictures that were there were not drawn again"
    assert same_pictures(pictures(tmp_path), pictures(sixteen))
    assert len((tmp_path / "prompts.jsonl").read_text().splitlines()) == 16


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_cut_off_picture_is_drawn_again(folder, prompts, sixteen, tmp_path, keep):
    shutil.copytree(sixteen, tmp_path / "out")
    cut, gone = drawn(tmp_path / "out")[5], drawn(tmp_path / "out")[11]
    cut.write_bytes(cut.read_bytes()[: int(keep * cut.stat().st_size)])
    gone.unlink()
    before = times(tmp_path / "out")
    assert main(command(folder, tmp_path / "out", "--prompts", str(prompts), *SETTINGS)) == 0
    after = times(tmp_path / "out")
    assert {name for name in after if after[name] != before.get(name)} == {cut.name, gone.name}
    assert same_pictures(pictures(tmp_path / "out"), pictures(sixteen))


def test_started_again_it_draws_nothing(folder, prompts, sixteen):
    before = times(sixteen)
    assert main(command(folder, sixteen, "--prompts", str(prompts), *SETTINGS)) == 0
    assert times(sixteen) == before


# ---- what is written ----


def test_a_picture_tells_what_it_follows_from(sixteen, folder):
    lines = [json.loads(line) for line in (sixteen / "prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert [line["seed"] for line in lines] == list(range(100, 116))
    for line, path in zip(lines, drawn(sixteen), strict=True):
        assert line == {"file": path.name, **about(path), "model": str(folder)}
    settings = lines[0]["settings"]
    assert len(settings.pop("weights_fingerprint")) == 16
    assert settings == {
        "data_fingerprint": "",
        "height": 64,
        "width": 64,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "shift": 3.0,
        "steps": 6,
        "guidance": 3.0,
        "guidance_interval": [0.0, 1.0],
        "negative_prompt": None,
        "skip_threshold": None,
        "skip_unit": None,
        "mediators": None,
        "mediator_rho": None,
    }


def test_the_page_and_the_contact_sheet_hold_all(sixteen):
    opened = Opened((sixteen / "index.html").read_text(encoding="utf-8"))
    assert opened.tags.count("img") == len(opened.sources) == 16
    assert all(source.startswith("data:image/png;base64,") for source in opened.sources)
    assert set(PROMPTS) <= set(opened.words)
    assert not {"script", "link", "iframe"} & set(opened.tags)
    assert Image.open(sixteen / "grid.png").width == 4 * (256 + 8) + 8


HOSTILE = [
    "../../x",
    "/etc/passwd",
    "a very long prompt " * 500,
    "🔴 rouge, 红色的圆",
    "she said \"no\" & 'yes' $(touch x) `x`",
    "<script>alert(1)</script><img src=http://evil.example/x.png>",
    "-rf *",
    "",
]


def test_hostile_prompts_give_safe_names_and_stay_what_they_are(folder, tmp_path):
    out = tmp_path / "inside" / "out"
    words = [f"--prompt={prompt}" for prompt in HOSTILE]
    assert main(command(folder, out, *words, "--steps", "1", "--height", "32", "--width", "32")) == 0
    assert all(re.fullmatch(r"0{5}\d_[0-9a-f]{8}\.png", path.name) for path in drawn(out))
    assert {p.name for p in tmp_path.rglob("*") if p.is_file()} == {
        *(path.name for path in drawn(out)), "prompts.jsonl", "grid.png", "index.html"
    }  # fmt: skip
    assert [about(path)["prompt"] for path in drawn(out)] == HOSTILE
    assert [json.loads(line)["prompt"] for line in (out / "prompts.jsonl").read_text().splitlines()] == HOSTILE
    opened = Opened((out / "index.html").read_text(encoding="utf-8"))
    assert opened.tags.count("img") == len(HOSTILE)
    assert all(source.startswith("data:image/png;base64,") for source in opened.sources)
    assert "script" not in opened.tags
    assert [value for name, value in opened.attributes if name == "alt"] == HOSTILE


def test_masks_are_kept_where_they_are_asked_for(folder, tmp_path):
    words = command(folder, tmp_path, "--prompt", "a red circle", "--height", "96", "--width", "64", "--steps", "2")
    assert main(words) == 0
    without = levels(pictures(tmp_path))
    assert not list(tmp_path.glob("*_masks.png"))
    assert main([*words, "--save-masks"]) == 0
    assert (levels(pictures(tmp_path)) == without).all()
    masks = Image.open(only(tmp_path, "*_masks.png"))
    assert masks.size == (70 + 2 * (43 + 3), 22 + 2 * (64 + 3)), "two steps across, two blocks down, tiles of 2:3"
    assert len(Opened((tmp_path / "index.html").read_text()).sources) == 2
    before = times(tmp_path)
    assert main([*words, "--save-masks"]) == 0
    assert times(tmp_path) == before


def test_masks_are_those_of_their_picture(folder, tmp_path):
    words = command(folder, tmp_path, "--prompt", "a red circle", "--steps", "1", "--overwrite")
    assert main([*words, "--save-masks"]) == 0
    first = only(tmp_path, "*_masks.png").read_bytes()
    assert main([*words, "--seed", "5"]) == 0
    assert main([*words, "--seed", "5", "--save-masks"]) == 0
    assert only(tmp_path, "*_masks.png").read_bytes() != first


def test_sampling_options_reach_the_pipeline(folder, tmp_path, tiny_pipeline):
    words = ["--guidance", "2", "--guidance-interval", "0.7", "1", "--negative-prompt", "a blue square", "--seed", "7"]
    words += ["--shift", "1.5", "--skip-threshold", "0.7", "--height", "32", "--width", "96", "--steps", "4"]
    assert main(command(folder, tmp_path, "--prompt", "a red circle", *words)) == 0
    pipeline = FocusDiTPipeline(**tiny_pipeline.components | {"scheduler": build_scheduler("flow", 1.5)})
    expected = pipeline(
        "a red circle",
        height=32,
        width=96,
        num_inference_steps=4,
        guidance_scale=2.0,
        guidance_interval=(0.7, 1.0),
        negative_prompt="a blue square",
        skip_threshold=0.7,
        generator=torch.Generator().manual_seed(7),
    )
    assert same_pictures(pictures(tmp_path), expected.images)
    settings = about(only(tmp_path))["settings"]
    assert (settings["shift"], settings["skip_unit"], settings["guidance_interval"]) == (1.5, "token", [0.7, 1.0])


@pytest.mark.parametrize("batch", [1, 3])
def test_by_the_sde(folder, tmp_path, tiny_pipeline, batch):
    words = [f"--prompt={prompt}" for prompt in PROMPTS[:3]] + ["--sampler", "sde", "--steps", "4", "--seed", "7"]
    assert main(command(folder, tmp_path, *words, "--batch-size", str(batch))) == 0
    parts = tiny_pipeline.components | {"scheduler": build_scheduler("flow", 3.0, "sde")}
    pipeline = FocusDiTPipeline(**parts, resolution=64, steps=4, guidance=3.0)
    expected = pipeline(PROMPTS[:3], generator=[torch.Generator().manual_seed(7 + i) for i in range(3)])
    assert same_pictures(pictures(tmp_path), expected.images)
    settings = about(drawn(tmp_path)[0])["settings"]
    assert (settings["scheduler"], settings["shift"]) == ("FlowMatchEulerMaruyamaScheduler", 3.0)


# ---- other settings ----


@pytest.fixture
def one(folder: Path, tmp_path: Path) -> list[str]:
    """A command whose picture is there already."""
    words = command(folder, tmp_path / "out", "--prompt", "a red circle", "--steps", "1")
    assert main(words) == 0
    return words


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["--steps", "2"], "(steps 1, now 2)"),
        (["--seed", "3"], "(seed 0, now 3)"),
        (["--guidance", "2.5"], "(guidance 3.0, now 2.5)"),
        (["--guidance-interval", "0.5", "1"], "(guidance_interval [0.0, 1.0], now [0.5, 1.0])"),
        (["--negative-prompt", "blue"], "(negative_prompt None, now 'blue')"),
        (["--shift", "2"], "(shift 3.0, now 2.0)"),
        (
            ["--sampler", "sde", "--steps", "2"],
            "(scheduler 'FlowMatchEulerDiscreteScheduler', now 'FlowMatchEulerMaruyamaScheduler'; steps 1, now 2)",
        ),
        (["--skip-threshold", "0.5"], "(skip_threshold None, now 0.5; skip_unit None, now 'token')"),
        (["--height", "32", "--width", "96"], "(height 64, now 32; width 64, now 96)"),
    ],
)
def test_pictures_of_other_settings_are_not_replaced(one, fails, changes, named):
    out = Path(one[3])
    path, before = only(out), only(out).read_bytes()
    said = fails([*one, *changes])
    assert said.startswith(f"{path} was drawn with other settings {named}: ")
    assert said.endswith("choose another --out, or replace it with --overwrite")
    assert path.read_bytes() == before
    assert main([*one, *changes, "--overwrite"]) == 0
    assert path.read_bytes() != before
    assert main([*one, *changes]) == 0


def test_pictures_of_other_weights_are_not_replaced(one, fails, folder, tmp_path):
    changed = FocusDiTPipeline.from_pretrained(folder)
    with torch.no_grad():
        changed.transformer.dit.final.proj.bias += 0.5
    changed.save_pretrained(tmp_path / "changed")
    said = fails(command(tmp_path / "changed", Path(one[3]), *one[4:]))
    assert re.search(r"\(weights_fingerprint '[0-9a-f]{16}', now '[0-9a-f]{16}'\)", said)


@pytest.mark.parametrize("kind", ["JPEG", "[1]", "3", '{"settings": null}'])
def test_a_picture_that_is_not_ours(one, kind):
    """It is replaced, or refused in one line."""
    path, info = only(Path(one[3])), PngInfo()
    info.add_itxt("focusdit", kind)
    picture = Image.open(path).convert("RGB")
    picture.save(path, format="JPEG" if kind == "JPEG" else "PNG", pnginfo=info)
    assert main(one) in (0, 1)


# ---- errors ----


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--height", "100"], "height: 100 px must be divisible by 32 .*; 96 is the nearest"),
        (["--width", "0"], "width: 0 px must be divisible by 32 .*; 32 is the nearest"),
        (["--steps", "0"], "must be at least 1"),
        (["--batch-size", "0"], "must be at least 1"),
        (["--guidance-interval", "0.9", "0.1"], "guidance interval"),
        (["--skip-threshold", "1.5"], r"must be in 0\.\.1"),
        (["--prompts", "/nowhere.txt"], "no prompts file /nowhere.txt"),
    ],
)
def test_a_users_mistakes_in_one_line(folder, tmp_path, fails, words, mend):
    assert re.search(mend, fails(command(folder, tmp_path / "out", "--prompt", "a red circle", *words)))
    assert not drawn(tmp_path / "out")


def test_a_folder_that_is_no_model(tmp_path, fails, folder):
    said = fails(command(Path("/nowhere/at/all"), tmp_path, "--prompt", "a"))
    assert said == "no export at /nowhere/at/all: make one with python -m pretrain.export"
    assert "has no model_index.json" in fails(command(tmp_path, tmp_path, "--prompt", "a"))
    shutil.copytree(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert fails(command(tmp_path / "cut", tmp_path, "--prompt", "a")).startswith(f"{weights} is no whole safetensors")


def test_a_missing_folder_as_the_readme_writes_it(tmp_path, fails, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "exports/stage2_512" in fails(command(Path("exports/stage2_512"), tmp_path, "--prompt", "a"))


def test_no_prompts_in_the_file(tmp_path, fails, folder):
    (tmp_path / "prompts.txt").write_text("\n  \n")
    said = fails(command(folder, tmp_path / "out", "--prompts", str(tmp_path / "prompts.txt")))
    assert said == f"{tmp_path / 'prompts.txt'} holds no prompts; write one a line"


def test_an_epsilon_model_has_no_shift_and_no_sde(folder, tmp_path, fails):
    pipeline = FocusDiTPipeline.from_pretrained(folder)
    pipeline.scheduler = build_scheduler("epsilon", 1.0)
    pipeline.save_pretrained(tmp_path / "epsilon")
    words = command(tmp_path / "epsilon", tmp_path / "out", "--prompt", "a red circle", "--steps", "2")
    assert "the epsilon objective, whose sampler has no shift" in fails([*words, "--shift", "2"])
    said = fails([*words, "--sampler", "sde"])
    assert said.startswith("--sampler sde: this model was trained with the epsilon objective")
    assert main(words) == 0
    settings = about(only(tmp_path / "out"))["settings"]
    assert (settings["scheduler"], settings["shift"]) == ("DPMSolverMultistepScheduler", None)


@pytest.mark.parametrize("words", [["--shift", "0"], ["--shift", "-1"], ["--guidance", "nan"]])
def test_numbers_without_a_meaning_are_refused(folder, tmp_path, fails, words):
    assert words[0].removeprefix("--") in fails(command(folder, tmp_path, "--prompt", "a", "--steps", "1", *words))


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there(folder, tmp_path, fails, device):
    assert device in fails(command(folder, tmp_path, "--prompt", "a", "--steps", "1", "--device", device))


@pytest.mark.parametrize("words", [[], ["--prompt", "a", "--run", "x"]])
def test_words_that_contradict_each_other(folder, tmp_path, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main(command(folder, tmp_path, *words))
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "how",
    [
        "blocks",
        pytest.param(
            "graphs", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
        ),
    ],
)
def test_compiled_it_draws_the_same(folder, tmp_path, how):
    """Captions of two lengths, with and without guidance's null half."""
    words = ["--prompt", "a red circle", "--prompt", "three large blue squares on white", "--steps", "3"]
    words += ["--guidance-interval", "0.6", "1"]
    for out, more in (("plain", []), ("compiled", ["--compile", how])):
        assert main(command(folder, tmp_path / out, *words, *more)) == 0
    assert same_pictures(pictures(tmp_path / "plain"), pictures(tmp_path / "compiled"))
