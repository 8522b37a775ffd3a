"""What Qwen's text encoder makes of prompt and photos, beside a call of Qwen2.5-VL that leaves nothing out."""

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

PROMPT = "Furnish this empty room as a modern living room."
# How each pipeline names the photos to the text encoder.
PLACES = {
    "qwen": "Picture {}: <|vision_start|><|image_pad|><|vision_end|>",
    "qwen_original": "<|vision_start|><|image_pad|><|vision_end|>",
}
SYSTEM_TOKENS = 64  # which the pipelines drop


@pytest.fixture
def bare_encoder(load_twin):
    """Give a function that loads a twin's text encoder as transformers does, without anything of ours."""

    def load(name):
        folder = load_twin(name).model.spec.weights_dir / "text_encoder"
        return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    return load


@pytest.fixture(params=[("qwen", 1), ("qwen", 3), ("qwen_original", 1)], ids=lambda param: f"{param[0]}-{param[1]}")
def case(request, load_twin, photos):
    """Give a twin's name, its pipeline, and photos as its encoder is shown them."""
    name, num_photos = request.param
    return name, load_twin(name).model.pipeline, [photo.resize((160, 96)) for photo in photos[:num_photos]]


def prepare(name, pipeline, photos):
    """Make the encoder's inputs with Qwen's own processor, which also tells which tokens are patches."""
    # The original has no number to fill in, and its template has the photo's place already.
    places = "".join(PLACES[name].format(number) for number in range(1, len(photos) + 1))
    frame = pipeline.prompt_template_encode
    text = frame.replace("{}", PROMPT if "<|image_pad|>" in frame else places + PROMPT)
    assert text.count(places) == 1
    return pipeline.processor(text=[text], images=photos, return_tensors="pt", return_mm_token_type_ids=True)


@torch.no_grad()
def encode(pipeline, photos):
    """Encode as the pipeline's call does."""
    image = photos if "Plus" in type(pipeline).__name__ else photos[0]
    return pipeline.encode_prompt(prompt=PROMPT, image=image)[0][0]


@torch.no_grad()
def hidden_states(encoder, inputs):
    """Call the encoder itself; tokens x hidden size, without the system prompt."""
    return encoder(**inputs, output_hidden_states=True).hidden_states[-1][0, SYSTEM_TOKENS:]


def test_prompt_and_photos_are_encoded_as_qwen_does(case, bare_encoder):
    """The pipeline's hidden states are, to the bit, those of a call that tells where the patches are."""
    name, pipeline, photos = case
    inputs = prepare(name, pipeline, photos)
    assert inputs["mm_token_type_ids"].sum() > 10 * len(photos)
    expected = hidden_states(bare_encoder(name), inputs)
    assert torch.equal(encode(pipeline, photos), expected)


def test_encoder_alone_would_take_patches_for_words(case, bare_encoder, monkeypatch):
    """Without our hook the same pipeline gives other hidden states, so that a comparison with them shows its work."""
    name, pipeline, photos = case
    expected = hidden_states(bare_encoder(name), prepare(name, pipeline, photos))
    monkeypatch.setattr(pipeline, "text_encoder", bare_encoder(name))
    difference = (encode(pipeline, photos) - expected).norm() / expected.norm()
    assert difference > 0.05


def test_patches_are_placed_in_rows_and_columns(case):
    """Each patch has the row and the column that it has in its photo, counted from where the text before it ends."""
    _, pipeline, photos = case
    seen = []

    def remember(module, args, kwargs):
        seen.append(kwargs["position_ids"])

    handle = pipeline.text_encoder.model.language_model.register_forward_pre_hook(remember, with_kwargs=True)
    try:
        encode(pipeline, photos)
    finally:
        handle.remove()
    # Frame, row and column; the first may come behind the positions of the text.
    frames, rows, columns = seen[0][-3:, 0]
    is_patch = (rows != columns) | (frames != rows)
    # 96 x 160 pixels are 3 x 6 tokens of 28 x 28.
    num_rows, num_columns = 3, 6
    starts = [int(start) for start in frames[is_patch].unique()]
    assert len(starts) == len(photos)
    for start in starts:
        place = (frames == start) & (rows < start + num_rows) & (columns < start + num_columns)
        found = {
            (int(row) - start, int(column) - start) for row, column in zip(rows[place], columns[place], strict=True)
        }
        assert found == {(row, column) for row in range(num_rows) for column in range(num_columns)}
