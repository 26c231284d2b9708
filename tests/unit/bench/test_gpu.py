"""First contact: each part with small shapes on the CPU, in this process; how they are run, and what stops them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from pretrain.bench.__main__ import main
from pretrain.bench.gpu import correctness, graphs
from pretrain.bench.gpu.command import SECONDS, TOGETHER, Runner, wait_for
from pretrain.bench.gpu.session import NotHere, Session, Settings, Shapes, Wrong, fits_in
from pretrain.bench.gpu.table import table
from pretrain.bench.gpu.worker import PARTS
from pretrain.compilation import GRAPHS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Settings("cpu", "focusdit_1b_shared2d", True, 1000.0, str(tmp_path / "record"), str(tmp_path)))


def figures(session: Session) -> dict[str, dict]:
    lines = Path(session.settings.record).read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


# ---- the parts ----


@pytest.mark.parametrize("part", [name for name in PARTS if name not in TOGETHER and name != "checkpoint"])
def test_a_part_runs(part: str, session: Session) -> None:
    """All its measurements are made, but those for which a CPU has no device; every number is one."""
    PARTS[part]().run(session)
    found = figures(session)
    assert {f["status"] for f in found.values()} <= {"done", "not run"}, found
    assert any(f["status"] == "done" for f in found.values())
    for name, figure in found.items():
        assert figure["reason"] or figure["numbers"], name
        numbers = [value for value in figure["numbers"].values() if isinstance(value, float)]
        assert all(map(math.isfinite, numbers)), name


@pytest.mark.parametrize("part", [*TOGETHER, "checkpoint"])
def test_a_part_of_several_processes_runs_alone(part: str, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines import free_port

    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    PARTS[part]().run(session)
    found = figures(session)
    assert {f["status"] for f in found.values()} == {"not run" if part == "network" else "done"}, found
    if part == "zero":
        assert found["one step against AdamW in fp64"]["numbers"]["applied"]
    if part == "checkpoint":
        (saved,) = found.values()
        assert saved["numbers"]["GB"] > 0 and not list(Path(session.settings.folder).rglob("step_*"))


def test_more_graphs_than_stated_are_wrong(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "dit", 0)
    session.measure("dit", graphs._count, "dit", session.shapes.dit, "eager")
    figure = figures(session)["dit"]
    assert figure["status"] == "wrong" and figure["reason"] == "1 graphs, at most 0 are stated"
    assert figure["numbers"]["graphs"] == 1


def test_wrong_gradients_are_noticed(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the device's pass is another one: its masks shut a tenth more."""
    prepare = correctness.prepare

    def spoilt(*given):
        model = prepare(*given)
        with torch.no_grad():
            model.block(1).query_mask.last.linear.bias.sub_(0.5)
        return model

    monkeypatch.setattr(correctness, "prepare", spoilt)
    session.measure("pass", correctness._pass, "eager")
    assert figures(session)["pass"]["status"] == "wrong"


def test_an_error_has_a_bound() -> None:
    assert fits_in(0.1, 0.2, {"steps": 3}) == {"steps": 3, "error": 0.1, "at most": 0.2}
    for error in (0.3, math.nan, math.inf):
        with pytest.raises(Wrong):
            fits_in(error, 0.2, {})


def test_the_full_shapes() -> None:
    shapes = Shapes.of("focusdit_1b_shared2d", small=False)
    assert shapes.micro == {256: 64, 512: 20} and shapes.compile_steps == 50
    for config in (shapes.focusdit, shapes.dit, shapes.flexdit, shapes.mediators):
        assert (config.width, config.depth) == (1536, 28) and not config.problems()


# ---- a measurement ----


def raising(error: Exception):
    def measurement(session: Session):
        raise error

    return measurement


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (NotHere("no such unit"), "not run", "no such unit"),
        (ModuleNotFoundError("No module named 'x'", name="x"), "not run", "x is missing"),
        (Wrong("too far", {"error": 2}), "wrong", "too far"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory", "CUDA out of memory. Tried"),
        (RuntimeError("CUDA error:\n  illegal"), "failed", "RuntimeError: CUDA error: illegal"),
    ],
)
def test_what_stops_a_measurement_is_recorded(session: Session, error, status, reason) -> None:
    assert session.measure("this", raising(error)) == status
    assert session.measure("next", lambda session: {"ms": 1.0}) == "done"
    found = figures(session)
    assert (found["this"]["status"], found["this"]["reason"]) == (status, reason)
    assert found["next"]["numbers"] == {"ms": 1.0}


