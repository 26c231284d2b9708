"""data_prep/inputs/tars.py against real tars: whole ones (webdataset's own writer, `tarfile`) and ones with real damage."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from webdataset import TarWriter
from webdataset.tariterators import base_plus_ext

from data_prep.inputs import tars
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents
from data_prep.inputs.samples import REJECT_REASONS, Reject, Sample
from data_prep.inputs.tars import expected_samples, read_tar, split_name

pytestmark = pytest.mark.timeout(120)  # a hang is a failure

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def make_samples(count: int, seed: int = 0) -> list[Sample]:
    """`count` samples with images of 0 to 3,000 random bytes; every fifth key needs a pax header."""
    rng = random.Random(seed)
    samples = []
    for index in range(count):
        key = f"{index:05d}" if index % 5 else f"long/{'é' * 60}/{index:05d}"
        caption = f"caption {index} ∀"
        metadata = {"caption": caption, "url": f"https://example.org/{index}", "width": index}
        samples.append(Sample(key, rng.randbytes(rng.randrange(3000)), caption, metadata))
    return samples


def write_webdataset(path: Path, samples: list[Sample]) -> Path:
    with TarWriter(str(path)) as writer:
        for s in samples:
            writer.write({"__key__": s.key, "jpg": s.image, "json": s.metadata, "txt": s.caption})
    return path


def member(name: str, data: bytes = b"", fmt: int = tarfile.GNU_FORMAT, **fields: object) -> bytes:
    """One member as bytes: header(s), data, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(fmt, "utf-8", "surrogateescape") + data + bytes(-len(data) % BLOCK)


def whole(key: str, image: bytes = b"image", caption: str = "a caption") -> bytes:
    return member(f"{key}.jpg", image) + member(f"{key}.txt", caption.encode())


def write(path: Path, *parts: bytes, end: bytes = END) -> Path:
    path.write_bytes(b"".join(parts) + end)
    return path


@pytest.fixture
def tar_path(tmp_path: Path) -> Path:
    return tmp_path / "00000.tar"


def reasons(path: Path, **options: object) -> list[str]:
    """Each item as its key, and "key: reason" for a reject."""
    items = list(read_tar(path, **options))
    return [item.key if isinstance(item, Sample) else f"{item.key}: {item.reason}" for item in items]


# ------------------------------------------------------------------------------------------------------- whole tars


def test_webdatasets_own_tars_come_back_bit_identical(tar_path: Path) -> None:
    samples = make_samples(40)
    assert list(read_tar(write_webdataset(tar_path, samples))) == samples


def test_a_name_that_both_ways_of_long_names_give(tar_path: Path) -> None:
    for fmt in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        key = "deep/" * 60 + "000"
        write(tar_path, member(f"{key}.jpg", b"i", fmt), member(f"{key}.txt", b"t", fmt))
        assert list(read_tar(tar_path)) == [Sample(key, b"i", "t", {})]


def test_the_key_is_webdatasets() -> None:
    names = ["a.jpg", "a.seg.jpg", "a/b.c/000.seg.jpg", "./000.JPG", "a", "a/b", ".a.jpg", "./.a.jpg", "a.", "a..b"]
    names += ["a.b/c", "/etc/x.jpg", "../x.jpg", "pipe:rm -rf x.jpg", "a b/c d.txt", "__m__/x.json", "", "/", "a/", "."]
    for name in names:
        key, extension = base_plus_ext(name)
        assert split_name(name) == ((key, extension.lower()) if key is not None else ("", "")), name
    # The one difference: webdataset makes of a dot file in a folder, such as macOS strews, the key "a/".
    assert base_plus_ext("a/._000.jpg") == ("a/", "_000.jpg")
    assert split_name("a/._000.jpg") == ("", "")


def test_dotted_names(tar_path: Path) -> None:
    write(tar_path, member("a/b.c/000.jpg", b"i"), member("a/b.c/000.seg.jpg", b"s"), member("a/b.c/000.txt", b"t"))
    assert list(read_tar(tar_path)) == [Sample("a/b.c/000", b"i", "t", {})]


def test_an_image_under_another_name_only_is_no_image(tar_path: Path) -> None:
    (item,) = read_tar(write(tar_path, member("a/b.c/000.seg.jpg", b"s"), member("a/b.c/000.txt", b"t")))
    assert isinstance(item, Reject) and (item.key, item.reason) == ("a/b.c/000", "no_image")
    assert item.detail.endswith("there is 000.seg.jpg, 000.txt; in a tar a key ends at the first dot")


