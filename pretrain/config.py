"""Configuration of a run: a YAML file, overrides on the command line, and every problem reported at once.

`pretrain/configs/NAME.yaml` holds what differs from the defaults below. `ds_configs/NAME.json` is DeepSpeed's: ZeRO stage,
precision, clipping and the batch geometry. On the command line `section.key=value` changes the first and
`deepspeed.key=value` the second.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, create_model

from data_prep.encoders import DOWNSAMPLE
from pretrain.config_files import CONFIGS, KEPT_CONFIG, ConfigError, ConfigFiles, flatten, read_config, read_yaml
from pretrain.config_problems import explain, field_of, without_effect
from pretrain.deepspeed_config import read_deepspeed
from pretrain.diffusion import EpsilonPrediction, Objective, RectifiedFlow
from pretrain.models import DiTConfig, preset
from pretrain.models.alignment import Alignment
from pretrain.models.config import RENAMED_FIELDS, upgrade_fields
from pretrain.models.routing import Routing
from pretrain.sections import Section, optional_fields, replace_fields
from pretrain.shares import Shares, share_problems

# Noise levels of validation: 0, 1/8, … 7/8.
VALIDATION_LEVELS = 8

# Schemes of the object stores from which shards are streamed.
REMOTE = ("s3", "gs")

# Fields that have another name now, by their old path. Old names on input are an error that says the new one; the config
# that an older run keeps is read with `upgrade`.
RENAMED = {"guard.after": "guard.min_history"} | {
    f"model.{old}": f"model.{'.'.join(new)}" for old, new in RENAMED_FIELDS.items()
}

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class _ModelBase(Section):
    preset: str = "focusdit_1b_shared2d"
    """A name of `python -m pretrain.models`; the other fields of `DiTConfig` change single points of it."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass; saves memory, costs about a third more time."""
    compile: bool = False
    """Compile each block with torch.compile; pays on GPUs (docs/choices.md, "What is compiled")."""
    fp8: Literal["tensorwise", "rowwise"] | None = None
    """Products of the blocks' large linear maps in fp8, with a scale for each tensor or each row (docs/choices.md, "fp8")."""

    def backbone(self) -> DiTConfig:
        """The backbone's shape. Raises ValueError for an unknown preset."""
        names = {f.name for f in fields(DiTConfig)}
        changed = {name: value for name, value in self.model_dump(exclude_none=True).items() if name in names}
        return replace_fields(preset(self.preset), changed)


if TYPE_CHECKING:
    ModelSection = _ModelBase
else:
    ModelSection = create_model("ModelSection", __base__=_ModelBase, **optional_fields(DiTConfig))


