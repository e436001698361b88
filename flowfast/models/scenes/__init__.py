"""The embedded default: a small text-conditional flow model of 32 x 32 scenes, a given and a held-out verifier."""

from flowfast.models.scenes.data import encode_prompts, parse_prompt
from flowfast.models.scenes.model import SceneModel
from flowfast.models.scenes.prompts import hard_prompts
from flowfast.models.scenes.verifier import SceneReward
from flowfast.models.scenes.weights import load_scene_reward, load_scenes

__all__ = [
    "SceneModel",
    "SceneReward",
    "encode_prompts",
    "hard_prompts",
    "load_scene_reward",
    "load_scenes",
    "parse_prompt",
]
