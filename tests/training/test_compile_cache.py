"""Compiled programs are kept, found again, and no harm when they are damaged."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from byolx.training import compile_cache


@pytest.fixture(autouse=True)
def settings(monkeypatch):
  """jax's settings before, none of them made by the user."""
  monkeypatch.setattr(compile_cache, "_folders_set_here", set())
  names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
  before = {name: getattr(jax.config, name) for name in names}
  jax.config.update("jax_compilation_cache_dir", None)
  compilation_cache.reset_cache()
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  compilation_cache.reset_cache()


@pytest.fixture
def hits():
  """Counts programs that were found."""
  found = []

  def listen(event, **_):
    if event == "/jax/compilation_cache/cache_hits":
      found.append(event)

  jax.monitoring.register_event_listener(listen)
  yield found
  jax.monitoring.unregister_event_listener(listen)


def compile_one(number):
  """A program that takes more than a moment to compile; another one for each number."""

  def program(x):
    for i in range(60):
      x = jnp.cos(x @ x.T + number + i)
    return x

  return jax.jit(program).lower(jnp.ones((8, 8))).compile()


def test_a_program_is_found_again(tmp_path, hits):
  compile_cache.keep_in("../compiled", tmp_path / "run")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled")
  first = compile_one(1)(jnp.ones((8, 8)))
  assert list((tmp_path / "compiled").iterdir())
  assert not hits
  again = compile_one(1)(jnp.ones((8, 8)))
  assert len(hits) == 1
  assert (first == again).all()
  compile_one(2)
  assert len(hits) == 1


def test_two_workdirs_side_by_side_share_a_folder_and_others_do_not(tmp_path, hits):
  compile_cache.keep_in("../compiled", tmp_path / "a")
  compile_one(3)
  compile_cache.keep_in("../compiled", tmp_path / "b")
  compile_one(3)
  assert len(hits) == 1
  compile_cache.keep_in("../compiled", tmp_path / "elsewhere" / "b")
  compile_one(3)
  assert len(hits) == 1


def test_an_empty_field_keeps_nothing(tmp_path):
  compile_cache.keep_in("../compiled", tmp_path / "a")
  compile_cache.keep_in("", tmp_path / "a")
  assert jax.config.jax_compilation_cache_dir is None
  compile_one(4)
  assert list(tmp_path.iterdir()) == []


def test_the_users_own_setting_wins(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "mine"))
  compile_cache.keep_in("../compiled", tmp_path / "run")
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")


def test_a_damaged_program_is_compiled_again(tmp_path):
  compile_cache.keep_in("../compiled", tmp_path / "run")
  expected = compile_one(5)(jnp.ones((8, 8)))
  programs = [path for path in (tmp_path / "compiled").iterdir() if path.name.endswith("-cache")]
  assert programs
  for path in programs:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  compilation_cache.reset_cache()
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache entry"):
    again = compile_one(5)
  assert (again(jnp.ones((8, 8))) == expected).all()


def test_the_wait_is_announced(tmp_path, capsys):
  lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(2))
  compiled = compile_cache.compile_aloud(lowered, "cpu")
  assert compiled(jnp.ones(2)).tolist() == [2.0, 2.0]
  first, second = capsys.readouterr().out.splitlines()
  assert first == "compiling the step (a few seconds) ..."
  assert second.startswith("compiled in ")
  compile_cache.keep_in("../compiled", tmp_path / "run")
  compile_cache.compile_aloud(lowered, "tpu")
  assert f"less if it is in {tmp_path / 'compiled'}" in capsys.readouterr().out


def test_the_usual_time_grows_with_the_program():
  small, large = (
    jax.jit(lambda x, n=n: sum(jnp.sin(x + i) for i in range(n))).lower(jnp.ones(2))
    for n in (10, 1000)
  )
  for platform in ("cpu", "gpu", "tpu", "other"):
    assert compile_cache.usual_seconds(large, platform) > 20 * compile_cache.usual_seconds(
      small, platform
    )
