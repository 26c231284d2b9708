"""ImageReward behind lines of JSON; runs in an environment of its own, and needs nothing of this project (docs/evaluation.md).

ENVIRONMENT/bin/python pretrain/evaluate/image_reward_server.py --weights ImageReward.pt --med-config med_config.json
"""

import argparse
import hashlib
import json
import os
import sys
from importlib.metadata import version


def main() -> int:
    """Answers each line of stdin with one on stdout, until stdin ends; returns the exit code."""
    parser = argparse.ArgumentParser(description="Scores pictures by ImageReward: a JSON line in, a JSON line out.")
    parser.add_argument("--weights", required=True, help="ImageReward.pt")
    parser.add_argument("--med-config", required=True, help="med_config.json, which lies beside it on the hub")
    parser.add_argument("--device", help="default: this process's GPU, or the CPU")
    args = parser.parse_args()
    # The libraries print to stdout, too: their lines go to stderr.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded silently

    def answer(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")

    for file in (args.weights, args.med_config):
        if not os.path.isfile(file):
            answer({"error": f"no file {file}"})
            return 1
    # This file's folder comes first: its clip.py would be found in place of the package that ImageReward imports.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    try:
        import ImageReward
        import torch
        from PIL import Image
    except ImportError as error:
        answer({"error": f"this environment lacks a package ({error}); docs/evaluation.md has its making"})
        return 1
    device = args.device or (f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu")
    model = ImageReward.load(args.weights, device=device, med_config=args.med_config)
    with open(args.weights, "rb") as weights:
        digest = hashlib.sha256()
        while block := weights.read(1 << 22):
            digest.update(block)
    about = {"library": "image-reward", "version": version("image-reward"), "weights": digest.hexdigest()}
    answer({"scorer": {**about, "resize": "bicubic, the shorter side to 224, then the middle square"}})
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            with torch.no_grad(), Image.open(asked["picture"]) as picture:
                answer({"score": model.score(asked["prompt"], picture.convert("RGB"))})
        except (OSError, ValueError, RuntimeError) as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
