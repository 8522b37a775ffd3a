"""What the ledger gives up is deleted from a real S3 server, and nothing else is."""

import io
import secrets

import pytest
from structlog.testing import capture_logs

from server.errors import ObjectNotFound, StoreUnavailable
from server.store import Store
from server.store_trash import _Doomed


@pytest.fixture
def key():
    """Give an id that no other test uses."""
    return secrets.token_hex(16)


@pytest.fixture
def store(s3):
    """Give a Store on the shared S3 server."""
    return s3.store


def put_upload(store, key):
    store.put_upload(key, io.BytesIO(b"photo"), 5, "image/jpeg")


def put_output(store, key):
    store.put_output(key, b"result", "image/webp")


def is_there(store, name):
    folder, _, key = name.partition("/")
    try:
        return bool(store.read_start(key, 10) if folder == "uploads" else store.read_output(key))
    except ObjectNotFound:
        return False


def num_requests(store, s3):
    return store._pool.connection_from_url(f"http://{s3.settings.endpoint}").num_requests


def test_what_is_named_goes_and_its_neighbours_stay(store, key):
    """Uploads, outputs and all that an attempt has stored are deleted; what is only called alike is not."""
    put_upload(store, key)
    put_upload(store, f"{key}0")
    outputs = [f"{key}/{place}" for place in ("1/output.webp", "2/output.webp", "2/more.png", "20/output.webp")]
    for each in outputs:
        put_output(store, each)
    names = [f"uploads/{key}", f"outputs/{key}/1/output.webp", f"outputs/{key}/2/"]
    assert sorted(store.delete(names)) == sorted(names)
    assert not is_there(store, f"uploads/{key}")
    assert [is_there(store, f"outputs/{each}") for each in outputs] == [False, False, False, True]
    assert is_there(store, f"uploads/{key}0")


def test_what_is_gone_already_counts_as_gone(store, key):
    """Deleting twice, or what never was, is no mistake: the name may leave the trash."""
    names = [f"uploads/{key}", f"outputs/{key}/1/output.webp", f"outputs/{key}/1/"]
    assert sorted(store.delete(names)) == sorted(names)
    put_output(store, f"{key}/1/output.webp")
    assert store.delete([names[1], names[2], names[1]]) == [names[1], names[2]]
    assert sorted(store.delete(names)) == sorted(names)


def test_nothing_costs_nothing(s3):
    """An empty trash asks the store for nothing."""
    store = Store(s3.settings)
    assert store.delete([]) == []
    assert num_requests(store, s3) == 0
    store.close()


def test_many_go_in_few_calls(s3, key):
    """A call deletes a thousand objects: 1,500 of them take two."""
    store = Store(s3.settings)
    names = [f"uploads/{key}{number}" for number in range(1500)]
    put_upload(store, f"{key}0")
    put_upload(store, f"{key}1499")
    before = num_requests(store, s3)
    assert store.delete(names) == names
    assert num_requests(store, s3) - before == 2
    assert not is_there(store, names[0])
    assert not is_there(store, names[-1])
    store.close()


def test_attempts_are_listed_one_by_one_and_deleted_together(s3, key):
    """Many attempts cost one listing each, and one deletion for all."""
    store = Store(s3.settings)
    for number in range(5):
        put_output(store, f"{key}/{number}/output.webp")
    before = num_requests(store, s3)
    assert len(store.delete([f"outputs/{key}/{number}/" for number in range(5)])) == 5
    assert num_requests(store, s3) - before == 6
    store.close()


def test_a_huge_attempt_goes_piece_by_piece(store, key):
    """A call lists and deletes a thousand objects of a prefix at most; its name is not gone before they all are."""
    num_objects = 1003
    for number in range(num_objects):
        put_output(store, f"{key}/1/{number}")
    name = f"outputs/{key}/1/"
    assert store.delete([name]) == []
    left = [each for each in range(num_objects) if is_there(store, f"outputs/{key}/1/{each}")]
    assert len(left) == num_objects - 1000
    assert store.delete([name]) == [name]
    assert not is_there(store, f"outputs/{key}/1/{left[0]}")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "uploads/",
        "outputs/",
        "outputs//",
        "outputs///",
        "outputs/{key}/",
        "outputs//{key}/",
        "uploads/{key}/",
        "outputs/{key}/1//",
        "outputs/{key}/../",
        "outputs/../{key}",
        "uploads/{key}\n",
        "uploads/{key}\x01",
        "other/{key}",
        "{key}",
    ],
)
def test_a_wrong_name_deletes_nothing(store, key, name):
    """A name that might stand for a whole bucket, or for nothing that we store, stays in the trash; others go."""
    put_upload(store, key)
    put_output(store, f"{key}/1/output.webp")
    good = f"uploads/{key}0"
    with capture_logs() as logs:
        assert store.delete([name.format(key=key), good]) == [good]
    assert [(entry["event"], entry["num_names"]) for entry in logs] == [("trash.misnamed", 1)]
    assert is_there(store, f"uploads/{key}")
    assert is_there(store, f"outputs/{key}/1/output.webp")


def test_one_object_that_cannot_be_deleted_keeps_only_itself(s3, store, key):
    """The store tells for each object whether it refused it; the name of a refused one stays, and is logged once."""
    put_upload(store, key)
    refused = "../outside"  # SeaweedFS answers InvalidRequest for this one; no name of ours can stand for it
    doomed = [
        _Doomed("good", frozenset([key])),
        _Doomed("bad", frozenset([refused])),
        _Doomed("both", frozenset([f"{key}0", refused])),
        _Doomed("more", frozenset([f"{key}1"]), is_all=False),
    ]
    with capture_logs() as logs:
        assert list(store._trash._delete_at_once(s3.settings.uploads_bucket, doomed)) == ["good"]
    assert [(entry["event"], entry["num_objects"], entry["code"]) for entry in logs] == [
        ("trash.refused", 1, "InvalidRequest")
    ]
    assert not is_there(store, f"uploads/{key}")


def test_one_bucket_in_trouble_does_not_keep_the_other(s3, key):
    """What is gone is told, though the other bucket cannot be used; only when nothing is, trouble is raised."""
    put_output(s3.store, f"{key}/1/output.webp")
    store = Store(s3.settings.model_copy(update={"uploads_bucket": "is-not-there"}))
    names = [f"uploads/{key}", f"outputs/{key}/1/"]
    assert store.delete(names) == names[1:]
    assert not is_there(s3.store, f"outputs/{key}/1/output.webp")
    with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
        store.delete(names[:1])
    store.close()


def test_deleted_attempts_are_in_no_listing(s3, store, key):
    """SeaweedFS keeps their empty folders for a while; nobody who lists objects sees them."""
    put_output(store, f"{key}/1/output.webp")
    store.delete([f"outputs/{key}/1/"])
    listed = s3.store._client.list_objects(s3.settings.outputs_bucket, f"{key}/", recursive=True)
    assert list(listed) == []
    put_output(store, f"{key}/2/output.webp")
    assert store.read_output(f"{key}/2/output.webp") == b"result"
    store.delete([f"outputs/{key}/2/"])
