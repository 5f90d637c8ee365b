"""Who is dead and who hangs, by messages and times made up for the purpose."""

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from deepseek_v3.utils.distributed.failure_detector import AwakeClock, FailureDetector
from deepseek_v3.utils.distributed.heartbeat_store import Heartbeat
from deepseek_v3.utils.distributed.stack_probe import StackProbe

LIMIT = 10.0


def _detector(rank: int = 0, size: int = 3) -> FailureDetector:
    return FailureDetector(rank, size, silence=2 * LIMIT, hang=LIMIT)


def _watch(history: Iterable[tuple[float, dict[int, Heartbeat]]]) -> FailureDetector:
    """What is known after messages were looked at, at the given times."""
    detector = _detector()
    for now, beats in history:
        for rank, beat in beats.items():
            detector.observe(rank, beat, now)
    return detector


@given(
    st.builds(
        Heartbeat,
        st.integers(0, 10**9),
        st.integers(0, 10**9),
        st.floats(0, 1e6),
        st.text(max_size=20),
        st.booleans(),
    )
)
def test_a_message_comes_back_as_it_was(beat: Heartbeat) -> None:
    assert Heartbeat.decode(beat.encode()) == beat
    assert Heartbeat.decode(beat.encode().encode()) == beat


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40))
def test_silent_are_those_whose_last_new_message_is_long_ago(beating: list[list[bool]]) -> None:
    counts, last = [0, 0, 0], [0, 0, 0]
    history = [(0.0, {rank: Heartbeat() for rank in range(3)})]
    for second, beats in enumerate(beating, start=1):
        for rank, beats_now in enumerate(beats):
            counts[rank] += beats_now
            last[rank] = second if beats_now else last[rank]
        history.append((float(second), {rank: Heartbeat(counts[rank]) for rank in range(3)}))
    now = len(beating)
    assert _watch(history).silent(now, LIMIT) == [rank for rank in range(3) if now - last[rank] > LIMIT]


def test_those_that_have_ended_are_not_silent() -> None:
    detector = _watch([(0, {0: Heartbeat(1), 1: Heartbeat(1, ended=True)})])
    assert detector.silent(100, LIMIT) == [0]


@given(st.integers(2, 100))
def test_every_rank_is_looked_after_by_others_and_the_silence_of_one_draws_all_eyes(size: int) -> None:
    looks = [_detector(rank, size).ranks_to_watch(0) for rank in range(size)]
    for rank in range(size):
        assert rank in looks[rank]
        assert len(set(looks[rank])) == len(looks[rank])
        watchers = [other for other in range(size) if other != rank and rank in looks[other]]
        assert len(watchers) == min(size - 1, 32)
    detector = _detector(size - 1, size)
    detector.observe(1, Heartbeat(1), 0)
    assert detector.ranks_to_watch(LIMIT - 1) == looks[size - 1]
    assert detector.ranks_to_watch(LIMIT + 1) == list(range(size))


def test_ranks_that_are_no_longer_looked_at_are_forgotten() -> None:
    detector = _watch([(0, {0: Heartbeat(1), 1: Heartbeat(1)})])
    detector.forget_all_except([1])
    detector.observe(0, Heartbeat(1), 99)
    assert detector.silent(100, LIMIT) == [1]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({0: 5, 1: 4, 2: 5}, [1]),
        ({0: 5, 1: 4, 2: 6}, [1]),
        ({0: 5, 1: 4, 2: 4}, [1, 2]),
        ({0: 1, 1: 0, 2: 1}, [1]),
        ({0: 5, 1: 5, 2: 5}, []),
    ],
)
def test_ranks_behind_the_others_hang(steps: dict[int, int], expected: list[int]) -> None:
    beats = {rank: Heartbeat(1, step) for rank, step in steps.items()}
    assert _watch([(0, beats)]).hanging(LIMIT + 1) == expected
    assert _watch([(0, beats)]).hanging(LIMIT - 1) == []


