"""Random numbers: published vectors, distributions, each sample's own, and a fixed number of exactly defined operations."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.diffusion import Draw, captions_dropped, draw, kept_tokens
from pretrain.diffusion.random_numbers import (
    WORD,
    Stream,
    normal_table,
    philox,
    sample_words,
    to_normal,
    to_uniform,
)

CPU = torch.device("cpu")
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
FIELDS = ("posterior_BCHW", "noise_BCHW", "uniform_B", "more_uniform_BX")


# ---- words ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    """Random123's kat_vectors, `philox4x32 10`."""
    words = [torch.tensor([int(word, 16) for word in given.split()]) for given in (counter, key, expected)]
    assert torch.equal(philox(words[0], words[1]), words[2])


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's formula for one counter, on Python's integers."""
    for _ in range(10):
        first, second = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [second >> 32 ^ counter[1] ^ key[0], second & WORD, first >> 32 ^ counter[3] ^ key[1], first & WORD]
        key = [(key[0] + 0x9E3779B9) & WORD, (key[1] + 0xBB67AE85) & WORD]
    return counter


def test_words_of_many_samples() -> None:
    """Each sample's key is its seed's two halves, each counter the number of four words and the stream."""
    seeds = [0, 5, 2**32 + 7, 2**56 - 1, 2**63 - 1]
    for stream in Stream:
        words_BW = sample_words(seeds, 10, stream, CPU)
        for seed, found in zip(seeds, words_BW.tolist(), strict=True):
            key = [seed & WORD, seed >> 32]
            expected = [word for i in range(3) for word in plain_philox([i, 0, 0, int(stream)], key)]
            assert found == expected[:10]


# ---- each sample's own ----


def test_kept_tokens_are_each_samples_own_and_any_choice_is_equally_likely() -> None:
    seeds = [5, 2**40 + 7, *range(100, 4100)]
    kept = kept_tokens(seeds, 6, 4, CPU)
    assert kept.shape == (4002, 4) and (kept.diff(dim=1) > 0).all()
    assert torch.equal(kept_tokens(seeds[1:2], 6, 4, CPU), kept[1:2])
    choices, counts = kept.unique(dim=0, return_counts=True)
    assert len(choices) == 15 and counts.min() > 200 and counts.max() < 335  # 267 each, ± 4.3 standard deviations
    assert torch.equal(kept_tokens([9], 6, 6, CPU), torch.arange(6)[None])


def test_numbers_depend_on_the_seed_alone() -> None:
    """A sample's numbers are the same in any batch, at any place in it, whatever was drawn before and is drawn besides."""
    shape = (3, 4, 5)
    batch = draw([11, 2**40 + 7, 33, 44], torch.Size((4, *shape)), CPU, more=6)
    torch.randn(17)
    turned = draw([44, 11], torch.Size((2, *shape)), CPU, more=6)
    alone = draw([2**40 + 7], torch.Size((1, *shape)), CPU)
    for name in FIELDS:
        whole = getattr(batch, name)
        assert whole.dtype == torch.float32
        assert torch.equal(getattr(turned, name), whole[[3, 0]])
        assert len(whole.flatten(1).unique(dim=0) if whole.ndim > 1 else whole.unique()) == 4
        if name != "more_uniform_BX":
            assert torch.equal(getattr(alone, name), whole[1:2])
    assert alone.more_uniform_BX.shape == (1, 0)
    assert batch.noise_BCHW.shape == batch.posterior_BCHW.shape == (4, *shape)
    assert not torch.equal(batch.posterior_BCHW, batch.noise_BCHW)


@pytest.mark.parametrize("device", DEVICES)
def test_numbers_are_the_same_everywhere_and_stay(device: str) -> None:
    """A run that goes on after an update, on a CPU or a GPU, draws the bits that it would have drawn before."""
    drawn = draw([0, 2**55 + 1], torch.Size((2, 12, 64, 64)), torch.device(device), more=64)
    digest = hashlib.sha256(b"".join(getattr(drawn, name).cpu().contiguous().numpy().tobytes() for name in FIELDS))
    assert digest.hexdigest()[:16] == "eb41a625617f0ba0"
    assert "".join(str(int(d)) for d in captions_dropped(range(32), 0.3)) == "11010110001100100000110000000100"


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    draw([1, 2], torch.Size((2, 3, 4, 5)), CPU)
    captions_dropped([1, 2], 0.5)
    assert torch.equal(torch.get_rng_state(), before)


# ---- distributions ----


def kolmogorov_smirnov(cdf: np.ndarray) -> float:
    """√n times the largest distance of a sample's distribution function from the right one, from the latter's values."""
    cdf, n = np.sort(cdf), len(cdf)
    steps = np.arange(n + 1) / n
    return math.sqrt(n) * max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max())


@pytest.fixture(scope="module")
def many() -> Draw:
    return draw(range(1000), torch.Size((1000, 4, 8, 8)), CPU, more=256)


