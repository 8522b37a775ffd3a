"""What an entry's optimizations make of a twin: how far its pictures move, and that nothing stays behind.

The distances are those of `Distance` between twins of float32 with one thread, in steps of 256; a twin's numbers are
random and spread far more than a trained model's, so they say what is exact and what is not, and no more.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.errors import OptimizationUnavailable
from pipelines.optimization_params import Optimizations
from tests.integration.pipelines.conftest import Twin

STEPS = 8
RATIOS = [1.0] + [1.02] * 11
LoadWith = Callable[..., Twin]


@pytest.fixture
def load_with(load_twin: Callable[[str], Twin]) -> LoadWith:
    """Give a function that loads a twin with optimizations; a few megabytes, left to the collector."""
    from pipelines.loading import load_model

    def load(name: str, **optimizations: Any) -> Twin:
        plain = load_twin(name)
        loras = optimizations.pop("loras", ())
        spec = replace(plain.model.spec, optimizations=Optimizations.model_validate(optimizations), loras=loras)
        return replace(plain, model=load_model(spec, "cpu"))

    return load


@pytest.fixture(scope="module")
def plain(load_twin: Callable[[str], Twin], photos: list[Image.Image]) -> Callable[[str], np.ndarray]:
    """Give a function that makes a twin's picture as its pipeline does by itself."""
    made: dict[str, np.ndarray] = {}

    def make(name: str) -> np.ndarray:
        if name not in made:
            made[name] = load_twin(name).run(photos[:1], num_inference_steps=STEPS)
        return made[name]

    return make


def distance(one: np.ndarray, other: np.ndarray) -> tuple[int, float]:
    """Give the greatest and the mean difference of two pictures, in steps of 256."""
    differences = np.abs(one - other)
    return int(differences.max()), float(differences.mean())


@pytest.mark.parametrize(
    ("name", "optimizations", "most", "mean"),
    [
        ("kontext", {"attention": "_native_flash", "vae_tiling": True, "vae_slicing": True}, 0, 0.0),
        ("kontext", {"attention": "_native_math"}, 1, 0.001),
        # Weights that were moved lie elsewhere in memory, and the CPU's kernels follow that in the last bit.
        ("kontext", {"offload": "model"}, 1, 0.001),
        ("kontext", {"offload": "group"}, 0, 0.0),
        ("kontext", {"quantization": "int8"}, 10, 1.0),
        ("kontext", {"quantization": "fp8"}, 40, 4.0),
        ("kontext", {"layerwise_casting": "fp8"}, 50, 4.0),
    ],
    ids=lambda value: next(iter(value.items())) if isinstance(value, dict) else None,
)
def test_pictures_stay_as_near_to_the_plain_ones_as_is_stated(
    load_with: LoadWith,
    plain: Callable[[str], np.ndarray],
    photos: list[Image.Image],
    name: str,
    optimizations: dict[str, Any],
    most: int,
    mean: float,
) -> None:
    """Each picture is within its bound, exact where nothing is rounded, and the same when it is made again."""
    twin = load_with(name, **optimizations)
    picture = twin.run(photos[:1], num_inference_steps=STEPS)
    found = distance(picture, plain(name))
    print(f"{name} {optimizations}: max {found[0]}, mean {found[1]:.4f}")  # noqa: T201 - docs/optimizations.md quotes it
    assert found[0] <= most
    assert found[1] <= mean
    assert (picture == twin.run(photos[:1], num_inference_steps=STEPS)).all()
    if "quantization" in optimizations or "layerwise_casting" in optimizations:
        assert found[1] > 0
        assert_counted_as_loaded(twin)
    assert twin.model.spec.optimizations.applied == optimizations


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        ("kontext", {"kind": "magcache"}),
        ("qwen", {"kind": "magcache", "ratios": RATIOS}),
        ("qwen", {"kind": "first_block", "threshold": 1.0}),
        ("qwen", {"kind": "taylorseer", "cache_interval": 3}),
        ("klein", {"kind": "magcache", "ratios": RATIOS}),
        ("klein", {"kind": "taylorseer", "cache_interval": 3}),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else None,
)
def test_a_step_cache_skips_work_and_passes_nothing_on(
    load_with: LoadWith,
    load_twin: Callable[[str], Twin],
    plain: Callable[[str], np.ndarray],
    photos: list[Image.Image],
    name: str,
    cache: dict[str, Any],
) -> None:
    """A cache skips blocks of a run's steps; a run that was closed halfway changes no other, nor does its length."""
    twin, plain_picture = load_with(name, cache=cache), plain(name)
    with counted_layers(twin) as num_run:
        picture = twin.run(photos[:1], num_inference_steps=STEPS)
    with counted_layers(load_twin(name)) as num_all:
        assert (load_twin(name).run(photos[:1], num_inference_steps=STEPS) == plain_picture).all()
    print(f"{name} {cache}: {num_run[0]} of {num_all[0]} layers run; distance {distance(picture, plain_picture)}")  # noqa: T201 - docs/optimizations.md quotes it
    assert num_run[0] < num_all[0]

    closed = twin.start(photos[:1], num_inference_steps=STEPS, seed=2)
    for _ in range(5):
        assert closed.advance()
    closed.close()
    twin.run(photos[:1], num_inference_steps=4, seed=3)
    assert (twin.run(photos[:1], num_inference_steps=STEPS) == picture).all()


