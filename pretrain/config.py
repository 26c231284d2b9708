"""A run's configuration: YAML, overrides, and every problem at once.

`pretrain/configs/NAME.yaml` says what differs from the defaults below, `ds_configs/NAME.json` is DeepSpeed's (ZeRO stage,
precision, clipping and the batch geometry, which stands nowhere else). On the command line `section.key=value` changes the
first and `deepspeed.key=value` the second.
"""

from __future__ import annotations

import copy
import difflib
import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from data_prep.encoders import DOWNSAMPLE
from pretrain.diffusion import EpsilonPrediction, Objective, RectifiedFlow
from pretrain.models import DiTConfig, preset

CONFIGS = Path(__file__).parent / "configs"
DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"

# What may be added to a DeepSpeed file from the command line, beside what it already has.
DEEPSPEED_KEYS = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping", "bf16", "data_types",
    "communication_data_type", "zero_optimization", "wall_clock_breakdown", "flops_profiler", "comms_logger",
}  # fmt: skip

# Where shards can be streamed from.
REMOTE = ("s3", "gs")

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Proportion = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ConfigError(ValueError):
    """Every problem of a configuration, one a line, each with its path and the mend."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class ModelSection(Section):
    preset: str = "focusdit_1b_shared2d"
    """A name of `python -m pretrain.models`; the fields below change single points of it."""
    mask: str | None = None
    """Query mask: none | release | adaln_single."""
    ffn: str | None = None
    """Vocabulary layout: uniform | shared | tapered."""
    shared_width: int | None = None
    """Entries of the shared expert, in widths D."""
    attention: str | None = None
    """Attention among the image's tokens: full | mediators (their cost is linear in the tokens)."""
    mediators: tuple[int, ...] | None = None
    """Numbers of mediators, each a square number, the fewest first; each training step draws one."""
    density: str | None = None
    """Tokens that the blocks compute on: dense (all) | flexdit (fewer in the middle of the network)."""
    split: tuple[int, int, int, int] | None = None
    """flexdit: pooling blocks, modules, sparse blocks in each, dense blocks on top; by default the depth's own."""
    sparsity: tuple[float, float] | None = None
    """flexdit: share of tokens removed at data, and at noise."""
    absolute: str | None = None
    """Positions added to the tokens: none (the authors' release) | sincos (PixArt-alpha)."""
    position_scale: float | None = None
    """Positions are divided by it: 2 lets 512 px start from what 256 px learned."""
    mask_dropout: float | None = None
    """Dropout of the query mask while training."""
    recompute: bool = False
    """Activation checkpointing: recompute each block in the backward pass; saves memory, costs about a third more time."""
    compile: bool = False
    """Compile each block with torch.compile; pays on GPUs."""

    def backbone(self) -> DiTConfig:
        """The backbone's shape. Raises ValueError for an unknown preset."""
        names = {f.name for f in fields(DiTConfig)}
        changed = {k: v for k, v in self.model_dump().items() if k in names and v is not None}
        return replace(preset(self.preset), **changed)


class ObjectiveSection(Section):
    name: Literal["flow", "epsilon"] = "flow"
    """flow: rectified flow, velocity = noise − latent; epsilon: DDPM's linear schedule, predicting the noise."""
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    """flow: how the times t of training lie in 0..1 before the shift; uniform is SiT's."""
    mean: float = 0.0
    """flow with logit-normal times: mean of the normal whose logistic is t."""
    std: Annotated[float, Field(gt=0)] = 1.0
    """flow with logit-normal times: its standard deviation."""
    shift: Annotated[float, Field(gt=0)] = 1.0
    """flow: above 1 trains more near noise."""

    def build(self) -> Objective:
        if self.name == "epsilon":
            return EpsilonPrediction()
        return RectifiedFlow(self.mean, self.std, self.shift, self.times)


class DataSection(Section):
    path: Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]
    """The data set, made by data_prep/encode.py: its folder, or its s3:// or gs:// URL."""
    resolution: Positive
    """Side of the square pictures, in pixels; the data set must hold it. With buckets: the side of a square of their area."""
    sources: Annotated[dict[str, Proportion], Field(min_length=1)] | None = None
    """Proportions of named sources in what is drawn, such as {coyo: 0.8, art: 0.2}; by default every sample once an epoch."""
    cache: Path | None = None
    """Folder on each node's own disk for shards that are fetched or decompressed; a local, uncompressed set needs none."""
    cache_limit: Annotated[str, Field(pattern=r"^\d+(\.\d+)?(mb|gb|tb)$")] | None = None
    """Most that the shards in the cache take, such as 500gb; those unused for longest are removed. By default all are kept."""
    caption_dropout: Share = 0.1
    """Share of captions replaced by the null text, for classifier-free guidance."""
    workers: NotNegative = 4
    """Loader processes per rank."""
    prefetch: Positive = 2
    """Batches that each loader process keeps ready."""
    timeout: NotNegative = 600
    """Seconds after which a loader that gives nothing is an error; 0 waits for ever."""
    damaged_shards: NotNegative = 10
    """Shards that may be missing or damaged, other samples of their set standing in for theirs; with more, training stops."""
    shuffle_block: Positive = 262144
    """Samples among which are shuffled; part of the data order."""
    canonical_nodes: Positive = 1
    """mosaicml-streaming's `num_canonical_nodes`: part of the data order, the same for every cluster size."""

    def problems(self) -> list[str]:
        """Contradictions between the fields that say where the data set is read."""
        scheme = self.path.partition("://")[0] if "://" in self.path else None
        if scheme not in (None, *REMOTE):
            return [f"path: {self.path} must be a local folder, or an s3:// or gs:// URL"]
        if scheme and self.cache is None:
            return ["cache: path is remote, so give a folder on each node's own disk"]
        if self.cache_limit and self.cache is None:
            return ["cache_limit: it limits the cache, and there is none; set data.cache, or leave it out"]
        return []


