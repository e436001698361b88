"""`flowfast reward-server`."""

from __future__ import annotations

from typing import Annotated

import typer

from flowfast.errors import OptionError

CLUSTER = "On a Ray cluster"


def command(
    reward: Annotated[str, typer.Option(help="See `flowfast rewards`.")] = "scenes",
    host: Annotated[
        str, typer.Option(help="Address to listen on; where FLOWFAST_REWARD_KEY is set, clients need that key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Start it as an actor, for --reward ray:NAME; it stays.", rich_help_panel=CLUSTER
        ),
    ] = None,
    address: Annotated[str, typer.Option(help="auto or HOST:PORT of the cluster.", rich_help_panel=CLUSTER)] = "auto",
    gpus: Annotated[
        float, typer.Option(min=0, max=1024, help="Its GPUs, or a fraction of one.", rich_help_panel=CLUSTER)
    ] = 0,
    stop: Annotated[bool, typer.Option("--stop", help="End the actor of that name.", rich_help_panel=CLUSTER)] = False,
) -> None:
    """Serve a reward over HTTP, for `--reward http:URL` of searches on other machines, or as an actor of a cluster."""
    if ray is not None:
        return on_ray(ray, reward, address, gpus, stop)
    if stop or gpus or address != "auto":
        raise OptionError("--stop, --gpus and --address are for an actor: say --ray NAME too")
    from flowfast.rewards.server import serve

    serve(reward, host, port)


def on_ray(name: str, reward: str, address: str, gpus: float, stop: bool) -> None:
    from flowfast.ray.cluster import LOCAL, connected
    from flowfast.ray.rewards import start_reward, stop_reward

    if address == LOCAL:
        raise OptionError("a local cluster ends with this command: start one (ray start --head), and say auto")
    with connected(address):
        if stop:
            stop_reward(name)
            print(f"reward actor {name} has ended")
        else:
            about = start_reward(name, reward, gpus=gpus)
            print(f"reward {about['name']} at ray:{name}; flowfast reward-server --ray {name} --stop ends it")
