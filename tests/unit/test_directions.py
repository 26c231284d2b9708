"""Who may import whom (docs of the layout: "directions that never turn round"), read from the imports themselves."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Each heavy library, and the only files that may meet it.
ROOMS = {
    "webdataset": {"data_prep/inputs/tars.py", "data_prep/shapes.py"},
    "streaming": {
        "data_prep/worker/parts.py",
        "data_prep/common/mds.py",
        "pretrain/data/shard_reader.py",
        "pretrain/data/streaming_private.py",
        "pretrain/bench/loader.py",
    },
    "deepspeed": {
        "pretrain/distributed/engine.py",
        "pretrain/distributed/deepspeed_private.py",
        "pretrain/distributed/rendezvous.py",
    },
    "tensorboard": {"pretrain/monitoring/monitor.py", "pretrain/demo.py"},
    "torch.utils.tensorboard": {"pretrain/monitoring/monitor.py", "pretrain/demo.py", "data_prep/worker/monitor.py"},
    "fsspec": {"data_prep/common/storage.py"},
    "transformers": {
        "data_prep/encoders.py",
        "data_prep/assets/make_tiny_encoders.py",
        "pretrain/pipeline.py",
        "pretrain/bench/timing.py",
        "pretrain/bench/step.py",
        "pretrain/bench/picture.py",
        "pretrain/bench/encode.py",
    },
}
ROOMS["diffusers"] = ROOMS["transformers"] | {"pretrain/schedulers.py"}


def files(*folders: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for folder in folders for p in (ROOT / folder).rglob("*.py"))


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
        if top(name) == "pretrain":
            assert within(name, "pretrain.models") or within(name, "pretrain.diffusion"), name
        else:
            assert top(name) in {"torch", "einops", "numpy"} | sys.stdlib_module_names, name


@pytest.mark.parametrize("path", files("pretrain/models"))
def test_models_do_not_know_the_objectives(path):
    assert not [name for name in imports(path) if within(name, "pretrain.diffusion")]


@pytest.mark.parametrize("library", ROOMS)
def test_heavy_libraries_keep_to_their_rooms(library):
    met = {path for path in files("pretrain", "data_prep") if any(within(name, library) for name in imports(path))}
    assert met <= ROOMS[library]


@pytest.mark.parametrize("path", files("data_prep"))
def test_no_file_in_data_prep_hides_a_package(path):
    """`python data_prep/encode.py` puts data_prep/ first on sys.path: its files would be found before the packages."""
    stem = Path(path).stem
    imported = {top(name) for file in files("data_prep") for name in imports(file)} - {"data_prep"}
    assert stem not in imported | sys.stdlib_module_names | {"datasets", "accelerate"}
