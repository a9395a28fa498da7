"""Where the music comes from: MIDI in Debian packages, or in a folder of one's own.

A package need not be installed: it is fetched with `apt-get download` and unpacked into a cache, as nothing in it is
to run.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import MalformedWad, MissingDependency, StemsError, find_program

WAD_HEADER = struct.Struct("<4sii")  # magic, number of lumps, offset of the directory
WAD_ENTRY = struct.Struct("<ii8s")  # offset, size, name


@dataclass(frozen=True)
class Source:
    """A collection of MIDI under one licence.

    Attributes
    ----------
    name
        How `render` is asked for it.
    package
        The Debian package, or what stands in the metadata for a folder of one's own.
    patterns
        Globs of its `.mid` and `.wad` files, relative to the package's root.
    licence
        Short name of the licence.
    root
        A folder that already holds the files; None for a Debian package.
    notice
        The licence's text; None reads the package's own copyright file.
    """

    name: str
    package: str
    patterns: tuple[str, ...]
    licence: str
    root: Path | None = None
    notice: str | None = None

    @classmethod
    def folder(cls, path: str | Path, *, licence: str, notice: str = "") -> Source:
        """MIDI files and WADs anywhere under a folder; `licence` is what you may redistribute them under."""
        path = Path(path)
        if not path.is_dir():
            raise StemsError(f"{path} is not a folder")
        patterns = ("**/*.mid", "**/*.midi", "**/*.wad")
        return cls(path.resolve().name, path.resolve().name, patterns, licence, path, notice)


SOURCES = {
    source.name: source
    for source in (
        Source(
            "freedoom",
            "freedoom",
            ("usr/share/games/doom/freedoom1.wad", "usr/share/games/doom/freedoom2.wad"),
            "BSD-3-Clause (Freedoom)",
        ),
        Source("freedm", "freedm", ("usr/share/games/doom/freedm.wad",), "BSD-3-Clause (Freedoom)"),
        Source("openmsx", "openttd-openmsx", ("usr/share/games/openttd/baseset/openmsx/*.mid",), "GPL-2.0"),
        Source("simutrans", "simutrans-data", ("usr/share/games/simutrans/music/*.mid",), "Artistic-1.0"),
        Source("planetblupi", "planetblupi-music-midi", ("usr/share/planetblupi/music/*.mid",), "GPL-3.0-or-later"),
    )
}


@dataclass(frozen=True)
class Midi:
    """One MIDI file of a source.

    Attributes
    ----------
    source
        Where it comes from.
    label
        Its name there: `freedoom1.wad/D_E1M1`, `linns_basket.mid`.
    data
        Its bytes.
    md5
        Their digest, which also decides its split.
    """

    source: Source
    label: str
    data: bytes = field(repr=False)
    md5: str

    @property
    def name(self) -> str:
        return f"{self.source.name}/{self.label}"


def find(source: str | Source) -> Source:
    """The source of that name: one of `SOURCES`, by its name or its Debian package's."""
    if isinstance(source, Source):
        return source
    for known in SOURCES.values():
        if source in (known.name, known.package):
            return known
    raise StemsError(f"no source {source!r}; there are {', '.join(SOURCES)}, or Source.folder(path, licence=…)")


def default_cache() -> Path:
    """Where fetched packages are kept: `$XDG_CACHE_HOME/aiba/packages`, else `~/.cache/aiba/packages`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aiba" / "packages"


def read(sources: Sequence[Source], cache: Path) -> list[Midi]:
    """Every MIDI file of the sources, in their order, then by file name and place in a WAD. Copies are left out.

    Raises
    ------
    MissingDependency
        If a package is neither installed nor can be fetched.
    MalformedWad
        If a WAD is damaged.
    """
    found: dict[str, Midi] = {}
    for source in sources:
        root = locate(source, cache)
        for path in _files(source, root):
            items = wad_music(path) if path.suffix.lower() == ".wad" else [(None, path.read_bytes())]
            file = path.name if source.root is None else path.relative_to(root).as_posix()
            for lump, data in items:
                midi = Midi(source, f"{file}/{lump}" if lump else file, data, hashlib.md5(data).hexdigest())
                found.setdefault(midi.md5, midi)
    return list(found.values())


def locate(source: Source, cache: Path) -> Path:
    """The folder that the source's patterns are relative to; fetches the package if it is not installed."""
    root = source.root or Path("/")
    if not _files(source, root) and source.root is None:
        root = _fetch(source.package, cache)
    if not _files(source, root):
        raise StemsError(f"{source.name}: nothing under {root} matches {', '.join(source.patterns)}")
    return root