@contextmanager
def counted_layers(twin: Twin) -> Iterator[list[int]]:
    """Count how often a linear layer of the transformer is computed."""
    from torch import nn

    counted = [0]

    def count(*_: object) -> None:
        counted[0] += 1

    layers = [part for part in twin.model.pipeline.transformer.modules() if isinstance(part, nn.Linear)]
    handles = [layer.register_forward_hook(count) for layer in layers]
    yield counted
    for handle in handles:
        handle.remove()


def test_a_run_that_fails_passes_nothing_on(load_with: LoadWith, photos: list[Image.Image]) -> None:
    """What a cache knew of a run that ended with an error is gone, and the layers are as they were."""
    twin = load_with("qwen", cache={"kind": "taylorseer", "cache_interval": 3})
    picture = twin.run(photos[:1], num_inference_steps=STEPS)
    failing = twin.start(photos[:1], num_inference_steps=STEPS, seed=2)
    for _ in range(5):
        assert failing.advance()
    handle = twin.model.pipeline.transformer.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        failing.advance()
    handle.remove()

    assert not twin.model.pipeline.transformer.is_cache_enabled
    assert (twin.run(photos[:1], num_inference_steps=STEPS) == picture).all()


def fail(*_: object, **__: object) -> None:
    raise ZeroDivisionError


def test_only_one_run_of_an_exclusive_model_is_open(load_with: LoadWith, photos: list[Image.Image]) -> None:
    """A second run is refused while the first is open, and taken when it is not."""
    twin = load_with("kontext", cache={"kind": "magcache"})
    assert twin.model.spec.exclusive
    first = twin.start(photos[:1])
    with pytest.raises(RuntimeError, match="only one at a time"):
        twin.start(photos[:1])
    first.close()
    twin.start(photos[:1]).close()


