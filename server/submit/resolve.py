"""Turns one item of a request into a job: model, prompt and parameters first, sizes once the photo is known."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.errors import BadInput
from pipelines.sizes import MAX_OUTPUT_SIDES, SizeParams, check_photo_size
from server.config.allowed import shown, suggest
from server.errors import RequestError
from server.jobs import Job, JobInput, OutputSpec, Priority
from server.model_entry import ModelEntry
from server.prompts import Prompts
from server.registry import Registry
from server.submit.refusals import ItemRefused, about
from server.submit.request import ItemRequest, ItemSettings, LoraRequest, Place, merge_settings, output_spec

DEFAULT_ROOM_TYPE = "default"
DEFAULT_STYLE = "modern"
_SEED_BITS = 32


class InvalidPrompt(RequestError):
    """Raised when a prompt is empty or longer than `limits.max_prompt_characters`."""

    code = "invalid_prompt"
    title = "The prompt cannot be used"
    http_status = 422


class NegativePromptNotSupported(RequestError):
    """Raised when a negative prompt is given to a model that has none."""

    code = "negative_prompt_not_supported"
    title = "The model has no negative prompt"
    http_status = 422


class UnknownLora(RequestError):
    """Raised when an item names a LoRA that its model does not have."""

    code = "unknown_lora"
    title = "The model has no such LoRA"
    http_status = 422


class InvalidLoras(RequestError):
    """Raised when the LoRAs that an item names cannot be used in that way."""

    code = "invalid_loras"
    title = "The LoRAs cannot be used so"
    http_status = 422


class ModelRetired(RequestError):
    """Raised when an item names a model that only finishes what it has."""

    code = "model_retired"
    title = "The model takes no new jobs"
    http_status = 422


class TooManyPhotos(RequestError):
    """Raised when an item names more photos than its model reads at once."""

    code = "too_many_photos"
    title = "Too many photos for the model"
    http_status = 422


class UnusableShape(RequestError):
    """Raised when a photo's sides are in a proportion that its model cannot run."""

    code = "unusable_shape"
    title = "The photo's shape cannot be used"
    http_status = 422


@dataclass(frozen=True)
class Draft:
    """An item whose every setting is known but for what depends on its photos.

    `file` is the part of the form whose upload is yet to be named in `upload_ids`; `photo_places` says for each photo
    where the item names it.
    """

    index: int
    upload_ids: tuple[str, ...]
    file: str | None
    entry: ModelEntry
    params: SizeParams
    prompt: str
    negative_prompt: str | None
    loras: tuple[LoraRequest, ...]
    output_spec: OutputSpec
    photo_places: tuple[Place, ...]
    name: str | None
    metadata: dict[str, str]

    def complete(self, inputs: Sequence[JobInput], *, owner: str, priority: Priority) -> Job:
        """Make the job; its parameters name height, width and seed even where the request did not.

        Args:
            inputs: the photos in the order of `upload_ids`; the first one decides on the size.
            owner: whose job it is.
            priority: of the batch.

        Raises:
            ItemRefused: a photo is too narrow for the model, or too long for the format it shall be written in.
        """
        first = inputs[0]
        if self.output_spec.size == "input":
            self._check_result(first.height, first.width, "ask for png, or for the model's own size")
        for photo, place in zip(inputs, self.photo_places, strict=True):
            with about(*place):
                _check_shape(photo, self.params.MAX_PHOTO_RATIO)
        params = self.params.resolved(first.height, first.width, self.entry.area, secrets.randbits(_SEED_BITS))
        if self.output_spec.size == "model":
            self._check_result(params["height"], params["width"], "ask for png")
        return Job(
            id=secrets.token_hex(16),
            batch_id="",
            index=self.index,
            owner=owner,
            model=self.entry.id,
            model_version=self.entry.version,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            params=params,
            loras=tuple(lora.model_dump() for lora in self.loras),
            inputs=tuple(inputs),
            output_spec=self.output_spec,
            name=self.name,
            metadata=self.metadata,
            priority=priority,
        )

    def _check_result(self, height: int, width: int, remedy: str) -> None:
        longest = MAX_OUTPUT_SIDES[self.output_spec.format]
        if max(height, width) > longest:
            detail = (
                f"{self.output_spec.format} holds at most {longest} pixels a side, and the result would have "
                f"{width} x {height}; {remedy}"
            )
            raise ItemRefused(UnusableShape(detail), ("output", "size"))