def test_a_measurement_without_time_is_not_begun(session: Session) -> None:
    clock = iter([0.0, 95.0, 95.0, 50.0])
    short = Session(replace(session.settings, seconds=100.0), now=lambda: next(clock))
    assert short.measure("late", raising(AssertionError()), needs=10) == "not run"
    assert short.measure("early", lambda session: {"ms": 1}, needs=10) == "done"
    assert figures(short)["late"]["reason"] == "5 s are left, it needs 10"


# ---- the command ----


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: files and table."""
    words = ["--minutes", "5", "--device", "cpu", "--out", str(tmp_path), "--parts", "network", "environment"]
    assert main(["gpu", *words]) == 0
    said = capsys.readouterr().out
    assert said.startswith("A CPU with small shapes")
    assert "environment  done" in said and "network  not run: a CPU has no network of GPUs" in said
    assert (tmp_path / "table.txt").read_text() == said
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["small"] and list(found["parts"]) == ["environment", "network"]
    versions = next(f for f in found["parts"]["environment"]["figures"] if f["name"] == "versions")
    assert versions["numbers"]["all"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "log.txt", "table.txt"]


def test_a_part_that_failed_fails_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = {"status": "failed", "reason": "dit", "seconds": 1.0, "figures": []}
    monkeypatch.setattr(
        Runner, "run", lambda self, name, *given: wrong if name == "graphs" else {**wrong, "status": "done"}
    )
    words = ["gpu", "--device", "cpu", "--out", str(tmp_path), "--parts", "environment", "graphs"]
    assert main(words) == 1
    said = capsys.readouterr()
    assert "graphs  failed: dit" in said.out and f"failed: graphs; {tmp_path}/table.txt" in said.err


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert "--minutes: 0.0 must be above 0" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(["gpu", "--out", str(tmp_path), "--device", "cuda"]) == 1
        assert "torch finds no GPU here" in capsys.readouterr().err


def test_every_part_has_its_time_and_its_module() -> None:
    assert list(SECONDS) == list(PARTS)
    for name in PARTS:
        assert callable(import_module(f"pretrain.bench.gpu.{name}").run)


def started(source: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", source], text=True, start_new_session=True)


def test_a_part_that_hangs_is_ended() -> None:
    process = started("import time; time.sleep(1000)")
    assert wait_for([process], time.monotonic() + 0.2) == ("out of time", "")
    assert process.poll() is not None


def test_where_one_process_fails_the_others_are_ended() -> None:
    hanging, failing = started("import time; time.sleep(1000)"), started("raise SystemExit(3)")
    assert wait_for([hanging, failing], time.monotonic() + 300) == ("failed", "exit code 3: see log.txt")
    assert hanging.poll() is not None


def test_what_no_time_is_left_for_is_not_run(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w") as log:
        found = Runner("cpu", 0, "", tmp_path, log).run("ceilings", 1.0, None)
    assert (found["status"], found["reason"]) == ("not run", "no time was left")


def test_the_table() -> None:
    numbers = {"ms": 12.345, "images": 64, "of it": 12345.6, "all": {"not": "shown"}, "peak": None}
    kernel = {"kernel": "ampere_gemm", "ms": 1.5, "calls": 28}
    parts = {
        "training": {
            "status": "failed",
            "reason": "512 px",
            "seconds": 61.2,
            "figures": [
                {"name": "256 px", "status": "done", "reason": "", "numbers": numbers},
                {"name": "512 px", "status": "out of memory", "reason": "4 GiB", "numbers": {}},
            ],
        },
        "profile": {
            "status": "done",
            "reason": "",
            "seconds": 9,
            "figures": [{"name": "a", "status": "done", "reason": "", "numbers": {"top": [kernel]}}],
        },
    }
    lines = table({"small": False, "gpus": 2, "preset": "focusdit_1b", "parts": parts}).splitlines()
    assert lines[0] == "2 GPUs, focusdit_1b"
    assert lines[2] == "training  failed: 512 px  (61 s)"
    assert lines[3].split() == ["256", "px", "ms", "12.3", "images", "64", "of", "it", "12346"]
    assert lines[4].split() == ["512", "px", "OUT", "OF", "MEMORY:", "4", "GiB"]
    assert lines[-1].split() == ["1.50", "ms", "28", "×", "ampere_gemm"]


def test_imports_belong_to_the_minutes() -> None:
    source = "import time; time.sleep(1.5); from pretrain.bench.gpu.command import since_start; print(since_start())"
    said = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert 1.4 < float(said) <= 60
