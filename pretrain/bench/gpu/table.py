"""The short table of all that was found: one line for each measurement."""

from __future__ import annotations

from typing import Any

KERNELS = 8  # of a profile


def table(found: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [_head(found)]
    for name, part in found["parts"].items():
        reason = f": {part['reason']}" if part["reason"] else ""
        lines.append(f"\n{name}  {part['status']}{reason}  ({part['seconds']:.0f} s)")
        for figure in part["figures"]:
            lines += [f"  {_line(figure)}"] if figure["name"] else []
            lines += [
                f"      {k['ms']:8.2f} ms  {k['calls']:4} ×  {k['kernel'][:90]}"
                for k in figure["numbers"].get("top", [])[:KERNELS]
            ]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> str:
    if found["small"]:
        return "A CPU with small shapes: these figures show that the parts run, not how fast anything is."
    return f"{found['gpus']} GPUs, {found['preset']}"


def _line(figure: dict[str, Any]) -> str:
    values = {key: value for key, value in figure["numbers"].items() if not isinstance(value, dict | list | type(None))}
    numbers = "  ".join(f"{key} {_number(value)}" for key, value in values.items())
    if figure["status"] != "done":
        numbers = f"{figure['status'].upper()}: {figure['reason']}  {numbers}".rstrip()
    return f"{figure['name']:<40} {numbers}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
