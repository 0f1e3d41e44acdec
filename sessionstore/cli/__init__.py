"""The command line, ``sessionstore``. It uses the library, never the reverse.

It needs typer and rich, the extra ``cli``; nothing outside this package imports them.
"""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line with the process's arguments.

    Returns:
        The exit code; ``failures.py`` lists them.
    """
    try:
        import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import typer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        hint = "the command line needs typer and rich: pip install 'sessionstore[cli]'"
        print(f"sessionstore: {hint}", file=sys.stderr)
        return 1
    from sessionstore.cli.app import run

    return run()
