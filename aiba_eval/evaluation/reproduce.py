"""Published protocols, each in one call.

``aiba-2025``
    The AIBA paper's: AudioLDM2, one prompt per instrument class, 50 steps, guidance 2.5, 8.0 s, seed 0, cross-attention of every site
    summed over tokens, averaged over layers and steps onto a (128, 64) mel grid, scored against its bands (Tables 1 and 3, with the
    ablations of ours beside its own); and, since a generated sample has no stems, the same model on the dataset's own mixes.
    Needs the weights (``cvssp/audioldm2``) and a copy of Slakh2100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiba_eval import templates
from aiba_eval.evaluation.configuration import ABLATIONS, CannotEvaluate, Configuration, Variant
from aiba_eval.evaluation.running import evaluate_on
from aiba_eval.evaluation.runs import Run
from aiba_eval.run import Progress


@dataclass(frozen=True)
class Published:
    """A published protocol.

    Attributes
    ----------
    model : what it was run on
    dataset : a dataset's name
    parts : name to configuration: each becomes a run of its own
    source : where it is described
    """

    model: str
    dataset: str
    parts: Mapping[str, Configuration]
    source: str


def _variants(**extra: Variant) -> dict[str, Variant]:
    return {"default": Variant(), **{name: v for name, v in ABLATIONS.items() if v.layer_weights == "equal"}, **extra}


PUBLISHED: Mapping[str, Published] = {
    "aiba-2025": Published(
        "cvssp/audioldm2",
        "slakh",
        {
            "generate": Configuration(
                "generate",
                words=templates.instruments("paper"),
                seconds=8.0,
                steps=50,
                guidance=2.5,
                variants=_variants(),
            ),
            "probe": Configuration("probe", seconds=8.0, variants=_variants()),
        },
        "arXiv 2509.20891",
    )
}


def reproduce(
    name: str,
    *,
    model: str | None = None,
    root: str | Path | None = None,
    split: str = "test",
    out: str | Path = "aiba-reproduction",
    changes: Mapping[str, Any] | None = None,
    max_pieces: int | None = None,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    dask: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Run]:
    """Run a published protocol.

    Parameters
    ----------
    name : str
        One of :data:`PUBLISHED`.
    model : str, optional
        Another than the published one. The results are then not the publication's.
    root : path, optional
        Your copy of its dataset; default the set that ships with the package, which is not the publication's either.
    split : str
        Whose pieces are probed.
    out : path
        Folder of the runs, one in each subfolder; stopped ones go on.
    changes : Mapping, optional
        Attributes of :class:`Configuration` to be changed in every part: a shorter ``seconds``, fewer ``steps``.
    max_pieces, overwrite, device, dtype, dask, progress
        As in :func:`aiba_eval.evaluation.evaluate_on`.

    Returns
    -------
    dict of str to Run
        One per part.

    Raises
    ------
    CannotEvaluate
        There is no such protocol, or as :func:`aiba_eval.evaluation.evaluate_on`.
    """
    if name not in PUBLISHED:
        raise CannotEvaluate(f"no protocol {name!r} is known; there is {', '.join(PUBLISHED)}")
    published = PUBLISHED[name]
    made = {}
    for part, configuration in published.parts.items():
        wanted = Configuration(**{**vars(configuration), **(changes or {})})
        made[part] = evaluate_on(
            published.model if model is None else model,
            wanted,
            dataset=published.dataset,
            root=root,
            split=split,
            max_pieces=max_pieces,
            out=Path(out) / part,
            overwrite=overwrite,
            device=device,
            dtype=dtype,
            dask=dask,
            progress=progress,
        )
    return made
