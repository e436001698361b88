"""FLUX.1, searched: the best picture, the picture without a search, and what the search spent.

    python examples/flux.py "four candles and two balloons" --budget 200 --reward clipscore
    python examples/flux.py "a cat" --model FOLDER --reward sharpness --option height=256 --option width=256

Any pipeline with an adapter will do, by its id or by the folder of save_pretrained. Writes plain.png and best.png.
"""

import argparse

import torch
from PIL import Image

import flowfast


def save(image, path):
    """Of an image (3, H, W) in [0, 1]."""
    Image.fromarray((255 * image).round().byte().permute(1, 2, 0).numpy()).save(path)


def main(prompt, model, reward, budget, seed, **options):
    flow = flowfast.from_diffusers(model, dtype=torch.bfloat16, **options)  # or from_diffusers(a loaded pipeline)
    plain = flowfast.search(flow, prompt, reward=reward, method="ode", budget=budget, seed=seed).samples[0]
    best = flowfast.search(
        flow, prompt, reward=reward, budget=budget, seed=seed,
        on_progress=lambda nfe, of: print(f"\r{nfe} of {of} NFE", end="", flush=True),
    ).samples[0]  # fmt: skip
    print(f"\nplain sample: reward {plain.reward:.3f}, {plain.nfe} NFE")
    print(f"search ({best.method}): reward {best.reward:.3f}, {best.nfe} NFE, {best.unspent} unspent")
    save(plain.image, "plain.png")
    save(best.image, "best.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="four candles and two balloons")
    parser.add_argument("--model", default="black-forest-labs/FLUX.1-schnell")
    parser.add_argument("--reward", default="clipscore")
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--option", action="append", default=[], metavar="NAME=INTEGER", help="height, width, steps")
    given = vars(parser.parse_args())
    main(**{name: int(value) for name, value in (text.split("=") for text in given.pop("option"))}, **given)
