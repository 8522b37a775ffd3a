import copy
import inspect
import threading

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration

from pipelines.errors import BadInput
from pipelines.generic.run import build_call
from pipelines.generic.signatures import KINDS, read_signature
from pipelines.loading import check_loadable
from pipelines.running import Run
from server.prompts import ROOM_TYPES, STYLES, Prompts

VISIBLE = 1.0  # mean change of a colour value, of 255
PROMPT = "Furnish this empty room as a modern living room."
CLASSES = [
    "StableDiffusionInstructPix2PixPipeline",
    "LongCatImageEditPipeline",
    "DreamLitePipeline",
    "Flux2KleinPipeline",
    "FluxKontextPipeline",
    "QwenImageEditPlusPipeline",
    "JoyImageEditPipeline",
    "BriaFibo2Pipeline",
    "ZImageOmniPipeline",
    "GlmImagePipeline",
    "StableDiffusion3Img2ImgPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
]
# One step without guidance: the class brings every photo to a million pixels, which takes a second a step.
QUICK = {"num_inference_steps": 1, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pix2pix(load_twin):
    """Give the twin of InstructPix2Pix, whose class calls back and cannot be told a size."""
    return load_twin("pix2pix")


@pytest.fixture(scope="module")
def longcat(load_twin):
    """Give the twin of LongCat-Image-Edit, whose class does not call back."""
    return load_twin("longcat")


@pytest.fixture(scope="module")
def klein(load_twin):
    """Give the twin of FLUX.2 [klein] through this family: its class can be told a size, and takes several photos."""
    return load_twin("generic_klein")


@pytest.fixture(scope="module")
def plain_call(weights_dir):
    """Give a function that calls a pipeline which diffusers itself has loaded, as its documentation does."""
    loaded = {}

    def call(twin, image, seed=1, **kwargs):
        spec = twin.model.spec
        if spec.id not in loaded:
            loaded[spec.id] = getattr(diffusers, spec.pipeline).from_pretrained(spec.weights_dir, dtype=torch.float32)
            loaded[spec.id].set_progress_bar_config(disable=True)
        kwargs = {"prompt": PROMPT, "generator": torch.Generator("cpu").manual_seed(seed)} | kwargs
        return np.asarray(copy.copy(loaded[spec.id])(image=image, **kwargs).images[0]).astype(int)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield call
    torch.set_num_threads(num_threads)


def change(first, second):
    return np.abs(first - second).mean()


@pytest.mark.parametrize("pipeline", CLASSES)
def test_source_tells_what_the_class_itself_tells(pipeline):
    """Names, defaults and plain types that were read from the source are those of the class when it is loaded."""
    read = read_signature(pipeline)
    assert read is not None
    actual = dict(inspect.signature(getattr(diffusers, pipeline).__call__).parameters)
    del actual["self"]
    actual = {name: value for name, value in actual.items() if value.kind is not value.VAR_KEYWORD}
    assert list(read.arguments) == list(actual)
    for name, argument in read.arguments.items():
        assert argument.is_required == (actual[name].default is inspect.Parameter.empty)
        if argument.kind is not None:
            assert argument.default == actual[name].default
            assert argument.kind in KINDS.values()
            assert argument.kind.__name__ in str(actual[name].annotation)


@pytest.mark.parametrize("name", ["pix2pix", "longcat", "generic_klein"])
def test_twin_can_be_loaded(load_twin, name):
    """Parts that are not there, such as the checker of InstructPix2Pix, are missed by no check."""
    check_loadable(load_twin(name).model.spec)


def test_runs_are_the_calls_of_pix2pix(pix2pix, plain_call):
    """Whatever is asked for, a run, alone or beside others, makes the picture of the class's own call, to the bit."""

    @settings(max_examples=8, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.data())
    def compare(data):
        wanted = []
        for _ in range(data.draw(st.integers(1, 3))):
            seed, steps = data.draw(st.integers(0, 2**53 - 1)), data.draw(st.integers(1, 5))
            asked = {"num_inference_steps": steps, "prompt": data.draw(st.sampled_from([PROMPT, "", "客厅 🛋️ {}"]))}
            asked |= data.draw(st.sampled_from([{}, {"negative_prompt": "dark", "guidance_scale": 3.0}]))
            asked |= data.draw(st.sampled_from([{}, {"image_guidance_scale": 2.5}, {"eta": 1.0}]))
            pixels = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
            height, width = data.draw(st.integers(20, 300)), data.draw(st.integers(20, 300))
            photo = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
            wanted.append((photo, asked, seed))
        runs, expected = [], []
        for photo, asked, seed in wanted:
            runs.append(pix2pix.start([photo], seed=seed, **asked))
            params = pix2pix.request([photo]).params
            scaled = photo.resize((params["width"], params["height"]), Image.Resampling.LANCZOS)
            expected.append(plain_call(pix2pix, scaled, seed, **asked))
        doomed = pix2pix.start([wanted[0][0]], seed=2, num_inference_steps=4)
        doomed.advance()
        waiting = list(runs)
        while waiting:
            run = waiting[data.draw(st.integers(0, len(waiting) - 1))]
            if not run.advance():
                waiting.remove(run)
        doomed.close()
        for run, (_, asked, _), pixels in zip(runs, wanted, expected, strict=True):
            assert (run.step, run.total_steps) == (asked["num_inference_steps"],) * 2
            assert np.array_equal(pix2pix.pixels(run), pixels)

    compare()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("prompt", {"prompt": "Furnish this empty room as an industrial office."}),
        ("seed", {"seed": 2}),
        ("steps", {"num_inference_steps": 5}),
        ("guidance", {"guidance_scale": 3.0}),
        ("guidance by the photo", {"image_guidance_scale": 3.0}),
        ("noise at each step", {"eta": 1.0}),
        ("negative prompt", {"negative_prompt": "dark green clutter everywhere"}),
    ],
)
def test_inputs_of_pix2pix_change_the_picture(pix2pix, photos, name, changes):
    """Prompt, seed, steps and all that the entry allows reach the class, and the picture looks different."""
    assert change(pix2pix.run(photos[:1]), pix2pix.run(photos[:1], **changes)) > VISIBLE, name


