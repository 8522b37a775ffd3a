"""What models take, counted from the real classes without numbers; and the command that prints it."""

import json
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner, Result

from pipelines.activations import RunSize, TextEncoderShape, denoising_bytes, encoding_bytes, vae_bytes
from pipelines.architectures import Component, architecture_of_folder, published_architecture
from pipelines.errors import WeightsError
from pipelines.weights import LoraSpec, ModelSpec
from server.cli import restage

if TYPE_CHECKING:
    from torch import nn

REPOSITORY = Path(__file__).parents[3]
MEGAPIXEL = 1024 * 1024
# What is known of the published files, in GB (10^9 bytes) at bfloat16: sizes that the models' pages tell, or numbers of
# parameters that their makers tell, twice.
PUBLISHED_GB = {
    "qwen-image-edit": {"transformer": 40.9, "text_encoder": 16.6, "vae": 0.254, "in all": 57.7},
    "qwen-image-edit-2509": {"transformer": 40.9, "text_encoder": 16.6, "vae": 0.254, "in all": 57.7},
    "qwen-image-edit-2511": {"transformer": 40.9, "text_encoder": 16.6, "vae": 0.254, "in all": 57.7},
    "flux-kontext-dev": {
        "transformer": 23.8,
        "text_encoder": 0.25,
        "text_encoder_2": 9.5,
        "vae": 0.168,
        "in all": 33.7,
    },
    "flux2-klein-4b": {"transformer": 7.75, "text_encoder": 8.0, "vae": 0.168, "in all": 16.0},
}
TWINS = {
    "tiny-qwen-image-edit-2511": ("qwen_image_edit_plus", "QwenImageEditPlusPipeline"),
    "tiny-flux-kontext": ("flux_kontext", "FluxKontextPipeline"),
}


def spec_of(model_id: str, weights_dir: Path = Path("nowhere"), **changes: Any) -> ModelSpec:
    values = {"family": "", "pipeline": "", "dtype": "bfloat16", "area": MEGAPIXEL} | changes
    return ModelSpec(model_id, weights_dir=weights_dir, **values)


@pytest.mark.parametrize("model_id", PUBLISHED_GB)
def test_counts_agree_with_what_is_published(model_id: str) -> None:
    """The shipped architectures weigh what the published files do, within 3 %."""
    from pipelines.counting import size_model

    architecture = published_architecture(model_id, None)
    assert architecture is not None
    size = size_model(spec_of(model_id), architecture, num_photos=1)
    counted = {component.name: component.weights_bytes / 1e9 for component in size.components}
    counted["in all"] = size.memory.weights_bytes / 1e9
    assert counted == pytest.approx(PUBLISHED_GB[model_id], rel=0.03)
    assert size.not_counted == ()
    assert size.phases.keys() == {"encoding", "denoising", "decoding"}


@pytest.mark.parametrize("model_id", TWINS)
@pytest.mark.parametrize(("dtype", "divisor"), [("float32", 1), ("bfloat16", 2)])
def test_a_twin_weighs_what_its_files_hold(weights_dir: Path, model_id: str, dtype: str, divisor: int) -> None:
    """From a folder's own configurations, every component is counted to the byte."""
    from pipelines.counting import size_model

    architecture = architecture_of_folder(weights_dir / model_id)
    size = size_model(spec_of(model_id, weights_dir / model_id, dtype=dtype), architecture, num_photos=1)
    for component in size.components:
        held_bytes = 0
        for file in (weights_dir / model_id / component.name).glob("*.safetensors"):
            content = file.read_bytes()
            header_bytes = int.from_bytes(content[:8], "little")
            assert set(json.loads(content[8 : 8 + header_bytes])) > {"__metadata__"}
            held_bytes += len(content) - 8 - header_bytes
        assert component.weights_bytes == held_bytes / divisor > 0


