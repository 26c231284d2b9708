"""Two thousand damaged inputs through the encode command: each is counted once, costs itself alone, and harms nothing.

1,800 damaged samples lie between healthy ones in 60 tars; 200 more tars are damaged themselves. What must become of each is
known from how it was made: every kind says for which reasons it may be dropped, or that it is "written".
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image, ImageCms
from streaming import StreamingDataset
from support import contents

from data_prep import schema
from data_prep.encode import main
from data_prep.inputs.samples import MAX_IMAGE_BYTES, MAX_TEXT_BYTES
from data_prep.pictures.images import UNUSABLE_REASONS
from data_prep.shapes import draw, scenes
from data_prep.worker.parts import whole_parts

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("one_thread")]

DAMAGED, DAMAGED_TARS, SAMPLE_TARS = 2000, 200, 60
LIMITS = ["--decoders", "2", "--image-seconds", "5", "--image-memory-mb", "1024", "--token-cap", "32"]
OPTIONS = ["--input", "tars", "--output", "out", "--encoders", "tiny", "--resolutions", "64", *LIMITS]
BLOCK, END, PICKLE = 512, bytes(1024), b"cos\nsystem\n(S'touch touched'\ntR."


class Expected(NamedTuple):
    """A sample: its key, what may become of it (words), and its caption if it is written."""

    key: str
    outcomes: str
    caption: str = ""


# ---- pictures ----


@cache
def scene(number: int) -> Image.Image:
    return draw(next(scenes(1, number)), (64, 72, 96)[number % 3])


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int, colours: int, data: bytes = b"", chunks: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def resized(data: bytes, mark: bytes, size: bytes, after: int = 0) -> bytes:
    """The picture with another size in its header, `after` bytes behind `mark`."""
    at = data.index(mark) + len(mark) + after
    return data[:at] + size + data[at + len(size) :]


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG of some kilobytes whose every scan goes over all of its pixels."""
    grey = encoded(scene(0).convert("L"), "JPEG", progressive=True)
    grey = resized(grey, b"\xff\xc2\0\x0b\x08", struct.pack(">HH", side, side))
    return grey[: grey.index(b"\xff\xda")] + b"\xff\xda\0\x08\x01\x01\0\0\0\x01" * count + b"\xff\xd9"


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) - 22)]  # a PNG has all of its pixels before its last 22 bytes


