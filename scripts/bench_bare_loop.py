"""Call a pipeline again and again in one process, with nothing around it: what the whole server is compared with.

Reads lines of JSON, `{"num_inference_steps": 9, "num_calls": 50}`, and answers each with the seconds that the calls
took, by the clock and of the processor. The photos that it is given are decoded once, before anything is measured, and
no result is encoded or kept.
"""

import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from PIL import Image

from pipelines.flux_kontext.run import build_call
from pipelines.loading import load_model
from pipelines.photos import decode_photo
from pipelines.running import RunRequest
from server.model_entry import ModelEntry
from server.registry import load_registry
from server.settings import load_settings
from server.worker.specs import model_specs

PROMPT = "A bright living room."


def main(model_id: str, files: list[str]) -> None:
    """Answer until standard input ends."""
    torch.set_num_threads(1)
    settings = load_settings()
    entry = load_registry(settings).get(model_id)
    model = load_model(model_specs(settings, load_registry(settings))[model_id], "cpu")
    photos = [decode_photo(Path(file).read_bytes(), max_pixels=10**8) for file in files]
    for line in sys.stdin:
        asked = json.loads(line)
        cpu_start, start = time.process_time(), time.perf_counter()
        _call(model.pipeline, entry, photos, **asked)
        times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        print(json.dumps(times), flush=True)


def _call(
    pipeline: object, entry: ModelEntry, photos: list[Image.Image], *, num_inference_steps: int, num_calls: int
) -> None:
    for number in range(num_calls):
        photo = photos[number % len(photos)]
        params = entry.resolve_params({"num_inference_steps": num_inference_steps})
        resolved = params.resolved(photo.height, photo.width, entry.area, number)
        call = build_call(pipeline, [photo], RunRequest(PROMPT, None, resolved, entry.area))
        pipeline(**call.kwargs)  # pyright: ignore[reportCallIssue]  # any pipeline


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
