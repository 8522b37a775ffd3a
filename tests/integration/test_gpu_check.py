"""The check of a GPU: what it does without one, and all of its own code on a tiny model on the CPU."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.gpu_check.command import EXIT_DONE, EXIT_NO_DEVICE, EXIT_USAGE, Check, check_gpu, parse, run_child
from server.gpu_check.task import PLAIN, UNFINISHED, Device, Result, Task
from server.settings import Settings

KONTEXT = "tiny-flux-kontext"


@pytest.fixture
def settings(settings_for: Callable[..., Settings], weights_dir: Path) -> Settings:
    """Give settings whose folder of weights holds the twins."""
    return settings_for(RESTAGE__MODELS__WEIGHTS_DIR=str(weights_dir))


@pytest.fixture
def new_check(settings: Settings, tmp_path: Path) -> Callable[..., Check]:
    """Give a function that makes a check: `new_check(total_bytes, *arguments)`."""

    def make(total_bytes: int = 0, *arguments: str) -> Check:
        return Check(settings, parse(["--device", "cpu", *arguments]), Device("cpu", total_bytes=total_bytes), tmp_path)

    return make


def entry_of(settings: Settings, model: str) -> Any:
    from server.plan_command import every_entry

    return every_entry(settings).get(model)


def test_without_cuda_it_says_so_and_measures_nothing(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 3, no report and no file."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    file = tmp_path / "report.json"
    assert check_gpu(settings, ["--json", str(file)]) == EXIT_NO_DEVICE
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.splitlines() == ["restage: no GPU with a driver that torch can use is here; nothing was measured"]
    assert not file.exists()


def test_a_tiny_model_is_measured_from_end_to_end(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU each figure but those of a GPU's memory is there, in both forms of the report."""
    from server.gpu_check.describing import describe_device

    # Its own process would be one more start of torch: the test above has it.
    monkeypatch.setattr("server.gpu_check.command.find_device", lambda device, _: describe_device(device))
    files = {"--json": tmp_path / "report.json", "--markdown": tmp_path / "report.md"}
    written = [part for name, file in files.items() for part in (name, str(file))]
    few = ["--device", "cpu", "--steps", "4", "--repeats", "1", "--no-variants"]
    assert check_gpu(settings, [*few, "--load-times", *written, KONTEXT]) == EXIT_DONE
    report = json.loads(files["--json"].read_text())
    assert report["device"]["problem"] is None
    assert report["device"]["versions"].keys() >= {"torch", "diffusers"}
    assert KONTEXT in report["command"]
    assert report["plans"][KONTEXT]["weights_bytes"] > 0
    (result,) = report["results"]
    assert (result["model"], result["variant"], result["outcome"]) == (KONTEXT, PLAIN, "measured"), result["reason"]
    figures = result["figures"]
    assert figures["same_picture"] is True
    assert figures["resumed_same_picture"] is True
    assert figures["edit_seconds"] > 3 * figures["step_seconds"] > 0
    positive = {"build_seconds", "bare_edit_seconds", "edit_seconds", "steps_per_second", "load_seconds"}
    assert all(figures[name] > 0 for name in positive)
    assert "lane_adds_percent" in figures
    assert "peak_bytes" not in figures
    page = files["--markdown"].read_text()
    assert page.count(f"| {KONTEXT} |") == 4
    assert page.strip() in capsys.readouterr().out


def test_what_does_not_fit_or_is_not_known_is_skipped_with_the_reason(
    settings: Settings, new_check: Callable[..., Check]
) -> None:
    """No process is started for it."""
    check = new_check(24 * 2**30, "--variant", "compile: regional")
    for model in ("qwen-image-edit-2511", "tiny-instruct-pix2pix"):
        check.measure(entry_of(settings, model))
    large, variant, unknown = check.results
    assert (large.model, large.outcome) == ("qwen-image-edit-2511", "skipped")
    assert large.reason == "by the memory plan it needs 58.5 GiB, and the device has 24.0"
    assert variant == Result("qwen-image-edit-2511", "compile: regional", "skipped", large.reason)
    assert (unknown.outcome, unknown.variant) == ("skipped", PLAIN)
    assert "tokenizers are known for" in unknown.reason