def test_a_rank_that_moved_on_lately_does_not_hang() -> None:
    history = [(0.0, {0: Heartbeat(1, 5), 1: Heartbeat(1, 3)}), (8.0, {0: Heartbeat(2, 5), 1: Heartbeat(2, 4)})]
    assert _watch(history).hanging(12) == []
    assert _watch(history).hanging(19) == [1]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ({0: 11.0, 1: 0.0, 2: 11.0}, [1]),
        ({0: 11.0, 1: 0.0, 2: 2.0}, [1]),
        ({0: 11.0, 1: 11.0, 2: 11.0}, []),  # they wait for different things: nobody can be blamed
        ({0: 9.0, 1: 0.0, 2: 9.0}, []),
        ({0: 0.0, 1: 0.0, 2: 0.0}, []),  # a long step
    ],
)
def test_in_one_step_those_hang_that_do_not_join_the_others(waits: dict[int, float], expected: list[int]) -> None:
    beats = {rank: Heartbeat(1, 5, seconds) for rank, seconds in waits.items()}
    assert _watch([(0, beats)]).hanging(12) == expected


def test_ranks_that_have_ended_hang_no_more_and_keep_nobody_waiting() -> None:
    detector = _watch([(0, {0: Heartbeat(1, 5, ended=True), 1: Heartbeat(1, 4), 2: Heartbeat(1, 4)})])
    assert detector.hanging(100) == []


def test_time_in_which_this_process_stood_still_does_not_count() -> None:
    awake, detector = AwakeClock(max_gap=2.0), _detector()
    detector.observe(1, Heartbeat(1), awake.advance(5.0))
    detector.observe(1, Heartbeat(1), awake.advance(6.5))
    assert awake.seconds == 1.5
    detector.observe(1, Heartbeat(1), awake.advance(10_006.5))  # suspended; the other rank wakes up after this one
    assert detector.silent(awake.seconds, LIMIT) == []
    detector.observe(1, Heartbeat(2), awake.advance(10_007.5))
    assert (awake.seconds, detector.silent(awake.seconds, 0.5)) == (4.5, [])
    for second in range(10_008, 10_020):
        detector.observe(1, Heartbeat(2), awake.advance(second))
    assert detector.silent(awake.seconds, LIMIT) == [1]


class _Elsewhere(threading.Thread):
    """A thread at a known place until it is let go."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.there, self.go = threading.Event(), threading.Event()

    def run(self) -> None:
        self.there.set()
        self.go.wait()


def test_a_thread_is_found_where_it_is() -> None:
    thread = _Elsewhere()
    thread.start()
    thread.there.wait()
    assert thread.ident is not None
    probe = StackProbe(thread.ident)
    line = _Elsewhere.run.__code__.co_firstlineno
    assert probe.sample(0.0)[0] in [f"test_heartbeats.py:{line + 1}", f"test_heartbeats.py:{line + 2}"]
    assert probe.sample(50.0)[1] == 0.0  # stands still, but not in a collective operation
    thread.go.set()
    thread.join()
    assert probe.sample(60.0) == ("nowhere", 0.0)


@pytest.mark.parametrize(
    ("folder", "waits"), [(Path(dist.__file__).parent, 30.0), (Path(torch.__file__).parent, 0.0)]
)
def test_waiting_counts_inside_collective_operations_only(folder: Path, waits: float) -> None:
    held = threading.Lock()
    names: dict[str, Any] = {"held": held}
    exec(compile("def stand():\n    held.acquire()\n    held.acquire()", str(folder / "made_up.py"), "exec"), names)
    thread = threading.Thread(target=names["stand"], daemon=True)
    thread.start()
    assert thread.ident is not None
    probe = StackProbe(thread.ident)
    while thread.ident not in sys._current_frames() or sys._current_frames()[thread.ident].f_lineno != 3:
        time.sleep(0.001)
    probe.sample(70.0)
    assert probe.sample(100.0)[1] == waits
    held.release()
    thread.join()
    assert probe.sample(101.0) == ("nowhere", 0.0)
