"""What the tests of LoRAs share: the tiny LoRAs under short ids, and short ways to a picture."""

from dataclasses import replace

import numpy as np

from pipelines.running import LoraChoice
from pipelines.tiny import loras as tiny_loras
from pipelines.weights import LoraSpec

LOG_3 = 1.0986122886681098
LIGHTNING_SCHEDULER = {"base_shift": LOG_3, "max_shift": LOG_3, "shift_terminal": None}
FILES = {
    "qwen": {"light.4": "tiny-qwen-lightning", "style": "tiny-qwen-style"},
    "kontext": {"style": "tiny-kontext-style"},
}
STYLE = (LoraChoice("style", 1.0),)
LIGHTNING = (LoraChoice("light.4", 1.0),)


def lora_specs(weights_dir, name):
    folder = weights_dir / tiny_loras.FOLDER
    return tuple(
        LoraSpec(lora_id, folder / f"{file}.safetensors", LIGHTNING_SCHEDULER if "light" in file else {})
        for lora_id, file in FILES[name].items()
    )


def start(twin, photos, loras=(), **changes):
    return twin.model.start(photos, replace(twin.request(photos, **changes), loras=loras), num_threads=1)


def finish(run):
    while run.advance():
        pass
    return np.asarray(run.image)


def paint(twin, photos, loras=(), **changes):
    return finish(start(twin, photos, loras, **changes))
