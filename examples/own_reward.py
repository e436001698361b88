"""An own reward: any callable of images and prompts. This one likes a picture that is its own mirror image.

    python examples/own_reward.py "two red circles and two blue squares" 200

Writes plain.png, a sample without a search, and best.png.
"""

import sys

from PIL import Image

import flowfast

VERIFIER = flowfast.rewards.load("scenes")


def symmetry(images):
    """0 for a mirror image of itself, else below. images: (N, 3, H, W) in [0, 1]."""
    return -(images - images.flip(3)).abs().mean(dim=(1, 2, 3))


def score(images, prompts):
    """Symmetric, and still what the prompt says: N numbers, higher is better."""
    return 20 * symmetry(images) + says(images, prompts)


def says(images, prompts):
    cond = VERIFIER.encode(list(prompts))
    return VERIFIER(images, images.new_zeros(len(images)), cond).clamp(min=-5)


def main(prompt, budget):
    flow = flowfast.load("scenes")
    for name, method in (("plain.png", "ode"), ("best.png", "svdd")):
        (sample,) = flowfast.search(flow, prompt, reward=score, method=method, budget=budget, seed=0).samples
        mirrored, said = symmetry(sample.image[None]).item(), says(sample.image[None], [prompt]).item()
        print(f"{name}: symmetry {mirrored:.3f}, verifier {said:.2f}, reward {sample.reward:.2f} at {sample.nfe} NFE")
        pixels = (255 * sample.image).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).resize((256, 256), Image.Resampling.NEAREST).save(name)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "two red circles", int(sys.argv[2]) if len(sys.argv) > 2 else 200)
