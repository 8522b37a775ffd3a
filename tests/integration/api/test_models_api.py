"""What can be asked for, and whether it would run now."""

from pathlib import Path

import pytest
import yaml

from tests.integration.api.conftest import picture

CONFIG_DIR = Path(__file__).parents[3] / "config"
QWEN, FLUX = "tiny-qwen-image-edit-2511", "tiny-flux-kontext"


def test_models_are_listed_in_the_shape_of_openai(api):
    """Every enabled model is listed with its schema; readiness, and why not, comes from the workers."""
    listed = api.http.get("/v1/models").json()
    assert listed["object"] == "list"
    models = {model["id"]: model for model in listed["data"]}
    assert list(models) == api.settings.models.enabled
    real = models["qwen-image-edit-2511"]
    assert (real["object"], real["owned_by"], real["license"]) == ("model", "Qwen", "apache-2.0")
    assert isinstance(real["created"], int)
    assert real["params_schema"]["properties"]["true_cfg_scale"]["maximum"] == 20.0
    assert (real["ready"], real["not_ready_reason"]) == (False, "No running worker serves this model.")
    assert models[QWEN]["resident_on"] == []


def test_a_model_is_ready_when_a_worker_serves_it(api):
    """Readiness follows the announcements: first the reason why not, then the worker that holds it."""
    api.announce_worker(ready=False, reason="its weights are missing")
    model = api.http.get(f"/v1/models/{QWEN}").json()
    assert (model["ready"], model["resident_on"]) == (False, [])
    assert "its weights are missing" in model["not_ready_reason"]
    api.announce_worker()
    model = api.http.get(f"/v1/models/{QWEN}").json()
    assert (model["ready"], model["not_ready_reason"], model["resident_on"]) == (True, None, ["worker-1"])


def test_an_unknown_model_answers_404(api):
    """A model that is not served here is not there, and the answer names those that are."""
    response = api.http.get("/v1/models/sdxl")
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")


def test_presets_are_all_rooms_in_all_styles(api):
    """Nine room types and five styles give 45 prompts, all different."""
    presets = api.http.get("/v1/presets").json()
    assert (len(presets["room_types"]), len(presets["styles"]), len(presets["data"])) == (9, 5, 45)
    assert len({preset["prompt"] for preset in presets["data"]}) == 45


def test_presets_are_shown_as_a_model_gets_them(open_api, tmp_path):
    """With `model` the prompts are those that its jobs are given, wrapped or replaced; a job's record has the same."""
    entries = yaml.safe_load((CONFIG_DIR / "models.yaml").read_text())
    [entry] = [entry for entry in entries if entry["id"] == QWEN]
    entry["presets"] = {"wrap": "Carefully. {preset}", "replace": {"bedroom": {"modern": "One bed."}}}
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(entries))
    with open_api(RESTAGE__MODELS__FILE=str(tmp_path / "models.yaml")) as api:
        plain, own, other = (
            [preset["prompt"] for preset in api.http.get("/v1/presets", params=params).json()["data"]]
            for params in ({}, {"model": QWEN}, {"model": FLUX})
        )
        [upload_id] = api.upload(picture())
        items = [{"upload_id": upload_id, "room_type": room, "model": QWEN} for room in ("bedroom", "kitchen")]
        jobs = api.accept(*items)["jobs"]
    assert other == plain
    assert [prompt for prompt in own if prompt == "One bed."] == ["One bed."]
    assert sum(prompt == f"Carefully. {text}" for prompt, text in zip(own, plain, strict=True)) == 44
    assert [job["prompt"] for job in jobs] == ["One bed.", own[10]]