def test_an_embedding_that_is_also_the_last_layer_counts_once() -> None:
    """Tied, a model is smaller by exactly that matrix."""
    from pipelines.counting import build_empty, count_bytes, torch

    config = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    counted: dict[bool, int] = {}
    for is_tied in (True, False):
        component = Component("transformers", "Qwen3ForCausalLM", config | {"tie_word_embeddings": is_tied})
        counted[is_tied] = count_bytes(build_empty("m", "text_encoder", component), torch.float32)
    assert counted[False] - counted[True] == 100 * 64 * 4


def test_building_allocates_nothing() -> None:
    """A transformer of 41 GB has shapes, and no numbers."""
    from pipelines.counting import build_empty

    architecture = published_architecture("qwen-image-edit-2511", None)
    assert architecture is not None
    module = build_empty("m", "transformer", architecture.components["transformer"])
    assert sum(parameter.numel() for parameter in module.parameters()) > 20e9
    assert all(parameter.is_meta for parameter in module.parameters())


def test_quantization_shrinks_the_linear_layers_of_the_transformer_alone(weights_dir: Path) -> None:
    """Their matrices take one byte a number and five for each row; all else stays as it is."""
    from pipelines.counting import build_empty, size_model, torch

    model_id = "tiny-flux-kontext"
    architecture = architecture_of_folder(weights_dir / model_id)
    plain, small = (
        size_model(spec_of(model_id), architecture, num_photos=1, quantization=quantization)
        for quantization in ("none", "int8")
    )
    module = build_empty(model_id, "transformer", architecture.components["transformer"])
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.Linear)]
    saved_bytes = sum(layer.weight.numel() - 5 * layer.out_features for layer in layers)
    for before, after in zip(plain.components, small.components, strict=True):
        expected = saved_bytes if before.name == "transformer" else 0
        assert before.weights_bytes - after.weights_bytes == expected
        assert before.num_parameters == after.num_parameters
    large = published_architecture("qwen-image-edit-2511", None)
    assert large is not None
    size = size_model(spec_of("m"), large, num_photos=1, quantization="fp8")
    assert size.components[0].weights_bytes / 1e9 == pytest.approx(20.4, rel=0.03)


def test_loras_are_counted_where_they_are_there(weights_dir: Path, tmp_path: Path) -> None:
    """From the header of the file, in the model's dtype; a file that is missing is named, a damaged one refused."""
    from safetensors.torch import save_file

    from pipelines.counting import size_model, torch

    architecture = architecture_of_folder(weights_dir / "tiny-flux-kontext")
    file = tmp_path / "fast.safetensors"
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, file)
    loras = (LoraSpec("fast", file), LoraSpec("absent", tmp_path / "absent.safetensors"))
    size = size_model(spec_of("m", loras=loras), architecture, num_photos=1)
    assert size.components[-1].name == "lora fast"
    assert size.components[-1].weights_bytes == (3 * 5 + 7) * 2
    assert size.not_counted == ("the LoRA absent, whose file is not there",)
    file.write_bytes(b"half of a fi")
    with pytest.raises(WeightsError, match=r"m: the LoRA .*fast\.safetensors cannot be read"):
        size_model(spec_of("m", loras=loras), architecture, num_photos=1)


@pytest.mark.parametrize(
    ("component", "told"),
    [
        (Component("diffusers", "NoSuchModel", {}), "diffusers has no model NoSuchModel"),
        (Component("diffusers", "FlowMatchEulerDiscreteScheduler", {}), "has no model FlowMatch"),
        (Component("transformers", "logging", {}), "transformers has no model logging"),
        (Component("diffusers", "FluxTransformer2DModel", {"num_layers": "many"}), "cannot be made"),
        (Component("transformers", "CLIPTextModel", {"hidden_size": 7, "num_attention_heads": 2}), "cannot be made"),
        (Component("transformers", "CLIPTextModel", {"hidden_size": "wide"}), "cannot be made"),
    ],
)
def test_what_cannot_be_built_is_told(component: Component, told: str) -> None:
    """A class or a configuration that these libraries do not have is an error that names model and component."""
    from pipelines.counting import build_empty

    with pytest.raises(WeightsError, match=f"^my-model: .*{told}") as refused:
        build_empty("my-model", "some_part", component)
    assert "some_part" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_class_without_a_formula_is_named() -> None:
    """Its weights count, and what it takes while it runs is said to be missing."""
    from pipelines.architectures import Architecture
    from pipelines.counting import size_model

    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = Component("diffusers", "UNet2DConditionModel", {"block_out_channels": [32, 64]} | blocks)
    size = size_model(spec_of("m"), Architecture({"unet": unet}), num_photos=1)
    assert size.memory.weights_bytes > 0
    assert size.memory.activation_bytes == 0
    assert size.not_counted == ("what unet (UNet2DConditionModel) takes while it runs",)