def flipped(data: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        damaged[rng.randrange(len(data) if rng.random() < 0.5 else min(200, len(data)))] ^= rng.randrange(1, 256)
    return bytes(damaged)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
JPEG, PROGRESSIVE = encoded(scene(0), "JPEG", icc_profile=SRGB), encoded(scene(1), "JPEG", progressive=True)
PNG, PALETTE = encoded(scene(2), "PNG"), encoded(scene(2).quantize(16), "PNG", transparency=bytes(range(16)))
WEBP, LOSSLESS = encoded(scene(3), "WEBP"), encoded(scene(4), "WEBP", lossless=True)
SOF, VP8, VP8L = b"\xff\xc0\0\x11\x08", b"\x9d\x01\x2a", b"VP8L"  # what stands before the size of a picture
HEALTHY = [encoded(scene(n), ("JPEG", "PNG", "WEBP")[n % 3]) for n in range(12)]
INTACT = (JPEG, PROGRESSIVE, PNG, PALETTE, WEBP, LOSSLESS)
OTHER_TYPES = [encoded(scene(1), kind) for kind in ("GIF", "TIFF", "BMP", "ICO", "JPEG2000", "PDF", "EPS")]
OTHER_TYPES += [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"<html>404</html>", PICKLE]
OTHER_TYPES += [b"\x7fELF\x02\x01\x01", b"PK\x03\x04", b"\0" * 900, b"RIFF\x24\0\0\0WAVEfmt "]
ROWS, BOMB = bytes(65 * 64), zlib.compress(bytes(8 << 20))  # of 64 × 64 pixels; for a text
BOMBS = (chunk(b"iCCP", b"x\0\0" + BOMB), chunk(b"zTXt", b"x\0\0" + BOMB), chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB))
SEVERAL = {"save_all": True, "append_images": [scene(0).rotate(90)]}
DROPPED = {
    "broken_image": [*(png(64, 64, 8, 0, ROWS, bomb) for bomb in BOMBS), png(64, 64, 8, 0, b"\x09" * 65 * 64), b""],
    "too_large": [png(30_000, 30_000, 1, 0), png(2**31 - 1, 2**31 - 1, 8, 2), resized(JPEG, SOF, b"\xff\xff\xff\xff")],
    # Pillow's WebP decoder asks for the memory before it tells the size.
    "too_large broken_image": [resized(WEBP, VP8, b"\xff\x3f" * 2), resized(LOSSLESS, VP8L, b"\xff\xff\xff\x0f", 5)],
    "too_small": [encoded(Image.new("L", size), "PNG") for size in ((1, 1), (1, 10_000), (10_000, 1))],
    "animated": [encoded(scene(0), "PNG", **SEVERAL), encoded(scene(0), "WEBP", **SEVERAL)],
}
ODD_PICTURES = [
    encoded(Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80)), "PNG"),
    png(64, 64, 16, 2, bytes((6 * 64 + 1) * 64)),
    encoded(scene(0).convert("CMYK"), "JPEG", icc_profile=SRGB),
    *(encoded(scene(1).convert(mode), "PNG") for mode in ("1", "L", "LA", "RGBA")),
    *(PALETTE, encoded(scene(1).convert("1"), "PNG", transparency=0), encoded(scene(2), "MPO", **SEVERAL)),
    encoded(scene(3), "WEBP", exif=b"Exif\0\0II\x2a\0\xff\xff\xff\xff"),
    png(64, 64, 8, 0, bytes(8 << 20)),  # more rows than it has
]
PICTURES: list[tuple[str, Callable[[random.Random], bytes]]] = [
    *(("broken_image", partial(cut, data)) for data in INTACT),
    *((" ".join(("written", *UNUSABLE_REASONS)), partial(flipped, data)) for data in INTACT * 3),
    *(("unsupported_format", lambda rng, data=data: data + rng.randbytes(9)) for data in OTHER_TYPES),
    *((outcomes, lambda _, data=data: data) for outcomes, datas in DROPPED.items() for data in datas),
    *(("written", lambda _, data=data: data) for data in ODD_PICTURES),
    ("written", lambda rng: JPEG + rng.randbytes(5000)),
    ("written", lambda rng: encoded(scene(3), "JPEG", exif=b"Exif\0\0MM\0\x2a" + rng.randbytes(60))),
    ("written", lambda rng: encoded(scene(4), "PNG", icc_profile=SRGB[: rng.randrange(1, 400)])),
    ("written", lambda rng: encoded(scene(4), "JPEG", icc_profile=SRGB[:128] + rng.randbytes(400))),
]


# ---- captions ----

NOT_UTF8 = (b"caf\xe9", "a dog".encode("utf-16"), b"\xed\xa0\x80", b"a\xc0\x80")
NO_CAPTIONS = (
    r'null | NaN | 1e999 | -Infinity | true | [] | [["a"]] | {"caption": "a"} | [], "__proto__": {"caption": "a"}'
)
BROKEN_JSON = rb""" | null | "a" | ["a"] | {"caption": "a" | {'caption': 'a'} | {"caption": "a"} {} | {"caption": "\x"}
 | {"caption": "\ud800"} | {"caption": "a", "url": ["\udfff"]}""".split(b" | ")
