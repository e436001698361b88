"""Searches over TCP, with asyncio alone: a prompt a line goes in, and lines come out, which begin with its number.

    python examples/async_server.py 8000 200      # port (0: any), NFE a prompt
    two red circles                               # says a client, and hears of its prompt 0:
    0 progress 28 200                             #   NFE spent, of so many
    0 found 3.75                                  #   the reward of a better finished sample
    0 png 1981                                    #   so many bytes follow; or: 0 failed WHY

A client that goes away aborts what it asked for. At SIGTERM no more prompts are taken, and those that run are answered.
"""

import asyncio
import io
import itertools
import signal
import sys
from contextlib import aclosing, suppress

from PIL import Image

import flowfast
from flowfast.errors import FlowfastError


def line_of(event):
    match event:
        case flowfast.Progress():
            return b"progress %d %d\n" % (event.nfe, event.budget)
        case flowfast.Found():
            return b"found %g\n" % event.reward
        case flowfast.Finished():
            return b"png %d\n%b" % (len(data := png(event.sample.image)), data)
    return b"failed %b\n" % str(event.error).encode()


def png(image):
    """Of an image (3, H, W) in [0, 1]."""
    file = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "png")
    return file.getvalue()


async def answer(engine, number, prompt, budget, writer):
    with suppress(ConnectionError):  # the client is gone
        try:
            async with aclosing(engine.generate(prompt, method="svdd", budget=budget, seed=0)) as events:
                async for event in events:
                    writer.write(b"%d %b" % (number, line_of(event)))
                    await writer.drain()
        except FlowfastError as error:  # nothing was taken on
            writer.write(b"%d failed %b\n" % (number, str(error).encode()))
            await writer.drain()


async def serve(engine, port, budget, stop):
    """Answers until `stop` is set, and then what was asked before."""
    running = set()

    async def client(reader, writer):
        writer.transport.set_write_buffer_limits(0)  # `drain` returns when all is sent
        own = set()
        with suppress(ConnectionError, ValueError, asyncio.CancelledError):  # gone, a line without end, or our own end
            for number in itertools.count():
                if not (line := await reader.readline()):
                    break
                prompt = line.decode(errors="replace").strip()
                task = asyncio.create_task(answer(engine, number, prompt, budget, writer))
                for tasks in (own, running):
                    tasks.add(task)
                    task.add_done_callback(tasks.discard)
        for task in own:
            task.cancel()
        writer.close()

    server = await asyncio.start_server(client, "127.0.0.1", port)
    print(f"listening on port {server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()
    await engine.drain(seconds=30)
    if running:
        await asyncio.wait(running, timeout=5)


async def main(port, budget):
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with flowfast.AsyncEngine("scenes", reward="scenes", slots=8, micro_batch=8, max_waiting=64) as engine:
        await serve(engine, port, budget, stop)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
