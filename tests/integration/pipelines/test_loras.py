import random
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from pipelines import loading
from pipelines.errors import BadInput
from pipelines.loading import LoadedModel, load_model
from pipelines.loras import LoraSwitch
from pipelines.running import LoraChoice
from pipelines.tiny import loras as tiny_loras
from pipelines.weights import LoraSpec, ModelSpec
from tests.integration.pipelines.lora_kit import (
    FILES,
    LIGHTNING,
    LIGHTNING_SCHEDULER,
    STYLE,
    finish,
    lora_specs,
    paint,
    start,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=list(FILES))
def with_loras(request, weights_dir, load_twin):
    """Give each twin that has LoRAs, loaded with them."""
    plain = load_twin(request.param)
    model = load_model(replace(plain.model.spec, loras=lora_specs(weights_dir, request.param)), "cpu")
    yield replace(plain, model=model)
    model.close()


def paint_with_diffusers(twin, photos, loras=(), **changes):
    """Make the picture as a user of diffusers would: a pipeline of its own, which knows no LoRA but these."""
    specs = {lora.id: lora for lora in twin.model.spec.loras}
    pipeline = loading._read_pipeline(twin.model.spec)
    pipeline.set_progress_bar_config(disable=True)
    loading._pass_image_positions(pipeline)
    for number, choice in enumerate(loras):
        pipeline.load_lora_weights(str(specs[choice.id].file), adapter_name=f"own{number}")
        changed = specs[choice.id].scheduler if choice.scale else {}
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changed)
    if loras:
        pipeline.set_adapters([f"own{number}" for number in range(len(loras))], [choice.scale for choice in loras])
    return replace(twin, model=LoadedModel(twin.model.spec, pipeline)).call(photos, **changes)


def choices_of(twin):
    """List what jobs may ask for: nothing, each LoRA at several scales, several at once."""
    style = [(LoraChoice("style", scale),) for scale in (1.0, 0.3, -0.5, 0.0)]
    if twin.name == "kontext":
        return [(), *style]
    both = (LoraChoice("style", 0.7), LoraChoice("light.4", 1.2))
    return [(), *style, LIGHTNING, both, both[::-1], (LoraChoice("light.4", 0.0), STYLE[0])]


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_runs_in_any_order_are_those_of_fresh_models(with_loras, photos):
    """Whatever ran before, finished, cancelled or failed, a run makes the picture of a model with only its LoRAs."""
    twin = with_loras
    seed = random.randrange(10**6)
    print(f"seed {seed}")  # noqa: T201 (pytest shows it with a failure)
    chance = random.Random(seed)
    choices = choices_of(twin)
    steps = {"num_inference_steps": 3}
    expected = [paint_with_diffusers(twin, photos[:1], loras, **steps) for loras in choices]
    assert len({picture.tobytes() for picture in expected}) >= len(choices) - 2  # two of them are the model alone
    order = [*range(len(choices)), *chance.choices(range(len(choices)), k=6)]
    chance.shuffle(order)
    for number in order:
        disturb(chance, twin, photos, chance.choice(choices))
        assert np.array_equal(paint(twin, photos[:1], choices[number], **steps), expected[number])


def disturb(chance, twin, photos, loras):
    """Begin runs that are cancelled after some steps, or fail in one."""
    seeds = [chance.randrange(100) for _ in range(chance.randrange(3))]
    runs = [start(twin, photos[:1], loras, num_inference_steps=3, seed=seed) for seed in seeds]
    for run in runs:
        for _ in range(chance.randrange(3)):
            run.advance()
    if runs and chance.random() < 0.5:
        handle = twin.model.pipeline.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs[0].advance()
        handle.remove()
    for run in runs:
        run.close()


def test_model_alone_is_the_model_without_loras(with_loras, load_twin, photos):
    """A job without LoRAs gets, to the bit, the picture of a model that was loaded without any."""
    without = load_twin(with_loras.name).run(photos[:1])
    assert np.array_equal(paint(with_loras, photos[:1]), without)
    assert not np.array_equal(paint(with_loras, photos[:1], STYLE), without)
    assert np.array_equal(paint(with_loras, photos[:1]), without)


