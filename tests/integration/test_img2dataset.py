"""What img2dataset itself fetched, fed to encode.py as it is: from its folder, and from web servers of every kind."""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.cbook import get_sample_data
from PIL import ExifTags, Image
from streaming import StreamingDataset
from support import ROOT, contents, free_port

from data_prep import schema
from data_prep.common import storage
from data_prep.encode import main
from data_prep.inputs.finder import find_inputs

# It wants another webdataset than this project: so it has an environment of its own.
BIN = ROOT / ".venv" / "img2dataset" / "bin"
# Nobody is asked for a newer version or told of a run; bytecode is kept, as its many processes import for seconds.
QUIET = {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled", "WANDB_ERROR_REPORTING": "false", "NO_PROXY": "*"}
ENVIRONMENT = {**os.environ, **QUIET, "PYTHONDONTWRITEBYTECODE": ""}
OPTIONS = ["--encoders", "tiny", "--resolutions", "64", "256", "--decoders", "1"]
PER_TAR, LARGEST = 10, 384
BLOCK = 16 << 10  # bytes asked of a web server at once: a tar takes many requests
PIECE = 7001  # bytes that it sends at once
# As users call it: LAION's own call; everything encoded again; everything as it was sent.
RUNS = {
    "smaller": [
        "--resize_mode=keep_ratio",
        f"--image_size={LARGEST}",
        "--resize_only_if_bigger=True",
        "--skip_reencode=True",
    ],
    "no": ["--resize_mode=no", "--encode_format=webp"],
    "as_sent": ["--disable_all_reencoding=True"],
}
FORMATS = {"smaller": "parquet", "no": "jsonl", "as_sent": "json"}  # of the list of URLs


# ---- a web server


class Server(ThreadingHTTPServer):
    """Serves `files`, in the manner of one kind of server; breaks off in the middle of a file as often as `breaks` says.

    ranges: as nginx, Apache and object storage. starts only: passes over which bytes it is asked for, as http.server. refuses
    ranges: says so. no length: makes the file while it sends it. ends by closing: so a break looks like an end. falls silent:
    keeps a broken connection open.
    """

    daemon_threads = True

    def __init__(self, manner: str = "ranges"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manner = manner
        self.files: dict[str, bytes] = {}
        self.headers: dict[str, dict[str, str]] = {}
        self.breaks: Counter[str] = Counter()
        self.over = threading.Event()
        self.status: dict[str, int] = {}
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        server, body = self.server, self.server.files.get(self.path)
        more = server.headers.get(self.path, {})
        status = 302 if "Location" in more else server.status.get(self.path, 404 if body is None else 200)
        if server.manner == "no length" and self.command == "HEAD":
            status = 405
        body = body if body is not None and status == 200 else b"<html>nothing to see</html>"
        start, stop = 0, len(body)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and status == 200 and server.manner not in ("starts only", "refuses ranges", "no length"):
            status, start, stop = 206, int(wanted[1]), min(stop, int(wanted[2]) + 1)
            more = {**more, "Content-Range": f"bytes {start}-{stop - 1}/{len(body)}"}
        if server.manner == "refuses ranges":
            more = {**more, "Accept-Ranges": "none"}
        chunked, closes = server.manner == "no length", server.manner == "ends by closing" and self.command == "GET"
        length = ("Connection", "close") if closes else ("Content-Length", str(stop - start))
        self.send_response(status)
        for name, value in more.items():
            self.send_header(name, value)
        self.send_header(*("Transfer-Encoding", "chunked") if chunked else length)
        self.end_headers()
        if self.command == "HEAD":
            return
        whole = not (server.breaks[self.path] and start <= len(body) // 2 < stop)
        if not whole:
            server.breaks[self.path] -= 1
            stop, self.close_connection = len(body) // 2, True
        data = body[start:stop]
        if chunked:
            data = b"%x\r\n%s\r\n" % (len(data), data) + (b"0\r\n\r\n" if whole else b"")
        for place in range(0, len(data), PIECE):
            self.wfile.write(data[place : place + PIECE])
            time.sleep(0.001)
        if not whole and server.manner == "falls silent":
            server.over.wait(60)

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None: ...


@pytest.fixture(scope="module")
def serve() -> Iterator[Callable[..., Server]]:
    """Starts a server of the given manner."""
    servers = []

    def start(manner: str = "ranges") -> Server:
        servers.append(Server(manner))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.over.set()
        server.shutdown()
        server.server_close()


# ---- what is fetched

PHOTOGRAPH, GIFT, LOGO = (
    Image.open(get_sample_data(name, asfileobj=False))
    for name in ("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png", "logo2.png")
)
QUARTER_TURN = Image.Exif()
QUARTER_TURN[ExifTags.Base.Orientation] = 6

CAPTIONS = [
    "",
    " \n\t",
    None,
    "Fotografía – 一枚の写真 · фото 🖼️ e\u0301",
    "two\nlines, \"quoted\", 'so' and {so}; a \\n, a tab\tand a trailing space ",
    "NaN",
]


@dataclass(frozen=True)
class Picture:
    """What a URL sends, and what has to become of it in each run: "" where img2dataset fails, written, or a reason."""

    name: str
    body: bytes | None
    size: tuple[int, int] = (0, 0)  # as the file lies
    turned: bool = False  # by EXIF
    fates: tuple[str, str, str] = ("written", "written", "written")
    kept: bool = False  # a JPEG that img2dataset takes for one, so that --skip_reencode leaves it

    def size_in(self, run: str) -> tuple[int, int]:
        """Width and height of the picture that encode.py has to find."""
        short, upright = min(self.size), self.size[::-1] if self.turned else self.size
        if run == "as_sent" or (run == "smaller" and self.kept and short <= LARGEST):
            return upright
        scale = LARGEST / short if run == "smaller" and short > LARGEST else 1.0  # img2dataset loses the turn
        return round(self.size[0] * scale), round(self.size[1] * scale)


@dataclass(frozen=True)
class Row:
    """A line of the list of URLs."""

    picture: Picture
    caption: str | None
    recaption: str | None
    aesthetic: float | None
    pwatermark: float | None


def sent(image: Image.Image, format_: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def pictures() -> Iterator[Picture]:
    """Photographs and drawings in many sizes and formats, and what else a URL may send. No two have one size."""
    small, failed = ("too_small",) * 3, ("", "", "")
    only_as_sent = ("", "", "broken_image")
    widths = itertools.count(300, 3)

    def photo(mode: str = "RGB") -> Image.Image:
        n = next(widths)
        return PHOTOGRAPH.resize((n, 210), box=(n % 17, n % 23, 480, 560)).convert(mode)

    for number, size in enumerate(
        [(512, 600), (640, 481), (417, 900), (1201, 800), (700, 1400), (384, 383), (333, 257), (90, 70)]
    ):
        body = sent(PHOTOGRAPH.resize(size), quality=80 + number, progressive=number % 2 == 1)
        yield Picture(f"{number}.jpg", body, size, kept=True)
    for number, size in enumerate([(63, 200), (200, 63), (40, 30), (1, 1)]):
        yield Picture(f"small{number}.jpg", sent(PHOTOGRAPH.resize(size)), size, fates=small, kept=True)
    for name, image, format_, options in [
        ("grey.jpg", photo("L"), "JPEG", {}),
        ("turned.jpg", photo(), "JPEG", {"exif": QUARTER_TURN}),
        ("turned_large.jpg", photo().resize((900, 601)), "JPEG", {"exif": QUARTER_TURN}),
        ("turned.webp", photo(), "WEBP", {"exif": QUARTER_TURN}),
        ("ink.jpg", photo("CMYK"), "JPEG", {}),
        ("ink_large.jpg", photo("CMYK").resize((902, 602)), "JPEG", {}),
        ("gift.png", GIFT, "PNG", {}),
        ("logo.png", LOGO, "PNG", {}),
        ("grey_and_alpha.png", GIFT.convert("LA").resize((303, 211)), "PNG", {}),
        ("palette.png", photo().quantize(64), "PNG", {}),
        ("two_colours.png", photo("1"), "PNG", {}),
        ("grey16.png", Image.fromarray(np.asarray(photo("L")).astype(np.uint16) * 257), "PNG", {}),
        ("photo.webp", photo(), "WEBP", {"quality": 70}),
        ("gift.webp", GIFT.resize((305, 212)), "WEBP", {"lossless": True}),
        ("no_extension", photo(), "PNG", {}),
        ("query.jpg?width=300&height=%20", photo(), "JPEG", {}),
    ]:
        kept = format_ == "JPEG" and image.mode != "CMYK"
        yield Picture(name, sent(image, format_, **options), image.size, "exif" in options, kept=kept)
    for name, format_, reason in [
        ("film.webp", "WEBP", "animated"),
        ("film.gif", "GIF", "unsupported_format"),
        ("bitmap.jpg", "BMP", "unsupported_format"),
    ]:
        image = photo()
        film = {} if format_ == "BMP" else {"save_all": True, "append_images": [image.rotate(9)]}
        yield Picture(name, sent(image, format_, **film), image.size, fates=("written", "written", reason))
    for name, format_, part in [("cut.jpg", "JPEG", 0.5), ("cut.png", "PNG", 0.7), ("cut.webp", "WEBP", 0.9)]:
        body = sent(photo(), format_)
        yield Picture(name, body[: int(len(body) * part)], fates=only_as_sent)
    yield Picture("page.jpg", b"<!doctype html><title>gone</title>", fates=("", "", "unsupported_format"))
    yield Picture("empty.jpg", b"", fates=only_as_sent)
    yield Picture("missing.jpg", None, fates=failed)
    yield Picture("breaks_off.jpg", sent(photo()), fates=failed)
    yield Picture("not_for_ai.jpg", sent(photo()), fates=failed)
    moved = photo()
    yield Picture("moved.jpg", sent(moved), moved.size, kept=True)


@cache
def rows() -> list[Row]:
    """The list, in which every odd caption meets a picture that is written in all runs."""
    found, odd, order = [], iter(CAPTIONS), list(pictures())
    random.Random(3).shuffle(order)
    for n, picture in enumerate(order):
        caption: str | None = f"Picture {n}, called {picture.name}"
        if n % 3 == 0 and set(picture.fates) == {"written"}:
            caption = next(odd, caption)
        recaption = (None, "", f"Rear Admiral Hopper, {n} times")[min(n % 9, 2)]
        watermark = None if n % 7 == 3 else (n * 7 % 10) / 10  # 0.5 among them
        found.append(Row(picture, caption, recaption, None if n % 8 == 3 else 4 + (n % 5) / 2, watermark))
    assert all(any(row.caption == caption for row in found) for caption in CAPTIONS)
    return found


@pytest.fixture(scope="module")
def fetched(serve: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """img2dataset's folder of each run."""
    if not (BIN / "img2dataset").is_file():
        pytest.fail(f"{BIN / 'img2dataset'} is missing: `make test` sets it up", pytrace=False)
    server = serve()
    for row in rows():
        if row.picture.body is not None:
            server.files[f"/{row.picture.name}"] = row.picture.body
    server.files["/elsewhere"] = server.files["/moved.jpg"]
    server.headers["/moved.jpg"] = {"Location": "/elsewhere"}
    server.headers["/page.jpg"] = {"Content-Type": "text/html"}
    server.headers["/not_for_ai.jpg"] = {"X-Robots-Tag": "noai"}
    server.breaks["/breaks_off.jpg"] = 1 << 30
    table = [
        {
            "link": f"{server.url}/{row.picture.name}",
            "text": row.caption,
            "recaption": row.recaption,
            "aesthetic": row.aesthetic,
            "pwatermark": row.pwatermark,
        }
        for row in rows()
    ]
    folder = tmp_path_factory.mktemp("img2dataset")
    (folder / "list.json").write_text(json.dumps(table))
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in table))
    code = "import pandas; pandas.read_json('list.jsonl', lines=True).to_parquet('list.parquet')"
    subprocess.run([BIN / "python", "-c", code], cwd=folder, check=True)
    columns = [
        "--url_col=link",
        "--caption_col=text",
        '--save_additional_columns=["recaption","aesthetic","pwatermark"]',
    ]
    pace = ["--processes_count=1", "--thread_count=4", f"--number_sample_per_shard={PER_TAR}", "--timeout=30"]
    started = {}
    for run, options in RUNS.items():
        list_ = [f"--url_list={folder}/list.{FORMATS[run]}", f"--input_format={FORMATS[run]}"]
        command = [
            BIN / "img2dataset",
            *list_,
            "--output_format=webdataset",
            f"--output_folder={folder}/{run}",
            *options,
        ]
        with (folder / f"{run}.txt").open("w") as log:
            started[run] = subprocess.Popen([*command, *columns, *pace], env=ENVIRONMENT, stdout=log, stderr=log)
    try:
        for run, process in started.items():
            assert process.wait(200) == 0, (folder / f"{run}.txt").read_text()
    finally:
        for process in started.values():
            process.kill()
    return {run: folder / run for run in RUNS}


# ---- what is made of it


def caption_of(row: Row, run: str) -> str | None:
    """As it is stored, without white space at its ends; of no caption img2dataset makes an empty one."""
    if run != "as_sent":
        return (row.caption or "").strip()
    return None if row.recaption is None else row.recaption.strip()


def reason_of(row: Row, run: str) -> str:
    """What has to become of a line's sample; "" where there is none."""
    fate, caption = row.picture.fates[list(RUNS).index(run)], caption_of(row, run)
    if not fate:
        return ""
    if caption is None:
        return "no_caption"
    return fate if caption.strip() else "empty_caption"


def rejects(root: Path) -> dict[str, str]:
    """The reasons of the dropped samples by their keys."""
    lines = [json.loads(line) for p in (root / schema.REPORTS).rglob("*.jsonl") for line in p.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines)
    return {line["key"]: line["reason"] for line in lines}


def written(root: Path) -> dict[str, tuple[str, str, tuple[int, int]]]:
    """Set, caption and size of the stored samples by their keys."""
    found = {}
    for name in schema.Card.load(root).sets:
        for sample in StreamingDataset(local=str(root / name), batch_size=1):
            source, part, key = sample["key"].split("/")
            assert source == "images" and part == f"{int(key) // PER_TAR:05}" and key not in found
            found[key] = Path(name).name, sample["caption"], (sample["width"], sample["height"])
    return found


@pytest.fixture(scope="module", autouse=True)
def one_thread_in_this_file() -> Iterator[None]:
    """As `one_thread`; a number of its own may change the last bits of a product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def encoded(fetched: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The data set of each run."""
    roots = {run: tmp_path_factory.mktemp("data") / run for run in RUNS}
    for run, folder in fetched.items():
        more = ["--captions", "recaption"] if run == "as_sent" else []
        assert main(["--input", str(folder), "--output", str(roots[run]), *OPTIONS, *more]) == 0
    return roots


@pytest.mark.parametrize("run", RUNS)
def test_every_fetched_picture_is_written_or_dropped_with_its_reason(
    fetched: dict[str, Path], encoded: dict[str, Path], run: str
) -> None:
    root, report = encoded[run], json.loads((encoded[run] / "report.json").read_text())
    statistics = {p.name[:5]: json.loads(p.read_text()) for p in fetched[run].glob("*_stats.json")}
    assert len(statistics) == len(report["parts"]) == math.ceil(len(rows()) / PER_TAR)
    for part in report["parts"]:
        name = part["part"].removeprefix("images/")
        assert part["expected"] == part["read"] == statistics[name]["successes"]
    assert "img2dataset wrote" not in (root / "report.txt").read_text()

    fates = {f"{n:06}": reason_of(row, run) for n, row in enumerate(rows()) if reason_of(row, run)}
    assert report["read"] == len(fates)
    assert rejects(root) == {key: fate for key, fate in fates.items() if fate != "written"}
    there = written(root)
    assert there.keys() == {key for key, fate in fates.items() if fate == "written"}
    for key, (set_, caption, size) in there.items():
        row = rows()[int(key)]
        assert caption == caption_of(row, run)
        assert size == row.picture.size_in(run), row.picture.name
        assert set_ == ("64-256" if min(size) >= 256 else "64")


def test_a_filter_drops_by_the_columns_that_img2dataset_kept(
    fetched: dict[str, Path], encoded: dict[str, Path], tmp_path: Path
) -> None:
    root = tmp_path / "data"
    options = [*OPTIONS, "--filter", "aesthetic >= 5 and watermark < 0.5"]
    assert main(["--input", str(fetched["smaller"]), "--output", str(root), *options]) == 0
    expected = {}
    for n, row in enumerate(rows()):
        reason = reason_of(row, "smaller")
        if reason and reason != "empty_caption":
            if row.aesthetic is None:
                reason = "no field aesthetic"
            elif row.aesthetic < 5:
                reason = "filtered by aesthetic >= 5"
            elif row.pwatermark is None:
                reason = "no field watermark"
            elif row.pwatermark >= 0.5:
                reason = "filtered by watermark < 0.5"
        if reason:
            expected[f"{n:06}"] = reason
    assert len(set(expected.values())) == 7
    assert rejects(root) == {key: reason for key, reason in expected.items() if reason != "written"}
    kept, all_ = written(root), written(encoded["smaller"])
    assert kept.keys() == {key for key, reason in expected.items() if reason == "written"}
    assert kept == {key: all_[key] for key in kept}


# ---- the same folder on web servers


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that would have been waited for web servers."""
    seconds: list[float] = []
    monkeypatch.setattr("tenacity.nap.time", SimpleNamespace(sleep=seconds.append))
    monkeypatch.setattr(storage, "_BLOCK_BYTES", BLOCK)
    return seconds


def publish(server: Server, folder: Path) -> str:
    """Has the server send the folder's tars; returns what they are called there, as a user writes it."""
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        server.files[f"/{tar.name}"] = tar.read_bytes()
        assert tar.stat().st_size > 8 * BLOCK, "too few pictures to break off in the middle"
    return f"{server.url}/{{00000..{len(tars) - 1:05}}}.tar"


def without_places(root: Path, *more: str) -> dict[str, bytes]:
    """All of a data set, but for where its tars were, their times, and img2dataset's statistics beside them."""
    files = contents(root)
    for name, content in files.items():
        if name.endswith((".json", ".jsonl")):
            content = re.sub(rb'("tar": ")[^"]*/', rb"\1", content)
            content = re.sub(rb'("tar_changed": ")[^"]*', rb"\1", content)  # of a web server it is not known
            for field in ("expected", *more):
                content = re.sub(rb'("%b": )\w+' % field.encode(), rb"\1?", content)
            files[name] = content
    return files


@pytest.mark.parametrize(
    ("manner", "breaks"),
    # As a part of an answer is enough to look at a tar, not every break is met.
    [("ranges", 4), ("starts only", 4), ("refuses ranges", 4), ("no length", 6), ("ends by closing", 4)],
)
def test_web_servers_give_the_same_bytes_though_they_break_off(
    fetched: dict[str, Path],
    encoded: dict[str, Path],
    serve: Callable[..., Server],
    waits: list[float],
    tmp_path: Path,
    manner: str,
    breaks: int,
) -> None:
    server = serve(manner)
    tars = publish(server, fetched["smaller"])
    server.breaks.update(dict.fromkeys(server.files, breaks))
    assert main(["--input", tars, "--output", str(tmp_path / "data"), *OPTIONS]) == 0
    assert not server.breaks.total() and len(waits) >= len(server.files)
    unknown = ("tar_bytes",) if manner == "no length" else ()
    assert without_places(tmp_path / "data", *unknown) == without_places(encoded["smaller"], *unknown)


def test_pythons_own_web_server_and_a_list_of_its_folder(
    fetched: dict[str, Path], encoded: dict[str, Path], waits: list[float], tmp_path: Path
) -> None:
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind=127.0.0.1", f"--directory={fetched['smaller']}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            url = re.findall(r"http://[\d.:]+", server.stdout.readline())[0]
            assert main(["--input", url, "--output", str(tmp_path / "data"), *OPTIONS]) == 0
        finally:
            server.kill()
    assert without_places(tmp_path / "data") == without_places(encoded["smaller"])


def test_a_tar_that_always_breaks_off_is_named_and_the_others_are_made(
    fetched: dict[str, Path],
    encoded: dict[str, Path],
    serve: Callable[..., Server],
    waits: list[float],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, root = serve(), tmp_path / "data"
    tars = publish(server, fetched["smaller"])
    server.breaks["/00001.tar"] = 1 << 30
    assert main(["--input", tars, "--output", str(root), *OPTIONS]) == 1
    error = capsys.readouterr().err
    assert "encode: 1 tar could not be read; run this again:\n" in error and "Traceback" not in error
    place = re.search(
        rf"^  .*{server.url}/00001.tar cannot be read at byte (\d+): ClientPayloadError", error, re.MULTILINE
    )
    assert place, error
    assert BLOCK < int(place[1]) <= len(server.files["/00001.tar"]) // 2
    assert waits == [1.0, 2.0, 4.0, 8.0]
    whole = without_places(encoded["smaller"])
    made = {name: content for name, content in without_places(root).items() if "/0000" in name}
    assert made == {name: content for name, content in whole.items() if "/0000" in name and "/00001" not in name}
    assert not schema.Card.load(root).complete

    server.breaks.clear()
    assert main(["--input", tars, "--output", str(root), *OPTIONS]) == 0
    assert without_places(root) == whole and len(waits) == 4


def test_a_server_that_falls_silent_is_asked_again(
    fetched: dict[str, Path], serve: Callable[..., Server], waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve("falls silent")
    publish(server, fetched["smaller"])
    server.breaks["/00000.tar"] = 2
    monkeypatch.setattr(storage, "_SILENCE", 0.5)
    storage.fsspec.filesystem("http").clear_instance_cache()  # it keeps its connections and their time limits
    try:
        with storage.open_file(f"{server.url}/00000.tar") as tar:
            pieces = list(iter(lambda: tar.read(10_000), b""))
    finally:
        storage.fsspec.filesystem("http").clear_instance_cache()
    assert b"".join(pieces) == server.files["/00000.tar"] and waits == [1.0, 2.0]


def test_a_server_that_is_down_or_busy_is_no_missing_tar(
    fetched: dict[str, Path], serve: Callable[..., Server], waits: list[float]
) -> None:
    server = serve()
    publish(server, fetched["smaller"])
    for status in (403, 429, 503):
        server.status["/00000.tar"] = status
        with pytest.raises(storage.Unreachable, match=rf"/00000.tar cannot be listed \(ClientResponseError: {status}"):
            find_inputs(f"{server.url}/0000{{0,1}}.tar")
    assert not waits
    with (
        pytest.raises(storage.Unreachable, match=r"/00000.tar cannot be read at byte 0: ClientResponseError: 503"),
        storage.open_file(f"{server.url}/00000.tar") as tar,
    ):
        tar.read(512)
    assert waits == [1.0, 2.0, 4.0, 8.0]
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_inputs(f"{server.url}/00009.tar")
    with pytest.raises(FileNotFoundError, match="no such file"), storage.open_file(f"{server.url}/00009.tar") as tar:
        tar.read(512)
    with pytest.raises(storage.Unreachable, match=r"cannot be listed \(ClientConnectorError: "):
        find_inputs(f"http://127.0.0.1:{free_port()}/00000.tar")