class ObjectiveSection(Section):
    name: Literal["flow", "epsilon"] = "flow"
    """Objective. flow: rectified flow, velocity = noise − latent; epsilon: DDPM's linear schedule, predicting the noise."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of the training times t in 0..1 before the shift, for flow; uniform is SiT's."""
    mean: float = 0.0
    """Mean of the normal distribution whose logistic is t, for flow with logit-normal times."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """Standard deviation of that normal distribution."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """Shift of the training times, for flow: above 1 trains more near noise."""

    def build(self) -> Objective:
        """The objective with these settings."""
        if self.name == "epsilon":
            return EpsilonPrediction()
        return RectifiedFlow(self.mean, self.std, self.shift, self.times)


class DataSection(Section):
    path: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
    """Data set made by data_prep/encode.py: its folder, or its s3:// or gs:// URL."""
    resolution: Positive
    """Side of the square pictures, in pixels; the data set must hold it. With buckets: the side of a square of their area."""
    sources: Annotated[Shares, Field(min_length=1)] | None = None
    """Proportions of named sources in what is drawn, such as {coyo: 0.8, art: 0.2}; by default every sample once an epoch. A
    source's may change by step: {0: 0.2, 20000: 0.5} is 0.2 until 20,000 steps are done, then 0.5 (docs/data.md, "Sources")."""
    validation: float | str | None = None
    """Samples held out for validation, never trained on: a source's name, or a share of the tars, which a hash of their names
    chooses (docs/choices.md, "Validation"). By default there is no validation."""
    validation_samples: Annotated[int, Field(gt=0, multiple_of=VALIDATION_LEVELS)] = 2048
    """Number of held-out samples that validation uses: a multiple of its eight noise levels."""
    cache: Path | None = None
    """Folder on each node's own disk for shards that are fetched or decompressed; a local, uncompressed set needs none."""
    cache_limit: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(mb|gb|tb)$")] | None = None
    """Largest size of the cache, such as 500gb; shards unused for longest are removed. By default all are kept. Each loader
    process may have two shards more there for a while."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the null text, for classifier-free guidance."""
    workers: NotNegative = 4
    """Loader processes per training process."""
    prefetch: Positive = 2
    """Batches that each loader process keeps ready."""
    timeout: NotNegative = 600
    """Seconds without a batch from the loader after which training fails; 0 waits for ever."""
    damaged_shards: NotNegative = 10
    """Number of shards that may be missing or damaged; other samples of their set replace theirs. With more, training stops."""
    shuffle_block: Positive = 262144
    """Number of neighbouring samples that are shuffled among each other; part of the data order."""
    canonical_nodes: Positive = 1
    """mosaicml-streaming's `num_canonical_nodes`: part of the data order, the same for every cluster size."""

    def problems(self) -> list[str]:
        """Lists contradictions between the fields."""
        scheme = self.path.partition("://")[0] if "://" in self.path else None
        if scheme not in (None, *REMOTE):
            return [f"path: {self.path} must be a local folder, or an s3:// or gs:// URL"]
        if scheme and self.cache is None:
            return ["cache: path is remote, so give a folder on each node's own disk"]
        if self.cache_limit and self.cache is None:
            return ["cache_limit: it limits the cache, and there is none; set data.cache, or leave it out"]
        return [*share_problems(self.sources or {}), *self._validation_problems()]

    def _validation_problems(self) -> list[str]:
        held_out = self.validation
        if isinstance(held_out, float) and not 0 < held_out < 1:
            return [f"validation: {held_out:g} must be a share above 0 and below 1, or a source's name"]
        if held_out == "":
            return [
                "validation: must be a share above 0 and below 1, or a source's name; leave it out for no validation"
            ]
        if self.sources is not None and held_out in self.sources:
            return [
                f"validation: {held_out} is in data.sources, too, and would be trained on; leave it out of one of them"
            ]
        return []


class RoutingSection(Section):
    name: Literal["none", "tread", "sprint", "deferred_masking"] = "none"
    """Token routing: a part of each sample's tokens skips some blocks while training, and comes back (tread; sprint, by the
    model's fusion) or is left out to the end and of the loss (deferred_masking; docs/train_for_less.md)."""
    share: Share = 0.5
    """Share of the tokens that is left out, drawn for each sample anew in each epoch."""
    first: NotNegative | None = None
    """Block, counted from 0, before which they are left out; by default 2, for sprint that of model.fusion."""
    last: Positive | None = None
    """Block before which they come back, for tread; by default two blocks before the end. For sprint that of model.fusion."""
    until: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Share of the run's steps after which all tokens are computed."""

    def build(self, backbone: DiTConfig) -> Routing | None:
        """The routing of a run of this backbone; None without one."""
        if self.name == "none":
            return None
        first, last = 2 if self.first is None else self.first, self.last or backbone.depth - 2
        if self.name == "deferred_masking":
            last = backbone.depth
        if self.name == "sprint" and backbone.fusion is not None:
            first, last = backbone.fusion
        return Routing(self.name, self.share, first, last, self.until)

    def problems(self, backbone: DiTConfig) -> list[str]:
        """Lists contradictions between the fields, and with a backbone that has no problems of its own."""
        found = []
        if self.name == "deferred_masking" and self.last is not None:
            found.append(
                f"last: {self.last} is of tread; deferred_masking leaves tokens out to the end: leave routing.last out"
            )
        for name in ("first", "last"):
            if self.name == "sprint" and (block := getattr(self, name)) is not None:
                found.append(
                    f"{name}: {block} is of other methods; for sprint model.fusion says it: leave routing.{name} out"
                )
        routing = self.build(backbone)
        return found + (routing.problems(backbone) if routing else [])


