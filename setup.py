"""What pyproject.toml has no word for: where a wheel is put together.

In build/, which setuptools leaves behind, modules of an earlier version would get into the wheel.
"""

import tempfile

from setuptools import setup

with tempfile.TemporaryDirectory() as folder:
    setup(options={"build": {"build_base": folder}})
