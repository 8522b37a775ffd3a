"""Ten items of which four are refused at submission, one fails alone, and five become pictures."""

import io
import struct
import zlib

from PIL import Image


def picture(file_format: str, size: tuple[int, int] = (160, 120)) -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(buffer, file_format)
    return buffer.getvalue()


def huge_png(side: int) -> bytes:
    """Return a PNG whose header announces side x side pixels; it holds a single row."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(side))) + chunk(b"IEND", b"")
    )


def test_bad_items_are_named_and_the_others_go_on(stack):
    """Text named .jpg, a huge PNG, a photo never sent and an unknown id are refused; a cut JPEG fails alone."""
    worker = stack.start_worker()
    stack.wait_ready()
    client = stack.client
    cut = picture("JPEG", (640, 480))
    files = {
        "good-0.png": picture("PNG"),
        "text.jpg": b"These are words and no picture at all. " * 20,
        "good-1.jpg": picture("JPEG"),
        "huge.png": huge_png(20_000),
        "good-2.webp": picture("WEBP"),
        "cut.jpg": cut[: len(cut) // 2],
        "never-sent.jpg": picture("JPEG", (200, 100)),
        "good-3.png": picture("PNG", (64, 90)),
        "good-4.jpg": picture("JPEG", (300, 200)),
    }
    forms = client.announce(files)
    for form, (name, data) in zip(forms, files.items(), strict=True):
        if name != "never-sent.jpg":
            client.send(form, data)
    items = [{"upload_id": form["upload_id"], "name": name} for form, name in zip(forms, files, strict=True)]
    items.append({"upload_id": "0123456789abcdef0123456789abcdef", "name": "unknown"})

    response = client.call("POST", "/v1/batches", json={"defaults": {"model": "tiny-flux-kontext"}, "items": items})

    assert response.status_code == 207, response.text
    refused = {error["index"]: error for error in response.json()["errors"]}
    names = [item["name"] for item in items]
    assert {names[index] for index in refused} == {"text.jpg", "huge.png", "never-sent.jpg", "unknown"}
    assert all(error["code"] and len(error["detail"]) > 20 for error in refused.values())
    assert len({error["code"] for error in refused.values()}) >= 3

    batch = client.finished(response.json()["batch"]["id"])
    jobs = {job["name"]: job for job in batch["jobs"]}
    assert batch["counts"] == {"total": 6, "queued": 0, "running": 0, "succeeded": 5, "failed": 1, "cancelled": 0}
    assert jobs["cut.jpg"]["status"] == "failed"
    assert jobs["cut.jpg"]["error"]["code"] == "invalid_input"
    assert jobs["cut.jpg"]["attempts"] == 1
    for name, job in jobs.items():
        if name.startswith("good"):
            Image.open(io.BytesIO(client.output(job))).load()
    assert max(client.received) < 500
    assert worker.is_running
