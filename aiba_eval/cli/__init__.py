"""The command line, ``aiba``. Heavy packages are imported when a command needs them, not before."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``aiba``."""
    try:
        from aiba_eval.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in ("typer", "rich", "click"):
            raise
        print(f'the command line needs {error.name}, which is not installed: pip install "aiba[cli]"', file=sys.stderr)
        raise SystemExit(2) from None
    app()
