"""data_prep/pictures/decoders.py with real children: that hostile tasks cost nobody else, and that no process is left over."""

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.pictures.decoders import DecoderPool
from data_prep.pictures.images import Unusable, cut

pytestmark = pytest.mark.timeout(120)

TASKS = '''
"""Functions for children."""
import os, resource, signal, sys, time
import numpy as np

def prints():
    print("stray"); sys.stdout.flush(); os.write(1, b"stray" * 1000)
    return os.getpid()

def limits():
    return os.nice(0), resource.getrlimit(resource.RLIMIT_AS)[0], "torch" in sys.modules

def segfault():
    os.kill(os.getpid(), signal.SIGSEGV)

def killed_once(mark):
    if not os.path.exists(mark):
        open(mark, "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return "done"

def computes(seconds):
    start = time.process_time()
    while time.process_time() < start + seconds:
        pass
    return os.getpid()

def aborts():
    os.abort()

def exits():
    os._exit(3)

def wants(size):
    return int(np.zeros(size, np.uint8)[-1])

def interrupted():
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    return "goes on"

def raises():
    raise KeyError("a", 1)

def lambdas():
    return lambda: None

def arrays(count, side):
    return {i: np.full((side, side, 3), i, np.uint8) for i in range(count)}
'''


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """The module of `TASKS`, which children can import as well."""
    (tmp_path / "decoder_tasks.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    import decoder_tasks

    yield decoder_tasks
    del sys.modules["decoder_tasks"]


@pytest.fixture
def pool() -> Iterator[DecoderPool]:
    with DecoderPool(2, memory_bytes=1 << 30) as pool:
        yield pool
    assert children() == []


OTHERS: set[int] = set()


@pytest.fixture(autouse=True)
def _others() -> None:
    """Children that other tests of this process have left, as multiprocessing's servers."""
    OTHERS.clear()
    OTHERS.update(children())


def children() -> list[int]:
    """The children of this process that are decoders, zombies among them."""
    pids = (pid for pid in of_parent(os.getpid()) if pid not in OTHERS)
    return [pid for pid in pids if "python" in status(pid).get("Name", "")]


def of_parent(parent: int) -> list[int]:
    pids = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [pid for pid in pids if status(pid).get("PPid") == str(parent)]


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status; of a process that is gone, nothing."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def picture(side: int, fmt: str = "JPEG") -> bytes:
    rng = np.random.default_rng(side)
    image = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize((side + 40, side))
    buffer = io.BytesIO()
    image.save(buffer, fmt)
    return buffer.getvalue()


def unusable(future: Future) -> tuple[str, str]:
    with pytest.raises(Unusable) as caught:
        future.result()
    return caught.value.reason, caught.value.detail


# ------------------------------------------------------------------------------------------------------- what it does


def test_pictures_are_those_of_this_process(pool: DecoderPool) -> None:
    files = [picture(side, fmt) for side in range(250, 700, 40) for fmt in ("JPEG", "PNG", "WEBP")]
    futures = [pool.submit(cut, data, (256, 512), True) for data in files]
    for data, future in zip(files, futures, strict=True):
        expected, found = cut(data, (256, 512), True), future.result()
        assert (found.width, found.height, found.bucket) == (expected.width, expected.height, expected.bucket)
        assert list(found.pictures) == list(expected.pictures)
        for resolution, array in found.pictures.items():
            assert array.flags.writeable
            assert np.array_equal(array, expected.pictures[resolution])
    assert len(children()) == 2


def test_large_answers(pool: DecoderPool, tasks) -> None:
    """Beyond what a pipe holds, and of sizes that are no multiple of anything."""
    answers = [pool.submit(tasks.arrays, count, side) for count, side in ((0, 1), (1, 0), (7, 333), (2, 4001))]
    for future, (count, side) in zip(answers, ((0, 1), (1, 0), (7, 333), (2, 4001)), strict=True):
        arrays = future.result()
        assert [a.shape for a in arrays.values()] == [(side, side, 3)] * count
        assert all((a == i).all() for i, a in arrays.items())


def test_the_children_are_polite_and_light(pool: DecoderPool, tasks) -> None:
    nice = os.nice(0)
    assert pool.submit(tasks.limits).result() == (min(19, nice + 5), 1 << 30, False)


def test_exceptions_cross_as_they_are(pool: DecoderPool, tasks) -> None:
    with pytest.raises(KeyError) as caught:
        pool.submit(tasks.raises).result()
    assert caught.value.args == ("a", 1)
    assert unusable(pool.submit(cut, b"GIF89a", (256,)))[0] == "unsupported_format"
    with pytest.raises((AttributeError, TypeError), match="pickle"):  # an answer that cannot cross
        pool.submit(tasks.lambdas).result()
    with pytest.raises((AttributeError, TypeError), match="pickle"):  # a task that cannot
        pool.submit(lambda: None).result()
    assert pool.submit(abs, -3).result() == 3


def test_stray_prints_and_signals_of_the_job_change_nothing(pool: DecoderPool, tasks, capfd) -> None:
    pids = {pool.submit(tasks.prints).result() for _ in range(4)}
    assert pids <= set(children())
    out, err = capfd.readouterr()
    assert "stray" not in out
    assert err.count("stray") == 4 * 1001
    assert pool.submit(tasks.interrupted).result() == "goes on"


# ------------------------------------------------------------------------------------------------------ hostile tasks


def check_that_it_costs_itself_alone(pool: DecoderPool, reason: str, detail: str, function: Callable, *args) -> None:
    data = picture(300)
    expected = cut(data, (256,)).pictures[256]
    before = [pool.submit(cut, data, (256,)) for _ in range(5)]
    hostile = pool.submit(function, *args)
    after = [pool.submit(cut, data, (256,)) for _ in range(5)]
    assert unusable(hostile) == (reason, detail)
    again = [pool.submit(function, *args) for _ in range(3)]
    assert [unusable(future) for future in again] == [(reason, detail)] * 3
    last = [pool.submit(cut, data, (256,)) for _ in range(5)]
    for future in before + after + last:
        assert np.array_equal(future.result().pictures[256], expected)
    assert len(children()) == 2


def test_too_slow() -> None:
    with DecoderPool(2, seconds=0.5) as pool:
        check_that_it_costs_itself_alone(pool, "too_slow", "more than 0.5 s of computing", sum, range(10**13))


def test_too_much_memory(pool: DecoderPool, tasks) -> None:
    pids = {pool.submit(os.getpid).result() for _ in range(20)}
    check_that_it_costs_itself_alone(pool, "too_much_memory", "more than 1 GiB", tasks.wants, 1 << 30)
    assert pids <= set(children())  # no child died of it
    assert [pool.submit(tasks.wants, 700 << 20).result() for _ in range(6)] == [0] * 6


@pytest.mark.parametrize(
    ("name", "detail"), [("segfault", "signal 11"), ("aborts", "signal 6"), ("exits", "exit code 3")]
)
def test_a_decoder_that_crashes(name: str, detail: str, pool: DecoderPool, tasks) -> None:
    check_that_it_costs_itself_alone(pool, "decoder_crashed", detail, getattr(tasks, name))


def test_the_time_starts_anew_with_each_task(tasks) -> None:
    with DecoderPool(1, seconds=1) as pool:
        pid = pool.submit(os.getpid).result()
        assert [pool.submit(tasks.computes, 0.4).result() for _ in range(4)] == [pid] * 4


def test_a_machine_that_stands_still_makes_no_picture_slow() -> None:
    with DecoderPool(1, seconds=0.5) as pool:
        assert pool.submit(time.sleep, 1.5).result() is None


def test_a_decoder_that_somebody_kills_is_no_fault_of_the_picture(pool: DecoderPool, tasks, tmp_path: Path) -> None:
    assert pool.submit(tasks.killed_once, str(tmp_path / "mark")).result() == "done"
    assert len(children()) <= 2


def test_the_start_is_on_nobodys_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(2)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with DecoderPool(1, seconds=1) as pool:
        start = time.monotonic()
        assert pool.submit(abs, -3).result() == 3
        assert time.monotonic() - start > 2


def test_a_child_that_was_killed_between_two_tasks(pool: DecoderPool) -> None:
    assert [pool.submit(abs, -i).result() for i in range(4)] == [0, 1, 2, 3]
    for pid in children():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.2)
    assert [pool.submit(abs, -i).result() for i in range(4)] == [0, 1, 2, 3]