BROKEN_JSON += [b'{"caption": "\xff"}', b'{"caption": "\n"}', b"\x80\x04\x95" + PICKLE, "{}".encode("utf-16")]
BROKEN_JSON += [b"[" * 100_000, b'{"a":' * 100_000, b'{"n": %s}' % (b"9" * 100_000), b'{"n": -%s}' % (b"9" * 5000)]
ODD = 'a \0 \x1b[31m "red" \u2028 \u202e circle\r\n\t </s><pad> $(touch touched) 🎈 \ufffe'
GOOD_JSON = {  # with its caption
    '{"caption": "one", "caption": "two"}': "two",
    '{"__proto__": {"caption": "no"}, "__class__": "os.system", "caption": "a"}': "a",
    **{f'{{"caption": {number}}}': number for number in ("-12", "0.5", "1" + "0" * 4000)},
    '{"caption": "a", "n": [NaN, 1e999, -0.0]}': "a",
    f'{{"caption": "a", "{"k" * 2**20}": {"[" * 300 + "]" * 300}}}': "a",
}
TEXTS: list[tuple[str, dict[str, bytes], str]] = [
    *(("caption_not_utf8", {"txt": text}, "") for text in NOT_UTF8),
    *(("empty_caption", {"txt": text}, "") for text in (b"", b" \r\n\t", "\ufeff\u3000\u2028".encode())),
    ("empty_caption", {"json": rb'{"caption": " \n\u00a0"}'}, ""),
    ("no_caption", {}, ""),
    *(("no_caption", {"json": f'{{"caption": {value}}}'.encode()}, "") for value in NO_CAPTIONS.split(" | ")),
    *(("bad_json", {"json": text, "txt": b"a caption"}, "") for text in BROKEN_JSON),
    *(("written", {"json": text.encode()}, caption) for text, caption in GOOD_JSON.items()),
    *(("written", {"txt": text.encode()}, text) for text in (ODD, "\0", "red circle " * 1000)),
    ("written", {"txt": b"\xef\xbb\xbffrom txt", "json": b'{"caption": "from json"}'}, "from txt"),
]


# ---- members and their names ----


def member(name: str, data: bytes = b"", format_: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), {"path": name}
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(format_, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def sample(key: str, members: dict[str, bytes], format_: int = tarfile.GNU_FORMAT) -> bytes:
    return b"".join(member(f"{key}.{extension}", data, format_) for extension, data in members.items())


def old_sparse(key: str) -> bytes:
    header = bytearray(member(f"{key}.jpg", size=BLOCK, type=tarfile.GNUTYPE_SPARSE))
    header[482] = 1  # the map of its holes goes on in the next block
    header[148:156] = b"%06o\0 " % (sum(header) - sum(header[148:156]) + 8 * ord(" "))
    return bytes(header) + bytes(BLOCK) + b"x" * BLOCK


def pax_sparse(key: str) -> bytes:
    headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": f"{key}.jpg"}
    return member(f"GNUSparseFile.1/{key}.jpg", b"1\n0\n5\n" + bytes(700), tarfile.PAX_FORMAT, pax_headers=headers)


TEXT = {"txt": b"a"}
LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"V")
TWICE = ({"JPG": JPEG}, {"png": JPEG}, {"TXT": b"b"}, {"Json": b"{}"})
WITHOUT = ({"txt": b"a"}, {"json": b'{"caption": "a"}'}, {"gif": JPEG, **TEXT}, {"jpg.exe": JPEG}, {"pyd": PICKLE})
MEMBERS: list[tuple[str, Callable[[str], bytes]]] = [
    *(("unsafe_member", lambda key, t=t: member(f"{key}.jpg", type=t, linkname="/etc/passwd")) for t in LINKS),
    *(("unsafe_member", sparse) for sparse in (old_sparse, pax_sparse)),
    *(("duplicate_member", lambda key, m=m: sample(key, {"jpg": JPEG, "json": b"{}", **TEXT, **m})) for m in TWICE),
    *(("no_image", lambda key, m=m: sample(key, m)) for m in WITHOUT),
    ("written", lambda key: sample(key, {"jpg\0.exe": JPEG, **TEXT})),
    ("written", lambda key: member(f"._{key}.jpg", b"of a Mac") + sample(key, {"jpg": JPEG, **TEXT})),
]
CLIMBING = ["/etc/{}", "../{}", "../../{}", "a/../../{}", "./../{}", "//{}", "{}/../x"]
ODD_NAMES = ["$(touch touched) {}", "{} `touch touched`", "{};touch touched", "pipe:touch touched {}", "-rf {}", "~/{}"]
ODD_NAMES += ["s3://bucket/{}", "C:\\{}", "%2e%2e%2f{}", ".../{}", "CON/{}", "line\nbreak {}", "\r\u2028\x85{}", "{} "]
ODD_NAMES += ["\u202e{}", "nul\0{}", "é{}", "x" * 90 + "{}", "y" * 200 + "{}", "z" * 300 + "{}", "d/" * 3000 + "{}"]
NOT_UTF8_NAMES = {"caf\udce9 {}": "caf\\xe9 {}", "\udced\udca0\udc80{}": "\\xed\\xa0\\x80{}"}  # and their keys


