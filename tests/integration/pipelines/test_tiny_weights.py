import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import tiny

REPOSITORY = Path(__file__).parents[3]
NAMES = ["tiny-qwen-image-edit-2511", "tiny-flux-kontext"]


def digests(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_twins_are_made_to_the_same_bytes_by_another_process(weights_dir, tmp_path):
    """The command makes every file again to the last byte, with another number of threads and without a network."""
    command = [sys.executable, REPOSITORY / "scripts" / "make_tiny_weights.py", "--out", tmp_path / "weights"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "no-cache"),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    made = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=120)
    assert made.stdout.split() == [str(tmp_path / "weights" / name) for name in NAMES]
    assert digests(tmp_path / "weights") == {
        f"{name}/{file}": digest for name in NAMES for file, digest in digests(weights_dir / name).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_twin_is_small(weights_dir, name):
    """A twin has under 2 MB."""
    assert sum(file.stat().st_size for file in (weights_dir / name).rglob("*") if file.is_file()) < 2_000_000


def test_twins_are_made_quickly(tmp_path):
    """Once the libraries are imported, making both takes seconds (20 are allowed, about 1 is usual)."""
    started = time.monotonic()
    tiny.make_tiny_weights(tmp_path)
    assert time.monotonic() - started < 20


def test_qwen_twin_is_one_of_2511(weights_dir):
    """The 2511 checkpoint differs from 2509 in one setting of its transformer, and so does the twin."""
    config = json.loads((weights_dir / "tiny-qwen-image-edit-2511" / "transformer" / "config.json").read_text())
    assert config["zero_cond_t"] is True
    assert tiny.build_qwen_image_edit_plus(zero_cond_t=False).transformer.config["zero_cond_t"] is False


def test_system_prompt_has_as_many_tokens_as_the_pipeline_drops(qwen):
    """The pipeline drops a fixed number of tokens, which is just its system prompt, and nothing of the user's."""
    pipeline = qwen.model.pipeline
    head, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.processor.tokenizer(head)["input_ids"]) == pipeline.prompt_template_encode_start_idx


def test_what_exists_is_left_alone(tmp_path):
    """A folder of that name is taken for the twin, whatever is in it."""
    (tmp_path / NAMES[0]).mkdir()
    assert tiny.make_tiny_weights(tmp_path) == [tmp_path / name for name in NAMES]
    assert list((tmp_path / NAMES[0]).iterdir()) == []
    assert (tmp_path / NAMES[1] / "model_index.json").is_file()


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
