"""Draw training clips and encode them with the trained VAE, once for both denoisers.

    python examples/training/encode.py --work WORK --count 20000

Writes the latents (posterior means, divided by their standard deviation, which becomes the VAE's scaling factor) and the
instruments of every clip. Prompts are drawn anew in every training step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from data import HOP, SAMPLE_RATE, LogMel, Stems
from loop import load_average
from safetensors.torch import save_file

from aiba_plugins.demo import parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20000, help="clips")
    parser.add_argument("--seconds", type=float, default=2.56, help="length of a clip")
    parser.add_argument("--split", default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    stems = Stems(options.work / "data" / f"{options.split}.safetensors", options.device)
    front, vae = LogMel().to(options.device), parts.vae().to(options.device).eval()
    state = load_average(options.work / "vae.safetensors", {"vae": vae})
    columns = round(options.seconds * SAMPLE_RATE / HOP)
    latents, instruments, size = [], [], 40
    with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
        for first in range(0, options.count, size):
            audio, named = stems.batch(np.random.default_rng((options.seed, 1, first)), size, columns)
            latents.append(vae.encode(front(audio)[:, None]).latent_dist.mode().half().cpu())
            instruments += named
            if first % (100 * size) == 0:
                print(first, flush=True)
    stacked = torch.cat(latents)
    path = options.work / "data" / f"latents-{options.seconds:g}.safetensors"
    deviation = float(stacked[:2000].float().std())
    scale = 1 / deviation
    known = options.work / "data" / "scale.json"
    if known.exists():  # one factor for all lengths
        scale = float(json.loads(known.read_text())["scaling_factor"])
    else:
        known.write_text(json.dumps({"scaling_factor": scale, "vae_step": state["step"]}))
    about = {"instruments": instruments, "scaling_factor": scale}
    save_file({"latents": (stacked.float() * scale).half()}, str(path), {"about": json.dumps(about)})
    print(path.name, tuple(stacked.shape), "scaling factor", round(scale, 4), flush=True)


if __name__ == "__main__":
    main()
