"""The processes of torchrun find each other, whatever the ones before them have left."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from fastalex.distributed import connection
from fastalex.errors import LostProcessError


def test_processes_that_start_again_agree_on_a_part_of_the_store() -> None:
    """The nodes' torchruns do not count the same restarts, and the store is that of ended processes."""
    store = dist.HashStore()

    def start(restarts: tuple[int, int], late: int) -> list[tuple[dist.Store, bool, list[str | None]]]:
        def process(rank: int) -> tuple[dist.Store, bool, list[str | None]]:
            if rank == late:
                time.sleep(0.2)  # meanwhile the other sees what the processes before have left
            return connection.agree(store, rank, 2, 60, restarts[rank], f"10.0.0.{rank}")

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(process, range(2)))

    for number, (restarts, late) in enumerate([((0, 0), 0), ((0, 0), 0), ((1, 0), 1), ((0, 2), 0)]):
        (zero, restarted, addresses), one = start(restarts, late)
        assert one[1:] == (restarted, addresses)
        assert restarted == (number > 0)
        assert addresses == ["10.0.0.0", "10.0.0.1"]
        assert not zero.check(["key"])  # which the processes before have set
        zero.set("key", str(number))
        assert one[0].get("key").decode() == str(number)
    other = dist.HashStore()  # of a rank 0 that has come back, unlike rank 1
    with ThreadPoolExecutor(2) as threads:
        outcomes = threads.map(lambda rank: connection.agree(other, rank, 2, 60, rank, None), range(2))
    assert [restarted for _, restarted, _ in outcomes] == [True, True]


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
