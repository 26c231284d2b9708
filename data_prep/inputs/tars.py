"""Reader of webdataset tars: a tar in, its samples out.

`read_tar` walks a tar as img2dataset writes it (`00000.jpg`, `00000.txt`, `00000.json`, `00001.jpg` and so on), plain or packed
by gzip, bzip2 or xz, and yields, for each group of neighbouring members that share a key, exactly one `Sample` or one
`Reject`. One group is in memory at a time; what grows with the tar is only the keys seen.

Members are grouped by webdataset's rule: the key is the folder and the base name up to its *first* dot, the rest is the
extension (`a/b.c/000.seg.jpg` is the member `seg.jpg` of the key `a/b.c/000`), compared in lower case. Members that
have no key by this rule (folders, names without an extension, and, unlike in webdataset, all dot files) are skipped.

A damaged tar yields every group that was finished before the damage, as the whole tar would. Then comes one last item,
`Reject(key, "truncated_tar", where and what)`, for the current group, as its next member may lie behind the damage. Where the tar
ends, or has a hole, between two members, the current group is kept if it is a sample with all the kinds of members that the
group before it has. Nothing behind the damage is read. Each item counts as one read; the number of samples behind the
damage is known only from `expected_samples`, and `contents.incomplete` says what is missing.

A tar in which the members of the keys lie apart yields `Reject(key, "unsorted_tar", the mend)` as its last item, as soon as more
keys come a second time than there are whole samples. Until the first whole sample, other rejects wait for that: so a tar with
all pictures first is one reject, and not one for each picture.

A file that cannot be read (a broken connection, a bad disk) says nothing about the tar, and raises OSError. Nothing is unpacked
to disk, no name is opened as a path or run, and no member is unpickled.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from webdataset.tariterators import base_plus_ext

from data_prep.common.storage import Unreachable, is_remote, open_file
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents
from data_prep.inputs.samples import MAX_IMAGE_BYTES, MAX_TEXT_BYTES, Members, Reject, RejectReason, Sample
from data_prep.inputs.tar_stream import Member, TarError, TarStream

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SORTED = "members of a key must be neighbours: write the tar again by `tar --sort=name -cf NEW.tar -C FOLDER .`"
DEFAULT_CAPTION = CaptionChoice()


def read_tar(
    path: str | Path,
    captions: CaptionChoice = DEFAULT_CAPTION,
    contents: Contents | None = None,
    *,
    hold: bool = True,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    max_text_bytes: int = MAX_TEXT_BYTES,
) -> Iterator[Sample | Reject]:
    """Yields each sample group of a tar once, in the tar's order.

    `captions` chooses the caption; what the samples have is counted in `contents`. `hold`: rejects wait for the first whole
    sample. `path` may be a URL that data_prep/common/storage.py takes.

    Raises, at the call: FileNotFoundError if there is no such file; ValueError if the file is no tar.
    Later damage raises nothing and is the last item, a `truncated_tar`. At any time: OSError if the file cannot be read.
    """
    _check_first_block(str(path))
    counts = Contents() if contents is None else contents
    return _TarReader(captions, counts, hold, (max_image_bytes, max_text_bytes)).read(str(path))


def expected_samples(path: str | Path) -> int | None:
    """Returns the number of samples that img2dataset wrote: `successes` of `00000_stats.json` beside `00000.tar`.

    None without that file. Raises ValueError where the file does not state it.
    """
    stats = Path(path).with_name(tar_stem(Path(path).name) + "_stats.json")
    if not stats.is_file():
        return None
    try:
        successes = json.loads(stats.read_bytes())["successes"]
    except (ValueError, KeyError, TypeError, RecursionError):
        successes = None
    if type(successes) is not int or successes < 0:
        raise ValueError(f"{stats}: states no count `successes`; delete it, or write this shard again with img2dataset")
    return successes


def tar_stem(name: str) -> str:
    """Returns a tar's name without `.tar`, `.tar.gz` and so on; any other name without its last extension."""
    lower = name.lower()
    suffix = max((s for s in TAR_SUFFIXES if lower.endswith(s)), key=len, default="")
    return name[: -len(suffix)] if suffix else Path(name).stem


def split_name(name: str) -> tuple[str, str]:
    """Splits a member's name by webdataset's rule: key, extension in lower case; the key is "" where it has none."""
    key, extension = base_plus_ext(name)
    if key is None or key.endswith("/"):  # webdataset makes of a dot file in a folder, such as macOS strews, a key
        return "", ""
    return key, extension.lower()