@pytest.mark.parametrize("extension", ["jpg", "jpeg", "png", "webp", "JPG", "Jpeg", "PNG", "WebP"])
def test_image_extensions(tar_path: Path, extension: str) -> None:
    write(tar_path, member(f"0.{extension}", b"i"), member("0.TXT", b"t"))
    assert list(read_tar(tar_path)) == [Sample("0", b"i", "t", {})]


def test_names_are_never_run_or_opened(tar_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ["pipe:touch hacked", "|touch hacked", "$(touch hacked)", "file:", "s3:x", "-rf"]
    write(tar_path, *(whole(key) for key in keys))
    assert reasons(tar_path) == keys
    assert [p.name for p in tmp_path.iterdir()] == [tar_path.name]


def test_pickles_are_not_opened(tar_path: Path) -> None:
    write(tar_path, member("0.pyd", b"cos\nsystem\n(S'false'\ntR."), whole("0"), member("0.pth", b"\x80"))
    assert reasons(tar_path) == ["0"]


def test_folders_and_keyless_members_belong_to_no_sample(tar_path: Path) -> None:
    folder = member("./", type=tarfile.DIRTYPE)
    link = member("link", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    parts = [folder, member("0.jpg", b"i"), member("LICENSE", b"free"), link, member("._0.jpg", b"mac")]
    assert reasons(write(tar_path, *parts, member("0.txt", b"t"))) == ["0"]


def test_a_name_that_is_not_utf8(tar_path: Path) -> None:
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    (sample,) = read_tar(write(tar_path, whole(name)))
    assert sample.key == "caf\\xe9"
    sample.key.encode()


@pytest.mark.parametrize("end", [END, bytes(10240), bytes(3 * 2**20)])
def test_an_empty_tar(tar_path: Path, end: bytes) -> None:
    assert list(read_tar(write(tar_path, end=end))) == []


def test_one_sample_in_memory_at_a_time(tar_path: Path) -> None:
    image_bytes = 2**20
    with open(tar_path, "wb") as file:
        for index in range(40):
            file.write(whole(f"{index:03d}", bytes([index]) * image_bytes))
        file.write(END)
    tracemalloc.start()
    count = sum(len(item.image) == image_bytes for item in read_tar(tar_path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 40
    assert peak < 5 * image_bytes


# --------------------------------------------------------------------------------------------------------- captions


def json_only(tar_path: Path, text: str | bytes) -> Sample | Reject:
    data = text.encode() if isinstance(text, str) else text
    (item,) = read_tar(write(tar_path, member("0.jpg", b"i"), member("0.json", data)))
    return item


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ('{"caption": "a dog"}', "a dog"),
        ('\ufeff{"caption": "a dog"}', "a dog"),
        ('{"caption": " a\\n\\u00e9 "}', "a\né"),
        ('{"caption": 42}', "42"),
        ('{"caption": 4.5}', "4.5"),
        ('{"caption": ["a dog"]}', "a dog"),
        ('{"caption": 1' + "0" * 400 + "}", "1" + "0" * 400),  # too large for a float
    ],
)
def test_caption_from_json(tar_path: Path, text: str, caption: str) -> None:
    assert json_only(tar_path, text) == Sample("0", b"i", caption, json.loads(text.lstrip("\ufeff")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"caption": null}', "no_caption"),
        ("{}", "no_caption"),
        ('{"caption": NaN}', "no_caption"),
        ('{"caption": 1e999}', "no_caption"),
        ('{"caption": true}', "no_caption"),
        ('{"caption": {"en": "a dog"}}', "no_caption"),
        ('{"caption": ""}', "empty_caption"),
        ('{"caption": " \\n\\t\\u3000"}', "empty_caption"),
        ("", "bad_json"),
        ('{"caption": "a dog"', "bad_json"),
        ('["a dog"]', "bad_json"),
        ("null", "bad_json"),
        (b'{"caption": "\xff"}', "bad_json"),
        ('{"caption": "\\ud800"}', "bad_json"),
        ('{"caption": "a dog", "url": "\\udfff"}', "bad_json"),
        ("[" * 200_000, "bad_json"),
        ('{"caption": "a dog", "exif": ' + '{"a":' * 100_000, "bad_json"),
        ('{"caption": ' + "9" * 100_000 + "}", "bad_json"),
    ],
)
def test_captions_that_json_does_not_give(tar_path: Path, text: str | bytes, reason: str) -> None:
    item = json_only(tar_path, text)
    assert isinstance(item, Reject)
    assert (item.key, item.reason) == ("0", reason)


def test_txt_comes_before_json_but_not_before_another_field(tar_path: Path) -> None:
    metadata = {"caption": "from json", "long": "a longer one"}
    write(tar_path, whole("0", caption="from txt"), member("0.json", json.dumps(metadata).encode()))
    assert [s.caption for s in read_tar(tar_path)] == ["from txt"]
    assert [s.caption for s in read_tar(tar_path, CaptionChoice.parse("long"))] == ["a longer one"]
    assert reasons(tar_path, captions=CaptionChoice.parse("absent")) == ["0: no_caption"]


@pytest.mark.parametrize(
    ("txt", "outcome"),
    [
        (b"\xff\xfe\x00", "0: caption_not_utf8"),
        (b"caf\xe9", "0: caption_not_utf8"),
        (b"", "0: empty_caption"),
        (b" \r\n", "0: empty_caption"),
        ("\ufeff \u3000".encode(), "0: empty_caption"),
        (b"\xef\xbb\xbfa dog", "0"),
    ],
)
def test_txt(tar_path: Path, txt: bytes, outcome: str) -> None:
    write(tar_path, member("0.jpg", b"i"), member("0.txt", txt), whole("1"))
    assert reasons(tar_path) == [outcome, "1"]


def test_bad_json_beside_a_good_txt(tar_path: Path) -> None:
    assert reasons(write(tar_path, whole("0"), member("0.json", b"{"), whole("1"))) == ["0: bad_json", "1"]


def test_no_caption_at_all(tar_path: Path) -> None:
    assert reasons(write(tar_path, member("0.jpg", b"i"), whole("1"))) == ["0: no_caption", "1"]


# ---------------------------------------------------------------------------------------------------- groups at fault


def test_members_without_image(tar_path: Path) -> None:
    write(tar_path, whole("0"), member("1.txt", b"t"), member("1.json", b"{}"), whole("2"))
    assert reasons(tar_path) == ["0", "1: no_image", "2"]


def test_a_key_that_comes_again(tar_path: Path) -> None:
    write(tar_path, whole("0", b"first"), whole("1"), whole("0", b"second"), whole("2"))
    assert reasons(tar_path) == ["0", "1", "0: duplicate_key", "2"]
    assert next(read_tar(tar_path)).image == b"first"


@pytest.mark.parametrize("name", ["0.jpg", "0.JPG", "0.png", "0.txt", "0.json"])
def test_a_member_that_comes_twice(tar_path: Path, name: str) -> None:
    write(tar_path, whole("0"), member("0.json", b"{}"), member(name, b"{}"), whole("1"))
    assert reasons(tar_path) == ["0: duplicate_member", "1"]


@pytest.mark.parametrize("name", ["../../etc/x", "/etc/x", "a/../../x", "./../x"])
def test_names_that_point_out_of_their_folder(tar_path: Path, name: str) -> None:
    assert reasons(write(tar_path, whole("0"), whole(name), whole("2"))) == ["0", f"{name}: unsafe_member", "2"]


def test_two_dots_within_a_name_are_safe(tar_path: Path) -> None:
    assert reasons(write(tar_path, whole("a..b/0"), whole(".../0"))) == ["a..b/0", ".../0"]


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"V"],
)
def test_members_that_are_no_plain_files(tar_path: Path, kind: bytes) -> None:
    special = member("1.jpg", type=kind, linkname="/etc/passwd")
    write(tar_path, whole("0"), special, member("1.txt", b"t"), whole("2"))
    assert reasons(tar_path) == ["0", "1: unsafe_member", "2"]


