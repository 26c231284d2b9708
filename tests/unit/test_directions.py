"""Directions of imports between rooms, and the files that meet each library, read from the imports themselves."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each heavy library, and the files that meet it: these and no others.
LIBRARIES = {
    "webdataset": {
        "data_prep/conversion.py",
        "data_prep/inputs/finder.py",
        "data_prep/inputs/tars.py",
        "data_prep/shapes.py",
    },
    "pyarrow": {"data_prep/conversion.py", "data_prep/inputs/parquet_files.py"},
    "streaming": {
        "data_prep/common/mds.py",
        "data_prep/worker/parts.py",
        "pretrain/bench/loader.py",
        "pretrain/data/shard_reader.py",
        "pretrain/data/streaming_private.py",
    },
    "deepspeed": {
        "pretrain/distributed/deepspeed_private.py",
        "pretrain/distributed/engine.py",
        "pretrain/distributed/rendezvous.py",
    },
    "torchao": {"pretrain/fp8.py"},
    "torch_fidelity": {"pretrain/evaluate/metrics/fid.py"},
    "ImageReward": {"pretrain/evaluate/image_reward_server.py"},
    "tensorboard": {"pretrain/curves.py"},
    "torch.utils.tensorboard": {
        "data_prep/worker/monitor.py",
        "pretrain/evaluate/report.py",
        "pretrain/monitoring/curve_writer.py",
    },
    "fsspec": {"data_prep/common/storage.py"},
    "tenacity": {"data_prep/common/storage.py", "pretrain/evaluate/judge_endpoint.py"},
    "tqdm": {"data_prep/common/progress.py"},
    "transformers": {
        "data_prep/assets/make_tiny_encoders.py",
        "data_prep/encoders.py",
        "data_prep/features.py",
        "pretrain/bench/encode.py",
        "pretrain/bench/gpu/encoders.py",
        "pretrain/evaluate/clip.py",
        "pretrain/evaluate/geneval_models.py",
        "pretrain/evaluate/judge_folder.py",
        "pretrain/evaluate/weights.py",
    },
    "diffusers": {
        "data_prep/assets/make_tiny_encoders.py",
        "data_prep/encoders.py",
        "data_prep/mochi.py",
        "pretrain/bench/encode.py",
        "pretrain/bench/picture.py",
        "pretrain/bench/step.py",
        "pretrain/bench/timing.py",
        "pretrain/diffusers_private.py",
        "pretrain/pipeline.py",
        "pretrain/recipes.py",
        "pretrain/schedulers.py",
        "pretrain/transformer.py",
    },
    "omegaconf": {
        "pretrain/config_files.py",
        "pretrain/deepspeed_config.py",
        "pretrain/monitoring/provenance.py",
    },
}
# Where the underscored names of libraries are met (docs/dependencies.md).
PRIVATE = {
    "pretrain/data/streaming_private.py",
    "pretrain/diffusers_private.py",
    "pretrain/distributed/deepspeed_private.py",
    "pretrain/distributed/torch_private.py",
}
# The rooms, from the ground up: a room imports from lower floors only. A room is a folder, or a file beside the folders.
FLOORS: list[set[str]] = [
    {"data_prep/mochi.py", "data_prep/weights.py"},
    {"data_prep/common", "data_prep/encoders.py", "data_prep/pictures"},
    {"data_prep/features.py", "data_prep/inputs", "data_prep/schema.py", "data_prep/shapes.py"},
    {"data_prep/assets", "data_prep/shapes_checker.py"},
    {"data_prep/worker"},
    {"data_prep/checks", "data_prep/encode.py"},
    {"data_prep/conversion.py", "data_prep/verify.py"},
    {"data_prep/convert.py"},
    {
        "pretrain/config_files.py",
        "pretrain/console.py",
        "pretrain/curves.py",
        "pretrain/diffusers_private.py",
        "pretrain/gpus.py",
        "pretrain/models",
        "pretrain/sections.py",
        "pretrain/shares.py",
        "pretrain/state.py",
    },
    {"pretrain/deepspeed_config.py", "pretrain/demo.py", "pretrain/diffusion"},
    {"pretrain/config_problems.py"},
    {"pretrain/config.py", "pretrain/schedulers.py"},
    {"pretrain/distributed"},
    {"pretrain/checkpoint", "pretrain/compilation.py", "pretrain/data", "pretrain/fp8.py"},
    {"pretrain/hub.py", "pretrain/recipes.py"},
    {"pretrain/transformer.py"},
    {"pretrain/pipeline.py"},
    {"pretrain/sampling"},
    {
        "pretrain/compare",
        "pretrain/evaluate",
        "pretrain/export.py",
        "pretrain/import_release.py",
        "pretrain/monitoring",
        "pretrain/prune.py",
        "pretrain/sample.py",
    },
    {"pretrain/loss.py", "pretrain/resilience"},
    {"pretrain/handover.py", "pretrain/plan", "pretrain/training.py"},
    {"pretrain/chain.py", "pretrain/launch.py", "pretrain/train.py"},
    {"pretrain/ablate", "pretrain/bench"},
    {"pretrain/analyze"},
]
# The command `python -m pretrain.models` takes the parser of all commands and the VAE's downsampling, which stand in data_prep.
MODELS_COMMAND = {"pretrain/models/__main__.py", "pretrain/models/compare.py", "pretrain/models/table.py"}


def files(*folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py"))


@cache
def imports(path: str) -> set[str]:
    """Every module that the file imports anywhere in it, by its full name; of `from a import b` both a and a.b."""
    return imports_of((ROOT / path).read_text(), path)


def imports_of(source: str, path: str) -> set[str]:
    package, found = Path(path).parent.parts, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            origin = start if node.level else str(node.module)
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("__import__", "importlib.import_module"):
            assert isinstance(node.args[0], ast.Constant), f"{path}: an import by a computed name"
            found.add(str(node.args[0].value))
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def top(name: str) -> str:
    return name.partition(".")[0]


def test_the_reader_of_imports():
    """The other tests are worth what this one is."""
    source = (
        "import a.b as c, d\nfrom e import f, g as h\nfrom . import i\nfrom .j import k\nfrom ..l import m\n"
        "def late():\n    if True:\n        import n\n        from o.p import q\n    importlib.import_module('r')\n"
    )
    assert imports_of(source, "pretrain/models/x.py") == (
        {"a.b", "d", "e", "e.f", "e.g", "pretrain.models", "pretrain.models.i", "pretrain.models.j"}
        | {"pretrain.models.j.k", "pretrain.l", "pretrain.l.m", "n", "o.p", "o.p.q", "r"}
    )
    assert len(files("data_prep")) > 5
    assert len(files("pretrain/models", "pretrain/diffusion")) > 10


@pytest.mark.parametrize("path", files("data_prep"))
def test_data_prep_never_imports_pretrain(path):
    assert not [name for name in imports(path) if within(name, "pretrain")]


@pytest.mark.parametrize("path", files("pretrain/models", "pretrain/diffusion"))
def test_models_and_diffusion_know_torch_and_einops_only(path):
    for name in imports(path):
        if within(name, "data_prep.encoders") or within(name, "data_prep.common.command"):
            assert path in MODELS_COMMAND
        elif top(name) == "pretrain":
            assert within(name, "pretrain.models") or within(name, "pretrain.diffusion"), name
        else:
            assert top(name) in {"torch", "einops", "numpy"} | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", files("pretrain/models"))
def test_models_do_not_know_the_objectives(path):
    assert not [name for name in imports(path) if within(name, "pretrain.diffusion")]


@pytest.mark.parametrize("library", LIBRARIES)
def test_heavy_libraries_keep_to_their_files(library):
    met = {path for path in files("pretrain", "data_prep") if any(within(name, library) for name in imports(path))}
    assert met == LIBRARIES[library]


def private_names(source: str) -> set[str]:
    """The underscored names of torch, DeepSpeed and streaming that a source reaches."""
    libraries, found = {"torch", "deepspeed", "streaming"}, set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and top(str(node.module)) in libraries:
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            found |= {name for name in names if name.startswith("_")}
        elif isinstance(node, ast.Attribute) and top(ast.unparse(node.value)) in libraries | {"dist"}:
            found |= {node.attr} if re.match(r"_(?!_)", node.attr) else set()
    return found


def test_the_reader_of_private_names():
    source = "from torch.distributed import _a, b\nx = torch.c._d(1).e\ny = z._f\nw = dist._g.h\nv = torch.__version__"
    assert private_names(source) == {"_a", "_d", "_g"}


@pytest.mark.parametrize("path", files("pretrain", "data_prep"))
def test_private_names_are_met_in_their_files(path):
    # What torch's documents describe for others' use is public, whatever its name.
    names = private_names((ROOT / path).read_text()) - {"_pytree", "_python_dispatch"}
    assert not names or path in PRIVATE


def room(path: str) -> str:
    return "/".join(Path(path).parts[:2])


MODULES = {
    path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): path
    for path in files("pretrain", "data_prep")
}


def test_every_room_has_one_floor():
    rooms = {room(path) for path in MODULES.values()} - {"pretrain/__init__.py", "data_prep/__init__.py"}
    assert sorted(name for floor in FLOORS for name in floor) == sorted(rooms)


@pytest.mark.parametrize("path", files("pretrain", "data_prep"))
def test_rooms_import_downwards_only(path):
    level = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    for name in imports(path):
        target = MODULES.get(name)
        if target is None or room(target) not in level or room(target) == room(path):
            continue
        assert level[room(target)] < level[room(path)], f"{path} imports {target}"


def test_the_runs_state_needs_neither_torch_nor_deepspeed():
    assert {top(name) for name in imports("pretrain/state.py")} <= sys.stdlib_module_names


@pytest.mark.parametrize("path", files("data_prep"))
def test_no_file_in_data_prep_hides_a_package(path):
    """`python data_prep/encode.py` puts data_prep/ first on sys.path: its files would be found before the packages."""
    stem = Path(path).stem
    imported = {top(name) for file in files("data_prep") for name in imports(file)} - {"data_prep"}
    assert stem not in imported | sys.stdlib_module_names | {"datasets", "accelerate"}