class _TarReader:
    """One pass over a tar: members to groups, groups to samples and rejects."""

    def __init__(self, captions: CaptionChoice, contents: Contents, hold: bool, limits: tuple[int, int]):
        self._captions, self._contents, self._hold, self._limits = captions, contents, hold, limits
        self._pictures: dict[str, bool] = {}  # for each key that was seen, whether its group had a picture
        self._held: list[Reject] = []  # of the groups before the first whole one
        self._whole = 0  # groups with a picture and more
        self._apart = 0  # groups that belong to an earlier one of their key
        self._kinds: set[str] = set()  # of the members of the last whole group

    def read(self, path: str) -> Iterator[Sample | Reject]:
        """Yields the tar's items; the last ones are those that were held back, and a reject of the tar itself."""
        for item in self._items(path):
            yield from self._release(item)
        yield from self._held
        if not self._pictures and not self._contents.incomplete:
            self._contents.incomplete = "it holds no sample"

    def _items(self, path: str) -> Iterator[Sample | Reject]:
        group: Members | None = None
        with open_tar(path) as file:
            tar = TarStream(file)
            try:
                ends = 0
                while (member := tar.next_member()) is not None:
                    key, extension = split_name(member.name)
                    if group is not None and ((key and key != group.key) or tar.ends != ends):
                        yield self._outcome(group)
                        group = None
                        if self._apart > self._whole:
                            return
                    ends = tar.ends
                    if key:
                        group = group or self._begin(key)
                        _add(group, member, extension, tar)
            except TarError as damage:
                yield from self._break_off(group, str(damage), tar.ended, behind=True)
                return
        if not tar.ended:
            end = "the file ends without the two blocks of zeros that end a tar"
            yield from self._break_off(group, end, between=True, behind=False)
        elif group is not None:
            yield self._outcome(group)

    def _begin(self, key: str) -> Members:
        group = Members(key, self._captions, *self._limits)
        if key in self._pictures:
            group.reject("duplicate_key", "the key was seen before, with other keys in between")
        return group

    def _outcome(self, group: Members) -> Sample | Reject:
        """Returns what becomes of a group, once all of its members were read."""
        item, whole = group.outcome(self._contents), group.has_image and len(group.extensions) > 1
        had_picture = self._pictures.get(group.key)
        if had_picture is None:
            self._pictures[group.key] = group.has_image
            self._whole += whole
            self._kinds = set(group.extensions) if whole else self._kinds
        elif not (had_picture and group.has_image):
            self._apart += 1
            reason: RejectReason = "unsorted_tar" if self._apart > self._whole else "members_apart"
            there = ", ".join(f".{extension}" for extension in group.extensions)
            return Reject(group.key, reason, f"{there} of {group.key!r} lies apart from its other members; {SORTED}")
        return item

    def _break_off(self, group: Members | None, damage: str, between: bool, behind: bool) -> Iterator[Sample | Reject]:
        """Yields the last items of a tar that is not whole.

        `between`: the damage is between two members, so that the current group may have all of its own; `behind`: there is
        something behind the damage.
        """
        self._contents.incomplete = damage
        kinds, item = self._kinds, self._outcome(group) if group is not None and between else None
        if group is not None and isinstance(item, Sample) and kinds <= set(group.extensions):
            yield item
            group = None
        if group is not None or behind:
            yield Reject("" if group is None else group.key, "truncated_tar", damage)

    def _release(self, item: Sample | Reject) -> Iterator[Sample | Reject]:
        """Yields an item after those that waited for it, or lets it wait for the first whole group."""
        last = isinstance(item, Reject) and item.reason in ("unsorted_tar", "truncated_tar")
        if self._hold and not last and not self._whole:
            assert isinstance(item, Reject)
            self._held.append(item)
            return
        if isinstance(item, Sample) or item.reason != "unsorted_tar":
            yield from self._held
        self._held.clear()
        yield item


def _add(group: Members, member: Member, extension: str, tar: TarStream) -> None:
    """Adds a member, and reads its data from `tar` if the sample needs it."""
    if member.special:
        group.reject("unsafe_member", f"{member.name!r} is {member.special}")
    elif member.name.startswith("/") or ".." in member.name.split("/"):
        group.reject("unsafe_member", f"{member.name!r} points out of its folder")
    if group.wants(member.name, extension, member.size):
        group.keep(extension, tar.read_data(member))


# ---- the file ----

_PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda file: gzip.GzipFile(fileobj=file, mode="rb"),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ": lzma.LZMAFile,
}
_UNSUPPORTED = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}


class _TarFile:
    """Bytes of a tar, read forwards: those of its file, unpacked where it is packed. Damage of the packing is a `TarError`."""

    def __init__(self, path: str):
        self.name, self._file = path, open_file(path)
        self._head = self._file.read(tarfile.BLOCKSIZE)
        self._unpacked: Any = None
        try:
            tarfile.TarInfo.frombuf(self._head, "utf-8", "replace")
        except tarfile.HeaderError:  # else it is plain, though its first name may begin like a packed file
            opener = next((opener for magic, opener in _PACKED.items() if self._head.startswith(magic)), None)
            self._unpacked = opener and opener(_Rest(self._read))

    def read(self, size: int) -> bytes:
        if self._unpacked is None:
            return self._read(size)
        try:
            return self._unpacked.read(size)
        except (EOFError, zlib.error, lzma.LZMAError) as error:
            raise TarError(f"the packed file is cut or damaged: {error}") from error
        except OSError as error:
            if isinstance(error, Unreachable) or error.errno is not None:
                raise
            raise TarError(f"the packed file is damaged: {error}") from error  # gzip's and bzip2's

    def _read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._file.read(size - len(head)) if len(head) < size else head

    def __enter__(self) -> _TarFile:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@dataclass(frozen=True)
class _Rest:
    """What the standard library's unpackers ask of a file."""

    read: Callable[[int], bytes]


def open_tar(path: str) -> BinaryIO:
    """Opens a tar for reading forwards. Raises FileNotFoundError, or Unreachable for a remote one."""
    return cast("BinaryIO", _TarFile(path))


def _check_first_block(path: str) -> None:
    if not is_remote(path):
        if not Path(path).exists():
            raise FileNotFoundError(f"{path}: no such file; give the path or the URL of a tar")
        if not Path(path).is_file():
            raise ValueError(f"{path}: is no regular file; give the path of one tar")
    with open_tar(path) as file:
        try:
            block = file.read(tarfile.BLOCKSIZE)
        except TarError as error:
            raise ValueError(f"{path}: is no tar file ({error}); fetch it again, or leave it out") from error
    if block and not block.strip(b"\0") and len(block) == tarfile.BLOCKSIZE:  # a tar without members
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        for magic, packing in _UNSUPPORTED.items():
            if block.startswith(magic):
                raise ValueError(f"{path}: is packed by {packing}; unpack it to a plain .tar first") from error
        raise ValueError(f"{path}: is no tar file ({error}); fetch or write it again, or leave it out") from error
