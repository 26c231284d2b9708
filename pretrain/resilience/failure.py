"""Report of the error that ended a process: one line for the log, and the exit code."""

from __future__ import annotations

import os
import sys
import traceback

from pretrain.resilience.watchdog import Watchdog


def report_failure(error: Exception, watchdog: Watchdog | None) -> int:
    """Prints an error in one line and returns the exit code. One process of several does not return: it ends here.

    A defect of the program is printed with its traceback; `FOCUSDIT_TRACEBACK=1` raises every error again.
    """
    if os.environ.get("FOCUSDIT_TRACEBACK"):
        raise error
    if not isinstance(error, ValueError | OSError | RuntimeError):
        traceback.print_exception(error)
    line, code = watchdog.explain(error) if watchdog else (str(error), 1)
    rank = os.environ.get("RANK", "0")
    print(f"train: process {rank}: {line}" if rank != "0" else f"train: {line}", file=sys.stderr, flush=True)
    if watchdog and watchdog.world.size > 1:
        os._exit(code)  # leaving a broken group in good order may wait for the others
    return code