class AlignmentSection(Section):
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight, in the loss, of aligning a block's tokens with a vision encoder's features, which the data set must hold; 0 is off,
    REPA takes 0.5 (docs/train_for_less.md)."""
    block: NotNegative | None = None
    """Block, counted from 0, whose output is aligned; by default the one that ends the first 2/7 of them, as REPA's 8th of 28."""
    hidden: Positive = 2048
    """Width of the two hidden layers of the projection, which is trained along."""
    until: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the run's steps after which there is no alignment."""

    def build(self, backbone: DiTConfig) -> Alignment | None:
        """The alignment of a run of this backbone; None without one."""
        if not self.weight:
            return None
        block = max(0, round(backbone.depth * 2 / 7) - 1) if self.block is None else self.block
        return Alignment(self.weight, block, self.hidden, self.until)


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: Muon for the matrices inside the blocks, AdamW for all else (docs/choices.md, "Muon")."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-4
    """Learning rate after warm-up, of AdamW and of Muon, whose updates are as large as AdamW's."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decays of AdamW's first and second moment."""
    momentum: Share = 0.95
    """Decay of Muon's momentum, with name muon."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Constant added to the root of AdamW's second moment."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight decay for weight matrices; biases, tables and vectors have none."""
    warmup_steps: NotNegative = 1000
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Course of the learning rate after warm-up: constant, or a half cosine down to a tenth at the last step."""
    ema_decay: Share = 0.9999
    """Decay of the weights' moving average (EMA); at step n, from 0, at most (1 + n) / (10 + n)."""
    more_ema_decays: tuple[Share, ...] = ()
    """Decays of further averages, 4 bytes a parameter over all processes each; of 0.999 the weights are named ema_0.999."""

    def averages(self) -> dict[str, float]:
        """The decay of each average, by the name of its weights."""
        return {"ema": self.ema_decay} | {f"ema_{decay}": decay for decay in self.more_ema_decays}

    def problems(self) -> list[str]:
        """Lists contradictions between the fields."""
        decays = (self.ema_decay, *self.more_ema_decays)
        twice = sorted({decay for decay in decays if decays.count(decay) > 1})
        return [
            f"more_ema_decays: {decay} is there twice, ema_decay ({self.ema_decay}) counted; leave it out"
            for decay in twice
        ]


class CheckpointSection(Section):
    every: Positive = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """Number of newest checkpoints that are kept: two at least, as the newest may prove damaged."""
    keep_every: NotNegative = 10000
    """Steps whose multiples keep their checkpoint for ever; 0 keeps none."""
    background: bool = True
    """Write checkpoints while training goes on, from a copy in host memory: 16 bytes a parameter over all processes."""
    time_limit: Annotated[float, Field(gt=0)] | None = None
    """Hours after which a run writes a checkpoint and ends with the exit code that requeues it; no limit by default."""


class GuardSection(Section):
    deviations: Annotated[float, Field(ge=0)] = 8.0
    """Robust standard deviations above the median beyond which a loss or gradient norm makes its step skipped; 0: no bound."""
    window: Positive = 256
    """Number of last applied steps that the bound is computed from, counted per group of comparable steps."""
    min_history: Positive = 100
    """Number of applied steps of a group before its bound takes effect."""
    patience: Positive = 5
    """Steps skipped in a row after which the run returns to its last good checkpoint, with other noise and data order."""
    rollbacks: NotNegative = 3
    """Number of these returns after which the run stops with an error."""
    seconds: Positive = 600
    """Seconds without progress of one process after which all stop; six times as long until the first step is done."""


