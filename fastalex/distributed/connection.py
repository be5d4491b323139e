"""How the processes of torchrun, on one machine or several, find each other."""

from __future__ import annotations

import fcntl
import ipaddress
import json
import os
import re
import socket
import struct
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fastalex.errors import LostProcessError

MOST_SECONDS_APART = 10.0  # of clocks; less than the keep-alive of torchrun's rendezvous
INTERFACE = "GLOO_SOCKET_IFNAME"  # gloo's own variable

# Messages of gloo, NCCL and DistributedDataParallel's reducer when another process does not answer.
_NO_ANSWER = re.compile(r"gloo|nccl|connection (closed|reset)|broken pipe|timed? ?out", re.IGNORECASE)
_START = "fastalex/start"  # key of the newest start in torchrun's store
_PROCESS = uuid.uuid4().hex  # tells this process from those before it and beside it
_NO_WAY = re.compile("connectFullMesh failed|Unable to find address")  # gloo's, on an interface
_SECONDS_BETWEEN_LOOKS = 0.05  # into the store


@dataclass(frozen=True)
class Member:
    """What a process tells the others about itself.

    Attributes:
        process: tells it from all other processes, also those before it.
        restarts: how often its node's torchrun has started it again.
        address: its machine's IPv4 address on the way to rank 0's; a loopback address on that machine itself;
            None if there is none.
    """

    process: str
    restarts: int
    address: str | None


def is_lost(error: BaseException) -> bool:
    """Whether an error of PyTorch says that another process has ended or does not answer."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _NO_ANSWER.search(str(error)) is not None
    )


@contextmanager
def one_line(rank: int, size: int, timeout: float) -> Iterator[None]:
    """Context that turns a lost or missing connection to another process into a one-line error.

    Args:
        rank: rank of this process.
        size: number of processes.
        timeout: seconds that a process waits for the others.

    Raises:
        LostProcessError: another process has ended or does not answer; names the rank that noticed.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise LostProcessError(
            f"process {rank} of {size}: another process has ended, or did not answer within "
            f"{timeout:g} s (distributed.timeout); see its own message, then resume with resume=auto"
        ) from error


def connect(timeout: float) -> bool:
    """Connect this process to the others, as the default process group of ``torch.distributed``; collective.

    Args:
        timeout: seconds that a process waits for the others, now and in each collective.

    Returns:
        Whether torchrun has started the processes again, after one of them or a whole node was lost; the same
        on every rank.

    Raises:
        LostProcessError: another process has ended or does not answer.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    limit = timedelta(seconds=timeout)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    this = Member(_PROCESS, restarts, address_towards(os.environ["MASTER_ADDR"]))
    with one_line(rank, size, timeout):
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        store, restarted, members = agree(store, rank, size, timeout, this)
    if size > int(os.environ["LOCAL_WORLD_SIZE"]) and INTERFACE not in os.environ:
        interface = _shared_interface(this.address, [member.address for member in members])
        if interface is not None:
            os.environ[INTERFACE] = interface
    try:
        with one_line(rank, size, timeout):
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
            _compare_clocks(rank, size)
    except LostProcessError as error:
        if INTERFACE not in os.environ or not _NO_WAY.search(str(error.__cause__)):
            raise
        raise LostProcessError(
            f"{INTERFACE}={os.environ[INTERFACE]}: process {rank} of {size} found no way to another process "
            f"through this network interface; see the other's own message, or set the variable on each node "
            f"to the interface that the nodes share (`ip address` lists them)"
        ) from error
    return restarted


def agree(
    store: dist.Store, rank: int, size: int, timeout: float, this: Member
) -> tuple[dist.Store, bool, list[Member]]:
    """Agree with the other ranks on a part of the store that is theirs alone; collective.

    torchrun may give processes that it starts again the store of those that have ended, which holds their
    addresses. No number in the environment tells one start from another on all nodes: each node's torchrun
    counts those restarts alone that it began itself, and one that has come back counts from zero.

    Args:
        store: torchrun's.
        rank: rank of this process.
        size: number of processes.
        timeout: seconds to wait for the others.
        this: this process.

    Returns:
        The part of the store; whether other processes were there before these; and all processes, by rank.

    Raises:
        torch.distributed.DistError: another rank does not answer.
    """
    own = f"{this.process} {uuid.uuid4().hex}"  # of this call: a process may connect more than once
    mine = json.dumps([own, *astuple(this)])
    if rank == 0:
        before = store.get(_START).decode() if store.check([_START]) else own
        store.set(_START, own)
        told = [mine, *(store.get(f"{own}/{other}").decode() for other in range(1, size))]
        earlier = before.rpartition(" ")[0] != this.process
        store.set(f"{own}/all", json.dumps([earlier, *map(json.loads, told)]))
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        start = store.get(_START).decode()  # perhaps that of processes which have ended
        store.set(f"{start}/{rank}", mine)
        if store.check([f"{start}/all"]):
            earlier, *told = json.loads(store.get(f"{start}/all"))
            if told[rank][0] == own:
                members = [Member(*facts) for _, *facts in told]
                restarted = earlier or any(member.restarts > 0 for member in members)
                return dist.PrefixStore(start, store), restarted, members
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    raise dist.DistStoreError(f"no answer from rank 0 within {timeout:g} s")


def _compare_clocks(rank: int, size: int) -> None:
    """Warn on rank 0 if the machines' clocks are far apart, by which torchrun judges who is alive."""
    clocks: list[float] = [0.0] * size
    dist.all_gather_object(clocks, time.time())
    apart = max(clocks) - min(clocks)
    if rank == 0 and apart > MOST_SECONDS_APART:
        print(
            f"fastalex: warning: the clocks of the nodes are {apart:.0f} s apart; torchrun's c10d rendezvous "
            "takes a node that is 15 s behind another for dead; set the clocks right, for instance by NTP",
            file=sys.stderr,
        )


def address_towards(host: str) -> str | None:
    """This machine's IPv4 address on the way to a host; None if there is no way, or none by IPv4.

    Args:
        host: name or address.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _shared_interface(own: str | None, addresses: list[str | None]) -> str | None:
    """The network interface through which the other nodes reach this one.

    By itself gloo takes the address that this machine's own name resolves to, which on Debian and Ubuntu is
    127.0.1.1.

    Args:
        own: this machine's address towards rank 0's node; a loopback address on that node itself.
        addresses: those of all ranks.

    Returns:
        Its name; None if it cannot be told.
    """
    if own is None or ipaddress.ip_address(own).is_loopback:
        reachable = (each for each in addresses if each and not ipaddress.ip_address(each).is_loopback)
        other = next(reachable, None)
        own = address_towards(other) if other else None
    return interface_of(own) if own else None


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address.

    Args:
        address: an IPv4 address.
    """
    get_address = 0x8915  # SIOCGIFADDR of <linux/sockios.h>: takes and returns a struct ifreq
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, get_address, struct.pack("256s", name.encode()))
            except OSError:  # an interface without an address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
