"""Scenes: their words, a fast renderer and the training sampler.

A scene is 1-5 objects on a light background of 32 x 32 pixels. An object is one of 4 kinds in one of 4 colours (16
classes). A prompt (grammar.py) lists 1-3 phrases, "three red circles, one blue square and a green cross"; two single
objects may be related: "a red circle left of a green triangle and two blue squares".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowfast.models.scenes.grammar import (
    COLOURS,
    COUNT_WORDS,
    KINDS,
    MAX_OBJECTS,
    RELATIONS,
    Grammar,
)

SIZE = 32  # pixels a side
NUM_CLASSES = len(KINDS) * len(COLOURS)
TOKEN_SIZES = (NUM_CLASSES + 1, MAX_OBJECTS + 1, MAX_OBJECTS + 1, 2 * len(RELATIONS) + 1)

BACKGROUND = (0.94, 0.94, 0.92)
PALETTE = ((0.86, 0.16, 0.18), (0.13, 0.62, 0.27), (0.16, 0.33, 0.86), (0.97, 0.76, 0.08))
GRID = 3  # objects stand in distinct cells of a 3 x 3 grid, jittered: never closer than about a pixel
RADIUS = (3.5, 4.3)  # pixels
REACH = 4.85  # radius + jitter, pixels; half a cell is 5.33


@dataclass(frozen=True)
class Phrase:
    """`count` objects of one class."""

    count: int
    colour: str
    kind: str

    @property
    def class_id(self) -> int:
        """Class in 0..15: colour * 4 + kind."""
        return COLOURS.index(self.colour) * len(KINDS) + KINDS.index(self.kind)

    def text(self, article: bool = False) -> str:
        """The phrase in words: "three red circles"; a single object reads "one ..." or, with `article`, "a ..."."""
        number = "a" if article and self.count == 1 else COUNT_WORDS[self.count - 1]
        plural = "" if self.count == 1 else ("es" if self.kind == "cross" else "s")
        return f"{number} {self.colour} {self.kind}{plural}"


@dataclass(frozen=True)
class Relation:
    """Phrase `subject` stands `name` ("left of", "above") phrase `target`; both are single objects."""

    name: str
    subject: int
    target: int


@dataclass(frozen=True)
class Scene:
    """A parsed prompt: phrases of distinct classes, at most one relation. No phrases: the null condition."""

    phrases: tuple[Phrase, ...]
    relation: Relation | None = None

    def counts(self) -> np.ndarray:
        """Objects per class, int64 (16,)."""
        out = np.zeros(NUM_CLASSES, np.int64)
        for phrase in self.phrases:
            out[phrase.class_id] += phrase.count
        return out

    def text(self) -> str:
        """The canonical prompt; `parse_prompt(scene.text()) == scene`."""
        parts, related = [], set()
        if self.relation is not None:
            subject, target = self.phrases[self.relation.subject], self.phrases[self.relation.target]
            parts.append(f"{subject.text(True)} {self.relation.name} {target.text(True)}")
            related = {self.relation.subject, self.relation.target}
        parts += [phrase.text() for i, phrase in enumerate(self.phrases) if i not in related]
        return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


GRAMMAR = Grammar()


def parse_prompt(prompt: str) -> Scene:
    """Parse a prompt; "" is the null condition. Raises PromptError for anything outside the grammar."""
    GRAMMAR.check_types([prompt])
    phrases, relation = GRAMMAR.parse(prompt)
    return Scene(
        tuple(Phrase(count, COLOURS[colour], KINDS[kind]) for count, colour, kind in phrases),
        Relation(RELATIONS[relation[0]], relation[1], relation[2]) if relation else None,
    )


def scene_tokens(scene: Scene) -> np.ndarray:
    """Slots of a scene, int64 (L, F) = (5, 4)."""
    phrases = [[p.count, COLOURS.index(p.colour), KINDS.index(p.kind)] for p in scene.phrases]
    r = scene.relation
    return np.array(GRAMMAR.tokens(phrases, [RELATIONS.index(r.name), r.subject, r.target] if r else []), np.int64)


def encode_prompts(prompts: list[str]) -> dict[str, Tensor]:
    """`{"tokens": int64 (N, 5, 4)}` for N prompts; "" encodes to the null condition. Raises PromptError."""
    return GRAMMAR(prompts)


@dataclass
class SceneBatch:
    """N scenes with their layout; unused slots have class 0.

    tokens int64 (N, 5, 4); centres float32 (N, 5, 2) as (x, y) in pixels; radii float32 (N, 5) in pixels.
    """

    tokens: Tensor
    centres: Tensor
    radii: Tensor

    def counts(self) -> Tensor:
        """Objects per class, int64 (N, 16)."""
        return torch.nn.functional.one_hot(self.tokens[:, :, 0], NUM_CLASSES + 1).sum(1)[:, 1:]


_COMPOSITIONS = {
    1: ((1,),),
    2: ((2,), (1, 1), (1, 1)),
    3: ((3,), (2, 1), (1, 2), (1, 1, 1), (1, 1, 1)),
    4: ((4,), (3, 1), (1, 3), (2, 2), (2, 1, 1), (1, 2, 1), (1, 1, 2)),
    5: ((5,), (4, 1), (3, 2), (2, 3), (1, 4), (3, 1, 1), (1, 3, 1), (1, 1, 3), (2, 2, 1), (1, 2, 2), (2, 1, 2)),
}


def sample_scene(rng: np.random.Generator, num_objects: int, relation_share: float = 0.4) -> Scene:
    """A random scene of `num_objects` (1-5) objects; `relation_share` of those that can have a relation have one."""
    options = _COMPOSITIONS[num_objects]
    counts = options[int(rng.integers(len(options)))]
    classes = rng.choice(NUM_CLASSES, len(counts), replace=False)
    phrases = tuple(
        Phrase(n, COLOURS[int(c) // len(KINDS)], KINDS[int(c) % len(KINDS)])
        for n, c in zip(counts, classes, strict=True)
    )
    singles = [i for i, n in enumerate(counts) if n == 1]
    if len(singles) < 2 or rng.random() >= relation_share:
        return Scene(phrases)
    a, b = (int(i) for i in rng.choice(singles, 2, replace=False))
    return Scene(phrases, Relation(RELATIONS[int(rng.integers(len(RELATIONS)))], a, b))


def lay_out(rng: np.random.Generator, scenes: list[Scene]) -> SceneBatch:
    """Place the objects of each scene: random distinct cells (the relation kept), jittered, sizes in RADIUS."""
    n = len(scenes)
    tokens = np.stack([scene_tokens(s) for s in scenes])
    cells = np.argsort(rng.random((n, GRID * GRID)), axis=1)[:, :MAX_OBJECTS]
    for i in np.flatnonzero(tokens[:, :, 3].any(1)):
        roles = tokens[i, :, 3]
        a, b = int(np.flatnonzero(roles % 2 == 1)[0]), int(np.flatnonzero((roles > 0) & (roles % 2 == 0))[0])
        axis = (int(roles[a]) - 1) // 2  # 0: columns must ascend, 1: rows
        place = (cells[i] % GRID, cells[i] // GRID)[axis]
        while place[a] == place[b]:
            cells[i] = rng.permutation(GRID * GRID)[:MAX_OBJECTS]
            place = (cells[i] % GRID, cells[i] // GRID)[axis]
        if place[a] > place[b]:
            cells[i, a], cells[i, b] = cells[i, b], cells[i, a]
    radii = rng.uniform(*RADIUS, (n, MAX_OBJECTS))
    jitter = rng.uniform(-1.0, 1.0, (n, MAX_OBJECTS, 2)) * (REACH - radii)[..., None]
    centres = (np.stack((cells % GRID, cells // GRID), -1) + 0.5) * (SIZE / GRID) + jitter
    return SceneBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(centres.astype(np.float32)),
        torch.from_numpy(radii.astype(np.float32)),
    )


def sample_batch(rng: np.random.Generator, n: int, object_weights: tuple[float, ...] = (1, 2, 4, 5, 5)) -> SceneBatch:
    """n random scenes with their layout; `object_weights[k]` is the relative share of scenes with k + 1 objects."""
    weights = np.asarray(object_weights, np.float64)
    totals = rng.choice(len(weights), n, p=weights / weights.sum()) + 1
    return lay_out(rng, [sample_scene(rng, int(k)) for k in totals])


def shape_distance(kind: Tensor, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Signed distance (pixels, negative inside) of points (dx, dy) from the outline of a shape; y points down.

    `kind` 0..3 selects among KINDS; all arguments broadcast. Extents: circle r, square half side 0.9 r, triangle
    apex 1.1 r above and base 0.9 r below the centre, cross half length 1.05 r and half width 0.38 r.
    """
    ax, ay = dx.abs(), dy.abs()
    circle = torch.hypot(dx, dy) - radius
    square = torch.maximum(ax, ay) - 0.9 * radius
    slope = math.hypot(2.0, 1.1)  # sides from the apex (0, -1.1 r) to the base corners (+-1.1 r, 0.9 r)
    triangle = torch.maximum(dy - 0.9 * radius, (2.0 * ax - 1.1 * (dy + 1.1 * radius)) / slope)
    bars = torch.minimum(
        torch.maximum(ax - 1.05 * radius, ay - 0.38 * radius), torch.maximum(ay - 1.05 * radius, ax - 0.38 * radius)
    )
    return torch.where(kind < 2, torch.where(kind == 0, circle, square), torch.where(kind == 2, triangle, bars))


