"""Checks that token budgets are 20 to 26 tokens per active parameter: `validate_chinchilla.py [--config FILE]`.

Without --config it checks every model size in `configs`. The same command as `dsv3 validate`.
"""

from __future__ import annotations

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from deepseek_v3.planning.validate_command import validate
    from deepseek_v3.utils.command_line import run_command

if __name__ == "__main__":
    run_command(validate)
