"""Samples and rejects: what becomes of the members of a key, or of a row of a Parquet file.

`Members` collects what belongs to one key and decides: sample or reject, with a reason of the fixed set `REJECT_REASONS`. So
`read = written + dropped` can be checked to the last sample, whatever the samples come from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from data_prep.inputs.captions import CaptionChoice
from data_prep.inputs.contents import Contents, texts_of, with_nested

RejectReason = Literal[
    "no_image",  # no member jpg, jpeg, png or webp
    "no_caption",  # none of the wanted ones: no text member, and no text or number in a field
    "empty_caption",  # only white space
    "caption_not_utf8",  # a text member, or a text of a row, is not UTF-8
    "bad_json",  # `key.json` is no JSON object in UTF-8, or nested too deeply, or with a number of too many digits
    "duplicate_key",  # the key was seen before, with a picture, and others in between
    "members_apart",  # members of a key that lie apart from its others, in a tar whose members are neighbours elsewhere
    "duplicate_member",  # two images, two txt or two json of one key
    "unsafe_member",  # a link, a device, a sparse file, or a name that is absolute or climbs by `..`
    "oversized_member",  # an image or a text over its limit; it is not read into memory
    "unsorted_tar",  # the members of the keys lie apart; always the last item, as the tar is not read further
    "truncated_tar",  # the current group where the tar is cut or damaged; always the last item
    "damaged_rows",  # a row of a Parquet file's row group that cannot be read
]
REJECT_REASONS: tuple[str, ...] = get_args(RejectReason)

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MAX_IMAGE_BYTES = 256 * 2**20
MAX_TEXT_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Sample:
    """Sample: texts are decoded, the picture is not.

    `caption` has more than white space, and is unchanged; `caption_field` is where it stood: `.txt` or a field. `metadata` is
    the object of `key.json`, or the other columns of a row, `{}` without any, and has fields within fields as `a.b`, too. Bytes
    of a name that are not UTF-8 stand in `key` as `\\xNN`.
    """

    key: str
    image: bytes
    caption: str
    metadata: dict
    caption_field: str = field(default="", compare=False)


@dataclass(frozen=True)
class Reject:
    """Group that gives no sample, with the reason (one of `REJECT_REASONS`, where it was read), and a detail for people."""

    key: str
    reason: str
    detail: str


class Members:
    """Members of one key. The first problem is the reason of the reject; after it no more data is kept."""

    def __init__(
        self, key: str, captions: CaptionChoice, max_image: int = MAX_IMAGE_BYTES, max_text: int = MAX_TEXT_BYTES
    ):
        self.key, self._captions = key, captions
        self._limits = {"image": max_image, "json": max_text, **dict.fromkeys(captions.members, max_text)}
        self._parts: dict[str, bytes] = {}
        self._rejected: Reject | None = None
        self.extensions: dict[str, None] = {}  # in their order

    @property
    def has_image(self) -> bool:
        """True where one of the members is a picture."""
        return any(extension in IMAGE_EXTENSIONS for extension in self.extensions)

    def reject(self, reason: RejectReason, detail: str) -> None:
        """Makes the sample a reject, unless it is one for an earlier reason."""
        self._rejected = self._rejected or Reject(self.key, reason, detail)
        self._parts.clear()

    def wants(self, name: str, extension: str, size: int) -> bool:
        """Counts a member; returns whether its data is needed: `keep` then takes it."""
        self.extensions[extension] = None
        part = "image" if extension in IMAGE_EXTENSIONS else extension
        if part not in self._limits or self._rejected is not None:
            return False
        if part in self._parts:
            self.reject("duplicate_member", f"{name!r} is the second {part} of its key")
        elif size > self._limits[part]:
            self.reject("oversized_member", f"{name!r}: {size} bytes, limit {self._limits[part]}")
        else:
            return True
        return False

    def keep(self, extension: str, data: bytes) -> None:
        """Keeps the data of a member that is wanted."""
        self._parts["image" if extension in IMAGE_EXTENSIONS else extension] = data

    def outcome(self, contents: Contents, more: Mapping[str, Any] | None = None) -> Sample | Reject:
        """Returns sample or reject, once all members are added. `more` are fields beside those of the json."""
        try:
            metadata, broken = with_nested({**(more or {}), **_json_object(self._parts.get("json", b"{}"))}), ""
        except (ValueError, RecursionError) as error:
            metadata, broken = {}, str(error)
        contents.add(self.extensions, metadata)
        if self._rejected is not None:
            return self._rejected
        if "image" not in self._parts:
            there = ", ".join(f"{self.key.rpartition('/')[2]}.{extension}" for extension in self.extensions)
            dots = any(extension.rpartition(".")[2] in IMAGE_EXTENSIONS for extension in self.extensions)
            mend = "; in a tar a key ends at the first dot" if dots else ""
            return Reject(
                self.key, "no_image", f"no member {', '.join(IMAGE_EXTENSIONS)}; there is {there[:200]}{mend}"
            )
        if broken:
            return Reject(self.key, "bad_json", broken)
        try:
            texts = {f".{e}": self._parts[e].decode("utf-8-sig") for e in self._captions.members if e in self._parts}
        except UnicodeDecodeError as error:
            return Reject(self.key, "caption_not_utf8", str(error))
        members = [f".{extension}" for extension in self.extensions]
        return make_sample(self.key, self._parts["image"], texts, metadata, self._captions, members)


def make_sample(
    key: str,
    image: bytes,
    texts: Mapping[str, str],
    fields: dict[str, Any],
    captions: CaptionChoice,
    members: list[str],
) -> Sample | Reject:
    """Returns the sample with the caption that is chosen among its text members and fields, or a reject where it has none."""
    caption = captions.pick(key, texts, fields)
    if caption is None:
        return Reject(key, "no_caption", f"{_wanted(captions)}; {_there(members, fields)}")
    text = caption.text.strip()  # files end with a line break, which is no part of a caption
    if not text:
        return Reject(key, "empty_caption", f"only white space in {caption.field}")
    return Sample(key, image, text, fields, caption.field)


def _wanted(captions: CaptionChoice) -> str:
    names = " or ".join(repr(name) for name, _ in captions.shares)
    return f"no {names}" if names else "no txt, and no 'caption' in a json"


def _there(members: list[str], fields: Mapping[str, Any]) -> str:
    """Says which fields and members a sample without its caption has, and which of them could be the caption."""
    names = [*(f"'{name[:40]}'" for name in fields), *members]
    there = f"there is {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "there are no fields"
    texts = texts_of(members, {name: value for name, value in fields.items() if len(name) <= 40})
    return there + (f"; texts: --captions {' or '.join(texts[:4])}" if texts else "")


def _json_object(data: bytes) -> dict:
    """Parses the JSON object in `data`. Raises ValueError or RecursionError."""
    value = json.loads(data.decode("utf-8-sig"))
    if not isinstance(value, dict):
        raise ValueError(f"not an object but a {type(value).__name__}")
    json.dumps(value, ensure_ascii=False).encode("utf-8")  # raises at escapes such as \ud800: no UTF-8 text holds them
    return value
