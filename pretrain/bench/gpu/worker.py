"""Process of one part: it imports what the part needs, waits for its settings on stdin, and runs it.

    python -m pretrain.bench.gpu.worker PART

It does not touch the device before the settings come, so it can be started while the part before still runs. What is printed
is the part's log.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

# Each part's module, which has `run(session)`; imported in that part's own process alone.
PARTS: dict[str, Callable[[], Any]] = {
    "environment": lambda: import_module("pretrain.bench.gpu.environment"),
    "ceilings": lambda: import_module("pretrain.bench.gpu.ceilings"),
    "network": lambda: import_module("pretrain.bench.gpu.network"),
    "correctness": lambda: import_module("pretrain.bench.gpu.correctness"),
    "graphs": lambda: import_module("pretrain.bench.gpu.graphs"),
    "training": lambda: import_module("pretrain.bench.gpu.training"),
    "zero": lambda: import_module("pretrain.bench.gpu.zero"),
    "profile": lambda: import_module("pretrain.bench.gpu.profile"),
    "checkpoint": lambda: import_module("pretrain.bench.gpu.checkpoint"),
    "sampling": lambda: import_module("pretrain.bench.gpu.sampling"),
    "methods": lambda: import_module("pretrain.bench.gpu.methods"),
    "encoders": lambda: import_module("pretrain.bench.gpu.encoders"),
    "skipping": lambda: import_module("pretrain.bench.gpu.skipping"),
}


def main(argv: list[str]) -> int:
    """Runs the part; returns the exit code."""
    missing = None
    try:
        module = PARTS[argv[0]]()
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("pretrain", "data_prep"):
            raise
        missing = f"{error.name} is missing"
    from pretrain.bench.gpu.session import Session, Settings

    words = sys.stdin.readline()
    if not words:  # the command has ended
        return 0
    session = Session(Settings(**json.loads(words)))
    if missing:
        session.put("", "not run", missing)
        return 0
    module.run(session)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
