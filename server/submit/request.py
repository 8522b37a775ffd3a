"""What a client may write into `POST /v1/batches`, and how an item's settings lie over the shared ones."""

import hashlib
import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from server.config.allowed import shown
from server.jobs import OutputSpec
from server.model_entry import MAX_PARAMS, merge_params

# The way to a value within an item: names of fields, and places in lists.
Place = tuple[str | int, ...]

TOO_MANY_ITEMS = "too_many_items"
MAX_LORAS = 8
MAX_METADATA_ENTRIES = 64
MAX_METADATA_NAME_CHARACTERS = 64
ShortText = Annotated[str, Field(max_length=255)]


def _check_count(value: object, info: ValidationInfo) -> object:
    """Refuse a list that is too long before its entries are looked at: each could cost an error of its own."""
    context: dict[str, int] = info.context or {}
    limit, count = context.get("max_items"), _length(value)
    if limit is not None and count > limit:
        raise PydanticCustomError(
            TOO_MANY_ITEMS,
            "at most {limit} are allowed in one request, not {count}",
            {"limit": limit, "count": count},
        )
    return value


def _length(value: object) -> int:
    return len(cast("list[object]", value)) if isinstance(value, list) else 0


def _check_params(value: object) -> object:
    """Refuse what no model can read before it is laid over the defaults of model and LoRAs, for each item again."""
    if isinstance(value, dict) and len(cast("dict[str, object]", value)) > MAX_PARAMS:
        raise PydanticCustomError(
            "too_many_entries",
            "holds {count} parameters; at most {limit} are read",
            {"limit": MAX_PARAMS, "count": len(cast("dict[str, object]", value))},
        )
    return cast("object", value)


# How many a list may hold is a setting, which whoever validates passes as `context["max_items"]`.
CountChecked = BeforeValidator(_check_count)


def _check_names(value: object) -> object:
    """Look at number and names before the values: pydantic would tell each name with a place that no pointer has."""
    if not isinstance(value, dict):
        return value
    entries = cast("dict[str, object]", value)
    if len(entries) > MAX_METADATA_ENTRIES:
        raise PydanticCustomError(
            "too_many_entries",
            "at most {limit} entries are allowed, not {count}",
            {"limit": MAX_METADATA_ENTRIES, "count": len(entries)},
        )
    for name in entries:
        if not 1 <= len(name) <= MAX_METADATA_NAME_CHARACTERS:
            raise PydanticCustomError(
                "name_length",
                "a name has 1 to {limit} characters; {name} has {count}",
                {"limit": MAX_METADATA_NAME_CHARACTERS, "name": shown(name), "count": len(name)},
            )
    return entries


Metadata = Annotated[
    dict[str, Annotated[str, Field(max_length=1024)]],
    Field(
        max_length=MAX_METADATA_ENTRIES,
        description=f"The client's own. At most {MAX_METADATA_ENTRIES} entries, names of 1 to "
        f"{MAX_METADATA_NAME_CHARACTERS} characters, values of at most 1,024.",
    ),
    BeforeValidator(_check_names),
]


class RequestModel(BaseModel):
    """What all request bodies share: no field that nobody reads, and no silent change of type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class OutputRequest(RequestModel):
    """How a result is to be written."""

    format: Literal["webp", "png", "jpeg"] | None = Field(default=None, description="webp when left out.")
    quality: int | None = Field(default=None, ge=1, le=100, description="Of webp and jpeg; 80 when left out.")
    size: Literal["model", "input"] | None = Field(
        default=None, description="As the model made it (when left out), or scaled to the photo's own pixels."
    )
    metadata: bool | None = Field(
        default=None,
        description="Whether the file says how it was made (when left out, it does): as XMP, a mark that a generative "
        "model edited the photo, and the job's record.",
    )


class LoraRequest(RequestModel):
    """An addition to a model's weights, and how strongly it works."""

    id: str = Field(description="One of the model's `loras`.")
    scale: float = Field(default=1.0, ge=-2, le=2)


