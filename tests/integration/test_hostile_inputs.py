"""Two thousand damaged inputs through the encode command: each is counted once, costs itself alone, and harms nothing.

1,800 damaged samples lie between healthy ones in 60 tars; 200 more tars are damaged themselves. What must become of each is
known from how it was made: a table says of every kind which reasons it may be dropped for, or "written".
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import random
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from streaming import StreamingDataset
from support import contents

from data_prep import shards
from data_prep.encode import main
from data_prep.images import UNUSABLE_REASONS
from data_prep.shapes import draw, scenes
from data_prep.tars import MAX_IMAGE_BYTES, MAX_TEXT_BYTES

pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("one_thread")]

DAMAGED, SAMPLE_TARS, DAMAGED_TARS = 2000, 60, 200
LIMITS = ["--decoders", "2", "--image-seconds", "5", "--image-memory-mb", "1024"]
OPTIONS = ["--input", "tars", "--output", "out", "--encoders", "tiny", "--resolutions", "64", *LIMITS]
BLOCK, END = 512, bytes(1024)
TOUCH = "touch touched"  # what a shell or an unpickler must not do
OPEN = " ".join(("written", *UNUSABLE_REASONS))


@dataclass(frozen=True)
class Expected:
    """A sample by its key: what may become of it, separated by spaces, and its caption where it is written."""

    key: str
    outcomes: str
    caption: str = ""


Part = bytes | int  # of a file; a number is a hole of so many bytes
Made = tuple[Expected, list[Part]]


# ---- pictures ----


@cache
def scene(number: int) -> Image.Image:
    return draw(next(scenes(1, number % 6)), (64, 72, 96)[number % 3])


def encoded(image: Image.Image, format_: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format_, **options)
    return out.getvalue()


@cache
def healthy_picture(number: int) -> bytes:
    return encoded(scene(number), *("JPEG", "PNG", "WEBP")[number // 6 % 3 : number // 6 % 3 + 1])


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@cache
def png(width: int, height: int, bits: int, colours: int, data: bytes = b"", chunks: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def resized(data: bytes, mark: bytes, size: bytes, after: int = 0) -> bytes:
    """The picture with another size in its header, `after` bytes behind `mark`."""
    at = data.index(mark) + len(mark) + after
    return data[:at] + size + data[at + len(size) :]


def many_scans(side: int, count: int) -> bytes:
    """A progressive JPEG of a few kilobytes whose every scan goes over all of its pixels."""
    grey = resized(
        encoded(scene(0).convert("L"), "JPEG", progressive=True), b"\xff\xc2\0\x0b\x08", struct.pack(">HH", side, side)
    )
    return grey[: grey.index(b"\xff\xda")] + b"\xff\xda\0\x08\x01\x01\0\0\0\x01" * count + b"\xff\xd9"


def cut(kind: Callable[[], bytes], rng: random.Random) -> bytes:
    data = kind()
    return data[: rng.randrange(len(data) - 22)]  # a PNG has all of its pixels before its last 22 bytes


def flipped(kind: Callable[[], bytes], rng: random.Random) -> bytes:
    data = bytearray(kind())
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        data[rng.randrange(len(data) if rng.random() < 0.5 else min(200, len(data)))] ^= rng.randrange(1, 256)
    return bytes(data)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
INTACT: dict[str, Callable[[], bytes]] = {
    "jpeg": cache(lambda: encoded(scene(0), "JPEG", icc_profile=SRGB)),
    "progressive": cache(lambda: encoded(scene(1), "JPEG", progressive=True)),
    "png": cache(lambda: encoded(scene(2), "PNG", icc_profile=SRGB)),
    "palette": cache(lambda: encoded(scene(2).quantize(16), "PNG", transparency=bytes(range(16)))),
    "webp": cache(lambda: encoded(scene(3), "WEBP")),
    "lossless": cache(lambda: encoded(scene(4).convert("RGBA"), "WEBP", lossless=True)),
}
GREY = bytes(65 * 64)  # the rows of 64 × 64 pixels of 8 bits
BOMB = zlib.compress(bytes(8 << 20))
TURNED = [scene(0).rotate(90)]
OTHERS = [
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"%PDF-1.7\n",
    b"<html>404</html>",
]
OTHERS += [
    f"cos\nsystem\n(S'{TOUCH}'\ntR.".encode(),
    b"\x7fELF\x02\x01\x01",
    b"PK\x03\x04",
    b"\0" * 900,
    b"RIFF\x24\0\0\0WAVEfmt ",
]
OTHERS += [encoded(scene(1), kind) for kind in ("GIF", "TIFF", "BMP", "ICO", "JPEG2000", "PDF", "EPS")]

Picture = Callable[[random.Random], bytes]
PICTURES: list[tuple[str, Picture]] = [
    *(("broken_image", partial(cut, kind)) for kind in INTACT.values()),
    *((OPEN, partial(flipped, kind)) for kind in list(INTACT.values()) * 2),
    *(("unsupported_format", lambda rng, data=data: data + rng.randbytes(9)) for data in OTHERS),
    # Bombs. Pillow's WebP decoder takes the memory before it tells the size.
    ("too_large", lambda rng: png(30_000, 30_000, 1, 0)),
    ("too_large", lambda rng: png(2**31 - 1, rng.randrange(64, 2**31), 8, 2)),
    ("too_large", lambda rng: resized(INTACT["jpeg"](), b"\xff\xc0\0\x11\x08", b"\xff\xff\xff\xff")),
    ("too_large", lambda rng: resized(INTACT["progressive"](), b"\xff\xc2\0\x11\x08", b"\xff\xff\xff\xff")),
    ("too_large broken_image", lambda rng: resized(INTACT["webp"](), b"\x9d\x01\x2a", b"\xff\x3f\xff\x3f")),
    ("too_large broken_image", lambda rng: resized(INTACT["lossless"](), b"VP8L", b"\xff\xff\xff\x1f", 5)),
    ("broken_image", lambda rng: png(64, 64, 8, 0, GREY, chunk(b"iCCP", b"x\0\0" + BOMB))),
    ("broken_image", lambda rng: png(64, 64, 8, 0, GREY, chunk(b"zTXt", b"x\0\0" + BOMB))),
    ("broken_image", lambda rng: png(64, 64, 8, 0, GREY, chunk(b"iTXt", b"x\0\1\0\0\0" + BOMB))),
    ("broken_image", lambda rng: png(64, 64, 8, 0, (b"\x09" + bytes(64)) * 64)),  # no such filter
    ("broken_image", lambda rng: png(0, 64, 8, 0)),
    ("broken_image", lambda rng: b""),
    ("too_small", lambda rng: png(1, 1, 8, 0, b"\0\0")),
    ("too_small", lambda rng: encoded(Image.new("RGB", (1, 10_000)), "PNG")),
    ("too_small", lambda rng: encoded(Image.new("RGB", (10_000, 1)), "JPEG")),
    ("animated", lambda rng: encoded(scene(0), "PNG", save_all=True, append_images=TURNED)),
    ("animated", lambda rng: encoded(scene(0), "WEBP", save_all=True, append_images=TURNED)),
    # Odd, but pictures.
    ("written", lambda rng: encoded(Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80)), "PNG")),
    ("written", lambda rng: png(64, 64, 16, 2, (b"\0" + rng.randbytes(6 * 64)) * 64)),
    ("written", lambda rng: encoded(scene(0).convert("CMYK"), "JPEG", icc_profile=SRGB)),
    ("written", lambda rng: encoded(scene(1).convert("LA"), "PNG")),
    ("written", lambda rng: encoded(scene(1).convert("1"), "PNG", transparency=0)),
    ("written", lambda rng: INTACT["palette"]()),
    ("written", lambda rng: encoded(scene(2), "MPO", save_all=True, append_images=TURNED)),
    ("written", lambda rng: encoded(scene(3), "JPEG", exif=b"Exif\0\0MM\0\x2a" + rng.randbytes(60))),
    ("written", lambda rng: encoded(scene(3), "WEBP", exif=b"Exif\0\0II\x2a\0\xff\xff\xff\xff")),
    ("written", lambda rng: encoded(scene(4), "PNG", icc_profile=SRGB[: rng.randrange(1, 400)])),
    ("written", lambda rng: encoded(scene(4), "JPEG", icc_profile=SRGB[:128] + rng.randbytes(400))),
    ("written", lambda rng: healthy_picture(8) + rng.randbytes(5000)),
    ("written", lambda rng: png(64, 64, 8, 0, bytes(32 << 20))),  # more rows than the picture has
]
HEAVY_PICTURES: list[tuple[str, Picture]] = [
    ("too_slow", lambda rng: many_scans(8000, 3000)),
    ("too_much_memory", lambda rng: encoded(Image.new("1", (13_000, 13_000)), "PNG")),
]


# ---- captions ----


def text_of(json_: str | bytes) -> dict[str, bytes]:
    return {"json": json_.encode() if isinstance(json_, str) else json_}


ODD = 'a \0 \x1b[31m "red" \u2028 \u202e circle\r\n\t </s><pad> $(touch touched) 🎈 \ufffe'
TEXTS: list[tuple[str, dict[str, bytes], str]] = [
    *(
        ("caption_not_utf8", {"txt": t}, "")
        for t in (b"caf\xe9", "a dog".encode("utf-16"), b"\xed\xa0\x80", b"a\xc0\x80")
    ),
    *(("empty_caption", {"txt": t}, "") for t in (b"", b" \r\n\t", "\ufeff\u3000\u2028".encode())),
    *(("empty_caption", text_of(f'{{"caption": "{t}"}}'), "") for t in ("", r" \n\u00a0")),
    ("no_caption", {}, ""),
    *(
        ("no_caption", text_of(f'{{"caption": {value}, "Caption": "x"}}'), "")
        for value in ("null", "NaN", "1e999", "-Infinity", "true", '["a"]', '{"caption": "a"}', "[]")
    ),
    ("no_caption", text_of('{"__proto__": {"caption": "a"}}'), ""),
    *(
        ("bad_json", {**text_of(json_), "txt": b"a caption"}, "")
        for json_ in (
            "",
            "null",
            '"a caption"',
            '["a caption"]',
            '{"caption": "a"',
            "{'caption': 'a'}",
            '{"caption": "a"} {}',
            '{"caption": "\n"}',
            r'{"caption": "\ud800"}',
            r'{"caption": "a", "url": ["\udfff"]}',
            b'{"caption": "\xff"}',
            b"\x80\x04\x95" + f"cos\nsystem\n(S'{TOUCH}'\ntR.".encode(),
            '{"caption": "a"}'.encode("utf-16"),
            "[" * 100_000,
            '{"a":' * 100_000,
            '{"caption": ' + "9" * 100_000 + "}",
            '{"caption": "a", "n": -' + "9" * 5_000 + "}",
        )
    ),
    ("written", {"txt": ODD.encode()}, ODD),
    ("written", {"txt": b"\0"}, "\0"),
    ("written", {"txt": b"\xef\xbb\xbfa caption"}, "a caption"),
    ("written", {"txt": b"red circle " * 2000}, "red circle " * 2000),
    ("written", {"txt": b"from txt", **text_of('{"caption": "\\u0000"}')}, "from txt"),
    ("written", text_of('{"caption": "one", "caption": "two"}'), "two"),
    ("written", text_of('{"__proto__": {"x": 1}, "__class__": "os.system", "caption": "a"}'), "a"),
    ("written", text_of('{"caption": -12}'), "-12"),
    ("written", text_of('{"caption": 1' + "0" * 4000 + "}"), "1" + "0" * 4000),
    ("written", text_of('{"caption": "a", "n": [NaN, 1e999, 1e-999, -0.0]}'), "a"),
    ("written", text_of('{"caption": "a", "deep": ' + "[" * 300 + "]" * 300 + "}"), "a"),
    ("written", text_of('{"caption": "a", "' + "k" * 2**20 + '": 1}'), "a"),
    ("written", text_of('{"caption": "a", "x": "' + "\\u00e9" * 2**17 + '"}'), "a"),
]


# ---- members and their names ----


def member(name: str, data: bytes = b"", format_: int = tarfile.GNU_FORMAT, **fields: Any) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.pax_headers = len(data), {"path": name}
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(format_, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def sample(key: str, picture: bytes, texts: dict[str, bytes], format_: int = tarfile.GNU_FORMAT) -> bytes:
    texts = {"jpg": picture, **texts}
    return b"".join(member(f"{key}.{extension}", data, format_) for extension, data in texts.items())


def healthy(number: int) -> Made:
    """Every healthy sample has a caption of its own."""
    key, caption = f"{number:05d}", f"a healthy picture, number {number}"
    more = {"json": json.dumps({"number": number}).encode()} if number % 2 else {}
    return Expected(key, "written", caption), [sample(key, healthy_picture(number), {"txt": caption.encode(), **more})]


def special(key: str, type_: bytes) -> bytes:
    return member(f"{key}.jpg", type=type_, linkname="/etc/passwd") + member(f"{key}.txt", b"a link")


def old_sparse(key: str) -> bytes:
    header = bytearray(member(f"{key}.jpg", size=BLOCK, type=tarfile.GNUTYPE_SPARSE))
    header[482] = 1  # the map of its holes goes on in the next block
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + bytes(BLOCK) + b"x" * BLOCK


def pax_sparse(key: str) -> bytes:
    about = {"major": "1", "minor": "0", "name": f"{key}.jpg", "realsize": str(2**50)}
    headers = {f"GNU.sparse.{name}": value for name, value in about.items()}
    return member(f"GNUSparseFile.1/{key}.jpg", b"1\n0\n5\n" + bytes(700), tarfile.PAX_FORMAT, pax_headers=headers)


LINKS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"V")
PICTURE = INTACT["jpeg"]()
MEMBERS: list[tuple[str, Callable[[str], bytes]]] = [
    *(("unsafe_member", partial(special, type_=type_)) for type_ in LINKS),
    ("unsafe_member", old_sparse),
    ("unsafe_member", pax_sparse),
    *(
        ("duplicate_member", lambda key, more=more: sample(key, PICTURE, {"txt": b"a", "json": b"{}", **more}))
        for more in ({"JPG": PICTURE}, {"png": PICTURE}, {"TXT": b"b"}, {"Json": b"{}"})
    ),
    ("no_image", lambda key: member(f"{key}.txt", b"words alone")),
    ("no_image", lambda key: member(f"{key}.json", b'{"caption": "a"}')),
    ("no_image", lambda key: member(f"{key}.gif", PICTURE) + member(f"{key}.txt", b"a")),
    ("no_image", lambda key: member(f"{key}.pyd", f"cos\nsystem\n(S'{TOUCH}'\ntR.".encode())),
    ("no_image", lambda key: member(f"{key}.jpg.exe", PICTURE)),
    ("written", lambda key: member(f"{key}.jpg\0.exe", PICTURE) + member(f"{key}.txt", b"a")),
    ("written", lambda key: member(f"._{key}.jpg", b"of a Mac") + sample(key, PICTURE, {"txt": b"a"})),
]
# What stands before `.jpg` and `.txt`, what becomes of the sample, and its key where that is another.
NAMES: list[tuple[str, str, str]] = [
    *(
        (name, "unsafe_member", "")
        for name in ("/etc/{}", "../{}", "../../{}", "a/../../{}", "./../{}", "//{}", "{}/../x")
    ),
    *(
        (name, "written", "")
        for name in ("$({touch}) {}", "{} `{touch}`", "{};{touch}", "pipe:{touch} {}", "|{touch} {}")
    ),
    *(
        (name, "written", "")
        for name in ("-rf {}", "~/{}", "s3://bucket/{}", "C:\\{}", "%2e%2e%2f{}", ".../{}", "CON/{}")
    ),
    *(
        (name, "written", "")
        for name in ("line\nbreak {}", "\r\u2028\x85{}", "\x1b[2J{}", "{} ", "\u202e{}", "nul\0{}", "é{}")
    ),
    *((name, "written", "") for name in ("x" * 90 + "{}", "y" * 200 + "{}", "z" * 300 + "{}", "d/" * 3000 + "{}")),
    ("caf\udce9 {}", "written", "caf\\xe9 {}"),
    ("\udced\udca0\udc80{}", "written", "\\xed\\xa0\\x80{}"),
]

# ---- all kinds of damaged samples: each makes one of a number, after the healthy sample of a key ----

Kind = Callable[[random.Random, int, str], Made]


def picture_of(outcomes: str, picture: Picture, rng: random.Random, number: int, _: str) -> Made:
    key, caption = f"{number:05d}", f"damaged {number}"
    return Expected(key, outcomes, caption), [sample(key, picture(rng), {"txt": caption.encode()})]


def texts_of(outcomes: str, texts: dict[str, bytes], caption: str, _: random.Random, number: int, __: str) -> Made:
    return Expected(f"{number:05d}", outcomes, caption), [sample(f"{number:05d}", PICTURE, texts)]


def members_of(outcomes: str, members: Callable[[str], bytes], _: random.Random, number: int, __: str) -> Made:
    return Expected(f"{number:05d}", outcomes, "a"), [members(f"{number:05d}")]


def named(name: str, outcomes: str, key: str, rng: random.Random, number: int, _: str) -> Made:
    name, key = (n.replace("{touch}", TOUCH).replace("{}", f"{number:05d}") for n in (name, key))
    format_ = tarfile.PAX_FORMAT if "\0" in name else rng.choice((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    return Expected(key or name, outcomes, "a"), [sample(name, PICTURE, {"txt": b"a"}, format_)]


def again(_: random.Random, __: int, before: str) -> Made:
    return Expected(before, "duplicate_key"), [sample(before, PICTURE, {"txt": b"another"})]


def oversized(extension: str, size: int, _: random.Random, number: int, __: str) -> Made:
    name = f"{number:05d}.{extension}"
    return Expected(f"{number:05d}", "oversized_member"), [member(name, size=size), size]


KINDS: list[Kind] = [
    *(partial(picture_of, *kind) for kind in PICTURES),
    *(partial(texts_of, *kind) for kind in TEXTS),
    *(partial(members_of, *kind) for kind in MEMBERS),
    *(partial(named, *kind) for kind in NAMES),
    again,
]
HEAVY_KINDS: list[Kind] = [  # one of each
    *(partial(picture_of, *kind) for kind in HEAVY_PICTURES),
    partial(texts_of, "written", {"txt": b"red circle " * 95_000}, "red circle " * 95_000),
    partial(oversized, "jpg", MAX_IMAGE_BYTES + BLOCK),
    partial(oversized, "webp", MAX_IMAGE_BYTES + BLOCK),
    *(partial(oversized, extension, MAX_TEXT_BYTES + BLOCK) for extension in ("txt", "json")),
]


# ---- damaged tars: each kind makes of healthy samples the file, and says from which byte on it is damaged ----

Body = tuple[bytes, list[int], list[int]]  # of a tar without its end; where headers and samples start in it


def pax(records: bytes) -> bytes:
    return member("pax", records, type=tarfile.XHDTYPE)


def cut_tar(rng: random.Random, body: bytes, _: list[int], __: list[int]) -> tuple[bytes, int]:
    at = rng.randrange(len(body + END))
    return (body + END)[:at], at


def flipped_headers(rng: random.Random, body: bytes, headers: list[int], _: list[int]) -> tuple[bytes, int]:
    data, hit = bytearray(body + END), rng.sample(headers, rng.choice((1, 1, 2, 3)))
    for at in hit:
        data[at + rng.choice((*range(148), *range(156, BLOCK)))] ^= rng.randrange(1, 256)  # not in the checksum itself
    return bytes(data), min(hit)


def hole(_: random.Random, body: bytes, headers: list[int], __: list[int]) -> tuple[bytes, int]:
    at = headers[-2]
    return body[:at] + bytes(BLOCK) + body[at + BLOCK :] + END, at


def inserted(what: bytes, rng: random.Random, body: bytes, _: list[int], starts: list[int]) -> tuple[bytes, int]:
    at = rng.choice((*starts[1:], len(body)))
    return body[:at] + what + body[at:] + END, at


def followed(what: bytes, _: random.Random, body: bytes, __: list[int], ___: list[int]) -> tuple[bytes, int]:
    return body + what, len(body)


def replaced(by: Callable[[bytes], bytes], _: random.Random, body: bytes, *__: list[int]) -> tuple[bytes, int]:
    return by(body + END), 0


def zipped(tar: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("00000.tar", tar)
    return out.getvalue()


TARS: list[Callable[..., tuple[bytes, int]]] = [
    *[cut_tar] * 10,
    *[flipped_headers] * 8,
    hole,
    *(
        partial(inserted, what)
        for what in (
            member("a.jpg", size=-1024),
            member("no sample", size=2**70),
            member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=-512),
            member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2**40),
            member("pax", type=tarfile.XGLTYPE, size=2**70),
            *(
                pax(r)
                for r in (b"12 size=-99\n", b"99 path=a.b\n", b"11 path=a.b\n", b"0 path=a.b\n", b"12 path_a.b\n")
            ),
            pax(b"22 size=%d\n" % 10**14) + member("no sample"),
            pax(b"1" * 2**16),
            b"<html>502 Bad Gateway</html>".ljust(BLOCK),
            bytes(BLOCK) + b"x" * BLOCK,
            END + sample("another", PICTURE, {"txt": b"tar"}),
        )
    ),
    *(
        partial(followed, what)
        for what in (
            b"",
            bytes(BLOCK),
            bytes(2 * BLOCK - 1),
            pax(b"12 path=a.b\n") + END,
            END + b"x",
            END + bytes(2**21) + b"x",
        )
    ),
    partial(followed, END + sample("another", PICTURE, {"txt": b"tar"}) + END),
    *(
        partial(replaced, by)
        for by in (
            gzip.compress,
            bz2.compress,
            lzma.compress,
            zipped,
            lambda _: b"<html>404</html>" * 99,
            lambda _: b"",
        )
    ),
    *(
        partial(replaced, lambda _, data=data: data)
        for data in (PICTURE, b"version https://git-lfs.github.com/spec/v1\n")
    ),
]


# ---- the tars on the disk ----


def write(path: Path, parts: Sequence[Part]) -> None:
    with path.open("wb") as file:
        for part in parts:
            file.seek(part, os.SEEK_CUR) if isinstance(part, int) else file.write(part)


def sample_tars(folder: Path, count: int) -> dict[str, list[Expected]]:
    """Writes `count` damaged samples, each with healthy neighbours, into tars."""
    rng, kinds = random.Random(1), [*HEAVY_KINDS, *(KINDS[n % len(KINDS)] for n in range(count - len(HEAVY_KINDS)))]
    rng.shuffle(kinds)
    numbers = iter(range(10**5))
    tars: dict[str, list[Expected]] = {}
    for n in range(SAMPLE_TARS):
        first = healthy(next(numbers))
        made = [first]
        for i, kind in enumerate(kinds[n::SAMPLE_TARS]):
            made.append(kind(rng, next(numbers), first[0].key))
            if i % 2 or i + 2 > len(kinds[n::SAMPLE_TARS]):  # one neighbour is healthy
                made.append(healthy(next(numbers)))
        part = f"{HOSTILE_PARTS[n % len(HOSTILE_PARTS)]}{n:02d}"
        write(folder / f"{part}.tar", [piece for _, pieces in made for piece in pieces] + [END])
        tars[part] = [expected for expected, _ in made]
    return tars


HOSTILE_PARTS = ("", "", "", f"$({TOUCH}) ", "-rf ", "line\nbreak ", "[0-9]*", "dotted.v1.", "ü ", "%2F")


def damaged_tars(folder: Path, count: int) -> dict[str, list[Expected]]:
    rng, tars = random.Random(2), {}
    for n in range(count):
        made = [healthy(100 * n + i) for i in range(rng.randrange(2, 5))]
        body, starts, headers = b"", [], []
        for _, (data,) in made:
            starts.append(len(body))
            body += data
        with tarfile.open(fileobj=io.BytesIO(body)) as tar:
            headers = [info.offset for info in tar]
        data, at = TARS[n % len(TARS)](rng, body, headers, starts)
        write(folder / f"damaged{n:03d}.tar", [data])
        begun = [expected for (expected, _), start in zip(made, starts, strict=True) if start + BLOCK <= at]
        # The last one that is begun may go on behind the damage.
        hand = Expected(begun[-1].key, "truncated_tar") if begun else Expected("", "no_tar")
        tars[f"damaged{n:03d}"] = [*begun[:-1], hand]
    return tars


def other_tars(folder: Path) -> dict[str, list[Expected]]:
    """What is no file, and what holds nothing."""
    (folder / "folder.tar").mkdir()
    os.mkfifo(folder / "pipe.tar")
    write(folder / "zeros.tar", [bytes(2**20)])
    write(folder / "zero.tar", [bytes(BLOCK)])
    no_tar = [Expected("", "no_tar")]
    return {"folder": no_tar, "pipe": no_tar, "zeros": [], "zero": [Expected("", "truncated_tar")]}


# ---- the test ----


def rows_of(root: Path) -> Iterator[dict[str, Any]]:
    card = shards.Card.load(root)
    for name in card.sets:
        for row in StreamingDataset(local=str(root / name), batch_size=1):
            latent, text = shards.latent_of(row, 64), shards.text_of(row, card.text_dtype)
            assert latent.mean.shape == (4, 8, 8) and latent.std is not None
            assert all(values.isfinite().all() for values in (latent.mean, latent.std, text))
            yield row


def test_two_thousand_damaged_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    here = tmp_path / "one"
    (here / "tars").mkdir(parents=True)
    tars = other_tars(here / "tars")
    tars |= damaged_tars(here / "tars", DAMAGED_TARS - len(tars))
    tars |= sample_tars(here / "tars", DAMAGED - DAMAGED_TARS)
    shutil.copytree(here / "tars", tmp_path / "two" / "tars", copy_function=os.link)
    before = set(tmp_path.rglob("*"))
    for folder in ("one", "two"):
        monkeypatch.chdir(tmp_path / folder)
        assert main(OPTIONS) == 0
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    made = {p for p in tmp_path.rglob("*") if "out" not in p.relative_to(tmp_path).parts[1:2]}
    assert made == before  # nothing outside of the output
    assert contents(here / "out") == contents(tmp_path / "two" / "out")

    rows = {row["key"]: row for row in rows_of(here / "out")}
    report = json.loads((here / "out" / "report.json").read_text())
    assert report["written"] == len(rows)
    assert report["read"] == sum(map(len, tars.values())) == report["written"] + sum(report["dropped"].values())
    parts = {part["part"].removeprefix("images/"): part for part in report["parts"]}
    assert parts.keys() == tars.keys()
    for name, expected in tars.items():
        part = parts[name]
        assert part["read"] == len(expected) == sum(part["written"].values()) + sum(part["dropped"].values())
        *lines, rest = (here / "out" / "reports" / "images" / f"{name}.jsonl").read_text("utf-8").split("\n")
        rejects = [json.loads(line) for line in lines]
        for one in expected:  # in the tar's order
            row = rows.pop(f"images/{name}/{one.key}", None) if "written" in one.outcomes else None
            if row is not None:
                assert row["caption"] == one.caption
            else:
                reject = rejects.pop(0)
                assert reject["key"] == one.key and reject["reason"] in one.outcomes.split(), (one, reject)
        assert not rejects and not rest
    assert not rows
