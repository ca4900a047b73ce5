"""Time of tracing and lowering a train step, which Python does before the compiler starts.

  pip install ".[plan]"
  taskset -c 0 python docs/trace_time.py --config=configs/pretrain_imagenet.py:arch=resnet200,width=2

The step is lowered once for a TPU slice, as `byolx plan` does it; no TPU is needed. The shapes of the
first state are computed before, and timed separately.
"""

import argparse
import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from byolx.planning import tpu
from byolx.runs import config, trainer

IMAGES, CLASSES = 1_281_167, 1000


def main():
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--config", default="configs/pretrain_imagenet.py:arch=resnet200,width=2")
  parser.add_argument("--topology", default="v3:16x16")
  arguments = parser.parse_args()
  cfg = config.load(arguments.config, [])
  devices = tpu.devices(tpu.topology(arguments.topology))
  clock = time.perf_counter
  began = clock()
  built = trainer.build(cfg, devices, IMAGES, CLASSES)
  state = built.abstract_state
  shaped = clock()
  lowered = built.lower()
  ended = clock()
  leaves = len(jax.tree.leaves(state))
  print(f"{arguments.config} for {arguments.topology}, {len(devices)} cores, {leaves:,} arrays")
  print(f"shapes of the state        {shaped - began:6.1f} s")
  print(f"tracing and lowering       {ended - shaped:6.1f} s")
  print(f"program                    {len(lowered.as_text()) / 1e6:6.1f} MB of text")


if __name__ == "__main__":
  main()
