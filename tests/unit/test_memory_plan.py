"""Which models fit where, and what is shipped about their architectures; all of it without torch."""

import json
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from pipelines import activations
from pipelines.activations import RunSize, TextEncoderShape, denoising_bytes, encoding_bytes, vae_bytes
from pipelines.architectures import architecture_of_folder, published_architecture
from pipelines.errors import WeightsError
from pipelines.memory_plan import (
    MAX_MODELS_TOGETHER,
    RESERVE_BYTES,
    ModelMemory,
    PlannedRun,
    fits,
    needed_bytes,
    plan,
)
from server.cli import restage

GIB = 2**30
SHIPPED = sorted((Path(activations.__file__).parent / "architectures").glob("*.json"))

some_models = st.lists(st.tuples(st.integers(0, 60 * GIB), st.integers(0, 10 * GIB)), min_size=0, max_size=7).map(
    lambda sizes: [ModelMemory(f"m{index}", *size) for index, size in enumerate(sizes)]
)
some_vram = st.integers(0, 160 * GIB)


def by_id(models: list[ModelMemory], ids: tuple[str, ...]) -> list[ModelMemory]:
    return [model for model in models if model.model in ids]


@given(models=some_models)
def test_one_run_at_a_time_needs_one_run_s_activations(models: list[ModelMemory]) -> None:
    """All weights are there at once, the activations only of the model that takes most, and the reserve once."""
    needed = needed_bytes(models)
    highest = max((model.activation_bytes for model in models), default=0)
    assert needed == sum(model.weights_bytes for model in models) + highest + RESERVE_BYTES


@given(models=some_models, vram_bytes=some_vram, more=st.integers(0, 80 * GIB))
def test_a_larger_device_holds_all_that_a_smaller_one_does(
    models: list[ModelMemory], vram_bytes: int, more: int
) -> None:
    """Nothing that fits stops fitting where there is more memory."""
    small, large = plan(models, vram_bytes), plan(models, vram_bytes + more)
    assert set(small.alone) <= set(large.alone)
    for together in small.together or ():
        assert any(set(together) <= set(larger) for larger in large.together or ())


@given(models=some_models, vram_bytes=some_vram)
def test_every_part_of_a_set_that_fits_fits_too(models: list[ModelMemory], vram_bytes: int) -> None:
    """Taking a model away never makes the others too large."""
    for together in plan(models, vram_bytes).together or ():
        for size in range(len(together) + 1):
            for part in combinations(by_id(models, together), size):
                assert fits(part, vram_bytes)


@given(models=some_models, vram_bytes=some_vram)
def test_sets_are_all_those_that_cannot_grow(models: list[ModelMemory], vram_bytes: int) -> None:
    """What is listed is what trying all sets finds: those that fit, and in which no other model has room."""
    fitting = [
        {model.model for model in chosen}
        for size in range(len(models) + 1)
        for chosen in combinations(models, size)
        if fits(chosen, vram_bytes)
    ]
    largest = [found for found in fitting if len(found) > 1 and not any(found < other for other in fitting)]
    listed = plan(models, vram_bytes).together
    assert listed is not None
    assert sorted(map(sorted, listed)) == sorted(map(sorted, largest))


def test_too_many_models_for_sets_are_still_planned_alone() -> None:
    """Sets that would take minutes to try are left out, and the answer says so with None."""
    models = [ModelMemory(f"m{index}", GIB, 0) for index in range(MAX_MODELS_TOGETHER + 1)]
    found = plan(models, 8 * GIB)
    assert len(found.alone) == MAX_MODELS_TOGETHER + 1
    assert found.together is None
    limit = plan(models[1:], 8 * GIB).together
    assert limit is not None
    assert {len(together) for together in limit} == {7}
    assert len(limit) == 792  # 7 of 12


def test_a_model_fits_to_the_byte() -> None:
    """The device may be filled, and not by one byte more."""
    model = ModelMemory("m", 3 * GIB, GIB)
    assert fits([model], 4 * GIB + RESERVE_BYTES)
    assert not fits([model], 4 * GIB + RESERVE_BYTES - 1)


@given(
    area=st.integers(128 * 128, 4096 * 4096),
    num_photos=st.integers(1, 10),
    value_bytes=st.sampled_from([2, 4]),
    more=st.integers(0, 2**24),
)
def test_larger_runs_are_never_estimated_lower(area: int, num_photos: int, value_bytes: int, more: int) -> None:
    """Every estimate grows with the area and with the photos that its component sees."""
    shape = TextEncoderShape(hidden_size=64, inner_size=256, num_layers=2, vocabulary_size=0, sees_photos=True)
    run = RunSize(area, area, num_photos, value_bytes)
    larger = RunSize(area + more, area + more, num_photos + 1, value_bytes)
    assert 0 < denoising_bytes(64, run) <= denoising_bytes(64, larger)
    assert 0 < vae_bytes(16, run) <= vae_bytes(16, larger)
    assert 0 < encoding_bytes(shape, run) <= encoding_bytes(shape, larger)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_architecture_says_where_it_comes_from(file: Path) -> None:
    """Each component has a source and known class, and what was not confirmed names values that are there."""
    assert file.stat().st_size < 10_000
    content = json.loads(file.read_bytes())
    assert content.keys() == {"repo", "pipeline", "source", "unconfirmed", "components"}
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", content["repo"])
    assert content["source"].keys() == content["components"].keys()
    assert all(isinstance(source, str) and source.endswith(".") for source in content["source"].values())
    for component in content["components"].values():
        assert component.keys() == {"library", "class", "config"}
        assert component["library"] in {"diffusers", "transformers"}
        assert component["config"]
    for name in content["unconfirmed"]:
        component, *path = name.split(".")
        value = content["components"][component]["config"]
        for step in path:
            value = value[step]


