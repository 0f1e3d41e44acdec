"""Which version of the library this is; ``sessionstore.__version__``."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("sessionstore")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0"
