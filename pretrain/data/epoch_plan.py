"""The samples that an epoch draws of each set: all of them once, or a mixture of sources. Shares may change by step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from data_prep.common.words import counted
from data_prep.schema import Card
from pretrain.config import Config, DataSection
from pretrain.data.passes import Part
from pretrain.shares import by_step

Draws = dict[str, int]  # samples of each set that gives some, by the set's folder


@dataclass(frozen=True)
class Phase:
    """The epochs of the steps between two changes of the shares.

    Attributes:
        start: the first optimizer step.
        steps: how many; None for the last phase, which has no end.
        draws: of a whole epoch.
        last: of the phase's last epoch, which ends with it, where that is none of whole length.
    """

    start: int
    steps: int | None
    draws: Draws
    last: Draws = field(default_factory=dict)


@dataclass(frozen=True)
class Epoch:
    """One epoch: its optimizer steps, its draws, and the samples of each set that all epochs before it drew."""

    steps: int
    draws: Draws
    before: Draws


@dataclass(frozen=True)
class EpochPlan:
    """The samples that each epoch draws.

    Attributes:
        sets: the sets' folders, in the order of the streams.
        steps_per_epoch: optimizer steps of a whole epoch.
        phases: one, unless shares change by step.
        held_out: the number of samples of these sets that are kept for validation, where there are some.
        notes: lines for the log: sets that are left out, and how often a mixture draws its sources.
    """

    sets: tuple[str, ...]
    steps_per_epoch: int
    phases: tuple[Phase, ...]
    held_out: Draws = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def draws(self) -> Draws:
        """The draws of the first epoch, where it has the whole length."""
        return self.phases[0].draws

    @property
    def scheduled(self) -> bool:
        """Whether shares change by step."""
        return len(self.phases) > 1

    def epoch(self, number: int) -> Epoch:
        """The epoch with this number, from 0."""
        before = dict.fromkeys(self.sets, 0)
        for phase in self.phases:
            whole, rest = (number + 1, 0) if phase.steps is None else divmod(phase.steps, self.steps_per_epoch)
            _add(before, phase.draws, min(whole, number))
            if number < whole:
                return Epoch(self.steps_per_epoch, phase.draws, before)
            number -= whole
            if rest and number == 0:
                return Epoch(rest, phase.last, before)
            if rest:
                _add(before, phase.last, 1)
                number -= 1
        raise AssertionError("the last phase has no end")

    def parts(self, number: int) -> list[Part]:
        """The parts of the sets' passes that an epoch draws, in the order of the streams."""
        epoch = self.epoch(number)
        return [Part(epoch.before[name], epoch.draws.get(name, 0)) for name in self.sets]


def _add(counts: Draws, draws: Draws, times: int) -> None:
    for name, count in draws.items():
        counts[name] += count * times