def test_another_photo_changes_the_picture(pix2pix, photos):
    """The photo is read."""
    size = {"height": 128, "width": 128}
    first, second = photos[2], photos[2].rotate(90)
    assert change(pix2pix.run([first], **size), pix2pix.run([second], **size)) > VISIBLE


def test_output_has_the_size_that_the_record_says(pix2pix, photos):
    """Where a class makes what it is given, the photo is given at the size of the output."""
    assert pix2pix.run(photos[:1]).shape[:2] == (112, 144)
    assert pix2pix.run(photos[:1], height=96, width=128).shape[:2] == (96, 128)


def test_photo_is_not_stretched(pix2pix, photos):
    """A size of another shape than the photo's is refused, at submission and again where the photo is decoded."""
    with pytest.raises(BadInput, match="has the shape of the photo, and 128 x 128 is not that of 640 x 480"):
        pix2pix.request(photos[:1], height=128, width=128)
    request = pix2pix.request(photos[2:], height=128, width=128)
    with pytest.raises(BadInput, match="is not that of 640 x 480"):
        pix2pix.model.start(photos[:1], request)


def test_run_of_a_class_without_a_callback_is_the_call_of_the_class(longcat, photos, plain_call):
    """The whole call is made in the first advance, to the bit, and all steps are counted at its end."""
    request = longcat.request(photos[:1], num_inference_steps=2, guidance_scale=1.0)
    run = longcat.model.start(photos[:1], request, num_threads=1)
    assert (run.step, run.total_steps) == (0, 2)
    assert not run.advance()
    assert (run.step, run.total_steps) == (2, 2)
    assert not [thread for thread in threading.enumerate() if thread.name == "pipeline-run"]
    params = request.params
    scaled = photos[0].resize((params["width"], params["height"]), Image.Resampling.LANCZOS)
    pipeline = longcat.model.pipeline
    prepared = build_call(pipeline, photos[:1], request).kwargs
    assert np.array_equal(np.asarray(prepared["image"]), np.asarray(scaled))
    # The loaded pipeline, since its text encoder is told where the patches are; that is compared below.
    pipeline = copy.copy(pipeline)
    pipeline.scheduler = copy.deepcopy(pipeline.scheduler)
    generator = torch.Generator("cpu").manual_seed(1)
    image = pipeline(scaled, PROMPT, num_inference_steps=2, guidance_scale=1.0, generator=generator).images[0]
    assert np.array_equal(longcat.pixels(run), np.asarray(image))
    with pytest.raises(RuntimeError, match="the run is over"):
        run.advance()


def test_inputs_of_longcat_change_the_picture(longcat, photos):
    """Prompt, photo, seed and guidance reach a class that takes no part in the usual tests of twins."""
    guided = {"num_inference_steps": 1, "guidance_scale": 4.5}
    first = longcat.run(photos[2:], **guided)
    assert change(first, longcat.run(photos[2:], **guided, prompt="Furnish it as an industrial office.")) > VISIBLE
    assert change(first, longcat.run([photos[2].rotate(90)], **guided)) > VISIBLE
    assert change(first, longcat.run(photos[2:], **guided, negative_prompt="dark red")) > VISIBLE
    assert change(first, longcat.run(photos[2:], **QUICK)) > VISIBLE / 4
    assert change(first, longcat.run(photos[2:], **guided, seed=2)) > VISIBLE


