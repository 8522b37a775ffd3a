"""What an attacker writes in places where something else is wanted: values of JSON, names, headers, parts of forms."""
# ruff: noqa: SIM905 (words are easier to read without quotes)

Header = tuple[bytes, bytes]

# Values of JSON, as they are written, for every place where another is wanted.
JSON_VALUES = [
    *"null true false 0 -1 1.5 1e3 -0.0 9007199254740993 18446744073709551616 1e308 NaN Infinity -Infinity".split(),
    *"1e999 -1e999 1e-999 01 +1 .5 1. 0x10 1_000 'a' undefined None True /**/1 1// [ { ] } , :".split(),
    *'"" "a" [] {} [null] [[]] {"a":1} [{"a":1}] [0,1,2] "null" "0" "unfinished "a""b" {"a":1,"a":2} {"":1}'.split(),
    *r'"\ud800" "\udc00\ud800" "a\ud800b" "\u0000" "\u001b[2J" "\u007f" "\uffff" "\b" "\f" "\x41" "\u12"'.split(),
    *r'"../../etc/passwd" "..\\..\\boot.ini" "%00" "\r\nX-Evil:1" "<script>" "\u202etxt.exe" "a\u0085b"'.split(),
    *r'"${jndi:ldap://x}" "{{7*7}}" ";FLUSHALL" {"\ud800":1} {"__proto__":{}} {"__class__":"a"} {"a/b~c":1}'.split(),
    *('" "', '"\t"', '"\n"', "9" * 5000, "-" + "9" * 5000, "0." + "1" * 5000, '"' + "x" * 300 + '"'),
    *('"' + "x" * 100_000 + '"', '"' + "\\u00fc" * 5000 + '"', '"' + "👩‍👩‍👧" * 200 + '"'),
    *("[" + "0," * 1000 + "0]", "[" + "{}," * 60 + "{}]", "[" * 40 + "]" * 40, '{"a": ' * 40 + "1" + "}" * 40),
    *("[" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000),
    "{" + ",".join(f'"a{number}":1' for number in range(200)) + "}",
]
# Names that some interpreter or other takes for more than a name.
TEXTS = [
    *".. . ../.. ..%2f..%2fetc%2fpasswd %2e%2e%2f ..;/ ..%5c..%5c %252e%252e%252f %c0%ae%c0%ae/".split(),
    *"%00 a%00b %0d%0aX-Evil:%20yes %0aforged %1b%5b2J %ff%fe %ed%a0%80 %f0%9f%98%80 %e2%80%ae % %zz".split(),
    *"// / a//b %2f a%2fb %3f %23 * jobs:all a:b:c {batch_id} %7B%7D null -1 a%20b a+b a;b a,b a&b=c = &".split(),
    *"'%20or%201=1 %27 %22 <script> $(id) `id` |id".split(),
    *("0" * 32, "F" * 32, "0" * 31, "0" * 33, "0" * 32 + "%0a", "0" * 32 + "%00", "0" * 32 + "/", "x" * 4000),
]
HEADER_VALUES = [
    *rb"a %00 0-0 0 - 1- 99999999999999999999-0 -1--1 18446744073709551616-0 bytes=0- bytes=5-2 items=0-1".split(),
    *rb"* ../../etc/passwd {} [] null true 1e999 ${jndi:ldap://x} =?utf-8?q?a?=".split(),
    *(
        b"",
        b" ",
        b"\t",
        b"\xff\xfe",
        b"\xc3\xbc",
        b"a\x00b",
        b"a\rb",
        b"a\nb",
        b"a\r\nX-Evil: yes",
        b"\x1b[2J",
        b"\x7f",
    ),
    *(b"a" * 255, b"a" * 256, b"a" * 100_000, b"bytes=" + b"0-1," * 500, b"a, b", b'"a', b"() { :; };"),
]
HEADER_NAMES = [
    *b"Idempotency-Key Last-Event-ID Range If-Range If-None-Match If-Modified-Since Accept Accept-Encoding".split(),
    *b"Accept-Language Content-Type Content-Encoding Cookie Origin Referer X-Request-Id X-Forwarded-For".split(),
    *b"X-Forwarded-Host X-Forwarded-Proto Forwarded X-Original-URL X-HTTP-Method-Override Host User-Agent".split(),
    *b"Authorization Proxy-Authorization Trailer Upgrade Expect Date Via X __class__ a:b".split(),
    *(b"", b"a b", b"\xff"),
]
METHODS = [
    *b"GET HEAD POST PUT PATCH DELETE OPTIONS TRACE CONNECT PROPFIND FOO get Get __class__ PRI SEARCH *".split(),
    *(b"G" * 3000, b"G\xff", b"", b"GET\x00"),
]
HOSTS = [
    *b"a:99999 a:-1 a:b [::1 [::1]:80 ::1 a@b a/b a?b a#b 127.0.0.1:0 xn--a.com a;b %00 [v1.a] [] : :80".split(),
    *(b"", b"a b", b"\xff", b"a" * 5000, b"a, b", b"\xe2\x84\x80"),
]
CHUNKED: Header = (b"Transfer-Encoding", b"chunked")
WEBSOCKET: tuple[Header, ...] = ((b"Sec-WebSocket-Key", b"a"), (b"Sec-WebSocket-Version", b"13"))
FRAMINGS: list[tuple[Header, ...]] = [
    *(((b"Content-Length", value),) for value in b"-1 +2 1e3 99999999999999999999 a 1000001".split()),
    ((b"Content-Length", b"10"), (b"Content-Length", b"11")),
    ((b"Content-Length", b"2"), CHUNKED),
    (CHUNKED,),
    (CHUNKED, CHUNKED),
    ((b"Transfer-Encoding", b"gzip, chunked"),),
    ((b"Transfer-Encoding", b"identity"),),
    ((b"Transfer-Encoding", b"\x0bchunked"),),
    ((b"Connection", b"Upgrade"), (b"Upgrade", b"websocket"), *WEBSOCKET),
    ((b"Connection", b"Upgrade, HTTP2-Settings"), (b"Upgrade", b"h2c"), (b"HTTP2-Settings", b"AAMAAABk")),
    ((b"Connection", b"keep-alive, close, a"),),
    ((b"Expect", b"100-continue"),),
    ((b"Expect", b"200-ok"),),
]
CHUNKED_BODIES = [
    *(b"zz\r\n", b"-1\r\n", b"5\r\nab", b"ffffffffffffffff\r\n", b"0\r\nX: y\r\n\r\n"),
    b"1;" + b"a" * 5000 + b"\r\nx\r\n0\r\n\r\n",
]
FORM = b"multipart/form-data"
CONTENT_TYPES = [
    *b"text/plain APPLICATION/JSON application/jsonp application/x-www-form-urlencoded application/msgpack".split(),
    *(b"", b"\xff", b"/", b";", b"a" * 9000, b"application/json;;;=", b"application/json, text/html", FORM),
    *(FORM + b"; boundary=", FORM + b"; boundary=" + b"x" * 71, FORM + b'; boundary="', FORM + b"; boundary=\xff"),
    *(FORM + b"; boundary=x; charset=utf-7", FORM + b"; boundary*=utf-8''x", b"multipart/mixed; boundary=x"),
    b"application/json; charset=utf-16",
]
# Behind `form-data; `.
DISPOSITIONS = [
    *(
        b'name="a"',
        b'name=""',
        b"name=a",
        b"",
        b'name="batch"',
        b'name="../a"',
        b'name="a\nb"',
        b'name="\xf0\x9f\x98\x80"',
    ),
    b'name="' + b"n" * 1000 + b'"; filename="a"',
    *(
        b'name="a"; filename="' + filename + b'"'
        for filename in (
            *(b"", b"../../etc/passwd", b"a\\..\\b.jpg", b"a%0d%0ab", b"a\x00b", b"\xff\xfe", b"CON"),
            *(b"x" * 4000, b"x" * 9000, b'a"; filename="b'),
        )
    ),
    *(b"name=\"a\"; filename*=utf-8''%00%0d%0a%2e%2e%2f", b"name=\"a\"; filename*=utf-16''a"),
]
PART_HEADERS = [
    *(b"Content-Type: text/plain; charset=" + charset for charset in b"utf-7 utf-16 none-such \xff".split()),
    *(b"Content-Transfer-Encoding: base64", b"Content-Transfer-Encoding: \xff", b"Content-Length: -1"),
    *(b"X: " + b"a" * 5000, b"no colon", b": no name", b"Content-Disposition: form-data; name=other"),
    *(b"Content-Type: multipart/mixed; boundary=y", b"\r\n".join(b"X-%d: a" % number for number in range(30))),
]
