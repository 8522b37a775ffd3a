"""The examples of docs/api.md are run as they are written."""

import os
import re
import subprocess
from pathlib import Path

from PIL import Image

PAGE = Path(__file__).parent.parent.parent / "docs" / "api.md"


def test_every_example_of_the_api_page_works(stack, tmp_path: Path) -> None:
    """All shell blocks of the page, in order, stage one photo twice and fail nowhere."""
    stack.start_worker()
    stack.wait_ready()
    Image.linear_gradient("L").resize((320, 240)).convert("RGB").save(tmp_path / "hall.jpg")
    script = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL))
    environment = os.environ | {"RESTAGE_URL": str(stack.client.http.base_url).rstrip("/")}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-x", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(tmp_path / "staged.webp") as staged:
        assert staged.format == "WEBP"
    assert "conflict" in done.stdout
