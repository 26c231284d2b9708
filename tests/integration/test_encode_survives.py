"""Encoding that is killed, starved of disk space and raced: the same bytes as if nothing had happened."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from streaming import StreamingDataset
from support import ROOT, contents, start_encoding

from data_prep import schema
from data_prep.shapes import write_tars
from data_prep.worker.parts import whole_parts

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # as `start_encoding`
OPTIONS = ["--encoders", "tiny", "--resolutions", "64", "--decoders", "1"]
TARS, PER_TAR = 40, 8


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tars")
    write_tars(folder, TARS * PER_TAR, seed=9, per_tar=PER_TAR)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tars: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    worker = start(tars, folder / "data", folder / "log")
    worker.join(300)
    assert worker.exitcode == 0, (folder / "log").read_text()
    return contents(folder / "data")


def start(tars: Path, root: Path, log: Path) -> BaseProcess:
    return start_encoding(log, "--input", str(tars), "--output", str(root), *OPTIONS)


def test_killed_again_and_again_with_ever_other_numbers_of_workers(
    tars: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    root, rng, kills = tmp_path / "data", random.Random(4), 0
    deadline = time.monotonic() + 300
    for number in itertools.cycle((3, 1, 2, 4)):
        workers = [start(tars, root, tmp_path / "log") for _ in range(number)]
        try:
            made = len(whole_parts(root))
            while any(worker.is_alive() for worker in workers):
                assert time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.02)
                if len(whole_parts(root)) > made:  # not while it starts: it would never come to anything
                    time.sleep(rng.uniform(0, 0.15))
                    made = len(whole_parts(root))
                    alive = [worker for worker in workers if worker.is_alive()]
                    if alive and made < TARS - 4:
                        rng.choice(alive).kill()
                        kills += 1
            assert {worker.exitcode for worker in workers} <= {0, -9}, (tmp_path / "log").read_text()
        finally:
            for worker in workers:
                worker.kill()
        if schema.Card.load(root).complete:
            break
    assert kills >= 5
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert contents(root) == uninterrupted
    assert not list((root / schema.WORK / "parts").glob("*/*"))  # no half-made part
    assert not list((root / schema.WORK / "claims").glob("*.claim"))

    card = schema.Card.load(root)
    keys = [row["key"] for name in card.sets for row in StreamingDataset(local=str(root / name), batch_size=1)]
    assert len(keys) == len(set(keys)) == TARS * PER_TAR
    report = json.loads((root / "report.json").read_text())
    assert report["read"] == report["written"] == TARS * PER_TAR


def test_what_is_left_of_a_worker_killed_after_its_last_part_is_removed(tmp_path: Path) -> None:
    tars, root = tmp_path / "tars", tmp_path / "data"
    write_tars(tars, PER_TAR, per_tar=PER_TAR)
    half_made = root / schema.WORK / "parts/images/00000/token/64"
    claim = root / schema.WORK / "claims/images%2F00000.claim"
    for planted in (False, True):
        if planted:  # killed between the report and the removal of its own folder
            half_made.mkdir(parents=True)
            claim.write_text("not yet known to be dead")
        worker = start(tars, root, tmp_path / "log")
        worker.join(120)
        assert worker.exitcode == 0, (tmp_path / "log").read_text()
        assert whole_parts(root) == ["images/00000"]
        assert not half_made.parents[1].exists()
        assert not claim.exists()


def test_a_full_disk_stops_it_and_room_lets_it_go_on(
    tars: Path, uninterrupted: dict[str, bytes], tmp_path: Path
) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        if os.environ.get("REQUIRE_SLURM") == "1":
            raise RuntimeError("REQUIRE_SLURM=1, but a file system of a given size needs root and unshare")
        pytest.skip("a file system of a given size needs root and unshare")
    needed = sum(len(content) for content in uninterrupted.values())
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    encode = f"{sys.executable} data_prep/encode.py --input {tars} --output {disk}/data {' '.join(OPTIONS)}"
    script = f"""
        mount -t tmpfs -o size={needed // 2 + (64 << 10)} tmpfs {disk}
        code=0; {encode} > {tmp_path}/first.txt 2>&1 || code=$?; echo $code > {tmp_path}/first.code
        cp -r {disk}/data {out}
        mount -o remount,size={4 * needed + (8 << 20)} {disk}
        code=0; {encode} > {tmp_path}/second.txt 2>&1 || code=$?; echo $code > {tmp_path}/second.code
        cp -r {disk}/data {out}.whole
    """
    subprocess.run(["unshare", "--mount", "bash", "-ec", script], cwd=ROOT, env=ENVIRONMENT, check=True, timeout=300)
    said = (tmp_path / "first.txt").read_text()
    assert (tmp_path / "first.code").read_text().strip() == "1", said
    (line,) = [line for line in said.splitlines() if line.startswith("encode: ")]
    assert "no space is left in" in line and "make room and run the same command again" in line
    assert "Traceback" not in said
    # What counts as made is whole.
    made = whole_parts(out)
    assert 0 < len(made) < TARS
    for name in made:
        for path in (
            p for p in uninterrupted if p.startswith((f"{schema.REPORTS}/{name}.json", name.replace("/", "/64/")))
        ):
            assert (out / path).read_bytes() == uninterrupted[path]
    assert not list((out / schema.WORK / "parts").glob("*/*"))
    assert (tmp_path / "second.code").read_text().strip() == "0", (tmp_path / "second.txt").read_text()
    assert f"{len(made)} of them already encoded" in (tmp_path / "second.txt").read_text()
    assert contents(Path(f"{out}.whole")) == uninterrupted
