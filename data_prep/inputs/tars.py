"""Reader of webdataset tars: a tar in, its samples out. The first step of data prep.

In the order of the code:

1. Interface. `read_tar` walks a tar as img2dataset writes it (`00000.jpg`, `00000.txt`, `00000.json`, `00001.jpg`
   and so on) and yields, for each group of neighbouring members that share a key, exactly one `Sample` or one `Reject`
   with a reason of the fixed set `REJECT_REASONS`. So `read = written + dropped` can be checked to the last sample.
2. `_Group` collects the members of one key and decides: sample or reject. One group is in memory at a time; what grows
   with the tar is only the set of the keys seen.

Members are grouped by webdataset's rule: the key is the folder and the base name up to its *first* dot, the rest is the
extension (`a/b.c/000.seg.jpg` is the member `seg.jpg` of the key `a/b.c/000`), compared in lower case. Members that
have no key by this rule (folders, names without an extension, and, unlike in webdataset, all dot files) are skipped.

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
from typing import Literal, get_args

from data_prep.common.storage import is_remote, open_tar
from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.tar_stream import ZERO_BLOCK, Member, TarError, TarStream

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
    "truncated_tar",  # the current group where the tar is cut or damaged; always the last item
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
        tar = TarStream(file)
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
    if block == ZERO_BLOCK:  # a tar without members
        return
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "replace")
    except tarfile.HeaderError as error:
        for magic, compression in _COMPRESSED.items():
            if block.startswith(magic):
                raise ValueError(f"{path}: is {compression}-compressed; unpack it to a plain .tar first") from error
        raise ValueError(f"{path}: is no tar file ({error}); fetch or write it again, or leave it out") from error


# ---- 2. sample or reject ----


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

    def add(self, member: Member, extension: str, tar: TarStream) -> None:
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
