"""Where a data set is read: refusals of what is missing or damaged, the cache, object storage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from data_sets import epoch_of, file_of, loader_of, write_set
from support import contents

from data_prep import schema
from pretrain.config import load
from pretrain.data.loader import Loader
from pretrain.data.location import DataLocation


def test_refusals(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 20})
    with pytest.raises(ValueError, match=r"data\.sources: .* has no b with samples"):
        loader_of(root, "data.sources={b: 1}")
    with pytest.raises(ValueError, match="resolution: the data set has 256 px, the config asks for 512 px"):
        loader_of(root, "data.resolution=512")
    shard = sorted((root / "a/256/00000").glob("*.mds"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(
        ValueError,
        match=rf"1 shard missing or cut, data\.damaged_shards .*\n  {shard}: {len(content) - 1} bytes, expected",
    ):
        loader_of(root, "data.damaged_shards=0")
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}: missing"):
        loader_of(root, "data.damaged_shards=0")
    index = root / "a/256/index.json"
    index.write_text(index.read_text().replace("00000/shard.00000", "../../elsewhere"))
    with pytest.raises(ValueError, match="names files outside of its folder"):
        loader_of(root)
    index.write_text(index.read_text()[:50])
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        loader_of(root)


def test_the_budget_at_the_start(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (0, 2):
        file_of(root, number).unlink()
    said = r"2 shards missing or cut, data\.damaged_shards allows 1; data_prep/verify\.py --repair makes them again:\n"
    with pytest.raises(ValueError, match=said):
        loader_of(root, "data.damaged_shards=1")
    assert not capsys.readouterr().out
    loader_of(root, "data.damaged_shards=2")
    notes = [line for line in capsys.readouterr().out.splitlines() if "shard" in line]
    assert [re.search(r"shard\.\d+\.mds: missing, expected \d+ bytes", line) is not None for line in notes] == [
        True,
        True,
    ]


# ---- the cache ----


def keys_and_text(loader: Loader) -> list[tuple[tuple[str, ...], float]]:
    return [(batch.keys, batch.text.tokens_ME.double().sum().item()) for batch in epoch_of(loader)]


def test_compressed_shards_are_unpacked_in_the_cache(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", {"a": 30, "b": 14}, compression="zstd")
    plain = write_set(tmp_path / "plain", {"a": 30, "b": 14})
    expected, before = keys_and_text(loader_of(plain)), contents(root)
    with pytest.raises(ValueError, match=r"data\.cache: the shards of .* are compressed; give a folder"):
        loader_of(root)
    assert contents(root) == before
    words = (f"data.cache={tmp_path}/cache",)
    loader = loader_of(root, *words, "data.workers=2")
    assert keys_and_text(loader) == expected
    assert contents(root) == before, "the data set is read, never written"
    (kept,) = (tmp_path / "cache").iterdir()
    assert loader.root == kept and kept.name.startswith("set-")
    assert schema.Card.load(kept) == schema.Card.load(root)
    fetched = sorted(kept.rglob("*.mds"))
    assert len(fetched) >= 4 and not list(kept.rglob("*.zstd")) and not list(kept.rglob(".tmp*"))

    # What was fetched is used again; what was cut off, or is of an older data set in the same place, is not.
    times = {shard: shard.stat().st_mtime_ns for shard in fetched}
    fetched[0].write_bytes(fetched[0].read_bytes()[:-9])
    del loader
    assert keys_and_text(loader_of(root, *words)) == expected
    assert {shard for shard in fetched if shard.stat().st_mtime_ns != times[shard]} == {fetched[0]}
    shutil.rmtree(root)
    write_set(root, {"a": 30, "b": 14}, compression="zstd", seed=1)
    others = keys_and_text(loader_of(root, *words))
    a = [(key, total) for key, total in others if all(k.startswith("a/") for k in key)]
    assert not {total for _, total in others} & {total for _, total in expected}, a


def test_a_cache_for_plain_shards_and_its_limit(tmp_path: Path) -> None:
    """Shards are copied; those beyond the limit go again, and the data set keeps its own."""
    root = write_set(tmp_path / "set", {"a": 152})
    before = contents(root)
    expected = keys_and_text(loader_of(root))
    limit = 1.2
    loader = loader_of(root, f"data.cache={tmp_path}/cache", f"data.cache_limit={limit}mb", "data.shuffle_block=20")
    assert sum(p.stat().st_size for p in root.rglob("*.mds")) > 2 * limit * 2**20
    assert sorted(k for keys, _ in keys_and_text(loader) for k in keys) == sorted(
        k for keys, _ in expected for k in keys
    )
    # streaming makes room for one shard in each of three threads, which fetch ahead, fetch what is gone again, and read.
    most = limit * 2**20 + 2 * max(p.stat().st_size for p in root.rglob("*.mds"))
    assert 0 < sum(p.stat().st_size for p in loader.root.rglob("*.mds")) <= most
    assert contents(root) == before
    shard = next(root.rglob("*.mds"))
    shard.unlink()
    with pytest.raises(ValueError, match=f"{shard}: missing"):
        loader_of(root, f"data.cache={tmp_path}/cache", "data.damaged_shards=0")


def test_a_cache_has_one_training(root: Path, tmp_path: Path) -> None:
    """Another process has it; once that is killed, it is free."""
    words = f"data.cache={tmp_path}/cache"
    kept = loader_of(root, words).root
    hold = f"import fcntl, sys; f = open({str(kept / 'in-use')!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ValueError, match=rf"data\.cache: {kept} is in use by another training on this node"):
            loader_of(root, words)
        other.kill()
    assert len(epoch_of(loader_of(root, words))) == 10


def test_a_place_on_object_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    monkeypatch.setenv("S3_ENDPOINT_URL", "http://here")
    place = DataLocation.of(load("demo_256", ["data.path=s3://bucket/sets/one/", "data.cache=/cache"])[0].data)
    assert place.origin == "s3://bucket/sets/one" and place.cached
    assert place.root.parent == Path("/cache") and place.root.name.startswith("one-")
    assert os.environ["AWS_ENDPOINT_URL"] == "http://here"
    other = DataLocation.of(load("demo_256", ["data.path=s3://bucket/more/one", "data.cache=/cache"])[0].data)
    assert other.root != place.root


def test_a_folder_without_a_cache() -> None:
    """It is read where it is; nothing is locked."""
    location = DataLocation.of(load("demo_256", ["data.path=sets/one"])[0].data)
    assert location.root == Path("sets/one") and location.origin == str(Path("sets/one").resolve())
    assert not location.cached and location.lock_cache() is None


def test_a_file_that_is_not_at_the_origin(tmp_path: Path) -> None:
    location = DataLocation.of(load("demo_256", [f"data.path={tmp_path}/none", f"data.cache={tmp_path}/cache"])[0].data)
    location.root.mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=f"{tmp_path}/none is no data set: dataset.json is missing; make one with"
    ):
        location.fetch("dataset.json")
    assert not list(location.root.iterdir())
