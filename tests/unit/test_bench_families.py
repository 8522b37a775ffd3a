"""What stands in for a device in benchmarks is no part of the product."""

from pathlib import Path

import yaml

from server.model_entry import families

REPOSITORY = Path(__file__).parents[2]
ENTRIES = yaml.safe_load((REPOSITORY / "scripts" / "bench_models.yaml").read_text())


def test_the_timer_is_no_family_of_the_product():
    """A family of the benchmarks is unknown to the server, and no entry of its registry asks for one."""
    bench_families = {entry["family"] for entry in ENTRIES}
    folder = REPOSITORY / "scripts" / "bench_families"
    served = yaml.safe_load((REPOSITORY / "config" / "models.yaml").read_text())

    assert bench_families == {found.parent.name for found in folder.glob("*/params.py")}
    assert not bench_families & {*families()}
    assert not bench_families & {entry["family"] for entry in served}
