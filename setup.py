"""The list of packages; everything else about the project is declared in pyproject.toml.

The YAML files and lists lie in ``configs/`` of the checkout and are installed beside the code, as
``sgm/configs``.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["sgm", "sgm.*"]), "sgm.configs"],
    package_dir={"sgm.configs": "configs"},
    package_data={"sgm.configs": ["**/*.yaml", "**/*.json", "**/*.md"]},
)
