from pretrain.training.checkpoint_alarm import CheckpointAlarm


def test_it_is_raised_after_hours_without_a_new_checkpoint() -> None:
    """Catches an alert although checkpoints are saved, none although they are not, and one at every log event."""
    now = 0.0
    alarm = CheckpointAlarm(2.0, lambda: now)
    messages = []
    for hour, saved_step in (
        (0.0, 100),
        (1.5, 100),
        (1.9, 200),
        (3.8, 200),
        (3.9, 200),
        (5.0, 200),
        (5.9, 200),
        (6, 300),
    ):
        now = hour * 3600
        if (message := alarm.check(saved_step)) is not None:
            messages.append((hour, message))
    assert messages == [
        (3.9, "no checkpoint was saved for 2.0 hours; the newest is of step 200"),
        (5.9, "no checkpoint was saved for 4.0 hours; the newest is of step 200"),
    ]


def test_a_run_without_a_checkpoint() -> None:
    """Catches a first checkpoint that never comes and is not missed."""
    now = 0.0
    alarm = CheckpointAlarm(0.5, lambda: now)
    assert alarm.check(None) is None
    now = 1800.0
    assert alarm.check(None) == "no checkpoint was saved for 0.5 hours; there is none"
