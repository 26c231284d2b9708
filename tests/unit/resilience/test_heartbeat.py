"""Which process holds up the others: heartbeats and times are given, no clock runs."""

from __future__ import annotations

from dataclasses import replace

from pretrain.resilience.heartbeat import GRACE_BEATS, IN_STEP, Heartbeat, Peers

SECONDS, STARTUP, BEAT = 100.0, 600.0, 5.0
READING = "reading data"


def beat(at: float, activity: str = IN_STEP, idle: float = 0.0, step: int = 3, host: str = "n") -> Heartbeat:
    return Heartbeat(step, activity, idle, SECONDS, at, host)


def three(now: float = 0.0) -> Peers:
    return Peers(3, SECONDS, STARTUP, BEAT, now)


def all_beat(peers: Peers, now: float, **by_rank: Heartbeat) -> None:
    for rank in range(3):
        peers.update(rank, by_rank.get(f"r{rank}", beat(now, host=f"n{rank}")), now)


def test_while_all_send_heartbeats_nobody_is_at_fault() -> None:
    peers = three()
    for now in range(0, 1000, 5):
        all_beat(peers, float(now))
        assert peers.find_stall(float(now), first_step_at=1.0) is None


def test_a_process_that_never_started_has_the_time_of_the_start() -> None:
    peers = three()
    for now in (STARTUP, STARTUP + 1):
        peers.update(0, beat(now), now)
        peers.update(1, beat(now), now)
        stall = peers.find_stall(now, first_step_at=None)
        assert (stall is None) == (now <= STARTUP)
    assert stall is not None and stall.ranks == [2]
    assert stall.reason == "process 2 on ? gave no sign of life for 601 s"


def test_after_the_first_step_silence_is_measured_by_the_shorter_limit() -> None:
    """Its last heartbeat still comes from the start, which may take longer; it counts from the observer's first step."""
    peers = three()
    all_beat(peers, 10.0, r1=replace(beat(10.0, "starting"), limit=STARTUP, host="n1"))
    peers.update(0, beat(150.0), 150.0)
    peers.update(2, beat(150.0), 150.0)
    assert peers.find_stall(150.0, first_step_at=None) is None
    assert peers.find_stall(150.0, first_step_at=60.0) is None
    stall = peers.find_stall(161.0, first_step_at=60.0)
    assert stall is not None and stall.ranks == [1]
    assert stall.reason == "process 1 on n1 gave no sign of life for 151 s"


def test_without_process_0_it_alone_is_named() -> None:
    """It passes the heartbeats on: without it, nobody is heard."""
    stall = three().find_stall(SECONDS + 1, first_step_at=0.5)
    assert stall is not None and stall.ranks == [0]


def test_one_that_is_stuck_outside_of_a_step_is_named_and_those_that_wait_are_not() -> None:
    peers = three()
    waiting = beat(200.0, IN_STEP, SECONDS + 1)
    all_beat(peers, 200.0, r0=waiting, r1=replace(waiting, activity=READING, host="n1"), r2=waiting)
    stall = peers.find_stall(200.0, first_step_at=1.0)
    assert stall is not None and stall.ranks == [1]
    assert stall.reason == "no step for 100 s; process 1 on n1 held up the others"


def test_where_all_are_inside_a_step_those_with_the_fewest_steps_are_named_after_the_grace() -> None:
    grace = GRACE_BEATS * BEAT
    for late, expected in ((grace, None), (grace + 1, [2])):
        peers = three()
        waiting = beat(200.0, IN_STEP, SECONDS + late)
        all_beat(peers, 200.0, r0=waiting, r1=waiting, r2=replace(waiting, step=2))
        stall = peers.find_stall(200.0, first_step_at=1.0)
        assert (stall and stall.ranks) == expected


def test_where_all_are_inside_a_step_a_silent_one_is_named_first() -> None:
    peers = three()
    all_beat(peers, 180.0)
    waiting = beat(200.0, IN_STEP, SECONDS + GRACE_BEATS * BEAT + 1)
    peers.update(0, waiting, 200.0)
    peers.update(1, waiting, 200.0)
    stall = peers.find_stall(200.0, first_step_at=1.0)
    assert stall is not None and stall.ranks == [2]
    assert stall.reason.endswith("gave no sign of life for 20 s")


def test_a_heartbeat_read_twice_is_one_sign_of_life() -> None:
    peers = three()
    peers.update(1, beat(10.0), 10.0)
    peers.update(1, beat(10.0), 50.0)
    assert peers[1].heard_at == 10.0
    peers.update(1, beat(51.0), 52.0)
    assert peers[1].heard_at == 52.0


def test_after_the_observers_own_pause_all_have_their_time_again() -> None:
    peers = three()
    all_beat(peers, 10.0)
    assert peers.silent(SECONDS, 500.0) == [0, 1, 2]
    peers.forgive(500.0)
    assert peers.silent(SECONDS, 500.0) == []
    assert peers[1].heartbeat == beat(10.0, host="n1")


def test_errors_of_others_are_listed_with_their_exit_codes() -> None:
    peers = three()
    all_beat(peers, 10.0, r1=replace(beat(10.0), error="disk full", exit_code=75))
    assert peers.errors(own_rank=0) == [("process 1 failed: disk full", 75)]
    assert peers.errors(own_rank=1) == []


def test_the_table_has_a_line_for_each_process_the_longest_silent_first() -> None:
    peers = three()
    peers.update(0, beat(90.0, READING, 2.0, step=7, host="a"), 90.0)
    peers.update(2, beat(40.0, IN_STEP, 1.0, step=6, host="b"), 40.0)
    assert peers.table(100.0).splitlines() == [
        "  process 1 on ?: 0 steps done, not started for 0 s, last sign of life 100 s ago",
        f"  process 2 on b: 6 steps done, {IN_STEP} for 1 s, last sign of life 60 s ago",
        "  process 0 on a: 7 steps done, reading data for 2 s, last sign of life 10 s ago",
    ]
    assert Peers(40, SECONDS, STARTUP, BEAT, 0.0).table(1.0).splitlines()[-1] == "  and 8 more"


def test_long_lists_of_processes_are_cut() -> None:
    names = Peers(10, SECONDS, STARTUP, BEAT, 0.0).names(list(range(10)))
    assert names == "process " + ", ".join(f"{rank} on ?" for rank in range(8)) + " and 2 more"
