"""What only the decoded photo can decide: the size a job runs at, and the size its result is written at."""

from typing import Any

from PIL import Image

from server.jobs import Job, OutputSpec
from server.registry import ModelEntry


def final_params(entry: ModelEntry, job: Job, height: int, width: int) -> dict[str, Any]:
    """Return the parameters a job runs with.

    At submission only the first bytes of a photo were seen, and its EXIF orientation may stand further back. Where the
    recorded size was made from the photo's sides, and those turn out otherwise, it is made again.

    Args:
        entry: the job's model.
        job: its parameters are resolved: height, width and seed are numbers.
        height: of the first photo, upright, in pixels.
        width: likewise.

    Raises:
        BadInput: the photo is too narrow.
    """
    seen = job.inputs[0]
    if (height, width) == (seen.height, seen.width):
        return job.params
    open_size = {name: value for name, value in job.params.items() if name not in {"height", "width"}}
    params = entry.params_model.model_validate(open_size)
    recorded = (job.params["height"], job.params["width"])
    if recorded != params.output_size(seen.height, seen.width, entry.area):
        return job.params  # the request named a size
    return params.resolved(height, width, entry.area, job.params["seed"])


def output_size(image: Image.Image, spec: OutputSpec, photo: tuple[int, int]) -> tuple[int, int]:
    """Return the (height, width) at which a result is written, in pixels.

    Args:
        image: as the model made it.
        spec: `size` is `model`, or `input` for the photo's own.
        photo: height and width of the first photo, upright.
    """
    return photo if spec.size == "input" else (image.height, image.width)
