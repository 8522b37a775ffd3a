"""Lists of batches and jobs: who sees what, in which order, and how far a cursor carries."""

import io
import random

import pytest
from PIL import Image

from server.keys import KeyStore

QWEN = "tiny-qwen-image-edit-2511"
FLUX = "tiny-flux-kontext"


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def upload_id(api):
    """Give a photo that is in the store."""
    return api.upload(picture())[0]


@pytest.fixture
def accept(api, upload_id):
    """Give a function that submits a batch of `count` jobs of one photo."""

    def submit(count=1, **body):
        return api.accept(*[{"upload_id": upload_id}] * count, **body)

    return submit


@pytest.fixture
def seed(request):
    """Give a seed that a failure shows."""
    drawn = random.randrange(10**6)
    print(f"seed {drawn}")  # noqa: T201 (pytest shows it with a failure)
    return drawn


def page(api, path, headers=None, **params):
    response = api.http.get(path, params=params, headers=headers)
    assert response.status_code == 200, response.text
    assert response.json().keys() == {"data", "next_cursor"}
    return response.json()


def ids(api, path, **params):
    return [one["id"] for one in page(api, path, limit=100, **params)["data"]]


def walk(api, path, draw, after_page=lambda: None, **params):
    """Read a list to its end in pages of a random size; returns the ids in order."""
    found, cursor = [], None
    for _ in range(500):
        limit = draw.randint(1, 7)
        given = {} if cursor is None else {"cursor": cursor}
        read = page(api, path, limit=limit, **params, **given)
        assert len(read["data"]) <= limit
        found += [one["id"] for one in read["data"]]
        cursor = read["next_cursor"]
        if cursor is None:
            return found
        after_page()
    raise AssertionError("the list has no end")


def test_nothing_is_an_empty_list(api):
    """Lists of nothing are empty, whatever they are filtered by, and have no next page."""
    empty = {"data": [], "next_cursor": None}
    assert page(api, "/v1/batches") == empty
    assert page(api, "/v1/batches", status="finished", label="12 Oak St", limit=1, cursor="1") == empty
    assert page(api, "/v1/jobs") == empty
    assert page(api, "/v1/jobs", status="failed", model=FLUX, limit=1, cursor="1.0") == empty


def test_batches_are_listed_newest_first_without_their_jobs(api, accept):
    """An entry of the list is the batch without its jobs; 20 are on a page when nobody asks for another number."""
    accepted = [accept(2, label=f"house {number}", metadata={"mls": str(number)}) for number in range(22)]
    read = page(api, "/v1/batches")
    assert [one["id"] for one in read["data"]] == [batch["id"] for batch in reversed(accepted)][:20]
    for shown, batch in zip(read["data"], reversed(accepted), strict=False):
        assert shown == {name: value for name, value in batch.items() if name != "jobs"} | {"eta_seconds": None}
    rest = page(api, "/v1/batches", cursor=read["next_cursor"])
    assert [one["id"] for one in rest["data"]] == [accepted[1]["id"], accepted[0]["id"]]
    assert rest["next_cursor"] is None


def test_jobs_are_listed_across_batches(api, accept):
    """Jobs come as they are read one by one: the newest batch first, the jobs of a batch in their order."""
    accepted = [accept(3), accept(2)]
    expected = [job for batch in reversed(accepted) for job in batch["jobs"]]
    assert page(api, "/v1/jobs")["data"] == [api.http.get(f"/v1/jobs/{job['id']}").json() for job in expected]
    api.run_next()
    [done] = page(api, "/v1/jobs", status="succeeded")["data"]
    assert done["output"]["url"].startswith("http")


@pytest.mark.parametrize(("path", "shown"), [("/v1/batches", "batches"), ("/v1/jobs", "jobs")])
def test_a_walk_with_cursors_sees_each_entry_once_while_new_ones_arrive(api, accept, seed, path, shown):
    """Whatever the pages' sizes, a walk sees all that was there at its begin, in order, and nothing twice."""
    draw = random.Random(seed)
    accepted = [accept(draw.randint(1, 4)) for _ in range(15)]
    expected = [
        one
        for batch in reversed(accepted)
        for one in ([batch["id"]] if shown == "batches" else [job["id"] for job in batch["jobs"]])
    ]
    assert walk(api, path, draw, after_page=lambda: draw.random() < 0.3 and accept()) == expected