def test_runs_with_the_same_loras_take_turns(qwen_with_loras, photos):
    """Runs that use the same LoRAs at the same scales may be taken further in turns, and none disturbs another."""
    expected = [paint(qwen_with_loras, photos[:1], LIGHTNING, seed=seed) for seed in (1, 2)]
    runs = [start(qwen_with_loras, photos[:1], LIGHTNING, seed=seed) for seed in (1, 2)]
    while [run for run in runs if run.is_open and run.advance()]:
        pass
    assert all(np.array_equal(run.image, picture) for run, picture in zip(runs, expected, strict=True))


@pytest.mark.parametrize("other", [(), STYLE, (LoraChoice("light.4", 0.9),)], ids=["none", "another", "another scale"])
def test_other_loras_wait_for_open_runs(qwen_with_loras, photos, other):
    """While a run is open, one with other LoRAs is refused and changes nothing; after it, it starts."""
    expected = paint(qwen_with_loras, photos[:1], LIGHTNING)
    run = start(qwen_with_loras, photos[:1], LIGHTNING)
    run.advance()
    with pytest.raises(RuntimeError, match="a run with other LoRAs is open"):
        start(qwen_with_loras, photos[:1], other)
    assert np.array_equal(finish(run), expected)
    start(qwen_with_loras, photos[:1], other).close()


def test_run_that_was_never_advanced_holds_its_loras_until_it_is_closed(qwen_with_loras, photos):
    """A run is open from its start; closing it, or dropping it before its first step, lets others start."""
    run = start(qwen_with_loras, photos[:1], STYLE)
    with pytest.raises(RuntimeError, match="a run with other LoRAs is open"):
        start(qwen_with_loras, photos[:1])
    run.close()
    start(qwen_with_loras, photos[:1], STYLE)
    start(qwen_with_loras, photos[:1]).close()


@pytest.mark.parametrize("then", [STYLE, ()], ids=["the same", "none"])
def test_change_that_was_cut_short_is_done_again(qwen_with_loras, photos, monkeypatch, then):
    """When an error stops a change of LoRAs half-way, the next run does not trust what is there."""
    expected = paint(qwen_with_loras, photos[:1], then)
    paint(qwen_with_loras, photos[:1], LIGHTNING)
    with monkeypatch.context() as patched:
        patched.setattr(qwen_with_loras.model.pipeline, "set_adapters", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            start(qwen_with_loras, photos[:1], STYLE)
    assert np.array_equal(paint(qwen_with_loras, photos[:1], then), expected)


@pytest.mark.parametrize(
    ("num_steps", "sigmas"),
    [(4, [1, 0.9, 0.75, 0.5, 0]), (8, [1, 21 / 22, 0.9, 5 / 6, 0.75, 9 / 14, 0.5, 0.3, 0])],
)
def test_lightning_runs_on_its_own_noise_levels(qwen_with_loras, photos, num_steps, sigmas):
    """With Lightning the noise falls as it was trained, whatever the size; without it, and after it, as the model's."""
    for size in ({"aspect_ratio": "1:1"}, {"width": 256, "height": 64}):
        run = start(qwen_with_loras, photos[:1], LIGHTNING, num_inference_steps=num_steps, **size)
        run.advance()
        assert run._pipeline.scheduler.sigmas.tolist() == pytest.approx(sigmas, abs=1e-6)
        run.close()
    run = start(qwen_with_loras, photos[:1], STYLE, num_inference_steps=4)
    run.advance()
    assert run._pipeline.scheduler.sigmas.tolist()[-2:] == pytest.approx([0.02, 0], abs=1e-6)
    run.close()


def test_shipped_lightning_asks_for_its_noise_levels(shipped_entries):
    """Every Lightning LoRA of the registry has the scheduler, steps and guidance that it was trained for."""
    lightning = [lora for entry in shipped_entries for lora in entry.loras if "lightning" in lora.id]
    assert len(lightning) == 7
    for lora in lightning:
        assert lora.scheduler == LIGHTNING_SCHEDULER
        assert lora.defaults == {"num_inference_steps": 8 if "8steps" in lora.id else 4, "true_cfg_scale": 1.0}


@pytest.fixture(scope="module")
def shipped_entries():
    """Give all models of the shipped registry."""
    from server.model_entry import ModelEntry

    content = yaml.safe_load((REPOSITORY / "config" / "models.yaml").read_text())
    return [ModelEntry.model_validate(entry) for entry in content]


def test_shipped_twins_load_with_their_loras(shipped_entries, weights_dir):
    """The LoRAs that the registry names for the twins are those that are written, and they fit."""
    found = {entry.id: entry for entry in shipped_entries if entry.id in tiny_loras.LORAS_OF}
    assert found.keys() == tiny_loras.LORAS_OF.keys()
    for entry in found.values():
        files = [weights_dir / lora.weights for lora in entry.loras]
        assert [file.stem for file in files] == list(tiny_loras.LORAS_OF[entry.id])
        loras = tuple(LoraSpec(lora.id, file, lora.scheduler) for lora, file in zip(entry.loras, files, strict=True))
        place = weights_dir / entry.weights
        load_model(ModelSpec(entry.id, entry.family, entry.pipeline, place, "float32", 128 * 128, loras), "cpu").close()


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ([("oak", 1.0)], "this model has no LoRA oak; it has light.4, style"),
        ([("style", 1.0), ("style", 0.5)], "the LoRA style is asked for twice"),
        ([("style", float("nan"))], "the LoRA style needs a number as its scale, not nan"),
        ([("style", float("inf"))], "the LoRA style needs a number as its scale, not inf"),
    ],
)
def test_loras_that_cannot_be_used_are_refused(qwen_with_loras, photos, loras, message):
    """An unknown LoRA, one that is asked for twice or at no number is the request's fault, and harms no other run."""
    expected = paint(qwen_with_loras, photos[:1])
    with pytest.raises(BadInput, match=message):
        start(qwen_with_loras, photos[:1], tuple(LoraChoice(*choice) for choice in loras))
    assert np.array_equal(paint(qwen_with_loras, photos[:1]), expected)


