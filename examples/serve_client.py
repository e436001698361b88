"""Draws with OpenAI's client on `flowfast serve`, and shows partial images as they come (pip install openai).

    flowfast serve --model scenes
    python examples/serve_client.py "two red circles" http://127.0.0.1:8000/v1

Writes partial-0.png, partial-1.png, partial-2.png and best.png.
"""

import base64
import os
import sys
from pathlib import Path

import openai


def main(prompt, url):
    client = openai.OpenAI(base_url=url, api_key=os.environ.get("FLOWFAST_API_KEY", "none"))
    own = {"seed": 7}  # flowfast's own fields: method, budget, until, deadline_ms, ... (docs/serving.md)
    for event in client.images.generate(prompt=prompt, quality="medium", stream=True, partial_images=3, extra_body=own):
        facts = event.model_extra["flowfast"]
        if event.type == "image_generation.partial_image":
            name = f"partial-{event.partial_image_index}.png"
            print(f"{name} after {facts['nfe']} of {facts['budget']} NFE")
        else:
            name = "best.png"
            print(f"{name}: reward {facts['reward']:.2f}, {facts['nfe']} NFE in {facts['total_s']:.2f} s")
        Path(name).write_bytes(base64.b64decode(event.b64_json))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1")
