"""`flowfast reward-server`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(
    reward: Annotated[str, typer.Option(help="See `flowfast rewards`.")] = "scenes",
    host: Annotated[
        str, typer.Option(help="Address to listen on; where FLOWFAST_REWARD_KEY is set, clients need that key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
) -> None:
    """Serve a reward over HTTP, for `--reward http:URL` of searches on other machines."""
    from flowfast.rewards.server import serve

    serve(reward, host, port)