def test_text_encoder_of_longcat_is_told_where_the_patches_are(longcat, photos):
    """What it makes of prompt and photo is, to the bit, what Qwen2.5-VL makes of them when nothing is left out."""
    pipeline, seen = longcat.model.pipeline, []
    handle = pipeline.text_encoder.register_forward_pre_hook(
        lambda _, __, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        states = pipeline.encode_prompt(PROMPT, photos[0])[0][0]
    handle.remove()
    folder = longcat.model.spec.weights_dir / "text_encoder"
    bare = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = dict(seen[0])
    given = inputs.pop("mm_token_type_ids", None)
    is_patch = (inputs["input_ids"] == pipeline.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    assert given is not None
    assert is_patch.sum() > 100
    assert torch.equal(given, is_patch)
    with torch.no_grad():
        expected = bare(**inputs, mm_token_type_ids=is_patch).hidden_states[-1][0]
        without = bare(**inputs).hidden_states[-1][0]
    start = inputs["input_ids"][0].tolist().index(pipeline.tokenizer.convert_tokens_to_ids("<|vision_start|>"))
    expected, without = expected[start : start + len(states)], without[start : start + len(states)]
    assert torch.equal(states, expected)
    assert not torch.allclose(states, without, atol=0.1)


def test_closed_run_of_a_class_without_a_callback_gives_no_picture(longcat, photos, monkeypatch):
    """A lane that is interrupted while such a call is made waits for its end, and gets nothing."""
    run = longcat.start(photos[:1], **QUICK)
    begun = threading.Event()
    monkeypatch.setattr(Run, "_callback", lambda _: begun.set() or {})
    run._thread = threading.Thread(target=run._run, name="pipeline-run", daemon=True)
    run._thread.start()
    assert begun.wait(100)
    run.close()
    assert (run.image, run.step) == (None, 0)


def test_failure_of_a_class_without_a_callback_comes_out_of_advance(longcat, photos, monkeypatch):
    """What such a class raises reaches the lane too, and the run is over."""

    def fail(*_args, **_kwargs):
        raise ValueError("a step went wrong")

    monkeypatch.setattr(type(longcat.model.pipeline), "encode_prompt", fail)
    run = longcat.start(photos[:1], **QUICK)
    with pytest.raises(ValueError, match="a step went wrong"):
        run.advance()
    assert (run.image, run.is_open) == (None, False)


def test_run_of_several_photos_with_a_size_is_the_call_of_the_class(klein, photos, plain_call):
    """A class that can be told a size gets it, and the photos, in their order, each at the model's area."""
    fitted = [photos[0].resize((144, 112), Image.Resampling.LANCZOS), photos[1].resize((112, 160), 1)]
    kwargs = {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 96, "width": 160}
    run = klein.start(photos[:2], **kwargs)
    assert run.advance()
    run.close()
    assert np.array_equal(klein.run(photos[:2], **kwargs), plain_call(klein, fitted, **kwargs))
    assert change(klein.run(photos[:2], **kwargs), klein.run(photos[1::-1], **kwargs)) > VISIBLE


def test_call_has_only_what_was_allowed(load_twin, photos):
    """Nothing but what each run gives, and the parameters of the request, reaches the class."""
    given = {
        name: set(build_call(twin.model.pipeline, photos[:1], twin.request(photos[:1], **changes)).kwargs)
        for name, changes in (("pix2pix", {"negative_prompt": "dark"}), ("longcat", {}), ("generic_klein", {}))
        for twin in [load_twin(name)]
    }
    always = {"image", "prompt", "generator", "output_type", "num_inference_steps", "guidance_scale"}
    assert given == {
        "pix2pix": always | {"image_guidance_scale", "negative_prompt", "eta"},
        "longcat": always,
        "generic_klein": always | {"height", "width"},
    }


def test_too_many_photos_are_refused(klein):
    """More than ten are no job of this family."""
    photo = Image.new("RGB", (128, 128))
    with pytest.raises(BadInput, match="1 to 10 photos, not 11"):
        klein.start([photo] * 11)


def test_negative_prompt_is_refused_where_the_class_has_none(klein, photos):
    """It would be lost without a word."""
    with pytest.raises(BadInput, match="takes no negative prompt"):
        klein.start(photos[:1], negative_prompt="dark")


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_prompts_that_the_class_cannot_read_are_refused(longcat, photos, name):
    """A control token, or more tokens than the class says that it reads, are told before anything is computed."""
    with pytest.raises(BadInput, match="control tokens"):
        longcat.start(photos[:1], **{name: "A sofa <|image_pad|> here"})
    with pytest.raises(BadInput, match=r"has 600 tokens; this model reads at most 512"):
        longcat.start(photos[:1], **{name: " lamp" * 600})


def test_exclamation_marks_are_no_control_tokens(pix2pix, photos):
    """One of Stable Diffusion's tokenizers pads with a mark that prompts may hold."""
    pix2pix.start(photos[:1], prompt="Keep it bright!").close()
    tokenizer = copy.deepcopy(pix2pix.model.pipeline.tokenizer)
    tokenizer.pad_token = "!"  # noqa: S105 - not that kind of token
    pipeline = copy.copy(pix2pix.model.pipeline)
    pipeline.tokenizer = tokenizer
    build_call(pipeline, photos[:1], pix2pix.request(photos[:1], prompt="Keep it bright!"))


def test_presets_fit(longcat, photos, request):
    """Every room type and style can be asked of a class that fails on long prompts."""
    prompts = Prompts.load(request.config.rootpath / "config")
    for room_type in ROOM_TYPES:
        for style in STYLES:
            longcat.start(photos[:1], prompt=prompts.render(room_type, style)).close()
