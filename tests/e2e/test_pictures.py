"""Twelve photos of every awkward kind through the whole stack: each pixel equals a direct call of the pipeline."""

import io
import random
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

FLUX = "tiny-flux-kontext"
QWEN = "tiny-qwen-image-edit-2511"
AREA = 128 * 128


def noise(height: int, width: int, seed: int) -> Image.Image:
    """Return a smooth RGB picture that has no two equal corners."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def sideways_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(noise(300, 400, 1), "JPEG", exif=exif.tobytes(), quality=92)


def sixteen_bit_png() -> bytes:
    ramp = np.linspace(0, 65535, 200 * 150).reshape(150, 200).astype(np.uint16)
    return saved(Image.fromarray(ramp), "PNG")


def alpha_png() -> bytes:
    image = noise(240, 320, 2)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return saved(image, "PNG")


PHOTOS: dict[str, bytes] = {
    "sideways.jpg": sideways_jpeg(),
    "alpha.png": alpha_png(),
    "sixteen-bit.png": sixteen_bit_png(),
    "cmyk.jpg": saved(noise(200, 260, 3).convert("CMYK"), "JPEG"),
    "palette.png": saved(noise(180, 220, 4).quantize(64), "PNG"),
    "web.webp": saved(noise(270, 330, 5), "WEBP", quality=85),
    "portrait.jpg": saved(noise(400, 250, 6), "JPEG"),
    "landscape.jpg": saved(noise(250, 500, 7), "JPEG"),
    "twelve-megapixels.jpg": saved(noise(3000, 4000, 8), "JPEG", quality=80),
    "narrow.png": saved(noise(65, 400, 9), "PNG"),
    "grey.jpg": saved(noise(200, 200, 10).convert("L"), "JPEG"),
    "progressive.jpg": saved(noise(320, 280, 11), "JPEG", progressive=True),
}

# Four of the twelve have settings of their own; the models alternate.
SETTINGS: dict[str, dict[str, Any]] = {
    "sideways.jpg": {"model": FLUX, "params": {"seed": 3, "guidance_scale": 6.0, "num_inference_steps": 3}},
    "cmyk.jpg": {
        "model": QWEN,
        "negative_prompt": "clutter",
        "params": {"true_cfg_scale": 2.5, "num_inference_steps": 5},
    },
    "portrait.jpg": {"model": QWEN, "prompt": "Put an oak table under the lamp.", "params": {"aspect_ratio": "3:4"}},
    "landscape.jpg": {
        "model": FLUX,
        "room_type": "kitchen",
        "style": "industrial",
        "params": {"height": 96, "width": 192},
    },
}


@pytest.fixture
def one_thread():
    """One torch thread on this side too: the number of threads changes the last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def direct(weights_dir, one_thread):
    """Give a function that calls the diffusers pipeline itself with what a job's record says."""
    from pipelines.photos import decode_photo, fit_area

    loaded: dict[str, Any] = {}

    def call(job: dict[str, Any], data: bytes) -> Image.Image:
        photo = decode_photo(data, max_pixels=60_000_000)
        assert (job["input"]["height"], job["input"]["width"]) == (photo.height, photo.width)
        if job["model"] not in loaded:
            loaded[job["model"]] = load(weights_dir / job["model"])
        pipe = loaded[job["model"]]
        return call_kontext(pipe, job, fit_area(photo, AREA)) if job["model"] == FLUX else call_qwen(pipe, job, photo)

    return call