def test_a_link_has_no_data_whatever_its_size_says(tar_path: Path) -> None:
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname, link.size = tarfile.SYMTYPE, "x" * 200, 5000
    write(tar_path, whole("0"), link.tobuf(tarfile.GNU_FORMAT), whole("2"))
    assert reasons(tar_path) == ["0", "1: unsafe_member", "2"]


def test_sparse_files_are_passed_over_whole(tar_path: Path) -> None:
    header = bytearray(member("1.jpg", size=512, type=tarfile.GNUTYPE_SPARSE))
    header[482] = 1  # the map goes on in one more block
    old = with_checksum(header) + bytes(BLOCK) + b"x" * BLOCK
    pax = member("GNUSparseFile.1/2.jpg", b"1\n0\n5\n" + b"x" * 700, tarfile.PAX_FORMAT, pax_headers=SPARSE)
    write(tar_path, whole("0"), old, pax, whole("3"))
    assert reasons(tar_path) == ["0", "1: unsafe_member", "2: unsafe_member", "3"]


SPARSE = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "2.jpg", "GNU.sparse.realsize": "5"}


def test_members_over_the_limit_are_not_read(tar_path: Path) -> None:
    write(tar_path, whole("0"), whole("1", b"x" * 2001), whole("2", caption="x" * 101), whole("3", b"x" * 2000))
    items = reasons(tar_path, max_image_bytes=2000, max_text_bytes=100)
    assert items == ["0", "1: oversized_member", "2: oversized_member", "3"]


