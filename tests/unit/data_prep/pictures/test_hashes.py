"""data_prep/pictures/hashes.py: hashes of one picture in many files and of different pictures, and `repeats` by brute force."""

import io
import subprocess
import sys
from itertools import combinations

import matplotlib.cbook
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageEnhance

from data_prep.pictures import hashes as duplicates
from data_prep.pictures.hashes import MAX_DISTANCE, exact_hash, perceptual_hash, repeats
from data_prep.pictures.images import Unusable
from data_prep.shapes import Scene, Shape, draw

pytestmark = pytest.mark.timeout(120)

DISTANCES = range(MAX_DISTANCE + 1)


def encode(image: Image.Image, fmt: str = "JPEG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, fmt, **options)
    return buffer.getvalue()


def photographs() -> dict[str, Image.Image]:
    """A portrait of 512 × 600, and nine pictures of 256 × 256 that lie over one another in it."""
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg") as file:
        whole = Image.open(file).convert("RGB")
    corners = [(x, y) for x in (0, 128, 256) for y in (0, 150, 340)]
    return {"whole": whole} | {f"{x},{y}": whole.crop((x, y, x + 256, y + 256)) for x, y in corners}


PHOTOGRAPHS = photographs()


def bits_apart(a: int, b: int) -> int:
    return bin(a ^ b).count("1")


# ------------------------------------------------------------------------------------------------------ the two hashes


def test_the_exact_hash_is_64_bits_of_blake2b():
    """The digests are those of coreutils' `b2sum -l 64`."""
    assert exact_hash(b"") == 0xE4A6A0577479B2B4
    assert exact_hash(b"abc") == 0xD8BB14D833D59559
    assert exact_hash(bytes(10)) != exact_hash(bytes(11))


def test_the_perceptual_hash_against_its_definition():
    """A DCT-II as sums of cosines in floats, row by row from the mean; each bit, highest first: above the others' median?"""
    k, n = np.arange(8), np.arange(32)
    cosines_kn = np.cos(np.pi * k[:, None] * (2 * n + 1) / 64) * np.where(k == 0, 1, 2**0.5)[:, None]
    for image in PHOTOGRAPHS.values():
        small_HW = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0))
        low = np.einsum("vh,uw,hw->vu", cosines_kn, cosines_kn, small_HW.astype(float)).ravel()
        bits = "".join("1" if value > np.sort(low[1:])[31] else "0" for value in low)
        assert perceptual_hash(encode(image, "PNG")) == int(bits, 2)
        assert bits.count("1") == 32


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_the_same_photograph_in_another_file_is_near(name):
    image = PHOTOGRAPHS[name]
    half = image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)
    brightness = ImageEnhance.Brightness(image)
    others = {
        "PNG": encode(image, "PNG"),
        "WebP": encode(image, "WEBP", quality=60),
        "quality 75": encode(image, quality=75),
        "quality 30": encode(image, quality=30),
        "half": encode(half, quality=90),
        "half as PNG": encode(half, "PNG"),
        "double": encode(image.resize((2 * image.width, 2 * image.height)), quality=90),
        "brighter": encode(brightness.enhance(1.08), quality=95),
        "darker": encode(brightness.enhance(0.93), quality=95),
    }
    one = perceptual_hash(encode(image, quality=95))
    assert {what: n for what, data in others.items() if (n := bits_apart(one, perceptual_hash(data))) > 3} == {}