def test_a_model_does_not_inherit_the_attention_of_another(
    load_with: LoadWith, plain: Callable[[str], np.ndarray], photos: list[Image.Image]
) -> None:
    """Of two twins in memory each computes attention as its own entry says, whichever was loaded last."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry

    before = _AttentionBackendRegistry.get_active_backend()[0]
    first = load_with("kontext")
    other = load_with("kontext", attention="_native_math")
    last = load_with("kontext")
    assert [backends(twin) for twin in (first, other, last)] == [{"native"}, {"_native_math"}, {"native"}]
    assert _AttentionBackendRegistry.get_active_backend()[0] == before
    with pytest.MonkeyPatch.context() as patch:
        # If only it were called, this would fail.
        patch.setitem(_AttentionBackendRegistry._backends, "native", fail)
        other.run(photos[:1])
        with pytest.raises(ZeroDivisionError):
            first.run(photos[:1])
    for twin in (first, last):
        assert (twin.run(photos[:1], num_inference_steps=STEPS) == plain("kontext")).all()


def backends(twin: Twin) -> set[str]:
    processors: list[Any] = [getattr(part, "processor", None) for part in twin.model.pipeline.transformer.modules()]
    return {one._attention_backend.value for one in processors if hasattr(one, "_attention_backend")}


def test_compiled_blocks_take_each_size_without_compiling_again(
    load_with: LoadWith,
    plain: Callable[[str], np.ndarray],
    photos: list[Image.Image],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The repeated blocks are captured whole, once each for all sizes; what they compute stays the same.

    The C++ compiler is left out, which takes minutes: the captured graphs are run as they are.
    """
    import torch
    from torch._dynamo.exc import FailOnRecompileLimitHit
    from torch._dynamo.utils import counters

    monkeypatch.setattr("pipelines.optimizations.COMPILE_BACKEND", "aot_eager")
    caplog.set_level("CRITICAL", logger="torch.__trace")
    torch._dynamo.reset()
    counters.clear()
    twin = load_with("kontext", compile="regional")
    picture = twin.run(photos[:1], num_inference_steps=STEPS)
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs > 0
    assert distance(picture, plain("kontext"))[0] <= 1
    twin.run(photos[:1], num_inference_steps=1, height=192, width=64, prompt="Another one.")
    assert counters["stats"]["unique_graphs"] == num_graphs
    torch._dynamo.reset()
    # The limit that is set here reaches the thread of a run.
    monkeypatch.setattr("pipelines.optimizations.RECOMPILE_LIMIT", 0)
    with pytest.raises(FailOnRecompileLimitHit):
        load_with("kontext", compile="regional").run(photos[:1], num_inference_steps=1)
    torch._dynamo.reset()


