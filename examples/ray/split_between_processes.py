"""The same on the GPUs of one machine without Ray: a process a GPU by `accelerate`, each with its share of the prompts.

    accelerate launch --num_processes 8 examples/ray/split_between_processes.py prompts.txt out
    accelerate launch --cpu --num_processes 2 examples/ray/split_between_processes.py prompts.txt out

Shares are laid out before the start: a process that is done early waits, one that dies takes its share with it (its
folders that are there stay), and a second call searches for everything again. Bits are those of any other way.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

import flowfast

source, out = Path(sys.argv[1]), Path(sys.argv[2])
state = PartialState()
torch.set_num_threads(1)
prompts = [line for line in source.read_text().splitlines() if line.strip()]
flow = flowfast.load("scenes")  # on a GPU: flowfast.from_diffusers(..., device=state.device)
out.mkdir(parents=True, exist_ok=True)
with state.split_between_processes(list(enumerate(prompts))) as share:
    for number, prompt in share:
        result = flowfast.search(flow, [prompt], reward="scenes", budget=100, micro_batch=8)
        pixels = (result.samples[0].image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(out / f"{number:05d}.png")
        print(f"process {state.process_index}: {prompt}: {result.samples[0].reward:.3f}", flush=True)
