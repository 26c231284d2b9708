"""How much one forward pass computes, where that is a choice: the number of mediators, and the tokens' density.

Both follow from the noise level t (0 is data, 1 noise) unless something else is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pretrain.models.config import DiTConfig
from pretrain.models.mixers import flexdit as density


@dataclass(frozen=True)
class Effort:
    """What a forward pass spends; None where the backbone has no such choice.

    Attributes:
        mediators: how many there are, one of `DiTConfig.mediators`.
        bin: of the noise level; it decides how coarse FlexDiT's sparse grid is.
    """

    mediators: int | None = None
    bin: int | None = None

    @classmethod
    def at(cls, config: DiTConfig, t: float, mediators: int | None = None) -> Effort:
        """The default at a noise level: few mediators near noise, many near data, in equal parts of t.

        Raises:
            ValueError: `mediators` is asked for, and the model has no tables for so many, or no mediators.
        """
        if mediators is None and config.attention == "mediators":
            choices = config.mediators
            mediators = choices[min(max(int((1 - t) * len(choices)), 0), len(choices) - 1)]
        return cls(mediators, density.bin_of(t) if config.density == "flexdit" else None).check(config)

    def check(self, config: DiTConfig) -> Effort:
        """Itself. Raises ValueError where the backbone has no such choice, or leaves open one that it has."""
        if config.attention != "mediators":
            if self.mediators is not None:
                raise ValueError(f"mediators: {self.mediators}, but this model has full attention; leave them out")
        elif self.mediators not in config.mediators:
            known = ", ".join(map(str, config.mediators))
            raise ValueError(f"mediators: {self.mediators} is none of {known}, for which this model has tables")
        if config.density != "flexdit":
            if self.bin is not None:
                raise ValueError(f"bin: {self.bin}, but every block of this model computes on all tokens; leave it out")
        elif self.bin not in range(density.BINS):
            raise ValueError(f"bin: {self.bin} is none of {', '.join(map(str, range(density.BINS)))}")
        return self

    @classmethod
    def for_all(cls, config: DiTConfig, levels: Iterable[float]) -> Effort:
        """The one default at all these noise levels. Raises ValueError where they differ in it."""
        found = {cls.at(config, t) for t in levels}
        if len(found) != 1:
            raise ValueError(
                "the images of one forward pass share the number of mediators and the density, but their noise levels lie "
                "in different parts; pass them one by one, or give the effort"
            )
        return found.pop()


def depends_on_time(config: DiTConfig) -> bool:
    """Whether the default effort differs between noise levels."""
    return config.attention == "mediators" or config.density == "flexdit"