def test_a_measurement_that_crashes_or_takes_too_long_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    """How it ended and the last that it wrote; a process that takes too long is killed."""
    assert run_child("good", ["timeit", "-n1", "-r1", "pass"], tmp_path, 60) == ""
    crash = run_child(
        "bad", ["timeit", "-n1", "-r1", "import os; print('so far', flush=True); os.abort()"], tmp_path, 60
    )
    assert crash == "it ended with status -6: so far"
    assert run_child("slow", ["timeit", "-n1", "-r1", "import time; time.sleep(60)"], tmp_path, 0.5) == (
        "it took longer than 0.5 s"
    )


def test_a_model_without_room_for_its_weights_fails_alone(
    settings: Settings, new_check: Callable[..., Check], tmp_path: Path
) -> None:
    """Out of memory is a result like any other, with what was found before it."""
    from server.gpu_check.one_model import main

    task = new_check()._task(entry_of(settings, KONTEXT))
    parts = {name: dict(part) for name, part in task.components.items()}
    parts["transformer"]["config"] = parts["transformer"]["config"] | {"joint_attention_dim": 10**15}
    Task(**{**vars(task), "components": parts}).write(tmp_path / "huge.json")
    assert main(tmp_path / "huge.json", tmp_path / "found.json") == 1
    found = Result.read(tmp_path / "found.json")
    assert found.outcome == "failed"
    assert found.reason.startswith(f"out of memory: {KONTEXT}: too little memory to make the model on cpu")
    assert UNFINISHED not in found.reason


def test_loading_is_measured_at_full_size_and_a_failure_of_it_keeps_the_other_figures(
    settings: Settings, new_check: Callable[..., Check], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table larger than its tokenizer is loaded again; skipped is only what was refused before it was measured."""
    from server.gpu_check import one_model

    task = new_check(0, "--steps", "4", "--repeats", "1")._task(entry_of(settings, KONTEXT))
    parts = {name: dict(part) for name, part in task.components.items()}
    parts["text_encoder_2"]["config"] = parts["text_encoder_2"]["config"] | {"vocab_size": 30_000}
    for folder in ("padded", "bare"):
        (tmp_path / folder).mkdir()
    tiling: dict[str, Any] = {"variant": "vae_tiling", "optimizations": {"vae_tiling": True}}
    task = replace(task, components=parts, load_dir=str(tmp_path / "padded"), **tiling)

    def measure(task: Task) -> Result:
        return one_model.Measurement(task, tmp_path / "found.json").run()

    measured = measure(task)
    assert (measured.outcome, measured.reason) == ("measured", "")
    assert measured.figures["load_again_seconds"] > 0

    refused = measure(replace(task, optimizations={"attention": "flash"}))
    assert (refused.outcome, refused.figures) == ("skipped", {})
    assert "attention: flash needs CUDA" in refused.reason

    monkeypatch.setattr(one_model, "save_with_padded_tokenizers", lambda pipeline, to: pipeline.save_pretrained(to))
    failed = measure(replace(task, load_dir=str(tmp_path / "bare")))
    assert failed.outcome == "failed"
    assert "tokenizer_2 has 293 tokens, and its text encoder knows 30000" in failed.reason
    assert failed.figures["edit_seconds"] > 0


def test_what_is_offloaded_must_fit_into_the_machines_memory(
    settings: Settings, new_check: Callable[..., Check], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the device is large enough for all of it; no process is started for it."""
    check = new_check(80 * 2**30)
    task = check._task(entry_of(settings, "qwen-image-edit-2511"))
    monkeypatch.setattr("os.sysconf", lambda _: 2**16)
    found = check._measure_variant(replace(task, variant="offload: group", optimizations={"offload": "group"}), None)
    assert found.outcome == "skipped"
    assert found.reason.startswith("its weights need ")
    assert found.reason.endswith(" GiB of the machine's memory, which has 4.0")


def test_arguments_that_cannot_be_used_are_told(settings: Settings, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is looked at: status 2, and what is allowed."""
    assert check_gpu(settings, ["flux-kontext-devv"]) == EXIT_USAGE
    for arguments, told in (
        (["--variant", "warp"], "no variant is called 'warp'; there are "),
        (["--steps", "3"], "3 is too few; at least 4"),
        (["--json", "/nowhere/report.json"], "there is no folder /nowhere"),
    ):
        with pytest.raises(SystemExit) as ended:
            check_gpu(settings, arguments)
        assert ended.value.code == EXIT_USAGE
        assert told in capsys.readouterr().err
