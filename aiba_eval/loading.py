"""Pipelines by name: a registered model, a folder, or a hub id.

Only safetensors weights are read, and no code that comes with a model is run: a folder or repository that holds Python
files is refused. Loading a plugin's model runs that plugin, which the user has installed.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from aiba_hooks import Model

Origin = Literal["plugin", "folder", "hub", "given"]

#: torch's names of the dtypes that a pipeline can run in
DTYPES = ("float32", "bfloat16", "float16")
#: parameters below which a pipeline runs on one thread
TINY = 10_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INDEX = "model_index.json"


class CannotLoad(Exception):
    """A model cannot be loaded. The message names it and says what to do."""


@dataclass(frozen=True)
class Loaded:
    """A pipeline and where it comes from.

    Attributes
    ----------
    name
        As asked for.
    pipeline
        Ready to be called: on its device, with the dtype asked for, in eval mode.
    origin
        "plugin" (the hook ``aiba_models``), "folder", "hub", or "given" by the caller.
    trained
        False if its weights are random, as its plugin says; None where nobody says.
    device, dtype
        As chosen.
    """

    name: str
    pipeline: Any
    origin: Origin
    trained: bool | None
    device: str
    dtype: str


def models() -> list[Model]:
    """Models that plugins offer by name, in the order in which they are looked up."""
    from aiba_hooks.plugins import manager

    return manager().collect("aiba_models")


def load(name: str, *, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Load a pipeline.

    A registered model of that name comes first, then a folder with a ``model_index.json`` (as diffusers'
    ``save_pretrained`` writes it), then a hub id ``owner/name``.

    Parameters
    ----------
    name : str
    device : str
        A torch device such as ``"cuda:1"``, or ``"auto"``: a CUDA GPU if there is one, else the CPU.
    dtype : {"auto", "float32", "bfloat16", "float16"}
        ``"auto"`` is bfloat16 on a GPU and float32 on a CPU.

    Raises
    ------
    CannotLoad
        Nothing of that name can be loaded, a package is missing, or the device or dtype does not exist.
    """
    device, kind = _where(device, dtype)
    known = models()
    chosen = next((model for model in known if model.name == name), None)
    origin: Origin = "plugin"
    folder = Path(name).expanduser()
    try:
        if chosen is not None:
            with _without_bars():
                pipeline = chosen.load()
        elif folder.exists():
            origin, pipeline = "folder", _from_folder(folder, name, kind)
        elif _HUB_ID.fullmatch(name):
            origin, pipeline = "hub", _from_hub(name, kind)
        else:
            raise CannotLoad(_not_found(name, known))
    except ModuleNotFoundError as error:
        raise CannotLoad(_missing(name, error)) from error
    if hasattr(pipeline, "set_progress_bar_config"):
        pipeline.set_progress_bar_config(disable=True)  # the caller shows its own
    _place(pipeline, device, kind)
    return Loaded(name, pipeline, origin, None if chosen is None else chosen.trained, device, kind)


def sampling_rate(pipeline: Any) -> int:
    """Hertz of the audio that a pipeline returns: its vocoder's or its autoencoder's.

    Raises
    ------
    CannotLoad
        Neither says.
    """
    for part in ("vocoder", "vae"):
        module = getattr(pipeline, part, None)
        for holder in (getattr(module, "config", None), module):
            rate = getattr(holder, "sampling_rate", None)
            if rate:
                return int(rate)
    raise CannotLoad(
        f"{type(pipeline).__name__} does not say its sampling rate: neither its vocoder nor its vae has a sampling_rate"
    )


