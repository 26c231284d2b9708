"""Training: python -m pretrain.train CONFIG [section.key=value ...]

Runs under the launchers of `distributed/launcher.py` (pretrain.launch, torchrun, deepspeed, accelerate, mpirun, srun and
slurm/*.sh), or alone as one process. Started again, it goes on at the exact next sample of its newest whole checkpoint.

Exit codes: 0 the stage is complete; 75 to be started again (asked to stop, or a process was lost); 1 an error; 2 wrong usage.
docs/operations.md says what happens at each fault.
"""

from __future__ import annotations

import os
import sys

from data_prep.common.command import command_parser
from pretrain.config_files import CONFIGS, DS_CONFIGS, known
from pretrain.console import add_local_rank, silence_libraries
from pretrain.distributed.launcher import adopt_launcher


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser(
        f"Trains a stage ({', '.join(known())}), or a config of your own; every field of it can be overridden.",
        epilog=f"Fields are explained in {CONFIGS.with_name('config.py')}; DeepSpeed's are in {DS_CONFIGS}.",
    )
    parser.add_argument("config", help="a stage's name, or the path of a YAML file with `base: STAGE`")
    parser.add_argument("overrides", nargs="*", help="section.key=value, or deepspeed.key=value")
    parser.add_argument("--check", action="store_true", help="check all that the training needs, and do not train")
    parser.add_argument("--processes", type=int, help="with --check on a login node: the planned number of processes")
    add_local_rank(parser)
    args, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        parser.error(f"unrecognized: {' '.join(unknown)}; a field is set without dashes: optimizer.lr=1e-4")
    if args.processes is not None and args.processes < 1:
        parser.error(f"argument --processes: must be 1 or more, not {args.processes}")
    silence_libraries()
    try:
        adopt_launcher()
    except ValueError as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Each step's captions ask for memory of other sizes, and blocks of fixed sizes would be left over. torch reads it once.
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Imported late, as the libraries take seconds: help and wrong usage are answered at once.
    if args.check:
        from pretrain.resilience.preflight import check

        return check(args.config, args.overrides, args.processes)
    from pretrain.training import run

    return run(args.config, args.overrides)


if __name__ == "__main__":
    sys.exit(main())