class ItemSettings(RequestModel):
    """What may stand in an item and in `defaults`. A null in an item takes the shared setting away."""

    model: str | None = Field(default=None, description="The server's default model when left out.")
    room_type: str | None = Field(default=None, description="`default` when left out.")
    style: str | None = Field(default=None, description="`modern` when left out.")
    prompt: str | None = Field(default=None, description="Replaces the prompt of room type and style.")
    negative_prompt: str | None = Field(default=None, description="Only for models that have one.")
    params: Annotated[dict[str, Any] | None, BeforeValidator(_check_params)] = Field(
        default=None, description="Of the model; see `params_schema` of the model."
    )
    loras: list[LoraRequest] | None = Field(
        default=None, max_length=MAX_LORAS, description="An item's list replaces the shared one; ids differ."
    )
    output: OutputRequest | None = None

    @field_validator("loras")
    @classmethod
    def _check_loras_differ(cls, loras: list[LoraRequest] | None) -> list[LoraRequest] | None:
        ids = [lora.id for lora in loras or ()]
        twice = [one for one in ids if ids.count(one) > 1]
        if twice:
            raise PydanticCustomError("lora_twice", "names {id} more than once", {"id": shown(twice[0])})
        return loras


class ItemRequest(ItemSettings):
    """One photo to be staged; `upload_ids` for models that read several photos at once."""

    upload_id: str | None = None
    upload_ids: list[str] | None = Field(default=None, min_length=1, max_length=16)
    file: str | None = Field(
        default=None, max_length=255, description="In a form only: the name of the part that holds the photo."
    )
    name: ShortText | None = Field(default=None, description="Names the result; not unique.")
    metadata: Metadata = Field(default_factory=dict[str, str])

    @model_validator(mode="after")
    def _check_one_source(self) -> "ItemRequest":
        if sum(source is not None for source in (self.upload_id, self.upload_ids, self.file)) != 1:
            raise PydanticCustomError("upload_needed", "needs either upload_id or upload_ids, or in a form file")
        return self

    @property
    def sources(self) -> list[str]:
        """The ids of the item's uploads, in order; none where a file of the form is to become one."""
        if self.file is not None:
            return []
        return self.upload_ids if self.upload_ids is not None else [self.upload_id or ""]

    @property
    def photo_places(self) -> list[Place]:
        """Where in the item each of its photos is named, in order."""
        if self.file is not None:
            return [("file",)]
        if self.upload_ids is not None:
            return [("upload_ids", number) for number in range(len(self.upload_ids))]
        return [("upload_id",)]


class WebhookRequest(RequestModel):
    """Whom to tell when the batch has finished."""

    url: str = Field(min_length=1, max_length=2048, description="By https; http only to hosts that the server allows.")


class BatchRequest(RequestModel):
    """Photos to be staged together, with shared settings and settings of their own."""

    defaults: ItemSettings = Field(default=ItemSettings(), description="For items that do not say otherwise.")
    items: Annotated[list[ItemRequest], Field(min_length=1), CountChecked]
    label: ShortText | None = None
    metadata: Metadata = Field(default_factory=dict[str, str])
    priority: Literal["high", "normal", "low"] = "normal"
    webhook: WebhookRequest | None = Field(default=None, description="Gets a signed POST when the batch has finished.")


def merge_settings(defaults: ItemSettings, item: ItemSettings) -> ItemSettings:
    """Lay an item's settings over the shared ones: field by field, also inside `params` and `output`."""
    merged = _given(defaults) | _given(item)
    if defaults.params is not None and item.params is not None:
        params = merge_params(defaults.params, item.params)
        # A null that has taken something away has done its work, even where the item's model knows no such parameter.
        taken = {name for name, value in item.params.items() if value is None and name in defaults.params}
        merged["params"] = {name: value for name, value in params.items() if name not in taken}
    if defaults.output is not None and item.output is not None:
        merged["output"] = OutputRequest(**(_given(defaults.output) | _given(item.output)))
    # Each value was checked where it stood, and together they need not keep the bounds of one place.
    return ItemSettings.model_construct(
        **{name: value for name, value in merged.items() if name in ItemSettings.model_fields}
    )


def output_spec(request: OutputRequest | None) -> OutputSpec:
    """Fill in what a request leaves open about its result."""
    given = {} if request is None else _given(request)
    return OutputSpec(**{name: value for name, value in given.items() if value is not None})


def _given(model: RequestModel) -> dict[str, Any]:
    """The fields that the client wrote, also as null."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def fingerprint(request: BatchRequest, files: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the sha256 of what the client wrote, whatever the order of its fields and its white space.

    Args:
        request: without files, two requests that mean the same have the same fingerprint.
        files: name of the part → sha256 of each file that was sent in the same request.
    """
    body = request.model_dump(exclude_unset=True)
    written = json.dumps([body, dict(files)] if files else body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()