def load(folder: Path) -> Any:
    from diffusers import FluxKontextPipeline, QwenImageEditPlusPipeline  # pyright: ignore[reportPrivateImportUsage]

    pipeline_class = FluxKontextPipeline if folder.name == FLUX else QwenImageEditPlusPipeline
    pipe: Any = pipeline_class.from_pretrained(folder, local_files_only=True, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if folder.name == QWEN:
        encoder = pipe.text_encoder

        def with_token_types(module, args, kwargs):
            if kwargs.get("image_grid_thw") is None:
                return args, kwargs
            marks = (kwargs["input_ids"] == encoder.config.image_token_id).int()
            return args, {**kwargs, "mm_token_type_ids": marks}

        encoder.register_forward_pre_hook(with_token_types, with_kwargs=True)
    return pipe


def seeded(job: dict[str, Any]) -> Any:
    import torch

    return torch.Generator("cpu").manual_seed(job["params"]["seed"])


def call_kontext(pipe: Any, job: dict[str, Any], photo: Image.Image) -> Image.Image:
    params = job["params"]
    return pipe(
        image=photo,
        prompt=job["prompt"],
        height=params["height"],
        width=params["width"],
        max_area=params["height"] * params["width"],
        _auto_resize=False,
        guidance_scale=params["guidance_scale"],
        num_inference_steps=params["num_inference_steps"],
        generator=seeded(job),
    ).images[0]


def call_qwen(pipe: Any, job: dict[str, Any], photo: Image.Image) -> Image.Image:
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as module

    params = job["params"]
    before = module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE
    module.VAE_IMAGE_SIZE = module.CONDITION_IMAGE_SIZE = AREA
    try:
        return pipe(
            image=[photo],
            prompt=job["prompt"],
            negative_prompt=job["negative_prompt"] or " ",
            true_cfg_scale=params["true_cfg_scale"],
            height=params["height"],
            width=params["width"],
            num_inference_steps=params["num_inference_steps"],
            generator=seeded(job),
        ).images[0]
    finally:
        module.VAE_IMAGE_SIZE, module.CONDITION_IMAGE_SIZE = before


def items(client: Any) -> list[dict[str, Any]]:
    upload_ids = client.upload(PHOTOS)
    models = (FLUX, QWEN)
    return [
        {"upload_id": upload_id, "name": name, "model": models[index % 2], **SETTINGS.get(name, {})}
        for index, (name, upload_id) in enumerate(zip(PHOTOS, upload_ids, strict=True))
    ]


def check_pixels(client: Any, jobs: list[dict[str, Any]], direct: Any) -> None:
    for job in jobs:
        data = client.output(job)
        ours = Image.open(io.BytesIO(data))
        # What the file says of itself takes the place of the job's record: it alone must make the same picture.
        expected = direct(job | said_of_itself(job, data), PHOTOS[job["name"]])
        assert ours.format == "PNG"
        assert ours.size == expected.size, job["name"]
        assert (np.asarray(ours) == np.asarray(expected)).all(), job["name"]


def said_of_itself(job: dict[str, Any], data: bytes) -> dict[str, Any]:
    """Return the record in a result's file, which must be the job's."""
    from pipelines.provenance import read_record

    record = read_record(data) or {}
    names = (
        "model",
        "model_version",
        "weights_sha256",
        "optimizations",
        "prompt",
        "negative_prompt",
        "params",
        "loras",
    )
    of_the_job = {"job_id": job["id"], "input_sha256": [job["input"]["sha256"]]}
    assert record == {name: job[name] for name in names} | of_the_job
    return record


def test_each_pixel_equals_a_direct_call(served, direct):
    """Twelve kinds of photo, both twins, four with own settings: PNG outputs equal the pipeline called directly."""
    client = served.client
    body = {"defaults": {"output": {"format": "png"}, "params": {"num_inference_steps": 4}}, "items": items(client)}

    batch = client.finished(client.submit(body)["id"])

    assert batch["counts"]["succeeded"] == 12, batch["jobs"]
    jobs = {job["name"]: job for job in batch["jobs"]}
    assert jobs["sideways.jpg"]["params"]["num_inference_steps"] == 3
    assert (jobs["sideways.jpg"]["input"]["height"], jobs["sideways.jpg"]["input"]["width"]) == (400, 300)
    assert (jobs["landscape.jpg"]["output"]["height"], jobs["landscape.jpg"]["output"]["width"]) == (96, 192)
    assert "table under the lamp" in jobs["portrait.jpg"]["prompt"]
    assert len({job["params"]["seed"] for job in batch["jobs"]}) == 12
    check_pixels(client, batch["jobs"], direct)


def test_pixels_stay_the_same_beside_cancelled_jobs(served, direct):
    """Jobs beside cancelled ones, in random order over both models, give the same pixels as direct calls."""
    client = served.client
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")  # noqa: T201
    chooser = random.Random(seed)
    kept = items(client)
    doomed = [
        {**item, "name": f"doomed-{index}", "params": {"num_inference_steps": 100}}
        for index, item in enumerate(kept[:4])
    ]
    shuffled = chooser.sample(kept + doomed, len(kept) + len(doomed))
    defaults = {"output": {"format": "png"}, "params": {"num_inference_steps": 4}}

    batch = client.submit({"defaults": defaults, "items": shuffled})
    ids = {job["name"]: job["id"] for job in batch["jobs"]}
    while pending := [name for name in ids if name.startswith("doomed")]:
        for name in pending:
            job = client.call("GET", f"/v1/jobs/{ids[name]}").json()
            # One while it waits, the others once they are on the device.
            if name == "doomed-0" or (job["progress"] or {}).get("step") or job["status"] not in ("queued", "running"):
                client.call("POST", f"/v1/jobs/{ids[name]}/cancel")
                del ids[name]
    batch = client.finished(batch["id"])

    statuses = {job["name"]: job["status"] for job in batch["jobs"]}
    assert all(status == "succeeded" for name, status in statuses.items() if not name.startswith("doomed")), statuses
    assert statuses["doomed-0"] == "cancelled"
    check_pixels(client, [job for job in batch["jobs"] if job["name"] in PHOTOS], direct)


SUFFIXES = {"webp": "webp", "png": "png", "jpeg": "jpg"}


def check_file(client: Any, job: dict[str, Any], asked: dict[str, Any]) -> bytes:
    """Compare a downloaded result with what was asked for."""
    response = httpx.get(job["output"]["url"], timeout=60)
    assert response.headers["content-type"] == job["output"]["content_type"] == f"image/{asked['format']}"
    suffix = SUFFIXES[asked["format"]]
    assert f'filename="{job["index"] + 1:03d}-hall.{suffix}"' in response.headers["content-disposition"]
    data = client.output(job)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == asked["format"].upper()
        expected = (300, 400) if asked["size"] == "input" else (job["params"]["width"], job["params"]["height"])
        assert image.size == (job["output"]["width"], job["output"]["height"]) == expected
        assert ("xmp" in image.info) == asked.get("metadata", True)
    if asked.get("metadata", True):
        said_of_itself(job, data)
    return data


def test_results_are_files_as_asked_for(served):
    """Each format, size and quality, with and without the record, is what a client downloads of a sideways photo."""
    client = served.client
    (photo,) = client.upload({"sideways.jpg": PHOTOS["sideways.jpg"]})
    asked = [{"format": name, "size": size} for name in SUFFIXES for size in ("model", "input")]
    asked += [{"format": name, "size": "input", "quality": 5, "metadata": False} for name in SUFFIXES]
    shared = {"model": FLUX, "params": {"seed": 5, "num_inference_steps": 2}, "output": {"quality": 95}}

    items = [{"upload_id": photo, "name": "hall.jpg", "output": output} for output in asked]
    batch = client.finished(client.submit({"defaults": shared, "items": items})["id"])

    assert batch["counts"]["succeeded"] == len(asked), batch["jobs"]
    lengths = {}
    for job, output in zip(batch["jobs"], asked, strict=True):
        data = check_file(client, job, output)
        lengths[output["format"], output["size"], "quality" in output] = len(data)
    for name in ("webp", "jpeg"):
        assert lengths[name, "input", True] * 2 < lengths[name, "input", False]
    assert lengths["png", "input", True] < lengths["png", "input", False] < lengths["png", "input", True] + 4000
