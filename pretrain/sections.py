"""Sections of a config that follow from a dataclass: its fields, each of which may be left out."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


def replace_fields(config: Any, changed: dict[str, Any]) -> Any:
    """A dataclass with some fields changed, those of its sections one by one."""
    whole = {
        name: replace_fields(getattr(config, name), value) if is_dataclass(getattr(config, name)) else value
        for name, value in changed.items()
    }
    return replace(config, **whole)


def _docs(shape: type) -> dict[str, str]:
    """The docstrings under the fields of a dataclass."""
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(shape))).body
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: doc.value.value
        for field, doc in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


def optional_fields(shape: type) -> dict[str, Any]:
    """The fields of a dataclass, each of which may be left out; those of its sections likewise."""
    hints, docs = get_type_hints(shape), _docs(shape)
    optional = {}
    for name in (f.name for f in fields(shape)):
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            hint = create_model(hint.__name__, __base__=Section, **optional_fields(hint))
        optional[name] = (hint | None, Field(None, description=docs[name]))
    return optional