def test_an_oversized_member_takes_no_memory(tar_path: Path) -> None:
    size = 300 * 2**20
    with open(tar_path, "wb") as file:
        file.write(member("0.jpg", size=size))
        file.seek(size, 1)  # a hole on the disk
        file.write(member("0.txt", b"t") + whole("1") + END)
    tracemalloc.start()
    items = reasons(tar_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert items == ["0: oversized_member", "1"]
    assert peak < 8 * 2**20


def test_the_first_fault_is_the_reason(tar_path: Path) -> None:
    link = member("0.png", type=tarfile.SYMTYPE, linkname="x")
    write(tar_path, member("0.txt", b"\xff"), link, member("0.txt", b"t"), member("0.jpg", b"i"))
    assert reasons(tar_path) == ["0: unsafe_member"]


# ----------------------------------------------------------------------------------------------------- damaged tars


def with_checksum(header: bytes | bytearray) -> bytes:
    """The 512-byte header with its checksum made right."""
    block = bytearray(header)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


CUTS = {
    "in the next header": whole("1") + member("2.jpg")[:300],
    "in a member's data": whole("1")[: 4 * BLOCK - 500],
    "in a member's padding": whole("1")[:-1],
    "between two members": member("1.jpg", b"i"),
    "between two members, the first of which is the text": member("1.txt", b"t"),
    "after a pax header": whole("1") + member("é" * 200 + ".jpg", fmt=tarfile.PAX_FORMAT)[:1024],
    "in a pax header": whole("1") + member("é" * 200 + ".jpg", fmt=tarfile.PAX_FORMAT)[:700],
    "in a long name": whole("1") + member("x" * 600 + ".jpg")[:1100],
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS.keys())
def test_cut_tars(tar_path: Path, cut: bytes) -> None:
    write(tar_path, whole("0"), cut, end=b"")
    assert reasons(tar_path) == ["0", "1: truncated_tar"]


def bad_header(position: int, value: int) -> bytes:
    header = bytearray(member("2.jpg"))
    assert header[position] != value
    header[position] = value
    return bytes(header)


DAMAGED = {
    "a byte of a name": bad_header(0, 0x33),
    "a byte of a size": bad_header(130, 0x37),
    "a byte of a checksum": bad_header(150, 0x37),
    "a hole of one block": bytes(BLOCK) + whole("2")[BLOCK:],
    "a hole of many blocks": bytes(20 * BLOCK) + whole("2")[BLOCK:],
    "random bytes": random.Random(0).randbytes(BLOCK),
    "a negative size": member("2.jpg", size=-1024),
    "a huge size": member("2.txt.gz", size=2**70),
    "a negative long name": member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=-512),
    "a huge long name": member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2**40),
    "a huge pax header": member("pax", type=tarfile.XHDTYPE, size=2**70),
    "a pax header before the end": member("pax", b"12 path=a.b\n", type=tarfile.XHDTYPE),
    "a pax record too long": member("pax", b"99 path=a.b\n", type=tarfile.XHDTYPE) + whole("2"),
    "a pax record too short": member("pax", b"11 path=a.b\n", type=tarfile.XHDTYPE) + whole("2"),
    "a pax record of length 0": member("pax", b"0 path=a.b\n", type=tarfile.XHDTYPE) + whole("2"),
    "a pax record without =": member("pax", b"12 path_a.b\n", type=tarfile.XHDTYPE) + whole("2"),
    "a pax record of digits": member("pax", b"1" * 2**20, type=tarfile.XHDTYPE) + whole("2"),
    "a negative pax size": member("pax", b"12 size=-99\n", type=tarfile.XHDTYPE) + whole("2"),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_tars(tar_path: Path, damage: bytes) -> None:
    """The group in hand is rejected; where the damaged member opened a group of its own, that one is.

    Behind a hole between two members no group is known: the group in hand is whole, and what follows is one reject.
    """
    write(tar_path, whole("0"), whole("1"), damage)
    expected = [["0", "1: truncated_tar"], ["0", "1", "2: truncated_tar"]]
    assert reasons(tar_path) in ([["0", "1", ": truncated_tar"]] if damage.startswith(bytes(BLOCK)) else expected)


