"""What a pipeline class of diffusers can be asked for, read from its source: importing diffusers would load torch."""

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# The types of arguments that have a plain value.
KINDS: Mapping[str, type] = {"bool": bool, "int": int, "float": float, "str": str}
_MAX_DESCRIPTION = 300


@dataclass(frozen=True)
class Argument:
    """One argument of a class's `__call__`.

    Attributes:
        name: as it is passed.
        kind: the plain type that it takes; None where it takes others, or several.
        default: its plain default; None also where there is another or none.
        is_required: whether it has no default at all.
        description: the first sentence that the class's own documentation says of it; may be empty.
    """

    name: str
    kind: type | None
    default: bool | float | str | None
    is_required: bool
    description: str


@dataclass(frozen=True)
class Signature:
    """How a class is called.

    Attributes:
        arguments: by name, in order.
        returns_images: whether what it returns has `images`; a video has `frames`.
    """

    arguments: Mapping[str, Argument]
    returns_images: bool


@cache
def pipeline_names() -> tuple[str, ...]:
    """List the classes of pipelines that diffusers has; modular ones are called in another way."""
    exported = re.findall(r'"(\w+Pipeline)"', (_package() / "__init__.py").read_text("utf-8"))
    return tuple(sorted({name for name in exported if not name.endswith("ModularPipeline")}))


@cache
def read_signature(pipeline: str) -> Signature | None:
    """Read how a class is called, from its source and those of its base classes.

    Args:
        pipeline: name of the class, such as `StableDiffusionInstructPix2PixPipeline`.

    Returns:
        None where diffusers has no such class, or none that can be called.
    """
    if pipeline not in pipeline_names():
        return None
    call = _find_call(pipeline)
    if call is None:
        return None
    documentation = ast.get_docstring(call) or ""
    arguments = {argument.name: argument for argument in _read_arguments(call.args, documentation)}
    returned = [node for node in ast.walk(call) if isinstance(node, ast.Call)]
    return Signature(arguments, any(keyword.arg == "images" for node in returned for keyword in node.keywords))


@cache
def _package() -> Path:
    found = importlib.util.find_spec("diffusers")  # looks for it, and does not run it
    if found is None or found.origin is None:
        raise ModuleNotFoundError("diffusers is not installed: `pip install restage` brings it")
    return Path(found.origin).parent


def _find_call(class_name: str) -> ast.FunctionDef | None:
    found = _find_class(class_name)
    if found is None:
        return None
    for statement in found.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__call__":
            return statement
    inherited = (_find_call(base.id) for base in found.bases if isinstance(base, ast.Name))
    return next((call for call in inherited if call is not None), None)


def _find_class(class_name: str) -> ast.ClassDef | None:
    file = _files_of_classes().get(class_name)
    statements = [] if file is None else ast.parse(file.read_bytes()).body
    classes = (statement for statement in statements if isinstance(statement, ast.ClassDef))
    return next((found for found in classes if found.name == class_name), None)


@cache
def _files_of_classes() -> dict[str, Path]:
    # Split, not parsed: to parse all the files takes seconds.
    return {
        beginning[0].decode(): file
        for file in _package().glob("pipelines/**/*.py")
        for text in file.read_bytes().split(b"\nclass ")[1:]
        if (beginning := re.match(rb"\w+", text)) is not None
    }


def _read_arguments(arguments: ast.arguments, documentation: str) -> Iterator[Argument]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*arguments.defaults]
    defaults = [None] * (len(positional) - len(defaults)) + defaults
    given = zip([*positional, *arguments.kwonlyargs], [*defaults, *arguments.kw_defaults], strict=True)
    for argument, default in list(given)[1:]:  # the first is `self`
        is_plain, value = _plain_value(default)
        kind = _plain_kind(argument.annotation, value) if is_plain else None
        yield Argument(argument.arg, kind, value, default is None, _describe(documentation, argument.arg))


def _plain_value(default: ast.expr | None) -> tuple[bool, Any]:
    if default is None:
        return True, None
    try:
        value = ast.literal_eval(default)
    except ValueError:
        return False, None  # such as a constant of the module
    is_plain = value is None or type(value) in KINDS.values()
    return is_plain, value if is_plain else None


def _plain_kind(annotation: ast.expr | None, default: Any) -> type | None:
    if annotation is None:
        return type(default) if type(default) in KINDS.values() else None
    names = {name for name in _union(annotation) if name != "None"}
    if names == {"int", "float"} or (names == {"int"} and type(default) is float):
        return float
    return KINDS.get(names.pop()) if len(names) == 1 else None


def _union(annotation: ast.expr) -> Iterator[str]:
    """Take `int | None`, `Optional[int]` and `Union[int, None]` apart into the source of each member."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            yield from (*_union(left), *_union(right))
        case ast.Subscript(value=ast.Name(id="Optional"), slice=member):
            yield from _union(member)
        case ast.Subscript(value=ast.Name(id="Union"), slice=ast.Tuple(elts=members)):
            for member in members:
                yield from _union(member)
        case _:
            yield ast.unparse(annotation)


def _describe(documentation: str, name: str) -> str:
    """Give the first sentence of what an `Args:` section says of one argument."""
    lines = documentation.splitlines()
    for number, line in enumerate(lines):
        found = re.match(rf"( *){name}(?: \([^:]*\))?: *(.*)", line)
        if found is None:
            continue
        words = [found[2]]
        for later in lines[number + 1 :]:
            if len(later) - len(later.lstrip()) <= len(found[1]):
                break
            words.append(later.strip())
        text = " ".join(" ".join(words).split())
        sentence = re.split(r"(?<=[\w)`*]{2}\.) ", text)[0]
        return sentence if len(sentence) <= _MAX_DESCRIPTION else f"{sentence[:_MAX_DESCRIPTION]}…"
    return ""
