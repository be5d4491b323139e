"""What happens to runs of hours, done to runs of seconds.

`make faults` takes as many tries as docs/reliability.md reports: through FASTALEX_FAULT_KILLS,
FASTALEX_FAULT_REPEATS (of what is parametrised by `repeat`) and FASTALEX_FAULT_EXAMPLES (of made-up files).
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastalex import train
from fastalex.config import AlexNetConfig, Config, DataConfig, LoaderConfig, OnWriteError
from fastalex.config.checks import validate
from fastalex.config.plain import flat, plain
from fastalex.data.cache import locked
from fastalex.data.decode import decode_image
from fastalex.errors import FastalexError
from fastalex.runs import launch
from fastalex.runs.checkpoint import Checkpoint, read_weights
from fastalex.runs.checkpoint_writer import load_newest, older
from tests.processes import ENVIRONMENT, has_ended

T = TypeVar("T")
KILLS = int(os.environ.get("FASTALEX_FAULT_KILLS", "2"))
REPEATS = int(os.environ.get("FASTALEX_FAULT_REPEATS", "1"))
EXAMPLES = int(os.environ.get("FASTALEX_FAULT_EXAMPLES", "60"))
RUN = [
    "data=digits",
    "model=resnet18",  # a group without options
    "model.name=interruptible",  # of tests/tiny.py
    "data.resize=36",
    "data.crop=32",
    "train.epochs=2",
    "train.ema_decay=0.9",
    "runtime.precision=fp32",
    "runtime.threads=1",
]
STEPS = 16
CHECKPOINT_BYTES = 19_000_000  # of such a run, and a little more

repeated = pytest.mark.parametrize("repeat", range(REPEATS))


class Tally:
    """The tries of a test that makes more than one, for benchmarks/faults.py."""

    def __init__(self) -> None:
        self.tries = self.survived = 0
        self.note = ""

    @contextmanager
    def one_try(self) -> Iterator[None]:
        self.tries += 1
        yield
        self.survived += 1


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    tally = Tally()
    yield tally
    record_property("tries", tally.tries)
    record_property("losses", tally.tries - tally.survived)
    record_property("note", tally.note)


# Imports once, also what a run imports only when it needs it, and forks for each command, before PyTorch has
# started a thread; a process of its own for each would spend most of its life in importing. Takes a line of
# JSON a command, answers with a process id.
_SERVER = """
import ctypes, json, os, resource, sys, time
import hydra.core.utils, numba, sklearn.model_selection, torch._dynamo, torch.utils.tensorboard
from fastalex import plots, train
from fastalex.data import builtin, resident
from fastalex.kernels import augment_numba
from fastalex.runs import launch
from fastalex.training import flops
from tests import tiny

tiny.register()
flops.MATMUL_SIZE["cpu"] = 64
numba.njit(lambda: 0)()  # imports what loading a compiled kernel needs
assert len(os.listdir("/proc/self/task")) == 1

def child(argv, log, limit, files, shared, now, powerless, session, environment):
    log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    if session:
        os.setsid()
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    if files:
        files += len(os.listdir("/proc/self/fd")) - 4  # of which a shell would have opened three
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    if shared:  # a name space of its own, whose /dev/shm is a small one
        libc = ctypes.CDLL(None, use_errno=True)
        new, private = 0x20000, 0x44000  # CLONE_NEWNS, MS_REC | MS_PRIVATE
        assert libc.unshare(new) == 0
        assert libc.mount(b"none", b"/", None, private, None) == 0
        assert libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, f"size={shared}".encode()) == 0
    if now:
        moment = hydra.core.utils.datetime.fromtimestamp(now)
        hydra.core.utils.datetime = type("Clock", (), {"now": staticmethod(lambda: moment)})
        time.time = lambda: now
    if powerless:  # root without its capabilities, whom permissions hold back like anybody else
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert ctypes.CDLL(None).capset(header, none) == 0
    sys.argv = ["fastalex", *argv]
    train.main()

