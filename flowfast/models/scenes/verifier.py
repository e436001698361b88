"""The given verifier: what search optimises. A small ensemble of convolutional counters that knows the time.

reward = sum over the 16 classes of log p(count = asked) + log p(every object well formed) + log p(relation holds),
averaged over the members. An image is the posterior mean at linear time t; the members were trained on the model's own
posterior means, so at larger t the probabilities are those of what the trajectory will *become*.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowfast.models.scenes.data import BACKGROUND, MAX_OBJECTS, NUM_CLASSES
from flowfast.models.scenes.grammar import Grammar

FLOOR = -12.0  # of each log-probability: one surely wrong class must not hide all others


class Counter(nn.Module):
    """One member: log-probabilities of counts, of being well formed and, for a pair of classes, of the relation."""

    axis: Tensor
    rates: Tensor

    def __init__(self, channels: int = 24, width: int = 56, features: int = 128) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2 * (channels + width)))
        self.conv1 = nn.Conv2d(12, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, width, 3, stride=2, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.cells = nn.Conv2d(width, features, 1)
        self.where = nn.Conv2d(width, NUM_CLASSES, 1)
        self.head = nn.Sequential(nn.Linear(features, features), nn.ReLU())
        self.count = nn.Linear(features, NUM_CLASSES * (MAX_OBJECTS + 2))  # the last count is "more"
        self.formed = nn.Linear(features, 1)
        self.relation = nn.Sequential(nn.Linear(9, 16), nn.ReLU(), nn.Linear(16, 1))
        self.channels, self.width, self.bins = channels, width, MAX_OBJECTS + 2
        self.register_buffer("axis", torch.linspace(-1.0, 1.0, 8), persistent=False)
        self.register_buffer("rates", torch.tensor([1.0, 2.0, 4.0, 8.0]) * 1.5, persistent=False)

    def forward(self, x: Tensor, t: Tensor, pair: Tensor, vertical: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits for x (N, 12, 16, 16), t (N,), pair int64 (N, 2) of classes 0..15, vertical float (N,) 0 or 1.

        Returns counts (N, 16, 7), well formed (N,), relation (N,).
        """
        n = x.shape[0]
        angle = t.view(n, 1) * self.rates
        time = torch.cat((angle.cos(), angle.sin()), 1)
        m = self.time(time).view(n, -1, 1, 1)
        c, w = self.channels, self.width
        h = torch.relu(torch.addcmul(m[:, c : 2 * c], self.conv1(x), 1.0 + m[:, :c]))
        h = torch.relu(torch.addcmul(m[:, 2 * c + w :], self.conv2(h), 1.0 + m[:, 2 * c : 2 * c + w]))
        h = h + torch.relu(self.conv3(h))
        pooled = self.head(torch.relu(self.cells(h)).sum((2, 3)) * 0.1)
        heat = torch.softmax(self.where(h).flatten(2), 2).view(n, -1, 8, 8)
        chosen = torch.gather(heat, 1, pair.view(n, 2, 1, 1).expand(n, 2, 8, 8))
        across = (chosen.sum(2) * self.axis).sum(2)  # (N, 2) expected column, then row, in [-1, 1]
        down = (chosen.sum(3) * self.axis).sum(2)
        side = vertical.view(n, 1)
        place = across * (1.0 - side) + down * side
        distance = place[:, 1:2] - place[:, 0:1]
        relation = self.relation(torch.cat((4.0 * distance, time), 1))
        return self.count(pooled).view(n, -1, self.bins), self.formed(pooled).view(n), relation.view(n)


class SceneReward(nn.Module):
    """The ensemble as a reward: forward(images, t, cond) -> (N,), higher is better, at most 0."""

    background: Tensor

    name = "scenes"
    range = (float("-inf"), 0.0)
    differentiable = True

    def __init__(self, members: int = 2) -> None:
        super().__init__()
        self.members = nn.ModuleList(Counter() for _ in range(members))
        self.floor, self.classes = FLOOR, NUM_CLASSES
        self.grammar = Grammar()
        self.register_buffer("background", torch.tensor(BACKGROUND).view(1, 3, 1, 1), persistent=False)

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """`Grammar`: what the reward knows of N prompts. Raises PromptError."""
        return self.grammar(prompts)

    @torch.jit.export
    def logits(self, images: Tensor, t: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Members' logits: counts (E, N, 16, 7), well formed (E, N), relation (E, N); see `Counter.forward`."""
        x = F.pixel_unshuffle((images - self.background) * 2.0, 2)
        roles = tokens[:, :, 3]
        classes = (tokens[:, :, 0] - 1).clamp(min=0)
        subject = (classes * (roles % 2)).sum(1)
        target = (classes * ((roles > 0) & (roles % 2 == 0)).long()).sum(1)
        vertical = (roles > 2).any(1).to(images.dtype)
        pair = torch.stack((subject, target), 1)
        counts: list[Tensor] = []
        formed: list[Tensor] = []
        relation: list[Tensor] = []
        for member in self.members:
            a, b, c = member(x, t, pair, vertical)
            counts.append(a)
            formed.append(b)
            relation.append(c)
        return torch.stack(counts), torch.stack(formed), torch.stack(relation)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Rewards (N,) float32 of images (N, 3, 32, 32) in [0, 1] at linear times t (N,), cond {"tokens": (N, 5, 4)}.

        For finished images t is 0.
        """
        tokens = cond["tokens"]
        counts, formed, relation = self.logits(images, t, tokens)
        asked = F.one_hot(tokens[:, :, 0], self.classes + 1).sum(1)[:, 1:]
        index = asked.view(1, asked.shape[0], self.classes, 1).expand(counts.shape[0], -1, -1, -1)
        log_count = torch.log_softmax(counts, 3).gather(3, index).squeeze(3).clamp(min=self.floor).sum(2)
        log_relation = F.logsigmoid(relation).clamp(min=self.floor) * (tokens[:, :, 3] > 0).any(1).to(relation.dtype)
        return (log_count + F.logsigmoid(formed).clamp(min=self.floor) + log_relation).mean(0)
