"""The command line, ``sessionstore``. It uses the library, never the reverse.

It needs typer and rich, the extra ``cli``; nothing outside this package imports them.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line with the process's arguments.

    Returns:
        The exit code; ``failures.py`` lists them.
    """
    _open_closed_streams()
    try:
        import rich  # noqa: F401  # pyright: ignore[reportUnusedImport]
        import typer  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        hint = "the command line needs typer and rich: pip install 'sessionstore[cli]'"
        print(f"sessionstore: {hint}", file=sys.stderr)
        return 1
    from sessionstore.cli.app import run

    return run()


def _open_closed_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, as under cron or ``>&-``.

    Otherwise the connection to the server would get that number, and what is written to "stdout"
    would go to the server as commands.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115  open to the end
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
