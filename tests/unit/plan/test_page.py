"""docs/planning.md's tables are what the planner computes.

`PYTHONPATH=tests:. python tests/unit/plan/test_page.py` writes them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from support import ROOT
from tables import with_tables

from pretrain.plan.__main__ import parse
from pretrain.plan.figures import number
from pretrain.plan.planning import of_all, of_stage, sides_of
from pretrain.plan.setting import setting_of
from pretrain.plan.stage import Stage
from pretrain.plan.sweep import point, together

PAGE = ROOT / "docs/planning.md"
# The commands that the page names.
PAPER = "stage1_256 stage2_512 --gpu h100 --samples 140e6 --price 2.5 --nodes"
NODES = (4, 128)
OF_STAGE = (
    ("largest micro-batch", "images"),
    ("memory at micro-batch", "GiB a GPU"),
    ("seconds of a step", ""),
    ("hours", ""),
    ("GPU-days", ""),
    ("money", "at 2.5 an hour"),
    ("samples", "1/s a node"),
    ("reading", "GB/s a node"),
    ("network, mean", "GB/s a node"),
)


def stages(args: argparse.Namespace) -> list[Stage]:
    return [Stage.load(name, args.overrides, setting_of(args, None)) for name in args.stages]


def paper() -> Iterator[str]:
    """The paper's schedule on few and on many GPUs."""
    plans = [stages(parse(f"{PAPER} {nodes}".split())) for nodes in NODES]
    columns = [(s, f"`{s.name}` on {s.cluster.gpus:,} of {s.setting.cluster.gpus:,}") for plan in plans for s in plan]
    yield f"| | {' | '.join(title for _, title in columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    found = [list(of_stage(s, sides_of(plans[0]))) for s, _ in columns]
    for name, unit in OF_STAGE:
        cells = []
        for (stage, _), figures in zip(columns, found, strict=True):
            exact = f"{name} {stage.micro.images}" if name.startswith("memory") else name
            cells.append(number(next(f.value for f in figures if f.name == exact)))
        yield f"| {name}{f', {unit}' if unit else ''} | {' | '.join(cells)} |"


def data() -> Iterator[str]:
    """What both stages share."""
    plan = stages(parse(f"{PAPER} {NODES[0]}".split()))
    first = list(of_stage(plan[0], sides_of(plan)))
    rows = [f for f in first if f.name in ("parameters", "a checkpoint", "writing one")]
    rows += [f for f in of_all(plan, plan[0].setting) if f.part == "data" or f.name == "money, encoding"]
    yield "| | | how |"
    yield "|---|---|---|"
    for f in rows:
        yield f"| {f.name} | {number(f.value)} {f.unit} | {f.how} |"


def sweep() -> Iterator[str]:
    """Both stages together on some numbers of GPUs, as simulated."""
    plan = stages(parse(f"{PAPER} {NODES[0]}".split()))
    yield "| GPUs | hours | GPU-hours | money | efficiency | goodput | step: passes | waiting | reduction | update | gather |"
    yield "|---" * 11 + "|"
    for gpus in (32, 256, 1024):
        found = [point(stage.on(gpus), overlap=True) for stage in plan]
        p = together(found, [stage.config.steps for stage in plan])
        parts = (p.compute_s, p.waiting_s, p.reduction_s, p.optimizer_s, p.gather_s)
        cells = [f"{gpus:,}", f"{p.hours:.2f}", f"{p.gpu_hours:,.0f}", f"{p.money:,.0f}"]
        cells += [f"{share:.1%}" for share in (p.efficiency, p.goodput, *(part / p.step_s for part in parts))]
        yield f"| {' | '.join(cells)} |"


TABLES = {"paper": paper, "data": data, "sweep": sweep}


def test_the_tables_are_the_planners() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_tables(text, TABLES)
    assert all(f"python -m pretrain.plan {PAPER} {nodes}" in text for nodes in NODES)


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), TABLES), encoding="utf-8")