def test_a_photograph_that_is_turned_by_its_exif_has_the_hash_of_the_upright():
    image = PHOTOGRAPHS["whole"]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    turned = encode(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert perceptual_hash(turned) == perceptual_hash(encode(image, "PNG"))


def test_different_pictures_are_far_apart():
    """The photographs, of which many share half their pixels, and drawings that differ in more than their colours."""
    drawings = {
        f"{shape} {x} {y}": draw(Scene((Shape(shape, "red", x, y, 0.2),), "white", ""), 256)
        for shape, x, y in [
            ("circle", 0.3, 0.25),
            ("circle", 0.7, 0.3),
            ("square", 0.35, 0.75),
            ("triangle", 0.7, 0.65),
        ]
    }
    hashes = {name: perceptual_hash(encode(image)) for name, image in (PHOTOGRAPHS | drawings).items()}
    apart = {f"{a} and {b}": bits_apart(hashes[a], hashes[b]) for a, b in combinations(hashes, 2)}
    assert {pair: n for pair, n in apart.items() if n <= MAX_DISTANCE} == {}


def test_plain_pictures_have_no_random_bits():
    plain = [Image.new("RGB", (300, 200), colour) for colour in ("white", "red", (7, 90, 200), (1, 1, 1))]
    assert {perceptual_hash(encode(image)) for image in plain} == {1 << 63}
    assert perceptual_hash(encode(Image.new("RGB", (1, 2000)), "PNG")) == 0


def test_a_damaged_file_has_no_perceptual_hash():
    data = encode(PHOTOGRAPHS["whole"])
    with pytest.raises(Unusable, match="broken_image"):
        perceptual_hash(data[: len(data) // 2])


def test_a_child_process_loads_no_torch():
    code = "import sys, data_prep.pictures.hashes; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --------------------------------------------------------------------------------------------------------- the repeats


def brute_force(hashes: np.ndarray, distance: int) -> list[int]:
    ones_N64 = np.unpackbits(hashes.view(np.uint8).reshape(-1, 8), axis=1).astype(np.float32)
    signs_N64 = 2 * ones_N64 - 1
    near_NN = (64 - signs_N64 @ signs_N64.T) / 2 <= distance
    return [int(row[:i].argmax()) if row[:i].any() else -1 for i, row in enumerate(near_NN)]


def flip(rng: np.random.Generator, hash_: int, bits: int) -> int:
    return hash_ ^ sum(1 << int(n) for n in rng.choice(64, bits, replace=False))


def planted(rng: np.random.Generator, count: int = 1500) -> np.ndarray:
    """Half of them drawn, half copies of any earlier one (and so also of copies: chains) with up to 10 bits flipped."""
    hashes = [int(h) for h in rng.integers(0, 2**64, count // 2, dtype=np.uint64)]
    while len(hashes) < count:
        hashes.append(flip(rng, hashes[rng.integers(len(hashes))], int(rng.integers(11))))
    return rng.permutation(np.array(hashes, dtype=np.uint64))


def subspace(rng: np.random.Generator, bits: list[int], count: int) -> np.ndarray:
    """`count` different hashes that differ in `bits` alone."""
    values = rng.choice(2 ** len(bits), count, replace=False).astype(np.uint64)
    spread = sum(((values >> np.uint64(n)) & np.uint64(1)) << np.uint64(bit) for n, bit in enumerate(bits))
    return spread ^ rng.integers(0, 2**64, dtype=np.uint64)


def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """All sorts of hashes; those from `sparse` on have more than 1024 different ones, and so runs that are split."""
    few = planted(rng, 40)
    clusters = [subspace(rng, list(range(11)), 1100), subspace(rng, list(range(50, 61)), 1100), planted(rng, 300)]
    return {
        "empty": np.empty(0, dtype=np.uint64),
        "one": np.array([0], dtype=np.uint64),
        "all equal": np.full(700, 2**64 - 1, dtype=np.uint64),
        "two values": rng.choice(np.array([0, 0b111], dtype=np.uint64), 300),
        "few values": rng.choice(few, 900),
        "sparse": planted(rng),
        "bits side by side": subspace(rng, list(range(20, 33)), 1500),
        "bits here and there": subspace(rng, [0, 3, 4, 11, 17, 30, 31, 32, 40, 47, 55, 56, 62, 63], 1500),
        "a whole subspace": subspace(rng, list(range(11)), 2048),
        "clusters": rng.permutation(np.concatenate(clusters)),
        "clusters with equal ones": rng.choice(np.concatenate(clusters), 3500),
    }


INPUTS = inputs(np.random.default_rng(0))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", INPUTS)
def test_repeats_against_brute_force(name, distance):
    hashes = INPUTS[name]
    before = hashes.copy()
    found = repeats(hashes, distance)
    assert found.dtype == np.int64
    assert found.tolist() == brute_force(hashes, distance)
    assert (hashes == before).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("name", ["sparse", "clusters"])
def test_repeats_with_small_chunks_and_many_splits(name, distance, monkeypatch):
    monkeypatch.setattr(duplicates, "_CHUNK", 37)
    monkeypatch.setattr(duplicates, "_LONG", 2)
    monkeypatch.setattr(duplicates, "_SORT", 1)
    depth = deepest = 0
    search = duplicates._search

    def watched(*args: object) -> None:
        nonlocal depth, deepest
        depth += 1
        deepest = max(deepest, depth)
        search(*args)
        depth -= 1

    monkeypatch.setattr(duplicates, "_search", watched)
    hashes = INPUTS[name][:500]
    assert repeats(hashes, distance).tolist() == brute_force(hashes, distance)
    if distance > 0:
        assert deepest >= 2 + (name == "clusters")  # else there was nothing to see


def test_a_chain_is_dropped_but_for_its_first():
    chain = np.array([0b0000, 0b0011, 0b1111, 0b0000], dtype=np.uint64)
    assert repeats(chain, 2).tolist() == [-1, 0, 1, 0]
    assert repeats(chain, 1).tolist() == [-1, -1, -1, 0]


@pytest.mark.parametrize("distance", [1, 3, 8])
def test_repeats_among_many(distance):
    """300,000 random hashes, of which by chance no two are near (the odds are below 1 in 100 at distance 3), and copies."""
    rng = np.random.default_rng(distance)
    drawn = 300_000 if distance < 8 else 30_000
    originals = rng.integers(0, 2**64, drawn, dtype=np.uint64)
    of = rng.choice(drawn, drawn // 10, replace=False)
    apart = rng.integers(0, distance + 3, len(of))
    copies = np.array([flip(rng, int(originals[i]), int(n)) for i, n in zip(of, apart, strict=True)], dtype=np.uint64)
    expected = np.concatenate([np.full(drawn, -1), np.where(apart <= distance, of, -1)])
    assert (repeats(np.concatenate([originals, copies]), distance) == expected).all()


@pytest.mark.parametrize("distance", DISTANCES)
def test_what_does_not_hang_on_the_order(distance):
    """Whether a hash has any near one, and at distance 0 which hashes are left over."""
    hashes = INPUTS["few values"] ^ np.tile(np.array([0, 1, 2**40], dtype=np.uint64), 300)

    def has_any(some: np.ndarray) -> np.ndarray:
        return (repeats(some, distance) >= 0) | (repeats(some[::-1], distance)[::-1] >= 0)

    order = np.random.default_rng(5).permutation(len(hashes))
    assert (has_any(hashes[order]) == has_any(hashes)[order]).all()
    if distance == 0:
        kept, kept_then = (h[repeats(h, 0) < 0] for h in (hashes, hashes[order]))
        assert sorted(kept.tolist()) == sorted(kept_then.tolist()) == sorted(set(hashes.tolist()))


@pytest.mark.parametrize("distance", [-1, 9, 64, 2.5, "3", None])
def test_refuses_a_distance_out_of_range(distance):
    with pytest.raises(ValueError, match=r"distance .* is .*; expected a whole number of 0 to 8$") as refusal:
        repeats(np.zeros(3, dtype=np.uint64), distance)
    assert "\n" not in str(refusal.value)
