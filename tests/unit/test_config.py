"""Configurations: every problem at once, each with its path and mend; overrides; the batch geometry; what ships."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support import complaint, starts

from pretrain import config as configs
from pretrain.config import Config, geometry, load, upgrade
from pretrain.config_files import CONFIGS, ConfigError, flatten, known, read_yaml
from pretrain.config_problems import CHOICES
from pretrain.diffusion import EpsilonPrediction, RectifiedFlow
from pretrain.handover import Encoding, problems
from pretrain.models import PRESETS, DiT
from pretrain.resilience.capacity import activation_bytes, gib, state_bytes

ROOT = Path(__file__).parents[2]


def stage(folder: Path, yaml: str, deepspeed: object = None) -> str:
    """A stage `own` of one's own; returns its YAML's path."""
    content = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}
    (folder / "own.json").write_text(json.dumps(content if deepspeed is None else deepspeed))
    (folder / "own.yaml").write_text(f"deepspeed: own.json\n{yaml}")
    return str(folder / "own.yaml")


SMALLEST = "steps: 5\ndata: {path: d, resolution: 256}\noptimizer: {warmup_steps: 1}\npreview: {every: 0}\n"


@pytest.mark.parametrize("name", known())
def test_every_shipped_config_loads(name):
    config, deepspeed = load(name)
    assert config.name == name
    assert config.run_dir == Path("runs") / name
    assert geometry(deepspeed, 1) >= 1
    assert config.preview.file().read_text().strip()
    assert config.model.backbone().problems() == []


def test_every_stage_has_its_deepspeed_file_and_slurm_script():
    """But for those that vary another one: they have its."""
    own = {name for name in known() if "base" not in read_yaml(CONFIGS / f"{name}.yaml")}
    assert {p.stem for p in (ROOT / "ds_configs").glob("*.json")} == own
    stages = {name for name in own if name.startswith("stage")}
    assert stages >= {"stage1_256", "stage2_512"}
    assert {p.stem for p in (ROOT / "slurm").glob("stage*.sh")} == stages
    for name in stages:
        assert f"sbatch slurm/{name}.sh" in (ROOT / "pretrain/configs" / f"{name}.yaml").read_text()


def test_a_stages_init_from_is_a_stage():
    chained = {name: load(name)[0].init_from for name in known()}
    assert (chained["stage2_512"], chained["stage3_finetune"]) == ("stage1_256", "stage2_512")
    assert {origin for origin in chained.values() if origin} <= set(known())


def test_the_papers_recipe_is_one_name_away():
    """It differs from the shipped stages in the objective alone, and its second stage follows its first."""
    assert (
        problems([(f"{stage}_paper", []) for stage in ("stage1_256", "stage2_512")], Encoding("data/main", (256, 512)))
        == []
    )
    for stage in ("stage1_256", "stage2_512"):
        (ours, ds), (paper, paper_ds) = load(stage), load(f"{stage}_paper")
        assert ds == paper_ds
        old, new = (flatten(config.model_dump(exclude={"name", "run_dir", "init_from"})) for config in (ours, paper))
        assert {key: new[key] for key in new if new[key] != old[key]} == {"objective.name": "epsilon"}
        assert (paper.optimizer.name, paper.optimizer.lr, paper.model.backbone().mask_dropout) == ("adamw", 2e-4, 0.1)


def test_the_papers_batches():
    assert load("stage1_256")[1]["train_batch_size"] == 2048
    assert load("stage2_512")[1]["train_batch_size"] == 1280
    for name in ("stage1_256", "stage2_512"):
        config, deepspeed = load(name)
        assert deepspeed["zero_optimization"]["stage"] == 2
        assert config.optimizer.lr == 2e-4
        assert config.model.preset == "focusdit_1b_shared2d"
        assert all(geometry(deepspeed, gpus) >= 1 for gpus in (8, 16, 32))


def test_the_batch_geometry_stands_in_the_deepspeed_file_alone():
    for path in (ROOT / "pretrain/configs").glob("*.yaml"):
        assert "batch_size" not in path.read_text(), path


def test_every_field_has_a_docstring():
    undocumented = []

    def walk(section, path: str) -> None:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, configs.Section):
                walk(field.annotation, f"{path}{name}.")
            elif not field.description:
                undocumented.append(path + name)

    walk(Config, "")
    assert undocumented == []


def test_overrides():
    plain, shipped = load("demo_256")
    config, deepspeed = load(
        "demo_256",
        [
            "steps=7",
            "model.mask=none",
            "optimizer.betas=[0.8,0.9]",
            "optimizer.warmup_steps=3",
            "data.path=/elsewhere",
            "run_dir=out",
            "deepspeed.train_batch_size=64",
            "deepspeed.zero_optimization.overlap_comm=false",
        ],
    )
    assert (config.steps, config.model.mask, config.optimizer.betas) == (7, "none", (0.8, 0.9))
    assert (config.data.path, config.run_dir) == ("/elsewhere", Path("out"))
    assert config.optimizer.lr == plain.optimizer.lr, "the YAML's other fields stay"
    assert deepspeed["train_batch_size"] == 64
    assert deepspeed["train_micro_batch_size_per_gpu"] == shipped["train_micro_batch_size_per_gpu"]
    assert deepspeed["zero_optimization"] == {"stage": 2, "overlap_comm": False}
    assert load("demo_256") == (plain, shipped)


def test_the_model_section_changes_single_points_of_the_preset():
    unchanged = load("demo_256")[0].model
    assert unchanged.backbone() == replace(PRESETS["focusdit_tiny"], heads=16, mask_dropout=0.0, position_scale=0.25)
    for first, second in (
        ("demo_256", "demo_512"),
        ("stage1_256", "stage2_512"),
    ):  # as far across as in the first stage
        scales = [load(name)[0].model.backbone().position_scale for name in (first, second)]
        assert scales[1] == 2 * scales[0]
    changed = load("demo_256", ["model.ffn=tapered", "model.mask=release", "model.mask_dropout=0.2"])[
        0
    ].model.backbone()
    assert (changed.ffn, changed.mask, changed.mask_dropout) == ("tapered", "release", 0.2)
    assert changed.width == PRESETS["focusdit_tiny"].width
    DiT(changed)


def test_the_objective_is_built_by_its_name():
    assert load("demo_256", ["objective.name=epsilon"])[0].objective.build() == EpsilonPrediction()
    flow = load("demo_256", ["objective.mean=-0.5", "objective.std=2", "objective.shift=3"])[0].objective.build()
    assert flow == RectifiedFlow(mean=-0.5, std=2.0, shift=3.0, times="logit_normal")
    flow = load("stage1_256", ["objective.times=uniform", "objective.shift=3"])[0].objective.build()
    assert flow == RectifiedFlow(shift=3.0, times="uniform")


def test_all_problems_of_fields_at_once():
    lines = complaint(
        "steps=-1",
        "modle.preset=dit_tiny",
        "model.preset_name=dit_tiny",
        "data.resolution=big",
        "optimizer.betas=[0.9,1.0]",
        "objective.name=velocity",
        "nonsense",
        "deepspeed.train_batch_size=0",
        "deepspeed.gradient_accumulation_steps=4",
        "deepspeed.zero_optimization.stage=3",
    )
    assert starts(lines) == sorted(
        [
            "steps",
            "modle",
            "model.preset_name",
            "data.resolution",
            "optimizer.betas.1",
            "objective.name",
            "nonsense",
            "deepspeed.train_batch_size",
            "deepspeed.gradient_accumulation_steps",
            "deepspeed.zero_optimization.stage",
        ]
    )
    said = "\n".join(lines)
    for mend in ("'big'", "'flow' or 'epsilon'", "less than 1", "greater than 0", "section.key=value", "must be 2"):
        assert mend in said


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("communication_data_type=bf16", "communication_data_type: has no effect"),
        ("comms_logger.enabled=true", "comms_logger: waits for the device after each"),
        ("timers.throughput.enabled=true", "timers: waits for the device twice in each micro-batch"),
        ("data_types.grad_accum_dtype=bf16", "data_types: gradients are always added up in fp32"),
        ("zero_optimization.reduce_scatter=false", "zero_optimization.reduce_scatter: has no effect"),
        ("zero_optimization.allgather_bucket_size=9", "zero_optimization.allgather_bucket_size: has no effect"),
    ],
)
def test_a_deepspeed_key_without_effect_or_with_a_price_is_refused(override: str, said: str):
    (line,) = complaint(f"deepspeed.{override}")
    assert line.startswith(f"deepspeed.{said}") and "leave it out" in line


def test_a_gpu_of_80_gb_holds_the_largest_micro_batch_that_divides():
    """On the 32 GPUs of the scripts; the sums in the configs' comments are these."""
    for name in ("stage1_256", "stage2_512", "stage3_finetune"):
        config, deepspeed = load(name)
        assert not config.model.recompute
        micro, share = deepspeed["train_micro_batch_size_per_gpu"], deepspeed["train_batch_size"] // 32
        states = state_bytes(config, deepspeed, 32)
        needed = {m: states + activation_bytes(config, m) for m in range(micro, share + 1) if share % m == 0}
        assert needed.pop(micro) < 0.8 * 80e9, "room for the allocator, NCCL and the pictures of a preview"
        assert all(bytes_ > 80e9 for bytes_ in needed.values())
        comment = (ROOT / "pretrain/configs" / f"{name}.yaml").read_text()
        assert f"{gib(states)} of states and {gib(activation_bytes(config, micro))} of activations" in comment