def test_a_page_that_ends_with_the_list_has_no_next_one(api, accept):
    """The last page is known as the last one: nobody has to ask for an empty page to find the end."""
    batch = accept(2)
    assert page(api, "/v1/batches", limit=1)["next_cursor"] is None
    assert page(api, "/v1/jobs", limit=2)["next_cursor"] is None
    first = page(api, "/v1/jobs", limit=1)
    last = page(api, "/v1/jobs", limit=1, cursor=first["next_cursor"])
    assert (last["data"][0]["id"], last["next_cursor"]) == (batch["jobs"][1]["id"], None)


def test_a_cursor_outlives_its_batch(api, accept):
    """A page goes on at its place although the batch that the page before ended with was deleted meanwhile."""
    oldest, second, third, newest = (accept(2) for _ in range(4))
    batches = page(api, "/v1/batches", limit=2)
    jobs = page(api, "/v1/jobs", limit=3)
    assert jobs["data"][-1]["id"] == third["jobs"][0]["id"]
    for gone in (newest, third):
        api.http.post(f"/v1/batches/{gone['id']}/cancel")
        assert api.http.delete(f"/v1/batches/{gone['id']}").status_code == 204
    assert ids(api, "/v1/batches", cursor=batches["next_cursor"]) == [second["id"], oldest["id"]]
    expected = [job["id"] for batch in (second, oldest) for job in batch["jobs"]]
    assert ids(api, "/v1/jobs", cursor=jobs["next_cursor"]) == expected


def test_batches_are_filtered_by_status(api, accept):
    """A batch is listed where it stands now, and nowhere else, through each change of its state and back."""

    def where(batch):
        return [
            status
            for status in ("queued", "running", "finished")
            if batch["id"] in ids(api, "/v1/batches", status=status)
        ]

    batch = accept(2)
    assert where(batch) == ["queued"]
    api.run_next()
    assert where(batch) == ["running"]
    api.http.post(f"/v1/batches/{batch['id']}/cancel")
    assert where(batch) == ["finished"]
    api.http.post(f"/v1/batches/{batch['id']}/retry")
    assert where(batch) == ["queued"]
    api.run_next()
    assert where(batch) == ["finished"]
    api.http.delete(f"/v1/batches/{batch['id']}")
    assert where(batch) == []


def test_jobs_are_filtered_by_status_and_model(api, upload_id):
    """Both filters hold at once, each job by itself: the others of its batch stay out."""
    items = [{"upload_id": upload_id, "model": model} for model in (QWEN, FLUX, QWEN, FLUX)]
    first, second = api.accept(*items), api.accept(*items)
    for batch in (first, second):
        assert api.http.post(f"/v1/jobs/{batch['jobs'][1]['id']}/cancel").status_code == 200
    done = [api.run_next() for _ in range(3)]

    def expected(check):
        jobs = [api.http.get(f"/v1/jobs/{job['id']}").json() for batch in (second, first) for job in batch["jobs"]]
        return [job["id"] for job in jobs if check(job)]

    for status in ("queued", "running", "succeeded", "failed", "cancelled"):
        assert ids(api, "/v1/jobs", status=status) == expected(lambda job, status=status: job["status"] == status)
        for model in (QWEN, FLUX):
            wanted = (status, model)
            assert ids(api, "/v1/jobs", status=status, model=model) == expected(
                lambda job, wanted=wanted: (job["status"], job["model"]) == wanted
            )
    assert len(ids(api, "/v1/jobs", status="succeeded")) == len(done)
    assert ids(api, "/v1/jobs", model=FLUX) == expected(lambda job: job["model"] == FLUX)
    assert ids(api, "/v1/jobs", model="no-such-model") == []


def test_filtered_walks_see_each_match_once(api, accept, upload_id, seed):
    """With filters, too, the pages together are the whole list, in its order."""
    draw = random.Random(seed)
    accepted = []
    for _ in range(15):
        items = [{"upload_id": upload_id, "model": draw.choice([QWEN, FLUX])} for _ in range(draw.randint(1, 4))]
        accepted.append(api.accept(*items, label=draw.choice(["a", "b"])))
    for batch in draw.sample(accepted, 5):
        api.http.post(f"/v1/jobs/{draw.choice(batch['jobs'])['id']}/cancel")
    newest_first = [api.http.get(f"/v1/batches/{batch['id']}").json() for batch in reversed(accepted)]
    assert walk(api, "/v1/batches", draw, label="a") == [one["id"] for one in newest_first if one["label"] == "a"]
    assert walk(api, "/v1/batches", draw, label="b", status="queued") == [
        one["id"] for one in newest_first if (one["label"], one["status"]) == ("b", "queued")
    ]
    jobs = [job for batch in newest_first for job in batch["jobs"]]
    assert walk(api, "/v1/jobs", draw, status="cancelled") == [
        job["id"] for job in jobs if job["status"] == "cancelled"
    ]
    assert walk(api, "/v1/jobs", draw, status="queued", model=QWEN) == [
        job["id"] for job in jobs if (job["status"], job["model"]) == ("queued", QWEN)
    ]


