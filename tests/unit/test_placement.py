"""Which model a worker loads next, and for which other."""

from hypothesis import given
from hypothesis import strategies as st

from server.ledger.worker_side import Backlog
from server.worker.placement import Swap, choose_swap

WAIT = 120.0
MODELS = ("a", "b", "c", "d")

backlogs = st.dictionaries(
    st.sampled_from(MODELS), st.builds(Backlog, st.integers(0, 3), st.floats(0, 1000)), max_size=len(MODELS)
)
residents = st.dictionaries(st.sampled_from(MODELS), st.floats(0, 1000), max_size=3)


def decide(backlog, resident, *, capacity=1):
    """Call it with a backlog of (number ready, oldest age in seconds)."""
    waiting = {model: Backlog(*of) for model, of in backlog.items()}
    return choose_swap(waiting, resident, capacity=capacity, max_wait_seconds=WAIT)


def test_nothing_changes_while_the_resident_models_have_all_the_work():
    """A model without waiting jobs is never loaded."""
    assert decide({"a": (5, 900.0), "b": (0, 0.0)}, {"a": 900.0}) is None
    assert decide({}, {}) is None


def test_free_place_is_taken_at_once():
    """With room left nothing is put out, and the job that has waited longest decides."""
    assert decide({"a": (1, 1.0), "b": (9, 2.0)}, {}) == Swap("b")
    assert decide({"a": (1, 0.1)}, {"b": 5.0}, capacity=2) == Swap("a")


def test_idle_model_goes_at_once():
    """A model that nobody waits for makes room, the one loaded longest ago first."""
    assert decide({"a": (0, 0.0), "b": (1, 0.1)}, {"a": 1.0}) == Swap("b", evict="a")
    assert decide({"c": (1, 0.1)}, {"a": 1.0, "b": 7.0}, capacity=2) == Swap("c", evict="b")


def test_busy_models_share_time():
    """A busy model goes when it has had its turn and the other has waited long enough, and not before."""
    assert decide({"a": (9, 300.0), "b": (1, WAIT - 1)}, {"a": 900.0}) is None
    assert decide({"a": (9, 300.0), "b": (1, WAIT)}, {"a": WAIT - 1}) is None
    assert decide({"a": (9, 300.0), "b": (1, WAIT)}, {"a": WAIT}) == Swap("b", evict="a")


@given(backlogs, residents, st.integers(1, 3))
def test_swap_always_makes_sense(backlog, resident, capacity):
    """What is loaded was waited for and is not there yet; what goes is there, and only goes when memory is full."""
    swap = choose_swap(backlog, resident, capacity=capacity, max_wait_seconds=WAIT)
    if swap is None:
        return
    assert backlog[swap.load].num_ready > 0
    assert swap.load not in resident
    assert (swap.evict is None) == (len(resident) < capacity)
    assert swap.evict is None or swap.evict in resident


@given(backlogs, residents, st.integers(1, 3))
def test_no_model_is_starved(backlog, resident, capacity):
    """Where a job has waited for too long and a resident model has had its turn, something is done."""
    starved = [model for model, of in backlog.items() if of.num_ready and of.oldest_age_seconds >= WAIT]
    if any(model not in resident for model in starved) and any(held >= WAIT for held in resident.values()):
        assert choose_swap(backlog, resident, capacity=capacity, max_wait_seconds=WAIT) is not None
