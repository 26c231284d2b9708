"""README's tree of files is complete, every path that the docs name exists, and docs/operations.md names tests that are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support import ROOT

TESTS = {
    name: path.name
    for path in (ROOT / "tests").rglob("test_*.py")
    for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)
}


def named() -> list[str]:
    rows = [line for line in (ROOT / "docs/operations.md").read_text().splitlines() if line.startswith("| ")]
    return [row.split("|")[-2].strip() for row in rows if not row.startswith("| what |")]


def test_each_row_names_a_test() -> None:
    names = named()
    assert len(names) > 30
    assert [name for name in names if name.strip("`") not in TESTS] == []


def test_no_test_of_a_fault_is_left_out() -> None:
    faults = {name for name, file in TESTS.items() if file in ("test_faults.py", "test_kills.py", "test_survives.py")}
    assert faults - {name.strip("`") for name in named()} == set()


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda page: page.name,
)
def test_every_row_belongs_to_a_table(page: Path) -> None:
    """A blank line would end the table, and the rows after it would be shown as text."""
    lines = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).splitlines()
    firsts = [i for i, line in enumerate(lines) if line.startswith("|") and not lines[i - 1].startswith("|")]
    assert [lines[i] for i in firsts if not re.match(r"\|( ?:?-+:? ?\|)+$", lines[i + 1])] == []
    for i in firsts:
        rows = lines[i : next((k for k in range(i, len(lines)) if not lines[k].startswith("|")), len(lines))]
        assert {len(re.findall(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", row))) for row in rows} == {rows[0].count("|")}


# ---- README's tree ----

README, BEGIN, END = ROOT / "README.md", "<!-- tree -->\n", "<!-- /tree -->"
WIDTH = 105  # of a purpose
FOLDERS = ("data_prep", "pretrain", "ds_configs", "slurm", "tests")
TESTS_BY_ROOM = {
    "tests/unit": "each file by itself; the folders are those of the code",
    "tests/integration": "commands and files together: real tars, shards, exports, an S3 server",
    "tests/distributed": "real training processes: killed, resumed, in other numbers",
    "tests/slurm": "the job scripts on a real two-node cluster that the tests start",
}


def purpose(path: Path) -> str:
    """The first sentence of a file's docstring or leading comment, as much of it as fits on a line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        about = ast.get_docstring(ast.parse(text)) or ""
    elif path.suffix == ".json":
        return "DeepSpeed's settings of this stage, and its batch"
    elif path.suffix == ".txt":
        return "prompts of the previews"
    else:
        lines = [line for line in text.splitlines() if not line.startswith(("#!", "#SBATCH"))]
        about = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    sentence = re.split(r"(?<!Fig)(?<!Eq)\.(?=\s|$)", " ".join(about.split("\n\n")[0].split()))[0]
    for separator in ("; ", ": ", ", "):  # a long sentence ends at the last part that fits
        while len(sentence) > WIDTH and separator in sentence[25:]:
            sentence = sentence.rpartition(separator)[0]
    return sentence.strip().removesuffix(":")


def tree() -> str:
    """Every file once, by rooms, with its purpose."""
    lines = []
    for folder in FOLDERS[:-1]:
        files = sorted(
            (p for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts),
            key=lambda p: (p.parent != ROOT / folder, str(p.parent), p.name),
        )
        shown = [
            p for p in files if p.suffix in (".py", ".yaml", ".json", ".sh", ".txt") and "tiny_" not in p.parent.name
        ]
        shown = [p for p in shown if p.name != "__init__.py" or ast.get_docstring(ast.parse(p.read_text()))]
        last = None
        for path in shown:
            if path.parent != last:
                last = path.parent
                lines.append(f"{last.relative_to(ROOT).as_posix()}/")
            lines.append(f"  {path.name:<24}{purpose(path)}".rstrip())
    lines.append("tests/")
    lines += [f"  {name.removeprefix('tests/') + '/':<24}{about}" for name, about in TESTS_BY_ROOM.items()]
    return "```\n" + "\n".join(lines) + "\n```\n"


def test_readmes_tree_is_that_of_the_files() -> None:
    """`python tests/unit/test_docs.py` writes it."""
    assert README.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0] == tree()


def test_every_file_has_a_purpose() -> None:
    short = [line for line in tree().splitlines() if line.startswith("  ") and len(line.split(None, 1)) < 2]
    assert short == []


# ---- paths in the docs ----

PATH = re.compile(r"\b((?:data_prep|pretrain|ds_configs|slurm|tests|docs)/[\w/.-]*\w\.(?:py|md|yaml|json|sh|txt))\b")


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
)
def test_every_path_that_is_named_exists(document: str) -> None:
    named_paths = set(PATH.findall((ROOT / document).read_text(encoding="utf-8")))
    examples = {path for path in named_paths if "NAME" in path}
    assert [path for path in sorted(named_paths - examples) if not (ROOT / path).exists()] == []


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    README.write_text(before + BEGIN + tree() + END + rest.partition(END)[2], encoding="utf-8")