class Resolver:
    """Knows the models, the prompts and the limits that an item is resolved against."""

    def __init__(self, registry: Registry, prompts: Prompts, *, default_model: str, max_prompt_characters: int) -> None:
        self._registry = registry
        self._prompts = prompts
        self._default_model = default_model
        self._max_prompt_characters = max_prompt_characters

    def draft(self, index: int, item: ItemRequest, defaults: ItemSettings) -> Draft:
        """Decide all that can be decided without the photo.

        Raises:
            ItemRefused: the item asks for something that there is not.
        """
        settings = merge_settings(defaults, item)
        entry = self._entry(settings)
        if len(item.sources) > entry.max_input_images:
            detail = (
                f"model {entry.id} reads at most {entry.max_input_images} photo(s) at once, not {len(item.sources)}"
            )
            raise ItemRefused(TooManyPhotos(detail), ("upload_ids",))
        loras = _loras(settings, entry)
        with about("params"):
            chosen = [lora for one in loras if (lora := entry.lora(one.id))]
            params = entry.resolve_params(settings.params or {}, chosen)
        return Draft(
            index=index,
            upload_ids=tuple(item.sources),
            file=item.file,
            entry=entry,
            params=params,
            # The preset is rendered even where a prompt replaces it: a mistyped room type must not pass unseen.
            prompt=self._prompt(settings, self._preset(settings, entry)),
            negative_prompt=self._negative_prompt(settings, entry, params),
            loras=loras,
            output_spec=output_spec(settings.output),
            photo_places=tuple(item.photo_places),
            name=item.name,
            metadata=item.metadata,
        )

    @about("model")
    def _entry(self, settings: ItemSettings) -> ModelEntry:
        entry = self._registry.get(settings.model if settings.model is not None else self._default_model)
        if entry.retired:
            others = [one.id for one in self._registry if not one.retired]
            raise ModelRetired(f"model {entry.id} takes no new jobs; there are {', '.join(others)}")
        return entry

    @about()
    def _preset(self, settings: ItemSettings, entry: ModelEntry) -> str:
        return self._prompts.render(
            DEFAULT_ROOM_TYPE if settings.room_type is None else settings.room_type,
            DEFAULT_STYLE if settings.style is None else settings.style,
            entry.presets,
        )

    @about("prompt")
    def _prompt(self, settings: ItemSettings, preset: str) -> str:
        if settings.prompt is None:
            return preset
        self._check_length("prompt", settings.prompt)
        if not settings.prompt.strip():
            raise InvalidPrompt("prompt is empty; leave it out to take the one of room_type and style")
        return settings.prompt

    @about("negative_prompt")
    def _negative_prompt(self, settings: ItemSettings, entry: ModelEntry, params: SizeParams) -> str | None:
        if settings.negative_prompt is None:
            return None
        self._check_length("negative_prompt", settings.negative_prompt)
        if not entry.has_negative_prompt:
            raise NegativePromptNotSupported(
                f"model {entry.id} has no negative prompt; leave it out, or set it to null where `defaults` has one"
            )
        if settings.negative_prompt and not params.uses_negative_prompt:
            raise NegativePromptNotSupported(
                "a negative prompt has no effect while true_cfg_scale is 1; raise it, or leave the negative prompt out"
            )
        return settings.negative_prompt

    def _check_length(self, field: str, text: str) -> None:
        if len(text) > self._max_prompt_characters:
            raise InvalidPrompt(
                f"{field} has {len(text)} characters; at most {self._max_prompt_characters} are allowed"
            )


def _check_shape(photo: JobInput, max_ratio: int) -> None:
    try:
        check_photo_size(photo.height, photo.width, max_ratio)
    except BadInput as error:
        raise UnusableShape(str(error)) from error


def _loras(settings: ItemSettings, entry: ModelEntry) -> tuple[LoraRequest, ...]:
    known = [lora.id for lora in entry.loras]
    scheduling: list[str] = []
    for number, chosen in enumerate(settings.loras or ()):
        lora = entry.lora(chosen.id)
        if lora is None:
            detail = f"model {entry.id} has no LoRA {shown(chosen.id)}; {suggest(chosen.id, known)}"
            raise ItemRefused(UnknownLora(detail), ("loras", number, "id"))
        low, high = lora.scale
        if not low <= chosen.scale <= high:
            detail = f"scale of {lora.id} needs a number from {low} to {high}, not {shown(chosen.scale)}"
            raise ItemRefused(InvalidLoras(detail), ("loras", number, "scale"))
        if lora.scheduler:
            scheduling.append(lora.id)
        if len(scheduling) > 1:
            detail = f"{' and '.join(scheduling)} each need a schedule of their own; choose one of them"
            raise ItemRefused(InvalidLoras(detail), ("loras", number, "id"))
    return tuple(settings.loras or ())
