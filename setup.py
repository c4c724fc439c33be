from runpy import run_path

from setuptools import setup

# setuptools before 61 imports the whole package for an "attr:" of setup.cfg, and fails
# as the dependencies aren't installed yet. version.py alone needs none of them.
setup(version=run_path("synapse_roomkeys/version.py")["__version__"])
