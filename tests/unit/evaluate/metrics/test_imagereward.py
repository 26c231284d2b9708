"""imagereward: the contract of the scorer's process, with stand-ins that err, die, stall and babble, and the shipped script."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest
from support import ROOT

from pretrain.evaluate.__main__ import main
from pretrain.evaluate.metrics import imagereward

TIMEOUT = 60.0
STALL = "open('stalls', 'w').close(); __import__('time').sleep(600)"
SCORER = """
import json, sys, time
log = open("asked.txt", "a")
print(json.dumps({"scorer": {"library": "stand-in", "version": "1", "weights": "0"}}), flush=True)
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    name = asked["picture"].rpartition("/")[2]
    log.write(name + "\\n"); log.flush()
    if number == 2 and sys.argv[1:]:
        exec(sys.argv[1])
    print(json.dumps({"score": len(asked["prompt"]) / 10}), flush=True)
"""
# What ImageReward's loading and scoring look like from outside, its words on stdout too.
PACKAGE = """
from clip import tokenize
print("load")
class Model:
    def score(self, prompt, picture):
        print("scoring")
        return len(prompt)
def load(name, device, med_config):
    print("load checkpoint from", name)
    return Model()
"""

PILLOW = """
class open:
    def __init__(self, path):
        if path.endswith("3.png"):
            raise OSError("cut off")
    def __enter__(self):
        return self
    def __exit__(self, *error):
        pass
    def convert(self, mode):
        return self
"""


class Impatient(Queue[str]):
    """Waits for a line as long as it takes, but no longer once the scorer has said in a file that it stalls."""

    def get(self, block: bool = True, timeout: float | None = None) -> str:
        assert timeout == TIMEOUT
        while True:
            try:
                return super().get(timeout=0.05)
            except Empty:
                if Path("stalls").exists():
                    raise


@pytest.fixture
def scene(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("".join("x" * n + "\n" for n in (10, 20, 30, 40, 50)))
    Path("score.py").write_text(SCORER)
    monkeypatch.setattr(imagereward, "Queue", Impatient)
    return tmp_path


def evaluate(command: str | None) -> int:
    words = ["--pictures", "ours", "--prompts", "prompts.txt", "--metrics", "imagereward", "--out", "out"]
    words += ["--imagereward-command", command] if command else []
    return main([*words, "--device", "cpu", "--imagereward-timeout", str(TIMEOUT)])


def result() -> dict[str, Any]:
    return json.loads(Path("out/imagereward.json").read_text())


@pytest.mark.usefixtures("scene")
def test_scores_are_the_scorers() -> None:
    assert evaluate(f"{sys.executable} score.py") == 0
    found = result()
    assert found["values"]["imagereward"] == {"value": pytest.approx(3), "count": 5, "sem": pytest.approx(0.5**0.5)}
    assert found["scorer"]["library"] == "stand-in"
    assert evaluate(f"{sys.executable} score.py") == 0
    assert Path("asked.txt").read_text().split() == [f"{i}.png" for i in range(5)]


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        (
            "sys.exit('out of memory')",
            "ended with code 1 before it answered for 2.png: out of memory (out/imagereward.log)",
        ),
        (STALL, "no answer for 2.png within 60 s; see out/imagereward.log, or raise --imagereward-timeout"),
        ("print('lovely', flush=True)", "answered 'lovely' for 2.png, expected a JSON object"),
        ("print('[3]', flush=True)", "answered '[3]' for 2.png, expected a JSON object"),
        (
            'print(\'{"score": "high"}\', flush=True)',
            "answered {'score': 'high'} for 2.png, expected {\"score\": NUMBER}",
        ),
        ("print('{\"score\": NaN}', flush=True)", "answered {'score': nan} for 2.png, expected"),
        ("print('{\"score\": true}', flush=True)", "answered {'score': True} for 2.png, expected"),
        ('print(\'{"error": "no such file"}\', flush=True)', "2.png: the scorer says 'no such file'"),
    ],
)
@pytest.mark.usefixtures("scene")
def test_a_scorer_that_fails_is_one_line_and_its_records_are_kept(
    fault: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"{sys.executable} score.py"
    Path("fault.txt").write_text(fault)
    assert evaluate(f"{command} 'exec(open(\"fault.txt\").read())'") == 1
    (said,) = capsys.readouterr().err.splitlines()[-1:]
    assert said.startswith("evaluate: imagereward: ") and line in said
    assert not Path("out/imagereward.json").exists()
    Path("stalls").unlink(missing_ok=True)
    assert evaluate(command) == 0
    assert Path("asked.txt").read_text().split() == [f"{i}.png" for i in (0, 1, 2, 2, 3, 4)]
    assert result()["values"]["imagereward"]["value"] == pytest.approx(3)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (None, "no scorer; give --imagereward-command"),
        ("./gone score.py", "No such file or directory: './gone'"),
        (
            f"{sys.executable} -c 'import gone'",
            "ended with code 1 before it answered for its start: ModuleNotFoundError",
        ),
        (f"{sys.executable} -c 'print(5)'", "answered '5' for its start, expected a JSON object"),
        (f"{sys.executable} -c 'print(\"{{}}\")'", 'it begins with {}, expected {"scorer": {"library": …}}'),
        (f'{sys.executable} -c "{STALL}"', "no answer for its start within 60 s"),
        ("'", "No closing quotation"),
    ],
)
@pytest.mark.usefixtures("scene")
def test_a_scorer_that_does_not_start_is_not_run(command: str | None, reason: str) -> None:
    assert evaluate(command) == 0
    assert result()["status"] == "not run" and reason in result()["reason"]


def test_the_shipped_script_speaks_the_contract(
    scene: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without this project, with a package that prints, and that imports another `clip` than the one beside the script."""
    package, about = scene / "elsewhere", scene / "elsewhere/image_reward-1.5.dist-info"
    about.mkdir(parents=True)
    (package / "ImageReward.py").write_text(PACKAGE)
    (package / "clip.py").write_text("tokenize = None")
    (package / "torch.py").write_text("import contextlib\nno_grad = contextlib.nullcontext\n")
    (package / "PIL").mkdir()
    (package / "PIL/Image.py").write_text(PILLOW)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: image-reward\nVersion: 1.5\n")
    monkeypatch.setenv("PYTHONPATH", os.fspath(package))
    Path("ImageReward.pt").write_text("weights")
    # -S: no installed packages, and so neither this project nor its libraries.
    script = ROOT / "pretrain/evaluate/image_reward_server.py"
    command = f"{sys.executable} -S {script} --weights ImageReward.pt --device cpu --med-config"
    assert evaluate(f"{command} gone.json") == 0
    assert result()["reason"].endswith("no file gone.json")
    Path("med.json").write_text("{}")
    assert evaluate(f"{command} med.json") == 1
    assert "3.png: the scorer says 'OSError: cut off'" in capsys.readouterr().err
    (package / "PIL/Image.py").write_text(PILLOW.replace("3.png", "none"))
    assert evaluate(f"{command} med.json") == 0
    assert result()["values"]["imagereward"]["value"] == pytest.approx(30)
    assert result()["scorer"]["version"] == "1.5" and len(result()["scorer"]["weights"]) == 64
    assert "scoring" in Path("out/imagereward.log").read_text()
    (package / "clip.py").unlink()
    assert evaluate(f"{command} med.json") == 0
    assert "this environment lacks a package (No module named 'clip')" in result()["reason"]
