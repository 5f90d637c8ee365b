"""Which folders make up the package; everything else about it stands in pyproject.toml.

The configs keep their one place, `configs`, and are installed inside the package.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages("src", include=["deepseek_v3", "deepseek_v3.*"]), "deepseek_v3.configs"],
    package_dir={"": "src", "deepseek_v3.configs": "configs"},
    package_data={
        "deepseek_v3": ["py.typed", "planning/calibration.json"],
        "deepseek_v3.configs": ["*.yaml", "*.json"],
    },
)