def test_loras_are_laid_over_a_quantized_model(
    load_with: LoadWith, photos: list[Image.Image], weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA changes a quantized model's pictures, and leaves none of it behind; its own numbers stay as they are."""
    import torch
    import torch._inductor.config

    from pipelines.running import LoraChoice
    from tests.integration.pipelines.lora_kit import lora_specs

    monkeypatch.setattr(torch._inductor.config, "coordinate_descent_tuning", False)
    bare = load_with("qwen", quantization="int8").run(photos[:1])
    assert not torch._inductor.config.coordinate_descent_tuning, "the settings of torch's compiler are not a model's"
    twin = load_with("qwen", quantization="int8", loras=lora_specs(weights_dir, "qwen"))
    request = twin.request(photos[:1])
    with_lora = replace(request, loras=(LoraChoice(twin.model.spec.loras[0].id, 1.0),))
    pictures = []
    for one in (request, with_lora, request):
        run = twin.model.start(photos[:1], one, num_threads=1)
        while run.advance():
            pass
        pictures.append(twin.pixels(run))
    assert (pictures[0] == bare).all()
    assert (pictures[1] != bare).any()
    assert (pictures[2] == bare).all()
    names = [
        name
        for name, value in twin.model.pipeline.transformer.named_parameters()
        if type(value) is not torch.nn.Parameter
    ]
    assert names
    assert not [name for name in names if "lora_" in name]


def assert_counted_as_loaded(twin: Twin) -> None:
    """The plan of an entry counts the bytes of the transformer that its optimizations leave, to the byte."""
    from pipelines.architectures import architecture_of_folder
    from pipelines.counting import size_model

    spec = twin.model.spec
    size = size_model(spec, architecture_of_folder(spec.weights_dir), num_photos=1)
    counted = {one.name: one.weights_bytes for one in size.components}
    assert counted["transformer"] == stored_bytes(twin.model.pipeline.transformer)


def stored_bytes(module: Any) -> int:
    """Sum up the tensors that a module really keeps; what quantization made of one is several."""
    total_bytes, waiting = 0, list(module.state_dict().values())
    while waiting:
        tensor = waiting.pop()
        inner = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        waiting += [getattr(tensor, one) for one in inner]
        total_bytes += 0 if inner else tensor.numel() * tensor.element_size()
    return total_bytes


@pytest.mark.parametrize("offload", ["model", "group"])
def test_offloaded_weights_are_planned_for_while_they_are_used(load_with: LoadWith, offload: str) -> None:
    """An offloaded model holds no memory of the device between runs, and is freed when it is closed."""
    from pipelines.architectures import architecture_of_folder
    from pipelines.counting import size_model

    twin = load_with("kontext", offload=offload)
    spec = twin.model.spec
    architecture = architecture_of_folder(spec.weights_dir)
    size = size_model(spec, architecture, num_photos=1)
    whole = size_model(replace(spec, optimizations=Optimizations()), architecture, num_photos=1)
    weights = {one.name: one.weights_bytes for one in whole.components}
    assert size.memory.weights_bytes == 0
    assert size.memory.activation_bytes > whole.memory.activation_bytes
    if offload == "model":
        assert size.moved["denoising"] == weights["transformer"]
    assert max(size.moved.values()) <= max(weights.values())

    transformer = weakref.ref(twin.model.pipeline.transformer)
    twin.model.close()
    assert transformer() is None


@pytest.mark.parametrize(
    ("name", "optimizations", "device", "problem"),
    [
        ("pix2pix", {"quantization": "int8"}, "cpu", "quantization: int8 is done to a transformer, and StableDif"),
        ("kontext", {"attention": "flash"}, "cpu", "attention: flash needs CUDA; on cpu there are native, _native_fl"),
        ("kontext", {"attention": "xformers"}, "cuda", "attention: xformers cannot be used: .*xformers"),
        ("kontext", {"compile": "regional"}, "cpu", "compile: regional needs a C\\+\\+ compiler: g\\+\\+ or clang"),
        ("kontext", {"quantization": "fp8"}, "cpu", "quantization: fp8 needs the package torchao"),
        (
            "kontext",
            {"attention": "_native_cudnn"},
            "cuda",
            "_native_cudnn needs compute capability 8.0, and cuda has 7.5",
        ),
        ("kontext", {"attention": "_native_flash"}, "cuda", "_native_flash needs compute capability 8.0, and cuda has"),
        (
            "kontext",
            {"attention": "_native_flash"},
            "cuda, float32",
            "computes in bfloat16 or float16 on CUDA, and the",
        ),
        (
            "kontext",
            {"attention": "_native_math"},
            "cuda",
            "_native_math is not for CUDA: it holds every token's score",
        ),
        ("kontext", {"attention": "flex"}, "cuda", "flex is for CUDA only with compile: regional"),
        ("kontext", {"compile": "regional", "quantization": "fp8"}, "cuda", "capability 8.9, and cuda has 7.5"),
    ],
)
def test_what_cannot_be_done_here_is_told_before_the_model_is_loaded(
    load_twin: Callable[[str], Twin],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    optimizations: dict[str, Any],
    device: str,
    problem: str,
) -> None:
    """What the class, the machine or its packages lack is said in one line, with the model and the optimization."""
    from pipelines.optimizations import check_optimizations

    twin = load_twin(name)
    device, _, dtype = device.partition(", ")
    wanted = Optimizations.model_validate(optimizations)
    spec = replace(twin.model.spec, optimizations=wanted, dtype=dtype or "bfloat16")
    if device == "cuda":
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    elif "attention" not in optimizations:
        monkeypatch.setattr("shutil.which", lambda _: None)
        monkeypatch.setattr("pipelines.optimizations._is_installed", lambda _: False)
    with pytest.raises(OptimizationUnavailable, match=problem) as caught:
        check_optimizations(spec, twin.model.pipeline, device)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{spec.id}: optimizations.")


def test_compiling_needs_the_headers_of_python(
    load_twin: Callable[[str], Twin], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without them it is refused, with the folder that was looked into; with them flex is taken on CUDA too."""
    from pipelines.optimizations import check_optimizations

    twin = load_twin("kontext")
    wanted = Optimizations.model_validate({"compile": "regional", "attention": "flex"})
    spec = replace(twin.model.spec, optimizations=wanted)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr("shutil.which", str)
    monkeypatch.setattr("pipelines.optimizations._is_installed", lambda _: True)
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(OptimizationUnavailable, match=f"compile: regional needs the headers of Python: {tmp_path} has"):
        check_optimizations(spec, twin.model.pipeline, "cuda")
    (tmp_path / "Python.h").touch()
    check_optimizations(spec, twin.model.pipeline, "cuda")
