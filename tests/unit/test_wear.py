"""When a device's memory counts as worn out, from what fitted and what did not."""

from server.worker.wear import MOST_ODD_FAILURES, Wear


def test_runs_larger_than_any_that_fitted_are_not_odd():
    """Nothing is known of them: perhaps they never fit."""
    wear = Wear()
    wear.note_fit("a", 100)
    assert not any(wear.note_failure("a", 101) for _ in range(9))
    assert not any(wear.note_failure("b", 1) for _ in range(9))
    assert not wear.is_worn_out


def test_small_runs_do_not_hide_that_large_ones_fail():
    """Only a run as large as what failed, of the same model, says that memory is well again."""
    wear = Wear()
    wear.note_fit("a", 100)
    for number in range(1, MOST_ODD_FAILURES + 1):
        assert wear.note_failure("a", 90)
        wear.note_fit("a", 89)
        wear.note_fit("b", 1000)
        assert wear.is_worn_out == (number == MOST_ODD_FAILURES)


def test_run_as_large_as_what_failed_begins_anew():
    """Failures far apart are no row."""
    wear = Wear()
    wear.note_fit("a", 100)
    for _ in range(5):
        for _ in range(MOST_ODD_FAILURES - 1):
            assert wear.note_failure("a", 90)
        wear.note_fit("a", 90)
    assert not wear.is_worn_out
