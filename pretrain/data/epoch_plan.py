"""The samples that an epoch draws of each set: all of them once, or a mixture of sources."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_prep.schema import Card
from pretrain.config import DataSection


@dataclass(frozen=True)
class EpochPlan:
    """The samples that an epoch draws.

    Attributes:
        draws: the number of samples of each set, by the set's folder, in the order of the streams.
        held_out: the number of samples of these sets that are kept for validation, where there are some.
        notes: lines for the log: sets that are left out, and how often a mixture draws its sources.
    """

    draws: dict[str, int]
    held_out: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)


def plan_epoch(card: Card, data: DataSection, global_batch: int, held_out: Mapping[str, int]) -> EpochPlan:
    """Divides an epoch among the sets that hold the resolution.

    Without `data.sources` every sample is drawn once. With them an epoch is as long as the named sources together, and
    each source's share of it is split over its sets by their samples; so a source may be drawn several times, or in part.
    With buckets a set gives whole global batches, since each is of one set and so of one shape: the samples that are left
    over are others in each epoch. A set smaller than one global batch is not used.

    Args:
        held_out: the number of samples that are kept for validation, by set.

    Raises:
        ValueError: an unknown source, or one without enough samples.
    """
    sets = {
        name: {**about, "samples": about["samples"] - held_out.get(name, 0)}
        for name, about in sorted(card.sets_with(data.resolution).items())
        if about["samples"] > held_out.get(name, 0)
    }
    shares = _shares(sets, data)
    samples = {name: about["samples"] for name, about in sets.items() if about["source"] in shares}
    unit = global_batch if card.buckets else 1
    usable = {name: count for name, count in samples.items() if count >= unit}
    if sum(usable.values()) < global_batch:
        raise ValueError(_too_few(data, samples, global_batch, card.buckets))
    if data.sources is None:
        draws = {name: count // unit * unit for name, count in usable.items()}
    else:
        draws = {}
        parts = _split(sum(usable.values()) // unit, list(shares.values()))
        for source, part in zip(shares, parts, strict=True):
            of = {name: count for name, count in usable.items() if sets[name]["source"] == source}
            if not of or not part:
                raise ValueError(
                    f"data.sources: {source} cannot give one {'global batch of one shape' if unit > 1 else 'sample'} an "
                    f"epoch; raise its share, leave it out, or lower deepspeed.train_batch_size ({global_batch})"
                )
            counts = _split(part, list(of.values()))
            draws |= {name: count * unit for name, count in zip(of, counts, strict=True) if count}
    least = min(draws.values())
    if card.buckets and data.shuffle_block * least < sum(draws.values()):
        raise ValueError(f"data.shuffle_block: {data.shuffle_block} is too small for the set of {least} samples")
    notes = (*_held_out(data, held_out), *_left_out(samples, draws, global_batch), *_mixture(sets, data, draws))
    return EpochPlan(draws, {name: held_out[name] for name in draws if name in held_out}, notes)


def _shares(sets: dict[str, dict[str, Any]], data: DataSection) -> dict[str, float]:
    """The share of each source that is used, by name in order; all are 1 without `data.sources`."""
    known = sorted({about["source"] for about in sets.values()})
    if data.sources is None:
        return dict.fromkeys(known, 1.0)
    if unknown := sorted(data.sources.keys() - set(known)):
        raise ValueError(
            f"data.sources: {data.path} has no {', '.join(unknown)} with samples for {data.resolution} px; "
            f"its sources that have some: {', '.join(known)}"
        )
    return dict(sorted(data.sources.items()))


def _split(total: int, weights: Sequence[float]) -> list[int]:
    """Splits `total` into whole numbers in proportion to the weights; the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (whole[i] - exact[i], i))
    for i in by_remainder[: total - sum(whole)]:
        whole[i] += 1
    return whole


def _too_few(data: DataSection, samples: dict[str, int], global_batch: int, buckets: bool) -> str:
    there = f"{data.path} has {sum(samples.values())} samples for {data.resolution} px"
    if data.validation is not None:
        there += " that are not held out for validation"
    if not (buckets and samples):
        return f"{there}, less than one global batch of {global_batch}"
    return (
        f"{there}, but the largest of its {len(samples)} sets of one shape has {max(samples.values())}, less than one global "
        f"batch of {global_batch}; lower deepspeed.train_batch_size"
    )


def _held_out(data: DataSection, held_out: Mapping[str, int]) -> Iterable[str]:
    if held_out:
        chosen = f"source {data.validation}" if isinstance(data.validation, str) else f"{data.validation:g} of the tars"
        yield f"data: {sum(held_out.values())} samples are held out for validation ({chosen})"


def _left_out(samples: dict[str, int], draws: dict[str, int], global_batch: int) -> Iterable[str]:
    if missing := samples.keys() - draws.keys():
        count, total = sum(samples[name] for name in missing), sum(samples.values())
        yield (
            f"data: {len(missing)} of {len(samples)} sets cannot fill one global batch of {global_batch} and are left out: "
            f"{count} of {total} samples ({count / total:.2%})"
        )


def _mixture(sets: dict[str, dict[str, Any]], data: DataSection, draws: dict[str, int]) -> Iterable[str]:
    if data.sources is None:
        return
    total, words = sum(draws.values()), []
    for source in sorted(data.sources):
        count = sum(n for name, n in draws.items() if sets[name]["source"] == source)
        there = sum(about["samples"] for about in sets.values() if about["source"] == source)
        words.append(f"{count / total:.2%} {source} (each sample {count / there:.2f} times)")
    unused = sorted({about["source"] for about in sets.values()} - data.sources.keys())
    nothing = f"; nothing of {', '.join(unused)}, which data.sources does not name" if unused else ""
    yield f"data: an epoch of {total} samples is {', '.join(words)}{nothing}"
