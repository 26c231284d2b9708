"""The private name of diffusers that is relied on is there, and is reached in one file; test_recipes.py has what it does."""

from __future__ import annotations

import diffusers
from private_interfaces import documented, listed, underscored

from pretrain.diffusers_private import PRIVATE

FILE = "pretrain/diffusers_private.py"


def test_the_table_of_the_docs() -> None:
    assert documented(FILE) == listed(PRIVATE)
    assert {name.rpartition(".")[2] for name in underscored(FILE)} == {n.rpartition(".")[2] for n in listed(PRIVATE)}


def test_the_name_is_there() -> None:
    for owner, names in PRIVATE.items():
        for name in names:
            assert callable(getattr(getattr(diffusers, owner), name, None)), (
                f"diffusers {diffusers.__version__} has no {owner}.{name}: see docs/dependencies.md"
            )
