"""Stream of a tar's members: reads the 512-byte blocks forwards, without seeking, and finds every kind of damage.

webdataset's own reader is not used: it takes a cut tar or a bad header for the end, and returns the current sample with
only the members read so far. Plain streaming with the standard library's `tarfile` is sounder. Of `tarfile` this file
takes the header decoder (`TarInfo.frombuf`: fields, checksum) and walks the blocks itself, because `TarFile.next()` too
takes a bad header for the end, loops for ever on a negative size (CVE-2025-8194), guesses where a pax record is damaged
and keeps every header in memory. docs/choices.md has tars that show it.

Where blocks of zeros end a tar and another one follows (`cat a.tar b.tar`), that is read on, as by `tar --ignore-zeros`. A tar
whose last member is whole but that does not end in zeros is not `ended`: who reads it decides what its last members are worth.
Any other end is damage, and is reported.
"""

import tarfile
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.common.storage import Unreachable

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
    """Reader of members, one by one and forwards. Raises `TarError` where the tar is damaged.

    `ends` counts the ends by blocks of zeros that were read; `ended` is true where the last thing that was read is such an end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.ends, self.ended = 0, False
        self._file = file
        self._ahead = b""  # bytes that were read already, and come next
        self._offset = 0  # bytes read so far, without those ahead
        self._left = 0  # bytes of the current member's data and padding that are not read yet
        self._global_pax: dict[bytes, bytes] = {}

    def next_member(self) -> Member | None:
        """Returns the next member, or None where none follows; skips unread data of the last member."""
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
            self.ended = False
            raise TarError(f"a long name or pax header without its member before byte {self._offset}")
        return self.next_member() if self._ahead else None

    def read_data(self, member: Member) -> bytes:
        """Returns all data of the member that `next_member` returned last."""
        data = self._read(member.size, f"the data of {member.name!r}")
        self._left -= member.size
        return data

    def _header(self) -> tarfile.TarInfo | None:
        """Reads the next header block and checks its checksum; None where the file ends, or zeros end a tar."""
        offset, after_end = self._offset, self.ended
        block = self._read_up_to(tarfile.BLOCKSIZE)
        if not block.strip(b"\0"):
            if block:
                self._skip_zeros()
            return None
        if len(block) < tarfile.BLOCKSIZE:
            raise TarError(f"the file ends at byte {self._offset}, in a header")
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            what = "data after the end of the tar" if after_end else f"no tar header ({error})"
            raise TarError(f"{what} at byte {offset}") from error
        self.ended = False
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

    def _skip_zeros(self) -> None:
        """Reads on to the first block that is not all zeros, and keeps it ahead."""
        self.ends, self.ended, self._global_pax = self.ends + 1, True, {}
        while chunk := self._read_up_to(tarfile.RECORDSIZE):
            if rest := chunk.lstrip(b"\0"):
                zeros = (len(chunk) - len(rest)) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
                self._ahead = chunk[zeros:]
                self._offset -= len(self._ahead)
                return

    def _read(self, size: int, what: str) -> bytes:
        data = self._read_up_to(size)
        if len(data) < size:
            raise TarError(f"the file ends at byte {self._offset}, in {what}")
        return data

    def _read_up_to(self, size: int) -> bytes:
        """Reads `size` bytes, fewer only at the end of the file."""
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        try:
            data += self._file.read(size - len(data)) if len(data) < size else b""
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
