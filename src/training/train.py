"""Starts a training run: `python src/training/train.py --config configs/deepseek_v3_tiny.yaml`.

Works from a checkout as it is: the package beside this folder is the one that runs.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from deepseek_v3.utils.interrupts import exit_on_interrupt  # noqa: E402 -- after the path is set

with exit_on_interrupt():
    from deepseek_v3.utils.machine import wait_passively

    wait_passively()  # torch reads what it sets
    from deepseek_v3.training.train import main

if __name__ == "__main__":
    main()
