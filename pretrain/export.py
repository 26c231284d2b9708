"""A trained run as a diffusers folder.

    python -m pretrain.export --run runs/stage2_512 --out exports/stage2_512

writes the averaged weights, the scheduler, the encoders that the data set was made with (or, with `--encoders reference`,
where they stand and their fingerprints), and a model card. It loads with

    from pretrain.pipeline import FocusDiTPipeline
    pipe = FocusDiTPipeline.from_pretrained("exports/stage2_512")
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import path
from pretrain.console import silence_libraries
from pretrain.sampling.options import add_export_arguments


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Writes a trained run as a diffusers folder.")
    parser.add_argument("--run", type=path, required=True, help="run directory")
    parser.add_argument("--out", type=path, required=True, help="folder to write; must not be there yet")
    add_export_arguments(parser)
    args = parser.parse_args(argv)
    silence_libraries()
    # Late, as the libraries take seconds.
    from pretrain.checkpoint.export_folder import new_folder
    from pretrain.sampling.export_writer import DTYPES, write_export
    from pretrain.sampling.trained_run import load_run

    def export() -> str:
        with new_folder(args.out) as writing:
            trained = load_run(args.run, args.weights)
            trained.pipeline.transformer.dit.to(DTYPES[args.dtype])
            write_export(trained, writing, str(args.out), args.encoders == "copy")
        return f"step {trained.step} of {args.run} is in {args.out}; see {args.out / 'README.md'}"

    return run_action("export", export)


if __name__ == "__main__":
    sys.exit(main())
