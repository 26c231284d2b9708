"""Compiled graphs: how many torch.compile makes in training steps whose captions differ, against the most that is stated.

FocusDiT by Inductor, as it is trained, with the time of a step before and after its graphs are there. The other methods without
code generation, which does not change their number of graphs.
"""

from __future__ import annotations

import statistics
import time

import torch

from pretrain.bench.gpu.session import Numbers, Session, Wrong
from pretrain.bench.gpu.training import training_pass
from pretrain.compilation import GRAPHS, compile_for_training
from pretrain.distributed import torch_private
from pretrain.models import DiTConfig
from pretrain.models.budget_choices import every_budget

IMAGES = 4


def run(session: Session) -> None:
    """Counts the graphs of each backbone."""
    shapes = session.shapes
    if session.settings.small:  # tests/unit/test_compilation.py counts the others' graphs on CPUs
        session.measure("focusdit, eager", _count, "focusdit", shapes.focusdit, "eager")
        return
    session.measure("focusdit, inductor", _count, "focusdit", shapes.focusdit, "inductor")
    for name, config in (("dit", shapes.dit), ("flexdit", shapes.flexdit), ("mediators", shapes.mediators)):
        session.measure(f"{name}, eager", _count, name, config, "eager", needs=5)


def _count(session: Session, name: str, config: DiTConfig, backend: str) -> Numbers:
    """The graphs of training steps, each of other captions, and of another compute budget where the model has several."""
    torch.compiler.reset()
    before = torch_private.compiled_graphs()
    model = session.model(config)
    compile_for_training(model, backend)
    resolution, budgets, seconds = max(session.shapes.micro), every_budget(config), []
    for number in range(session.shapes.compile_steps):
        lengths = session.lengths(IMAGES, seed=number)
        step = training_pass(session, model, resolution, IMAGES, lengths, budgets[number % len(budgets)])
        start = time.perf_counter()
        step()
        session.wait()
        seconds.append(time.perf_counter() - start)
        if session.left() < 3:
            break
    graphs = torch_private.compiled_graphs() - before
    half = len(seconds) // 2
    numbers = {
        "graphs": graphs,
        "at most": GRAPHS[name],
        "steps": len(seconds),
        "first step s": seconds[0],
        "later, median ms": 1e3 * statistics.median(seconds[half:]),
        "later, longest ms": 1e3 * max(seconds[half:]),
    }
    if graphs > GRAPHS[name]:
        raise Wrong(f"{graphs} graphs, at most {GRAPHS[name]} are stated", numbers)
    return numbers
