"""AttentionMaps: labelled arrays on their lattices, save and load."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr  # it takes longer to import than the rest of the core, and a capture needs it at its end only

#: attribute that marks a saved tree, with the version of its layout
FORMAT = "aiba_maps"
FORMAT_VERSION = 1


class AttentionMaps(Mapping[str, "xr.DataArray"]):
    """Captured maps by site: a read-only mapping of site name to float32 ``xarray.DataArray``.

    With a backbone the dimensions are (prompt, step, word, time, frequency): ``branch`` is put first with
    ``branch="both"``; ``head`` follows step with ``heads="all"``; ``key`` stands for word with ``keep="full"``; a 1-D
    lattice has no ``frequency``; a reduced capture no ``step``. Words are spelt as asked for, then come the groups that are
    no words: ``(other)``, ``(special)``, ``(padding)``, ``(prefix)``. A word that a prompt does not contain is NaN there.
    Without a backbone the dimensions are (call, batch, query, key), ``head`` after batch.

    ``time`` is in seconds and ``frequency`` in hertz (centres; ``frequency_low`` and ``frequency_high`` are the edges).

    Attributes
    ----------
    from_text : AttentionMaps
        For joint attention, beside each word map (audio queries, text keys) the other direction: what the word's own queries
        attend to in the audio. Empty elsewhere.
    """

    def __init__(self, arrays: Mapping[str, xr.DataArray], from_text: AttentionMaps | None = None) -> None:
        self._arrays = dict(arrays)
        self._from_text = from_text

    @property
    def from_text(self) -> AttentionMaps:
        """The other direction of joint attention: word queries on audio keys."""
        return self._from_text if self._from_text is not None else AttentionMaps({})

    def __getitem__(self, site: str) -> xr.DataArray:
        try:
            return self._arrays[site]
        except KeyError:
            known = "\n  ".join(self._arrays)
            raise KeyError(f"no map of {site!r}. Captured sites:\n  {known}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        lines = [f"<AttentionMaps: {len(self)} sites, {self.nbytes / 2**20:.1f} MiB>"]
        for site, array in self._arrays.items():
            sizes = ", ".join(f"{dim} {size}" for dim, size in array.sizes.items())
            lines.append(f"  {site or '(the module itself)'}: {sizes}")
        return "\n".join(lines)

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return sum(array.nbytes for array in self._arrays.values())

    @property
    def tree(self) -> xr.DataTree:
        """The maps as an ``xarray.DataTree``: one node per site, holding the variable ``attention``."""
        import xarray as xr

        both = [("attention", self), ("from_text", self.from_text)]
        children: dict[str, xr.Dataset] = {}
        for variable, maps in both:
            for i, (site, array) in enumerate(maps.items()):
                data = xr.Dataset({variable: array.rename(None)}, attrs={"site": site})
                children[_node(site, i) if variable == "attention" else f"from_text/{_node(site, i)}"] = data
        root = xr.Dataset(attrs={FORMAT: FORMAT_VERSION})
        return xr.DataTree.from_dict({"/": root, **{f"/{name}": data for name, data in children.items()}})

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the maps as a zarr store: a folder, or one file if ``path`` ends in ``.zip``.

        Raises
        ------
        FileExistsError
            There is something at ``path`` already.
        ModuleNotFoundError
            zarr is not installed.
        """
        path = Path(path)
        _need_zarr()
        if path.exists():
            raise FileExistsError(f"{path} exists; remove it or choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        # written under another name first: what stands at `path` is whole
        partial = path.with_name(f".{path.name}.partial")
        _remove(partial)
        self.tree.map_over_datasets(_labels_to_attributes).to_zarr(partial, consolidated=False, zarr_format=3)
        if path.suffix == ".zip":
            folder, partial = partial, path.with_name(f".{path.name}.zipping")
            _archive(folder, partial)
            _remove(folder)
        partial.rename(path)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> AttentionMaps:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileNotFoundError
            Nothing is there.
        ValueError
            What is there was not written by :meth:`save`, is damaged, or is of a newer layout.
        """
        import xarray as xr

        path = Path(path)
        _need_zarr()
        if not path.exists():
            raise FileNotFoundError(f"no maps at {path}")
        store: Any = path
        if path.is_file():
            from zarr.storage import ZipStore

            store = ZipStore(path, mode="r")
        try:
            with xr.open_datatree(store, engine="zarr", consolidated=False, zarr_format=3) as tree:
                version = tree.attrs.get(FORMAT)
                if version is None:
                    raise ValueError("it has no attribute aiba_maps")
                if version > FORMAT_VERSION:
                    raise ValueError(f"its layout is version {version}; this AIBA reads up to {FORMAT_VERSION}")
                arrays = _read_nodes(tree, "attention")
                other = _read_nodes(tree.children["from_text"], "from_text") if "from_text" in tree.children else {}
        except Exception as error:
            raise ValueError(f"{path} holds no maps that AttentionMaps.save wrote: {error}") from error
        return cls(arrays, cls(other) if other else None)

    @classmethod
    def concatenate(
        cls, arrays: Mapping[str, Sequence[xr.DataArray]], from_text: AttentionMaps | None = None
    ) -> AttentionMaps:
        """Join what several pipeline calls in one capture gave, along ``prompt``; words and steps that one lacks are NaN."""
        import xarray as xr

        joined = {}
        for site, parts in arrays.items():
            if len(parts) == 1:
                joined[site] = parts[0]
                continue
            for other in parts[1:]:
                if other.sizes.get("time") != parts[0].sizes.get("time"):
                    raise ValueError(
                        f"{site}: the pipeline calls of this capture have different lattices "
                        f"({parts[0].sizes['time']} and {other.sizes['time']} time columns); use one capture for each"
                    )
            words = (
                list(dict.fromkeys(str(w) for part in parts for w in part.coords["word"].values))
                if "word" in parts[0].dims
                else None
            )
            joined[site] = xr.concat(
                parts, dim="prompt", join="outer", fill_value=np.float32(np.nan), combine_attrs="override"
            )
            if words is not None:
                groups = [w for w in words if w.startswith("(")]
                joined[site] = joined[site].sel(word=[w for w in words if not w.startswith("(")] + groups)
        return cls(joined, from_text if from_text else None)


def _read_nodes(tree: xr.DataTree, variable: str) -> dict[str, xr.DataArray]:
    """Site → array, in the order in which they were written."""
    nodes = [node for node in tree.children.values() if variable in node.data_vars]
    found = {}
    for node in sorted(nodes, key=lambda node: str(node.name)):
        array = _labels_from_attributes(node.to_dataset())[variable].load()
        found[str(node.attrs["site"])] = array.rename("attention")
    return found


_LABELS = "text_coordinates"


def _labels_to_attributes(data: xr.Dataset) -> xr.Dataset:
    """Text has no data type in the Zarr 3 specification: text coordinates are stored as JSON attributes."""
    labels = {str(name): c for name, c in data.coords.items() if c.dtype.kind in "UO"}
    held = {name: {"dims": list(map(str, c.dims)), "values": c.values.tolist()} for name, c in labels.items()}
    return data.drop_vars(list(labels)).assign_attrs({_LABELS: held} if held else {})


def _labels_from_attributes(data: xr.Dataset) -> xr.Dataset:
    held: Any = data.attrs.pop(_LABELS, {})
    return data.assign_coords(
        {name: (label["dims"], np.asarray(label["values"], dtype=str)) for name, label in held.items()}
    )


def _node(site: str, index: int) -> str:
    """A name for a tree node: ordered, and without the slash that a path would split at."""
    return f"{index:04d} {site.replace('/', '_')}" if site else f"{index:04d}"


def _need_zarr() -> None:
    try:
        import zarr  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('saving and loading maps needs zarr: pip install "aiba[zarr]"') from error


def _archive(folder: Path, path: Path) -> None:
    """One uncompressed zip of a zarr folder (its chunks are compressed already)."""
    import zipfile

    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())


def _remove(path: Path) -> None:
    import shutil

    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