# The estimates against a dry run: the real classes at real size work on tensors that have shapes and no numbers, while
# the bytes that would be alive are counted. It knows nothing of what kernels need for themselves, so it is what an
# estimate must at least reach.


@contextmanager
def counted_tensors(module: "nn.Module", monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], int]]:
    """Count the bytes of all tensors that are alive at once; gives a function that tells the highest count."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    known = {id_of(value): 0 for value in (*module.parameters(), *module.buffers())}
    alive = {"now": 0, "highest": 0}

    def forget(storage: int) -> None:
        alive["now"] -= known.pop(storage)

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for value in tree_leaves(result):
                if isinstance(value, torch.Tensor) and id_of(value) not in known:
                    storage = value.untyped_storage()
                    known[id_of(value)] = storage.nbytes()
                    weakref.finalize(storage, forget, id_of(value))
                    alive["now"] += storage.nbytes()
            alive["highest"] = max(alive["highest"], alive["now"])
            return result

    def fused(query: Any, *args: Any, **kwargs: Any) -> Any:
        # As on a GPU: no number for each pair of tokens, as the meta device would make them.
        return torch.empty_like(query)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)
    with torch.no_grad(), Counting():
        yield lambda: alive["highest"]


def id_of(tensor: Any) -> int:
    return tensor.untyped_storage()._cdata


def build(model_id: str, name: str, **changes: Any) -> Any:
    """Make a shipped component in bfloat16, with some values changed (fewer layers take as much at a time)."""
    import torch

    from pipelines.counting import build_empty

    architecture = published_architecture(model_id, None)
    assert architecture is not None
    component = architecture.components[name]
    component = Component(component.library, component.class_name, component.config | changes)
    module = build_empty(model_id, name, component)
    for value in (*module.parameters(), *module.buffers()):
        value.data = value.data.to(torch.bfloat16)
    return module.eval()


def empty(*shape: int, dtype: str = "bfloat16") -> Any:
    import torch

    return torch.empty(*shape, dtype=getattr(torch, dtype), device="meta")


@pytest.mark.parametrize(
    ("model_id", "shape"),
    [
        ("flux-kontext-dev", (1, 16, 128, 128)),
        ("flux2-klein-4b", (1, 32, 128, 128)),
        ("qwen-image-edit-2511", (1, 16, 1, 128, 128)),
    ],
)
def test_decoding_is_estimated_above_its_tensors(
    model_id: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of a million pixels leaves the VAE within the estimate, and a photo enters it within it too."""
    vae = build(model_id, "vae")
    channels = vae.config.get("base_dim") or vae.config["block_out_channels"][0]
    estimated = vae_bytes(channels, RunSize(MEGAPIXEL, 0, 1, 2))
    photo = (1, 3, 1024, 1024) if len(shape) == 4 else (1, 3, 1, 1024, 1024)
    with counted_tensors(vae, monkeypatch) as highest:
        assert vae.decode(empty(*shape)).sample.shape == photo
        assert estimated / 4 < highest() <= estimated
        vae.encode(empty(*photo))
        assert highest() <= estimated


