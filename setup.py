"""Metadata lives in pyproject.toml; this file is where the optional native library will be built."""

from setuptools import setup

setup()