def test_all_contradictions_at_once():
    lines = complaint(
        "model.ffn=shared",
        "model.shared_width=7",
        "model.mask_dropout=1.5",
        "data.resolution=250",
        "carry_moments=true",
        "preview.prompts=nowhere.txt",
        "preview.guidance=3",
        "optimizer.warmup_steps=1000",
    )
    assert starts(lines) == [
        "carry_moments",
        "data.resolution",
        "model.mask_dropout",
        "model.shared_width",
        "optimizer.warmup_steps",
        "preview.guidance",
        "preview.prompts",
    ]
    said, steps = "\n".join(lines), load("demo_256")[0].steps
    for mend in (
        "must be 1, 2 or 3",
        "in [0, 1)",
        "divisible by 32",
        "needs init_from",
        "set preview.guidance=1, or a caption_dropout such as 0.1",
        "preview.every=0",
        f"({steps})",
    ):
        assert mend in said


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("data.path=s3://bucket/set", "data.cache: path is remote, so give a folder on each node's own disk"),
        ("data.path=https://host/set", "data.path: https://host/set must be a local folder, or an s3:// or gs:// URL"),
        (
            "data.cache_limit=9gb",
            "data.cache_limit: it limits the cache, and there is none; set data.cache, or leave it out",
        ),
        (
            "data.sources={a: 1, b: -1}",
            "data.sources.b: must be a share above 0, or shares by step such as {0: 0.2, 20000: 0.5}, not -1",
        ),
        ("data.validation=1.5", "data.validation: 1.5 must be a share above 0 and below 1, or a source's name"),
        ("data.validation=0", "data.validation: 0 must be a share above 0 and below 1, or a source's name"),
        (
            "data.validation=''",
            "data.validation: must be a share above 0 and below 1, or a source's name; leave it out for no validation",
        ),
        ("data.validation_samples=20", "data.validation_samples: Input should be a multiple of 8, not 20"),
        ("logging.validate_every=0", "logging.validate_every: Input should be greater than 0, not 0"),
        (
            "optimizer.more_ema_decays=[0.9, 0.99]",
            "optimizer.more_ema_decays: 0.99 is there twice, ema_decay (0.99) counted; leave it out",
        ),
    ],
)
def test_where_the_data_set_is_and_what_is_drawn(override, line):
    assert complaint(override) == [line]


