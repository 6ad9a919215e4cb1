"""Train from YAML recipes with Lightning.

    python main.py --base configs/training/svd_tiny.yaml lightning.trainer.max_steps=1000
    python main.py --base configs/training/svd_tiny.yaml --resume

A recipe has the sections model, training (task, optim), data and lightning (trainer, save,
callbacks). Later files win over earlier ones, key=value arguments over all files; +key=value adds
a key that they do not have. A run keeps its state in its folder; --resume continues it, also after
a kill, with the same loss curve.
"""

import argparse
import logging
import os
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NoReturn

from scripts.program import run_program, say
from sgm.errors import one_line
from sgm.training.signals import Stopped


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--base",
        nargs="+",
        type=Path,
        required=True,
        metavar="YAML",
        help="recipes, merged in order",
    )
    parser.add_argument(
        "--logdir", type=Path, help="folder of the run; default: logs/NAME-OF-THE-LAST-RECIPE"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override the recipes")
    args = parser.parse_intermixed_args(argv)
    # --base takes all that follows it; what has a "=" is an override.
    args.overrides += [str(path) for path in args.base if "=" in str(path)]
    args.base = [path for path in args.base if "=" not in str(path)]
    if not args.base:
        parser.error("--base: expected at least one YAML file")
    args.logdir = args.logdir or Path("logs") / args.base[-1].stem
    return args


def main(argv: list[str] | None = None) -> int:
    """Train; give the exit code."""
    args = parse(argv)
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of several processes, one speaks
    level = logging.INFO if first else logging.WARNING
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    try:
        from sgm.training.recipe import load_recipe

        recipe = load_recipe(args.base, args.overrides)

        from sgm.training.run import train  # imports torch and Lightning, which takes seconds

        with redirect_stdout(sys.stderr):  # Lightning's progress bar
            weights = train(recipe, args.logdir, args.resume)
    except Stopped as stopped:
        print(f"{stopped}: --resume goes on from there", file=sys.stderr)
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except ModuleNotFoundError as exc:
        if exc.name != "pytorch_lightning":
            raise
        print("error: training needs Lightning: pip install pytorch-lightning", file=sys.stderr)
        return 2
    except (MemoryError, OSError, ValueError) as exc:
        print(f"error: {one_line(exc)}", file=sys.stderr)
        return 2
    if first:
        say(f"averaged weights: {weights}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