def test_a_filter_that_leaves_out_much_costs_a_bounded_look(api, accept, monkeypatch):
    """A page stops after a number of looks; it may then be empty, and its cursor leads on to the match."""
    monkeypatch.setattr("server.ledger.reading.MOST_LOOKS", 2)
    wanted = accept(label="wanted")
    for _ in range(5):
        accept(2, label="other")
    draw = random.Random(0)
    assert page(api, "/v1/batches", label="wanted") | {"next_cursor": None} == {"data": [], "next_cursor": None}
    assert walk(api, "/v1/batches", draw, label="wanted") == [wanted["id"]]
    api.http.post(f"/v1/batches/{wanted['id']}/cancel")
    assert walk(api, "/v1/jobs", draw, model="other") == []
    assert len(walk(api, "/v1/jobs", draw, model=QWEN)) == 11


@pytest.mark.parametrize(
    "label",
    [
        "12 Oak St",
        "Düsseldorf, Königsallee 1",
        "部屋 🛋",
        "a&b=c#d?e+f%20",
        " ",
        "*",
        "[a-z]",
        "x" * 255,
        "e\u0301",
    ],
)
def test_a_label_is_compared_exactly(api, accept, label):
    """Any text is a label, and finds exactly its batches: no pattern, no folding of case or of accents."""
    batch = accept(label=label)
    accept(label=f"{label[:200]}!")
    accept(label="\u00e9")
    accept()
    assert ids(api, "/v1/batches", label=label) == [batch["id"]]
    assert ids(api, "/v1/batches", label=label[:-1] + "?") == []


WRONG = [
    ("limit=0", "?limit", ["from 1 to 100"]),
    ("limit=101", "?limit", ["from 1 to 100"]),
    ("limit=-1", "?limit", ["from 1 to 100"]),
    ("limit=ten", "?limit", ["a whole number from 1 to 100"]),
    ("limit=", "?limit", ["a whole number from 1 to 100"]),
    ("limit=1.5", "?limit", ["a whole number from 1 to 100"]),
    ("limit=" + "9" * 500, "?limit", ["from 1 to 100"]),
    ("limit", "?limit", ["a whole number from 1 to 100"]),
    ("limit=1&limit=2", "?limit", ["more than once"]),
    ("limit=1&limit=1", "?limit", ["more than once"]),
    ("cursor=", "?cursor", ["next_cursor"]),
    ("cursor=nope", "?cursor", ["next_cursor"]),
    ("cursor=-1", "?cursor", ["next_cursor"]),
    ("cursor=1e5", "?cursor", ["next_cursor"]),
    ("cursor=(1", "?cursor", ["next_cursor"]),
    ("cursor=%2Binf", "?cursor", ["next_cursor"]),
    ("cursor=nan", "?cursor", ["next_cursor"]),
    ("cursor=1.2.3", "?cursor", ["next_cursor"]),
    ("cursor=1%0A", "?cursor", ["next_cursor"]),
    ("cursor=%D9%A1%D9%A2", "?cursor", ["next_cursor"]),  # digits, but not Redis'
    ("cursor=" + "1" * 65, "?cursor", ["64 characters"]),
    ("status=done", "?status", ["queued", "running"]),
    ("status=", "?status", ["queued", "running"]),
    ("status=QUEUED", "?status", ["queued", "running"]),
    ("status=queued,running", "?status", ["queued", "running"]),
    ("statuses=queued", "?statuses", ["did you mean status?"]),
    ("offset=3", "?offset", ["cursor", "limit", "status"]),
    ("owner=ben", "?owner", []),
    ("=1", "?", []),
]
WRONG_OF_BATCHES = [
    ("status=succeeded", "?status", ["finished"]),
    ("model=x", "?model", ["label"]),
    ("label=", "?label", ["1 to 255 characters"]),
    ("label=" + "x" * 256, "?label", ["1 to 255 characters"]),
]
WRONG_OF_JOBS = [
    ("status=finished", "?status", ["succeeded", "failed", "cancelled"]),
    ("label=x", "?label", ["model"]),
    ("model=", "?model", ["1 to 64 characters"]),
    ("model=" + "x" * 65, "?model", ["1 to 64 characters"]),
]