class LoggingSection(Section):
    every: Positive = 20
    """Steps between points in TensorBoard and lines in the log."""
    timestep_bins: Positive = 5
    """Number of equal bins of the timestep, each with its own loss curve."""
    validate_every: Positive = 1000
    """Steps between validations on the samples of data.validation; before the first step and after the last there is one, too."""
    peak_tflops: float | None = None
    """Peak of the device in TFLOP/s, for MFU; by default the data sheet's, or measured where it is unknown."""


class PreviewSection(Section):
    every: NotNegative = 1000
    """Steps between previews (a sample grid and a mask map) in TensorBoard; 0 draws none."""
    prompts: Path = Path("preview_prompts.txt")
    """File of prompts, one a line; a relative path is looked up beside the YAML, here, and beside the shipped configs."""
    steps: Positive = 30
    """Number of sampling steps."""
    guidance: float = 5.5
    """Classifier-free guidance scale; 1 is none."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """Shift of the sampling times towards noise, with objective.name flow."""
    seed: int = 0
    """Seed of the pictures' starting noise."""

    def file(self) -> Path:
        """Path of the prompts' file."""
        return self.prompts if self.prompts.is_absolute() or self.prompts.exists() else CONFIGS / self.prompts


class Config(Section):
    name: str
    """Name of the stage, of its YAML and DeepSpeed files, and of its run directory."""
    run_dir: Path
    """Folder of checkpoints, event files and provenance; runs/NAME by default."""
    steps: Positive
    """Number of optimizer steps of the whole stage."""
    seed: int = 0
    """Seed of the initial weights, the data order, and every sample's noise."""
    deterministic: bool = False
    """Use deterministic kernels only: a resumed run on GPUs equals an uninterrupted one bit for bit, but is slower."""
    init_from: str | None = None
    """Run whose newest checkpoint gives the initial weights and EMA: a run directory, or a name under runs/."""
    carry_moments: bool = False
    """Take over the optimizer's moments too, with init_from."""
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    data: DataSection
    routing: RoutingSection = RoutingSection()
    alignment: AlignmentSection = AlignmentSection()
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    logging: LoggingSection = LoggingSection()
    preview: PreviewSection = PreviewSection()

    def problems(self) -> list[str]:
        """Lists contradictions between fields that are each valid."""
        found = []
        try:
            backbone = self.model.backbone()
        except ValueError as error:
            found.append(f"model.preset: {error}")
        else:
            problems, unit = backbone.problems(), DOWNSAMPLE * max(1, backbone.patch)
            found += [f"model.{p}" for p in problems]
            if not problems:
                found += [f"routing.{p}" for p in self.routing.problems(backbone)]
            if self.data.resolution % unit:
                found.append(
                    f"data.resolution: {self.data.resolution} must be divisible by {unit} "
                    f"({DOWNSAMPLE} of the VAE × the patch of {backbone.patch})"
                )
            elif not problems:
                side = self.data.resolution // unit
                too_small = backbone.grid_problems((side, side))
                found += [f"model.{p}" for p in too_small]
                if (alignment := self.alignment.build(backbone)) and not too_small:
                    found += [f"alignment.{p}" for p in alignment.problems(backbone, (side, side))]
        found += [f"data.{p}" for p in self.data.problems()]
        found += [f"optimizer.{p}" for p in self.optimizer.problems()]
        if self.optimizer.warmup_steps > self.steps:
            found.append(f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is above steps ({self.steps})")
        if self.guard.min_history > self.guard.window:
            found.append(f"guard.min_history: {self.guard.min_history} is above guard.window ({self.guard.window})")
        if self.carry_moments and not self.init_from:
            found.append("carry_moments: true needs init_from, the run whose moments are taken")
        if self.preview.every and not self.preview.file().is_file():
            found.append(f"preview.prompts: no file {self.preview.file()}; give one, or set preview.every=0")
        if self.preview.every and self.preview.guidance != 1 and not (self.data.caption_dropout or self.init_from):
            found.append(
                f"preview.guidance: {self.preview.guidance} needs predictions without a caption, which are not trained with "
                "data.caption_dropout=0; set preview.guidance=1, or a caption_dropout such as 0.1"
            )
        return found


def load(name: str, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """Reads a stage's configuration by its name or its YAML's path, and its DeepSpeed JSON.

    Raises:
        ConfigError: with every problem found.
    """
    problems: list[str] = []
    files = read_config(name, overrides or [], problems, upgrade)
    deepspeed = read_deepspeed(files, problems)
    try:
        config = Config.model_validate(files.content)
    except ValidationError as error:
        problems += [explain(e, Config, RENAMED) for e in error.errors()]
        problems += _contradictions(files.content, error)
    else:
        problems += [*config.problems(), *_without_effect(config, files)]
    if problems:
        raise ConfigError(f"{files.path}:\n" + "\n".join(f"  {p}" for p in problems))
    return config, deepspeed


def _without_effect(config: Config, files: ConfigFiles) -> list[str]:
    """Lists fields that were given for a method that is not chosen."""
    try:
        backbone = asdict(config.model.backbone())
    except ValueError:  # an unknown preset: `Config.problems` says so
        return []
    values = flatten({**config.model_dump(), "model": backbone})
    return without_effect(values, flatten(files.content), files.overrides)


def kept_config(run: Path) -> Config:
    """The config that a run directory keeps, of this version or an earlier one. Raises ConfigError where it cannot be read."""
    path = run / KEPT_CONFIG
    try:
        return Config.model_validate(upgrade(read_yaml(path)))
    except ValidationError as error:
        problems = [explain(e, Config, RENAMED) for e in error.errors()]
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {p}" for p in problems)) from error


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Gives the fields of a config that an older run kept their present names."""
    content = copy.deepcopy(content)
    if "model" in content:
        content["model"] = upgrade_fields(content["model"])
    if "after" in content.get("guard", {}):
        content["guard"]["min_history"] = content["guard"].pop("after")
    return content


# In place of required fields that are missing or wrong: values that contradict no other field.
STAND_INS = {"name": "run", "run_dir": "run", "steps": sys.maxsize, "data": {"path": "data", "resolution": 5760}}


def _contradictions(content: dict[str, Any], error: ValidationError) -> list[str]:
    """Lists contradictions among the fields that are valid, where others are missing or wrong."""
    wrong = {field_of(e["loc"], Config) for e in error.errors()}
    rest = copy.deepcopy(content)
    for *sections, name in wrong:
        section: Any = rest
        for part in sections:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(name, None)
    rest = {**STAND_INS, **rest, "data": {**STAND_INS["data"], **rest.get("data", {})}}  # type: ignore[dict-item]
    found = Config.model_validate(rest).problems()
    return [problem for problem in found if tuple(problem.partition(":")[0].split(".")) not in wrong]


def geometry(deepspeed: dict[str, Any], world: int) -> int:
    """The gradient accumulation steps by which `world` processes reach the global batch.

    Raises:
        ConfigError: naming the world sizes and micro-batches that divide.
    """
    batch, micro = deepspeed["train_batch_size"], deepspeed["train_micro_batch_size_per_gpu"]
    if batch % (world * micro) == 0:
        return batch // (world * micro)
    worlds = [w for w in range(1, batch // micro + 1) if batch % (w * micro) == 0]
    micros = [m for m in range(1, batch // world + 1) if batch % (world * m) == 0]
    raise ConfigError(
        f"{world} processes × micro-batch {micro} do not divide the global batch of {batch}.\n"
        f"  with micro-batch {micro}, process counts that do: {_list(worlds)}\n"
        f"  with {world} processes, micro-batches that do: {_list(micros)}\n"
        "  change the job's size, or deepspeed.train_micro_batch_size_per_gpu"
    )


def _list(numbers: list[int]) -> str:
    return ", ".join(str(n) for n in numbers) or "none"
