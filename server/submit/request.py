"""What a client may write into `POST /v1/batches`, and how an item's settings lie over the shared ones."""

import hashlib
import json
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from server.jobs import OutputSpec
from server.model_entry import merge_params

TOO_MANY_ITEMS = "too_many_items"
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


# How many a list may hold is a setting, which whoever validates passes as `context["max_items"]`.
CountChecked = BeforeValidator(_check_count)


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
        default=None, description="Reserved: whether the file shall hold the job's record. Nothing is written yet."
    )


class ItemSettings(RequestModel):
    """What may stand in an item and in `defaults`. A null in an item takes the shared setting away."""

    model: str | None = Field(default=None, description="The server's default model when left out.")
    room_type: str | None = Field(default=None, description="`default` when left out.")
    style: str | None = Field(default=None, description="`modern` when left out.")
    prompt: str | None = Field(default=None, description="Replaces the prompt of room type and style.")
    negative_prompt: str | None = Field(default=None, description="Only for models that have one.")
    params: dict[str, Any] | None = Field(default=None, description="Of the model; see `params_schema` of the model.")
    output: OutputRequest | None = None


class ItemRequest(ItemSettings):
    """One photo to be staged; `upload_ids` for models that read several photos at once."""

    upload_id: str | None = None
    upload_ids: list[str] | None = Field(default=None, min_length=1, max_length=16)
    name: ShortText | None = Field(default=None, description="Names the result; not unique.")
    metadata: dict[str, str] = Field(default_factory=dict[str, str])

    @model_validator(mode="after")
    def _check_one_source(self) -> "ItemRequest":
        if (self.upload_id is None) == (self.upload_ids is None):
            raise PydanticCustomError("upload_needed", "needs either upload_id or upload_ids")
        return self

    @property
    def sources(self) -> list[str]:
        """The ids of the item's uploads, in order."""
        return self.upload_ids if self.upload_ids is not None else [self.upload_id or ""]


class BatchRequest(RequestModel):
    """Photos to be staged together, with shared settings and settings of their own."""

    defaults: ItemSettings = Field(default=ItemSettings(), description="For items that do not say otherwise.")
    items: Annotated[list[ItemRequest], Field(min_length=1), CountChecked]
    label: ShortText | None = None
    metadata: dict[str, str] = Field(default_factory=dict[str, str])
    priority: Literal["high", "normal", "low"] = "normal"


def merge_settings(defaults: ItemSettings, item: ItemSettings) -> ItemSettings:
    """Lay an item's settings over the shared ones: field by field, also inside `params` and `output`."""
    merged = _given(defaults) | _given(item)
    if defaults.params is not None and item.params is not None:
        merged["params"] = merge_params(defaults.params, item.params)
    if defaults.output is not None and item.output is not None:
        merged["output"] = OutputRequest(**(_given(defaults.output) | _given(item.output)))
    return ItemSettings(**{name: value for name, value in merged.items() if name in ItemSettings.model_fields})


def output_spec(request: OutputRequest | None) -> OutputSpec:
    """Fill in what a request leaves open about its result."""
    given = {} if request is None else _given(request)
    return OutputSpec(**{name: value for name, value in given.items() if value is not None})


def _given(model: RequestModel) -> dict[str, Any]:
    """The fields that the client wrote, also as null."""
    return {name: getattr(model, name) for name in model.model_fields_set}


def fingerprint(request: BatchRequest) -> str:
    """Return the sha256 of what the client wrote, whatever the order of its fields and its white space."""
    written = json.dumps(request.model_dump(exclude_unset=True), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(written.encode()).hexdigest()
