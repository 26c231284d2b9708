"""What a part of the benchmark is given: its device, its shapes and its time; and where it puts its figures.

Each figure is written at once, a line of JSON, so that a part which is ended keeps what it has.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pretrain.gpus import Gpu, gpu_of
from pretrain.models import DiT, DiTConfig, PackedText, preset
from pretrain.models.mixers.flexdit import FlexDiTSection

Numbers = Mapping[str, Any]


class NotHere(Exception):
    """A measurement cannot be made on this machine; the message says why."""


class Wrong(Exception):
    """A result is not what it must be. `numbers` are recorded all the same."""

    def __init__(self, message: str, numbers: Numbers):
        super().__init__(message)
        self.numbers = numbers


@dataclass(frozen=True)
class Shapes:
    """Sizes of all that is measured.

    Attributes:
        focusdit, dit, flexdit, mediators: the backbones, of one width and depth.
        micro: images of a micro-batch by resolution in pixels.
        batches: pictures that are drawn together.
        steps: sampling steps.
        caption: fewest and most tokens of a caption.
        compile_steps: training steps in which graphs are counted.
    """

    focusdit: DiTConfig
    dit: DiTConfig
    flexdit: DiTConfig
    mediators: DiTConfig
    micro: Mapping[int, int]
    batches: tuple[int, ...]
    steps: int
    caption: tuple[int, int]
    compile_steps: int

    @classmethod
    def of(cls, name: str, small: bool) -> Shapes:
        """The sizes for a preset, or small ones that a CPU does in seconds."""
        if small:
            split = FlexDiTSection(split=(1, 1, 1, 1))
            dit = replace(preset("dit_tiny_deep"), width=32, heads=2, depth=6, patch=2, flexdit=split)
            focus = replace(dit, mask="release", ffn="shared", mask_hidden=(16, 8))
            micro, batches, steps, caption, compile_steps = {64: 2}, (1, 2), 2, (3, 9), 3
        else:
            focus = preset(name)
            dit = replace(focus, mask="none", ffn="uniform")
            micro, batches, steps, caption, compile_steps = {256: 64, 512: 20}, (1, 32), 20, (20, 150), 50
        flexdit = replace(dit, density="flexdit")
        mediators = replace(dit, attention="mediators")
        return cls(focus, dit, flexdit, mediators, micro, batches, steps, caption, compile_steps)


@dataclass(frozen=True)
class Settings:
    """What the command tells a part's process.

    Attributes:
        seconds: time that the part has.
        record: file for its figures.
        folder: for temporary files.
    """

    device: str
    preset: str
    small: bool
    seconds: float
    record: str
    folder: str


class Session:
    """One part's run in one process."""

    def __init__(self, settings: Settings, now: Callable[[], float] = time.monotonic):
        self.settings, self._now = settings, now
        self.device = torch.device(settings.device)
        self.cuda = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.cuda else torch.float32
        self.shapes = Shapes.of(settings.preset, settings.small)
        self.folder = Path(settings.folder)
        self._end = now() + settings.seconds
        self._record = Path(settings.record)
        self.gpu: Gpu | None = gpu_of(torch.cuda.get_device_name(self.device)) if self.cuda else None
        if self.cuda:
            torch.cuda.set_device(self.device)

    # ---- figures ----

    def left(self) -> float:
        """Seconds that the part still has."""
        return self._end - self._now()

    def measure(self, name: str, measurement: Callable[..., Numbers], *given: Any, needs: float = 0.0) -> str:
        """Makes one measurement and records its figures, or why there are none.

        Args:
            measurement: called with this session and what is `given`.
            needs: seconds; with less left, it is not begun.

        Returns:
            done, not run, wrong, out of memory or failed.
        """
        status, reason, numbers = "done", "", cast(Numbers, {})
        if self.left() < needs:
            status, reason = "not run", f"{self.left():.0f} s are left, it needs {needs:.0f}"
        else:
            try:
                numbers = measurement(self, *given)
            except NotHere as missing:
                status, reason = "not run", str(missing)
            except ModuleNotFoundError as error:
                status, reason = "not run", f"{error.name} is missing"
            except Wrong as wrong:
                status, reason, numbers = "wrong", str(wrong), wrong.numbers
            except torch.OutOfMemoryError as error:
                status, reason = "out of memory", str(error).splitlines()[0]
            except Exception as error:  # of any kind: the other measurements go on
                traceback.print_exc()
                status, reason = "failed", " ".join(f"{type(error).__name__}: {error}".split())[:300]
            self.free()
        self.put(name, status, reason, numbers)
        return status

    def put(self, name: str, status: str, reason: str = "", numbers: Numbers | None = None) -> None:
        """Records a measurement; with an empty name, what holds for the whole part."""
        line = {"name": name, "status": status, "reason": reason, "numbers": dict(numbers or {})}
        with self._record.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")

    def free(self) -> None:
        """Gives back the device's memory that nothing holds, and starts counting its peak anew."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    # ---- time and memory ----

    def wait(self) -> None:
        """Waits until the device has done all."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object], rounds: int = 5, warm_up: int = 2) -> float:
        """Median seconds of a run, after some that do not count; with small shapes one of each."""
        if self.settings.small:
            rounds, warm_up = 1, 1
        times = []
        for i in range(warm_up + rounds):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            if i >= warm_up:
                times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_gib(self) -> float | None:
        """The most memory that was allocated at once; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None

    def allocated_gib(self) -> float | None:
        """The memory that is allocated; None on a CPU."""
        return torch.cuda.memory_allocated(self.device) / 2**30 if self.cuda else None

    # ---- made data ----

    def model(self, config: DiTConfig, seed: int = 0) -> DiT:
        """A backbone on the device whose every weight has an effect: what starts at 0 is made normal(0.02)."""
        torch.manual_seed(seed)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                model = DiT(config)
        finally:
            torch.set_default_dtype(default)
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        return model

    def lengths(self, images: int, seed: int = 0) -> list[int]:
        """Numbers of tokens of captions."""
        rng = random.Random(seed)
        return [rng.randint(*self.shapes.caption) for _ in range(images)]

    def text(self, config: DiTConfig, lengths: list[int], multiple: int | None = None) -> PackedText:
        """Captions of random embeddings, on the device."""
        captions = [torch.randn(n, config.text_width).to(self.dtype) for n in lengths]
        return PackedText.pack(captions, *([] if multiple is None else [multiple])).to(self.device)

    def latent(self, config: DiTConfig, images: int, resolution: int) -> Tensor:
        """Random latents [B, C, H, W] on the device, for a VAE of 8 pixels per latent pixel."""
        side = resolution // 8
        return torch.randn(images, config.latent_channels, side, side, device=self.device, dtype=self.dtype)


def fits_in(error: float, most: float, numbers: dict[str, Any]) -> Numbers:
    """The numbers with the error and its bound. Raises Wrong where it is beyond the bound, or no number."""
    numbers |= {"error": error, "at most": most}
    if not error <= most:
        raise Wrong(f"error {error:.2e} is above {most:.0e}", numbers)
    return numbers