def test_a_model_tells_what_its_entry_says(open_api, tmp_path):
    """A client sees LoRAs, licence, the schema with the entry's own limits and defaults, and the weights in use."""
    entries = yaml.safe_load((CONFIG_DIR / "models.yaml").read_text())
    [entry] = [entry for entry in entries if entry["id"] == QWEN]
    lora = {"id": "fast", "name": "Fast", "license": "none", "scale": [0, 1.5], "defaults": {"num_inference_steps": 2}}
    entry |= {
        "license_note": "Not for sale.",
        "limits": {"num_inference_steps": [2, 9], "max_input_images": 2},
        "loras": [lora | {"weights": "fast.safetensors", "scheduler": {"shift": 2.0}}],
    }
    (tmp_path / "models.yaml").write_text(yaml.safe_dump(entries))
    with open_api(RESTAGE__MODELS__FILE=str(tmp_path / "models.yaml")) as api:
        api.announce_worker(version="1", revision="c" * 40, weights_sha256="a" * 64)
        model = api.http.get(f"/v1/models/{QWEN}").json()
        [upload_id] = api.upload(picture())
        [job] = api.accept({"upload_id": upload_id, "model": QWEN, "loras": [{"id": "fast", "scale": 1.25}]})["jobs"]
        refused = api.http.post(
            "/v1/batches",
            json={"items": [{"upload_id": upload_id, "model": QWEN, "loras": [{"id": "fast", "scale": 2}]}]},
        )
    assert model["loras"] == [lora | {"description": ""}]
    assert (model["license_note"], model["retired"], model["reports_progress"]) == ("Not for sale.", False, True)
    assert (model["revision"], model["weights_sha256"], model["source"]) == ("c" * 40, "a" * 64, None)
    steps = model["params_schema"]["properties"]["num_inference_steps"]
    assert (steps["minimum"], steps["maximum"], steps["default"]) == (2, 9, 4)
    assert (job["params"]["num_inference_steps"], job["loras"]) == (2, [{"id": "fast", "scale": 1.25}])
    assert job["weights_sha256"] == "a" * 64
    [error] = refused.json()["errors"]
    assert (error["code"], error["location"]) == ("invalid_loras", "/items/0/loras/0/scale")


@pytest.mark.parametrize("model", ["sdxl", "", "x" * 10_000])
def test_presets_of_an_unknown_model_answer_404(api, model):
    """A model that is not served here has no prompts, and the answer says so in a few words."""
    response = api.http.get("/v1/presets", params={"model": model})
    assert (response.status_code, response.json()["code"]) == (404, "unknown_model")
    assert len(response.json()["detail"]) < 300


def test_readiness_counts_live_workers(api):
    """Without a worker the server is degraded; with one it is ok and names what is served."""
    answer = api.http.get("/health/ready")
    assert answer.status_code == 200
    assert answer.json() == {"status": "degraded", "dependencies": {"redis": "ok", "store": "ok"}, "models": {}}
    api.announce_worker()
    assert api.http.get("/health/ready").json()["models"] == {QWEN: 1}
    assert api.http.get("/health/ready").json()["status"] == "ok"
    assert api.http.get("/health/live").json() == {"status": "ok"}


def test_jobs_of_a_model_that_is_taken_away_fail_by_name(open_api, wait_until):
    """Once no API knows a model any more, what waits for it fails and says so, while other models' jobs wait on."""
    ledger = {"RESTAGE__REDIS__KEY_PREFIX": "removed"}
    with open_api(**ledger) as api:
        [upload_id] = api.upload(picture())
        batch = api.accept(*({"upload_id": upload_id, "model": model} for model in (QWEN, FLUX)))
    quickly = {"RESTAGE__MODELS__REMOVED_GRACE_SECONDS": "0.2", "RESTAGE__SWEEP__INTERVAL_SECONDS": "0.05"}
    with open_api(**ledger, **quickly, RESTAGE__MODELS__ENABLED=f"[{QWEN}]") as api:
        read = lambda: api.http.get(f"/v1/batches/{batch['id']}").json()["jobs"]  # noqa: E731
        wait_until(lambda: read()[1]["status"] == "failed")
        first, second = read()
        assert first["status"] == "queued"
        assert second["error"] == {
            "code": "model_removed",
            "detail": f"The model {FLUX} was taken away before the job could run.",
        }