def test_a_child_that_cannot_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy today')")
    with monkeypatch.context() as patch, DecoderPool(1) as pool:
        patch.setenv("PYTHONPATH", str(tmp_path))
        for _ in range(2):
            with pytest.raises(RuntimeError, match="does not start: ImportError: no numpy today"):
                pool.submit(abs, -3).result()
        patch.undo()
        assert pool.submit(abs, -3).result() == 3
    assert children() == []


# ---------------------------------------------------------------------------------------------------------- its end


def test_closing_while_busy() -> None:
    pool = DecoderPool(2, seconds=60)
    futures = [pool.submit(time.sleep, 50) for _ in range(5)]
    while len(children()) < 2 or not all("S" in status(pid)["State"] for pid in children()):
        time.sleep(0.05)
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 40, "it waited for its tasks"
    assert children() == []
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()
    pool.close()  # once more is no harm
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(abs, -3)


@pytest.mark.parametrize("delay", [0, 0.01, 0.05, 0.2])
def test_closing_while_children_start(delay: float) -> None:
    pool = DecoderPool(3, seconds=60)
    futures = [pool.submit(time.sleep, 50) for _ in range(5)]
    time.sleep(delay)
    pool.close()
    assert children() == []
    assert all(future.done() for future in futures)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result()


def test_an_exception_in_the_block_ends_the_children() -> None:
    def leave(pool: DecoderPool) -> None:
        with pool:
            pool.submit(time.sleep, 50)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        leave(DecoderPool(2, seconds=60))
    assert children() == []


@pytest.mark.parametrize("count", [1, 10**13])
def test_children_of_a_killed_parent_vanish(count: int, tmp_path: Path) -> None:
    """The idle ones at the end of their stdin, the busy ones at the end of their time."""
    # In a folder with another data_prep, which must not be taken for ours.
    (tmp_path / "data_prep.py").write_text("raise ImportError('another one')")
    program = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parents[4])!r})\n"
        "from data_prep.pictures.decoders import DecoderPool\n"
        "pool = DecoderPool(2, seconds=3)\n"
        f"futures = [pool.submit(sum, range({count})) for _ in range(2)]\n"
        "print('started', flush=True); time.sleep(60)\n"
    )
    (tmp_path / "parent.py").write_text(program)
    parent = subprocess.Popen([sys.executable, "parent.py"], cwd=tmp_path, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"started\n"
    while len(decoders := of_parent(parent.pid)) < 2:
        time.sleep(0.05)
    time.sleep(1.5)  # they are at work, or idle
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(status(pid) for pid in decoders):
        time.sleep(0.05)
    assert [status(pid) for pid in decoders if status(pid).get("State", "Z (zombie)") != "Z (zombie)"] == []
