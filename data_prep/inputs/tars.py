"""Reader of webdataset tars: a tar in, its samples out. The first step of data prep.

In the order of the code:

1. Interface. `read_tar` walks a tar as img2dataset writes it (`00000.jpg`, `00000.txt`, `00000.json`, `00001.jpg`
   and so on) and yields, for each group of neighbouring members that share a key, exactly one `Sample` or one `Reject`
   with a reason of the fixed set `REJECT_REASONS`. So `read = written + dropped` can be checked to the last sample.
2. `_TarStream` reads the 512-byte blocks of the tar forwards, without seeking.
3. `_Group` collects the members of one key and decides: sample or reject. One group is in memory at a time; what grows
   with the tar is only the set of the keys seen.

Members are grouped by webdataset's rule: the key is the folder and the base name up to its *first* dot, the rest is the
extension (`a/b.c/000.seg.jpg` is the member `seg.jpg` of the key `a/b.c/000`), compared in lower case. Members that
have no key by this rule (folders, names without an extension, and, unlike in webdataset, all dot files) are skipped.

webdataset's own reader is not used: it takes a cut tar or a bad header for the end, and returns the current sample with
only the members read so far. Plain streaming with the standard library's `tarfile` is sounder. Of `tarfile` this file
takes the header decoder (`TarInfo.frombuf`: fields, checksum) and walks the blocks itself, because `TarFile.next()` too
takes a bad header for the end, loops for ever on a negative size (CVE-2025-8194), guesses where a pax record is damaged
and keeps every header in memory. Here a tar ends where two blocks of zeros and nothing else follow; every other end is
damage, and is reported.

A damaged tar yields every group that was finished before the damage, as the whole tar would. Then comes one last item,
`Reject(key, "truncated_tar", where and what)`, for the current group: even if that group looks whole, its next member may lie
behind the damage. Without a current group its key is "". Nothing behind the damage is read. Each item counts as one read, this
last one as one read and one dropped, so the sum still holds; the number of samples behind the damage is known only from
`expected_samples`. A file that cannot be read (a broken connection, a bad disk) says nothing about the tar, and raises OSError.

Nothing is unpacked to disk, no name is opened as a path or run, and no member is unpickled.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, get_args

from data_prep.common.storage import Unreachable, is_remote, open_tar
from data_prep.inputs.captions import CaptionChoice

# ---- 1. interface ----

RejectReason = Literal[
    "no_image",  # no member jpg, jpeg, png or webp
    "no_caption",  # none of the wanted ones: neither `key.txt` nor a text or number in a field of `key.json`
    "empty_caption",  # only white space
    "caption_not_utf8",  # `key.txt` is not UTF-8
    "bad_json",  # `key.json` is no JSON object in UTF-8, or nested too deeply, or with a number of too many digits
    "duplicate_key",  # the key was seen before, with others in between: the members of one sample must be neighbours
    "duplicate_member",  # two images, two txt or two json of one key
    "unsafe_member",  # a link, a device, a sparse file, or a name that is absolute or climbs by `..`
    "oversized_member",  # an image or a text over its limit; it is not read into memory
    "truncated_tar",  # the group in hand where the tar is cut or damaged; always the last item
]
REJECT_REASONS: tuple[str, ...] = get_args(RejectReason)

DEFAULT_CAPTION = CaptionChoice()
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Sample:
    """Sample of a tar: texts are decoded, the picture is not.

    `caption` has more than white space, and is unchanged. `metadata` is the object of `key.json`, `{}`
    without one. Bytes of a member's name that are not UTF-8 stand in `key` as `\\xNN`.
    """

    key: str
    image: bytes
    caption: str
    metadata: dict


@dataclass(frozen=True)
class Reject:
    """Group that gives no sample, with the reason (from `read_tar` one of `REJECT_REASONS`), and a detail for people."""

    key: str
    reason: str
    detail: str


def read_tar(
    path: str | Path,
    captions: CaptionChoice = DEFAULT_CAPTION,
    *,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Iterator[Sample | Reject]:
    """Yields each sample group of a plain, uncompressed tar once, in the tar's order.

    `captions` chooses the caption. `path` may be a URL that data_prep/common/storage.py takes.

    Raises, at the call: FileNotFoundError if there is no such file; ValueError if the file is compressed or no tar.
    Later damage raises nothing and is the last item, a `truncated_tar`. At any time: OSError if the file cannot be read.
    """
    _check_first_block(str(path))
    return _read_groups(str(path), captions, max_image_bytes, max_text_bytes)


def expected_samples(path: str | Path) -> int | None:
    """Returns the number of samples that img2dataset wrote: `successes` of `00000_stats.json` beside `00000.tar`.


    None without that file. Raises ValueError where the file does not state it.
    """
    stats = Path(path).with_name(Path(path).stem + "_stats.json")
    if not stats.is_file():
        return None
    try:
        successes = json.loads(stats.read_bytes())["successes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        successes = None
    if type(successes) is not int or successes < 0:
        raise ValueError(f"{stats}: states no count `successes`; delete it, or write this shard again with img2dataset")
    return successes


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name by webdataset's rule: key, extension in lower case; the key is "" where it has none."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot:
        return "", ""
    return folder + slash + stem, extension.lower()


def _read_groups(
    path: str, captions: CaptionChoice, max_image_bytes: int, max_text_bytes: int
) -> Iterator[Sample | Reject]:
    seen: set[str] = set()
    group: _Group | None = None
    with open_tar(path) as file:
        tar = _TarStream(file)
        try:
            while (member := tar.next_member()) is not None:
                key, extension = split_name(member.name)
                if not key:
                    continue
                if group is not None and group.key != key:
                    yield group.outcome(captions)
                    group = None
                if group is None:
                    group = _Group(key, max_image_bytes, max_text_bytes)
                    if key in seen:
                        group.reject("duplicate_key", "the key was seen before, with other keys in between")
                    seen.add(key)
                group.add(member, extension, tar)
        except TarError as damage:
            yield Reject(group.key if group is not None else "", "truncated_tar", str(damage))
            return
    if group is not None:
        yield group.outcome(captions)


_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


def _check_first_block(path: str) -> None:
    if not is_remote(path):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file; give the path or the URL of a tar")
        if not Path(path).is_file():
            raise ValueError(f"{path}: is no regular file; give the path of one tar")
    with open_tar(path) as file:
        block = file.read(tarfile.BLOCKSIZE)
    if block == _ZEROS:  # a tar without members
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        for magic, compression in _COMPRESSED.items():
            if block.startswith(magic):
                raise ValueError(f"{path}: is {compression}-compressed; unpack it to a plain .tar first") from error
        raise ValueError(f"{path}: is no tar file ({error}); fetch or write it again, or leave it out") from error


# ---- 2. stream of members ----

_ZEROS = bytes(tarfile.BLOCKSIZE)
_CHUNK_BYTES = 2**20
_MAX_EXTENSION_BYTES = 2**20  # most bytes of a long name or a pax header; some hundred in practice
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = b"123456"  # types of links, devices, folders and pipes: no data follows, whatever the size field says


class TarError(Exception):
    """Damage of a tar, which cannot be read further; the message says where and why."""


@dataclass(frozen=True)
class _Member:
    """Member of a tar: its full name, the size of its data, and its kind where it is not a plain file (else "")."""

    name: str
    size: int
    special: str


class _TarStream:
    """Reader of members, one by one and forwards. Raises `TarError` where the tar is not whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0  # bytes read so far
        self._left = 0  # bytes of the current member's data and padding that are not read yet
        self._global_pax: dict[bytes, bytes] = {}

    def next_member(self) -> _Member | None:
        """Returns the next member, or None at the end of a whole tar; skips unread data of the last member."""
        while self._left:
            self._left -= len(self._read(min(self._left, _CHUNK_BYTES), "the data of a member"))
        pax: dict[bytes, bytes] = {}
        long_name = b""
        extended = False
        while (header := self._header()) is not None:
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._extension(header).partition(b"\0")[0]
            elif header.type == tarfile.GNUTYPE_LONGLINK:
                self._extension(header)  # where a link points to is of no interest
            elif header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax |= _pax_records(self._extension(header), self._offset)
            elif header.type == tarfile.XGLTYPE:
                self._global_pax |= _pax_records(self._extension(header), self._offset)
            else:
                return self._member(header, long_name, self._global_pax | pax)
            extended = True
        if extended:
            raise TarError(f"a long name or pax header without its member before byte {self._offset}")
        self._check_end()
        return None

    def read_data(self, member: _Member) -> bytes:
        """Returns all data of the member that `next_member` returned last."""
        data = self._read(member.size, f"the data of {member.name!r}")
        self._left -= member.size
        return data

    def _header(self) -> tarfile.TarInfo | None:
        """Reads the next header block and checks its checksum; None for a block of zeros."""
        offset = self._offset
        block = self._read(tarfile.BLOCKSIZE, "a header, without the two blocks of zeros that end a tar")
        if block == _ZEROS:
            return None
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise TarError(f"no tar header at byte {offset}: {error}") from error
        if header.size < 0:
            raise TarError(f"a negative size in the header at byte {offset}")
        if header.type == tarfile.GNUTYPE_SPARSE and block[482]:  # the map of its holes goes on in further blocks
            while self._read(tarfile.BLOCKSIZE, "the map of a sparse file")[504]:
                pass
        return header

    def _extension(self, header: tarfile.TarInfo) -> bytes:
        """Reads the data of a header that extends the header after it."""
        if header.size > _MAX_EXTENSION_BYTES:
            raise TarError(f"a long name or pax header of {header.size} bytes before byte {self._offset}")
        return self._read(_padded(header.size), "a long name or pax header")[: header.size]

    def _member(self, header: tarfile.TarInfo, long_name: bytes, pax: dict[bytes, bytes]) -> _Member:
        name = _text(long_name) if long_name else header.name
        name = _text(pax[b"path"]) if b"path" in pax else name
        size = _decimal(pax[b"size"], self._offset) if b"size" in pax else header.size
        special = "" if header.type in _PLAIN_FILES else f"a link, device or the like (type {header.type!r})"
        if header.type in _WITHOUT_DATA:
            size = 0
        if any(keyword.startswith(b"GNU.sparse.") for keyword in pax):
            name = _text(pax.get(b"GNU.sparse.name", name.encode()))
            special = "a sparse file"
        self._left = _padded(size)
        return _Member(name, size, special)

    def _check_end(self) -> None:
        """Checks that a second block of zeros follows the first, and only zeros up to the end of the file."""
        offset = self._offset - tarfile.BLOCKSIZE
        if self._read(tarfile.BLOCKSIZE, "the second of the two blocks of zeros that end a tar") != _ZEROS:
            raise TarError(f"a lone block of zeros at byte {offset}: a hole in the data")
        while chunk := self._read_up_to(_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise TarError(f"data after the end of the tar at byte {offset}: a hole, or several tars in one file")

    def _read(self, size: int, what: str) -> bytes:
        data = self._read_up_to(size)
        if len(data) < size:
            raise TarError(f"the file ends at byte {self._offset}, in {what}")
        return data

    def _read_up_to(self, size: int) -> bytes:
        """Reads `size` bytes, fewer only at the end of the file."""
        try:
            data = self._file.read(size)
        except Unreachable:  # its message is complete
            raise
        except OSError as error:
            where = f"{getattr(self._file, 'name', 'the tar')} cannot be read at byte {self._offset}"
            raise OSError(error.errno, f"{where}: {error.strerror or error}") from error
        self._offset += len(data)
        return data


def _pax_records(data: bytes, end: int) -> dict[bytes, bytes]:
    """Returns the records `<length> <keyword>=<value>\\n` before byte `end` of the tar; length counts the whole record."""
    records = {}
    start = 0
    while start < len(data):
        digits = data[start : start + 20].partition(b" ")[0]
        stop = start + _decimal(digits, end)
        keyword, equals, value = data[start + len(digits) + 1 : stop - 1].partition(b"=")
        if not equals or data[stop - 1 : stop] != b"\n":
            raise TarError(f"a broken pax header before byte {end}")
        records[keyword] = value
        start = stop
    return records


def _decimal(digits: bytes, end: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise TarError(f"a broken number in the pax header before byte {end}")
    return int(digits)


def _padded(size: int) -> int:
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


# ---- 3. sample or reject ----


class _Group:
    """Members of one key. The first problem is the reason of the reject; after it no more data is kept."""

    def __init__(self, key: str, max_image_bytes: int, max_text_bytes: int) -> None:
        self.key = key
        self._limits = {"image": max_image_bytes, "txt": max_text_bytes, "json": max_text_bytes}
        self._parts: dict[str, bytes] = {}
        self._rejected: Reject | None = None

    def reject(self, reason: RejectReason, detail: str) -> None:
        self._rejected = self._rejected or Reject(self.key, reason, detail)
        self._parts.clear()

    def add(self, member: _Member, extension: str, tar: _TarStream) -> None:
        """Reads the member's data from `tar` if the sample needs it."""
        part = "image" if extension in IMAGE_EXTENSIONS else extension
        if member.special:
            self.reject("unsafe_member", f"{member.name!r} is {member.special}")
        elif member.name.startswith("/") or ".." in member.name.split("/"):
            self.reject("unsafe_member", f"{member.name!r} points out of its folder")
        elif part not in self._limits or self._rejected is not None:
            return
        elif part in self._parts:
            self.reject("duplicate_member", f"{member.name!r} is the second {part} of its key")
        elif member.size > self._limits[part]:
            self.reject("oversized_member", f"{member.name!r}: {member.size} bytes, limit {self._limits[part]}")
        else:
            self._parts[part] = tar.read_data(member)

    def outcome(self, captions: CaptionChoice) -> Sample | Reject:
        """Returns sample or reject, once all members are added."""
        if self._rejected is not None:
            return self._rejected
        if "image" not in self._parts:
            return Reject(self.key, "no_image", f"no member {', '.join(IMAGE_EXTENSIONS)}")
        try:
            metadata = _json_object(self._parts.get("json", b"{}"))
        except (ValueError, RecursionError) as error:
            return Reject(self.key, "bad_json", str(error))
        txt = self._parts.get("txt") if captions.reads_txt else None
        try:
            caption = captions.pick(self.key, None if txt is None else txt.decode("utf-8-sig"), metadata)
        except UnicodeDecodeError as error:
            return Reject(self.key, "caption_not_utf8", str(error))
        if caption is None:
            wanted = " or ".join(repr(name) for name, _ in captions.shares) or "txt, and no 'caption' in a json"
            return Reject(self.key, "no_caption", f"no {wanted}")
        if not caption.strip():
            return Reject(self.key, "empty_caption", "only white space")
        return Sample(self.key, self._parts["image"], caption, metadata)


def _json_object(data: bytes) -> dict:
    """Parses the JSON object in `data`. Raises ValueError or RecursionError."""
    value = json.loads(data.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises at escapes such as \ud800: no UTF-8 text holds them
    return value