def denoise_qwen(transformer: Any, num_photos: int) -> None:
    from inspect import signature

    known = signature(transformer.forward).parameters
    text_tokens = 188 * num_photos + 1024
    values = {
        "hidden_states": empty(1, 4096 * (1 + num_photos), 64),
        "encoder_hidden_states": empty(1, text_tokens, 3584),
        "timestep": empty(1),
        "img_shapes": [[(1, 64, 64)] * (1 + num_photos)],
    }
    assert values.keys() <= known.keys()
    transformer(**values)


def denoise_flux(transformer: Any, num_photos: int) -> None:
    tokens = 4096 * (1 + num_photos)
    transformer(
        hidden_states=empty(1, tokens, 64),
        encoder_hidden_states=empty(1, 1024, 4096),
        pooled_projections=empty(1, 768),
        timestep=empty(1),
        guidance=empty(1),
        img_ids=empty(tokens, 3),
        txt_ids=empty(1024, 3),
    )


def denoise_flux2(transformer: Any, num_photos: int) -> None:
    tokens = 4096 * (1 + num_photos)
    transformer(
        hidden_states=empty(1, tokens, 128),
        encoder_hidden_states=empty(1, 1024, 7680),
        timestep=empty(1),
        guidance=None,
        img_ids=empty(1, tokens, 4),
        txt_ids=empty(1, 1024, 4),
    )


