"""Which ranks have died or hang, from heartbeats and times that a test makes up."""

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
    """A detector that has observed these heartbeats at these times."""
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
def test_a_heartbeat_survives_encoding(beat: Heartbeat) -> None:
    assert Heartbeat.decode(beat.encode()) == beat
    assert Heartbeat.decode(beat.encode().encode()) == beat


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40))
def test_a_rank_without_a_new_heartbeat_is_silent(beating: list[list[bool]]) -> None:
    counts, last = [0, 0, 0], [0, 0, 0]
    history = [(0.0, {rank: Heartbeat() for rank in range(3)})]
    for second, beats in enumerate(beating, start=1):
        for rank, beats_now in enumerate(beats):
            counts[rank] += beats_now
            last[rank] = second if beats_now else last[rank]
        history.append((float(second), {rank: Heartbeat(counts[rank]) for rank in range(3)}))
    now = len(beating)
    assert _watch(history).silent(now, LIMIT) == [rank for rank in range(3) if now - last[rank] > LIMIT]


def test_a_rank_that_has_ended_is_not_silent() -> None:
    detector = _watch([(0, {0: Heartbeat(1), 1: Heartbeat(1, ended=True)})])
    assert detector.silent(100, LIMIT) == [0]


@given(st.integers(2, 100))
def test_32_ranks_watch_each_and_all_watch_after_a_silence(size: int) -> None:
    watched = [_detector(rank, size).ranks_to_watch(0) for rank in range(size)]
    for rank in range(size):
        assert rank in watched[rank]
        assert len(set(watched[rank])) == len(watched[rank])
        watchers = [other for other in range(size) if other != rank and rank in watched[other]]
        assert len(watchers) == min(size - 1, 32)
    detector = _detector(size - 1, size)
    detector.observe(1, Heartbeat(1), 0)
    assert detector.ranks_to_watch(LIMIT - 1) == watched[size - 1]
    assert detector.ranks_to_watch(LIMIT + 1) == list(range(size))


def test_ranks_that_are_not_watched_any_more_are_forgotten() -> None:
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


def test_a_rank_in_a_new_step_does_not_hang() -> None:
    history = [(0.0, {0: Heartbeat(1, 5), 1: Heartbeat(1, 3)}), (8.0, {0: Heartbeat(2, 5), 1: Heartbeat(2, 4)})]
    assert _watch(history).hanging(12) == []
    assert _watch(history).hanging(19) == [1]


@pytest.mark.parametrize(
    ("waits", "expected"),
    [
        ({0: 11.0, 1: 0.0, 2: 11.0}, [1]),
        ({0: 11.0, 1: 0.0, 2: 2.0}, [1]),
        ({0: 11.0, 1: 11.0, 2: 11.0}, []),  # they wait for different operations: none can be blamed
        ({0: 9.0, 1: 0.0, 2: 9.0}, []),
        ({0: 0.0, 1: 0.0, 2: 0.0}, []),  # a long step
    ],
)
def test_ranks_that_others_wait_for_in_a_step_hang(waits: dict[int, float], expected: list[int]) -> None:
    beats = {rank: Heartbeat(1, 5, seconds) for rank, seconds in waits.items()}
    assert _watch([(0, beats)]).hanging(12) == expected


def test_ranks_that_have_ended_neither_hang_nor_wait() -> None:
    detector = _watch([(0, {0: Heartbeat(1, 5, ended=True), 1: Heartbeat(1, 4), 2: Heartbeat(1, 4)})])
    assert detector.hanging(100) == []


def test_time_of_a_suspended_process_does_not_count() -> None:
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


class _Waiting(threading.Thread):
    """A thread that waits at a known line until `go` is set."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.there, self.go = threading.Event(), threading.Event()

    def run(self) -> None:
        self.there.set()
        self.go.wait()


def test_a_probe_finds_the_line_of_a_thread() -> None:
    thread = _Waiting()
    thread.start()
    thread.there.wait()
    assert thread.ident is not None
    probe = StackProbe(thread.ident)
    line = _Waiting.run.__code__.co_firstlineno
    assert probe.sample(0.0)[0] in [f"test_failure_detector.py:{line + 1}", f"test_failure_detector.py:{line + 2}"]
    assert probe.sample(50.0)[1] == 0.0  # it waits, but not in a collective operation
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
