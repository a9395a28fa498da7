"""Options that several commands have."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="A registered model, a folder with a model_index.json, or a hub id.")]


class Heads(enum.StrEnum):
    """--heads"""

    mean = "mean"
    all = "all"


class Spatial(enum.StrEnum):
    """--spatial"""

    mean = "mean"
    max = "max"
    topk = "topk"


class StepWeights(enum.StrEnum):
    """--step-weights"""

    uniform = "uniform"
    late = "late"


class Dtype(enum.StrEnum):
    """--dtype"""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Device = Annotated[str, typer.Option(help="A torch device such as cuda:1; auto is a GPU if there is one.")]
DtypeOption = Annotated[Dtype, typer.Option(help="auto is bfloat16 on a GPU and float32 elsewhere.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the noise, drawn on the CPU: the same on every device.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output of an earlier command.")]
RunFolder = Annotated[Path, typer.Argument(help="A folder that `aiba evaluate` wrote.")]
