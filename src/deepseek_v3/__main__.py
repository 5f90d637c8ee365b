"""Starts `dsv3`, also as `python -m deepseek_v3`."""

from deepseek_v3.utils.interrupts import exit_on_interrupt

with exit_on_interrupt():
    from deepseek_v3.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
