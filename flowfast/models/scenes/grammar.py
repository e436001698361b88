"""The grammar of prompts: one parser for Python and, as it uses nothing but string methods, for TorchScript.

A prompt lists 1-3 phrases '<count> <colour> <kind>'; two single objects may be related. What model and reward read are
tokens, one per object, not one per phrase, so that the conditioning states the count as so many slots. A slot is
(class, count of its phrase, index within its phrase, role in the relation); slots carry no position, so the order of
the phrases cannot matter. The empty prompt is all zeros: the null condition of classifier-free guidance.

TorchScript knows the white space and the capitals of ASCII only.
"""

import torch
from torch import Tensor, nn

from flowfast.errors import PromptError

KINDS = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "above")
REVERSED = ("right of", "below")
COUNT_WORDS = ("one", "two", "three", "four", "five")
MAX_OBJECTS = 5
MAX_PHRASES = 3
NUM_TOKENS = MAX_OBJECTS  # L
NUM_FEATURES = 4  # F: class 0..16, count 0..5, index 0..5, role 0..4 (0 = none everywhere)
USAGE = (
    f"write 1-{MAX_PHRASES} phrases '<count> <colour> <kind>' joined by 'and', counts one..five, colours "
    f"{', '.join(COLOURS)}, kinds {', '.join(KINDS)}, {MAX_OBJECTS} objects at most; two single objects may be related "
    "by 'left of', 'right of', 'above' or 'below': 'a red circle left of a green triangle and two blue squares'"
)


class Grammar(nn.Module):
    """Prompts to conditions. It is a module, and what it knows are attributes, because TorchScript sees no globals."""

    def __init__(self) -> None:
        super().__init__()
        self.usage, self.most_objects, self.most_phrases = USAGE, MAX_OBJECTS, MAX_PHRASES
        self.features = NUM_FEATURES
        self.counts = {"a": 1, "an": 1}
        for number, word in enumerate(COUNT_WORDS, 1):
            self.counts |= {word: number, str(number): number}
        self.colours = list(COLOURS)
        self.kinds = {kind: i for i, kind in enumerate(KINDS)}
        self.kinds |= {kind + ("es" if kind == "cross" else "s"): i for i, kind in enumerate(KINDS)}
        self.relations = [*RELATIONS, *REVERSED]

    def forward(self, prompts: list[str]) -> dict[str, Tensor]:
        """`{"tokens": int64 (N, 5, 4)}` for N prompts; "" encodes to the null condition. Raises PromptError."""
        if not torch.jit.is_scripting():
            self.check_types(prompts)
        flat: list[int] = []
        for prompt in prompts:
            phrases, relation = self.parse(prompt)
            for slot in self.tokens(phrases, relation):
                flat += slot
        tokens = torch.tensor(flat, dtype=torch.int64, device=torch.device("cpu"))
        return {"tokens": tokens.view(len(prompts), self.most_objects, self.features)}

    @torch.jit.unused
    def check_types(self, prompts: list[str]) -> None:
        if isinstance(prompts, str):
            raise PromptError("expected a list of prompts, got one str; pass [prompt]")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise PromptError(f"expected a prompt of type str, got {type(prompt).__name__}; {USAGE}")

    def parse(self, prompt: str) -> tuple[list[list[int]], list[int]]:
        """Phrases [count, colour, kind], and the relation [name, subject, target] where there is one."""
        phrases: list[list[int]] = []
        relation: list[int] = []
        text = " ".join(prompt.lower().strip().rstrip(".").replace(",", " , ").split())
        if text == "":
            return phrases, relation
        for clause in text.replace(" , and ", " , ").replace(" and ", " , ").split(" , "):
            found, left, right = -1, clause, ""
            for i, name in enumerate(self.relations):
                sides = (" " + clause + " ").split(" " + name + " ")
                if len(sides) > 2 or (len(sides) == 2 and (found >= 0 or len(relation) > 0)):
                    raise PromptError(self.refusal(prompt, "expected one relation at most"))
                if len(sides) == 2:
                    found, left, right = i, sides[0], sides[1]
            if found < 0:
                phrases.append(self.phrase(prompt, clause))
                continue
            for filler in (" the", " to", " is"):
                if left.endswith(filler):
                    left = left[: len(left) - len(filler)]
            first, second = self.phrase(prompt, left), self.phrase(prompt, right)
            if first[0] != 1 or second[0] != 1:
                raise PromptError(self.refusal(prompt, "'" + self.relations[found] + "' relates single objects only"))
            subject, forward = len(phrases), found < len(self.relations) // 2
            relation = [found, subject, subject + 1] if forward else [found - 2, subject + 1, subject]
            phrases += [first, second]
        self.check(prompt, phrases)
        return phrases, relation

    def phrase(self, prompt: str, text: str) -> list[int]:
        """[count, colour, kind] of '<count> <colour> <kind>'."""
        words = text.split()
        if len(words) == 2:  # "red circle" reads as one
            words = ["a"] + words
        if len(words) != 3:
            text = " ".join(words)
            raise PromptError(self.refusal(prompt, "expected '<count> <colour> <kind>', got '" + text + "'"))
        if words[0] not in self.counts:
            raise PromptError(self.refusal(prompt, "unknown count '" + words[0] + "'"))
        if words[1] not in self.colours:
            raise PromptError(self.refusal(prompt, "unknown colour '" + words[1] + "'"))
        if words[2] not in self.kinds:
            raise PromptError(self.refusal(prompt, "unknown kind '" + words[2] + "'"))
        return [self.counts[words[0]], self.colours.index(words[1]), self.kinds[words[2]]]

    def check(self, prompt: str, phrases: list[list[int]]) -> None:
        """Raises PromptError where phrases do not go together."""
        count, objects = len(phrases), 0
        if count > self.most_phrases:
            raise PromptError(
                self.refusal(prompt, "expected " + str(self.most_phrases) + " phrases at most, got " + str(count))
            )
        for i, phrase in enumerate(phrases):
            objects += phrase[0]
            for other in phrases[:i]:
                if other[1:] == phrase[1:]:
                    raise PromptError(self.refusal(prompt, "the same colour and kind is named twice"))
        if objects > self.most_objects:
            raise PromptError(
                self.refusal(prompt, "expected " + str(self.most_objects) + " objects at most, got " + str(objects))
            )

    def refusal(self, prompt: str, what: str) -> str:
        return "prompt '" + " ".join(prompt.split()) + "': " + what + "; " + self.usage

    def tokens(self, phrases: list[list[int]], relation: list[int]) -> list[list[int]]:
        """Slots (5, 4) of a scene."""
        slots: list[list[int]] = []
        for i, phrase in enumerate(phrases):
            role = 0
            if len(relation) > 0 and (i == relation[1] or i == relation[2]):
                role = 1 + 2 * relation[0] + int(i == relation[2])
            for index in range(phrase[0]):
                slots.append([1 + phrase[1] * 4 + phrase[2], phrase[0], 1 + index, role])
        while len(slots) < self.most_objects:
            slots.append([0] * self.features)
        return slots
