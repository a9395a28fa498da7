"""What can go wrong while a set is rendered."""

from __future__ import annotations

import shutil


class StemsError(Exception):
    """Base of this package's errors."""


class MissingDependency(StemsError):
    """A program, soundfont or package is not there; the message says what installs it."""


class MalformedWad(StemsError, ValueError):
    """A WAD whose header, directory or lumps do not lie inside the file."""


class MalformedMidi(StemsError, ValueError):
    """A MIDI file that cannot be read, or holds nothing to play."""


def find_program(name: str, remedy: str) -> str:
    """Path of a program.

    Raises
    ------
    MissingDependency
        With the command that installs it.
    """
    path = shutil.which(name)
    if path is None:
        raise MissingDependency(f"the program {name} is missing: {remedy}")
    return path
