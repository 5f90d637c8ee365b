"""Turns raw text into a clean corpus: `preprocess_data.py --config configs/data_config.yaml`.

The same command as `dsv3 preprocess`.
"""

from __future__ import annotations

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from deepseek_v3.data.pipeline.command import preprocess
    from deepseek_v3.utils.command_line import run_command

if __name__ == "__main__":
    run_command(preprocess)
