"""Random numbers of a training batch: each sample's from its own seed, the same bits on every device.

Letters: B samples, W words of a sample, C latent channels, X numbers besides, R rounds, K knots.

The generator is Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words of 32 bits
are a function of a counter of 128 bits and a key of 64. The key is the sample's seed, the counter says which four of its words
they are:

    counter = (number of the four, 0, 0, stream)

So a sample's numbers depend neither on its batch nor on the processes, and a batch's take a fixed number of operations. A
stream is a use: what one of them draws changes no number of another.

Words become numbers by operations that IEEE 754 defines to the last bit (a conversion, an exact product, a sum); logarithms
and cosines, as Box and Muller's, differ between devices. A normal number is the inverse distribution function at a word,
between knots of a table: 256 for each halving of the tail's probability, down to 2^-33 (6.3 standard deviations). Its
distribution function is off by less than 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)  # of the key, from round to round
WORD = 0xFFFFFFFF

# The parts of a float that the table is read by: 8 bits of its fraction choose the knot, the next 12 the place after it.
KNOT_BITS, PLACE_BITS = 8, 12
ONE = 0x3F800000  # the bits of 1.0
OCTAVES = 32  # from 1 to 2^32


class Stream(IntEnum):
    """The uses of a sample's random numbers."""

    TRAINING = 0  # time, posterior, noise, the query masks' dropout
    CAPTION = 1  # whether the caption is dropped
    ROUTING = 2  # which tokens are kept by token routing


@dataclass(frozen=True)
class Draw:
    """Random numbers of a batch in fp32: normal ones for the VAE's posterior and the noise, uniform ones in 0..1 (without 1)."""

    posterior_BCHW: Tensor
    noise_BCHW: Tensor
    uniform_B: Tensor
    more_uniform_BX: Tensor


def draw(seeds: Sequence[int], shape: torch.Size, device: torch.device, more: int = 0) -> Draw:
    """Normal numbers for the posterior and the noise of latents [B, C, H, W], a uniform one for the time, and `more` besides.

    A sample's numbers do not depend on how many are drawn besides.
    """
    count = shape[1:].numel()
    words_BW = sample_words(seeds, 1 + 2 * count + more, Stream.TRAINING, device)
    time_B1, normal_BW, more_BX = words_BW.split([1, 2 * count, more], dim=1)
    normal = to_normal(normal_BW).view(-1, 2, *shape[1:])
    return Draw(normal[:, 0], normal[:, 1], to_uniform(time_B1[:, 0]), to_uniform(more_BX))


def captions_dropped(seeds: Sequence[int], dropout: float) -> list[bool]:
    """Whether each sample's caption is dropped, with this probability."""
    uniform_B = to_uniform(sample_words(seeds, 1, Stream.CAPTION, torch.device("cpu")))[:, 0]
    return (uniform_B < dropout).tolist()


def kept_tokens(seeds: Sequence[int], tokens: int, kept: int, device: torch.device) -> Tensor:
    """Places [B, kept] of each sample's kept tokens among its `tokens`, ascending; each choice is equally likely."""
    words_BN = sample_words(seeds, tokens, Stream.ROUTING, device)
    return words_BN.argsort(dim=1, stable=True)[:, :kept].sort(dim=1).values


def sample_words(seeds: Sequence[int], count: int, stream: Stream, device: torch.device) -> Tensor:
    """The first `count` words of each sample's stream, [B, count] in 0..2^32 − 1; seeds in 0..2^63 − 1."""
    # From pinned memory, the host does not wait for the copy.
    seed_B = torch.tensor(seeds, dtype=torch.int64, pin_memory=device.type == "cuda").to(device, non_blocking=True)
    key_2B1 = torch.stack((seed_B & WORD, seed_B >> 32))[..., None]
    counter = torch.zeros(4, 1, -(-count // 4), dtype=torch.int64, device=device)
    torch.arange(counter.shape[2], out=counter[0, 0])
    counter[3] = int(stream)
    return philox(counter, key_2B1).permute(1, 2, 0).flatten(1)[:, :count]


def philox(counter_4: Tensor, key_2: Tensor) -> Tensor:
    """Philox-4x32-10 of counters [4, …] and keys [2, …] that broadcast: words [4, …]; all are int64 in 0..2^32 − 1.

    Both halves of a round are one tensor. A product of two words fills the 64 bits of an int64, whose sign is its highest bit.
    """
    tables, ones = _tables(counter_4.device), [1] * (key_2.ndim - 1)
    multipliers_2 = tables.multipliers_2.view(2, *ones)
    keys_R2 = (key_2 + tables.increments_R2.view(ROUNDS, 2, *ones)) & WORD
    even_2, odd_2 = counter_4[0::2], counter_4[1::2]
    for key_of_round_2 in keys_R2:
        product_2 = (even_2 * multipliers_2).flip(0)
        even_2, odd_2 = ((product_2 >> 32) ^ odd_2 ^ key_of_round_2) & WORD, product_2
    return torch.stack((even_2, odd_2 & WORD), dim=1).flatten(0, 1)


def to_uniform(words: Tensor) -> Tensor:
    """Uniform numbers in 0..1 (without 1) from words: their upper 24 bits, in fp32."""
    return (words >> 8).float() * 2**-24


def to_normal(words: Tensor) -> Tensor:
    """Normal numbers from words, in fp32."""
    # Odd numbers between ±2^32: the sign is the normal number's, the distance from 0 its tail's probability times 2^33.
    tail = (2 * words - WORD).float()
    bits = tail.view(torch.int32)
    knots, slopes = _tables(words.device).normal_2K
    knot = ((bits >> (23 - KNOT_BITS)) & ((1 << (8 + KNOT_BITS)) - 1)) - (ONE >> (23 - KNOT_BITS))
    place = (bits >> (23 - KNOT_BITS - PLACE_BITS)) & ((1 << PLACE_BITS) - 1)
    # Slopes have 12 bits: the product is exact, so it does not matter whether a compiler rounds it before the sum.
    return torch.copysign(knots[knot] + slopes[knot] * place, tail)


class _Tables(NamedTuple):
    """Constants on a device."""

    multipliers_2: Tensor
    increments_R2: Tensor  # of the key in each round
    normal_2K: Tensor  # the normal number at each knot, and its change from place to place


@cache
def _tables(device: torch.device) -> _Tables:
    increments = [[round_ * increment for increment in INCREMENTS] for round_ in range(ROUNDS)]
    return _Tables(
        torch.tensor(MULTIPLIERS, device=device),
        torch.tensor(increments, device=device),
        torch.tensor(normal_table(), dtype=torch.float32, device=device),
    )


def normal_table() -> tuple[list[float], list[float]]:
    """Knots and slopes of the normal distribution's inverse at x / 2^33, for x from 1 to 2^32, where it is 0."""
    per_octave, inverse = 1 << KNOT_BITS, NormalDist().inv_cdf
    exact = [
        -inverse(math.ldexp(1 + k % per_octave / per_octave, k // per_octave - 33)) for k in range(OCTAVES * per_octave)
    ]
    slopes = [(after - before) / (1 << PLACE_BITS) for before, after in zip(exact, [*exact[1:], 0.0], strict=True)]
    # The largest words are rounded up to 2^32: a last knot.
    return [*exact, 0.0], [*(_rounded(slope, 12) for slope in slopes), 0.0]


def _rounded(value: float, bits: int) -> float:
    """The value with so many bits of fraction."""
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
