"""The authors' released weights as an export of this project.

    python -m pretrain.import_release --transformer FocusDiT/transformer --out models/focusdit_release
    python -m pretrain.sample --model models/focusdit_release --prompt "a lighthouse at dusk" --out samples

reads `config.json` and `diffusion_pytorch_model.safetensors` and writes a folder for `pretrain.sample` and
`FocusDiTPipeline.from_pretrained`. It names the encoders, and draws by the recipe `release` (`pretrain/recipes.py`) unless one
asks for another. Every tensor is used exactly once; what is missing, unknown or of another shape is an error that names it, as is
every setting that is not supported.
"""

from __future__ import annotations

import sys

from data_prep.common.command import command_parser, run_action
from data_prep.common.paths import path


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = command_parser("Reads the authors' released transformer.")
    parser.add_argument("--transformer", type=path, required=True, help="the released transformer's folder")
    parser.add_argument("--out", type=path, required=True, help="folder to write; must not be there yet")
    parser.add_argument(
        "--encoders", default="flan-t5-xxl+mochi", metavar="TEXT+VAE",
        help="encoders that the folder shall name: short names, hub names or local folders (default: the authors')",
    )  # fmt: skip
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="KEY",
        help="unknown setting that may be ignored; interpolation_scale_w: take the rows' scale for both",
    )
    args = parser.parse_args(argv)
    # Late, as the libraries take seconds.
    from pretrain.sampling.release_export import write_release_export

    def import_() -> str:
        model = write_release_export(args.transformer, args.out, args.encoders, args.ignore)
        parameters = sum(p.numel() for p in model.parameters())
        return f"{parameters / 1e6:.1f}M parameters in {args.out}: {model.config}"

    return run_action("import_release", import_)


if __name__ == "__main__":
    sys.exit(main())