def test_model_without_loras_refuses_them(kontext, photos):
    """A model that has no LoRAs says so."""
    with pytest.raises(BadInput, match="this model has no LoRA style; it has none"):
        start(kontext, photos[:1], STYLE)


def test_only_one_lora_may_have_a_scheduler():
    """Of two LoRAs that were trained with schedulers of their own, only one can be had; at scale 0 it is no matter."""
    switch = LoraSwitch([LoraSpec(name, Path("none.safetensors"), LIGHTNING_SCHEDULER) for name in "ab"])
    with pytest.raises(BadInput, match="the LoRAs a and b each want a scheduler of their own: take one of them"):
        switch.resolve((LoraChoice("a", 1.0), LoraChoice("b", 0.5)))
    assert switch.resolve((LoraChoice("a", 1.0), LoraChoice("b", 0.0))) == (LoraChoice("a", 1.0),)


def test_any_id_is_possible(spec_with_loras, photos, load_twin):
    """An id may hold dots, or be a word that modules use themselves, and is no part of another id."""
    first = spec_with_loras.loras[1]
    ids = ("keys", "a.b-c_d", "training", "a", "lora_a")
    model = load_model(replace(spec_with_loras, loras=tuple(replace(first, id=name) for name in ids)), "cpu")
    twin = replace(load_twin("qwen"), model=model)
    pictures = [paint(twin, photos[:1], (LoraChoice(name, 1.0),)) for name in ids]
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)
    model.close()


def test_loras_have_the_models_precision(spec_with_loras):
    """Weights of a LoRA are kept in the precision of the model, whatever their file has."""
    model = load_model(replace(spec_with_loras, dtype="bfloat16"), "cpu")
    found = {value.dtype for name, value in model.pipeline.transformer.named_parameters() if "lora_" in name}
    assert found == {torch.bfloat16}
    model.close()


def test_closed_model_frees_its_loras_and_can_be_loaded_again(spec_with_loras, photos, load_twin):
    """After close nothing holds a LoRA; loaded again, the model makes the same pictures."""
    pictures = []
    for _ in range(2):
        model = load_model(spec_with_loras, "cpu")
        pictures.append(paint(replace(load_twin("qwen"), model=model), photos[:1], LIGHTNING))
        adapters = [
            weakref.ref(value) for name, value in model.pipeline.transformer.named_parameters() if "lora_" in name
        ]
        assert len(adapters) == 88
        model.close()
        assert [adapter() for adapter in adapters] == [None] * len(adapters)
    assert np.array_equal(*pictures)
