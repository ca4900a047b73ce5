"""Folders of photographs and the `byolx prepare` command, for the tests of both."""

import filecmp

from PIL import Image
from sklearn.datasets import load_sample_images

from byolx import cli


def crops(count, size=(200, 150)):
  """Yields different pieces of scikit-learn's photographs."""
  photographs = [Image.fromarray(image) for image in load_sample_images().images]
  for i in range(count):
    left, top = 11 * i % 400, 7 * i % 250
    yield photographs[i % 2].crop((left, top, left + size[0], top + size[1]))


def write_tree(folder, names, size=(200, 150)):
  """Writes one JPEG per name below a folder."""
  for name, crop in zip(names, crops(len(names), size)):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    crop.save(folder / name, "JPEG", quality=88)
  return folder


def run_prepare(capsys, *arguments):
  """Runs `byolx prepare` in this process: (exit code, stdout, stderr)."""
  try:
    code = cli.main(["prepare", *(str(argument) for argument in arguments)])
  except SystemExit as stop:
    code = stop.code
  return code, *capsys.readouterr()


def prepare_tree(tree, to, *more):
  """The arguments that prepare a tree with some broken files in it."""
  return (f"--from={tree}", f"--to={to}", "--max_failed_share=0.2", *more)


def files_of(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def assert_same(one, other):
  """The same files with the same bytes."""
  assert files_of(one) == files_of(other)
  different = [f for f in files_of(one) if not filecmp.cmp(one / f, other / f, shallow=False)]
  assert different == []
