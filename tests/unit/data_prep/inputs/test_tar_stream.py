"""The stream of members against the standard library's tarfile; test_tars.py has every kind of damage."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from data_prep.inputs.tar_stream import Member, TarError, TarStream

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


def member(name: str, data: bytes = b"", **fields: object) -> bytes:
    """One member as bytes: header, data, padding."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.GNU_FORMAT) + data + bytes(-len(data) % BLOCK)


def stream(*parts: bytes) -> TarStream:
    return TarStream(io.BytesIO(b"".join(parts)))


@pytest.mark.parametrize("fmt", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path: Path, fmt: int) -> None:
    """Names and data as the standard library reads them, in every format a tar may have."""
    tar_path = tmp_path / "0.tar"
    names = ["a.jpg", "a.txt", "dir.v1/b.seg.png", "x" * 90 + ".jpg", f"{'d' * 80}/{'e' * 80}/c.json"]
    if fmt != tarfile.USTAR_FORMAT:
        names += ["z" * 300 + ".jpg", f"{'y' * 500}/d.txt", "日本語/" + "語" * 60 + ".jpg"]
    rng = random.Random(0)
    with tarfile.open(tar_path, "w", format=fmt, pax_headers={"comment": "global"}) as file:
        for name in names:
            data = rng.randbytes(rng.choice([0, 1, 511, 512, 513, 5000]))
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    with tarfile.open(tar_path) as file:
        expected = [(info.name, file.extractfile(info).read()) for info in file]
    with open(tar_path, "rb") as file:
        stream = TarStream(file)
        found = [(m.name, stream.read_data(m)) for m in iter(stream.next_member, None)]
    assert found == expected
    assert [name for name, _ in found] == names


def test_unread_data_is_skipped() -> None:
    tar = stream(member("a", b"x" * 1500), member("b", b"y"), END)
    assert tar.next_member() == Member("a", 1500, "")
    assert tar.next_member() == Member("b", 1, "")
    assert tar.next_member() is None


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_what_is_no_plain_file_is_named(kind: bytes) -> None:
    """Its size field says nothing: the next header follows at once."""
    tar = stream(member("a", type=kind, size=700), member("b", b"y"), END)
    found = tar.next_member()
    assert found is not None and found.name == "a" and found.size == 0
    assert found.special == f"a link, device or the like (type {kind!r})"
    assert tar.next_member() == Member("b", 1, "")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (b"x", "the file ends at byte 1025, in a header"),
        (b"x" * BLOCK, r"no tar header \(.*\) at byte 1024"),
        (bytes(BLOCK) + b"x" * BLOCK, "data after the end of the tar at byte 1536"),
        (END + b"x" * BLOCK, "data after the end of the tar at byte 2048"),
        (END + bytes(10240) + b"x", "the file ends at byte 12289, in a header"),
        (member("b", size=-512), "a negative size in the header at byte 1024"),
        (member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=2**40), "pax header of 1099511627776 bytes"),
        (member("pax", b"99 path=a.b\n", type=tarfile.XHDTYPE), "a broken pax header before byte 2048"),
    ],
)
def test_damage_says_where_it_is(rest: bytes, words: str) -> None:
    tar = stream(member("a", b"x"), rest)
    assert tar.next_member() is not None
    with pytest.raises(TarError, match=words):
        tar.next_member()


@pytest.mark.parametrize("zeros", [1, BLOCK, 2 * BLOCK, 2 * BLOCK + 1, 3 * 2**20])
def test_zeros_end_a_tar(zeros: int) -> None:
    tar = stream(member("a", b"x"), bytes(zeros))
    assert tar.next_member() is not None and not tar.ended
    assert tar.next_member() is None
    assert tar.ended and tar.ends == 1


def test_a_tar_that_does_not_end_in_zeros() -> None:
    tar = stream(member("a", b"x"))
    assert tar.next_member() is not None and tar.next_member() is None
    assert not tar.ended and tar.ends == 0


@pytest.mark.parametrize("zeros", [BLOCK, 2 * BLOCK, 10240, 3 * 2**20])
def test_tars_one_after_the_other(zeros: int) -> None:
    """As `tar --ignore-zeros --list` lists them; what a global header sets holds for its own tar."""
    named = member("pax", b"16 path=renamed\n", type=tarfile.XGLTYPE)
    tar = stream(named, member("a", b"x"), bytes(zeros), member("b", b"y"), bytes(zeros))
    found = [(found.name, tar.read_data(found), tar.ends) for found in iter(tar.next_member, None)]
    assert found == [("renamed", b"x", 0), ("b", b"y", 1)]
    assert tar.ended and tar.ends == 2