class OptimizerSection(Section):
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """AdamW's learning rate after warm-up."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    """Decays of AdamW's first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of weight matrices; biases, tables and vectors have none."""
    warmup_steps: NotNegative = 1000
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or a half cosine down to a tenth at the last step."""
    ema_decay: Share = 0.9999
    """Decay of the weights' average; in the first steps no more than (1 + step) / (10 + step)."""


class CheckpointSection(Section):
    every: Positive = 1000
    """Steps between checkpoints; the last step always has one."""
    keep_last: Annotated[int, Field(ge=2)] = 3
    """The newest checkpoints that are kept: two at least, as the newest may prove damaged."""
    keep_every: NotNegative = 10000
    """Checkpoints at multiples of these steps are kept for ever; 0 keeps none."""

    background: bool = True
    """Write them while training goes on, from a copy in the host's memory: 16 bytes a parameter over all processes."""
    time_limit: Annotated[float, Field(gt=0)] | None = None
    """Hours after its start at which a run writes a checkpoint and ends to be started again; none by default."""


class GuardSection(Section):
    deviations: Annotated[float, Field(ge=0)] = 8.0
    """A step is skipped where its loss or gradient norm is so many robust deviations above the median; 0: where not finite."""
    window: Positive = 256
    """Last applied steps from which the bound comes; with FlexDiT's density, of the same bin of the noise level."""
    after: Positive = 100
    """So many of them before there is a bound."""
    patience: Positive = 5
    """Steps skipped in a row after which the run goes back to its last good checkpoint, with other noise and data order."""
    rollbacks: NotNegative = 3
    """Such returns before the run stops with a report."""
    seconds: Positive = 600
    """All processes stop where one of them shows no progress for so long; six times as long until the first step is done."""


class LoggingSection(Section):
    every: Positive = 20
    """Steps between points in TensorBoard and lines in the log."""
    timestep_bins: Positive = 5
    """Equal bins of the timestep, each with its own loss curve."""
    peak_tflops: float | None = None
    """The device's peak in TFLOP/s, for MFU; by default the data sheet's, or measured where it is unknown."""


class PreviewSection(Section):
    every: NotNegative = 1000
    """Steps between sample grids and mask maps in TensorBoard; 0 draws none."""
    prompts: Path = Path("preview_prompts.txt")
    """File of prompts, one a line; a relative path is looked up beside the configs."""
    steps: Positive = 30
    """Sampling steps."""
    guidance: float = 5.5
    """Classifier-free guidance scale; 1 is none."""
    shift: Annotated[float, Field(gt=0)] = 3.0
    """flow: shift of the sampling times towards noise."""
    seed: int = 0
    """Of the pictures' starting noise."""

    def file(self) -> Path:
        return self.prompts if self.prompts.is_absolute() or self.prompts.exists() else CONFIGS / self.prompts


class Config(Section):
    name: str
    """The stage's name: of the YAML file, the DeepSpeed file and the run directory."""
    run_dir: Path
    """Where checkpoints, event files and what was used are kept; runs/NAME by default."""
    steps: Positive
    """Optimizer steps of the whole stage."""
    seed: int = 0
    """Of the weights, the data order, and every sample's noise."""
    deterministic: bool = False
    """Only deterministic kernels, so that a resumed run on GPUs equals an uninterrupted one bit for bit; slower. CPUs' are."""
    init_from: str | None = None
    """Start from another run's newest checkpoint (a run directory, or a name under runs/): weights and EMA."""
    carry_moments: bool = False
    """With init_from: take over the optimizer's moments too."""
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    data: DataSection
    optimizer: OptimizerSection = OptimizerSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    logging: LoggingSection = LoggingSection()
    preview: PreviewSection = PreviewSection()

    def problems(self) -> list[str]:
        """Contradictions between fields that are each valid."""
        found = []
        try:
            backbone = self.model.backbone()
        except ValueError as error:
            found.append(f"model.preset: {error}")
        else:
            problems, unit = backbone.problems(), DOWNSAMPLE * backbone.patch
            found += [f"model.{p}" for p in problems]
            if self.data.resolution % unit:
                found.append(
                    f"data.resolution: {self.data.resolution} must be divisible by {unit} "
                    f"({DOWNSAMPLE} of the VAE × the patch of {backbone.patch})"
                )
            elif not problems:
                side = self.data.resolution // unit
                found += [f"model.{p}" for p in backbone.grid_problems((side, side))]
        found += [f"data.{p}" for p in self.data.problems()]
        if self.optimizer.warmup_steps > self.steps:
            found.append(f"optimizer.warmup_steps: {self.optimizer.warmup_steps} is above steps ({self.steps})")
        if self.guard.after > self.guard.window:
            found.append(f"guard.after: {self.guard.after} is above guard.window ({self.guard.window})")
        if self.carry_moments and not self.init_from:
            found.append("carry_moments: true needs init_from, the run whose moments are taken")
        if self.preview.every and not self.preview.file().is_file():
            found.append(f"preview.prompts: no file {self.preview.file()}; give one, or set preview.every=0")
        return found