# ---- all kinds of damaged samples: parts of a file (a number is a hole of so many bytes) and what is expected ----

Parts = list[bytes | int]
Kind = Callable[[random.Random, str, str], tuple[Parts, Expected]]  # of a number, after the sample of a key


def healthy(number: str) -> tuple[Parts, Expected]:
    caption, more = f"healthy {number}", {"json": b'{"n": %d}' % int(number)} if int(number) % 2 else {}
    members = {"jpg": HEALTHY[int(number) % 12], "txt": caption.encode(), **more}
    return [sample(number, members)], Expected(number, "written", caption)


def of_picture(outcomes: str, picture: Callable, rng: random.Random, number: str, _: str) -> tuple[Parts, Expected]:
    caption = f"damaged {number}"
    return [sample(number, {"jpg": picture(rng), "txt": caption.encode()})], Expected(number, outcomes, caption)


def of_name(outcomes: str, name: str, key: str, rng: random.Random, number: str, _: str) -> tuple[Parts, Expected]:
    format_ = tarfile.PAX_FORMAT if "\0" in name else rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    parts: Parts = [sample(name.replace("{}", number), {"jpg": JPEG, **TEXT}, format_)]
    return parts, Expected(key.replace("{}", number), outcomes, "a")


def too_long(extension: str, size: int, _: random.Random, number: str, __: str) -> tuple[Parts, Expected]:
    return [member(f"{number}.{extension}", size=size), size], Expected(number, "oversized_member")


KINDS: list[Kind] = [
    *(partial(of_picture, *kind) for kind in PICTURES),
    *(lambda _, n, __, t=t: ([sample(n, {"jpg": JPEG, **t[1]})], Expected(n, t[0], t[2])) for t in TEXTS),
    *(lambda _, n, __, m=m: ([m[1](n)], Expected(n, m[0], "a")) for m in MEMBERS),
    *(partial(of_name, "unsafe_member", name, name) for name in CLIMBING),
    *(partial(of_name, "written", name, name) for name in ODD_NAMES),
    *(partial(of_name, "written", name, key) for name, key in NOT_UTF8_NAMES.items()),
    lambda _, n, before: ([sample(before, {"jpg": JPEG, **TEXT})], Expected(before, "duplicate_key")),
]
TOO_LONG = {"jpg": MAX_IMAGE_BYTES, "webp": MAX_IMAGE_BYTES, "txt": MAX_TEXT_BYTES, "json": MAX_TEXT_BYTES}
HEAVY_KINDS: list[Kind] = [  # one of each
    partial(of_picture, "too_slow", lambda _: many_scans(8000, 10_000)),
    partial(of_picture, "too_much_memory", lambda _: encoded(Image.new("1", (13_000, 13_000)), "PNG")),
    lambda _, n, __: ([sample(n, {"jpg": JPEG, "txt": b"a " * 2**19})], Expected(n, "written", "a " * 2**19)),
    *(partial(too_long, extension, limit + BLOCK) for extension, limit in TOO_LONG.items()),
]


# ---- damaged tars: of healthy samples, and from which byte on and how it is damaged ----


class Tar(NamedTuple):
    body: bytes  # samples, without the tar's end
    headers: list[int]  # where they are, and those that begin a sample
    starts: list[int]


class Made(NamedTuple):
    """A damaged tar. `damage`: within a sample, between two (with more behind it, or not), or none."""

    data: bytes
    at: int
    damage: str = "within"
    more: tuple[Expected, ...] = ()  # items after those of the samples before `at`


def cut_off(rng: random.Random, tar: Tar) -> Made:
    data = (tar.body + END)[: (at := rng.randrange(len(tar.body + END)))]
    if at > len(tar.body):
        return Made(data, at, "none")
    return Made(data, at, "end" if at in (*tar.starts, len(tar.body)) else "within")


def flipped_headers(rng: random.Random, tar: Tar) -> Made:
    data, hit = bytearray(tar.body + END), rng.sample(tar.headers, rng.choice((1, 1, 2, 3)))
    for at in hit:
        data[at + rng.choice((*range(148), *range(156, BLOCK)))] ^= rng.randrange(1, 256)  # not in the checksum itself
    return Made(bytes(data), min(hit))


