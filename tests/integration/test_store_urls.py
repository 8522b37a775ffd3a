"""Results are downloaded by signed URLs that clients may keep for a while, shown on a real S3 server."""

import secrets
import time
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from server.store import Store

PICTURE = b"a picture, as far as the store can tell"


@pytest.fixture
def key():
    """Give an object key that no other test uses."""
    return secrets.token_hex(16)


@pytest.fixture
def store(s3):
    """Give a Store on the shared S3 server."""
    return s3.store


@pytest.mark.parametrize(
    ("filename", "disposition"),
    [
        ("hall.webp", "attachment; filename=\"hall.webp\"; filename*=UTF-8''hall.webp"),
        ('Küche "1".webp', "attachment; filename=\"K_che _1_.webp\"; filename*=UTF-8''K%C3%BCche%20%221%22.webp"),
        ("a\r\nSet-Cookie: b", "attachment; filename=\"a__Set-Cookie_ b\"; filename*=UTF-8''a%0D%0ASet-Cookie%3A%20b"),
    ],
)
def test_output_is_downloaded_under_its_name(store, key, filename, disposition):
    """A result's URL gives its bytes as a download with its type and a name that cannot break the header."""
    store.put_output(key, PICTURE, "application/octet-stream")
    url, expires_at = store.output_url(key, filename=filename, content_type="image/webp", ttl_seconds=600)
    answer = httpx.get(url)
    assert answer.content == PICTURE
    assert answer.headers["content-type"] == "image/webp"
    assert answer.headers["content-disposition"] == disposition
    assert timedelta(seconds=295) < expires_at - datetime.now(UTC) <= timedelta(seconds=600)
    assert parse_qs(urlsplit(url).query)["X-Amz-Expires"] == ["600"]


def test_output_url_ends(store, key):
    """A result's URL works until the moment that was told, and is refused after it."""
    store.put_output(key, PICTURE, "image/webp")
    url, expires_at = store.output_url(key, filename="a.webp", content_type="image/webp", ttl_seconds=6)
    assert httpx.get(url).status_code == 200
    time.sleep((expires_at - datetime.now(UTC)).total_seconds() + 1.1)
    assert httpx.get(url).status_code == 403


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("/{key}?", "/another?"),
        ("X-Amz-Expires=604800", "X-Amz-Expires=604799"),
        ("X-Amz-Date={date}", "X-Amz-Date={later}"),
        ("image%2Fwebp", "text%2Fhtml"),
        ("a.webp", "a.html"),
        ("attachment", "inline"),
    ],
    ids=["key", "expiry", "date", "type", "name", "shown"],
)
def test_output_url_cannot_be_changed(store, key, part, other):
    """A result's URL is signed as a whole: for another object, a longer life or another type it is worth nothing."""
    store.put_output(key, PICTURE, "image/webp")
    store.put_output("another", PICTURE, "image/webp")
    url, _ = store.output_url(key, filename="a.webp", content_type="image/webp", ttl_seconds=7 * 86_400)
    date = parse_qs(urlsplit(url).query)["X-Amz-Date"][0]
    words = {"key": key, "date": date, "later": f"{date[:-2]}{9 - int(date[-2])}Z"}
    tampered = url.replace(part.format(**words), other.format(**words))
    assert tampered != url
    assert httpx.get(tampered).status_code == 403
    assert httpx.get(url, headers={"Host": "photos.example.com"}).status_code == 403
    assert httpx.get(url).status_code == 200


def test_output_url_stays_the_same_for_half_its_life(s3, store, key):
    """Every process signs the same URL within a window, dated at the window's begin; half its life is always left."""
    store.put_output(key, PICTURE, "image/webp")
    other_process = Store(s3.settings)
    week = 7 * 86_400
    signed = set()
    for signer in (store, other_process, store):
        url, expires_at = signer.output_url(key, filename="a.webp", content_type="image/webp", ttl_seconds=week)
        left = expires_at - datetime.now(UTC)
        assert timedelta(seconds=week / 2 - 5) < left <= timedelta(seconds=week)
        signed_at = datetime.strptime(parse_qs(urlsplit(url).query)["X-Amz-Date"][0], "%Y%m%dT%H%M%S%z")
        assert signed_at == expires_at - timedelta(seconds=week)
        assert httpx.get(url).content == PICTURE
        signed.add(url)
    assert len(signed) == 1
    other_process.close()
