"""`python -m deepseek_v3` is `dsv3`."""

from deepseek_v3.cli import main

if __name__ == "__main__":
    main()
