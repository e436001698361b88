"""A searcher whose rows have all that `flowfast generate` writes to a folder."""

from __future__ import annotations

import json
import logging
import uuid
from typing import Any

from flowfast import api
from flowfast.calibration.auto import as_picked, recorded, settled_config
from flowfast.config import EngineConfig, SearchConfig, make
from flowfast.engine.checkpoint import packed_sample
from flowfast.engine.request import Event, Finished, Progress
from flowfast.engine.standing import standing_of
from flowfast.files import plain
from flowfast.models.heldout import heldout
from flowfast.prompts import prompt_of
from flowfast.ray.searcher import Searcher, sorted_options
from flowfast.report.pictures import search_picture
from flowfast.resolve import resolve
from flowfast.types import Candidate

log = logging.getLogger("flowfast.ray")


class RecordingSearcher(Searcher):
    """Columns in: `prompt`, and `entry`, JSON of the prompt with its fields. Columns out: `sample` (safetensors),
    `candidates` (JSON), `picture` (search.png, empty where it could not be drawn), `config` (JSON, with which a search
    for this prompt alone finds the same), `batch` (JSON: what the batch cost, by its id), `error`.

    Args:
        config: of the whole call. threads, folder, secrets: as `Searcher` takes them.
    """

    added = ("sample", "candidates", "picture", "config", "batch", "error")

    def __init__(self, config: dict[str, Any], **own: Any):
        self.config = make(SearchConfig, config)
        params = as_picked(self.config).model_dump()
        options = {name: getattr(self.config, name) for name in EngineConfig.model_fields}
        engine, params = sorted_options({**options, **params})
        engine["max_budget"] = self.config.budget
        super().__init__(self.config.model, self.config.reward, **own, **engine, **params)
        self.candidates: dict[str, list[Candidate]] = {}
        self.configs: dict[str, SearchConfig] = {}

    def search(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.candidates.clear()
        before, seconds = standing_of(self.engine), self.engine.loaded.clock.read()
        found = super().search(rows)
        after = standing_of(self.engine)
        batch = {
            "id": uuid.uuid4().hex,
            "rows_padded": after.rows - before.rows - after.rows_used + before.rows_used,
            "nan_rewards": after.nan_rewards - before.nan_rewards,
            "seconds": {name: spent - seconds[name] for name, spent in self.engine.loaded.clock.read().items()},
        }
        return [{**row, "batch": json.dumps(batch)} for row in found]

    def request(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        return prompt_of(json.loads(row["entry"]), "this row"), {**self.params, "candidates": True}

    def heard(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.candidates.setdefault(event.id, []).extend(event.candidates)

    def columns(self, row: dict[str, Any], end: Finished | str) -> dict[str, Any]:
        if isinstance(end, str):
            return {"sample": b"", "candidates": "[]", "picture": b"", "config": "{}", "error": end}
        seen = [candidate._replace(prompt=0) for candidate in self.candidates[end.id]]
        config = self.recorded(end)
        return {
            "sample": packed_sample(end.sample),
            "candidates": json.dumps(plain(seen)),
            "picture": self.picture(end, seen, config),
            "config": json.dumps(plain(config.model_dump())),
            "error": None,
        }

    def recorded(self, end: Finished) -> SearchConfig:
        """The configuration of a search as `flowfast.search` records it."""
        happened = end.rerun.model_dump_json() + f" {end.micro_batch}"
        if happened not in self.configs:
            flow, reward = self.engine.loaded.original, self.engine.loaded.reward(self.engine.first_reward)
            picked = end.rerun.picked or self.config.picked
            whole = settled_config(flow, reward, self.config.model_copy(update={"picked": picked}))
            whole = whole.with_params(resolve(flow, whole.params).params)
            update = {"micro_batch": end.micro_batch, "splits": end.rerun.splits, "cuts": end.rerun.cuts}
            self.configs[happened] = recorded(whole.model_copy(update=update))
        return self.configs[happened]

    def picture(self, end: Finished, seen: list[Candidate], config: SearchConfig) -> bytes:
        """search.png: it walks the winner's path through the model again."""
        sample = end.sample
        try:
            reward = self.engine.loaded.reward(self.engine.first_reward)
            steps = api.replay(self.engine.loaded.original, sample, config, reward=reward)
            score = heldout(config.model, [sample.image], [sample.prompt])
            return search_picture(sample, steps, seen, score[0] if score else None)
        except Exception as error:  # a picture takes no result with it
            log.warning("the search of %r cannot be drawn: %s", sample.prompt, error)
            return b""
