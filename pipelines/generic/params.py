"""The parameters of any other class of diffusers that edits photos: those of its own call that the entry allows."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, create_model

from pipelines.errors import BadInput
from pipelines.generic.signatures import Argument, Signature, pipeline_names, read_signature
from pipelines.sizes import MULTIPLE_OF, SizeParams

__all__ = [
    "CALLBACK",
    "NEGATIVE_PROMPT",
    "NUM_STEPS",
    "GenericParams",
    "allowable_parameters",
    "check_shape",
    "has_step_callback",
    "params_of",
    "pipeline_names",
    "why_not_class",
    "why_not_parameter",
]

NUM_STEPS = "num_inference_steps"
NEGATIVE_PROMPT = "negative_prompt"
CALLBACK = "callback_on_step_end"
MAX_STEPS = 1000
# Of any number, so that a range is always told; an entry's limits narrow it to what the model can do.
MAX_NUMBER = 1_000_000
# What each run gives to the class, which must take it.
_GIVEN = ("image", "prompt", NUM_STEPS, "generator")
# What a class that takes them cannot do without, whatever its defaults say.
_NEVER_GIVEN = ("mask_image", "control_image")
# What no request sets by these names: Restage does, in its own way, or they would change what comes back.
_OWN = frozenset(SizeParams.model_fields) | {
    "image",
    "prompt",
    "generator",
    "output_type",
    "return_dict",
    "callback_steps",
    "num_images_per_prompt",
}


class GenericParams(SizeParams):
    """What a request may set on a model of any other class; `params_of` adds what the class takes."""

    # The field of a class may have any name, such as `model_scale`.
    model_config = ConfigDict(protected_namespaces=())

    # As many as could make sense; only the entry knows how many the class takes.
    MAX_INPUT_IMAGES: ClassVar[int] = 10
    # Whether the class can be told the size of its output; else that follows the photo.
    TAKES_SIZE: ClassVar[bool] = True

    def output_size(self, photo_height: int, photo_width: int, area: int) -> tuple[int, int]:
        """Decide the size of the output as `SizeParams.output_size` does, but never another shape than the class makes.

        Raises:
            BadInput: the photo is too narrow, or the output would have another shape than the photo, and the class
                cannot do that.
        """
        height, width = super().output_size(photo_height, photo_width, area)
        if not self.TAKES_SIZE and self.width is not None:
            check_shape(height, width, photo_height, photo_width)
        return height, width

    @classmethod
    def reading_sizes(
        cls, photo_height: int, photo_width: int, area: int, params: Mapping[str, Any], *, is_first: bool
    ) -> list[tuple[int, int]]:
        """Tell at which sizes a run reads a photo, as `SizeParams.reading_sizes` does."""
        if is_first and not cls.TAKES_SIZE:
            return [(params["height"], params["width"])]
        return super().reading_sizes(photo_height, photo_width, area, params, is_first=is_first)


def check_shape(height: int, width: int, photo_height: int, photo_width: int) -> None:
    """Refuse a size for which the photo would have to be stretched.

    Args:
        height: of the output, in pixels.
        width: likewise.
        photo_height: of the first photo with its orientation applied, in pixels.
        photo_width: likewise.

    Raises:
        BadInput: the shapes differ by more than what rounding to multiples of `MULTIPLE_OF` makes.
    """
    ratio = photo_width / photo_height
    if abs(width - height * ratio) > MULTIPLE_OF / 2 * (1 + ratio):
        raise BadInput(
            f"this model's output has the shape of the photo, and {width} x {height} is not that of "
            f"{photo_width} x {photo_height}: leave width and height out"
        )


def has_step_callback(pipeline: str) -> bool:
    """Tell whether a class calls back after each step; a run of one that does not is neither followed nor stopped."""
    signature = read_signature(pipeline)
    return signature is not None and CALLBACK in signature.arguments


def why_not_class(pipeline: str) -> str | None:
    """Say why the family cannot run a class of diffusers; None where it can.

    Args:
        pipeline: one of `pipeline_names()`.
    """
    signature = read_signature(pipeline)
    if signature is None:
        return "has no call of its own"
    lacking = [name for name in _GIVEN if name not in signature.arguments]
    if lacking:
        return f"takes no {lacking[0]}; the family generic needs a class that takes {', '.join(_GIVEN)}"
    wanted = [name for name, argument in signature.arguments.items() if _is_wanted(argument)]
    if wanted:
        return f"needs {wanted[0]}, which no job has"
    if not signature.returns_images:
        return "returns no images"
    return None


def allowable_parameters(pipeline: str) -> tuple[str, ...]:
    """List what an entry may allow of a class: its numbers, what is true or false, and the negative prompt."""
    signature = read_signature(pipeline) or Signature({}, returns_images=False)
    return tuple(name for name, argument in signature.arguments.items() if _why_not(argument) is None)


def why_not_parameter(pipeline: str, name: str) -> str | None:
    """Say why an entry may not allow an argument of a class; None where it may, or the class has no such argument."""
    signature = read_signature(pipeline)
    argument = signature.arguments.get(name) if signature else None
    return None if argument is None else _why_not(argument)


def params_of(pipeline: str, allow: tuple[str, ...]) -> type[GenericParams]:
    """Make the parameters of one entry.

    Numbers have no range of their own but what any number has: the entry's limits are their range.

    Args:
        pipeline: a class that `why_not_class` finds nothing against.
        allow: names, each of `allowable_parameters(pipeline)`; the number of steps is always allowed.

    Raises:
        ValueError: the class or a name cannot be used.
    """
    signature = read_signature(pipeline)
    if signature is None or why_not_class(pipeline) is not None:
        raise ValueError(f"{pipeline} {why_not_class(pipeline)}")
    unusable = sorted(set(allow) - set(allowable_parameters(pipeline)))
    if unusable:
        raise ValueError(f"{pipeline}: {', '.join(unusable)} cannot be allowed")
    takes_size = {"height", "width"} <= signature.arguments.keys()
    params_model = create_model(
        "Params",
        __base__=GenericParams,
        __doc__=f"What a request may set on a {pipeline}.",
        **_make_fields(signature, pipeline, allow, takes_size=takes_size),
    )
    params_model.PIPELINES = (pipeline,)
    params_model.HAS_NEGATIVE_PROMPT = NEGATIVE_PROMPT in allow
    params_model.REPORTS_STEPS = CALLBACK in signature.arguments
    params_model.TAKES_SIZE = takes_size
    return params_model


def _make_fields(signature: Signature, pipeline: str, allow: tuple[str, ...], *, takes_size: bool) -> dict[str, Any]:
    names = dict.fromkeys((NUM_STEPS, *allow))
    fields = {name: _make_field(signature.arguments[name], pipeline) for name in names if name != NEGATIVE_PROMPT}
    if not takes_size:
        description = "The output has the shape of the photo."
        fields["aspect_ratio"] = (Literal["match_input"], Field(default="match_input", description=description))
    return fields


def _is_wanted(argument: Argument) -> bool:
    return argument.name in _NEVER_GIVEN or (argument.is_required and argument.name not in _GIVEN)


def _why_not(argument: Argument) -> str | None:
    name = argument.name
    if name == NEGATIVE_PROMPT:
        return None
    if name in _OWN:
        return "is set by Restage itself"
    if name.startswith("_"):
        return "is an inner matter of the class"
    if argument.kind is str:
        return "is text, which has no limits; only numbers, true or false, and negative_prompt can be allowed"
    if argument.kind is None:
        return "is no plain value; only numbers, true or false, and negative_prompt can be allowed"
    return None


def _make_field(argument: Argument, pipeline: str) -> tuple[Any, Any]:
    kind: Any = argument.kind
    description = argument.description or f"{argument.name} of {pipeline}'s own call."
    if kind is bool:
        rules: dict[str, Any] = {}
    elif argument.name == NUM_STEPS:
        rules = {"ge": 1, "le": MAX_STEPS}
    else:
        rules = {"ge": -MAX_NUMBER, "le": MAX_NUMBER}
    if kind is float:
        rules["allow_inf_nan"] = False
    if argument.default is None:
        kind |= None
    return kind, Field(default=argument.default, description=description, **rules)
