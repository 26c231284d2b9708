"""Hashes of pictures, and the search for repeated pictures among the hashes of all tars.

In the order of the code:

1. `exact_hash` is equal for files that are equal byte for byte, `perceptual_hash` nearly equal for pictures that look
   the same: at another size, quality or format, a little brighter or darker. Both are 64 bits and need only the file,
   so processes can hash tars in any order.
2. `repeats` names, for each hash, the first earlier one that is near. The caller passes the hashes in a fixed order (tar,
   then place in the tar), so the answer does not depend on which tar was hashed first.
3. `_search` finds the near pairs among many millions of hashes without comparing them all, and without missing any.

Every picture with a near one before it is dropped, even where the earlier one is dropped, too. So of a chain A, B, C, in
which only neighbours are near, A alone is kept. Keeping C as well, as B is gone, would make each answer depend on all
earlier ones.

Shapes: N hashes, H height, W width, V and U frequencies down and across.
"""

import hashlib
from dataclasses import dataclass
from itertools import combinations, count
from math import comb

import numpy as np
from PIL import Image

from data_prep.pictures.images import cut, decode

MAX_DISTANCE = 8  # of 64 bits; beyond it different pictures count as equal

# ---- 1. hashes ----

_SIDE, _LOW = 32, 8
# DCT-II, orthonormal up to a factor of 2^14, [U, W]. With whole numbers the hash is the same on every machine, and what should be
# zero is exactly zero: a plain picture, without frequencies, has no random bits.
_COSINES = np.cos(np.pi / _SIDE * np.outer(np.arange(_LOW), np.arange(_SIDE) + 0.5)) * (2 / _SIDE) ** 0.5
_COSINES[0] *= 0.5**0.5
_COSINES = np.round(_COSINES * 2**14).astype(np.int64)


def exact_hash(data: bytes) -> int:
    """Returns 64 bits of the file's BLAKE2b. Among 140 million different files 5e-4 pairs are expected to be equal by chance."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def perceptual_hash(data: bytes) -> int:
    """Returns 64 bits of the picture's look ("pHash"): which of its 8 × 8 lowest frequencies are above their median.

    The picture is first squeezed to a grey square of 32 pixels: colours, fine detail and format are not seen. The mean
    brightness (the highest bit) is left out of the median, which halves the other 63. So nearly all hashes have 32 ones,
    and their distances are even: 3 finds hardly more than 2. All plain pictures have one hash (the black: 0). Of drawings
    with much symmetry many frequencies are nearly 0, and their bits chance: another file of one may be missed.

    Raises `Unusable`, as `decode`.
    """
    grey = decode(data).convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pixels_HW = np.asarray(grey).astype(np.int64)
    low_VU = _COSINES @ pixels_HW @ _COSINES.T
    bits = low_VU.ravel() > np.median(low_VU.ravel()[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@dataclass(frozen=True)
class PictureHash:
    """Hash of a picture, and the size of the upright picture in pixels."""

    hash: int
    width: int
    height: int


def hash_picture(data: bytes, method: str, resolutions: tuple[int, ...], buckets: bool) -> PictureHash:
    """Hashes a picture by a method: exact | perceptual. Raises `Unusable` where `cut` would."""
    # A picture is usable if its smallest cut can be made.
    whole = cut(data, (min(resolutions),), buckets)
    value = exact_hash(data) if method == "exact" else perceptual_hash(data)
    return PictureHash(value, whole.width, whole.height)


# ---- 2. repeats ----


def repeats(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Returns int64 [N]: for each i of `hashes` (uint64 [N]) the least j < i within `distance` bits, else -1.

    The search is exact. 140 million random hashes take one core 1.5 minutes and 7 GB at distance 0, 12 minutes and 13 GB at 3,
    half a day at 8 (extrapolated). Hashes that lie close together take longer.
    """
    if distance not in range(MAX_DISTANCE + 1):
        raise ValueError(f"distance between duplicates is {distance!r}; expected a whole number of 0 to {MAX_DISTANCE}")
    assert hashes.dtype == np.uint64 and hashes.ndim == 1, (hashes.dtype, hashes.shape)
    if len(hashes) == 0:
        return np.empty(0, dtype=np.int64)
    found = _first_equal(hashes)
    if distance > 0:
        # Only the first of equal hashes is searched for; the result holds for the others, too.
        first = np.flatnonzero(found == np.arange(len(hashes)))
        best = np.arange(len(first))
        _search(hashes[first], np.arange(len(first)), np.uint64(0), distance, best)
        nearest = found.copy()
        nearest[first] = first[best]
        found = nearest[found]
    found[found == np.arange(len(hashes))] = -1
    return found


