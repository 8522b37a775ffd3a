"""Make sure that a model can be loaded before any job counts on it: of its files, all but the numbers is read.

Each component is made on torch's meta device, which has shapes and no numbers, and compared with the headers of its
files: about a second for 20 billion parameters, in next to no memory. So a number that was changed on the disk is not
seen here; only its digest tells, which `restage weights verify` compares.
"""

import importlib
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from pipelines.errors import WeightsError
from pipelines.loras import check_lora_fits
from pipelines.optimizations import check_optimizations
from pipelines.running import is_out_of_memory, one_line
from pipelines.verifying import check_files
from pipelines.weights import ModelSpec, check_weights, components, has_weights, read_json, weights_files

_LIBRARIES: Mapping[str, Any] = {"diffusers": diffusers, "transformers": transformers}
# What the libraries raise for files that make no sense to them; they have no class of their own for it.
_LIBRARY_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
)
_MAX_LIBRARY_TEXT = 160
# Where each library writes down of which class a component is.
_CLASS_NAMES = (
    ("scheduler_config.json", "_class_name"),
    ("config.json", "_class_name"),
    ("config.json", "architectures"),
)


def check_loadable(spec: ModelSpec, device: str | None = None) -> None:
    """Check that a model's folder is whole and that its files fit together, without loading it.

    Args:
        spec: the model.
        device: on which it is to run, as torch names it; None: nothing is asked of a machine.

    Raises:
        OptimizationUnavailable: it cannot be run on the device as its entry asks.
        WeightsMissing: there is no folder.
        WeightsError: it is still being fetched, or is not what its manifest says; a file is missing or damaged; a
            component is of another class or shape than the others take it for; a LoRA does not fit the model.
    """
    with Telling(spec, str(spec.weights_dir)):
        check_files(spec.id, spec.weights_dir)
        check_weights(spec)
        for lora in spec.loras:
            check_files(spec.id, lora.file)
    _quieten_libraries()
    index = read_json(spec, spec.weights_dir / "model_index.json")
    pipeline_class = _find_class(spec, "diffusers", spec.pipeline, DiffusionPipeline)
    _check_names(spec, pipeline_class, index)
    parts = {
        name: _read_part(spec, name, library, class_name, pipeline_class)
        for name, (library, class_name) in components(index).items()
    }
    for name, part in parts.items():
        _check_vocabulary(spec, name, part, parts)
    pipeline = _put_together(spec, pipeline_class, index, parts)
    _check_for_family(spec, pipeline)
    for lora in spec.loras:
        check_lora_fits(spec, lora, pipeline)
    if device is not None:
        check_optimizations(spec, pipeline, device)


def _quieten_libraries() -> None:
    # A log has lines, not bars or tables, and a prompt that is too long for CLIP would be quoted in it.
    for library in _LIBRARIES.values():
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


