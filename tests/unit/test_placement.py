"""Which model a worker loads next, and for which others."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipelines.memory_plan import RESERVE_BYTES, ModelMemory
from server.worker.placement import TURN_LOADS, UNMEASURED_LOAD_SECONDS, Demand, Resident, Room, Swap, choose_swap

WAIT = 120.0
LOAD = 20.0
TURN = TURN_LOADS * LOAD
JOB = 10.0
MODELS = ("a", "b", "c", "d")
ONE = Room({}, budget_bytes=None, max_models=1)
TWO = Room({}, budget_bytes=None, max_models=2)
GB = 10**9
SIZES = {"a": 50, "b": 30, "c": 15, "d": 10}

seconds = st.floats(0, 1000)
measured = st.none() | st.floats(0.1, 100)
demands = st.dictionaries(
    st.sampled_from(MODELS),
    st.builds(Demand, st.integers(0, 30), seconds, st.integers(0, 4), measured, measured, st.none() | seconds),
    max_size=len(MODELS),
)
residents = st.dictionaries(st.sampled_from(MODELS), st.builds(Resident, seconds, seconds), max_size=3)
rooms = st.builds(
    Room,
    st.just({model: ModelMemory(model, size * GB, 2 * GB) for model, size in SIZES.items()}),
    st.none() | st.integers(20 * GB, 150 * GB),
    st.none() | st.integers(1, 4),
)


def asked(num_ready=0, age=0.0, workers=0, *, left=None):
    """Describe what a model is asked for."""
    return Demand(num_ready, age, workers, job_seconds=JOB, load_seconds=LOAD, left_seconds=left)


def held(age=1000.0, idle=0.0):
    """Describe a model in memory."""
    return Resident(age, idle)


def decide(demand, resident, room=ONE):
    """Call it."""
    return choose_swap(demand, resident, room, max_wait_seconds=WAIT)


def test_nothing_changes_while_the_resident_models_have_all_the_work():
    """A model without waiting jobs is never loaded."""
    assert decide({"a": asked(5, 900.0, 1), "b": asked()}, {"a": held()}) is None
    assert decide({}, {}) is None


def test_room_is_taken_at_once_without_putting_anything_out():
    """With room left a model that nobody holds is loaded, even beside a busy one; that which has waited most first."""
    assert decide({"a": asked(1, 1.0), "b": asked(9, 2.0)}, {}) == Swap("b")
    assert decide({"a": asked(9, 50.0, 1), "b": asked(1, 0.1)}, {"a": held()}, TWO) == Swap("b")
    # In the moment of their arrival none has waited: the one with more jobs.
    assert decide({"a": asked(1), "b": asked(9)}, {}) == Swap("b")


def test_an_idle_model_goes_at_once():
    """A model that nobody waits for makes room, the one least recently used first."""
    assert decide({"a": asked(workers=1), "b": asked(1, 0.1)}, {"a": held(1.0)}) == Swap("b", ("a",))
    both = {"a": held(9.0, idle=3.0), "b": held(1.0, idle=5.0)}
    assert decide({"c": asked(1, 0.1)}, both, TWO) == Swap("c", ("b",))


def test_as_many_go_as_must_and_no_more():
    """Memory decides how many make room: a large model puts two small ones out, and a small one only one of them."""
    sizes = {model: ModelMemory(model, size * GB, 2 * GB) for model, size in SIZES.items()}
    room = Room(sizes, 60 * GB + RESERVE_BYTES, None)
    small = {"c": held(idle=9.0), "d": held(idle=5.0)}
    assert decide({"a": asked(1, 1.0)}, small, room) == Swap("a", ("c", "d"))
    assert decide({"b": asked(1, 1.0)}, small, room) == Swap("b")
    assert decide({"d": asked(1, 1.0)}, {"b": held(idle=9.0), "c": held(idle=5.0)}, room) == Swap("d")
    # The small one is less recently used, but the large one has to go anyway, and then the small one may stay.
    assert decide({"a": asked(1, 1.0)}, {"d": held(idle=9.0), "b": held(idle=5.0)}, room) == Swap("a", ("d", "b"))
    room = replace(room, budget_bytes=70 * GB)
    assert decide({"a": asked(1, 1.0)}, {"d": held(idle=9.0), "b": held(idle=5.0)}, room) == Swap("a", ("b",))


def test_a_model_that_is_too_large_by_the_plan_is_tried_alone():
    """An estimate refuses nothing: all others go, and it is loaded."""
    room = Room({"a": ModelMemory("a", 200 * GB, 0)}, 80 * GB, None)
    assert decide({"a": asked(1, 1.0)}, {"b": held(idle=2.0), "c": held()}, room) == Swap("a", ("b", "c"))
    assert decide({"a": asked(1, 1.0)}, {}, room) == Swap("a")


def test_the_last_holder_of_a_busy_model_stays_until_another_starves():
    """On one device a model is worked off before the next, but for one that has waited too long."""
    busy = {"a": held(WAIT)}
    assert decide({"a": asked(9, 300.0, 1), "b": asked(1, WAIT - 1)}, busy) is None
    assert decide({"a": asked(1, 1.0, 1), "b": asked(99, WAIT - 1)}, busy) is None
    assert decide({"a": asked(9, 300.0, 1), "b": asked(1, WAIT)}, busy) == Swap("b", ("a",))


def test_a_turn_is_never_so_short_that_loading_takes_most_of_the_time():
    """Where all models starve, each stays for its turn; without a measured load an assumed one decides."""
    starving = {"a": asked(99, 900.0, 1), "b": asked(99, 900.0, left=WAIT)}
    assert decide(starving, {"a": held(TURN - 1)}) is None
    assert decide(starving, {"a": held(TURN)}) == Swap("b", ("a",))
    unmeasured = {model: replace(one, load_seconds=None) for model, one in starving.items()}
    assert decide(unmeasured, {"a": held(TURN_LOADS * UNMEASURED_LOAD_SECONDS - 1)}) is None


def test_the_oldest_jobs_of_a_burst_do_not_starve_a_third_model():
    """What was in memory until a moment ago comes after what has never been, however old its jobs are."""
    burst = {"a": asked(999, 5000.0, 1), "b": asked(999, 5000.0, left=WAIT + 1), "c": asked(1, WAIT + 2)}
    assert decide(burst, {"a": held()}) == Swap("c", ("a",))


def test_a_model_that_others_hold_is_loaded_where_it_pays():
    """Another worker joins when the jobs take their holders longer than a load and than what it leaves behind."""
    idle = {"a": held()}
    assert decide({"a": asked(workers=2), "b": asked(2, 5.0, 1)}, idle) is None
    assert decide({"a": asked(workers=2), "b": asked(3, 5.0, 1)}, idle) == Swap("b", ("a",))
    assert decide({"a": asked(workers=2), "b": asked(3, 5.0, 2)}, idle) is None
    # 10 s of work are left to each of the others: with 30 s at the other model going there gains nothing after a load.
    assert decide({"a": asked(2, 5.0, 3), "b": asked(3, 5.0, 1)}, idle) is None
    assert decide({"a": asked(2, 5.0, 3), "b": asked(4, 5.0, 1)}, idle) == Swap("b", ("a",))


def test_a_model_whose_holders_are_kept_from_it_is_loaded_by_one_more_after_each_wait():
    """Where `high` jobs of another model have a worker to themselves, an idle one comes after `max_wait_seconds`."""
    idle = {"c": held(idle=5.0)}
    passed_over = replace(asked(3, WAIT, 1), job_seconds=1.0)
    fleet = {"a": asked(2, 5.0, 1), "b": passed_over, "c": asked(workers=1)}
    assert decide(fleet | {"b": replace(passed_over, oldest_age_seconds=WAIT - 1)}, idle) is None
    assert decide(fleet, idle) == Swap("b", ("c",))
    assert decide(fleet, idle, TWO) == Swap("b")
    assert decide({"b": passed_over}, {}) == Swap("b")
    # A second copy is there: the next one only after another wait. And no busy model leaves for it.
    assert decide({"b": replace(passed_over, num_workers=2)}, {}) is None
    assert decide({"b": replace(passed_over, num_workers=2, oldest_age_seconds=2 * WAIT)}, {}) == Swap("b")
    assert decide({"a": asked(9, 5.0, 2), "b": passed_over}, {"a": held()}) is None


def test_a_worker_whose_busy_model_others_hold_goes_once_waiting_costs_more_than_loading():
    """A lone job waits for a worker without work; one that finds none gets the first whose load is paid for."""
    busy = {"a": asked(10, 9.0, 5), "b": asked(1, 2 * LOAD - 1)}
    assert decide(busy, {"a": held()}) is None
    assert decide(busy | {"b": asked(1, 2 * LOAD)}, {"a": held()}) == Swap("b", ("a",))
    assert decide(busy | {"b": asked(2, LOAD)}, {"a": held()}) == Swap("b", ("a",))


def test_the_last_copy_of_an_idle_model_waits_for_a_worker_with_a_copy_to_spare():
    """Where several hold another idle model, one of those makes room; if none does, the last copy goes in the end."""
    fleet = {"a": asked(workers=1), "b": asked(1, 1.0), "c": asked(workers=3)}
    assert decide(fleet, {"a": held(idle=5.0)}) is None
    assert decide(fleet, {"c": held(idle=5.0)}) == Swap("b", ("c",))
    assert decide(fleet | {"b": asked(1, LOAD)}, {"a": held(idle=5.0)}) == Swap("b", ("a",))
    assert decide(fleet, {"a": held(idle=WAIT)}) == Swap("b", ("a",))


@given(demands, residents, rooms)
def test_swap_always_makes_sense(demand, resident, room):
    """What is loaded was waited for and fits beside what stays, and nothing goes that could have stayed."""
    swap = decide(demand, resident, room)
    if swap is None:
        return
    assert demand[swap.load].num_ready > 0
    assert swap.load not in resident
    assert set(swap.evict) <= set(resident)
    stay = [model for model in resident if model not in swap.evict]
    assert room.holds([*stay, swap.load])
    assert not any(room.holds([*stay, model, swap.load]) for model in swap.evict)


@given(demands, residents, rooms)
def test_last_holders_of_busy_models_leave_for_starving_ones_alone(demand, resident, room):
    """A model with waiting jobs is left by its last holder only for one that nobody has served for too long."""
    swap = decide(demand, resident, room)
    if swap and any(
        demand[model].num_ready and demand[model].num_workers <= 1 for model in swap.evict if model in demand
    ):
        assert demand[swap.load].num_workers == 0
        assert demand[swap.load].neglected_seconds >= WAIT


@given(demands, residents, rooms)
def test_no_model_is_starved(demand, resident, room):
    """Where a model starves and all others have had their turn, the one that has starved longest is loaded."""
    starving = {
        model: one.neglected_seconds
        for model, one in demand.items()
        if model not in resident and one.num_ready and one.num_workers == 0 and one.neglected_seconds >= WAIT
    }
    longest_turn = TURN_LOADS * max(100.0, UNMEASURED_LOAD_SECONDS)
    if starving and all(one.age_seconds >= longest_turn for one in resident.values()):
        swap = decide(demand, resident, room)
        assert swap is not None
        assert starving[swap.load] == max(starving.values())


@given(
    st.lists(st.integers(0, 200), min_size=3, max_size=4),
    st.lists(st.floats(0, 300), min_size=3, max_size=4),
    st.sampled_from([10.0, 30.0, 120.0]),
)
def test_the_bound_on_starvation_is_kept(backlogs, began, max_wait_seconds):
    """One device whatever waits: nothing that waits goes unserved for longer than the docstring says.

    The jobs are worked off one by one; each decision follows the one before, as on a worker.
    """
    models = dict(zip(MODELS, zip(backlogs, began, strict=False), strict=False))
    left: dict[str, float] = {}
    loaded, now = {"a": 0.0}, 0.0
    ready = {model: count for model, (count, _) in models.items()}
    bound = max_wait_seconds + (len(models) - 1) * (TURN + JOB + LOAD)
    while any(ready.values()) and now < 5000:
        demand = {
            model: Demand(
                ready[model] if now >= start else 0,
                max(0.0, now - start),
                int(model in loaded),
                JOB,
                LOAD,
                now - left[model] if model in left else None,
            )
            for model, (_, start) in models.items()
        }
        assert all(one.neglected_seconds <= bound for one in demand.values())
        swap = choose_swap(
            demand,
            {model: Resident(now - since, 0.0) for model, since in loaded.items()},
            ONE,
            max_wait_seconds=max_wait_seconds,
        )
        if swap:
            left |= dict.fromkeys(swap.evict, now)
            now += LOAD
            loaded = {swap.load: now}
        elif (model := next(iter(loaded))) and demand[model].num_ready:
            ready[model] -= 1
            now += JOB
        else:
            now += 1.0
