"""hilum: one door into foundation models for radiology. The commands as Python functions are in `hilum.api`."""

from importlib.metadata import version

__version__ = version("hilum")
