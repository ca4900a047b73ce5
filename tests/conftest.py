"""Shared test setup: eight fake CPU devices, and jaxtyping's shapes checked by beartype."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
  ).strip()
os.environ.setdefault("MPLBACKEND", "Agg")

from jaxtyping import install_import_hook

install_import_hook("byolx", "beartype.beartype")

from pathlib import Path  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

# grain's worker processes read absl flags, which only an absl main would parse.
if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
  """Loads one archive of numbers that the reference's own code printed (tests/golden/README.md)."""
  return lambda name: dict(np.load(GOLDEN / f"{name}.npz"))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """A folder of compiled programs, so that equal ones are compiled once by all tests here."""
  base = tmp_path_factory.getbasetemp()
  folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "compiled"
  settings = {
    "jax_compilation_cache_dir": str(folder),
    "jax_persistent_cache_min_compile_time_secs": 0.2,
  }
  before = {name: getattr(jax.config, name) for name in settings}
  for name, value in settings.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield {name.upper(): str(value) for name, value in settings.items()}
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()