ENDS = {
    "no end blocks": b"",
    "in the first end block": bytes(100),
    "after one end block": bytes(BLOCK),
    "in the second end block": bytes(2 * BLOCK - 1),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS.keys())
def test_a_tar_whose_end_alone_is_cut_keeps_its_last_sample(tar_path: Path, end: bytes) -> None:
    """GNU tar lists it whole. Without any zeros, more may have followed: it is marked as incomplete."""
    contents = Contents()
    items = read_tar(write(tar_path, whole("0"), whole("1"), end=end), contents=contents)
    assert [(item.key, type(item)) for item in items] == [("0", Sample), ("1", Sample)]
    assert contents.incomplete == ("" if end else "the file ends without the two blocks of zeros that end a tar")


def test_a_last_sample_that_lacks_what_the_others_have_is_no_sample(tar_path: Path) -> None:
    json_ = member("0.json", b"{}")
    assert reasons(write(tar_path, whole("0"), json_, whole("1"), end=b"")) == ["0", "1: truncated_tar"]
    assert reasons(write(tar_path, whole("0"), json_, whole("1"))) == ["0", "1"]


def test_what_follows_the_end_is_one_reject(tar_path: Path) -> None:
    write(tar_path, whole("0"), whole("1"), END + bytes(3 * 2**20) + b"<html>")
    assert reasons(tar_path) == ["0", "1", ": truncated_tar"]


@pytest.mark.parametrize("zeros", [BLOCK, 2 * BLOCK, 10240])
def test_tars_joined_by_cat(tar_path: Path, zeros: int) -> None:
    """All whole members are kept. A key that is in both tars cannot be in the data set twice."""
    write(tar_path, whole("0"), whole("1"), bytes(zeros), whole("2"), whole("1"), bytes(zeros), whole("3"))
    assert reasons(tar_path) == ["0", "1", "2", "1: duplicate_key", "3"]


def test_members_do_not_join_over_the_end_of_a_tar(tar_path: Path) -> None:
    write(tar_path, whole("a"), member("0.jpg", b"i"), END, member("0.txt", b"t"), whole("1"))
    assert reasons(tar_path) == ["a", "0: no_caption", "0: members_apart", "1"]


def test_a_tar_of_zeros(tar_path: Path) -> None:
    """As a download leaves it that reserved its space first."""
    contents = Contents()
    assert list(read_tar(write(tar_path, end=bytes(2**20)), contents=contents)) == []
    assert contents.incomplete == "it holds no sample"


# ------------------------------------------------------------------------------------------------- tars in disorder


@pytest.mark.parametrize("count", [2, 6, 500])
def test_all_pictures_first(tar_path: Path, count: int) -> None:
    """One reject that says how to mend it, instead of two for each sample."""
    keys = [f"{n:03d}" for n in range(count)]
    write(tar_path, *(member(f"{k}.jpg", b"i") for k in keys), *(member(f"{k}.txt", b"t") for k in keys))
    (item,) = read_tar(tar_path)
    assert isinstance(item, Reject) and (item.key, item.reason) == ("000", "unsorted_tar")
    assert "members of a key must be neighbours" in item.detail and "tar --sort=name" in item.detail


@pytest.mark.parametrize("seed", range(20))
def test_members_in_any_order(tar_path: Path, seed: int) -> None:
    """As `tar cf x.tar .` takes them from a folder."""
    members = [member(f"{n:02d}.{e}", b'{"a": 1}') for n in range(33) for e in ("jpg", "txt", "json")]
    random.Random(seed).shuffle(members)
    items = list(read_tar(write(tar_path, *members)))
    assert items[-1].reason == "unsorted_tar"
    assert len(items) < 20 and all(isinstance(item, Sample) or item.reason != "duplicate_key" for item in items)


def test_members_that_were_appended(tar_path: Path) -> None:
    """As `tar --append` does: the others are kept."""
    write(tar_path, whole("0"), member("1.jpg", b"i"), whole("2"), member("1.txt", b"t"), member("0.json", b"{}"))
    assert reasons(tar_path) == ["0", "1: no_caption", "2", "1: members_apart", "0: members_apart"]


