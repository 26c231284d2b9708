"""The pages for users: each command in them has options that exist; the paper's tables and figures are all accounted for."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from support import ROOT

from data_prep.weights import TEXT_ENCODERS, VAES, local_folder

PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
COMMAND = re.compile(r"(?:python |-m )((?:-m )?(?:data_prep|pretrain)[./][\w./]+)((?: [^\n`#|…]+)?)")
PLACES = {
    "data_prep.shapes",
    "data_prep.encode",
    "data_prep.verify",
    "data_prep.convert",
}  # commands that are files, too


def commands() -> set[tuple[str, str]]:
    """Modules and the words after them, of every command in the pages."""
    found = set()
    for text in PAGES.values():
        for name, words in COMMAND.findall(text.replace("\\\n", " ")):
            module = name.removeprefix("-m ").removesuffix(".py").replace("/", ".")
            found.add((module, words.split(" 2>")[0].strip()))
    return found


def subcommand(module: str, words: list[str]) -> list[str]:
    """The command's first word, where it names a subcommand."""
    names = {
        "pretrain.bench": words[:1],
        "pretrain.analyze": words[:1],
        "pretrain.evaluate": [word for word in words[:1] if word == "pairwise"],
    }
    return names.get(module, [])


def help_of(module: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The help of a command, or of its subcommand."""
    package = (ROOT / module.replace(".", "/")).is_dir()
    command = importlib.import_module(f"{module}.__main__" if package else module).main
    with pytest.raises(SystemExit):
        command([*subcommand(module, words), "--help"])
    return capsys.readouterr().out


def test_the_reader_of_commands_finds_them() -> None:
    assert len(commands()) > 60
    assert {"pretrain.train", "pretrain.prune", "pretrain.bench", *PLACES} <= {module for module, _ in commands()}


@pytest.mark.parametrize(
    "module", sorted({module for module, _ in commands()} - {"data_prep.assets.make_tiny_encoders"})
)
def test_every_option_that_a_page_names_exists(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    helps: dict[str, str] = {}
    for text in sorted(text for name, text in commands() if name == module):
        words = shlex.split(text.partition(" # ")[0])
        options = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
        if options:
            key = " ".join(subcommand(module, words))
            helps[key] = helps.get(key) or help_of(module, words, capsys)
            known = set(re.findall(r"--[\w-]+", helps[key]))
            assert options <= known, f"{module} {text}"


def test_each_table_and_figure_of_the_paper_has_a_command_or_a_reason() -> None:
    rows = [line.split("|")[1:-1] for line in PAGES["paper.md"].splitlines() if line.startswith(("| Fig", "| Tab"))]
    named = " ".join(row[0] for row in rows)
    for what in (*(f"Figure {i}" for i in range(1, 11)), *(f"Table {i}" for i in range(1, 4))):
        assert re.search(rf"{what}\b", named), what
    for row in rows:
        here = row[2]
        assert (
            "`python -m pretrain." in here
            or "not here, because" in here
            or "as Figure" in here
            or "for the same" in here
        )


def test_the_encoders_that_the_clusters_page_fetches_are_known() -> None:
    names = re.findall(r"local_folder\('([\w-]+)', (\w+)\)", PAGES["cluster.md"])
    tables = {"TEXT_ENCODERS": TEXT_ENCODERS, "VAES": VAES}
    assert [(name in tables[table]) for name, table in names] == [True, True]
    assert local_folder("tiny", TEXT_ENCODERS).is_dir()


def test_readme_has_a_line_for_each_page() -> None:
    assert [name for name in PAGES if name != "README.md" and f"(docs/{name})" not in PAGES["README.md"]] == []
