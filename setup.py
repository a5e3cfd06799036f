"""Lists the packages, among them `recipes/` as `trl_ext.recipes`: the wheel carries it, and there is one copy."""

from setuptools import find_namespace_packages, setup


setup(packages=[*find_namespace_packages(include=["trl_ext*"]), "trl_ext.recipes"])