def notice(source: Source, cache: Path) -> str:
    """The licence as its package states it, and the credits that it refers to."""
    if source.notice is not None:
        return source.notice
    installed, fetched = Path("/"), cache / source.package
    # a slim system may have dropped the documentation of an installed package: then fetch it for its licence
    root = next((root for root in (installed, fetched) if _copyright(root, source.package).is_file()), None)
    doc = _copyright(root or _fetch(source.package, cache), source.package)
    if not doc.is_file():
        raise StemsError(f"{source.package} has no {doc.name} file: its licence is unknown")
    text = doc.read_text(encoding="utf-8", errors="replace")
    credits = doc.parent / "CREDITS.gz"
    if credits.is_file():
        text += "\nCREDITS\n\n" + gzip.decompress(credits.read_bytes()).decode("utf-8", errors="replace")
    return text


def wad_lumps(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every lump in a Doom WAD, after checking that all of them lie inside the file.

    Raises
    ------
    MalformedWad
        Naming the file and what is wrong in it.

    References
    ----------
    The Unofficial Doom Specs, chapter 2: header (magic, count, directory offset), directory of (offset, size, name[8]).
    """
    data = path.read_bytes()
    if len(data) < WAD_HEADER.size:
        raise MalformedWad(f"{path}: {len(data)} bytes are too few for a WAD's header")
    magic, count, directory = WAD_HEADER.unpack_from(data)
    if magic not in (b"IWAD", b"PWAD"):
        raise MalformedWad(f"{path}: begins with {magic!r}, not with IWAD or PWAD")
    if count < 0 or directory < WAD_HEADER.size or directory + count * WAD_ENTRY.size > len(data):
        raise MalformedWad(
            f"{path}: a directory of {count} lumps at {directory} does not lie inside the file's {len(data)} bytes"
        )
    entries = list(WAD_ENTRY.iter_unpack(data[directory : directory + count * WAD_ENTRY.size]))
    for offset, size, raw in entries:
        if offset < 0 or size < 0 or offset + size > len(data):
            raise MalformedWad(
                f"{path}: lump {_lump_name(raw)} ({size} bytes at {offset}) "
                f"does not lie inside the file's {len(data)} bytes"
            )
    return ((_lump_name(raw), data[offset : offset + size]) for offset, size, raw in entries)


def wad_music(path: Path) -> list[tuple[str, bytes]]:
    """The MIDI lumps of a WAD (`D_…`); Doom's own MUS format is left out."""
    return [(name, data) for name, data in wad_lumps(path) if name.startswith("D_") and data.startswith(b"MThd")]


def _lump_name(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("latin-1")


def _files(source: Source, root: Path) -> list[Path]:
    """Matching files, in the order of the patterns and then by name, so that the result does not depend on the disk."""
    return [path for pattern in source.patterns for path in sorted(root.glob(pattern)) if path.is_file()]


def _copyright(root: Path, package: str) -> Path:
    return root / "usr" / "share" / "doc" / package / "copyright"


def _fetch(package: str, cache: Path) -> Path:
    """Download and unpack a Debian package without installing it; what was unpacked before is used again."""
    folder = cache / package
    if folder.is_dir():
        return folder
    remedy = f"apt-get install {package}"
    apt, dpkg = find_program("apt-get", remedy), find_program("dpkg-deb", remedy)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package}-", dir=cache) as work:
        _run([apt, "download", package], Path(work), f"apt-get update && {remedy}")
        archive = next(Path(work).glob("*.deb"), None)
        if archive is None:
            raise MissingDependency(f"apt-get download {package} left no .deb file; try: {remedy}")
        _run([dpkg, "-x", str(archive), str(Path(work) / "files")], Path(work), remedy)
        # renamed only when whole, so that a fetch that was stopped is not taken for a package
        os.replace(Path(work) / "files", folder)
    return folder


def _run(command: list[str], cwd: Path, remedy: str) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit status {done.returncode}"
        raise MissingDependency(f"{' '.join(command)} failed ({reason}); try: {remedy}")
