"""What operators and clients rely on is in the documents: routes, codes, settings, commands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from server.cli import restage

REPOSITORY = Path(__file__).parent.parent.parent
DOCUMENTS = [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/**/*.md"), REPOSITORY / "weights" / "README.md"]
API_PAGE = (REPOSITORY / "docs" / "api.md").read_text()
# Codes that no client ever sees: of the configuration, and of base classes that are never raised themselves.
INTERNAL_CODES = {"config_error", "dependency_unavailable", "limit_reached", "object_not_found"}


def codes_of_classes() -> Iterator[str]:
    """Every `code = "…"` in the body of a class of the server."""
    for file in REPOSITORY.glob("server/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            for statement in node.body:
                match statement:
                    case (
                        ast.Assign(targets=[ast.Name(id="code")], value=ast.Constant(value=str(code)))
                        | ast.AnnAssign(target=ast.Name(id="code"), value=ast.Constant(value=str(code)))
                    ):
                        yield code
                    case _:
                        pass


def codes_of_jobs() -> Iterator[str]:
    """Every code under which a worker or the ledger ends a job, or a try."""
    for file in REPOSITORY.glob("server/worker/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.keyword(arg="code", value=value):
                    yield from (one.value for one in ast.walk(value) if _is_text(one))  # pyright: ignore[reportAttributeAccessIssue]
                case ast.AnnAssign(target=ast.Name(id="FINAL_CODES"), value=ast.Dict(values=values)):
                    yield from (one.value for one in values if _is_text(one))  # pyright: ignore[reportAttributeAccessIssue]
                case _:
                    pass
    for file in REPOSITORY.glob("server/ledger/lua/*.lua"):
        yield from re.findall(r'settle_failed\(job, "(\w+)"', file.read_text())


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_error_code_is_in_the_api_page() -> None:
    """A client that meets a code can look it up."""
    codes = {*codes_of_classes(), *codes_of_jobs()} - INTERNAL_CODES
    assert len(codes) > 30, "the search has lost its way"
    assert not {code for code in codes if f"`{code}`" not in API_PAGE}


def test_the_api_page_names_no_code_that_is_gone() -> None:
    """The tables hold nothing that the code does not."""
    in_tables = set(re.findall(r"^\| `([a-z_]+)` \| ", API_PAGE, flags=re.MULTILINE))
    fields = {"code", "model", "prompt", "negative_prompt", "params", "output", "loras"}
    assert not in_tables - fields - {*codes_of_classes(), *codes_of_jobs()}


def test_every_route_is_in_the_api_page(settings_for: Any) -> None:
    """Each path and method has its row."""
    from server.main import create_app

    keys = {"RESTAGE__STORE__ACCESS_KEY": "unused", "RESTAGE__STORE__SECRET_KEY": "unused"}
    paths = create_app(settings_for(**keys)).openapi_schema.paths or {}
    routes = {
        f"{method.upper()} {re.sub(r'{.*?}', '{id}', path)}"
        for path, item in paths.items()
        for method in ("get", "post", "put", "patch", "delete")
        if getattr(item, method) is not None
    }
    assert len(routes) >= 12
    assert not {route for route in routes if f"`{route}`" not in API_PAGE}


def test_every_setting_is_in_the_commented_file() -> None:
    """base.yaml is the list of settings for operators; secrets stand there as comments."""
    from server.settings import Settings

    text = (REPOSITORY / "config" / "base.yaml").read_text()
    sections = {
        name: field.annotation
        for name, field in Settings.model_fields.items()
        if name not in {"env_name", "config_dir"}
    }
    for section, model in sections.items():
        body = re.search(rf"^{section}:.*\n((?:[ #].*\n|\n)*)", text, flags=re.MULTILINE)
        assert body, section
        for name in model.model_fields:  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
            assert re.search(rf"\b{name}\b", body[1]), f"{section}.{name}"


def commands(group: click.Group, path: str) -> Iterator[str]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path} {name}")
        else:
            yield f"{path} {name}"


def test_every_command_is_in_the_documents() -> None:
    """Whoever reads the documents learns of each command."""
    text = "\n".join(file.read_text() for file in DOCUMENTS)
    assert not {command for command in commands(restage, "restage") if command not in text}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_links_and_named_files_exist(document: Path) -> None:
    """No document leads to a page or a source file that is not there."""
    text = document.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert not [link for link in links if not (document.parent / link).exists()]
    named = re.findall(r"`((?:server|pipelines|scripts|config|tests|docs)/[\w./-]+\.(?:py|yaml|md|lua))`", text)
    assert not [name for name in named if not (REPOSITORY / name).exists()]


def test_readme_is_short() -> None:
    """Who wants to know what this is reads at most a hundred lines."""
    assert len((REPOSITORY / "README.md").read_text().splitlines()) <= 100


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((REPOSITORY / "compose.yaml").read_text())


def test_compose_has_all_services_and_keeps_them_running(compose: dict[str, Any]) -> None:
    """Each service comes back after a failure, has an init that reaps, and time to end."""
    assert compose["services"].keys() == {"api", "worker", "valkey", "store"}
    for name, service in compose["services"].items():
        assert service["restart"] == "always", name
        assert service["init"] is True, name
        assert service["stop_grace_period"], name
    for name in ("api", "worker"):
        assert compose["services"][name]["build"]["dockerfile"] == "Dockerfile.cuda"


def test_compose_keeps_accepted_jobs_on_disk(compose: dict[str, Any]) -> None:
    """Valkey acknowledges nothing that a power cut could take, and evicts nothing."""
    words = compose["services"]["valkey"]["command"]
    options = dict(zip(words[1::2], words[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--appendfsync"] == "always"
    assert options["--maxmemory-policy"] == "noeviction"
    assert options["--maxmemory"]
    assert compose["services"]["valkey"]["healthcheck"]["test"]


def test_compose_gives_the_worker_its_gpu_and_time_to_finish(compose: dict[str, Any]) -> None:
    """Running jobs get what the settings promise them, and the store's image must be chosen."""
    worker = compose["services"]["worker"]
    (device,) = worker["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    base = yaml.safe_load((REPOSITORY / "config" / "base.yaml").read_text())
    minutes = int(worker["stop_grace_period"].removesuffix("m"))
    assert minutes * 60 > base["worker"]["shutdown_timeout_seconds"]
    assert compose["services"]["store"]["image"].startswith("${RESTAGE_STORE_IMAGE:?")


def test_compose_sets_only_settings_that_exist(compose: dict[str, Any]) -> None:
    """A renamed setting must not be left behind in the deployment."""
    base = yaml.safe_load((REPOSITORY / "config" / "base.yaml").read_text())
    secrets = {"redis": {"password"}, "store": {"access_key", "secret_key"}}
    for service in ("api", "worker"):
        for variable in compose["services"][service]["environment"]:
            if variable == "RESTAGE_ENV":
                continue
            _, section, name = variable.lower().split("__")
            assert name in base[section].keys() | secrets.get(section, set()), variable


def test_image_runs_as_nobody_special_on_a_pinned_base() -> None:
    """The Dockerfile names its base by version, drops root and says where the configuration is."""
    lines = (REPOSITORY / "Dockerfile.cuda").read_text().replace("\\\n", " ").splitlines()
    instructions = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    by_name = dict(instructions)
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu\d+\.\d+", by_name["FROM"])
    assert by_name["USER"].isdecimal()
    assert int(by_name["USER"]) > 0
    assert "RESTAGE_CONFIG_DIR=" in by_name["ENV"]
    assert "/health/live" in by_name["HEALTHCHECK"]
    copied = [rest.split()[0] for name, rest in instructions if name == "COPY"]
    assert {"pyproject.toml", "pipelines", "server", "config"} <= set(copied)
    assert all((REPOSITORY / source).exists() for source in copied)
