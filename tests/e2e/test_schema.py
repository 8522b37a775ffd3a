"""The API keeps to its OpenAPI document: schemathesis makes requests from it, good and bad, and checks each answer."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from server.keys import KeyStore
from tests.conftest import untraced

FLUX = "tiny-flux-kontext"
# Without weights, so its jobs stay queued.
NEVER_SERVED = "flux-kontext-dev"
SEED = os.environ.get("SCHEMATHESIS_SEED", "20261125")
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "10")


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    """Give the API's file of keys."""
    return KeyStore(tmp_path / "keys.jsonl")


@pytest.fixture
def stack(unstarted, keys: KeyStore):
    """Give an API that asks for a key, so that requests without one are part of it."""
    unstarted.environment |= {"RESTAGE__AUTH__MODE": "keys", "RESTAGE__AUTH__KEYS_FILE": str(keys.path)}
    unstarted.start("api")
    unstarted.wait_api()
    return unstarted


@pytest.fixture
def key(stack, keys: KeyStore) -> str:
    """Give a key to an API that serves."""
    return keys.add("oak", "user")


@pytest.fixture
def batches(stack, key: str) -> dict[str, Any]:
    """Give a batch that has finished, and one that is waiting, so that known ids are asked for too."""
    stack.client.http.headers["Authorization"] = f"Bearer {key}"
    stack.start_worker()
    buffer = io.BytesIO()
    Image.new("RGB", (96, 80), "red").save(buffer, "PNG")
    [upload_id] = stack.client.upload({"hall.png": buffer.getvalue()})
    item = {"upload_id": upload_id}
    done = stack.client.submit({"items": [item, item], "defaults": {"model": FLUX}})
    waiting = stack.client.submit({"items": [item] * 3, "defaults": {"model": NEVER_SERVED}})
    return {"done": stack.client.finished(done["id"]), "waiting": waiting}


def write_config(file: Path, batches: dict[str, Any]) -> None:
    """Say which ids there are, and where a request that fits the document may be refused all the same."""
    done, waiting = batches["done"], batches["waiting"]
    known = {
        ("read_batch", "follow_batch", "download_archive"): ("batch_id", done["id"]),
        ("read_job", "redirect_to_output"): ("job_id", done["jobs"][0]["id"]),
        ("cancel_batch", "retry_batch", "delete_batch"): ("batch_id", waiting["id"]),
        ("cancel_job", "retry_job"): ("job_id", waiting["jobs"][0]["id"]),
        ("read_model",): ("model_id", FLUX),
    }
    lines: list[str] = []
    for operations, (parameter, value) in known.items():
        lines += ["[[operations]]", f"include-operation-id = {list(operations)}"]
        lines += [f'parameters = {{ "path.{parameter}" = "{value}" }}']
    # These name things that exist or not: uploads, jobs, types of files. And to the document parameters are any JSON.
    lines += ["[[operations]]", 'include-operation-id = ["submit_batch", "create_uploads", "retry_jobs"]']
    lines += ['checks.positive_data_acceptance.expected-statuses = ["2xx", "400", "422"]']
    file.write_text("\n".join(lines))


@pytest.mark.timeout(500)
def test_the_api_keeps_to_its_document(stack, key: str, batches: dict[str, Any], tmp_path: Path) -> None:
    """All of schemathesis' checks hold for every operation: no 5xx, no answer that the document does not describe."""
    config = tmp_path / "schemathesis.toml"
    write_config(config, batches)
    url = f"{stack.client.http.base_url}".rstrip("/")
    command = [
        *(str(Path(sys.executable).parent / "schemathesis"), f"--config-file={config}", "run", f"{url}/openapi.json"),
        *("--header", f"Authorization: Bearer {key}", "--checks", "all", "--seed", SEED),
        *("--max-examples", EXAMPLES, "--request-timeout", "20", "--workers", "2", "--no-color"),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=untraced(), capture_output=True, text=True, check=False, timeout=450
    )
    print(done.stdout[-20_000:], done.stderr[-5000:])  # noqa: T201 (shown with a failure; names the seed)
    assert done.returncode == 0

    num_operations = sum(
        method in {"get", "post", "put", "patch", "delete"}
        for item in httpx.get(f"{url}/openapi.json").json()["paths"].values()
        for method in item
    )
    assert f"Tested: {num_operations}" in done.stdout
    generated = re.search(r"(\d+) generated", done.stdout)
    assert generated
    assert int(generated[1]) > 20 * num_operations