def plan_epochs(card: Card, config: Config, global_batch: int, held_out: Mapping[str, int]) -> EpochPlan:
    """Divides each epoch among the sets that hold the resolution.

    Without `data.sources` every sample is drawn once. With them an epoch is as long as the named sources together, and
    each source's share of it is split over its sets by their samples; so a source may be drawn several times, or in part.
    Where shares change, the epoch before ends, whole or not. With buckets a set gives whole global batches, since each is of
    one set and so of one shape: the samples that are left over are others in each epoch. A set smaller than one global batch
    is not used.

    Args:
        held_out: the number of samples that are kept for validation, by set.

    Raises:
        ValueError: an unknown source, or one without enough samples.
    """
    data = config.data
    sets = {
        name: {**about, "samples": about["samples"] - held_out.get(name, 0)}
        for name, about in sorted(card.sets_with(data.resolution).items())
        if about["samples"] > held_out.get(name, 0)
    }
    shares = shares_by_step(sets, data)
    samples = {name: about["samples"] for name, about in sets.items() if about["source"] in shares[0]}
    unit = global_batch if card.buckets else 1
    usable = {name: count for name, count in samples.items() if count >= unit}
    if sum(usable.values()) < global_batch:
        raise ValueError(_too_few(data, samples, global_batch, card.buckets))
    phases: tuple[Phase, ...]
    if data.sources is None:
        phases = (Phase(0, None, {name: count // unit * unit for name, count in usable.items()}),)
    else:
        mixture = _Mixture({name: sets[name]["source"] for name in usable}, usable, unit, global_batch)
        phases = mixture.phases(shares)
    drawn = {name for phase in phases for name in (*phase.draws, *phase.last)}
    by_source = [name for source in shares[0] for name in usable if sets[name]["source"] == source]
    order = tuple(name for name in (usable if data.sources is None else by_source) if name in drawn)
    for draws in (draws for phase in phases for draws in (phase.draws, phase.last) if draws):
        least = min(draws.values())
        if card.buckets and data.shuffle_block * least < sum(draws.values()):
            raise ValueError(f"data.shuffle_block: {data.shuffle_block} is too small for the set of {least} samples")
    notes = (
        *_held_out(data, held_out),
        *_left_out(samples, drawn, global_batch),
        *_mixtures(sets, data, phases, config.steps, global_batch),
    )
    kept = {name: held_out[name] for name in order if name in held_out}
    return EpochPlan(order, sum(phases[0].draws.values()) // global_batch, phases, kept, notes)


@dataclass(frozen=True)
class _Mixture:
    """Sets that are mixed by the shares of their sources.

    Attributes:
        source: the source of each set.
        samples: the samples of each set.
        unit: samples that a set gives together: a global batch with buckets, else one.
    """

    source: Mapping[str, str]
    samples: Mapping[str, int]
    unit: int
    global_batch: int

    def phases(self, shares: Mapping[int, Mapping[str, float]]) -> tuple[Phase, ...]:
        """The phases between the steps at which shares change. Raises ValueError where a share is too small."""
        total = sum(self.samples.values())
        steps_per_epoch = total // self.global_batch
        constant = {start: self.draws(total, now, start) for start, now in shares.items()}
        starts = [0, *(step for before, step in pairwise(shares) if constant[step] != constant[before])]
        if len(starts) == 1:  # also where proportions stay the same
            return (Phase(0, None, constant[0]),)
        phases = []
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            draws = self.draws(steps_per_epoch * self.global_batch, shares[start], start)
            rest = 0 if end is None else (end - start) % steps_per_epoch
            last = self.draws(rest * self.global_batch, shares[start]) if rest else {}
            phases.append(Phase(start, None if end is None else end - start, draws, last))
        return tuple(phases)

    def draws(self, total: int, shares: Mapping[str, float], start: int | None = None) -> Draws:
        """Splits an epoch of at most `total` samples.

        Args:
            start: the step from which a source that gives nothing, although it has a share, is an error; None: it is none.
        """
        used = {source: share for source, share in shares.items() if share}
        parts = _split(total // self.unit, list(used.values()))
        draws: Draws = {}
        for source, part in zip(used, parts, strict=True):
            of = {name: count for name, count in self.samples.items() if self.source[name] == source}
            if start is not None and not (of and part):
                since = f" from step {start} on" if start else ""
                raise ValueError(
                    f"data.sources: {source} cannot give one {'global batch of one shape' if self.unit > 1 else 'sample'} an "
                    f"epoch{since}; raise its share, leave it out, or lower deepspeed.train_batch_size ({self.global_batch})"
                )
            counts = _split(part, list(of.values()))
            draws |= {name: count * self.unit for name, count in zip(of, counts, strict=True) if count}
        return draws


def shares_by_step(sets: dict[str, dict[str, Any]], data: DataSection) -> dict[int, dict[str, float]]:
    """The share of each source that is used, by name in order, from each step on; all are 1 without `data.sources`.

    Raises:
        ValueError: a source that none of the sets has.
    """
    known = sorted({about["source"] for about in sets.values()})
    if data.sources is None:
        return {0: dict.fromkeys(known, 1.0)}
    if unknown := sorted(data.sources.keys() - set(known)):
        raise ValueError(
            f"data.sources: {data.path} has no {', '.join(unknown)} with samples for {data.resolution} px; "
            f"its sources that have some: {', '.join(known)}"
        )
    return by_step(data.sources)


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


def _left_out(samples: dict[str, int], drawn: set[str], global_batch: int) -> Iterable[str]:
    if missing := samples.keys() - drawn:
        count, total = sum(samples[name] for name in missing), sum(samples.values())
        yield (
            f"data: {len(missing)} of {len(samples)} sets cannot fill one global batch of {global_batch} and are left out: "
            f"{count} of {total} samples ({count / total:.2%})"
        )


def _mixtures(
    sets: dict[str, dict[str, Any]], data: DataSection, phases: Sequence[Phase], steps: int, global_batch: int
) -> Iterable[str]:
    """A line for each phase, and one for the whole run."""
    if data.sources is None:
        return
    there = {
        source: sum(about["samples"] for about in sets.values() if about["source"] == source)
        for source in sorted(data.sources)
    }
    over_run = dict.fromkeys(there, 0.0)
    unused = sorted({about["source"] for about in sets.values()} - data.sources.keys())
    nothing = f"; nothing of {', '.join(unused)}, which data.sources does not name" if unused else ""
    for phase in phases:
        total, words = sum(phase.draws.values()), []
        end = steps if phase.steps is None else min(steps, phase.start + phase.steps)
        for source, samples in there.items():
            count = sum(n for name, n in phase.draws.items() if sets[name]["source"] == source)
            over_run[source] += max(0, end - phase.start) * global_batch * count / total
            words.append(f"{count / total:.2%} {source} (each sample {count / samples:.2f} times)")
        since = f"from step {phase.start} on " if len(phases) > 1 else ""
        yield f"data: {since}an epoch of {total} samples is {', '.join(words)}{nothing}"
    parts = [
        f"{counted(round(count), 'sample')} of {source} ({count / (steps * global_batch):.2%}, "
        f"{count / there[source]:.2f} passes)"
        for source, count in over_run.items()
    ]
    yield f"data: {counted(steps, 'step')} draw {', '.join(parts)}"
