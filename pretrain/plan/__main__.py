"""Plan of a run: parameters, memory, time, data, checkpoints and money of its stages on a cluster, computed.

    python -m pretrain.plan stage1_256 stage2_512 --nodes 4 --gpus-per-node 8 --gpu h100 --samples 140e6 --price 2.5
    python -m pretrain.plan stage1_256 model.recompute=true --gpu h100 --samples 140e6 --measured runs/stage1_256
    python -m pretrain.plan stage1_256 stage2_512 --gpu h100 --samples 140e6 --price 2.5 --sweep

Nothing is trained and no GPU is needed. Each figure says how it is computed; docs/planning.md has the assumptions. --sweep
simulates 1 to 1,024 such GPUs event by event.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import path
from pretrain.gpus import GPUS, PCIE_4_GBS


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    args = parse(argv)
    from pretrain.plan.planning import run  # late: the libraries take seconds

    return run_action("plan", lambda: run(args))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's arguments."""
    parser = command_parser(__doc__ or "")
    parser.add_argument(
        "words", nargs="+", metavar="STAGE", help="stages as pretrain.train takes them, and KEY=VALUE for all of them"
    )
    cluster = parser.add_argument_group("the cluster")
    cluster.add_argument("--nodes", type=_count, default=4, help="number of nodes")
    cluster.add_argument("--gpus-per-node", type=_count, default=8, help="number of GPUs of each")
    cluster.add_argument("--gpu", default="h100", help=f"one of {', '.join(GPUS)}; or any name with the next three")
    cluster.add_argument("--tflops", type=_positive, help="rate of dense bf16 products")
    cluster.add_argument("--memory", type=_positive, help="memory of a GPU in GiB")
    cluster.add_argument("--bandwidth", type=_positive, help="bandwidth of that memory in TB/s")
    cluster.add_argument(
        "--link",
        type=_positive,
        help=f"GB/s between GPUs of a node, in one direction (default: the data sheet's, or {PCIE_4_GBS})",
    )
    cluster.add_argument("--network", type=_positive, default=400, help="Gbit/s of each GPU to other nodes")
    cluster.add_argument(
        "--disk", type=_positive, default=5, help="GB/s that all nodes together write checkpoints with"
    )
    data = parser.add_argument_group("the data")
    data.add_argument("--samples", type=_samples, required=True, help="number of captioned pictures, such as 140e6")
    data.add_argument("--caption-tokens", type=_positive, default=80, help="mean number of a caption's tokens")
    rates = parser.add_argument_group("rates and prices")
    rates.add_argument("--mfu", type=_share, help="share of the peak that training reaches (default: 0.4)")
    rates.add_argument(
        "--measured", type=path, metavar="RUN", help="take that share, and others, from this run's curves"
    )
    rates.add_argument("--price", type=_positive, help="of a GPU for an hour, in any currency")
    sweep = parser.add_argument_group("the sweep")
    sweep.add_argument("--sweep", action="store_true", help="simulate 1 to 1,024 GPUs: sweep.csv and sweep.png")
    sweep.add_argument("--jitter", type=_jitter, help="spread of a GPU's time from step to step (default: 0.02)")
    sweep.add_argument(
        "--failure-hours", type=_positive, default=50_000, help="mean hours between the failures of one GPU"
    )
    sweep.add_argument("--restart", type=_positive, default=300, help="seconds from a start to its first step")
    parser.add_argument("--out", type=path, default=Path("runs/plan"), help="folder for the files")
    args = parser.parse_intermixed_args(argv)
    args.stages = [word for word in args.words if "=" not in word]
    args.overrides = [word for word in args.words if "=" in word]
    if not args.stages:
        parser.error(f"no stage among {' '.join(args.words)}; give one, such as stage1_256")
    if len(set(args.stages)) < len(args.stages):
        parser.error(f"{' '.join(args.stages)}: give each stage once")
    return args


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return value


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number above 0")
    return int(text)


def _samples(text: str) -> int:
    return max(1, round(_positive(text)))


def _jitter(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a share, at least 0 and below 1: 0.02 is 2%")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be a share above 0, at most 1: 0.4 is 40%")
    return value


if __name__ == "__main__":
    sys.exit(main())