DIT = ["model.preset=dit_tiny", "model.heads=null"]


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["optimizer.name=adamw", "optimizer.momentum=0.9"], "optimizer.momentum: has no effect with optimizer.name=adamw"),
        (["routing.share=0.75"], "routing.share: has no effect with routing.name=none; leave it out, or set routing.name=tread"),
        (["routing={until: 0.5}"], "routing.until: has no effect with routing.name=none"),
        (["alignment.block=1"], "alignment.block: has no effect with alignment.weight=0"),
        (["objective.name=epsilon", "objective.shift=3"], "objective.shift: has no effect with objective.name=epsilon"),
        (["objective.name=epsilon", "objective.times=uniform", "objective.mean=1"], "objective.mean: has no effect"),
        (["objective.times=uniform", "objective.std=2"], "objective.std: has no effect with objective.times=uniform"),
        (["data.validation_samples=16"], "data.validation_samples: has no effect with data.validation=null"),
        (["model.mediators.numbers=[4]"], "model.mediators.numbers: has no effect with model.attention=full"),
        (["model.flexdit={grid: [8, 8]}"], "model.flexdit.grid: has no effect with model.density=dense"),
        (["model.ffn=tapered", "model.shared_width=3"], "model.shared_width: has no effect with model.ffn=tapered"),
        ([*DIT, "model.mask_hidden=[8]"], "model.mask_hidden: has no effect with model.mask=none"),
        ([*DIT, "model.mask=release", "model.mask_hidden=[8]"], None),
        (["alignment.weight=0", "alignment.block=1", "data.validation=null", "logging.validate_every=5"], None),
        (["model.flexdit.grid=null", "data.validation=0.1", "data.validation_samples=16"], None),
    ],
)  # fmt: skip
def test_an_override_without_effect_is_refused(overrides, line):
    """What a shipped YAML sets for a method that an override sets aside (Muon's, the mask's) is no mistake."""
    if line is None:
        load("demo_256", overrides)
    else:
        assert [said.startswith(line) for said in complaint(*overrides)].count(True) == 1


