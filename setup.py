"""Lists the folders of the package; everything else about it is in pyproject.toml.

The folder `configs` is installed as the package `deepseek_v3.configs`.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src", include=["deepseek_v3", "deepseek_v3.*"]), "deepseek_v3.configs"],
    package_dir={"": "src", "deepseek_v3.configs": "configs"},
    package_data={
        "deepseek_v3": [
            "py.typed",
            "planning/calibration.json",
            "planning/fp8_speed.json",
            "ops/hopper.cuh",
            "ops/*/cuda/*.cu",
            "benchmark/shapes/*.yaml",
            "inference/server/page/*",
        ],
        "deepseek_v3.configs": ["*.yaml", "*.json"],
    },
)
