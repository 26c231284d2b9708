"""Each private name of torch that is relied on is there, does what is needed, and is reached in one file."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
from engines import one_process
from private_interfaces import documented, listed, underscored
from support import ROOT

from pretrain.distributed import torch_private
from pretrain.distributed.torch_private import PRIVATE

FILE = "pretrain/distributed/torch_private.py"


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with one_process():
        yield


@pytest.mark.parametrize("name", sorted(listed(PRIVATE)))
def test_the_name_is_there(name: str) -> None:
    owner, _, attribute = name.rpartition(".")
    holder = torch.UntypedStorage if owner == "torch.UntypedStorage" else importlib.import_module(owner)
    assert getattr(holder, attribute, None) is not None, (
        f"torch {torch.__version__} has no {name}: see docs/dependencies.md"
    )


def test_the_table_of_the_docs() -> None:
    assert documented(FILE) == listed(PRIVATE)
    assert {name.rpartition(".")[2] for name in underscored(FILE)} == {n.rpartition(".")[2] for n in listed(PRIVATE)}


def test_no_other_file_reaches_private_names() -> None:
    """Of any library; `os._exit` is public in spite of its name."""
    files = (path.relative_to(ROOT).as_posix() for path in (ROOT / "pretrain").rglob("*.py"))
    found = {file: underscored(file) - {"os._exit"} for file in files if not file.endswith("_private.py")}
    assert {file: names for file, names in found.items() if names} == {}


def test_one_graph_more_than_forbidden_is_an_error() -> None:
    """Read back from torch's own state; a changing dimension needs one graph, another shape a second one."""
    double = torch.compile(lambda x: 2 * x, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False):
        torch_private.forbid_falling_back(1)
        assert torch._dynamo.config.recompile_limit == 1
        assert torch._dynamo.config.fail_on_recompile_limit_hit
        before = torch_private.compiled_graphs()
        for length in (3, 4, 9):
            x = torch.ones(2, length)
            torch_private.mark_changing(x, 1)
            assert torch.equal(double(x), torch.full((2, length), 2.0))
        assert torch_private.compiled_graphs() == before + 1
        with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
            double(torch.ones(5, 3))


def test_set_timeout() -> None:
    """Of the default group, and of another one alone."""
    cpu = torch.device("cpu")
    default = torch.distributed.distributed_c10d._get_default_group()._get_backend(cpu)
    other = torch.distributed.new_group([0])
    torch_private.set_timeout(timedelta(seconds=123))
    torch_private.set_timeout(timedelta(seconds=45), other)
    assert default.options._timeout == timedelta(seconds=123)
    assert other._get_backend(cpu).options._timeout == timedelta(seconds=45)


def test_clone_default_store() -> None:
    one, other = torch_private.clone_default_store(), torch_private.clone_default_store()
    one.set("name", "value")
    assert other.get("name") == b"value"


def test_new_shared_storage() -> None:
    storage = torch_private.new_shared_storage(24)
    assert storage.is_shared() and storage.nbytes() == 24
    assert torch.empty(0).set_(storage).view(2, 3).fill_(1).sum() == 6


def test_norms_and_lerp() -> None:
    """As the operations on one tensor after the other."""
    tensors, ends = ([torch.randn(n) for n in (1, 5, 17)] for _ in range(2))
    assert torch.equal(torch_private.norms(tensors), torch.stack([t.norm() for t in tensors]))
    assert torch_private.norms([t.bfloat16() for t in tensors]).dtype == torch.float32
    expected = [torch.lerp(t, e, 0.3) for t, e in zip(tensors, ends, strict=True)]
    torch_private.lerp_(tensors, ends, 0.3)
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))