def test_the_choices_are_fields_of_the_config():
    for path in [path for choice in CHOICES for path in (choice.field, *choice.others)]:
        section, name = path.split(".")
        assert name in Config.model_fields[section].annotation.model_fields, path


def test_a_yaml_whose_fields_nothing_reads_is_refused(tmp_path):
    unread = "routing: {share: 0.75}\nalignment: {block: 0}\n"
    lines = complaint(name=stage(tmp_path, SMALLEST + unread))
    assert starts(lines) == ["alignment.block", "routing.share"]
    # Chosen, or set aside by name; a model's and validation's are for whoever chooses them by an override.
    for_others = "model: {shared_width: 3, preset: dit_tiny}\nlogging: {validate_every: 5}\n"
    path = stage(tmp_path, SMALLEST + unread + for_others)
    load(path, ["routing.name=none", "alignment.weight=0"])
    load(path, ["routing.name=tread", "routing.first=0", "routing.last=1", "alignment.weight=1"])


def test_a_source_is_not_both_trained_on_and_held_out():
    assert load("demo_256", ["data.sources={a: 1, b: 2}", "data.validation=c"])[0].data.validation == "c"
    assert complaint("data.sources={a: 1, b: 2}", "data.validation=b") == [
        "data.validation: b is in data.sources, too, and would be trained on; leave it out of one of them"
    ]


def test_a_data_set_by_its_path_or_url():
    data = load("demo_256", ["data.path=gs://bucket/set", "data.cache=/disk", "data.sources={a: 3, b: 1}"])[0].data
    assert (data.path, data.cache, data.sources) == ("gs://bucket/set", Path("/disk"), {"a": 3, "b": 1})
    assert configs.DataSection(path=Path("/shards"), resolution=256).path == "/shards"


def test_problems_of_fields_do_not_hide_contradictions():
    lines = complaint("logging.every=often", "model.preset=dit_huge", "optimizer.warmup_steps=1000")
    assert starts(lines) == ["logging.every", "model.preset", "optimizer.warmup_steps"]


def test_an_unknown_preset_names_the_known():
    (line,) = complaint("model.preset=dit_huge")
    assert line.startswith("model.preset: ")
    assert all(name in line for name in PRESETS)


def test_an_unknown_field_suggests_a_near_one_or_lists_the_known():
    assert complaint("optimizer.weigth_decay=0.1") == [
        "optimizer.weigth_decay: unknown field; did you mean 'weight_decay'?"
    ]
    (line,) = complaint("checkpoint.zzz=1")
    assert line == "checkpoint.zzz: unknown field; known here: every, keep_last, keep_every, background, time_limit"


def test_a_renamed_field_says_its_new_name(tmp_path):
    for old, new in configs.RENAMED.items():
        assert complaint(f"{old}=7") == [f"{old}: is now {new}"]
    path = stage(tmp_path, SMALLEST + "guard: {after: 7}\n")
    assert complaint(name=path) == ["guard.after: is now guard.min_history"]


