"""Manifests: what they hold, that nothing else is taken for one, and what differs from them."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.errors import WeightsError
from pipelines.manifest import (
    FileRecord,
    Manifest,
    make_manifest,
    manifest_path,
    read_manifest,
    weights_sha256,
    write_manifest,
)
from pipelines.verifying import check_files, fetching_folder, list_others, verify
from pipelines.weights_files import is_weights_path

INDEX = {
    "_class_name": "FluxKontextPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "image_encoder": [None, None],
}
SHARDS = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
FILES = {
    "model_index.json": json.dumps(INDEX),
    "transformer/config.json": "{}",
    "transformer/diffusion_pytorch_model.safetensors": "tensors",
    "text_encoder/config.json": "{}",
    "text_encoder/model.safetensors.index.json": json.dumps(SHARDS),
    "text_encoder/model-1-of-2.safetensors": "first half",
    "text_encoder/model-2-of-2.safetensors": "second half",
    "tokenizer/merges.txt": "a b",
    "tokenizer/chat_template.jinja": "{{ messages }}",
    "scheduler/scheduler_config.json": "{}",
}
OTHERS = {
    "README.md": "# A model",
    "flux1-kontext-dev.safetensors": "the same once more",
    "other/config.json": "{}",
    "vae/diffusion_pytorch_model.safetensors": "of no component",
    ".cache/huggingface/download/vae/config.json.metadata": "1",
    "transformer/.hidden.json": "{}",
}
RIGHT = {
    "format": 1,
    "repo": "a/b",
    "revision": "0" * 40,
    "files": {"vae/x.json": {"size_bytes": 1, "sha256": "a" * 64}},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for path, text in {**FILES, **OTHERS}.items():
        place(tmp_path / "model", path, text)
    return tmp_path / "model"


def place(folder: Path, path: str, text: str) -> None:
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(text)


def findings(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    return [(finding.kind, finding.path) for finding in verify(folder, manifest)]


def test_a_manifest_holds_what_is_loaded_and_what_is_read_beside_it(folder: Path) -> None:
    """Pages, other components, single-file copies, and what tools hide are no part of the weights."""
    read_bytes: list[int] = []
    manifest = make_manifest(folder, repo="a/b", revision="0" * 40, on_bytes=read_bytes.append)
    assert set(manifest.files) == set(FILES)
    assert manifest.files["tokenizer/merges.txt"] == FileRecord(3, hashlib.sha256(b"a b").hexdigest())
    assert manifest.size_bytes == sum(read_bytes) == sum(len(text) for text in FILES.values())


def test_a_manifest_is_read_as_it_was_written(folder: Path) -> None:
    """Nothing is lost, it does not list itself, and no part of it is left beside it."""
    before = {file.name for file in folder.iterdir()}
    manifest = make_manifest(folder, repo="a/b", revision="0" * 40)
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest == make_manifest(folder, repo="a/b", revision="0" * 40)
    assert {file.name for file in folder.iterdir()} == before | {"restage-manifest.json"}
    assert findings(folder, manifest) == []
    assert check_files("m", folder) == manifest


def test_the_digest_is_of_the_files_alone() -> None:
    """Where the same files came from, and in which order they are listed, changes nothing; it never changes later."""
    one, two = FileRecord(1, "a" * 64), FileRecord(2, "b" * 64)
    digest = weights_sha256(Manifest("a/b", "0" * 40, {"x.json": one, "y.json": two}))
    assert digest == weights_sha256(Manifest(None, None, {"y.json": two, "x.json": one}))
    canonical = (
        f'{{"x.json":{{"sha256":"{"a" * 64}","size_bytes":1}},"y.json":{{"sha256":"{"b" * 64}","size_bytes":2}}}}'
    )
    assert digest == hashlib.sha256(canonical.encode()).hexdigest()
    assert digest != weights_sha256(Manifest(None, None, {"x.json": one, "y.json": one}))


def test_a_lora_has_its_manifest_beside_it(tmp_path: Path) -> None:
    """Two LoRAs of one folder have two manifests, which know nothing of each other."""
    for name in ("one", "two"):
        (tmp_path / f"{name}.safetensors").write_text(name)
        write_manifest(tmp_path / f"{name}.safetensors", make_manifest(tmp_path / f"{name}.safetensors"))
    (tmp_path / "two.safetensors").write_text("six")
    one, two = (read_manifest(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    assert one is not None
    assert two is not None
    assert list(one.files) == ["one.safetensors"]
    assert findings(tmp_path / "one.safetensors", one) == []
    assert findings(tmp_path / "two.safetensors", two) == [("altered", "two.safetensors")]


def test_no_manifest_is_no_mistake(folder: Path, tmp_path: Path) -> None:
    """Weights that nobody recorded are usable, and a folder that is not there has none either."""
    assert read_manifest(folder) is None
    assert check_files("m", folder) is None
    assert read_manifest(tmp_path / "nothing") is None


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "tokenizer/merges.txt").unlink(), ("missing", "tokenizer/merges.txt")),
        (lambda f: (f / "tokenizer/merges.txt").write_text("a"), ("truncated", "tokenizer/merges.txt")),
        (lambda f: (f / "tokenizer/merges.txt").write_text("a c"), ("altered", "tokenizer/merges.txt")),
        (lambda f: place(f, "text_encoder/model.safetensors", ""), ("extra", "text_encoder/model.safetensors")),
        (lambda f: place(f, "tokenizer/adapter_config.json", ""), ("extra", "tokenizer/adapter_config.json")),
        (lambda f: place(f, "tokenizer/more/a.jinja", ""), ("extra", "tokenizer/more/a.jinja")),
        (lambda f: place(f, "transformer/model.BIN", ""), ("pickled", "transformer/model.BIN")),
        (lambda f: place(f, "anywhere/x.pkl", ""), ("pickled", "anywhere/x.pkl")),
        (lambda f: place(f, "pipeline.py", ""), ("code", "pipeline.py")),
    ],
)
def test_each_difference_is_found_and_named(
    folder: Path, damage: Callable[[Path], object], expected: tuple[str, str]
) -> None:
    """A full comparison tells it; the quick one too, unless only contents differ."""
    manifest = make_manifest(folder)
    write_manifest(folder, manifest)
    damage(folder)
    assert findings(folder, manifest) == [expected]
    if expected[0] == "altered":
        assert check_files("m", folder) == manifest
    else:
        with pytest.raises(WeightsError, match=rf"^m: .* is not what its restage-manifest.json says: {expected[1]} "):
            check_files("m", folder)


def test_many_differences_are_told_in_one_line(folder: Path) -> None:
    """The quick comparison tells three and counts the rest."""
    write_manifest(folder, make_manifest(folder))
    for path in FILES:
        (folder / path).unlink()
    with pytest.raises(WeightsError, match=r"is missing; .* is missing; .* is missing; and 7 more$"):
        check_files("m", folder)


def test_what_is_never_loaded_is_only_mentioned(folder: Path) -> None:
    """A page about the model is no difference."""
    manifest = make_manifest(folder)
    visible = {path for path in OTHERS if not any(part.startswith(".") for part in path.split("/"))}
    assert set(list_others(folder, manifest.files)) == visible


def test_links_to_files_count_as_files_and_links_to_folders_do_not(folder: Path, tmp_path: Path) -> None:
    """A file may lie on another disk; nobody looks into a linked folder, which could hold anything."""
    target = tmp_path / "elsewhere.txt"
    (folder / "tokenizer" / "merges.txt").rename(target)
    (folder / "tokenizer" / "merges.txt").symlink_to(target)
    manifest = make_manifest(folder)
    assert findings(folder, manifest) == []
    (folder / "tokenizer" / "again").symlink_to(folder)
    assert findings(folder, manifest) == [("extra", "tokenizer/again")]


def test_what_is_no_plain_file_is_never_read(folder: Path) -> None:
    """A pipe that nobody writes to does not hang a comparison, nor a folder of that name."""
    manifest = make_manifest(folder)
    for name in ("merges.txt", "chat_template.jinja"):
        (folder / "tokenizer" / name).unlink()
    os.mkfifo(folder / "tokenizer" / "merges.txt")
    (folder / "tokenizer" / "chat_template.jinja").mkdir()
    names = {"tokenizer/merges.txt", "tokenizer/chat_template.jinja"}
    assert {path for kind, path in findings(folder, manifest) if kind == "unreadable"} == names
    with pytest.raises(WeightsError, match="is no plain file"):
        make_manifest(folder)


def test_a_fetch_under_way_is_told(folder: Path, tmp_path: Path) -> None:
    """Also where all files look right, and also for a LoRA."""
    write_manifest(folder, make_manifest(folder))
    for weights in (folder, tmp_path / "lora.safetensors"):
        fetching_folder(weights).mkdir()
        with pytest.raises(WeightsError, match="is still being fetched, or that was cut off; `restage weights fetch`"):
            check_files("m", weights)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        ("9" * 5000, "it is not JSON"),
        ("[]", "it needs format, repo, revision and files"),
        (json.dumps({**RIGHT, "more": 1}), "and nothing else"),
        (json.dumps({**RIGHT, "format": 2}), "its format is not 1"),
        (json.dumps({**RIGHT, "format": True}), "its format is not 1"),
        (json.dumps({**RIGHT, "repo": "a"}), "repo is neither"),
        (json.dumps({**RIGHT, "repo": "a/../b"}), "repo is neither"),
        (json.dumps({**RIGHT, "revision": "main"}), "revision is neither"),
        (json.dumps({**RIGHT, "revision": ["0" * 40]}), "revision is neither"),
        (json.dumps({**RIGHT, "files": {}}), "files needs 1 to 10000 paths"),
        (json.dumps({**RIGHT, "files": []}), "files needs 1 to 10000 paths"),
        (json.dumps({**RIGHT, "files": {f"{i}.json": 1 for i in range(10_001)}}), "files needs 1 to 10000 paths"),
        (json.dumps({**RIGHT, "files": {"a.json": 1}}), "needs size_bytes and sha256"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": 1}}}), "needs size_bytes and sha256"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": -1, "sha256": "a" * 64}}}), "is no size"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": 1.5, "sha256": "a" * 64}}}), "is no size"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": True, "sha256": "a" * 64}}}), "is no size"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": 1, "sha256": "A" * 64}}}), "is no SHA-256"),
        (json.dumps({**RIGHT, "files": {"a.json": {"size_bytes": 1, "sha256": 5}}}), "is no SHA-256"),
        (" " * 8_000_001, "it has over 8000000 bytes"),
    ],
    ids=range(22),
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, content: str, problem: str) -> None:
    """Each time with the file and what is wrong with it."""
    manifest_path(tmp_path).write_text(content)
    with pytest.raises(WeightsError, match=rf"restage-manifest\.json is no manifest: .*{problem}"):
        read_manifest(tmp_path)
    with pytest.raises(WeightsError, match=r"^m: .*restage-manifest\.json is no manifest"):
        check_files("m", tmp_path)


@pytest.mark.parametrize(
    "path",
    [
        "../x.json",
        "a/../x.json",
        "/etc/x.json",
        "a//x.json",
        "./x.json",
        "a\\x.json",
        ".hidden.json",
        "a/.git/x.json",
        "x.bin",
        "x.py",
        "x",
        "",
        "a/x.json\n",
        "ä.json",
        "restage-manifest.json",
        "a/" * 7 + "x.json",
        "x" * 1000 + ".json",
    ],
)
def test_no_path_leads_out_of_the_folder_or_to_what_is_never_loaded(tmp_path: Path, path: str) -> None:
    """A manifest that comes with a download cannot have other files read."""
    files = {path: {"size_bytes": 1, "sha256": "a" * 64}}
    manifest_path(tmp_path).write_text(json.dumps({**RIGHT, "files": files}))
    with pytest.raises(WeightsError, match="is not the path of a file that could be loaded"):
        read_manifest(tmp_path)


@given(st.text(max_size=30))
def test_any_path_that_is_taken_stays_below_its_folder(path: str) -> None:
    """Whatever characters it has."""
    for one in (path, f"{path}.json", f"vae/{path}.safetensors"):
        if is_weights_path(one):
            assert Path(os.path.normpath(Path("/weights/model") / one)) == Path("/weights/model") / one
            assert ".." not in one.split("/")


def test_a_manifest_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    """A folder in its place, for one."""
    manifest_path(tmp_path).mkdir()
    with pytest.raises(WeightsError, match=r"restage-manifest\.json cannot be read"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("path", "content", "problem"),
    [
        ("model_index.json", "", "is not JSON"),
        ("model_index.json", "[]", "is not a JSON object"),
        ("model_index.json", '{"a": ["own", "B"]}', "a is of library 'own'; only diffusers and transformers"),
        ("model_index.json", '{"a/b": ["diffusers", "B"]}', "'a/b' is no component"),
        ("model_index.json", '{"a": ["diffusers", 5]}', "'a' is no component"),
        ("model_index.json", '{"none": ["diffusers", "Model"]}', "neither none/diffusion_pytorch_model.safetensors"),
        ("text_encoder/model.safetensors.index.json", "{}", "names no shards"),
        ("text_encoder/model.safetensors.index.json", '{"weight_map": {"a": "../x"}}', "which is not there"),
        ("text_encoder/model.safetensors.index.json", '{"weight_map": {"a": "no.safetensors"}}', "which is not there"),
    ],
)
def test_a_folder_that_makes_no_sense_is_not_recorded(folder: Path, path: str, content: str, problem: str) -> None:
    """The index decides what the weights are; a wrong one is named."""
    (folder / path).write_text(content)
    with pytest.raises(WeightsError, match=problem):
        make_manifest(folder)


def test_a_folder_without_an_index_is_not_recorded(tmp_path: Path) -> None:
    """There is nothing to tell which of its files are loaded."""
    with pytest.raises(WeightsError, match=r"model_index\.json cannot be read: No such file"):
        make_manifest(tmp_path)


def test_a_manifest_appears_whole_or_not_at_all(folder: Path) -> None:
    """Where its folder is gone nothing is left; what is there already is replaced by the new one."""
    manifest = make_manifest(folder)
    with pytest.raises(OSError, match="No such file"):
        write_manifest(folder / "gone", manifest)
    write_manifest(folder, Manifest(None, None, {"old.json": FileRecord(1, "a" * 64)}))
    write_manifest(folder, manifest)
    assert read_manifest(folder) == manifest


def test_names_are_plain(tmp_path: Path) -> None:
    """Operators see them: they are the same in every version."""
    assert manifest_path(tmp_path / "flux") == tmp_path / "flux" / "restage-manifest.json"
    assert manifest_path(tmp_path / "a.safetensors") == tmp_path / "a.safetensors.restage-manifest.json"
    assert fetching_folder(tmp_path / "flux") == tmp_path / "flux" / ".restage-fetching"