def test_a_tar_without_captions_is_not_in_disorder(tar_path: Path) -> None:
    assert reasons(write(tar_path, member("0.jpg", b"i"), member("1.jpg", b"i"))) == ["0: no_caption", "1: no_caption"]


def test_rejects_wait_for_the_first_whole_sample_in_their_order(tar_path: Path) -> None:
    write(tar_path, member("0.jpg", b"i"), member("1.txt", b"t"), whole("2"), member("3.jpg", b"i"))
    assert reasons(tar_path) == ["0: no_caption", "1: no_image", "2", "3: no_caption"]
    held = read_tar(tar_path, hold=False)
    assert next(held).key == "0"


# ------------------------------------------------------------------------------------- what the samples have


def test_contents_are_counted(tar_path: Path) -> None:
    metadata = {"prompt": "a dog", "url": "https://x", "alt": None, "tags": ["a red dog", "b"], "n": 3, "exif": "{}"}
    whole_ = member("1.jpg", b"i") + member("1.json", json.dumps(metadata).encode()) + member("1.caption", b"c")
    contents = Contents()
    items = list(read_tar(write(tar_path, whole("0"), whole_, member("2.gif", b"i")), contents=contents))
    assert contents.samples == 3
    assert contents.members == {".jpg": 2, ".txt": 1, ".json": 1, ".caption": 1, ".gif": 1}
    assert contents.fields == dict.fromkeys(metadata, 1)
    assert contents.texts == {".txt": 1, ".caption": 1, "prompt": 1, "tags": 1}
    assert contents.proposals() == ["prompt", ".caption", ".txt", "tags"]
    assert items[0].caption_field == ".txt"
    assert items[1].detail == (
        "no txt, and no 'caption' in a json; there is 'prompt', 'url', 'alt', 'tags', 'n', 'exif', .jpg, .json, .caption; "
        "texts: --captions .caption or prompt or tags"
    )
    assert items[2].detail == "no member jpg, jpeg, png, webp; there is 2.gif"


def test_a_text_member_of_another_name(tar_path: Path) -> None:
    write(tar_path, member("0.jpg", b"i"), member("0.caption", b"\xef\xbb\xbfa dog"))
    (sample,) = read_tar(tar_path, CaptionChoice.parse(".caption"))
    assert (sample.caption, sample.caption_field) == ("a dog", ".caption")
    write(tar_path, member("0.jpg", b"i"), member("0.caption", b"\xff"))
    assert reasons(tar_path, captions=CaptionChoice.parse(".caption")) == ["0: caption_not_utf8"]


def test_a_json_of_many_fields_is_not_kept(tar_path: Path) -> None:
    contents, fields = Contents(), {f"{'k' * 50}{n}": "a b c" for n in range(10_000)}
    list(read_tar(write(tar_path, whole("0"), member("0.json", json.dumps(fields).encode())), contents=contents))
    assert len(contents.fields) == len(contents.texts) - 1 + 1 == 100


def test_a_backward_size_does_not_loop(tar_path: Path) -> None:
    """`tarfile` goes round for ever on this one (CVE-2025-8194)."""
    write(tar_path, member("0.jpg"), member("0.txt"), member("1.jpg", size=-2 * BLOCK))
    assert reasons(tar_path) == ["0: truncated_tar"]


def test_ten_thousand_headers_in_a_chain(tar_path: Path) -> None:
    """`tarfile` recurses once for each."""
    write(tar_path, *[member("pax", b"12 comment=\n", type=tarfile.XHDTYPE)] * 10_000, whole("0"))
    assert reasons(tar_path) == ["0"]


def test_damage_before_the_first_group(tar_path: Path) -> None:
    write(tar_path, member("./", type=tarfile.DIRTYPE), b"x" * BLOCK)
    assert reasons(tar_path) == [": truncated_tar"]


