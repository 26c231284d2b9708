"""The authors' released weights as this project's transformer.

    python -m pretrain.import_release --transformer FocusDiT/transformer --out models/focusdit_release

reads `config.json` and `diffusion_pytorch_model.safetensors` and writes a folder for
`FocusDiTTransformer2DModel.from_pretrained`. Every tensor is used exactly once; what is missing, unknown or of another shape
is an error that names it, as is every setting that is not supported.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser
from data_prep.common.paths import path


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Reads the authors' released transformer.")
    parser.add_argument("--transformer", type=path, required=True, help="the released transformer's folder")
    parser.add_argument("--out", type=path, required=True, help="folder to write; must not be there yet")
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="KEY", help="unknown setting that may be ignored"
    )
    args = parser.parse_args(argv)
    # Late, as the libraries take seconds.
    from pretrain.checkpoint.export_folder import new_folder
    from pretrain.checkpoint.release_folder import load_release
    from pretrain.pipeline import FocusDiTTransformer2DModel

    try:
        with new_folder(args.out) as writing:
            model = load_release(args.transformer, args.ignore)
            FocusDiTTransformer2DModel.of(model).save_pretrained(writing)
    except (ValueError, OSError) as error:
        print(f"import_release: {error}", file=sys.stderr)
        return 1
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f}M parameters in {args.out}: {model.config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