def weights_digest(pipeline: Any) -> str:
    """16 hex digits of every weight of a pipeline: a model that was trained further is another one under the same name."""
    import torch

    digest = hashlib.sha256()
    for part, module in sorted(getattr(pipeline, "components", {}).items()):
        if isinstance(module, torch.nn.Module):
            for name, value in sorted(module.state_dict().items()):
                digest.update(f"{part} {name} {tuple(value.shape)} {value.dtype}".encode())
                if not value.is_meta:  # of a part that is loaded when it is needed
                    digest.update(value.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


@contextmanager
def few_threads(pipeline: Any) -> Iterator[None]:
    """One thread for a tiny model: its matrices gain next to nothing from more, and waiting for another thread costs
    tenfold where other processes want the cores."""
    import torch

    parts = [part for part in getattr(pipeline, "components", {}).values() if isinstance(part, torch.nn.Module)]
    tiny = sum(weight.numel() for part in parts for weight in part.parameters()) < TINY
    with threads_of(1 if tiny else None):
        yield


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """So many threads of torch and of numpy's libraries inside, None for as many as before; left as found.

    The order of a sum, and with it the last bits of a result, depends on their number in either.
    """
    import torch
    from threadpoolctl import threadpool_limits

    if count is None:
        yield
        return
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        with threadpool_limits(count):
            yield
    finally:
        torch.set_num_threads(before)


def _not_found(name: str, known: list[Model]) -> str:
    registered = ", ".join(model.name for model in known) or "none"
    if name.startswith("demo:") or (":" in name and "/" not in name):
        return (
            f"no model is named {name!r}. Registered: {registered}. `aiba plugins` shows what each plugin offers and "
            "which plugins failed to load"
        )
    return (
        f"{name!r} is no registered model ({registered}), no folder here, and no hub id (owner/name). Give the path of a "
        f"folder with a {_INDEX}, as diffusers' save_pretrained writes it, or a hub id such as cvssp/audioldm2"
    )


def _missing(name: str, error: ModuleNotFoundError) -> str:
    if "pip install" in str(error):
        return str(error)
    return f'loading {name!r} needs {error.name}, which is not installed: pip install "aiba[diffusers]"'


def _from_folder(folder: Path, name: str, dtype: str) -> Any:
    if not folder.is_dir() or not (folder / _INDEX).is_file():
        kind = "a folder without" if folder.is_dir() else "a file, not a folder with"
        raise CannotLoad(
            f"{name!r} is {kind} a {_INDEX}. Give the folder that diffusers' save_pretrained wrote (the one that holds "
            "unet/ or transformer/ beside vae/)"
        )
    code = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.py"))
    if code:
        raise CannotLoad(
            f"{name!r} holds Python code ({', '.join(code[:3])}), which AIBA does not run. If you trust it, load the "
            "pipeline in Python yourself and pass it to aiba_eval.run.run"
        )
    import torch
    from diffusers import DiffusionPipeline

    try:
        with _without_bars():
            return DiffusionPipeline.from_pretrained(
                str(folder), dtype=getattr(torch, dtype), use_safetensors=True, local_files_only=True
            )
    except (OSError, ValueError, KeyError) as error:
        raise CannotLoad(
            f"{name!r} cannot be loaded: {_one_line(error)}. AIBA reads safetensors weights only; convert others with "
            "diffusers' save_pretrained(safe_serialization=True)"
        ) from error


def _from_hub(name: str, dtype: str) -> Any:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import HfHubHTTPError

    try:
        folder = DiffusionPipeline.download(name, use_safetensors=True)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise CannotLoad(
            f"there is no folder {name!r} here, and it cannot be fetched from the hub: {_one_line(error)}. Check the "
            "spelling and the connection; for a gated model run `hf auth login` first"
        ) from error
    return _from_folder(Path(folder), name, dtype)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep the libraries' own loading bars off, and leave that as found."""
    libraries = []
    for name in ("diffusers", "transformers"):
        # a plugin's model may need neither
        with suppress(ModuleNotFoundError):
            libraries.append(import_module(f"{name}.utils.logging"))
    shown = [library for library in libraries if library.is_progress_bar_enabled()]
    for library in shown:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in shown:
            library.enable_progress_bar()


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" …").rstrip(".")


def _where(device: str, dtype: str) -> tuple[str, str]:
    """The device and dtype to use, once they are known to exist."""
    import torch

    if dtype != "auto" and dtype not in DTYPES:
        raise CannotLoad(f"unknown dtype {dtype!r}; choose auto, {', '.join(DTYPES)}")
    chosen = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.empty(0, device=chosen).device.type
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise CannotLoad(f"device {device!r} cannot be used: {_one_line(error)}. Choose auto or cpu") from error
    return chosen, dtype if dtype != "auto" else "bfloat16" if kind == "cuda" else "float32"


def _place(pipeline: Any, device: str, dtype: str) -> None:
    """Move a pipeline where it is not already; a part that is right is not touched."""
    import torch

    target = getattr(torch, dtype)
    parts = [part for part in getattr(pipeline, "components", {}).values() if isinstance(part, torch.nn.Module)]
    weights = [weight for part in parts for weight in part.parameters() if weight.is_floating_point()]
    if weights and any(weight.dtype != target for weight in weights):
        for part in parts:
            # not part.to(): diffusers' own warns of parts to be kept in float32 even where there are none
            torch.nn.Module.to(part, dtype=target)
    if weights and any(weight.device != torch.device(device) for weight in weights):
        pipeline.to(device)
