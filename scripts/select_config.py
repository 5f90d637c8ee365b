"""Plans what given GPUs can train within a budget: `select_config.py --gpus 8 --budget-hours 72`.

Without options, in a terminal, it asks for them. The same command as `dsv3 plan`.
"""

from __future__ import annotations

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from deepseek_v3.planning.plan_command import plan
    from deepseek_v3.utils.command_line import run_command

if __name__ == "__main__":
    run_command(plan)
