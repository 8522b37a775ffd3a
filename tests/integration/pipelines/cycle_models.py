"""Load, run and unload each model that it is given, again and again, and say after each time what memory is held.

Run as a process of its own by test_lifecycle.py, since only a process that does nothing else can be measured. Writes
one line of JSON for each cycle: model, number of the cycle, bytes of resident memory, and what is alive:
layers, and bytes of tensors.
"""

import ctypes
import gc
import json
import os
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import psutil
import torch
from PIL import Image

from pipelines.loading import ModelSpec, load_model
from pipelines.running import LoraChoice, RunRequest
from server.model_entry import ModelEntry
from server.registry import load_registry
from server.settings import load_settings
from server.worker.specs import model_specs


def cycle(spec: ModelSpec, entry: ModelEntry, *, gives_up: bool) -> None:
    """Do once what a worker does with a model: load it, make a picture, with a LoRA if it has one, and unload it.

    Args:
        spec: the model.
        entry: the same.
        gives_up: whether another run is begun and never finished.
    """
    photo = Image.linear_gradient("L").convert("RGB").resize((160, 120))
    params = entry.resolve_params({"num_inference_steps": 2}).resolved(120, 160, spec.area, seed=1)
    loras = tuple(LoraChoice(lora.id, 1.0) for lora in spec.loras[:1])
    model = load_model(spec, "cpu")
    if gives_up:
        given_up = model.start([photo], RunRequest("A sofa.", None, params, spec.area, loras), num_threads=1)
        given_up.advance()
        given_up.close()
    run = model.start([photo], RunRequest("A sofa.", None, params, spec.area, loras), num_threads=1)
    while run.advance():
        pass
    model.close()


def main(num_cycles: int) -> None:
    """Cycle through all enabled models."""
    torch.set_num_threads(1)
    settings = load_settings()
    registry = load_registry(settings)
    specs = model_specs(settings, registry)
    # What the imports made stays: looking through it each time would take most of the time.
    gc.collect()
    gc.freeze()
    # Unloading a model looks at what a worker has set aside since, too; here nothing was.
    gc.unfreeze = lambda: None
    for model_id in registry.ids:
        for number in range(1, num_cycles + 1):
            cycle(specs[model_id], registry.get(model_id), gives_up=number % 5 == 0)
            gc.collect()
            # The allocator keeps what was freed in small pieces, and gives it back when asked.
            ctypes.CDLL(None).malloc_trim(0)
            alive = gc.get_objects()
            found = {
                "model": model_id,
                "cycle": number,
                "rss_bytes": psutil.Process().memory_info().rss,
                "num_layers": sum(isinstance(one, torch.nn.Module) for one in alive),
                "tensor_bytes": sum(one.nbytes for one in alive if isinstance(one, torch.Tensor)),
            }
            del alive
            print(json.dumps(found), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(int(sys.argv[1]))