def inserted(what: bytes, rng: random.Random, tar: Tar, damage: str = "within") -> Made:
    at = rng.choice((*tar.starts[1:], len(tar.body)))
    return Made(tar.body[:at] + what + tar.body[at:] + END, at, damage)


def joined(_: random.Random, tar: Tar) -> Made:
    more = Expected("more", "no_image"), Expected("again", "written", "a")
    again = sample("more", TEXT) + sample("again", {"jpg": JPEG, **TEXT})
    return Made(tar.body + END + again + END, len(tar.body), "none", more)


PAX = [b"12 size=-99\n", b"99 path=a.b\n", b"11 path=a.b\n", b"0 path=a.b\n", b"12 path_a.b\n", b"1" * 2**16]
LONG_NAME, BEFORE_NOTHING = tarfile.GNUTYPE_LONGNAME, member("pax", b"12 path=a.b\n", type=tarfile.XHDTYPE)
SIZES = [("a.jpg", {"size": -1024}), ("no sample", {"size": 2**70}), ("pax", {"type": tarfile.XGLTYPE, "size": 2**70})]
SIZES += [("long", {"type": LONG_NAME, "size": -512}), ("long", {"type": LONG_NAME, "size": 2**40})]
INSERTED = [member("pax", records, type=tarfile.XHDTYPE) for records in PAX]
INSERTED += [member(name, **fields) for name, fields in SIZES]
INSERTED += [b"<html>502 Bad Gateway</html>".ljust(BLOCK)]
ENDS = {b"": "end", bytes(BLOCK): "none", bytes(2 * BLOCK - 1): "none", BEFORE_NOTHING + END: "within"}
ENDS |= dict.fromkeys([END + b"x", END + bytes(2**21) + b"x"], "between")
NO_TARS = [b"", JPEG, b"PK\x03\x04" + bytes(999), b"<html>404</html>" * 99, b"version https://git-lfs.github.com/v1\n"]
PACKS = (gzip.compress, bz2.compress, lzma.compress)
TARS: list[Callable[[random.Random, Tar], Made]] = [
    *[cut_off] * 10,
    *[flipped_headers] * 8,
    *(partial(inserted, what) for what in INSERTED),
    partial(inserted, bytes(BLOCK) + b"x" * BLOCK, damage="between"),
    *(lambda _, tar, end=end: Made(tar.body + end[0], len(tar.body), end[1]) for end in ENDS.items()),
    joined,
    *(lambda _, tar, pack=pack: Made(pack(tar.body + END), len(tar.body), "none") for pack in PACKS),
    *(lambda _, __, data=data: Made(data, 0) for data in NO_TARS),
]


TAR_NAMES = ("", "", "", "$(touch touched) ", "-rf ", "line\nbreak ", "[0-9]*", "dotted.v1.", "ü ", "%2F")


def write(path: Path, parts: Parts) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.seek(part, os.SEEK_CUR) if isinstance(part, int) else file.write(part)


def sample_tars(folder: Path, count: int) -> Iterator[tuple[str, list[Expected]]]:
    """Writes `count` damaged samples, each with a healthy neighbour, into tars."""
    rng, numbers = random.Random(1), (f"{n:05d}" for n in range(10**5))
    kinds = [*HEAVY_KINDS, *(KINDS[n % len(KINDS)] for n in range(count - len(HEAVY_KINDS)))]
    rng.shuffle(kinds)
    for n in range(SAMPLE_TARS):
        made = [healthy(first := next(numbers)), healthy(next(numbers))]
        for place, kind in enumerate(kinds[n::SAMPLE_TARS]):
            made.append(kind(rng, next(numbers), first))
            if place % 2:
                made.append(healthy(next(numbers)))
        name = f"{TAR_NAMES[n % len(TAR_NAMES)]}{n:02d}"
        write(folder / f"{name}.tar", [*(part for parts, _ in made for part in parts), END])
        yield name, [expected for _, expected in made]


