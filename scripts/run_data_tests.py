"""Runs the whole data pipeline on synthetic text in less than 30 seconds: `run_data_tests.py`."""

from __future__ import annotations

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from deepseek_v3.data.pipeline.smoke_test import smoke_test
    from deepseek_v3.utils.command_line import run_command

if __name__ == "__main__":
    run_command(smoke_test)
