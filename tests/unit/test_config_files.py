"""One's own experiment: a YAML anywhere with a base, its DeepSpeed JSON and prompts beside it; a kept config repeats its run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from support import ROOT, complaint, starts

from pretrain.config import geometry, load
from pretrain.config_files import ConfigError

README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2}}


@pytest.fixture
def write(tmp_path: Path):
    """Writes a file of an experiment, in a folder that is not the current one; returns its path."""

    def file(name: str, content: object) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return file


# ---- a base ----


def test_a_yaml_holds_only_what_differs_from_a_stage(write) -> None:
    mine = write("mine.yaml", "base: stage1_256\nsteps: 70000\ndata: {path: /shards}\noptimizer: {lr: 1.0e-4}\n")
    config, deepspeed = load(mine, ["optimizer.warmup_steps=2000"])
    base, base_deepspeed = load("stage1_256", ["data.path=/shards", "steps=70000"])
    assert (config.name, config.run_dir) == ("mine", Path("runs/mine"))
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-4, 2000)
    assert config.model_copy(update={k: getattr(base, k) for k in ("name", "run_dir", "optimizer")}) == base
    assert deepspeed == base_deepspeed


def test_bases_of_bases_from_each_ones_own_folder(write) -> None:
    write("shared/common.yaml", "base: demo_512\nsteps: 50\nseed: 3\ninit_from: other\n")
    write("shared/small.json", SMALL)
    write(
        "shared/middle.yaml",
        "base: common.yaml\ndeepspeed: small.json\nname: middle\nrun_dir: runs/elsewhere\nsteps: 60\n",
    )
    config, deepspeed = load(write("mine/top.yaml", "base: ../shared/middle.yaml\nseed: 4\ninit_from:\n"))
    assert (config.name, config.run_dir) == ("top", Path("runs/top")), "never the base's"
    assert (config.steps, config.seed, config.init_from) == (60, 4, None)
    assert config.model.position_scale == load("demo_512")[0].model.position_scale == 0.5
    assert deepspeed == SMALL


def test_the_deepspeed_json_beside_the_yaml_or_only_what_differs(write) -> None:
    write("mine.json", SMALL)
    own = load(write("own.yaml", "base: stage1_256\ndeepspeed: mine.json\n"))[1]
    assert own == SMALL
    some = load(write("some.yaml", "base: stage1_256\ndeepspeed: {train_batch_size: 64, bf16: {enabled: false}}\n"))[1]
    assert some == load("stage1_256")[1] | {"train_batch_size": 64, "bf16": {"enabled": False}}
    other = load(write("other.yaml", "base: some.yaml\ndeepspeed: demo_256\n"))[1]
    assert other == load("demo_256")[1], "a file takes the place of all before it"
    given = load("stage1_256", [f"deepspeed={Path(write('mine.json', SMALL))}", "deepspeed.train_batch_size=6"])[1]
    assert given == SMALL | {"train_batch_size": 6}


def test_prompts_beside_the_yaml(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prompts = write("far/prompts.txt", "a lighthouse\n")
    mine = write("far/mine.yaml", "base: demo_256\npreview: {prompts: prompts.txt}\n")
    assert load(mine)[0].preview.file() == Path(prompts)
    assert (
        load(write("near/derived.yaml", "base: ../far/mine.yaml\n"))[0].preview.file().read_text() == "a lighthouse\n"
    )
    shipped = load(write("far/without.yaml", "base: demo_256\n"))[0].preview
    assert shipped.prompts == Path("demo_prompts.txt"), "found wherever the package is"
    monkeypatch.chdir(tmp_path)
    assert load(mine, ["preview.prompts=far/prompts.txt"])[0].preview.file().read_text() == "a lighthouse\n"


def test_named_sources_are_replaced_not_merged(write) -> None:
    write("first.yaml", "base: demo_256\ndata: {sources: {a: 1, b: 2}}\n")
    second = write("second.yaml", "base: first.yaml\ndata: {sources: {c: 3}}\n")
    assert load(second)[0].data.sources == {"c": 3}
    assert load(second, ["data.sources={d: 4}"])[0].data.sources == {"d": 4}
    assert load(second, ["data.sources.d=4"])[0].data.sources == {"c": 3, "d": 4}


@pytest.mark.parametrize(
    ("yaml", "line"),
    [
        ("base: stage9\n", "/mine.yaml: base: no config 'stage9'; there are demo_256, "),
        ("base: nowhere.yaml\n", "/mine.yaml: base: no config file "),
        ("base: demo_256.yaml\n", "/demo_256.yaml; did you mean the stage demo_256?"),
        (
            "base: demo_256\noptimizer.lr: 1e-3\n",
            "optimizer.lr: unknown field; in a YAML a section is nested: optimizer: {lr: …}",
        ),
        ("base: mine.yaml\n", "its base leads back to it: "),
        ("base: $NOWHERE/x.yaml\n", "$NOWHERE is not set"),
        ("base: [stage1_256]\n", "base: ['stage1_256'] must be a stage's name, or a YAML file's path"),
    ],
)
def test_a_base_that_is_none_is_one_line(write, yaml: str, line: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(write("mine.yaml", yaml))
    assert line in str(refusal.value)


def test_a_yaml_in_another_encoding_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("base: demo_256  # Zürich\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"mine.yaml: is no text in UTF-8 \(.* 0xfc .*\); save it as UTF-8"):
        load(str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(("words", "lines"), [
    (["optimizer.lr", "=", "1e-4"], 3 * ["an override is section.key=value, without blanks"]),
    (["run_dir="], ["run_dir: must be a path, not None"]),
])  # fmt: skip
def test_overrides_that_are_none(words: list[str], lines: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        load("demo_256", words)
    found = str(refusal.value).splitlines()[1:]
    assert len(found) == len(lines) and all(line in there for line, there in zip(lines, found, strict=True))


@pytest.mark.parametrize(
    ("deepspeed", "line"),
    [
        ({**SMALL, "train_batchsize": 4}, "deepspeed.train_batchsize: unknown field; did you mean 'train_batch_size'?"),
        (
            {**SMALL, "optimizer": {}},
            "deepspeed.optimizer: is not used, but the config's section optimizer; leave it out",
        ),
        ({**SMALL, "zero_optimization": {}}, 'must be 2: "zero_optimization": {"stage": 2} (in '),
        ({**SMALL, "train_batch_size": True}, "deepspeed.train_batch_size: True must be a whole number above 0"),
        ([], "mine.json must hold an object, {…}"),
        ("{,", "mine.json is not JSON: Expecting property name"),
    ],
)
def test_a_deepspeed_json_that_cannot_serve(write, deepspeed: object, line: str) -> None:
    write("mine.json", deepspeed)
    (said,) = complaint(name=write("mine.yaml", "base: demo_256\ndeepspeed: mine.json\n"))
    assert line in said


def test_without_base_and_deepspeed_the_mend_is_said(write) -> None:
    lines = complaint(name=write("mine.yaml", "steps: 5\n"))
    assert "deepspeed: missing; name its JSON file (deepspeed: FILE.json), or take a stage's (base: STAGE)" in lines
    assert starts(lines) == ["data", "deepspeed", "optimizer.warmup_steps"]


def test_readmes_experiment_loads(write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    yaml, commands = re.findall(
        r"### An experiment of your own.*?```yaml\n(.*?)```.*?```\n(.*?)```", README, re.DOTALL
    )[0]
    assert yaml.count("\n") <= 10
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    prompts = write("birds.txt", "a heron\n")
    config, deepspeed = load(write("birds.yaml", yaml))
    assert (config.name, config.run_dir, config.steps) == ("birds", Path("runs/birds"), 20000)
    assert (config.model.preset, config.data.path) == ("dit_b2", "/scratch/me/birds")
    assert config.preview.file() == Path(prompts)
    assert config.optimizer == load("stage1_256")[0].optimizer
    assert geometry(deepspeed, 8) == 1
    assert [words.split()[:4] for words in commands.splitlines() if words.startswith("python")] == [
        ["python", "-m", "pretrain.train", "~/experiments/birds.yaml"],
        ["python", "-m", "pretrain.launch", "~/experiments/birds.yaml"],
        ["python", "-m", "pretrain.train", "runs/birds/config.yaml"],
    ]
    assert "a copy of this YAML with `base: stage2_512` and `init_from: birds`" in README
    second = yaml.replace("base: stage1_256", "base: stage2_512\ninit_from: birds\n#")
    after, deepspeed = load(write("birds_512.yaml", second))
    assert (after.init_from, after.data.resolution, after.data.path) == ("birds", 512, config.data.path)
    assert replace(after.model.backbone(), position_scale=1.0) == config.model.backbone()
    assert deepspeed["train_batch_size"] == 256 and after.preview.file() == Path(prompts)
    assert "`base: demo_256` and `demo_512`, which neither compile nor compute in bf16" in README
    for stage in ("demo_256", "demo_512"):
        config, deepspeed = load(stage)
        assert not config.model.compile and not deepspeed["bf16"]["enabled"]


# ---- paths ----


def test_home_and_variables_in_a_yaml_and_on_the_command_line(write, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    write("scratch/base.yaml", "base: demo_256\nsteps: 21\ndata: {path: '${SCRATCH}/shards'}\n")
    write("scratch/small.json", SMALL)
    mine = write("mine.yaml", "base: ~/scratch/base.yaml\ndeepspeed: $SCRATCH/small.json\nseed: ${steps}\n")
    config, deepspeed = load("~/mine.yaml", ["run_dir=~/runs/x", "init_from=$SCRATCH/before", "data.cache=~/"])
    assert (config.data.path, config.run_dir) == (f"{tmp_path}/scratch/shards", tmp_path / "runs/x")
    assert (config.init_from, config.data.cache) == (f"{tmp_path}/scratch/before", tmp_path)
    assert config.seed == 21, "another field's value"
    assert deepspeed == SMALL
    assert load(mine)[0].data.path == config.data.path


def test_a_variable_that_is_not_set_is_one_problem_among_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOWHERE", raising=False)
    lines = complaint("data.path=$NOWHERE/x", "run_dir=~nobody_of_this_name/x", "init_from=${no.field}", "seed=many")
    assert "data.path: $NOWHERE/x: $NOWHERE is not set; set it, or write the path out" in lines
    assert starts(lines) == ["Interpolation key 'no.field' not found full_key", "data.path", "run_dir", "seed"]


# ---- a run's own config ----


def keep(folder: Path, name: str, *overrides: str) -> None:
    """What `save_provenance` keeps of a run of two processes."""
    config, deepspeed = load(name, list(overrides))
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(config.model_dump(mode="json")), folder / "config.yaml")
    (folder / "ds_config.json").write_text(json.dumps(deepspeed | {"gradient_accumulation_steps": 16}))


def test_a_runs_config_repeats_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["deepspeed.train_batch_size=64", "optimizer.lr=3e-3", "model.mask=none"]
    keep(tmp_path / "runs/first", "demo_256", "run_dir=runs/first", *words)
    assert load("runs/first/config.yaml") == load("demo_256", ["run_dir=runs/first", *words]), "goes on in its folder"
    again = load("runs/first/config.yaml", ["run_dir=runs/again"])
    assert again == load("demo_256", ["run_dir=runs/again", *words])
    (tmp_path / "runs/first").rename(tmp_path / "moved")
    assert load("moved/config.yaml")[0].run_dir == Path("moved")
    (tmp_path / "mine.yaml").write_text("base: moved/config.yaml\nseed: 1\n")
    derived, deepspeed = load("mine.yaml")
    assert (derived.name, derived.run_dir, derived.seed, derived.optimizer.lr) == ("mine", Path("runs/mine"), 1, 3e-3)
    assert deepspeed["train_batch_size"] == 64
    with pytest.raises(ConfigError, match=r"no config 'moved'.*did you mean moved/config.yaml\?"):
        load("moved")


def test_an_older_runs_config_repeats_it_too(tmp_path: Path) -> None:
    keep(tmp_path / "old", "demo_256", "guard.min_history=7")
    content = (tmp_path / "old/config.yaml").read_text()
    (tmp_path / "old/config.yaml").write_text(content.replace("min_history", "after"))
    _, now = load("demo_256")
    zero = now["zero_optimization"] | {"contiguous_gradients": True}
    earlier = now | {"communication_data_type": "fp32", "zero_optimization": zero}
    (tmp_path / "old/ds_config.json").write_text(json.dumps(earlier))
    config, deepspeed = load(str(tmp_path / "old/config.yaml"))
    assert config.guard.min_history == 7
    assert deepspeed == now, "without what has no effect any more"


# ---- all problems at once ----


@pytest.mark.parametrize(
    "wrong",
    ["steps=abc", "data.resolution=big", "optimizer.betas=[0.9,1.0]", "data.sources={a: -1}", "data.path=null",
     "name=null", "model.position_scale=[1,2,3]", "data.sources={a: 3", "=5"],
)  # fmt: skip
def test_a_wrong_field_hides_no_contradiction_of_others(wrong: str) -> None:
    lines = complaint(wrong, "guard.min_history=300", "checkpoint.keep_last=1", "carry_moments=true", "data.workers=-1")
    others = {"guard.min_history", "checkpoint.keep_last", "carry_moments", "data.workers"}
    assert set(starts(lines)) > others
    field = wrong.partition("=")[0]
    assert all(field in line for line in lines if line.partition(":")[0] not in others), "and nothing else"


def test_a_section_that_is_no_section_hides_nothing() -> None:
    assert starts(complaint("data=3", "carry_moments=true")) == ["carry_moments", "data"]


def test_a_wrong_size_of_patch_is_no_crash() -> None:
    assert "model.patch: 0 must be above 0" in complaint("model.patch=0")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("batch_size=8", "here it is deepspeed.train_batch_size (of all processes; "),
        ("train_batch_size=8", "did you mean deepspeed.train_batch_size?"),
        ("lr=1", "did you mean optimizer.lr?"),
        ("data.batch_size=8", "here it is deepspeed.train_batch_size"),
        ("model.lr=1", "did you mean optimizer.lr?"),
        ("prompts=x.txt", "did you mean preview.prompts?"),
        ("keep_last=3", "did you mean checkpoint.keep_last?"),
        ("epochs=3", "here it is steps"),
        ("stepz=3", "did you mean 'steps'?"),
    ],
)
def test_a_field_by_anothers_name_or_place_is_pointed_to(override: str, hint: str) -> None:
    (line,) = complaint(override)
    assert line.startswith(f"{override.partition('=')[0]}: unknown field; ")
    assert hint in line