class Telling:
    """A context that makes one line of what a library raises for files that make no sense to it, and hides warnings.

    No `except` clause could: the tokenizers library raises bare Exceptions, and other classes than these are bugs.

    Args:
        spec: the model.
        what: the folder that is read.
    """

    def __init__(self, spec: ModelSpec, what: str) -> None:
        self._spec = spec
        self._what = what
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        """Hide warnings: they are about the libraries' own code, and would stand in the log between its events."""
        self._warnings.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Raise the line in place of the library's error; errors about memory and our own pass.

        Raises:
            WeightsError: the library failed.
        """
        self._warnings.__exit__(kind, error, traceback)
        if error is None or is_out_of_memory(error):
            return
        if isinstance(error, _LIBRARY_ERRORS) or type(error) is Exception:
            text = one_line(error)
            text = text if len(text) <= _MAX_LIBRARY_TEXT else f"{text[:_MAX_LIBRARY_TEXT]}…"
            raise WeightsError(f"{self._spec.id}: {self._what} cannot be loaded: {text}") from error


def _find_class(spec: ModelSpec, library: str, class_name: str, base: type) -> Any:
    # A name that the library has moved or made optional fails on its own, when it is looked up.
    with Telling(spec, f"{library}.{class_name}"):
        found = getattr(_LIBRARIES[library], class_name, None)
    if isinstance(found, type) and issubclass(found, base):
        return found
    version = f"{library} {_LIBRARIES[library].__version__}"
    kind = {DiffusionPipeline: "pipeline", torch.nn.Module: "model"}.get(base, "class")
    raise WeightsError(f"{spec.id}: {version} has no {kind} {class_name}, which model_index.json names")


def _check_names(spec: ModelSpec, pipeline_class: Any, index: dict[str, Any]) -> None:
    parts = components(index)
    expected, _ = pipeline_class._get_signature_keys(pipeline_class)  # noqa: SLF001 - said nowhere else
    lacking = sorted(set(expected) - set(pipeline_class._optional_components) - set(parts))  # noqa: SLF001 - likewise
    if lacking:
        raise WeightsError(
            f"{spec.id}: model_index.json names no {lacking[0]}, which {spec.pipeline} needs; fetch the folder again"
        )
    strange = sorted(set(parts) - set(expected))
    if strange:
        raise WeightsError(
            f"{spec.id}: model_index.json names a {strange[0]}, which {spec.pipeline} has not: it is another pipeline's"
        )


def _read_part(spec: ModelSpec, name: str, library: str, class_name: str, pipeline_class: Any) -> Any:
    is_model = has_weights(class_name)
    part_class = _find_class(spec, library, class_name, torch.nn.Module if is_model else object)
    _check_class(spec, name, class_name)
    if not is_model:
        with Telling(spec, str(spec.weights_dir / name)):
            return part_class.from_pretrained(spec.weights_dir / name, local_files_only=True)
    annotated = pipeline_class._get_signature_types()[name]  # noqa: SLF001 - with the annotations resolved
    allowed = [kind for kind in annotated if isinstance(kind, type) and issubclass(kind, torch.nn.Module)]
    if allowed and not issubclass(part_class, tuple(allowed)):
        names = " or ".join(kind.__name__ for kind in allowed)
        raise WeightsError(f"{spec.id}: {name} is a {class_name}, and {spec.pipeline} takes a {names}")
    return _make_empty(spec, name, library, part_class)


def _check_class(spec: ModelSpec, name: str, class_name: str) -> None:
    """Compare the class that the pipeline names with the one that saved the component, where that is written down."""
    for file, key in _CLASS_NAMES:
        if not (spec.weights_dir / name / file).is_file():
            continue
        found = read_json(spec, spec.weights_dir / name / file).get(key) or class_name
        names = [str(one)[:100] for one in (found if isinstance(found, list) else [found])]
        if class_name not in names:
            raise WeightsError(f"{spec.id}: {name}/{file} is of {names[0]}, and model_index.json says {class_name}")


def _make_empty(spec: ModelSpec, name: str, library: str, part_class: Any) -> torch.nn.Module:
    """Make a component without numbers, after its configuration has been compared with the tensors of its files."""
    folder = spec.weights_dir / name
    with Telling(spec, str(folder)):
        tensors: dict[str, torch.Tensor] = {}
        for file in weights_files(spec, folder, library):
            with safe_open(file, framework="pt") as content:
                for key in content.keys():  # noqa: SIM118 - not a mapping
                    tensors[key] = torch.empty(content.get_slice(key).get_shape(), device="meta")
        compare = _compare_diffusers if library == "diffusers" else _compare_transformers
        module, report = compare(part_class, folder, tensors)
    detail = _describe(report)
    if detail:
        raise WeightsError(f"{spec.id}: config.json and weights of {folder} do not belong together: {detail}")
    return module


@dataclass(frozen=True)
class _Report:
    """How names and shapes of a component's tensors differ from those of its class; empty where they do not."""

    missing: Collection[str]
    unexpected: Collection[str]
    mismatched: Collection[tuple[str, Sequence[int], Sequence[int]]]


