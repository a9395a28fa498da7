"""Pack rendered stems for training: one safetensors file per split, no audio decoding afterwards.

aiba stems render …                      # or any dataset in Slakh's layout
python examples/training/prepare.py --stems STEMS --out WORK
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from data import HOP, SAMPLE_RATE
from safetensors.torch import save_file

from aiba_eval.datasets import slakh


def pack(stems: Path, split: str, seconds: float) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """One row per piece and instrument: int16 audio with its scale, and the power of every 10 ms."""
    length = round(seconds * SAMPLE_RATE)
    found = slakh.pieces(stems, split)
    rows, columns, audio, scale = [], [], [], []
    for piece in found:
        for instrument in piece.instruments:
            wave = piece.stem(instrument, sample_rate=SAMPLE_RATE)[:length]
            peak = float(np.abs(wave).max())
            if peak == 0:
                continue
            row = np.zeros(length, np.int16)
            row[: len(wave)] = np.round(wave / peak * 32767)
            rows.append((piece.name, instrument))
            columns.append(len(wave) // HOP)
            audio.append(row)
            scale.append(peak / 32767)
    stacked = torch.from_numpy(np.stack(audio))
    scales = torch.tensor(scale, dtype=torch.float32)
    power = torch.stack(
        [(row.float() * s).view(-1, HOP).square().mean(1) for row, s in zip(stacked, scales, strict=True)]
    )
    about = {
        "rows": rows,
        "columns": columns,
        "pieces": len(found),
        "licences": dict(Counter(piece.licence for piece in found)),
        "sources": dict(Counter(piece.source for piece in found)),
        "instruments": dict(Counter(name for _, name in rows)),
    }
    return {"audio": stacked, "scale": scales, "power": power}, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stems", type=Path, required=True, help="folder of a dataset in Slakh's layout")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each piece at most")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        tensors, about = pack(arguments.stems, split, arguments.seconds)
        save_file(tensors, str(arguments.out / f"{split}.safetensors"), {"about": json.dumps(about)})
        print(split, about["pieces"], "pieces,", len(tensors["audio"]), "rows", flush=True)


if __name__ == "__main__":
    main()