@pytest.mark.parametrize(
    ("path", "mistakes"), [("/v1/batches", WRONG + WRONG_OF_BATCHES), ("/v1/jobs", WRONG + WRONG_OF_JOBS)]
)
def test_a_wrong_parameter_is_refused_with_what_is_allowed(api, path, mistakes):
    """A mistake in a query is never silently ignored: the answer names the parameter and what it may be."""
    for query, location, told in mistakes:
        response = api.http.get(f"{path}?{query}")
        assert response.status_code == 422, (query, response.text)
        problem = response.json()
        assert problem["code"] == "invalid_request"
        assert [error["location"] for error in problem["errors"]] == [location], query
        detail = problem["errors"][0]["detail"]
        assert not [word for word in told if word not in detail], (query, detail)
        assert detail in problem["detail"]


def test_routes_that_read_no_parameter_refuse_any(api, accept):
    """Also where no filter could be mistyped, what nobody reads is refused."""
    batch = accept()
    job_id = batch["jobs"][0]["id"]
    for method, path in (
        ("GET", f"/v1/batches/{batch['id']}?limit=1"),
        ("GET", f"/v1/batches/{batch['id']}/events?last_event_id=1"),
        ("GET", f"/v1/batches/{batch['id']}/archive?x=1"),
        ("GET", f"/v1/jobs/{job_id}?x=1"),
        ("GET", "/v1/models?x=1"),
        ("POST", "/v1/batches?dry_run=true"),
        ("POST", f"/v1/batches/{batch['id']}/cancel?x=1"),
        ("DELETE", f"/v1/batches/{batch['id']}?force=true"),
    ):
        response = api.http.request(method, path)
        assert response.status_code == 422, (path, response.text)
        [error] = response.json()["errors"]
        assert error["location"] == "?" + path.partition("?")[2].partition("=")[0]


def test_several_mistakes_are_told_at_once(api):
    """A client that wrote two things wrong hears of both."""
    response = api.http.get("/v1/batches?limit=0&status=done")
    assert {error["location"] for error in response.json()["errors"]} == {"?limit", "?status"}
    response = api.http.get("/v1/batches?" + "&".join(f"x{number}=1" for number in range(500)))
    assert (response.status_code, len(response.json()["errors"])) == (422, 50)


@pytest.mark.parametrize("label", ["%ED%A0%80", "%FF", "%00", "%E2%80%AE"])
def test_texts_that_are_none_find_nothing(api, accept, label):
    """Broken and hostile encodings in a filter are answered, and match no batch."""
    accept(label="a")
    response = api.http.get(f"/v1/batches?label={label}")
    assert response.status_code in {200, 422}
    assert response.json().get("data", []) == []


def test_everybody_lists_their_own_work_and_an_admin_all_jobs(open_api, tmp_path):
    """Nobody sees another owner's batches or jobs in any list; an admin sees all jobs, and its own batches."""
    keys = KeyStore(tmp_path / "keys.jsonl")
    drawn = {"ana": keys.add("ana", "user"), "ben": keys.add("ben", "user"), "op": keys.add("op", "admin")}
    who = {name: {"Authorization": f"Bearer {key}"} for name, key in drawn.items()}
    with open_api(RESTAGE__AUTH__MODE="keys", RESTAGE__AUTH__KEYS_FILE=str(keys.path)) as api:
        batches = {}
        for name, headers in who.items():
            [upload_id] = api.upload(picture(), headers=headers)
            response = api.submit({"upload_id": upload_id}, label="shared", headers=headers)
            batches[name] = response.json()["batch"]

        for name, headers in who.items():
            for params in ({}, {"label": "shared"}, {"status": "queued"}, {"limit": 1}):
                found = page(api, "/v1/batches", headers, **params)
                assert [one["id"] for one in found["data"]] == [batches[name]["id"]]
                assert found["next_cursor"] is None
        for name in ("ana", "ben"):
            own = [batches[name]["jobs"][0]["id"]]
            for params in ({}, {"status": "queued"}, {"model": QWEN}):
                assert [one["id"] for one in page(api, "/v1/jobs", who[name], **params)["data"]] == own
        everybody = [batches[name]["jobs"][0]["id"] for name in ("op", "ben", "ana")]
        assert [one["id"] for one in page(api, "/v1/jobs", who["op"])["data"]] == everybody
        assert [one["id"] for one in page(api, "/v1/jobs", who["op"], status="queued")["data"]] == everybody
        # A cursor of one caller opens nothing to another.
        cursor = page(api, "/v1/jobs", who["op"], limit=1)["next_cursor"]
        assert [one["id"] for one in page(api, "/v1/jobs", who["ana"], cursor=cursor)["data"]] == [everybody[2]]
        assert api.http.get("/v1/batches?limit=0").status_code == 401, "who calls is looked at first"
