"""Choice of the caption that a sample is stored with: a text beside the picture or a field, named or drawn by weight.

    None                             the default: `key.txt`, or without one the field "caption" (img2dataset writes both)
    ".txt"                           `key.txt` alone; ".caption" is `key.caption`, and so on
    "recaption"                      the field "recaption" of `key.json`, or the column of a Parquet file, alone;
                                     "text.long" is the field "long" of the object "text"
    ["recaption", ".txt"]            one of several, drawn for each sample with equal weights ...
    {"recaption": 0.8, ".txt": 0.2}  ... or with these; on a command line: recaption=0.8,.txt=0.2

A caption is drawn among those that the sample has: a text that is not only white space, or a number. The draw depends on
the sample's key alone, not on the order or number of workers: the name with the least -ln(u)/weight wins, where u in (0, 1)
is a hash of key and name (Efraimidis and Spirakis, 2006). Where a sample lacks one of the captions, the draws among the others
stay as they are, and its share goes to them by their weights. Of a list of texts, one is drawn the same way.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

TXT = ".txt"
MIN_WEIGHT, MAX_WEIGHT = 1e-9, 1e9


@dataclass(frozen=True)
class Caption:
    """Caption, and where it stood: `.txt` or the like for a member, or a field."""

    field: str
    text: str


@dataclass(frozen=True)
class CaptionChoice:
    """Names to draw from, sorted, with their shares, which add up to 1; without names, the default."""

    shares: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, spec: str | Mapping[str, float] | Sequence[str] | None) -> "CaptionChoice":
        """Reads a spec. Raises ValueError where it has no names, a name twice, or a weight out of range."""
        if spec is None:
            return cls()
        pairs = _pairs(spec)
        if not pairs:
            raise _mistake(spec, "names nothing")
        names = [name for name, _ in pairs]
        for name, weight in pairs:
            if not isinstance(name, str) or not name.strip():
                raise _mistake(spec, f"{name!r} is no name")
            if names.count(name) > 1:
                raise _mistake(spec, f"{name!r} stands in it twice")
            if type(weight) not in (int, float) or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise _mistake(
                    spec, f"the weight of {name!r} is {weight!r}, no number from {MIN_WEIGHT:g} to {MAX_WEIGHT:g}"
                )
        total = math.fsum(weight for _, weight in pairs)
        total = 1.0 if math.isclose(total, 1.0) else total  # so that `parse` gives the shares of `setting` unchanged
        return cls(tuple(sorted((name, float(f"{weight / total:.12g}")) for name, weight in pairs)))

    @property
    def setting(self) -> dict[str, float] | None:
        """The spec in a canonical form for JSON, which `parse` takes: equal settings choose the same captions."""
        return dict(self.shares) or None

    @property
    def names(self) -> tuple[str, ...]:
        """Members and fields that captions come from; of the default, `.txt` and "caption"."""
        return tuple(name for name, _ in self.shares) or (TXT, "caption")

    @property
    def members(self) -> tuple[str, ...]:
        """Extensions, without the dot, of the text members that `pick` uses; others need not be UTF-8."""
        return tuple(name[1:].lower() for name in self.names if name.startswith("."))

    def pick(self, key: str, texts: Mapping[str, str], fields: Mapping[str, Any]) -> Caption | None:
        """Returns the caption of the sample `key`: None without any of the named ones, white space if all are blank.

        `texts` are its text members by their names, such as `.txt`.
        """
        found = {
            name: _texts(texts.get(name.lower()) if name.startswith(".") else fields.get(name)) for name in self.names
        }
        usable = {name: [text for text in there if text.strip()] for name, there in found.items()}
        drawn = [pair for pair in self.shares if usable[pair[0]]]
        if drawn:
            name, _ = min(drawn, key=lambda pair: -math.log(_uniform(pair[0], key)) / pair[1])
        else:  # the default, in which a blank `key.txt` hides the field; or all are blank
            name = next((name for name in self.names if found[name]), "")
        if not name:
            return None
        several = usable[name] or found[name]
        return Caption(name, several[max(range(len(several)), key=lambda number: _uniform(f"{name}\0{number}", key))])


def _pairs(spec: Any) -> list[tuple[Any, Any]]:
    """Returns names with weights, which are not checked yet."""
    if isinstance(spec, Mapping):
        return list(spec.items())
    if isinstance(spec, Sequence) and not isinstance(spec, (str, bytes)):
        return [(name, 1.0) for name in spec]
    if not isinstance(spec, str):
        raise _mistake(spec, f"is a {type(spec).__name__}")
    if "=" not in spec and "," not in spec:
        return [(spec.strip(), 1.0)]
    pairs: list[tuple[Any, Any]] = []
    for part in spec.split(","):
        name, equals, weight = part.rpartition("=")
        if not equals:
            raise _mistake(spec, f"{part.strip()!r} has no weight")
        try:
            pairs.append((name.strip(), float(weight)))
        except ValueError:
            pairs.append((name.strip(), weight.strip()))
    return pairs


def _mistake(spec: object, what: str) -> ValueError:
    return ValueError(f"captions {spec!r}: {what}; write a field of the json or {TXT}, or several as a=0.8,{TXT}=0.2")


def _texts(value: object) -> list[str]:
    """Returns the texts of a field: itself, or where it is a list, the texts in it."""
    if isinstance(value, str):
        return [value]
    if type(value) is int or (type(value) is float and math.isfinite(value)):  # pandas' NaN is an absent caption
        return [str(value)]
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _uniform(name: str, key: str) -> float:
    """Hashes name and key to a number within (0, 1), never 0 or 1."""
    digest = hashlib.sha256(f"{name}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return ((int.from_bytes(digest[:8], "big") >> 12) + 0.5) / 2**52