def test_an_older_runs_config_is_read_with_its_fields_renamed():
    config = load("demo_256", ["guard.min_history=7"])[0]
    older = config.model_dump(mode="json")
    older["guard"]["after"] = older["guard"].pop("min_history")
    kept = json.loads(json.dumps(older))
    assert Config.model_validate(upgrade(older)) == config
    assert older == kept, "what is given stays as it is"
    assert upgrade(config.model_dump()) == config.model_dump()
    assert upgrade({"steps": 3}) == {"steps": 3}


def test_a_missing_field_says_how_to_set_it(tmp_path):
    path = stage(tmp_path, "model: {preset: dit_tiny}\ndata: {path: x}\n")
    lines = complaint(name=path)
    assert starts(lines) == ["data.resolution", "steps"]
    assert "data.resolution: missing; set it in the YAML or as data.resolution=value" in lines
    assert load(path, ["data.resolution=256", "steps=2000"])[0].steps == 2000


def test_a_section_that_is_no_section():
    (line,) = complaint("model=3")
    assert line.startswith("model: ")
    assert "3" in line


def test_an_unknown_config_names_the_known():
    with pytest.raises(ConfigError, match=r"no config 'stage9'; there are demo_256, .*stage2_512"):
        load("stage9")


def test_a_config_by_its_path(tmp_path):
    config, deepspeed = load(stage(tmp_path, SMALLEST))
    assert (config.name, config.run_dir) == ("own", Path("runs/own"))
    assert deepspeed["train_batch_size"] == 8


def test_a_missing_deepspeed_file_is_named(tmp_path):
    path = stage(tmp_path, SMALLEST)
    (tmp_path / "own.json").unlink()
    (line,) = complaint(name=path)
    assert line.startswith("deepspeed: no DeepSpeed file ")
    assert "own.json (No such file or directory)" in line


def test_a_deepspeed_file_without_its_numbers(tmp_path):
    path = stage(tmp_path, SMALLEST, deepspeed={"train_batch_size": 8.5})
    assert starts(complaint(name=path)) == [
        "deepspeed.train_batch_size",
        "deepspeed.train_micro_batch_size_per_gpu",
        "deepspeed.zero_optimization.stage",
    ]


@pytest.mark.parametrize("override", ["deepspeed=5", "deepspeed.zero_optimization=2"])
def test_a_deepspeed_section_that_is_no_section(override):
    (line,) = complaint(override)
    assert line.startswith(override.partition("=")[0])


@pytest.mark.parametrize("yaml", ["steps: [1\n", "- steps\n- data\n", "steps: 6\n" + SMALLEST])
def test_a_broken_yaml_is_a_config_error(tmp_path, yaml):
    path = stage(tmp_path, yaml)
    with pytest.raises(ConfigError, match=r"own\.yaml"):
        load(path)


@pytest.mark.parametrize(("world", "steps"), [(1, 32), (2, 16), (16, 2), (32, 1)])
def test_geometry(world, steps):
    assert geometry({"train_batch_size": 2048, "train_micro_batch_size_per_gpu": 64}, world) == steps


def numbers(text: str, start: str) -> list[int]:
    """The numbers of the error's line that begins with `start`."""
    (line,) = [line for line in text.splitlines() if line.strip().startswith(start)]
    return [int(word) for word in line.rpartition(": ")[2].split(", ") if word != "none"]


@pytest.mark.parametrize(
    ("batch", "micro", "world"), [(48, 4, 5), (2048, 64, 24), (1280, 20, 48), (8, 16, 1), (8, 2, 9)]
)
def test_geometry_names_what_would_divide(batch, micro, world):
    with pytest.raises(ConfigError) as refusal:
        geometry({"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro}, world)
    said = str(refusal.value)
    assert f"{world} processes × micro-batch {micro} do not divide the global batch of {batch}" in said
    assert "deepspeed.train_micro_batch_size_per_gpu" in said
    fits = [w for w in range(1, batch + 1) if batch % (w * micro) == 0]
    assert numbers(said, f"with micro-batch {micro}") == fits
    assert numbers(said, f"with {world} processes") == [m for m in range(1, batch + 1) if batch % (m * world) == 0]


def test_a_config_is_frozen():
    config, _ = load("demo_256")
    with pytest.raises(ValueError, match="frozen"):
        config.steps = 3


def test_configs_ship_with_the_package():
    setup = (ROOT / "setup.py").read_text()
    assert "configs/*.yaml" in setup
    assert "configs/*.txt" in setup