def _first_equal(hashes: np.ndarray) -> np.ndarray:
    """Returns int64 [N]: for each hash the least index with the same one, which may be its own."""
    order = np.argsort(hashes)
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    del ordered  # each of these arrays is a GB for 140 million hashes
    first = np.empty(len(hashes), dtype=np.int64)
    first[order] = np.repeat(np.minimum.reduceat(order, starts), np.diff(starts, append=len(hashes)))
    return first


# ---- 3. search ----

_LONG = 1024  # in runs of up to this many hashes all pairs are compared
_CHUNK = 2**18  # hashes that are compared together, for the processor's cache
_SORT = 20  # cost of sorting a hash, in comparisons of two hashes


def _search(h: np.ndarray, ids: np.ndarray, mask: np.uint64, distance: int, best: np.ndarray) -> None:
    """Lowers `best[b]` to a for all a < b of `ids` whose hashes `h` are near and agree in the bits of `mask`.

    The hashes `h` all differ, and are ordered so that those which agree in `mask` form a run. All pairs of a short run are
    compared. Long runs are split by the pigeonhole principle: of distance + k blocks of bits, two near hashes differ in at most
    `distance` and so agree in some k. For each choice of k blocks, the hashes that agree in these too are the new runs.
    """
    split = _in_long_runs(h, mask)
    choices = _choices(h[split], mask, distance) if split.any() else []
    if not choices:
        split[:] = False
    for begin in range(0, len(h), _CHUNK):
        i = begin + np.flatnonzero(~split[begin : begin + _CHUNK])
        for offset in count(1):
            i = i[: np.searchsorted(i, len(h) - offset)]
            differing = h[i] ^ h[i + offset]
            same_run = (differing & mask) == 0
            i, differing = i[same_run], differing[same_run]
            if len(i) == 0:
                break
            for _ in range(distance):
                differing &= differing - np.uint64(1)  # the lowest one becomes a zero
            near = i[differing == 0]
            a, b = ids[near], ids[near + offset]
            np.minimum.at(best, np.maximum(a, b), np.minimum(a, b))
    if choices and not split.all():
        h, ids = h[split], ids[split]
    for more in choices:
        order = np.argsort(h & (mask | more))
        _search(h[order], ids[order], mask | more, distance, best)


def _in_long_runs(h: np.ndarray, mask: np.uint64) -> np.ndarray:
    """Returns bool [N]: which hashes are in a run of more than `_LONG`."""
    starts = np.flatnonzero(np.concatenate([[True], ((h[1:] ^ h[:-1]) & mask) != 0]))
    lengths = np.diff(starts, append=len(h))
    return np.repeat(lengths > _LONG, lengths)


def _choices(h: np.ndarray, mask: np.uint64, distance: int) -> list[np.uint64]:
    """Returns a mask for each choice of k of distance + k blocks, for the k with the least work; none to not split."""
    steps = h[1:] ^ h[:-1]
    inside = (steps & mask) == 0
    varying = int(np.bitwise_or.reduce(steps, where=inside, initial=np.uint64(0)))
    bits = [1 << n for n in range(64) if varying >> n & 1]  # in which hashes of one run differ
    lengths = np.diff(np.flatnonzero(np.concatenate([[True], ~inside, [True]]))).astype(float)
    pairs = (lengths**2).sum() / len(h) / 2  # for each hash

    def work(k: int) -> float:
        return comb(distance + k, k) * (bool(k) * _SORT + pairs / 2 ** (len(bits) * k / (distance + k)))

    k = min(range(max(1, len(bits) - distance + 1)), key=work)
    blocks = [sum(bits[n :: distance + k]) for n in range(distance + k)]
    return [np.uint64(sum(chosen)) for chosen in combinations(blocks, k)] if k else []
