"""Stories of uploads: who may use one, when the same bytes need not be sent again, and when a photo goes."""

from typing import Any

import pytest

from tests.integration.ledger.kit import FORM_SECONDS, UNUSED_SECONDS, record

DIGEST = "d" * 64
# A form counts as one that can be used for a minute more than it is said to last.
FORM_IS_OVER = FORM_SECONDS + 61


def name_in_batch(ledger: Any, batch_id: str, upload_ids: list[str], owner: str = "ana") -> None:
    """Have a batch accepted that names these uploads in one job."""
    batch = ledger.with_uploads(ledger.batch(batch_id, ["qwen"], owner=owner), [upload_ids])
    assert ledger.submit(batch).kind == "accepted"


def let_it_end(ledger: Any) -> None:
    """Bring the job that is next to its end."""
    assert ledger.commit(ledger.claim(["qwen"])) == "ok"


def test_uploads_are_shown_to_their_owner_only(ledger: Any) -> None:
    """Unknown and foreign uploads look alike."""
    mine = record("u1", filename="Küche.jpg", sha256=DIGEST)
    assert ledger.announce([mine]) == ["u1"]
    assert ledger.run(ledger.api.get_uploads("ana", ["u-none", "u1"])) == [None, mine]
    assert ledger.upload("u1", owner="bo") is None


def test_the_same_bytes_are_sent_once(ledger: Any) -> None:
    """A photo that a batch has named is offered again, once nobody can use its form to change it any more."""
    ledger.announce([record("u1", sha256=DIGEST)])
    name_in_batch(ledger, "b1", ["u1"])
    assert ledger.announce([record("u2", sha256=DIGEST)]) == ["u2"]
    ledger.pass_time(FORM_SECONDS)
    assert ledger.announce([record("u3", sha256=DIGEST)]) == ["u3"]
    ledger.pass_time(61)
    assert ledger.announce([record("u4", sha256=DIGEST), record("u5"), record("u6", sha256=DIGEST)]) == [
        "u1",
        "u5",
        "u1",
    ]
    assert ledger.upload("u4") is None
    name_in_batch(ledger, "b2", ["u1"])
    assert ledger.upload("u1").references == 2


@pytest.mark.parametrize(
    "other",
    [{"size_bytes": 999}, {"content_type": "image/png"}, {"sha256": "e" * 64}, {"sha256": None}, {"owner": "bo"}],
    ids=("size", "type", "digest", "no digest", "owner"),
)
def test_other_bytes_are_not_taken_for_the_same(ledger: Any, other: dict[str, Any]) -> None:
    """Digest, size, type and owner must all be those of the photo that is there."""
    ledger.announce([record("u1", sha256=DIGEST)])
    name_in_batch(ledger, "b1", ["u1"])
    ledger.pass_time(FORM_IS_OVER)
    assert ledger.announce([record("u2", **{"sha256": DIGEST} | other)]) == ["u2"]


def test_a_photo_that_nobody_has_seen_is_not_offered(ledger: Any) -> None:
    """As long as no batch has named an upload, its bytes may never have come."""
    ledger.announce([record("u1", sha256=DIGEST)])
    ledger.pass_time(FORM_IS_OVER)
    assert ledger.announce([record("u2", sha256=DIGEST)]) == ["u2"]


