"""Two machines for tests: each with its own host name, network and processes, and a cable between them.

They are Linux namespaces without names, which vanish with the processes in them: nothing is left behind, also
where the tests are killed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import ENVIRONMENT

# torchrun sorts the nodes by these names: the first has rank 0.
ADDRESSES = {"first": "10.77.0.1", "second": "10.77.0.2"}
CLOCK = Path(__file__).parent / "files" / "clock"
GUARD = 600.0  # seconds; only against tests that would never end


class _RefusedError(Exception):
    """This machine does not let us make namespaces."""


class Node:
    """A machine. Its network stays as long as this object; its processes and mounts until it is killed.

    Args:
        name: its host name, a key of :data:`ADDRESSES`.
        folder: for its ``/etc/hosts`` and for what its commands print.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._log = folder / f"{name}.log"
        self._hosts = folder / f"{name}.hosts"
        # As on Debian and Ubuntu, its own name leads to an address that no other machine can reach.
        others = [f"{address} {other}" for other, address in ADDRESSES.items() if other != name]
        self._hosts.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others, ""]))
        self._network = _holder(["unshare", "--net", "sh", "-c", "echo ready; exec cat"])
        self._machine: subprocess.Popen[str] | None = None

    def boot(self) -> None:
        """Start the machine; nothing of what was mounted and ran on it before is left."""
        begin = f"hostname {self.name} && mount --bind {self._hosts} /etc/hosts && echo ready && exec cat"
        own = ["--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._machine = _holder([*self._networked, "unshare", *own, "sh", "-c", begin])

    def kill(self) -> None:
        """End all processes on this machine at once."""
        if self._machine is not None:
            _release(self._machine)
            self._machine = None

    def close(self) -> None:
        """End everything on this machine, and its network."""
        self.kill()
        _release(self._network)

    def connect(self, other: Node) -> None:
        """Lay the cable to the other machine, and give both their addresses."""
        self._ip(
            "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(other._network.pid)
        )
        for node in (self, other):
            node._ip("link", "set", "lo", "up")
            node._ip("address", "add", f"{ADDRESSES[node.name]}/24", "dev", "cable")
            node.cable("up")

    def cable(self, state: str) -> None:
        """Plug this end of the cable in (``up``), or pull it out (``down``)."""
        self._ip("link", "set", "cable", state)

    def hide(self, folder: Path) -> None:
        """Have an empty folder of this machine's own in the place of one that both see."""
        self.run("mount", "-t", "tmpfs", "none", str(folder))

    def run(self, *command: str) -> None:
        """Run a command, which must succeed."""
        subprocess.run([*self._inside, *command], check=True)

    def torchrun(
        self, *arguments: str, environment: Mapping[str, str] | None = None, clock: float = 0
    ) -> subprocess.Popen[str]:
        """Start a program in one process on each of the two machines; each needs a call.

        Args:
            *arguments: options of torchrun, the program and its arguments.
            environment: variables.
            clock: seconds that the clock of this machine is ahead.
        """
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=first:29400", "--rdzv-id=test"]
        variables = {**ENVIRONMENT, **(environment or {})}
        if clock:
            variables["FASTALEX_TEST_CLOCK"] = str(clock)
            variables["PYTHONPATH"] = f"{CLOCK}:{variables['PYTHONPATH']}"
        with self._log.open("a") as log:
            return subprocess.Popen(
                [*self._inside, *launcher, *meeting, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables,
            )

    @property
    def printed(self) -> str:
        """What the programs on this machine have printed."""
        return self._log.read_text()

    @property
    def errors(self) -> list[str]:
        """The lines of errors among it."""
        return [line for line in self.printed.splitlines() if line.startswith("fastalex: error")]

    def seen(self, folder: Path) -> list[str]:
        """The names in a folder as this machine sees it."""
        return sorted(path.name for path in Path(f"/proc/{self._init}/root{folder}").iterdir())

    def processes(self) -> list[str]:
        """The command lines of the processes that run on this machine."""
        lines = Path(f"/proc/{self._init}/root/proc").glob("[1-9]*/cmdline")
        # That of a process which has ended and whose parent has not waited for it is empty.
        return [line for path in lines if path.parent.name != "1" and (line := path.read_text())]

    @property
    def _init(self) -> int:
        """The process whose end is that of all others on this machine."""
        assert self._machine is not None
        pid = self._machine.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())

    @property
    def _inside(self) -> list[str]:
        return ["nsenter", "--target", str(self._init), "--net", "--uts", "--mount", "--pid", "--"]

    @property
    def _networked(self) -> list[str]:
        return ["nsenter", "--target", str(self._network.pid), "--net", "--"]

    def _ip(self, *arguments: str) -> None:
        done = subprocess.run(
            [*self._networked, "ip", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise _RefusedError(done.stderr.strip())


@contextmanager
def two_nodes(folder: Path) -> Iterator[tuple[Node, Node]]:
    """Context with two connected machines; skips the test where namespaces are not allowed.

    Args:
        folder: for files of theirs.
    """
    nodes: list[Node] = []
    try:
        try:
            for name in ADDRESSES:
                nodes.append(Node(name, folder))
            nodes[0].connect(nodes[1])
            for node in nodes:
                node.boot()
        except (_RefusedError, OSError) as error:
            pytest.skip(f"two nodes are network namespaces, which need Linux and root: {error}")
        yield nodes[0], nodes[1]
    finally:
        for node in nodes:
            node.close()


def wait_for(condition: Callable[[], bool], *nodes: Node) -> None:
    """Wait until a condition holds, which the nodes bring about."""
    end = time.monotonic() + GUARD
    while not condition():
        assert time.monotonic() < end, "\n\n".join(node.printed for node in nodes)
        time.sleep(0.05)


def ended(*launchers: subprocess.Popen[str]) -> list[int]:
    """The exit statuses of torchruns, once they have ended."""
    return [launcher.wait(GUARD) for launcher in launchers]


def _holder(command: list[str]) -> subprocess.Popen[str]:
    """Start a process that holds namespaces until it is killed, or nobody holds its standard input open."""
    holder = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    if holder.stdout.readline() != "ready\n":
        raise _RefusedError(holder.communicate()[1].strip())
    return holder


def _release(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.communicate()
