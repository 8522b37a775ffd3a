import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import tiny
from tests.conftest import untraced

REPOSITORY = Path(__file__).parents[3]
NAMES = list(tiny.TWINS)


def digests(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_twins_are_made_to_the_same_bytes_by_another_process(weights_dir, tmp_path):
    """The command makes every file again to the last byte, with another number of threads and without a network."""
    command = [sys.executable, REPOSITORY / "scripts" / "make_tiny_weights.py", "--out", tmp_path / "weights"]
    env = untraced() | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "no-cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert made.stdout.split() == [str(tmp_path / "weights" / name) for name in NAMES]
    assert digests(tmp_path / "weights") == digests(weights_dir)


@pytest.mark.parametrize("name", NAMES)
def test_twin_is_small(weights_dir, name):
    """A twin has under 2 MB."""
    assert sum(file.stat().st_size for file in (weights_dir / name).rglob("*") if file.is_file()) < 2_000_000


def test_twins_are_made_quickly(tmp_path):
    """Once the libraries are imported, making all takes seconds (40 are allowed, about 3 is usual)."""
    started = time.monotonic()
    tiny.make_tiny_weights(tmp_path)
    assert time.monotonic() - started < 40


def test_qwen_twin_is_one_of_2511(weights_dir):
    """The 2511 checkpoint differs from those before it in one setting of its transformer, and so does the twin."""
    settings = {
        name: json.loads((weights_dir / name / "transformer" / "config.json").read_text())["zero_cond_t"]
        for name in NAMES
        if "qwen" in name
    }
    assert settings == {
        "tiny-qwen-image-edit-2511": True,
        "tiny-qwen-image-edit-2509": False,
        "tiny-qwen-image-edit": False,
    }


@pytest.mark.parametrize("name", ["qwen", "qwen_original"])
def test_system_prompt_has_as_many_tokens_as_the_pipeline_drops(load_twin, name):
    """The pipeline drops a fixed number of tokens, which is just its system prompt, and nothing of the user's."""
    pipeline = load_twin(name).model.pipeline
    # The original's template also has the place of the photo, which is kept.
    head = pipeline.prompt_template_encode.partition("{}")[0].partition("<|vision_start|>")[0]
    assert len(pipeline.processor.tokenizer(head)["input_ids"]) == pipeline.prompt_template_encode_start_idx


def test_what_is_no_twin_is_left_alone(tmp_path):
    """A folder of that name that somebody else made stays as it is."""
    (tmp_path / NAMES[0]).mkdir()
    assert tiny.make_tiny_weights(tmp_path, NAMES[:2]) == [tmp_path / name for name in NAMES[:2]]
    assert list((tmp_path / NAMES[0]).iterdir()) == []
    assert (tmp_path / NAMES[1] / "model_index.json").is_file()


def test_twins_of_another_version_are_made_anew(tmp_path):
    """Weights that another version of the code made are replaced, with their LoRAs; current ones are not touched."""
    [folder] = tiny.make_tiny_weights(tmp_path, ["tiny-flux-kontext"])
    made, lora = digests(tmp_path), tmp_path / "tiny-loras" / "tiny-kontext-style.safetensors"
    config = folder / "vae" / "config.json"
    config.write_text("{}")
    lora.write_bytes(b"older")
    tiny.make_tiny_weights(tmp_path, ["tiny-flux-kontext"])
    assert (config.read_text(), lora.read_bytes()) == ("{}", b"older")
    (folder / ".made-by").write_text("an older version")
    tiny.make_tiny_weights(tmp_path, ["tiny-flux-kontext"])
    assert digests(tmp_path) == made


def test_failure_leaves_no_half_made_folder(tmp_path, monkeypatch):
    """A folder appears only when it is complete; what was begun is removed."""

    def build_and_fail():
        raise KeyboardInterrupt

    monkeypatch.setitem(tiny.TWINS, NAMES[1], build_and_fail)
    with pytest.raises(KeyboardInterrupt):
        tiny.make_tiny_weights(tmp_path, [NAMES[1]])
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_refused(tmp_path):
    """A name that is no twin's is named, with those that are."""
    with pytest.raises(ValueError, match="no tiny twin is called tiny-flax; there are tiny-qwen"):
        tiny.make_tiny_weights(tmp_path, ["tiny-flax"])


def test_random_state_is_left_as_it_was(tmp_path):
    """Making a twin does not seed or advance the process's own random numbers."""
    import torch

    before = torch.get_rng_state()
    tiny.make_tiny_weights(tmp_path, [NAMES[1]])
    assert torch.equal(torch.get_rng_state(), before)
