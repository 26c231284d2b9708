"""Tars from and shards to an S3-compatible server on loopback, and a training that streams them from there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import boto3
import pytest
from moto.server import ThreadedMotoServer
from s3fs import S3FileSystem
from support import SMALL, contents, scalars

from data_prep import encode, verify

OPTIONS = ("--encoders", "tiny", "--decoders", "1")


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """An empty bucket `pictures`; the environment is that of a user of it."""
    S3FileSystem.clear_instance_cache()  # else one that knows the server of another test is taken
    server = ThreadedMotoServer("127.0.0.1", 0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket="pictures")
    yield client
    server.stop()


def objects(client, prefix: str) -> dict[str, bytes]:
    found = client.list_objects_v2(Bucket="pictures", Prefix=prefix).get("Contents", [])
    names = [about["Key"] for about in found]
    return {n.removeprefix(prefix): client.get_object(Bucket="pictures", Key=n)["Body"].read() for n in names}


def test_from_s3_to_s3_to_a_training(bucket, data_set: Path, shape_tars: Path, train, tmp_path: Path, capsys) -> None:
    for tar in shape_tars.glob("*.tar"):
        bucket.upload_file(str(tar), "pictures", f"tars/{tar.name}")
    work = tmp_path / "work"
    command = ("--input", "s3://pictures/tars", "--output", "s3://pictures/data", "--work", str(work), *OPTIONS)
    assert encode.main(list(command)) == 0
    # What is there is what a local folder would hold, but for the tars' addresses in the reports.
    stored, local = objects(bucket, "data/"), contents(data_set)
    assert stored.keys() == local.keys()
    for name, content in local.items():
        if not name.startswith(("report", "dataset.json")) or name.endswith(".png"):
            assert stored[name] == content, name
    assert not list(work.rglob("*.mds")), "shards are not kept twice"
    assert verify.main(["s3://pictures/data"]) == 0

    # Run again, nothing is made; with a part less, that part alone.
    assert encode.main(list(command)) == 0
    assert "2 of them already encoded" in capsys.readouterr().out
    (work / "reports" / "images" / "00001.json").unlink()
    assert encode.main(list(command)) == 0
    assert "1 of them already encoded" in capsys.readouterr().out
    assert objects(bucket, "data/") == stored

    words = [*SMALL, "steps=6", "data.workers=1"]
    there = ("data.path=s3://pictures/data", f"data.cache={tmp_path / 'cache'}")
    train("demo_256", *words, *there, f"run_dir={tmp_path / 'run'}", processes=2)
    train("demo_256", *words, f"data.path={data_set}", f"run_dir={tmp_path / 'local'}", processes=2)
    streamed = scalars(tmp_path / "run", "train/loss")
    assert list(streamed) == [1, 2, 3, 4, 5, 6]
    assert scalars(tmp_path / "local", "train/loss") == streamed


def test_a_bucket_that_is_not_there(bucket, shape_tars: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore waits, too
    options = ("--work", str(tmp_path / "work"), *OPTIONS, "--resolutions", "64")
    assert encode.main(["--input", "s3://absent/tars/*.tar", "--output", "s3://pictures/data", *options]) == 1
    assert "s3://absent/tars/*.tar" in capsys.readouterr().err
    assert encode.main(["--input", str(shape_tars), "--output", "s3://absent/data", *options]) == 1
    error = capsys.readouterr().err
    assert "s3://absent/data" in error and "check the address, the credentials and the network" in error
    assert len(error.splitlines()) == 1