WINDOW = 14  # pixels a side around an object: reaches 1.1 * 4.3 + 1.5


def coverage(kind: Tensor, centres: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Anti-aliased coverage of M objects in their windows: alpha float32 and flat pixel index int64, both (M, W, W).

    Pixels outside the image have alpha 0 and index 0.
    """
    corner = torch.floor(centres).long() - WINDOW // 2 + 1
    offsets = torch.arange(WINDOW)
    px, py = corner[:, 0:1] + offsets, corner[:, 1:2] + offsets
    dx = (px + 0.5 - centres[:, 0:1])[:, None, :]
    dy = (py + 0.5 - centres[:, 1:2])[:, :, None]
    dx, dy = torch.broadcast_tensors(dx, dy)
    distance = shape_distance(kind[:, None, None], dx, dy, radii[:, None, None])
    inside = ((px >= 0) & (px < SIZE))[:, None, :] & ((py >= 0) & (py < SIZE))[:, :, None]
    alpha = (0.5 - distance).clamp(0.0, 1.0) * inside
    return alpha, torch.where(inside, py[:, :, None] * SIZE + px[:, None, :], 0)


def draw(n: int, row: Tensor, cls: Tensor, centres: Tensor, radii: Tensor, opacity: Tensor | None = None) -> Tensor:
    """n images float32 (n, 3, 32, 32) in [0, 1] of M objects: image `row` (M,), class `cls` 0..15 (M,), centres (M, 2),
    radii (M,) in pixels, `opacity` in [0, 1], (M,) or (M, W, W) per pixel of the window; overlapping objects add up."""
    alpha, index = coverage(cls % len(KINDS), centres, radii)
    if opacity is not None:
        alpha = alpha * opacity.view(len(row), *opacity.shape[1:] or (1, 1))
    background = torch.tensor(BACKGROUND)
    tint = torch.tensor(PALETTE)[torch.div(cls, len(KINDS), rounding_mode="floor")] - background
    out = background[None, :, None].repeat(n, 1, SIZE * SIZE)
    flat = ((row[:, None] * 3 + torch.arange(3)) * (SIZE * SIZE))[:, :, None, None] + index[:, None]
    out.view(-1).index_add_(0, flat.reshape(-1), (tint[:, :, None, None] * alpha[:, None]).reshape(-1))
    return out.view(n, 3, SIZE, SIZE).clamp_(0.0, 1.0)


def render(batch: SceneBatch) -> Tensor:
    """Draw scenes: float32 (N, 3, 32, 32) in [0, 1]. Objects must not overlap (`lay_out` sees to it)."""
    row, slot = torch.nonzero(batch.tokens[:, :, 0] > 0, as_tuple=True)
    cls = batch.tokens[row, slot, 0] - 1
    return draw(batch.tokens.shape[0], row, cls, batch.centres[row, slot], batch.radii[row, slot])