@pytest.mark.parametrize("name", ["posterior_BCHW", "noise_BCHW"])
def test_normal_numbers(many: Draw, name: str) -> None:
    """256,000 of them: moments within five standard errors, and Kolmogorov and Smirnov's 0.1% point."""
    values = getattr(many, name).double().flatten()
    error = len(values) ** -0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((values**power).mean().item() - moment) < 5 * error * math.sqrt(variance), power
    assert kolmogorov_smirnov(torch.special.ndtr(values).numpy()) < 1.95
    assert 4 < values.abs().max() < 6


@pytest.mark.parametrize("name", ["uniform_B", "more_uniform_BX"])
def test_uniform_numbers(many: Draw, name: str) -> None:
    values = getattr(many, name).double().flatten()
    assert 0 <= values.min() < values.max() < 1
    assert kolmogorov_smirnov(values.numpy()) < 1.95


def test_numbers_are_independent(many: Draw) -> None:
    """Within a sample, between its uses, and between neighbouring seeds: correlations under five standard errors."""
    posterior, noise = many.posterior_BCHW.flatten(1), many.noise_BCHW.flatten(1)
    more = (many.more_uniform_BX - 0.5) * math.sqrt(12)
    time = (many.uniform_B[:, None] - 0.5) * math.sqrt(12)
    pairs = {
        "uses": (posterior, noise),
        "neighbours": (noise[:, 1:], noise[:, :-1]),
        "counters": (noise[:, 4:], noise[:, :-4]),
        "squares": ((noise[:, 1:] ** 2 - 1) / 2**0.5, (noise[:, :-1] ** 2 - 1) / 2**0.5),
        "samples": (noise[1:], noise[:-1]),
        "dropout": (more, noise[:, :256]),
        "time": (time.expand(-1, 256), noise),
    }
    for what, (one, other) in pairs.items():
        product = (one * other).double()
        per_sample = product.mean(1) if what == "time" else product.flatten()
        assert abs(per_sample.mean()) < 5 * per_sample.std() / len(per_sample) ** 0.5, what


def test_normal_numbers_against_the_inverse_distribution_function() -> None:
    """From end to end, words that are the first and last of a knot among them: symmetrical, never infinite."""
    random = torch.randint(0, WORD + 1, (50_000,), generator=torch.Generator().manual_seed(0))
    middle = 1 << 31
    powers = torch.tensor([middle + sign * (1 << i) + d for i in range(31) for d in (-1, 0, 1) for sign in (-1, 1)])
    words = torch.cat([torch.tensor([0, 1, middle - 1, middle, WORD - 1, WORD]), powers, random]).clamp(0, WORD)
    odd = 2 * words.double() - WORD
    tail = odd.abs() / 2**33
    found = to_normal(words).double()
    assert torch.equal(found.signbit(), odd.signbit())
    torch.testing.assert_close(torch.special.ndtr(-found.abs()), tail, rtol=1e-5, atol=0)
    assert torch.equal(to_normal(WORD - words), -to_normal(words))
    largest = -NormalDist().inv_cdf(2**-33)
    assert to_normal(torch.tensor([middle - 1, middle])).tolist() == pytest.approx([-largest, largest], rel=1e-6)


def test_uniform_numbers_of_the_extreme_words() -> None:
    assert to_uniform(torch.tensor([0, 255, 256, WORD])).tolist() == [0, 0, 2**-24, 1 - 2**-24]


# ---- operations ----


class Recorded(TorchDispatchMode):
    """Counts the operations by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def recorded(images: int) -> Counter[str]:
    with Recorded() as operations:
        draw(range(images), torch.Size((images, 4, 8, 8)), CPU, more=50)
    return operations.names


# Views compute nothing; copies and integers are exact, and so are these on floats: signs, comparisons, conversions, and
# products and sums, which IEEE 754 defines to the last bit. No logarithm, sine, root or division.
EXACT = {"mul", "add", "sub", "copysign", "_to_copy", "index", "flip", "stack", "clone", "zeros", "arange", "fill_"}
EXACT |= {"bitwise_xor", "bitwise_and", "__rshift__", "lift_fresh"}
VIEWS = {"view", "_unsafe_view", "select", "slice", "split_with_sizes", "unbind", "unsqueeze", "permute", "detach"}


def test_the_operations_of_a_batch() -> None:
    """As many for 64 images as for one, under 100 without views, each exactly defined."""
    recorded(1)  # makes the tables
    one, many = recorded(1), recorded(64)
    assert one == many
    assert set(many) <= EXACT | VIEWS, set(many) - EXACT - VIEWS
    assert sum(count for name, count in many.items() if name not in VIEWS) < 100


def test_a_products_rounding_does_not_matter() -> None:
    """Where a compiler makes one operation of the product and the sum, numbers stay: the product fits in a float's 24 bits."""
    knots, slopes = (torch.tensor(values, dtype=torch.float32) for values in normal_table())
    places = torch.tensor([1, 2, 3, 1365, 2731, 4094, 4095])
    exact = slopes.double()[:, None] * places
    assert torch.equal(exact.float().double(), exact)
    # From knot to knot it falls, without a gap that is more than the slope's rounding.
    ends = knots.double()[:-1] + 4096 * slopes.double()[:-1]
    assert (knots[1:] < knots[:-1]).all() and (ends - knots.double()[1:]).abs().max() < 2e-6