def test_every_model_has_its_architecture() -> None:
    """The real models are found by the repository of their weights, or by id where an entry names none."""
    assert {file.stem for file in SHIPPED} == {
        "flux-kontext-dev",
        "flux2-klein-4b",
        "qwen-image-edit",
        "qwen-image-edit-2509",
        "qwen-image-edit-2511",
    }
    mine = published_architecture("my-own-name", "Qwen/Qwen-Image-Edit-2511")
    assert mine is not None
    assert mine.components["transformer"].config["zero_cond_t"] is True
    assert mine == published_architecture("qwen-image-edit-2511", None)
    assert published_architecture("qwen-image-edit-2511", "somebody/else") is None
    assert published_architecture("unheard-of", None) is None


INDEX = {"transformer": ["diffusers", "FluxTransformer2DModel"], "scheduler": ["diffusers", "AScheduler"]}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, r"model_index\.json cannot be read: No such file"),
        ({"model_index.json": "{"}, r"model_index\.json cannot be read: it is not JSON"),
        ({"model_index.json": "[" * 100_000}, r"model_index\.json cannot be read: it is not JSON"),
        ({"model_index.json": "[]"}, r"model_index\.json is not a JSON object"),
        ({"model_index.json": json.dumps(INDEX)}, r"transformer/config\.json cannot be read"),
        ({"model_index.json": '{"vae": ["my_code", "Vae"]}'}, "vae is of library my_code; only diffusers and transf"),
        ({"model_index.json": '{"vae": [["a"], {"b": 1}]}'}, "only diffusers and transformers are allowed"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path: Path, files: dict[str, str], told: str) -> None:
    """A missing or damaged configuration is an error that names the file."""
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(WeightsError, match=told):
        architecture_of_folder(tmp_path)


def test_a_folder_is_described_by_its_own_configurations(tmp_path: Path) -> None:
    """Parts with weights are read, parts without and parts that are left out are not."""
    index = INDEX | {"_class_name": "FluxKontextPipeline", "image_encoder": [None, None]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text('{"num_layers": 3}')
    (component,) = architecture_of_folder(tmp_path).components.items()
    assert component[0] == "transformer"
    assert component[1].config == {"num_layers": 3}


@pytest.mark.parametrize("vram", ["0", "-1", "nan", "inf", "-inf", "1e9", "", "80GB"])
def test_memory_that_no_gpu_has_is_a_mistake_in_the_command(vram: str) -> None:
    """Status 2, the option is named, and nothing is counted."""
    result = CliRunner().invoke(restage, ["models", "plan", "--vram", vram])
    assert result.exit_code == 2
    assert "--vram" in result.output


def test_a_plan_needs_the_memory_of_the_gpu() -> None:
    """There is no default: a plan for another device than meant would be worse than none."""
    result = CliRunner().invoke(restage, ["models", "plan"])
    assert result.exit_code == 2
    assert "Missing option '--vram'" in result.output


def test_planning_itself_needs_no_torch() -> None:
    """A worker can ask what fits, and an architecture can be read, before the engine is loaded."""
    modules = "pipelines.memory_plan, pipelines.activations, pipelines.architectures"
    script = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


RUN = PlannedRun(area=1000, num_photos=3, phases={"encoding": 100, "denoising": 4000, "decoding": 900})


def test_a_run_as_large_as_planned_takes_what_was_planned() -> None:
    """The plan's own run is its measure."""
    assert RUN.bytes_for(20, 50, 3) == 4000


def test_a_smaller_run_takes_less_and_a_larger_one_more() -> None:
    """The transformer sees photos and output, the VAE makes the output alone, and a prompt is as long as ever."""
    assert RUN.bytes_for(20, 50, 1) == 2000
    assert RUN.bytes_for(40, 100, 3) == 7000
    assert RUN.bytes_for(400, 500, 0) == 200_000
    wide = PlannedRun(area=1000, num_photos=1, phases={"denoising": 10, "decoding": 500})
    assert wide.bytes_for(10, 10, 1) == 50
    assert wide.bytes_for(100, 100, 1) == 5000
    assert PlannedRun(1000, 1, {"encoding": 70}).bytes_for(1000, 1000, 1) == 70
    assert PlannedRun(1000, 1, {}).bytes_for(10, 10, 1) == 0


def test_weights_that_move_count_with_their_phase() -> None:
    """What is on the device for one phase only is not scaled with the pixels."""
    moved = PlannedRun(1000, 1, {"denoising": 100, "encoding": 50}, {"denoising": 10, "encoding": 1000, "other": 7})
    assert moved.bytes_for(10, 100, 1) == 1050
    assert moved.bytes_for(100, 1000, 1) == 100 * 101_000 // 2000 + 10
