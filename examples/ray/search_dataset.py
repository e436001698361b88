"""Prompts of a file through searchers on every GPU of a cluster, to Parquet; on a machine without a GPU on two CPUs.

    python examples/ray/search_dataset.py prompts.jsonl found/ --actors 2

Run it where the cluster is (`ray job submit`, or on a node after `ray start`); alone it starts one of this machine.
"""

from __future__ import annotations

import argparse

import ray
import ray.data

import flowfast.ray

parser = argparse.ArgumentParser()
parser.add_argument("prompts", help="JSON lines with a column prompt; seed, budget, ... of a row count for it")
parser.add_argument("out", help="folder, or an address such as s3://bucket/found")
parser.add_argument("--actors", type=int, default=2)
parser.add_argument("--model", default="scenes")
parser.add_argument("--reward", default="scenes")
parser.add_argument("--budget", type=int, default=200)
asked = parser.parse_args()

ray.init(ignore_reinit_error=True)
gpus = 1 if ray.cluster_resources().get("GPU") else 0
found = ray.data.read_json(asked.prompts).map_batches(
    flowfast.ray.Searcher,
    fn_constructor_kwargs=dict(
        model=asked.model, reward=asked.reward, method="auto", budget=asked.budget, micro_batch=8, images="png"
    ),
    batch_size=16,
    num_gpus=gpus,
    compute=ray.data.ActorPoolStrategy(size=asked.actors),
)
found.write_parquet(asked.out)
