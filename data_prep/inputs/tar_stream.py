"""Stream of a tar's members: reads the 512-byte blocks forwards, without seeking, and finds every kind of damage.

webdataset's own reader is not used: it takes a cut tar or a bad header for the end, and returns the current sample with
only the members read so far. Plain streaming with the standard library's `tarfile` is sounder. Of `tarfile` this file
takes the header decoder (`TarInfo.frombuf`: fields, checksum) and walks the blocks itself, because `TarFile.next()` too
takes a bad header for the end, loops for ever on a negative size (CVE-2025-8194), guesses where a pax record is damaged
and keeps every header in memory. Here a tar ends where two blocks of zeros and nothing else follow; every other end is
damage, and is reported.
"""

import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.common.storage import Unreachable

ZERO_BLOCK = bytes(tarfile.BLOCKSIZE)
_CHUNK_BYTES = 2**20
_MAX_EXTENSION_BYTES = 2**20  # most bytes of a long name or a pax header; some hundred in practice
_PLAIN_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = b"123456"  # types of links, devices, folders and pipes: no data follows, whatever the size field says


class TarError(Exception):
    """Damage of a tar, which cannot be read further; the message says where and why."""


@dataclass(frozen=True)
class Member:
    """Member of a tar: its full name, the size of its data, and its kind where it is not a plain file (else "")."""

    name: str
    size: int
    special: str


class TarStream:
    """Reader of members, one by one and forwards. Raises `TarError` where the tar is not whole."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._offset = 0  # bytes read so far
        self._left = 0  # bytes of the current member's data and padding that are not read yet
        self._global_pax: dict[bytes, bytes] = {}

    def next_member(self) -> Member | None:
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

    def read_data(self, member: Member) -> bytes:
        """Returns all data of the member that `next_member` returned last."""
        data = self._read(member.size, f"the data of {member.name!r}")
        self._left -= member.size
        return data

    def _header(self) -> tarfile.TarInfo | None:
        """Reads the next header block and checks its checksum; None for a block of zeros."""
        offset = self._offset
        block = self._read(tarfile.BLOCKSIZE, "a header, without the two blocks of zeros that end a tar")
        if block == ZERO_BLOCK:
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

    def _member(self, header: tarfile.TarInfo, long_name: bytes, pax: dict[bytes, bytes]) -> Member:
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
        return Member(name, size, special)

    def _check_end(self) -> None:
        """Checks that a second block of zeros follows the first, and only zeros up to the end of the file."""
        offset = self._offset - tarfile.BLOCKSIZE
        if self._read(tarfile.BLOCKSIZE, "the second of the two blocks of zeros that end a tar") != ZERO_BLOCK:
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
