from pretrain.training.background_save import ThreadWork


def test_a_thread_that_waits_for_a_disk_does_not_work() -> None:
    """Catches a dead disk that counts as a slow one: a thread that waits for it may still wake up now and then."""
    used = 5.0
    work = ThreadWork(lambda: used)
    found = []
    for more in (0.0, 0.0001, 0.0009, 0.02, 0.0, 0.0002, 0.001):
        used += more
        found.append(work.has_worked())
    assert found == [False, False, False, True, False, False, True]
