"""The processes of torchrun find each other, whatever the ones before them have left."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from fastalex.distributed import connection
from fastalex.errors import LostProcessError


def connected(
    store: dist.Store, restarts: tuple[int, int], late: int, names: tuple[str, str]
) -> tuple[list[dist.Store], bool]:
    """What two processes, of which one is late, agree on: parts of the store, and whether it is a restart."""

    def process(rank: int) -> tuple[dist.Store, bool, list[connection.Member]]:
        if rank == late:
            time.sleep(0.2)  # meanwhile the other sees what the processes before have left
        return connection.agree(store, rank, 2, 60, members[rank])

    members = [connection.Member(names[rank], restarts[rank], f"10.0.0.{rank}") for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        parts, restarted, seen = zip(*threads.map(process, range(2)), strict=True)
    assert restarted[0] == restarted[1]
    assert seen == (members, members)
    return list(parts), restarted[0]


@pytest.mark.parametrize("late", [0, 1])
def test_processes_that_start_again_agree_on_a_part_of_the_store(late: int) -> None:
    """The nodes' torchruns do not count the same restarts, and the store is that of ended processes."""
    store = dist.HashStore()
    for number, restarts in enumerate([(0, 0), (0, 0), (1, 0), (0, 2)]):
        names = (f"zero {number}", f"one {number}")
        (zero, one), restarted = connected(store, restarts, late, names)
        assert restarted == (number > 0)
        assert not zero.check(["key"])  # which the processes before have set
        zero.set("key", str(number))
        assert one.get("key").decode() == str(number)


def test_a_restart_is_known_from_either_node() -> None:
    """A node that has come back brings a new store, and counts from zero."""
    _, restarted = connected(dist.HashStore(), (0, 1), 0, ("zero", "one"))
    assert restarted


def test_processes_may_connect_twice() -> None:
    """As the runs of a sweep do; that is no restart."""
    store = dist.HashStore()
    names = ("zero", "one")
    first, restarted = connected(store, (0, 0), 0, names)
    assert not restarted
    second, restarted = connected(store, (0, 0), 1, names)
    assert not restarted
    first[0].set("key", "first")
    assert not second[1].check(["key"])


def test_an_interface_is_found_by_its_address() -> None:
    own = connection.address_towards("localhost")
    assert own == "127.0.0.1"
    name = connection.interface_of(own)
    assert name is not None
    assert int(Path(f"/sys/class/net/{name}/flags").read_text(), 16) & 0x8  # IFF_LOOPBACK
    assert connection.interface_of("192.0.2.1") is None  # an address that nobody has
    assert connection.address_towards("no-such-host.invalid") is None


def test_an_interface_that_does_not_exist_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    here = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**here, "LOCAL_WORLD_SIZE": "1", connection.INTERFACE: "nowhere0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LostProcessError, match=r"GLOO_SOCKET_IFNAME=nowhere0: process 0 of 1 found no way"):
        connection.connect(60)
