"""`byolx show-views`: draws images beside their augmented views."""

import argparse
from pathlib import Path

from byolx.cli import numbers, options


def add(command) -> None:
  """Adds the command `byolx show-views` and its options.

  Args:
    command: function that creates and returns a parser of command-line arguments. It takes the name of
      the command, a callback that runs the command, and the help texts.
  """
  sub = command("show-views", _run, "draw images beside pairs of their augmented views")
  sub.add_argument("--config", required=True, metavar="FILE[:ARGS]", help=options.CONFIG_HELP)
  sub.add_argument(
    "--output", type=Path, default=Path("views.png"), help="file of the picture; default: views.png"
  )
  sub.add_argument(
    "--images", type=numbers.count, default=8, help="number of images, one per row; default: 8"
  )
  sub.add_argument(
    "--pairs", type=numbers.count, default=4, help="number of pairs of views per image; default: 4"
  )


def _run(arguments: argparse.Namespace, overrides: list[str]) -> int:
  from byolx.runs import config, images, run, trainer

  cfg = config.load(arguments.config, overrides)
  source = images.build_sources(cfg).train
  transform = trainer.build_input(cfg, len(source.classes))
  output, pairs = arguments.output, arguments.pairs
  if not run.write_views(cfg, transform, source, output, arguments.images, pairs):
    raise config.ConfigError(
      f"task={cfg.task}: its training transform has no picture; expected a uint8 array [size, size, 3]"
    )
  print(f"wrote {arguments.output}")
  return 0