def load(name: str, overrides: list[str] | None = None) -> tuple[Config, dict[str, Any]]:
    """Reads a stage's configuration by its name or its YAML's path, and its DeepSpeed JSON.

    Raises:
        ConfigError: with every problem found.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIGS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"no config {name!r}; there are {', '.join(known())}, or give a YAML file's path")
    problems: list[str] = []
    merged, deepspeed_changes = _merge(path, overrides or [], problems)
    deepspeed = _deepspeed(path.stem, deepspeed_changes, problems)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        problems += [_explain(e) for e in error.errors()]
        problems += _contradictions(merged, error)
    else:
        problems += config.problems()
    if problems:
        raise ConfigError(f"{path}:\n" + "\n".join(f"  {p}" for p in problems))
    return config, deepspeed


def _contradictions(content: dict[Any, Any], error: ValidationError) -> list[str]:
    """The contradictions among the fields that are valid; none where a required one is missing or wrong."""
    rest = copy.deepcopy(content)
    for wrong in error.errors():
        section: Any = rest
        for part in wrong["loc"][:-1]:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict):
            section.pop(wrong["loc"][-1], None)
    try:
        return Config.model_validate(rest).problems()
    except ValidationError:
        return []


def known() -> list[str]:
    """The names of the configs that ship with the package."""
    return sorted(p.stem for p in CONFIGS.glob("*.yaml"))


def _merge(path: Path, overrides: list[str], problems: list[str]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """The YAML with the overrides laid over it, and the overrides of DeepSpeed's file."""
    words = []
    for word in overrides:
        key, equals, _ = word.partition("=")
        if equals and key.strip():
            words.append(word)
        else:
            problems.append(f"{word}: an override is section.key=value")
    try:
        merged = OmegaConf.merge(
            {"name": path.stem, "run_dir": f"runs/{path.stem}"}, OmegaConf.load(path), OmegaConf.from_dotlist(words)
        )
        content = OmegaConf.to_container(merged, resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from error
    assert isinstance(content, dict)
    changes = content.pop("deepspeed", {})
    return content, changes


def _deepspeed(name: str, changes: dict[str, Any], problems: list[str]) -> dict[Any, Any]:
    """The stage's DeepSpeed JSON with the overrides laid over it."""
    path = DS_CONFIGS / f"{name}.json"
    if not path.is_file():
        problems.append(f"{path}: this stage's DeepSpeed file is missing")
        return {}
    if not isinstance(changes, dict):
        problems.append(f"deepspeed: {changes!r} is no section; override as deepspeed.key=value")
        changes = {}
    shipped = json.loads(path.read_text())
    content = OmegaConf.to_container(OmegaConf.merge(shipped, changes))
    assert isinstance(content, dict)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu"):
        if not isinstance(content.get(key), int) or content[key] < 1:
            problems.append(f"deepspeed.{key}: {content.get(key)!r} must be a whole number above 0 (in {path})")
    # DeepSpeed itself ignores what it does not know; the accumulation has a message of its own below.
    for key in sorted(changes.keys() - DEEPSPEED_KEYS - shipped.keys() - {"gradient_accumulation_steps"}):
        near = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1)
        problems.append(f"deepspeed.{key}: unknown field" + (f"; did you mean {near[0]!r}?" if near else ""))
    zero = content.get("zero_optimization")
    if not isinstance(zero, dict) or zero.get("stage") != 2:
        problems.append(f"deepspeed.zero_optimization.stage: must be 2 (in {path})")
    if isinstance(zero, dict) and {"offload_optimizer", "offload_param"} & zero.keys():
        problems.append(f"deepspeed.zero_optimization: offloading is not supported; leave it out (in {path})")
    if "gradient_accumulation_steps" in content:
        problems.append("deepspeed.gradient_accumulation_steps: leave it out; it follows from the batch and the GPUs")
    return content


def _explain(error: Any) -> str:
    """One pydantic error as path, problem and mend."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: type[BaseModel] = Config
        for part in error["loc"][:-1]:
            section = section.model_fields[part].annotation  # type: ignore[assignment]
        near = difflib.get_close_matches(error["loc"][-1], section.model_fields, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(section.model_fields)}"
        return f"{where}: unknown field; {hint}"
    if error["type"] == "missing":
        return f"{where}: missing; set it in the YAML or as {where}=value"
    return f"{where}: {error['msg']}, not {error['input']!r}"


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
