"""Train the small bundled model without Lightning: on a CPU in the background, or on one GPU.

    python scripts/train_tiny.py autoencoder --photos photos.safetensors
    python scripts/train_tiny.py decoder     --photos photos.safetensors
    python scripts/train_tiny.py latents     --photos photos.safetensors   (else unet does it first)
    python scripts/train_tiny.py unet        --photos photos.safetensors
    python scripts/train_tiny.py export

Needs torch, numpy, einops, safetensors and omegaconf. Every stage can be stopped at any moment; the
same command continues it. Settings stand in configs/training/*.yaml; key=value arguments override
them, such as training.plan.minutes=90, and +key=value adds to them.
"""

import argparse
import logging
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {
    "autoencoder": "svd_tiny_autoencoder.yaml",
    "decoder": "svd_tiny_decoder.yaml",
    "latents": "svd_tiny.yaml",
    "unet": "svd_tiny.yaml",
    "export": "svd_tiny.yaml",
}


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {text}")
    return number


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=RECIPES)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the recipe")
    parser.add_argument("--recipe", type=Path, help="another recipe than the stage's own")
    parser.add_argument("--photos", help="tensor file of photographs (data.dataset.params.photos)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/svd_tiny"), help="folder of the stages"
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("checkpoints/svd_tiny.safetensors"),
        help="of export",
    )
    parser.add_argument("--minutes", type=float, help="stop this call after so many minutes")
    moved = "to move a run between machines in small files: "
    parser.add_argument(
        "--from-parts", type=Path, metavar="DIR", help=moved + "continue the states in them"
    )
    parser.add_argument(
        "--to-parts", type=Path, metavar="DIR", help=moved + "write all stages' states at the end"
    )
    parser.add_argument("--device", help="torch device; default: the accelerator if any, else cpu")
    parser.add_argument("--threads", type=_positive, help="CPU threads of torch")
    parser.add_argument("--precision", choices=("auto", "bfloat16", "float32"), default="auto")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run one stage; give the exit code."""
    args = parse(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    sys.path.insert(0, str(ROOT))
    import torch

    from sgm.errors import one_line

    try:
        if args.threads:
            torch.set_num_threads(args.threads)
        done = work(args)
    except KeyboardInterrupt:  # outside of the training loop, which stops by itself
        return 130
    except (OSError, ValueError) as exc:
        print(f"error: {one_line(exc)}", file=sys.stderr)
        return 2
    print(f"{args.stage}: {'done' if done else 'to be continued by the same command'}")
    return 0


def work(args: argparse.Namespace) -> bool:
    """Do what the command line asks; say whether the stage is complete."""
    from sgm.device import default_device, has_fast_bfloat16, parse_device
    from sgm.training import parts, stages
    from sgm.training.recipe import load_recipe

    device = parse_device(args.device) if args.device else default_device()
    automatic = args.precision == "auto" and has_fast_bfloat16(device)
    photos = [f"data.dataset.params.photos={args.photos}"] if args.photos else []
    recipe = args.recipe or ROOT / "configs" / "training" / RECIPES[args.stage]
    stage = stages.Stage(
        recipe=load_recipe([recipe], args.overrides + photos),
        out=args.out,
        device=device,
        deadline=None if args.minutes is None else time.monotonic() + 60 * args.minutes,
        bfloat16=automatic or args.precision == "bfloat16",
    )
    if args.from_parts:
        parts.unpack(args.from_parts, args.out)
    if args.stage == "export":
        stages.export(stage, args.checkpoint, model=args.checkpoint.stem, commit=_commit())
        return True
    train = {
        "autoencoder": stages.train_autoencoder,
        "decoder": stages.train_decoder,
        "latents": stages.encode_latents,
        "unet": stages.train_unet,
    }[args.stage]
    done = train(stage)
    if args.to_parts:
        parts.pack(args.out, args.to_parts)
    return done


def _commit() -> str:
    """Return the commit that the checkout stands at, or "unknown"."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