for line in sys.stdin:
    command = json.loads(line)
    if "wait" in command:
        print(os.waitstatus_to_exitcode(os.waitpid(command["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if not pid:
        status = 0
        try:
            child(**command)
        except SystemExit as end:
            status = end.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            status = 99
        os._exit(status)
    print(pid, flush=True)
"""


class Server:
    """Runs ``python -m fastalex.train`` many times."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, "XDG_CACHE_HOME": str(folder / "cache")},
        )

    def _ask(self, **command: Any) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def start(
        self,
        *argv: str,
        log: str = "log",
        limit: int = 0,
        files: int = 0,
        shared: str = "",
        now: float = 0,
        powerless: bool = False,
        session: bool = False,
        environment: dict[str, str] | None = None,
    ) -> int:
        return self._ask(
            argv=argv,
            log=log,
            limit=limit,
            files=files,
            shared=shared,
            now=now,
            powerless=powerless,
            session=session,
            environment=environment or {},
        )

    def wait(self, pid: int) -> int:
        """Its exit status; the negative number of the signal that ended it."""
        return self._ask(wait=pid)

    def stop(self, pid: int, number: signal.Signals = signal.SIGTERM) -> None:
        """End a run in good order."""
        os.kill(pid, number)
        assert self.wait(pid) == 128 + number

    def run(self, *argv: str, **options: Any) -> tuple[int, str]:
        """The exit status, and what was printed."""
        log = self.folder / "log"
        log.unlink(missing_ok=True)
        status = self.wait(self.start(*argv, **options))
        return status, log.read_text()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("faults"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(server: Server) -> Path:
    """The run that nothing happened to."""
    status, out = server.run(*RUN, "checkpoint.every_steps=1", "hydra.run.dir=whole")
    assert status == 0, out
    return server.folder / "whole"


def assert_same(folder: Path, whole: Path) -> None:
    for name in ("model.safetensors", "best.safetensors"):
        ours, theirs = read_weights(folder / name)[0], read_weights(whole / name)[0]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
    for key in ("ten_crop", "best_on_validation", "steps"):
        assert ours[key] == theirs[key]
    lines = [(path / "metrics.jsonl").read_text().splitlines() for path in (folder, whole)]
    ours, theirs = ([json.loads(line)["train_loss"] for line in each] for each in lines)
    assert ours == theirs


def wait_for(path: Path, pid: int) -> None:
    """Wait until a process has written a file."""
    while not path.exists():
        assert not has_ended(pid)
        time.sleep(0.01)


def wait_for_step(step: int, run: Path, pid: int) -> None:
    """Wait until a process has written a checkpoint after that of a step, or has ended."""
    while not has_ended(pid) and not (run.is_dir() and any(s >= step for s in older(run))):
        time.sleep(0.01)


def test_killed_at_random_moments(server: Server, whole: Path, tally: Tally) -> None:
    """kill -9, a checkpoint at every step; every other one as soon as a file is being written."""
    moments = random.Random(0)
    number = 0
    half_written: set[Path] = set()  # files that a killed process has left

    def partial(run: Path) -> set[Path]:
        return set(run.glob(".*.partial-*"))

    while tally.tries < KILLS:
        number += 1
        run = server.folder / f"killed-{number}"
        command = [*RUN, "checkpoint.every_steps=1", "resume=auto", f"hydra.run.dir={run.name}"]
        while True:
            pid = server.start(*command)
            if tally.tries < KILLS:
                # Some time after a step's checkpoint; at once, in the start-up, if that was written before.
                step, delay = moments.randrange(STEPS), moments.uniform(0, 0.5)
                wait_for_step(step, run, pid)
                if tally.tries % 2:
                    while not has_ended(pid) and not partial(run) - half_written:
                        time.sleep(0.001)
                    delay /= 50
                time.sleep(delay)
                os.kill(pid, signal.SIGKILL)
            status = server.wait(pid)
            if status != -signal.SIGKILL:
                break
            tally.tries += 1
            half_written |= partial(run)
            loaded = load_newest(run) if run.is_dir() else None
            assert loaded is None or (run / "checkpoint.pt").is_file()  # the newest is always there
        # Finished before the last kill could reach it, or because there are no more.
        log = (server.folder / "log").read_text()
        assert status == 0, log
        assert "warning" not in log  # and it was always whole
        assert not list(run.glob(".*"))  # nothing half-written is left
        assert_same(run, whole)
        tally.survived = tally.tries
    tally.note = f"{len(half_written)} within a write"


@repeated
def test_two_signals_end_a_run_at_once(server: Server, repeat: int) -> None:
    run = server.folder / f"twice-{repeat}"
    pid = server.start(*RUN, "train.epochs=2000", "checkpoint.every_steps=1", f"hydra.run.dir={run.name}")
    wait_for(run / "checkpoint.pt", pid)
    os.kill(pid, signal.SIGSTOP)  # so that both are pending when it continues
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    assert server.wait(pid) in (-signal.SIGTERM, -signal.SIGINT)
    assert Checkpoint.load(run / "checkpoint.pt").step > 0


@repeated
def test_a_signal(server: Server, whole: Path, repeat: int) -> None:
    number = (signal.SIGTERM, signal.SIGINT)[repeat % 2]
    run = server.folder / f"signal-{repeat}"
    pid = server.start(*RUN, "checkpoint.every_steps=1", f"hydra.run.dir={run.name}")
    wait_for(run / "checkpoint.pt", pid)
    server.stop(pid, number)
    status, out = server.run(f"resume={run.name}")
    assert status == 0, out
    assert_same(run, whole)


@repeated
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_loading_workers_too(server: Server, number: signal.Signals, repeat: int) -> None:
    """As Ctrl-C in a terminal, or a batch system's time limit, has it."""
    run = server.folder / f"group-{number.name}-{repeat}"
    command = [*RUN, "loader=torchvision", "loader.workers=1", "checkpoint.every_steps=1"]
    pid = server.start(*command, f"hydra.run.dir={run.name}", session=True)
    wait_for(run / "checkpoint.pt", pid)
    os.killpg(pid, number)
    assert server.wait(pid) == 128 + number
    status, out = server.run(f"resume={run.name}")
    assert status == 0, out
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


@repeated
def test_two_runs_started_in_the_same_second(server: Server, whole: Path, repeat: int) -> None:
    day = repeat + 1
    now = time.mktime((2026, 1, day, 3, 4, 5, 0, 0, -1))
    pids = [server.start(*RUN, now=now, log=f"second-{i}") for i in range(2)]
    assert [server.wait(pid) for pid in pids] == [0, 0]
    folders = sorted((server.folder / f"outputs/2026-01-{day:02}").iterdir())
    assert [folder.name for folder in folders] == ["03-04-05", "03-04-05-2"]
    for folder in folders:
        assert_same(folder, whole)


@repeated
def test_a_clock_set_back(server: Server, whole: Path, repeat: int) -> None:
    """A run resumes although its files are from the future, and its next ones older than those."""
    run = server.folder / f"clock-{repeat}"
    pid = server.start(*RUN, "checkpoint.every_steps=1", f"hydra.run.dir={run.name}")
    wait_for_step(3, run, pid)
    server.stop(pid)
    future = time.time() + 365 * 86400
    for path in run.rglob("*"):
        os.utime(path, (future, future))
    before = Checkpoint.load(run / "checkpoint.pt").step
    command = ["resume=auto", f"hydra.run.dir={run.name}"]
    now = time.time() - 365 * 86400
    pid = server.start(*command, now=now)
    wait_for_step(before + 1, run, pid)
    server.stop(pid)
    step = Checkpoint.load(run / "checkpoint.pt").step
    assert step > before
    status, out = server.run(*command, now=now)
    assert status == 0, out
    assert f"from step {step}" in out
    assert_same(run, whole)


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system in memory with its own end; yields what gives it another size."""

    def mount(size: str, *, change: bool = True) -> None:
        options = f"{'remount,' if change else ''}size={size}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], check=True)

    folder.mkdir()
    try:
        mount("64m", change=False)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk needs root")
    try:
        yield mount
    finally:
        subprocess.run(["umount", folder], check=True)


@repeated
def test_a_full_disk(server: Server, whole: Path, repeat: int) -> None:
    """There is room for one checkpoint and a part of another."""
    disk = server.folder / f"disk-{repeat}"
    with small_disk(disk) as resize:
        run = disk / "run"
        pid = server.start(*RUN, "checkpoint.keep=1", "checkpoint.every_steps=8", f"hydra.run.dir={run}")
        wait_for(run / "checkpoint.pt", pid)
        server.stop(pid)
        before = Checkpoint.load(run / "checkpoint.pt").step
        used = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
        resize(str(used + CHECKPOINT_BYTES * (repeat + 1) // (REPEATS + 1)))
        status, out = server.run(f"resume={run}", "checkpoint.every_steps=1")
        assert status == 2
        message = rf"cannot be written \(No space left on device\).* that of step {before} stays"
        assert re.search(message, out), out
        assert "Traceback" not in out
        assert not list(run.glob(".*"))
        assert load_newest(run)[0].step == before
        resize("128m")
        status, out = server.run(f"resume={run}")
        assert status == 0, out
        assert_same(run, whole)


@repeated
@pytest.mark.parametrize("on_error", OnWriteError)
def test_a_file_size_limit(server: Server, whole: Path, on_error: OnWriteError, repeat: int) -> None:
    """No file may be larger than half a checkpoint, as where a quota or a full disk ends it."""
    run = server.folder / f"limit-{on_error.value}-{repeat}"
    pid = server.start(*RUN, "checkpoint.every_steps=1", f"hydra.run.dir={run.name}")
    wait_for(run / "checkpoint.pt", pid)
    server.stop(pid)
    before = Checkpoint.load(run / "checkpoint.pt").step
    limit = CHECKPOINT_BYTES // 2
    status, out = server.run(f"resume={run.name}", f"checkpoint.on_error={on_error.value}", limit=limit)
    message = r"checkpoint.pt: cannot be written \(File too large\): the checkpoint of step \d+ is lost"
    assert re.search(message, out), out
    assert f"that of step {before} stays" in out
    assert "Traceback" not in out
    assert not list(run.glob(".*"))
    assert load_newest(run)[0].step == before
    if on_error is OnWriteError.stop:
        assert status == 2
        assert not (run / "summary.json").exists()
        status, out = server.run(f"resume={run.name}")  # there is space again
    assert status == 0, out
    assert_same(run, whole)


@repeated
def test_a_damaged_newest_checkpoint(server: Server, whole: Path, repeat: int) -> None:
    """Cut short somewhere, or a bit of a weight turned over; the whole file is fuzzed below."""
    run = server.folder / f"damaged-{repeat}"
    pid = server.start(*RUN, "checkpoint.every_steps=1", f"hydra.run.dir={run.name}")
    wait_for_step(3, run, pid)
    server.stop(pid)
    path = run / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    chosen = random.Random(repeat)
    if repeat % 2:
        os.truncate(path, chosen.randrange(len(content)))
    else:
        weight = max(Checkpoint.load(path).model.values(), key=torch.Tensor.numel).numpy().tobytes()
        content[content.index(weight) + chosen.randrange(len(weight))] ^= 1 << chosen.randrange(8)
        path.write_bytes(content)
    older_step, older_path = next(iter(older(run).items()))
    status, out = server.run("resume=auto", f"hydra.run.dir={run.name}")
    assert status == 0, out
    assert "checkpoint.pt: is damaged or cut short" in out
    assert f"warning: resuming from {older_path} instead" in out
    assert f"from step {older_step}" in out
    assert_same(run, whole)


def image_tree(root: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8)).save(root / name / f"{i}.png")


FOLDERS = [*RUN, "data=imagefolder", "data.resize=36", "data.crop=32", "train.batch_size=4"]


@repeated
def test_two_processes_build_the_same_cache(server: Server, repeat: int) -> None:
    images = server.folder / f"images-{repeat}"
    image_tree(images)
    cache = server.folder / f"shared-cache-{repeat}"
    argv = [*FOLDERS, f"data.root={images.name}", "train.epochs=1"]
    environment = {"XDG_CACHE_HOME": str(cache)}
    source = blake2b(os.fsencode(images.resolve()), digest_size=8).hexdigest()
    (cache / "fastalex").mkdir(parents=True)
    logs = [server.folder / f"cache-{repeat}-{i}.log" for i in range(2)]
    with locked(cache / "fastalex" / f"{source}.lock"):  # until both want to build it
        pids = [
            server.start(*argv, f"hydra.run.dir={log.stem}", log=log.name, environment=environment)
            for log in logs
        ]
        for pid in pids:
            while not re.search(rf"-> FLOCK .* {pid} ", Path("/proc/locks").read_text()):
                assert not has_ended(pid)
                time.sleep(0.01)
    assert [server.wait(pid) for pid in pids] == [0, 0]
    assert sum("decoding" in log.read_text() for log in logs) == 1
    assert_same(*(server.folder / log.stem for log in logs))
    (entry,) = (path for path in (cache / "fastalex").iterdir() if path.suffix != ".lock")
    assert sorted(path.name for path in entry.iterdir()) == ["index.json", "pixels.npy"]


@repeated
def test_a_read_only_data_folder(server: Server, repeat: int) -> None:
    root = server.folder / f"read-only-{repeat}"
    image_tree(root)
    for path in (*root.rglob("*"), root):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in (*root.rglob("*"), root)}
    argv = [*FOLDERS, f"data.root={root.name}", "train.epochs=1", f"hydra.run.dir=from-{root.name}"]
    status, out = server.run(*argv, powerless=os.geteuid() == 0)
    assert status == 0, out
    assert {path: path.stat().st_mtime_ns for path in (*root.rglob("*"), root)} == before
    for path in (*root.rglob("*"), root):
        path.chmod(0o755)


# --- Small limits ------------------------------------------------------------------------------------------

LOADED = [*RUN, "loader=torchvision", "loader.workers=2", "checkpoint.every_steps=1"]


@pytest.fixture(scope="module")
def may_mount() -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a small /dev/shm needs root, or the right to make a name space (unshare -m)")


def children(pid: int) -> list[int]:
    """The process ids of what a run's main thread has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def assert_refused(status: int, out: str, expected: int, message: str) -> None:
    """A run ended with this status and, but for its progress, one line, which says what to change."""
    assert status == expected, out
    *before, last = out.splitlines()
    assert re.match(r"fastalex: error: ", last), out
    assert re.search(message, last), out
    assert re.search(r"loader\.workers|train\.batch_size", last), out
    assert "Traceback" not in out
    assert not any("rror" in line for line in before if "top-1 error" not in line), out


def assert_all_ended(pids: list[int]) -> None:
    """Wait for processes to end; torch's workers look every five seconds whether their parent lives."""
    assert pids
    while not all(has_ended(pid) for pid in pids):
        time.sleep(0.05)


def assert_resumes(server: Server, run: Path, before: int, *changes: str) -> None:
    assert load_newest(run)[0].step >= before
    status, out = server.run(f"resume={run.name}", *changes)
    assert status == 0, out
    assert "warning" not in out
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS


@repeated
@pytest.mark.usefixtures("may_mount")
def test_too_little_shared_memory(server: Server, repeat: int) -> None:
    """128 images of 32 x 32 are 0.4 MB, and five such batches may wait."""
    run = server.folder / f"shared-{repeat}"
    status, out = server.run(*LOADED, f"hydra.run.dir={run.name}", shared=f"{(repeat + 1) * 400}k")
    assert_refused(status, out, 1, r"5 batches wait in shared memory, 2\.0 MB, and /dev/shm has .* free")
    assert not run.exists()


@repeated
@pytest.mark.usefixtures("may_mount")
def test_shared_memory_fills_up(server: Server, repeat: int) -> None:
    """Somebody else fills it during the training."""
    run = server.folder / f"filled-{repeat}"
    log = f"{run.name}.log"
    pid = server.start(*LOADED, f"hydra.run.dir={run.name}", shared="8m", log=log)
    wait_for_step(repeat + 1, run, pid)
    before, workers = load_newest(run)[0].step, children(pid)
    with suppress(OSError), Path(f"/proc/{pid}/root/dev/shm/ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    status, out = server.wait(pid), (server.folder / log).read_text()
    assert_refused(status, out, 1, r"out of shared memory \(/dev/shm\)")
    assert_all_ended(workers)
    assert_resumes(server, run, before, "loader.workers=0")


@repeated
@pytest.mark.parametrize("victim", ["worker", "run"] if REPEATS > 1 else ["worker"])
def test_the_kernel_kills_for_memory(server: Server, victim: str, repeat: int) -> None:
    """It sends SIGKILL to a loading process, or to the run, which then cannot say anything."""
    run = server.folder / f"oom-{victim}-{repeat}"
    log = f"{run.name}.log"
    pid = server.start(*LOADED, f"hydra.run.dir={run.name}", log=log)
    wait_for_step(repeat + 1, run, pid)
    before, workers = load_newest(run)[0].step, children(pid)
    os.kill(workers[repeat % len(workers)] if victim == "worker" else pid, signal.SIGKILL)
    status, out = server.wait(pid), (server.folder / log).read_text()
    if victim == "worker":
        assert_refused(status, out, 2, "a worker process died .* perhaps for lack of memory")
    else:
        assert status == -signal.SIGKILL
    assert_all_ended(workers)
    assert_resumes(server, run, before)


@repeated
def test_no_more_address_space(server: Server, repeat: int) -> None:
    """ulimit -v, as some batch systems set it, is reached in the middle of the training."""
    run = server.folder / f"address-space-{repeat}"
    log = f"{run.name}.log"
    # A batch is 77 MB. What is smaller than 32 MB, malloc may have kept from the step before.
    command = [*RUN, "data.resize=228", "data.crop=224", "checkpoint.every_steps=1"]
    pid = server.start(*command, f"hydra.run.dir={run.name}", log=log)
    wait_for(run / "checkpoint.pt", pid)
    time.sleep(random.Random(repeat).uniform(0, 0.3))
    before = load_newest(run)[0].step
    (size,) = re.findall(r"VmSize:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.prlimit(pid, resource.RLIMIT_AS, (int(size) << 9, hard))  # half of what it has
    status, out = server.wait(pid), (server.folder / log).read_text()
    # A library may use memory that it did not get, and crash: seen with PyTorch 2.11.
    if status != -signal.SIGSEGV:
        assert_refused(status, out, 1, "out of memory.* raise ulimit -v .* train.batch_size=128")
    assert load_newest(run)[0].step >= before


@repeated
def test_few_file_descriptors(server: Server, repeat: int) -> None:
    """64 are enough; with too few the run says so."""
    run = server.folder / f"descriptors-{repeat}"
    status, out = server.run(*LOADED, f"hydra.run.dir={run.name}", files=64)
    assert status == 0, out
    assert json.loads((run / "summary.json").read_text())["steps"] == STEPS
    few = random.Random(repeat).randrange(24, 40)
    status, out = server.run(*LOADED, f"hydra.run.dir={run.name}-{few}", files=few)
    assert_refused(status, out, 1, r"too many open files.* allow more \(ulimit -n\)")


@repeated
def test_no_room_for_the_cache(server: Server, repeat: int) -> None:
    """Decoded images that do not fit the disk are decoded again by the next run."""
    images = server.folder / f"uncached-{repeat}"
    image_tree(images)
    cache = server.folder / f"small-cache-{repeat}"
    with small_disk(cache) as resize:
        resize(f"{(repeat + 1) * 40}k")  # they are 192 kB
        argv = [*FOLDERS, f"data.root={images.name}", "train.epochs=1", f"hydra.run.dir=of-{images.name}"]
        status, out = server.run(*argv, environment={"XDG_CACHE_HOME": str(cache)})
        assert status == 0, out
        assert "the images will be read again by the next run" in out
        assert "Traceback" not in out
        assert [path.suffix for path in (cache / "fastalex").iterdir()] == [".lock"]


@repeated
@pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed: .ci/install-loaders PYTHON")
def test_no_room_for_a_beton_file(server: Server, repeat: int) -> None:
    images = server.folder / f"unwritten-{repeat}"
    image_tree(images)
    disk = server.folder / f"beton-disk-{repeat}"
    with small_disk(disk) as resize:
        resize(f"{repeat + 1}m")  # FFCV writes pages of 8 MB
        argv = [*FOLDERS, f"data.root={images.name}", "loader=ffcv", f"loader.beton={disk}"]
        status, out = server.run(*argv, f"hydra.run.dir=of-{images.name}")
        assert status == 2, out
        assert re.match(r"fastalex: error: .*cannot be written \(No space left", out.splitlines()[-1]), out
        assert "Traceback" not in out
        assert [path.suffix for path in disk.iterdir()] == [".lock"]
    assert not (server.folder / f"of-{images.name}").exists()


# --- Files that nobody wrote on purpose -------------------------------------------------------------------

BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    phases=[Phase.generate],  # a failure is reported as it was found: to shrink it takes minutes
    derandomize=EXAMPLES == 60,  # the suite tries the same ones each time
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def accepted(read: Callable[[Path], T], path: Path) -> T | None:
    """What a reader makes of a file; None if it refuses it, which it must do in one line."""
    message = ""
    try:
        return read(path)
    except FastalexError as error:
        message = str(error)
    assert "\n" not in message
    return None


@st.composite
def damage(draw: st.DrawFn, content: bytes) -> bytes:
    """A copy of a file with bits turned over, a part missing, or bytes put in."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero"]))
    at = draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=64)) + content[at:]
    end = at + draw(st.integers(1, 4096))
    return content[:at] + (b"" if kind == "cut" else bytes(len(content[at:end]))) + content[end:]


def a_checkpoint() -> bytes:
    model = {"weight": torch.arange(3000.0), "bias": torch.arange(10, dtype=torch.int64)}
    file = io.BytesIO()
    parts = {"format": 1, "config": {"model": {"name": "alexnet"}}, "classes": ["a"], "model": model}
    torch.save({**parts, "training": {"step": 3}, "average": None}, file)
    return file.getvalue()


CHECKPOINT = a_checkpoint()


@BOUNDED
@given(content=damage(CHECKPOINT))
def test_a_damaged_checkpoint_is_refused_or_harmless(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with tally.one_try():
        checkpoint = accepted(Checkpoint.load, path)
        if checkpoint is None:
            return
        # Harmless are bytes that mean nothing: dates, padding. Whatever was loaded is what had been saved.
        assert torch.equal(checkpoint.model["weight"], torch.arange(3000.0))
        assert torch.equal(checkpoint.model["bias"], torch.arange(10))
        assert (checkpoint.config, checkpoint.classes) == ({"model": {"name": "alexnet"}}, ["a"])
        assert (checkpoint.training, checkpoint.average) == ({"step": 3}, None)


def pickled(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def with_pickle(program: bytes, path: Path) -> Path:
    """Write a checkpoint whose pickle is another program, and whose checksums are right."""
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, program if name.endswith("data.pkl") else old.read(name))
    return path


def read_all(path: Path) -> Any:
    return Checkpoint.load(path).restore_config()


@BOUNDED
@given(program=st.one_of(damage(pickled(CHECKPOINT)), st.binary(max_size=200)))
def test_a_damaged_pickle_with_a_right_checksum_is_refused_or_plain(
    program: bytes, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    path = with_pickle(program, tmp_path_factory.getbasetemp() / "pickle.pt")
    with tally.one_try():
        accepted(read_all, path)


EXPLOITS = {
    "os.mkdir": lambda path: ("os\nmkdir", (path,)),
    "os.system": lambda path: ("os\nsystem", (f"mkdir '{path}'",)),
    "subprocess.check_call": lambda path: ("subprocess\ncheck_call", (["mkdir", path],)),
    "builtins.eval": lambda path: ("builtins\neval", (f"__import__('os').mkdir({path!r})",)),
    "builtins.exec": lambda path: ("builtins\nexec", (f"import os; os.mkdir({path!r})",)),
}


def exploit(call: str, opcode: str, path: Path) -> bytes:
    """Return a pickle that makes a folder where pickles are trusted; of pickle.py's protocol 2."""
    function, arguments = EXPLOITS[call](str(path))
    parts = pickle.dumps(arguments, 2)[2:-1]  # without the protocol's opcode and STOP
    items = b"".join(pickle.dumps(argument, 2)[2:-1] for argument in arguments)
    name = function.encode() + b"\n"
    return {
        "REDUCE": b"\x80\x02c" + name + parts + b"R.",
        "OBJ": b"\x80\x02(c" + name + items + b"o.",
        "INST": b"(" + items + b"i" + name + b".",
        "in a dict": b"\x80\x02}X\x06\x00\x00\x00configc" + name + parts + b"Rs.",
        "after the content": pickled(CHECKPOINT)[:-1] + b"c" + name + parts + b"R0.",
    }[opcode]


OPCODES = ["REDUCE", "OBJ", "INST", "in a dict", "after the content"]


@pytest.mark.parametrize("opcode", OPCODES)
@pytest.mark.parametrize("call", EXPLOITS)
def test_code_in_a_checkpoint_is_not_executed(call: str, opcode: str, tmp_path: Path) -> None:
    sign = tmp_path / "executed"
    path = with_pickle(exploit(call, opcode, sign), tmp_path / "hostile.pt")
    assert accepted(read_all, path) is None
    assert not sign.exists()
    with suppress(Exception):  # what comes after is not a checkpoint
        torch.load(path, weights_only=False)
    assert sign.is_dir()  # where it is trusted it works


EVERYTHING = Config(model=AlexNetConfig(), data=DataConfig(), loader=LoaderConfig())
KEYS = st.sampled_from([*flat(plain(EVERYTHING)), "data", "loader", "model", "recipe", "row", "train", "x"])
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["null", "[]", "{}", "[1,2,3]", "true", "${seed}", "${oc.env:HOME}", "???", "{a: 1}"]),
)


@settings(BOUNDED, max_examples=EXAMPLES // 4)  # each composes a configuration, half a second
@given(overrides=st.lists(st.builds("{}={}".format, KEYS, VALUES), min_size=1, max_size=3))
def test_any_configuration_is_taken_or_refused_in_one_line(
    overrides: list[str], tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    with tally.one_try(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        patch.setattr(sys, "argv", ["fastalex", *overrides, "hydra.run.dir=fuzzed"])
        patch.setattr(launch, "train", lambda config, *_, **__: validate(config))
        patch.setattr(sys, "stderr", err := io.StringIO())
        status = 0
        try:
            train.main()
        except SystemExit as end:
            status = end.code
        message = err.getvalue()
        refused = status == 2 and re.fullmatch(r"fastalex: error: .+\n", message)
        assert refused or (status, message) == (0, ""), overrides


def encoded(format: str) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 31, 3), np.uint8)
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


@BOUNDED
@given(content=st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"]).map(encoded).flatmap(damage))
def test_a_damaged_image_is_refused_or_has_pixels(
    content: bytes, tmp_path_factory: pytest.TempPathFactory, tally: Tally
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-image"
    path.write_bytes(content)
    with tally.one_try():
        pixels = accepted(decode_image, path)
        if pixels is None:
            return
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
