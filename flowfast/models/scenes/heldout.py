"""The held-out verifier: connected components, palette and analysis by synthesis. Search never sees it.

No network and nothing learned: pixels are read as background plus coverage of one palette colour, connected pixels of
one colour make a component, and each component is compared with all four kinds drawn at the size and place that its
own mass says. A component that no drawing explains makes the scene malformed, and malformed scenes score 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from flowfast.errors import PromptError
from flowfast.models.scenes.data import (
    BACKGROUND,
    COLOURS,
    KINDS,
    NUM_CLASSES,
    PALETTE,
    RELATIONS,
    SIZE,
    Scene,
    parse_prompt,
    shape_distance,
)

MIN_COVERAGE = 0.4  # a pixel belongs to an object from this coverage on
MIN_MASS = 10.0  # pixels; lighter components are dirt: up to MAX_DIRT pixels of it in all are forgiven
MAX_DIRT = 4.0
RADII = (2.9, 5.0)  # pixels; drawn ones are 3.5-4.3
MAX_MISFIT = 0.30  # sum |coverage - drawing| / mass
MAX_COLOUR_ERROR = 0.30  # mean RGB distance of a component's core from its colour
RELATION_MARGIN = 4.0  # pixels between centres along the axis of the relation


@dataclass(frozen=True)
class Found:
    """One object: class 0..15, centre in pixels, misfit of the best drawing, and whether it is well formed."""

    class_id: int
    x: float
    y: float
    misfit: float
    ok: bool


def _unit_areas() -> tuple[np.ndarray, np.ndarray]:
    """Area of each kind at radius 1 and how far its centroid lies below its centre, both float64 (4,)."""
    axis = torch.linspace(-1.5, 1.5, 1201, dtype=torch.float64)
    dy, dx = torch.meshgrid(axis, axis, indexing="ij")
    one = torch.ones((), dtype=torch.float64)
    inside = torch.stack([shape_distance(torch.tensor(k), dx, dy, one) < 0 for k in range(len(KINDS))]).double()
    cell = float(axis[1] - axis[0]) ** 2
    return (inside.sum((1, 2)) * cell).numpy(), ((inside * dy).sum((1, 2)) / inside.sum((1, 2))).numpy()


_AREA, _SINK = _unit_areas()


def find_objects(image: np.ndarray) -> tuple[list[Found], float]:
    """Objects of one image float (3, 32, 32) in [0, 1], and the mass (pixels) of dirt: what is in none of them."""
    background, palette = np.asarray(BACKGROUND), np.asarray(PALETTE)
    pixels = np.moveaxis(np.asarray(image, np.float64), 0, -1) - background
    tints = palette - background
    cover = np.clip((pixels @ tints.T) / (tints**2).sum(1), 0.0, 1.2)  # (32, 32, 4): least-squares coverage by each
    error = np.linalg.norm(pixels[..., None, :] - cover[..., None] * tints, axis=-1)
    best = error.argmin(-1)
    amount = np.take_along_axis(cover, best[..., None], -1)[..., 0]
    strength = np.linalg.norm(pixels, axis=-1) / np.linalg.norm(tints, axis=1).mean()
    foreground = np.maximum(amount, strength) > MIN_COVERAGE
    found: list[Found] = []
    dirt = 0.0
    for colour in range(len(COLOURS)):
        labels, n = ndimage.label(foreground & (best == colour), np.ones((3, 3)))
        for index in range(1, n + 1):
            core = labels == index
            if core.sum() < MIN_MASS:
                dirt += float(core.sum())
                continue
            halo = ndimage.binary_dilation(core, np.ones((3, 3))) & ~(foreground & ~core)
            mass = np.where(halo, cover[..., colour], 0.0)
            off = float(
                np.linalg.norm(
                    pixels[core] - np.clip(cover[core, colour], 0, 1)[:, None] * tints[colour], axis=1
                ).mean()
            )
            found.append(_fit(mass, colour, off))
    return found, dirt


def _fit(mass: np.ndarray, colour: int, off: float) -> Found:
    """The kind whose drawing, at the centroid and area of the coverage map `mass` (32, 32), misses the least of it."""
    total = mass.sum()
    grid = np.arange(SIZE) + 0.5
    cx, cy = float((mass.sum(0) * grid).sum() / total), float((mass.sum(1) * grid).sum() / total)
    radius = np.sqrt(total / _AREA)
    kind = torch.arange(len(KINDS))[:, None, None]
    dx = torch.from_numpy(grid - cx)[None, None, :]
    dy = torch.from_numpy(grid[None, :, None] - (cy - _SINK * radius)[:, None, None])
    drawn = (0.5 - shape_distance(kind, dx, dy, torch.from_numpy(radius)[:, None, None])).clamp(0.0, 1.0).numpy()
    misfit = np.abs(drawn - mass).sum((1, 2)) / total
    best = int(misfit.argmin())
    good = misfit[best] <= MAX_MISFIT and RADII[0] <= radius[best] <= RADII[1] and off <= MAX_COLOUR_ERROR
    return Found(colour * len(KINDS) + best, cx, cy, float(misfit[best]), bool(good))


def _check(images: Tensor | np.ndarray, prompts: Sequence[str]) -> tuple[np.ndarray, list[Scene]]:
    array = images.detach().cpu().float().numpy() if isinstance(images, Tensor) else np.asarray(images)
    if array.ndim != 4 or array.shape[1:] != (3, SIZE, SIZE):
        raise ValueError(f"expected images of shape (N, 3, {SIZE}, {SIZE}), got {array.shape}")
    if isinstance(prompts, str) or len(prompts) != len(array):
        raise ValueError(
            f"expected one prompt an image ({len(array)}), got {1 if isinstance(prompts, str) else len(prompts)}"
        )
    scenes = [parse_prompt(p) for p in prompts]
    if any(not s.phrases for s in scenes):
        raise PromptError("the held-out verifier cannot judge an empty prompt; give one that names objects")
    return array, scenes


def _relation_holds(found: list[Found], scene: Scene) -> bool:
    if scene.relation is None:
        return True
    sides = []
    for phrase in (scene.relation.subject, scene.relation.target):
        matches = [f for f in found if f.class_id == scene.phrases[phrase].class_id]
        if len(matches) != 1:
            return False
        sides.append((matches[0].x, matches[0].y)[RELATIONS.index(scene.relation.name)])
    return sides[1] - sides[0] >= RELATION_MARGIN


def heldout_score(images: Tensor | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Exactness, float64 (N,) in {0, 1}: 1 if the image (3, 32, 32) in [0, 1] shows just what its prompt says.

    Every object well formed, the count of each of the 16 classes right, nothing else in the picture, the relation kept.
    NaN scores 0. Raises ValueError for wrong shapes and PromptError for prompts outside the grammar or empty.
    """
    array, scenes = _check(images, prompts)
    out = np.zeros(len(array))
    for i, scene in enumerate(scenes):
        if not np.isfinite(array[i]).all():
            continue
        found, dirt = find_objects(array[i])
        counts = np.bincount([f.class_id for f in found], minlength=NUM_CLASSES)
        clean = dirt <= MAX_DIRT and all(f.ok for f in found)
        out[i] = float(clean and bool((counts == scene.counts()).all()) and _relation_holds(found, scene))
    return out


def heldout_soft_score(images: Tensor | np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Share of what the prompt asks that the image shows, float64 (N,) in [0, 1]; for curves, not for headlines.

    Matched well-formed objects over the larger of asked and found (intersection over union of the two multisets of
    objects), averaged with the relation (0 or 1) as one more object.
    """
    array, scenes = _check(images, prompts)
    out = np.zeros(len(array))
    for i, scene in enumerate(scenes):
        if not np.isfinite(array[i]).all():
            continue
        found, _ = find_objects(array[i])
        good = np.bincount([f.class_id for f in found if f.ok], minlength=NUM_CLASSES)
        bad = sum(not f.ok for f in found)
        asked = scene.counts()
        hit, union = float(np.minimum(good, asked).sum()), float(np.maximum(good, asked).sum()) + bad
        if scene.relation is not None:
            hit, union = hit + _relation_holds([f for f in found if f.ok], scene), union + 1.0
        out[i] = hit / union
    return out