def damaged_tars(folder: Path, count: int) -> Iterator[tuple[str, list[Expected]]]:
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    write(folder / "zero.tar", [bytes(BLOCK)])
    write(folder / "zeros.tar", [bytes(2**20)])  # what `tar` makes of no files
    yield from (("folder", [Expected("", "no_tar")]), ("pipe", [Expected("", "no_tar")]))
    yield from (("zero", []), ("zeros", []))
    rng = random.Random(2)
    for n in range(count - 4):
        made = [healthy(f"{10 * n + i:05d}") for i in range(rng.randrange(2, 5))]
        datas = [b"".join(part for part in parts if isinstance(part, bytes)) for parts, _ in made]
        body, starts = b"".join(datas), [sum(map(len, datas[:i])) for i in range(len(datas))]
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            headers = [info.offset for info in tar]
        data, at, damage, more = TARS[n % len(TARS)](rng, Tar(body, headers, starts))
        write(folder / f"damaged{n:03d}.tar", [data])
        begun = [expected for (_, expected), start in zip(made, starts, strict=True) if start + BLOCK <= at]
        # The last one that is begun may go on behind the damage: where that is between two samples, if it has no json
        # and the one before it has.
        lacks = len(begun) > 1 and int(begun[-1].key) % 2 == 0
        if damage != "none" and (damage == "within" or lacks):
            end = Expected(begun[-1].key, "truncated_tar") if begun else Expected("", "no_tar")
            begun = [*begun[:-1], end]
        elif damage == "between":
            begun.append(Expected("", "truncated_tar"))
        yield f"damaged{n:03d}", [*begun, *more]


# ---- the test ----


def rows_of(root: Path) -> dict[str, str]:
    """The captions of all samples by key."""
    found, card = {}, schema.Card.load(root)
    for row in StreamingDataset(local=str(root / "images" / "64"), batch_size=1):
        latent, text = schema.latent_of(row, 64), schema.text_of(row, card.text_dtype)
        assert latent.mean.shape == (4, 8, 8) and latent.std is not None
        assert all(values.isfinite().all() for values in (latent.mean, latent.std, text))
        assert found.setdefault(row["key"], row["caption"]) is row["caption"], "a key twice"
    return found


def test_two_thousand_damaged_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        (folder / "tars").mkdir(parents=True)
    tars = dict(damaged_tars(one / "tars", DAMAGED_TARS)) | dict(sample_tars(one / "tars", DAMAGED - DAMAGED_TARS))
    assert len(tars) == DAMAGED_TARS + SAMPLE_TARS
    for name in (chosen := [*tars][3::11]):
        os.link(one / "tars" / f"{name}.tar", two / "tars" / f"{name}.tar")
    before = set(tmp_path.rglob("*"))
    for folder in (one, two):
        monkeypatch.chdir(folder)
        assert main(OPTIONS) == 0
    assert "Traceback" not in "".join(capfd.readouterr())
    assert {p for p in tmp_path.rglob("*") if not {one / "out", two / "out"} & {p, *p.parents}} == before

    written, rows = contents(one / "out"), rows_of(one / "out")
    again = {k: v for k, v in contents(two / "out").items() if k.startswith("reports/") or k.count("/") == 3}
    assert len(whole_parts(two / "out")) == len(chosen) and again.items() <= written.items()

    report = json.loads(written["report.json"])
    parts = {part["part"].removeprefix("images/"): part for part in report["parts"]}
    for name, expected in tars.items():
        part = parts[name]
        assert part["read"] == len(expected) == sum(part["written"].values()) + sum(part["dropped"].values())
        *lines, rest = written[f"reports/images/{name}.jsonl"].decode().split("\n")
        rejects = [json.loads(line) for line in lines]
        for it in expected:  # in the tar's order
            caption = rows.pop(f"images/{name}/{it.key}", None) if "written" in it.outcomes else None
            if caption is not None:
                assert caption == it.caption.strip()
            else:
                reject = rejects.pop(0) if rejects else {"key": None}
                assert reject["key"] == it.key and reject["reason"] in it.outcomes.split(), (name, it, reject)
        assert not rejects and not rest
    assert not rows and parts.keys() == tars.keys()
    assert report["read"] == sum(map(len, tars.values())) == report["written"] + sum(report["dropped"].values())