def test_a_read_error_says_nothing_about_the_tar(tar_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failing(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            if self.tell() > 6 * BLOCK:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr(tars, "open_tar", lambda path: Failing(path, "rb"))
    items = read_tar(write(tar_path, whole("0"), whole("1"), whole("2")))
    assert next(items).key == "0"
    with pytest.raises(OSError, match=r"00000\.tar cannot be read at byte \d+: Input/output error"):
        list(items)


# ---------------------------------------------------------------------------------------------------- files at fault


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.tar: no such file; give the path"):
        read_tar(tmp_path / "absent.tar")
    for url in (f"pipe:touch {tmp_path}/hacked", f"simplecache::file://{tmp_path}/hacked", "ssh://host/a.tar"):
        with pytest.raises(ValueError, match="commands are never run"):
            read_tar(url)
    assert not list(tmp_path.iterdir())


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no regular file"):
        read_tar(tmp_path)


@pytest.mark.parametrize("data", [b"", b"x", b"<html>" * 1000, whole("0")[:400], bytes(100)])
def test_no_tar(tar_path: Path, data: bytes) -> None:
    tar_path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.tar: is no tar file .*; fetch or write it again") as error:
        read_tar(tar_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("name", ["0.tar", "0.tar.gz"])  # by their content, whatever they are called
def test_packed_tars(tmp_path: Path, name: str, pack: Callable[[bytes], bytes]) -> None:
    samples = make_samples(30)
    data = write_webdataset(tmp_path / "plain", samples).read_bytes()
    path = tmp_path / name
    path.write_bytes(pack(data))
    assert list(read_tar(path)) == samples
    path.write_bytes(pack(data[:20_000]) + pack(data[20_000:]))  # as pigz and `cat` make them
    assert list(read_tar(path)) == samples
    for cut in (0.5, 0.9) if pack is not bz2.compress else ():  # which unpacks blocks of 900 kB alone
        path.write_bytes(pack(data)[: int(len(pack(data)) * cut)])
        items = list(read_tar(path))
        check_arithmetic(items)
        assert items[-1].reason == "truncated_tar" and "packed file is cut" in items[-1].detail
        assert items[:-1] == samples[: len(items) - 1] and len(items) > 5


def test_a_packed_tar_with_a_flipped_byte(tmp_path: Path) -> None:
    samples, path = make_samples(30), tmp_path / "0.tgz"
    packed = bytearray(gzip.compress(write_webdataset(tmp_path / "plain", samples).read_bytes()))
    packed[-6] ^= 1  # of its checksum, which is known at the end
    path.write_bytes(packed)
    contents = Contents()
    items = list(read_tar(path, contents=contents))
    assert items[:-1] == samples and items[-1].reason == "truncated_tar" and "CRC" in contents.incomplete


@pytest.mark.parametrize(("magic", "words"), [(b"PK\x03\x04", "zip"), (b"\x28\xb5\x2f\xfd", "zstd")])
def test_other_archives_are_named(tar_path: Path, magic: bytes, words: str) -> None:
    tar_path.write_bytes(magic + bytes(2000))
    with pytest.raises(ValueError, match=f"is packed by {words}; unpack it"):
        read_tar(tar_path)


def test_a_name_that_looks_compressed(tar_path: Path) -> None:
    assert reasons(write(tar_path, whole("BZh"))) == ["BZh"]


def test_expected_samples(tar_path: Path) -> None:
    stats = tar_path.with_name("00000_stats.json")
    assert expected_samples(tar_path) is None
    stats.write_text(json.dumps({"count": 100, "successes": 71, "failed_to_download": 29}))
    assert expected_samples(tar_path) == 71
    assert expected_samples(str(tar_path)) == 71
    for text in ("", "{", "[]", "{}", '{"successes": "71"}', '{"successes": -1}', '{"successes": true}', "[" * 200_000):
        stats.write_text(text)
        with pytest.raises(ValueError, match=r"00000_stats\.json: states no count"):
            expected_samples(tar_path)


# -------------------------------------------------------------------------------------------------------------- fuzz


def layout(path: Path) -> list[tuple[str, int, int, int]]:
    """(key, start of the headers, start of the data, end of the data) of each member."""
    with tarfile.open(path) as file:
        return [(split_name(m.name)[0], m.offset, m.offset_data, m.offset_data + m.size) for m in file]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Sample], bytes, list[tuple[str, int, int, int]]]:
    path = tmp_path_factory.mktemp("fuzz") / "healthy.tar"
    samples = make_samples(12, seed=1)
    write_webdataset(path, samples)
    assert list(read_tar(path)) == samples
    return samples, path.read_bytes(), layout(path)


def check_arithmetic(items: list[Sample | Reject]) -> None:
    """What holds for every tar: documented reasons, damage last, and no group in two pieces."""
    rejects = [item for item in items if isinstance(item, Reject)]
    assert len(rejects) + sum(isinstance(item, Sample) for item in items) == len(items)
    assert {reject.reason for reject in rejects} <= set(REJECT_REASONS)
    assert all(reject is items[-1] for reject in rejects if reject.reason == "truncated_tar")
    assert all(a.key != b.key for a, b in itertools.pairwise(items))


@pytest.mark.parametrize("seed", range(70))
def test_fuzz_cuts(tar_path: Path, healthy: tuple, seed: int) -> None:
    samples, data, members = healthy
    cut = random.Random(seed).randrange(BLOCK, members[-1][3] + 3 * BLOCK)
    tar_path.write_bytes(data[:cut])
    items = list(read_tar(tar_path))
    check_arithmetic(items)
    end = -(-members[-1][3] // BLOCK) * BLOCK
    if cut >= end:
        assert items == samples
        return
    # A group is begun with its first whole header; the last one begun is the one in hand.
    begun = list(dict.fromkeys(key for key, _, data_start, _ in members if data_start <= cut))
    assert items[:-1] == samples[: max(len(begun) - 1, 0)]
    assert (items[-1].key, items[-1].reason) == (begun[-1] if begun else "", "truncated_tar")


@pytest.mark.parametrize("seed", range(70))
def test_fuzz_flips_in_headers(tar_path: Path, healthy: tuple, seed: int) -> None:
    samples, data, members = healthy
    rng = random.Random(seed)
    index = rng.randrange(1, len(members))
    position = members[index][2] - BLOCK + rng.choice([*range(148), *range(156, BLOCK)])
    damaged = bytearray(data)
    damaged[position] ^= rng.randrange(1, 256)
    tar_path.write_bytes(damaged)
    items = list(read_tar(tar_path))
    check_arithmetic(items)
    begun = list(dict.fromkeys(key for key, *_ in members[:index]))
    assert items[:-1] == samples[: len(begun) - 1]
    assert (items[-1].key, items[-1].reason) == (begun[-1], "truncated_tar")


@pytest.mark.parametrize("seed", range(70))
def test_fuzz_flips_anywhere(tar_path: Path, healthy: tuple, seed: int) -> None:
    """Tars have no checksum over data: a flip there may give another image or caption, but never other neighbours."""
    samples, data, members = healthy
    rng = random.Random(seed)
    positions = sorted(rng.randrange(BLOCK, len(data)) for _ in range(rng.choice([1, 1, 3, 10])))
    damaged = bytearray(data)
    for position in positions:
        damaged[position] ^= rng.randrange(1, 256)
    tar_path.write_bytes(damaged)
    items = list(read_tar(tar_path))
    check_arithmetic(items)
    # A group is out once the header of the next one is read.
    begun = dict.fromkeys(key for key, _, data_start, _ in members if data_start <= positions[0])
    finished = max(len(begun) - 1, 0)
    assert items[:finished] == samples[:finished]
    if all(any(start <= p < end for _, _, start, end in members) for p in positions):
        assert [item.key for item in items] == [sample.key for sample in samples]


@pytest.mark.parametrize("seed", range(70))
def test_fuzz_hostile_headers(tar_path: Path, healthy: tuple, seed: int) -> None:
    """Headers with wrong fields and right checksums: what no accident makes."""
    samples, data, members = healthy
    rng = random.Random(seed)
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 2, 5])):
        start = members[rng.randrange(1, len(members))][2] - BLOCK
        field = rng.choice([slice(0, 100), slice(124, 136), slice(156, 157), slice(156, 157), slice(345, 500)])
        value = rng.randbytes(field.stop - field.start)
        if field.start == 156:
            value = rng.choice([b"0", b"1", b"2", b"5", b"7", b"L", b"K", b"S", b"V", b"g", b"x", b"X", b"D"])
        elif rng.random() < 0.5:
            value = rng.choice([b"%011o\0" % rng.randrange(10**6), b"\xff" * 12, b"\x80" + bytes(6) + b"\xff" * 5])[
                : field.stop - field.start
            ].ljust(field.stop - field.start, b"\0")
        damaged[start : start + BLOCK][field] = value
        block = damaged[start : start + BLOCK]
        block[field] = value
        damaged[start : start + BLOCK] = with_checksum(block)
    tar_path.write_bytes(damaged)
    items = list(read_tar(tar_path))
    check_arithmetic(items)
    assert len(items) <= len(members)
    assert items[0].key == samples[0].key


def test_gzip_of_nothing(tar_path: Path) -> None:
    tar_path.write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="is no tar file"):
        read_tar(tar_path)
