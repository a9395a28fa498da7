"""The embedded trained pipelines: where they are, whether they are intact, how to load them.

::

    weights/digests.json                        SHA-256 and size of every file below
    weights/unet/                               a folder of diffusers' save_pretrained, complete
    weights/dit/                                the same, its VAE and vocoder in ../unet
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Literal

from aiba_hooks import AibaError

Kind = Literal["unet", "dit"]

#: folder of the weights that ship with the package
WEIGHTS = Path(__file__).parent / "weights"
DIGESTS = "digests.json"


class DamagedWeights(AibaError):
    """A file of the embedded weights is missing, cut off or changed."""


def available(kind: Kind, root: Path = WEIGHTS) -> bool:
    """Whether the weights of this pipeline were installed."""
    return (root / kind / "model_index.json").is_file() and (root / DIGESTS).is_file()


def needed(kind: Kind) -> tuple[str, ...]:
    """Folders that a pipeline reads, relative to the weights."""
    return ("unet/",) if kind == "unet" else ("dit/", "unet/vae/", "unet/vocoder/")


def verify(kind: Kind, root: Path = WEIGHTS) -> None:
    """Compare every file of a pipeline with its recorded size and SHA-256.

    Raises
    ------
    DamagedWeights
        Names the first file that differs, and how.
    """
    try:
        digests: dict[str, dict[str, Any]] = json.loads((root / DIGESTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedWeights(f"{root / DIGESTS} cannot be read ({error}): install AIBA again") from error
    recorded = {name: about for name, about in digests.items() if name.startswith(needed(kind))}
    if not recorded:
        raise DamagedWeights(f"{root / DIGESTS} lists no files of demo:{kind}: install AIBA again")
    for name, about in recorded.items():
        path = root / name
        if not path.is_file():
            raise DamagedWeights(f"{path} is missing: install AIBA again")
        size = path.stat().st_size
        if size != about["bytes"]:
            state = "cut off" if size < about["bytes"] else "too long"
            raise DamagedWeights(f"{path} is {state}: {size} bytes instead of {about['bytes']}. Install AIBA again")
        if sha256(path) != about["sha256"]:
            raise DamagedWeights(f"{path} was changed: its SHA-256 is not the recorded one. Install AIBA again")


def sha256(path: Path) -> str:
    """Hexadecimal digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(kind: Kind, root: Path = WEIGHTS) -> Any:
    """Load a pipeline in float32 on the CPU, in eval mode, after :func:`verify`.

    Parameters
    ----------
    kind : "unet" (``AudioLDM2Pipeline``) or "dit" (:class:`~aiba_plugins.demo.mel_dit.MelDiTPipeline`)
    root : folder of the weights; another folder is for tests and for weights that were trained anew

    Raises
    ------
    DamagedWeights
        A file is missing or not the one that was shipped.
    ModuleNotFoundError
        diffusers or transformers is not installed.
    """
    verify(kind, root)
    try:
        import diffusers
        import torch
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'demo:{kind} needs {error.name}: pip install "aiba[diffusers]"', name=error.name
        ) from error
    pipeline_class: Any
    if kind == "unet":
        pipeline_class = diffusers.AudioLDM2Pipeline
    else:
        from aiba_plugins.demo.mel_dit import MelDiTPipeline as pipeline_class
    pipe = pipeline_class.from_pretrained(root / kind, dtype=torch.float32, use_safetensors=True, local_files_only=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def save(pipe: Any, kind: Kind, root: Path) -> None:
    """Write a pipeline as fp16 safetensors under ``root``, in place of an earlier one; then call :func:`record`."""
    import torch

    folder = root / kind
    shutil.rmtree(folder, ignore_errors=True)
    pipe.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    pipe.to(torch.float32)
    if kind == "dit":
        for shared in ("vae", "vocoder"):
            shutil.rmtree(folder / shared)  # in ../unet


def record(root: Path) -> dict[str, dict[str, Any]]:
    """Write sizes and SHA-256 digests of every file of the pipelines under ``root``; returns them."""
    files = sorted(path for kind in ("unet", "dit") for path in (root / kind).rglob("*") if path.is_file())
    digests = {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    (root / DIGESTS).write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")
    return digests
