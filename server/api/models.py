"""`/v1/models` and `/v1/presets`: what can be asked for, and whether it would run now."""

from typing import Annotated, Any

from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromPath, QueryParameter
from pydantic import Field

from server.api.errors import problems
from server.api.services import Services
from server.api.views import View
from server.ledger.status import ModelStatus
from server.model_entry import LoraEntry, ModelEntry
from server.prompts import ROOM_TYPES, STYLES


class LoraView(View):
    """A LoRA that a job may lay over its model."""

    id: str
    name: str
    description: str
    license: str
    scale: list[float] = Field(description="Lowest and highest `scale` that a job may ask for.")
    defaults: dict[str, Any] = Field(description="Parameters for jobs that choose it and do not say otherwise.")


class ModelView(View):
    """A model, in the shape that OpenAI clients know, and more."""

    id: str
    object: str
    created: int = Field(description="Not recorded: always 0.")
    owned_by: str
    name: str
    description: str
    version: str
    license: str
    license_note: str | None = Field(description="What to know before its pictures are used.")
    source: dict[str, str] | None = Field(description="Where its weights come from: `repo` and `revision`.")
    revision: str | None = Field(description="Commit of the weights that workers have, if they say one and the same.")
    weights_sha256: str | None = Field(description="Digest of those weights' manifest, likewise.")
    retired: bool = Field(description="Whether it takes no new jobs.")
    reports_progress: bool = Field(
        description="Whether its jobs count their steps, and can be stopped between them; else only before they begin."
    )
    area: int = Field(description="Pixels the model was trained on; outputs have about as many.")
    defaults: dict[str, Any]
    limits: dict[str, Any]
    params_schema: dict[str, Any] = Field(description="JSON Schema of `params`.")
    loras: list[LoraView]
    ready: bool = Field(description="Whether a running worker serves it.")
    not_ready_reason: str | None
    resident_on: list[str] = Field(description="Workers that hold it in memory.")


class ModelList(View):
    """All models."""

    object: str
    data: list[ModelView]


class Preset(View):
    """The prompt of a room type in a style."""

    room_type: str
    style: str
    prompt: str


class PresetList(View):
    """All room types, styles, and their prompts."""

    room_types: list[str]
    styles: list[str]
    data: list[Preset]


@get("/models", tags=["Models"], summary="List the models", responses=problems())
async def list_models(services: NamedDependency[Services]) -> ModelList:
    """Answer all models, those too that no worker serves now."""
    statuses = await services.ledger.model_statuses(services.registry.ids)
    return ModelList(object="list", data=[_view(entry, statuses[entry.id]) for entry in services.registry])


@get("/models/{model_id:str}", tags=["Models"], summary="Read a model", responses=problems(404))
async def read_model(model_id: FromPath[str], services: NamedDependency[Services]) -> ModelView:
    """Answer one model."""
    entry = services.registry.get(model_id)
    statuses = await services.ledger.model_statuses([entry.id])
    return _view(entry, statuses[entry.id])


@get("/presets", tags=["Models"], summary="List the presets", responses=problems(404, 422), sync_to_thread=False)
def list_presets(
    services: NamedDependency[Services],
    model: Annotated[str | None, QueryParameter(description="Show the prompts as this model is given them.")] = None,
) -> PresetList:
    """Answer the room types, the styles and the prompt of each pair."""
    presets = None if model is None else services.registry.get(model).presets
    return PresetList(
        room_types=list(ROOM_TYPES),
        styles=list(STYLES),
        data=[
            Preset(room_type=room_type, style=style, prompt=services.prompts.render(room_type, style, presets))
            for room_type in ROOM_TYPES
            for style in STYLES
        ],
    )


def _view(entry: ModelEntry, status: ModelStatus) -> ModelView:
    return ModelView(
        id=entry.id,
        object="model",
        created=0,
        owned_by=entry.source.repo.partition("/")[0] if entry.source else "restage",
        name=entry.name,
        description=entry.description,
        version=entry.version,
        license=entry.license,
        license_note=entry.license_note,
        source=None if entry.source is None else {"repo": entry.source.repo, "revision": entry.source.revision},
        revision=status.revision,
        weights_sha256=status.weights_sha256,
        retired=entry.retired,
        reports_progress=entry.reports_progress,
        area=entry.area,
        defaults=entry.defaults,
        limits=entry.limits,
        params_schema=entry.params_schema,
        loras=[_lora_view(lora) for lora in entry.loras],
        ready=status.ready,
        not_ready_reason=status.reason,
        resident_on=list(status.resident_on),
    )


def _lora_view(lora: LoraEntry) -> LoraView:
    return LoraView(
        id=lora.id,
        name=lora.name,
        description=lora.description,
        license=lora.license,
        scale=lora.scale,
        defaults=lora.defaults,
    )