def test_a_photo_that_the_server_sent_is_offered_at_once(ledger: Any) -> None:
    """Without a form there is nothing to wait for."""
    ledger.announce([record("u1", sha256=DIGEST)], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1"])
    assert ledger.announce([record("u2", sha256=DIGEST)]) == ["u1"]


def test_an_offered_photo_stays_as_long_as_was_promised(ledger: Any) -> None:
    """Whoever was told its id can name it, though its batch has let go of it meanwhile; then its digest goes too."""
    ledger.announce([record("u1", sha256=DIGEST)])
    name_in_batch(ledger, "b1", ["u1"])
    let_it_end(ledger)
    ledger.pass_time(300)
    assert ledger.announce([record("u2", sha256=DIGEST)]) == ["u1"]
    ledger.pass_time(100)
    assert ledger.expire() == {"inputs": 1}
    # Offered once more while it waits for its end: the time begins anew.
    ledger.pass_time(1000)
    assert ledger.announce([record("u3", sha256=DIGEST)]) == ["u1"]
    ledger.pass_time(UNUSED_SECONDS - 50)
    assert "uploads" not in ledger.expire()
    assert ledger.upload("u1") is not None
    ledger.pass_time(100)
    assert ledger.expire()["uploads"] == 1
    assert ledger.upload("u1") is None
    assert ledger.announce([record("u4", sha256=DIGEST)]) == ["u4"]


def test_an_offered_photo_that_a_batch_needs_is_not_due(ledger: Any) -> None:
    """The promise ends before the batch does, and changes nothing for it."""
    ledger.announce([record("u1", sha256=DIGEST)], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1"])
    assert ledger.announce([record("u2", sha256=DIGEST)]) == ["u1"]
    ledger.pass_time(UNUSED_SECONDS + 50)
    assert ledger.expire() == {}
    assert ledger.upload("u1").references == 1


def test_a_shorter_promise_does_not_cut_a_longer_one(ledger: Any) -> None:
    """A server whose setting was lowered keeps what was promised before."""
    ledger.announce([record("u1", sha256=DIGEST)], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1"])
    assert ledger.announce([record("u2", sha256=DIGEST)], unused_seconds=2000) == ["u1"]
    assert ledger.announce([record("u3", sha256=DIGEST)], unused_seconds=10) == ["u1"]
    let_it_end(ledger)
    ledger.pass_time(1900)
    ledger.expire()
    assert ledger.upload("u1") is not None


def test_the_digest_passes_to_the_next_upload_of_the_same_bytes(ledger: Any) -> None:
    """When the offered one of two goes, the other is offered as soon as a batch names it."""
    ledger.announce([record("u1", sha256=DIGEST), record("u2", sha256=DIGEST)], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1"])
    name_in_batch(ledger, "b2", ["u2"])
    let_it_end(ledger)
    ledger.pass_time(400)
    assert ledger.expire() == {"inputs": 1, "uploads": 1}
    assert ledger.announce([record("u3", sha256=DIGEST)], form_seconds=0) == ["u3"]
    name_in_batch(ledger, "b3", ["u2"])
    assert ledger.announce([record("u4", sha256=DIGEST)]) == ["u2"]


def test_an_upload_that_goes_leaves_the_digest_of_another(ledger: Any) -> None:
    """Only the upload that is offered takes the offer with it."""
    ledger.announce([record("u1", sha256=DIGEST), record("u2", sha256=DIGEST)], form_seconds=0, unused_seconds=300)
    name_in_batch(ledger, "b1", ["u1"])
    ledger.pass_time(400)
    assert ledger.expire() == {"uploads": 1}
    assert ledger.upload("u2") is None
    assert ledger.announce([record("u3", sha256=DIGEST)]) == ["u1"]


def test_unused_uploads_go(ledger: Any) -> None:
    """What no batch names goes after its time, with its object; what a batch names does not."""
    ledger.announce([record("u1"), record("u2")])
    name_in_batch(ledger, "b1", ["u2"])
    ledger.pass_time(UNUSED_SECONDS - 50)
    assert ledger.expire() == {}
    ledger.pass_time(100)
    assert ledger.expire() == {"uploads": 1}
    assert ledger.trash() == {"uploads/key of u1"}
    assert [ledger.upload("u1"), ledger.upload("u2").references] == [None, 1]


def test_the_object_goes_only_when_its_form_cannot_bring_it_back(ledger: Any) -> None:
    """Where the record goes first, the deletion waits: a photo sent later would be nobody's."""
    ledger.announce([record("u1")], unused_seconds=100)
    ledger.pass_time(150)
    assert ledger.expire() == {"uploads": 1}
    assert ledger.trash() == set()
    ledger.pass_time(50)
    assert ledger.trash() == set()
    ledger.pass_time(100)
    assert ledger.trash() == {"uploads/key of u1"}


def test_a_batch_saves_a_photo_that_was_due(ledger: Any) -> None:
    """Until it has really gone, an upload can be named; after that it is missing."""
    ledger.announce([record("u1"), record("u2")])
    ledger.pass_time(UNUSED_SECONDS + 50)
    name_in_batch(ledger, "b1", ["u1"])
    assert ledger.expire() == {"uploads": 1}
    late = ledger.submit(ledger.with_uploads(ledger.batch("b2", ["qwen"]), [["u2"]]))
    assert (late.kind, late.text) == ("missing_upload", "u2")


def test_a_photo_stays_until_its_last_batch_lets_go(ledger: Any) -> None:
    """Two batches share an upload, one names it twice: it goes with the later of them, and only then."""
    ledger.announce([record("u1")])
    name_in_batch(ledger, "b1", ["u1", "u1"])
    name_in_batch(ledger, "b2", ["u1"])
    assert ledger.upload("u1").references == 3
    let_it_end(ledger)
    ledger.pass_time(400)
    assert ledger.expire() == {"inputs": 1}
    assert ledger.upload("u1").references == 1
    assert ledger.trash() == set()

    let_it_end(ledger)
    ledger.pass_time(300)
    assert "inputs" not in ledger.expire()
    ledger.pass_time(100)
    assert ledger.expire() == {"inputs": 1, "uploads": 1}
    assert ledger.upload("u1") is None
    assert ledger.trash() >= {"uploads/key of u1"}


def test_a_batch_lets_go_of_its_photos_once(ledger: Any) -> None:
    """When its records go later, another batch's photo is not taken from it."""
    ledger.announce([record("u1")])
    name_in_batch(ledger, "b1", ["u1"])
    let_it_end(ledger)
    name_in_batch(ledger, "b2", ["u1"])
    ledger.pass_time(400)
    assert ledger.expire() == {"inputs": 1}
    ledger.pass_time(1000)
    assert ledger.expire() == {"outputs": 1, "records": 1}
    assert ledger.upload("u1").references == 1


def test_an_old_photo_is_not_offered(ledger: Any) -> None:
    """The store's own clock began when it was written; a younger one takes its place, and the old one stays usable."""
    ledger.announce([record("u1", sha256=DIGEST)], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1"])
    ledger.pass_time(900)
    assert ledger.announce([record("u2", sha256=DIGEST)], form_seconds=0, offer_seconds=1000) == ["u1"]
    ledger.pass_time(200)
    assert ledger.announce([record("u3", sha256=DIGEST)], form_seconds=0, offer_seconds=1000) == ["u3"]
    name_in_batch(ledger, "b2", ["u3", "u1"])
    assert ledger.announce([record("u4", sha256=DIGEST)], form_seconds=0, offer_seconds=1000) == ["u3"]
    assert ledger.upload("u1").references == 2


def test_a_lost_photo_is_offered_no_more(ledger: Any) -> None:
    """Somebody has deleted it in the store: its bytes are asked for again, and the next upload is offered instead."""
    ledger.announce([record("u1", sha256=DIGEST), record("u2")], form_seconds=0)
    name_in_batch(ledger, "b1", ["u1", "u2"])
    for owner, upload_id in (("bo", "u1"), ("ana", "u2"), ("ana", "u-none")):
        ledger.run(ledger.api.note_lost_upload(owner, upload_id))
    assert ledger.announce([record("u3", sha256=DIGEST)]) == ["u1"]
    for _ in range(2):
        ledger.run(ledger.api.note_lost_upload("ana", "u1"))
    assert ledger.announce([record("u4", sha256=DIGEST)], form_seconds=0) == ["u4"]
    name_in_batch(ledger, "b2", ["u4"])
    ledger.run(ledger.api.note_lost_upload("ana", "u1"))
    assert ledger.announce([record("u5", sha256=DIGEST)]) == ["u4"]


def test_announcing_twice_is_announcing_once(ledger: Any) -> None:
    """The client library repeats a call whose reply was lost."""
    for _ in range(2):
        assert ledger.announce([record("u1", sha256=DIGEST), record("u2")]) == ["u1", "u2"]
    assert ledger.keys() == ["schema", "unused", "upload:u1", "upload:u2"]
    assert ledger.announce([]) == []