@pytest.mark.parametrize(
    ("model_id", "denoise", "num_photos"),
    [
        ("qwen-image-edit-2511", denoise_qwen, 3),
        ("qwen-image-edit", denoise_qwen, 1),
        ("flux-kontext-dev", denoise_flux, 1),
        ("flux2-klein-4b", denoise_flux2, 4),
    ],
)
def test_denoising_is_estimated_above_its_tensors(
    model_id: str, denoise: Callable[[Any, int], None], num_photos: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pass at a million pixels, with as many photos as may come, stays within the estimate and near it."""
    layers = {"num_layers": 2} if model_id.startswith("qwen") else {"num_layers": 2, "num_single_layers": 2}
    transformer = build(model_id, "transformer", **layers)
    with counted_tensors(transformer, monkeypatch) as highest:
        denoise(transformer, num_photos)
        estimated = denoising_bytes(3072, RunSize(MEGAPIXEL, 384 * 384, num_photos, 2))
        assert estimated / 3 < highest() <= estimated


@pytest.mark.parametrize(
    ("model_id", "name", "num_tokens", "shape"),
    [
        # The pipeline cuts the prompt off there.
        ("flux-kontext-dev", "text_encoder_2", 512, TextEncoderShape(4096, 10240, 24, 0, sees_photos=False)),
        ("qwen-image-edit-2511", "text_encoder", 1024, TextEncoderShape(3584, 18944, 28, 152064, sees_photos=False)),
    ],
)
def test_encoding_is_estimated_above_its_tensors(
    model_id: str, name: str, num_tokens: int, shape: TextEncoderShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long prompt passes through the text encoder within the estimate, with the results of all layers kept."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = build(model_id, name).config.get_text_config().to_dict()
    changes = {"text_config": config | {"rope_parameters": rope}} if "qwen" in model_id else {}
    encoder = build(model_id, name, **changes)
    with counted_tensors(encoder, monkeypatch) as highest:
        encoder(input_ids=empty(1, num_tokens, dtype="long"), output_hidden_states=True)
        estimated = encoding_bytes(shape, RunSize(MEGAPIXEL, 384 * 384, 1, 2))
        assert estimated / 3 < highest() <= estimated


# The command.


@pytest.fixture
def run_plan(weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Give a function that runs `restage models plan` on the shipped registry and some entries of its own.

    The twins have their weights, the others have none.
    """
    config_dir = tmp_path / "config"
    shutil.copytree(REPOSITORY / "config", config_dir)
    file = config_dir / "models.yaml"
    entries = {entry["id"]: entry for entry in yaml.safe_load(file.read_text())}
    nameless = entries["flux-kontext-dev"] | {"id": "homemade", "weights": "homemade", "source": None}
    (weights := tmp_path / "weights").mkdir()
    for twin in TWINS:
        (weights / twin).symlink_to(weights_dir / twin)
    file.write_text(yaml.safe_dump([*entries.values(), nameless]))
    monkeypatch.setenv("RESTAGE_CONFIG_DIR", str(config_dir))
    monkeypatch.setenv("RESTAGE_ENV", "test")
    monkeypatch.setenv("RESTAGE__MODELS__WEIGHTS_DIR", str(weights))
    return lambda *arguments: CliRunner().invoke(restage, ["models", "plan", *arguments])


def row_of(output: str, model_id: str) -> list[str]:
    """Give the cells of a model's row in the second table."""
    (row,) = [line for line in output.splitlines() if line.startswith(f"│ {model_id} ") and line.count("│") == 8]
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_the_command_prints_components_sums_and_what_fits(run_plan: Callable[..., Result]) -> None:
    """The real models are counted without weights, with and without room, and twins are left out unless named."""
    result = run_plan("--vram", "40")
    assert result.exit_code == 0, result.output
    assert "│ qwen-image-edit-2511 │ transformer" in result.output
    assert row_of(result.output, "qwen-image-edit-2511")[1:3] == ["57.70", "53.74"]
    assert row_of(result.output, "qwen-image-edit-2511")[-1] == "no"
    assert row_of(result.output, "flux-kontext-dev")[-1] == "yes"
    assert "left out, since they name no source" in result.output
    assert "tiny-flux-kontext" in result.output.splitlines()[-1]


def test_the_command_tells_what_fits_beside_what(run_plan: Callable[..., Result]) -> None:
    """Sets stand with their sum; a smaller device has fewer."""
    named = ("flux-kontext-dev", "tiny-flux-kontext", "tiny-qwen-image-edit-2511", "flux-kontext-dev")
    result = run_plan("--vram", "40", *named)
    assert result.exit_code == 0, result.output
    assert "  flux-kontext-dev + tiny-flux-kontext + tiny-qwen-image-edit-2511: 37.4" in result.output
    assert "no two of them" in run_plan("--vram", "0.5", *named).output


def test_quantization_makes_room(run_plan: Callable[..., Result]) -> None:
    """With int8 a transformer takes about half, and the model fits where it did not."""
    named = ("--vram", "48", "qwen-image-edit-2511")
    plain, small = run_plan(*named), run_plan(*named, "--quantization", "int8")
    assert row_of(plain.output, "qwen-image-edit-2511")[-1] == "no"
    assert row_of(small.output, "qwen-image-edit-2511")[-1] == "yes"
    assert "Quantization: int8" in small.output


def test_an_unknown_model_is_a_mistake_in_the_command(run_plan: Callable[..., Result]) -> None:
    """Status 2, and the name that was probably meant."""
    result = run_plan("--vram", "80", "flux-kontext-devv")
    assert result.exit_code == 2
    assert "did you mean flux-kontext-dev?" in result.output


def test_a_model_of_which_nothing_is_known_is_told_and_the_others_are_shown(run_plan: Callable[..., Result]) -> None:
    """Status 1, one line for the model that cannot be counted, and the plan of the rest."""
    result = run_plan("--vram", "80", "homemade", "tiny-flux-kontext")
    assert result.exit_code == 1
    (told,) = [line for line in result.output.splitlines() if line.startswith("restage: ")]
    assert told.startswith("restage: homemade is not counted: there is no folder ")
    assert row_of(result.output, "tiny-flux-kontext")[-1] == "yes"


def test_a_damaged_folder_is_told_and_the_others_are_shown(run_plan: Callable[..., Result], tmp_path: Path) -> None:
    """A folder of weights counts before what is shipped, so what is wrong with it is said."""
    (tmp_path / "weights" / "flux-kontext-dev").mkdir()
    result = run_plan("--vram", "80")
    assert result.exit_code == 1
    assert "restage: flux-kontext-dev is not counted: " in result.output
    assert "model_index.json cannot be read: No such file" in result.output
    assert row_of(result.output, "qwen-image-edit-2511")[-1] == "yes"
