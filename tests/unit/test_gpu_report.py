"""The report of a check: what was measured, skipped and failed stands in it, and nothing that was not."""

import json

from pipelines.memory_plan import ModelMemory
from server.gpu_check.report import Report, as_json, as_markdown
from server.gpu_check.task import PLAIN, Device, Result
from server.gpu_check.variants import OF_ENTRY, VARIANTS, refusal, variants_of

GIB = 2**30
FIGURES = {
    "bare_steps_per_second": 4.0,
    "steps_per_second": 3.9,
    "bare_edit_seconds": 10.0,
    "edit_seconds": 10.1,
    "lane_adds_percent": 1.0,
    "same_picture": True,
    "first_advance_seconds": 1.5,
    "last_advance_seconds": 0.7,
    "weights_bytes": 15 * GIB,
    "peak_bytes": 21 * GIB,
    "device_used_bytes": 23 * GIB,
    "cancel_median_seconds": 0.1,
    "cancel_max_seconds": 0.2,
    "cancel_max_steps": 0.8,
    "preemption_max_seconds": 0.2,
    "preemption_to_first_step_max_seconds": 1.9,
    "resumed_same_picture": False,
}


def make_report() -> Report:
    device = Device("cuda:0", None, "A GPU", 24 * GIB, "9.0", {"torch": "2.14.1", "driver": "600.1"})
    results = [
        Result("small", PLAIN, "measured", "", FIGURES),
        Result(
            "small", "fast", "measured", "", {"edit_seconds": 5.05, "steps_per_second": 7.8, "peak_bytes": 11 * GIB}
        ),
        Result("small", "odd", "skipped", "needs a | that\nis not there"),
        Result("large", PLAIN, "skipped", "by the memory plan it needs 58.5 GiB, and the device has 24.0"),
        Result("bad", PLAIN, "failed", "it took longer than 900 s", {"build_seconds": 3.0}),
    ]
    plans = {name: ModelMemory(name, 15 * GIB, 5 * GIB) for name in ("small", "large")}
    return Report(device, "2026-01-02T03:04:05+00:00", "python scripts/gpu_check.py", plans, results)


def row(page: str, start: str, number: int = 0) -> list[str]:
    lines = [line for line in page.splitlines() if line.startswith(f"| {start} |")]
    return [cell.strip() for cell in lines[number].strip("|").split("|")]


def test_the_page_says_what_was_measured() -> None:
    """Speed, memory against the plan and reactions of a model, in tables whose rows are all of one length."""
    page = as_markdown(make_report())
    assert "**A GPU** (`cuda:0`, 24.0 GiB, compute capability 9.0); torch 2.14.1, driver 600.1." in page
    assert row(page, "small")[1:7] == ["4.000", "3.900", "10.000", "10.100", "1.00 %", "yes"]
    assert row(page, "small", 1)[1:] == ["15.00", "15.00", "20.00", "21.00", "NO", "21.00", "23.00"]
    assert row(page, "small", 2)[-1] == "NO"
    assert row(page, "small | fast")[2:6] == ["7.800", "2.00 x", "", "11.00"]
    for table in page.split("\n\n")[2:]:
        assert len({line.count("|") for line in table.strip().splitlines()}) == 1, table


def test_the_page_says_why_something_was_not_measured() -> None:
    """In its row, on one line, and without a figure."""
    page = as_markdown(make_report())
    assert row(page, "large")[1] == "skipped: by the memory plan it needs 58.5 GiB, and the device has 24.0"
    assert row(page, "bad")[1] == "failed: it took longer than 900 s"
    assert row(page, "small | odd")[-1] == "skipped: needs a / that is not there"


def test_the_json_holds_everything() -> None:
    """Also figures that no table has."""
    content = json.loads(as_json(make_report()))
    assert content["device"]["total_bytes"] == 24 * GIB
    assert content["results"][4]["figures"] == {"build_seconds": 3.0}
    assert content["plans"]["small"]["weights_bytes"] == 15 * GIB
    assert {one["outcome"] for one in content["results"]} == {"measured", "skipped", "failed"}


def test_every_variant_is_one_that_some_entry_could_have() -> None:
    """And of a model's own optimizations there is one more, unless single ones were asked for."""
    pipelines = ("FluxKontextPipeline", "Flux2KleinPipeline", "QwenImageEditPlusPipeline")
    assert all(None in [refusal(wanted, pipeline) for pipeline in pipelines] for wanted in VARIANTS.values() if wanted)
    assert refusal({"cache": {"kind": "first_block"}}, "FluxKontextPipeline") is not None
    assert list(variants_of({"vae_tiling": True}, None)) == [OF_ENTRY, *VARIANTS]
    assert list(variants_of({}, None)) == list(VARIANTS)
    assert list(variants_of({"vae_tiling": True}, ["offload: model"])) == ["offload: model"]
    assert variants_of({"vae_tiling": True}, []) == {}
