"""Folders that commands write: never over somebody's files, and again over their own."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


class FolderInUse(Exception):
    """The folder to write holds something else. The message names it and says what to do."""


class OutputFolder:
    """A folder with a manifest, ``<kind>.json``, that lists what was written into it.

    The manifest is what tells a former output folder from any other. Writing again removes the files that it lists and
    nothing else, so notes that a user has put there stay. Nothing is made or removed before the first file is written:
    a command that fails earlier leaves things as they were.

    Parameters
    ----------
    path
        Made if it is not there.
    kind
        ``"run"``, ``"demo"`` or ``"compare"``.
    overwrite
        Replace the output of an earlier command of the same kind.
    configuration
        For work that goes on where it was stopped: what decides its results. A former output folder of the same
        configuration keeps its files, and may be written on; one of another configuration is refused.

    Attributes
    ----------
    resumed : whether an earlier command of this configuration has begun here

    Raises
    ------
    FolderInUse
        The folder is not empty and is no former output folder of this kind, or it is one, its configuration is not the
        given one and ``overwrite`` is False.
    """

    def __init__(
        self,
        path: str | Path,
        kind: str,
        *,
        overwrite: bool = False,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(path).expanduser()
        self.kind = kind
        self.files: list[str] = []
        self.resumed = False
        self._configuration = None if configuration is None else json.loads(dump_json(configuration))
        self._former = self._check(overwrite)

    @property
    def manifest(self) -> Path:
        """The file that describes the folder."""
        return self.path / f"{self.kind}.json"

    def file(self, name: str) -> Path:
        """Path of a file or folder to be written now; its parent exists."""
        for former in self._former:
            _remove(self.path, former)
        self._former = []
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name not in self.files:
            # listed before it is written: a command that is stopped leaves nothing that the next one would trip over
            self.files.append(name)
            self._write({"complete": False})
        return path

    def finish(self, record: Mapping[str, Any]) -> Path:
        """Write the manifest with ``record``: configuration, versions, results; the last call."""
        self._write({"complete": True, **record})
        return self.manifest

    def _write(self, record: Mapping[str, Any]) -> None:
        own = {} if self._configuration is None else {"configuration": self._configuration}
        write_json(self.manifest, {"aiba": self.kind, **own, **record, "files": self.files})

    def _check(self, overwrite: bool) -> list[str]:
        """What an earlier command has written and is to be removed."""
        if self.path.exists() and not self.path.is_dir():
            raise FolderInUse(f"{self.path} is a file, and a folder is to be written there: name another with --out")
        if not self.path.is_dir() or not any(self.path.iterdir()):
            return []
        record = self._record()
        if record is None:
            raise FolderInUse(
                f"{self.path} is not empty and is no former output folder of `aiba {self.kind}`: name another with --out"
            )
        listed = [name for name in record.get("files", []) if isinstance(name, str)]
        if overwrite:
            return listed
        differs = "" if self._configuration is None else self._differs(record.get("configuration"))
        if self._configuration is not None and not differs:
            self.files, self.resumed = listed, True
            return []
        raise FolderInUse(
            f"{self.path} holds the output of an earlier `aiba {self.kind}`{differs}: name another with --out, or replace it "
            "with --overwrite"
        )

    def _differs(self, former: Any) -> str:
        """What of the configuration is not as it was, in words; empty if all is."""
        own, theirs = self._configuration or {}, former if isinstance(former, dict) else {}
        keys = [key for key in {**theirs, **own} if own.get(key) != theirs.get(key)]
        said = [f"{key} {_short(theirs.get(key))} there and {_short(own.get(key))} now" for key in keys[:3]]
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        return f" with another configuration ({'; '.join(said)}{more})" if keys else ""

    def _record(self) -> dict[str, Any] | None:
        """The manifest of an earlier command of this kind, or None if there was none."""
        try:
            record = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("aiba") != self.kind:
            return None
        return record


def _short(value: Any, width: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= width else f"{text[: width - 1]}…"


def _remove(root: Path, name: str) -> None:
    """Remove one listed entry; a name that leads out of the folder is left alone."""
    path = root / name
    inside = path.parent.resolve().is_relative_to(root.resolve()) and path.resolve() != root.resolve()
    if not inside or ".." in Path(name).parts:
        return
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif path.is_symlink() or path.exists():
        path.unlink()
    for parent in path.parents:
        if parent == root or not parent.is_dir() or any(parent.iterdir()):
            break
        parent.rmdir()


def jsonable(value: Any) -> Any:
    """Plain JSON values: NaN and infinite become null, numpy scalars numbers, paths text."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if hasattr(value, "tolist"):
        return jsonable(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    return str(value)


def dump_json(value: Any) -> str:
    """One indented JSON document, without NaN."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file at once: a reader sees the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(dump_json(value) + "\n", encoding="utf-8")
    partial.replace(path)


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """A table; an undefined number is an empty cell."""
    rows = list(rows)
    names = list(columns) if columns is not None else list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for row in rows:
            values = [jsonable(row.get(name)) for name in names]
            writer.writerow(["" if value is None else value for value in values])