def _describe(report: _Report) -> str | None:
    if report.mismatched:
        key, found, expected = min(report.mismatched, key=lambda one: one[0])
        shapes = f"{list(found)}, not {list(expected)}"
        return f"tensors of another shape: {len(report.mismatched)}, such as {key} {shapes}"
    if report.missing:
        return f"missing tensors: {len(report.missing)}, such as {min(report.missing)}"
    if report.unexpected:
        return f"tensors without a place: {len(report.unexpected)}, such as {min(report.unexpected)}"
    return None


def _compare_diffusers(part_class: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Any, _Report]:
    # As its own from_pretrained does, which would have the disk read all of the files on the way.
    with torch.device("meta"):
        module = part_class.from_config(part_class.load_config(folder, local_files_only=True))
    module._fix_state_dict_keys_on_load(tensors)  # noqa: SLF001 - old names of layers
    expected = module.state_dict()
    ignored = part_class._keys_to_ignore_on_load_unexpected or []  # noqa: SLF001 - likewise
    unexpected = tensors.keys() - expected.keys()
    return module, _Report(
        missing=expected.keys() - tensors.keys(),
        unexpected={key for key in unexpected if not any(re.search(pattern, key) for pattern in ignored)},
        mismatched=[
            (key, tensor.shape, expected[key].shape)
            for key, tensor in tensors.items()
            if key in expected and tensor.shape != expected[key].shape
        ],
    )


def _compare_transformers(part_class: Any, folder: Path, tensors: dict[str, torch.Tensor]) -> tuple[Any, _Report]:
    # The library knows which names changed since a file was written, which are tied, and which no longer matter.
    module, report = part_class.from_pretrained(
        None,
        config=part_class.config_class.from_pretrained(folder, local_files_only=True),
        state_dict=tensors,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # listed, not raised
    )
    return module, _Report(report["missing_keys"], report["unexpected_keys"], report["mismatched_keys"])


def _check_vocabulary(spec: ModelSpec, name: str, part: Any, parts: Mapping[str, Any]) -> None:
    """Compare a tokenizer, or a processor's, with the text encoder that reads its tokens.

    A token beyond the encoder's table would fail each run, on CUDA with the device lost. One that has far fewer is of
    another model, or has lost its words. (Tables are rounded up a little, so they need not be equal.)
    """
    tokenizer = getattr(part, "tokenizer", part)
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        return
    number = name.partition("_")[2]
    encoder = parts.get(f"text_encoder_{number}") if number.isdigit() else parts.get("text_encoder")
    if not isinstance(encoder, transformers.PreTrainedModel):
        return
    table = None
    with suppress(NotImplementedError):
        table = encoder.get_input_embeddings()
    if not isinstance(table, torch.nn.Embedding):
        return
    num_rows, num_tokens = table.num_embeddings, max(tokenizer.get_vocab().values(), default=-1) + 1
    if not num_rows / 2 <= num_tokens <= num_rows:
        raise WeightsError(
            f"{spec.id}: {name} has {num_tokens} tokens, and its text encoder knows {num_rows}: "
            f"they do not belong together; fetch {spec.weights_dir / name} again"
        )


def _check_for_family(spec: ModelSpec, pipeline: Any) -> None:
    """Let the family look for what its calls need beyond what the class itself asks for."""
    check_pipeline = getattr(importlib.import_module(f"pipelines.{spec.family}.run"), "check_pipeline", None)
    problem = None if check_pipeline is None else check_pipeline(pipeline)
    if problem is not None:
        raise WeightsError(f"{spec.id}: {spec.weights_dir}: {problem}")


def _put_together(spec: ModelSpec, pipeline_class: Any, index: dict[str, Any], parts: Mapping[str, Any]) -> Any:
    expected, optional = pipeline_class._get_signature_keys(pipeline_class)  # noqa: SLF001 - said nowhere else
    options = {name: index[name] for name in optional if name in index}
    with Telling(spec, str(spec.weights_dir)):
        return pipeline_class(**(dict.fromkeys(expected) | options | dict(parts)))
