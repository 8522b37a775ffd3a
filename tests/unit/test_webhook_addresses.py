"""Webhooks' addresses: what may be written, and that nothing inside our own network passes for public."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.hosts import normalise_host
from server.webhooks.addresses import InvalidWebhook, check_url, is_public

# Ways to write this machine that a resolver understands, though they do not look like it.
ODD_LOOPBACKS = ["2130706433", "0x7f000001", "0x7f.1", "127.1", "127.0.1", "0177.0.0.1", "0177.1", "017700000001"]


@pytest.mark.parametrize(
    ("url", "scheme", "host", "port", "path", "host_header"),
    [
        ("https://example.com", "https", "example.com", 443, "/", "example.com"),
        ("HTTPS://Example.COM./Hook", "https", "example.com", 443, "/Hook", "example.com"),
        ("https://example.com:443/a?b=c&d", "https", "example.com", 443, "/a?b=c&d", "example.com"),
        ("https://example.com:8443?x=%20", "https", "example.com", 8443, "/?x=%20", "example.com:8443"),
        ("https://example.com//a", "https", "example.com", 443, "//a", "example.com"),
        ("https://bücher.example/ok", "https", "xn--bcher-kva.example", 443, "/ok", "xn--bcher-kva.example"),
        ("https://my_hooks.example/", "https", "my_hooks.example", 443, "/", "my_hooks.example"),
        ("https://93.184.216.34:80/", "https", "93.184.216.34", 80, "/", "93.184.216.34:80"),
        ("https://[2606:4700:0:0::1111]/", "https", "2606:4700::1111", 443, "/", "[2606:4700::1111]"),
        ("https://[2606:4700::1111]:81/", "https", "2606:4700::1111", 81, "/", "[2606:4700::1111]:81"),
    ],
)
def test_urls_are_taken_apart(url: str, scheme: str, host: str, port: int, path: str, host_header: str) -> None:
    """What is called must be exactly what was written, with the host in one spelling."""
    target = check_url(url, [])

    assert (target.scheme, target.host, target.port, target.path) == (scheme, host, port, path)
    assert target.host_header == host_header


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("", "such as https://"),
        ("example.com/hook", "such as https://"),
        ("//example.com/", "such as https://"),
        ("ftp://example.com/", "such as https://"),
        ("file:///etc/passwd", "such as https://"),
        ("javascript:alert(1)", "such as https://"),
        ("https:/example.com/", "such as https://"),
        (" https://example.com/", "such as https://"),
        ("https://example.com/\n", "spaces or letters"),
        ("https://example.com/a b", "spaces or letters"),
        ("https://example.com/a\r\nX: y", "spaces or letters"),
        ("https://example.com/ä", "spaces or letters"),
        ("http://example.com/", "needs https"),
        ("https://user@example.com/", "user or a password"),
        ("https://user:secret@example.com/", "user or a password"),
        ("https://example.com@127.0.0.1/", "user or a password"),
        ("https://example.com/#part", "fragment"),
        ("https://example.com#@127.0.0.1/", "fragment"),
        ("https://", "name of a host"),
        ("https:///path", "name of a host"),
        ("https://.", "name of a host"),
        ("https://a..b/", "name of a host"),
        ("https://-a.example/", "name of a host"),
        (f"https://{'a' * 64}.example/", "name of a host"),
        (f"https://{'a.' * 130}example/", "name of a host"),
        ("https://exa%6dple.com/", "name of a host"),
        ("https://exam ple.com/", "name of a host"),
        ("https://example.com\\@127.0.0.1/", "user or a password"),
        ("https://example.com\\.evil.example/", "name of a host"),
        ("https://exa\tmple.com/", "name of a host"),
        ("https://\uff11\uff12\uff17.0.0.1/", "name of a host"),
        ("https://[::1/", "colon"),
        ("https://::1/", "colon"),
        ("https://[::1]x/", "colon"),
        ("https://[fe80::1%25eth0]/", "name of a host"),
        ("https://[127.0.0.1]/", "name of a host"),
        ("https://[v1.a]/", "name of a host"),
        ("https://example.com:/", "colon"),
        ("https://example.com:0/", "65535"),
        ("https://example.com:65536/", "65535"),
        ("https://example.com:-1/", "65535"),
        ("https://example.com:80:80/", "65535"),
        ("https://example.com:\uff18\uff10/", "65535"),
        ("https://example.com/" + "a" * 2029, "2049 characters"),
    ],
)
def test_other_urls_are_refused(url: str, words: str) -> None:
    """A URL that is not allowed must be refused in its place, with what is allowed, and without being repeated."""
    with pytest.raises(InvalidWebhook) as caught:
        check_url(url, [])

    assert (caught.value.code, caught.value.http_status) == ("invalid_webhook", 422)
    (error,) = caught.value.errors
    assert (error.location, error.code) == ("/webhook/url", "invalid_webhook")
    assert words in error.detail
    assert "secret" not in error.detail


def test_the_longest_url_is_taken() -> None:
    """The limit itself is allowed."""
    assert len(check_url("https://example.com/" + "a" * 2028, []).path) == 2029


@given(st.text(max_size=60), st.sampled_from(["", "https://", "https://a.example", "https://[", "http://"]))
def test_any_text_is_taken_or_refused(text: str, start: str) -> None:
    """Whatever stands in a request must be a target or a refusal, never another error."""
    try:
        target = check_url(start + text, [])
    except InvalidWebhook:
        return
    assert target.scheme == "https"
    assert target.path.startswith("/")
    assert normalise_host(target.host) == target.host


@pytest.mark.parametrize("host", [*ODD_LOOPBACKS, "127.0.0.1", "10.1.2.3", "169.254.169.254", "0", "[::1]"])
def test_addresses_inside_are_refused_when_they_are_submitted(host: str) -> None:
    """An address that is not public must be refused at once, in whatever way it is written."""
    with pytest.raises(InvalidWebhook, match="not public"):
        check_url(f"https://{host}/", [])


@pytest.mark.parametrize("host", ODD_LOOPBACKS)
def test_odd_loopbacks_are_understood_by_the_resolver(host: str) -> None:
    """The list must hold what this system really takes for 127.0.0.1: else the test before it shows nothing."""
    assert socket.getaddrinfo(host, 1)[0][4][0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("localhost", "http://localhost:9000/"),
        ("LocalHost.", "http://LOCALHOST/"),
        ("127.0.0.1", "https://127.0.0.1/"),
        ("::1", "http://[0:0:0:0:0:0:0:1]/"),
        ("[::1]", "http://[::1]:80/"),
        ("bücher.intern", "http://xn--bcher-kva.intern/"),
    ],
)
def test_allowed_hosts_may_be_inside_and_without_tls(allowed: str, url: str) -> None:
    """A host of webhooks.allowed_hosts must be taken in any spelling, also by http."""
    assert check_url(url, ["other", allowed])
    with pytest.raises(InvalidWebhook):
        check_url(url, ["other"])


@pytest.mark.parametrize("url", ["http://localhost.example/", "http://a.localhost/", "http://127.1/", "http://[::1]/"])
def test_only_the_allowed_host_itself_is_allowed(url: str) -> None:
    """A host that is only like an allowed one must be refused."""
    with pytest.raises(InvalidWebhook):
        check_url(url, ["localhost", "127.0.0.1"])


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "2a00:1450:4001:80b::200e"])
def test_public_addresses(address: str) -> None:
    """Addresses of the public internet may be called."""
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",  # noqa: S104 (an address to refuse, not to listen on)
        "0.1.2.3",
        "10.0.0.1",
        "100.64.0.1",  # shared by carriers; some clouds have services here
        "127.0.0.1",
        "127.255.255.254",
        "168.63.129.16",
        "169.254.169.254",
        "172.16.0.1",
        "172.31.255.255",
        "192.0.0.192",
        "192.0.2.1",
        "192.88.99.1",
        "192.168.1.1",
        "198.18.0.1",
        "203.0.113.9",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "::127.0.0.1",
        "::93.184.216.34",
        "::ffff:127.0.0.1",
        "::ffff:93.184.216.34",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::5db8:d822",
        "64:ff9b:1::7f00:1",
        "100::1",
        "2001::1",
        "2001:0:7f00:1::",
        "2001:10::1",
        "2001:db8::1",
        "2002:7f00:1::",
        "2002:5db8:d822::1",
        "3fff::1",
        "5f00::1",
        "fc00::1",
        "fd00:ec2::254",
        "fe80::1",
        "fe80::1%lo",
        "fec0::1",
        "ff02::1",
        "ff0e::1",
    ],
)
def test_addresses_that_are_not_public(address: str) -> None:
    """What is inside, special, or carries another address inside it must not be called."""
    assert not is_public(address)


@given(st.ip_addresses(v=4))
def test_no_address_is_public_inside_another(address: object) -> None:
    """An IPv4 address written as IPv6, in any of the ways there are, must not be called, whatever it is."""
    high, low = divmod(int(address), 1 << 16)  # pyright: ignore[reportArgumentType]
    for form in ("::ffff:{}", "::{}", "64:ff9b::{}"):
        assert not is_public(form.format(address))
    assert not is_public(f"2002:{high:x}:{low:x}::1")
