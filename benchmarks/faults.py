"""How often a run survives injected faults: `python -m benchmarks.faults [FAULT ...]`.

Runs the tests of each fault with the number of tries in `TRIES`, reads tries and losses from pytest's JUnit
XML, and writes them to results/faults.csv and to the table in docs/reliability.md. A test that makes several
tries reports their number by `record_property`; otherwise each test case counts as one try.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.report import FAULTS_FILE, RESULTS, machine, read_records, write_records
from fastalex.errors import OutputError
from fastalex.files import write_text
from fastalex.markdown import replace_between, table

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
RECORDS = RESULTS / FAULTS_FILE
BEGIN, END = "<!-- python -m benchmarks.faults writes this -->", "<!-- to here -->"
TRIES = {"FASTALEX_FAULT_KILLS": "20", "FASTALEX_FAULT_REPEATS": "4", "FASTALEX_FAULT_EXAMPLES": "2000"}


@dataclass(frozen=True)
class Fault:
    """A fault and what a run makes of it: one line of the table.

    Attributes:
        what: the fault.
        then: what happens to the run.
        test: the test function, as pytest names it.
    """

    what: str
    then: str
    test: str


SAME = "the resumed run ends with the same bits"
FAULTS = {
    "kill": Fault(
        "`kill -9` at a random moment, every other time while a file is being written",
        f"the newest checkpoint is whole, {SAME}",
        "tests/test_faults.py::test_killed_at_random_moments",
    ),
    "signal": Fault(
        "SIGTERM or SIGINT to the run",
        f"the step is finished and saved, the exit status is 128 plus the signal's number, {SAME}",
        "tests/test_faults.py::test_a_signal",
    ),
    "group-signal": Fault(
        "SIGTERM or SIGINT to the run and its loading processes, as by Ctrl-C",
        "the step is finished and saved, with the same exit status; the resumed run takes the remaining "
        "steps",
        "tests/test_faults.py::test_a_signal_to_the_loading_workers_too",
    ),
    "two-signals": Fault(
        "a second signal before the run has handled the first",
        "the run ends at once; the last checkpoint is whole",
        "tests/test_faults.py::test_two_signals_end_a_run_at_once",
    ),
    "disk-full": Fault(
        "a disk with room for one checkpoint and a part of another",
        f"one line and exit status 2, the older checkpoint stays; with room again {SAME}",
        "tests/test_faults.py::test_a_full_disk",
    ),
    "size-limit": Fault(
        "a limit on the size of files, of half a checkpoint (`ulimit -f`)",
        "`on_error=stop` as above; `on_error=warn` warns, continues without checkpoints and ends with the "
        "same bits",
        "tests/test_faults.py::test_a_file_size_limit",
    ),
    "damage": Fault(
        "a flipped bit in the newest checkpoint, or its end cut off",
        f"a warning, the checkpoint before it is used, {SAME}",
        "tests/test_faults.py::test_a_damaged_newest_checkpoint",
    ),
    "same-second": Fault(
        "two runs started in the same second",
        "two folders, each with the result of a run alone, bit for bit",
        "tests/test_faults.py::test_two_runs_started_in_the_same_second",
    ),
    "cache": Fault(
        "two processes build the same cache of decoded images",
        "one entry, and both runs end with the same bits",
        "tests/test_faults.py::test_two_processes_build_the_same_cache",
    ),
    "clock": Fault(
        "the clock set back by two years between a stop and its resumption, and another stop afterwards",
        f"the checkpoint of the latest step is used, {SAME}",
        "tests/test_faults.py::test_a_clock_set_back",
    ),
    "read-only": Fault(
        "a read-only data folder",
        "the run finishes; nothing in the folder has changed",
        "tests/test_faults.py::test_a_read_only_data_folder",
    ),
    "shared-memory": Fault(
        "a `/dev/shm` too small for the batches of two loading processes",
        "one line before anything is written, which names `loader.workers`",
        "tests/test_faults.py::test_too_little_shared_memory",
    ),
    "shared-memory-fills": Fault(
        "`/dev/shm` filled by another program while loading processes work",
        "one line, no process is left; the resumed run takes the remaining steps",
        "tests/test_faults.py::test_shared_memory_fills_up",
    ),
    "address-space": Fault(
        "no more address space (`ulimit -v`) at a random moment",
        "one line, which names `train.batch_size` and `train.accumulate`; the newest checkpoint is whole",
        "tests/test_faults.py::test_no_more_address_space",
    ),
    "out-of-memory-killer": Fault(
        "SIGKILL to a loading process, or to the run, as the kernel sends it when memory is full",
        "the run says which setting to lower, or is gone; no process is left, and the resumed run takes the "
        "remaining steps",
        "tests/test_faults.py::test_the_kernel_kills_for_memory",
    ),
    "descriptors": Fault(
        "64 file descriptors and two loading processes; then fewer than they need",
        "the run finishes; with fewer, one line",
        "tests/test_faults.py::test_few_file_descriptors",
    ),
    "cache-full": Fault(
        "a disk too small for the cache of decoded images",
        "a warning, the run finishes; no part of the cache is left",
        "tests/test_faults.py::test_no_room_for_the_cache",
    ),
    "beton-full": Fault(
        "a disk too small for the .beton file",
        "one line and exit status 2; no part of the file is left",
        "tests/test_faults.py::test_no_room_for_a_beton_file",
    ),
    "code": Fault(
        "code in a checkpoint: five functions, each called by five opcodes of pickle",
        "refused in one line, not executed",
        "tests/test_faults.py::test_code_in_a_checkpoint_is_not_executed",
    ),
    "fuzz-checkpoint": Fault(
        "a checkpoint with flipped bits, or bytes removed, inserted or zeroed",
        "refused in one line, or loaded as it was saved",
        "tests/test_faults.py::test_a_damaged_checkpoint_is_refused_or_harmless",
    ),
    "fuzz-pickle": Fault(
        "the same in the pickle inside, whose checksum is then corrected",
        "refused in one line, or loaded",
        "tests/test_faults.py::test_a_damaged_pickle_with_a_right_checksum_is_refused_or_plain",
    ),
    "fuzz-configuration": Fault(
        "one to three of all settings with random values",
        "refused in one line, or accepted",
        "tests/test_faults.py::test_any_configuration_is_taken_or_refused_in_one_line",
    ),
    "fuzz-image": Fault(
        "images of six formats, damaged like the checkpoint",
        "refused in one line, or decoded to pixels",
        "tests/test_faults.py::test_a_damaged_image_is_refused_or_has_pixels",
    ),
    "rank": Fault(
        "one rank killed, or hanging",
        "the others end within `distributed.timeout` with one line and an exit status; none is left behind",
        "tests/test_distributed.py::test_the_run_ends_with_a_message_when_a_process_dies_or_hangs",
    ),
    "elastic": Fault(
        "one rank killed, with `torchrun --max-restarts`",
        "all restart from the newest checkpoint, and the run completes with the same bits",
        "tests/test_distributed.py::test_the_run_completes_after_a_killed_process_is_restarted",
    ),
    "nodes": Fault(
        "two nodes; the clock of the second is an hour slow, and it does not see the run's folder",
        "data parallel, from given weights and in the hybrid, the losses are those of one process",
        "tests/test_nodes.py::test_two_nodes_take_the_steps_of_one_process",
    ),
    "link": Fault(
        "the link between two nodes down for longer than `distributed.timeout`",
        "both end with one line and an exit status; no process is left, and the last checkpoint stays",
        "tests/test_nodes.py::test_a_pulled_cable_ends_both_nodes_with_one_line",
    ),
    "node": Fault(
        "the second node killed, or switched off, and started again, with `torchrun --max-restarts`",
        "both resume from the newest checkpoint, and the run completes with the same bits",
        "tests/test_nodes.py::test_a_node_that_returns_resumes_the_run",
    ),
    "first-node": Fault(
        "the first node killed, which holds torchrun's rendezvous",
        "the second ends with one line and an exit status; the same two commands resume, with the same bits",
        "tests/test_nodes.py::test_without_the_first_node_the_second_ends",
    ),
}


def tally(report: str) -> dict[str, tuple[int, int, str]]:
    """Tries, losses and a note for each test function in pytest's JUnit XML."""
    found: dict[str, tuple[int, int, str]] = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        if case.find("skipped") is not None:
            continue
        properties = {p.attrib["name"]: p.attrib["value"] for p in case.iter("property")}
        failed = case.find("failure") is not None or case.find("error") is not None
        # A test that fails after its last try has lost one too.
        losses = max(int(properties.get("losses", 0)), int(failed))
        test = f"{case.attrib['file']}::{case.attrib['name'].partition('[')[0]}"
        tries, lost, note = found.get(test, (0, 0, ""))
        found[test] = (tries + int(properties.get("tries", 1)), lost + losses, properties.get("note", note))
    return found


def run(names: Collection[str]) -> list[dict[str, str]]:
    """Run the tests of these faults; return a record of each fault that was tried."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "junit.xml")
        tests = [FAULTS[name].test for name in names]
        options = ["-q", f"--junitxml={report}", "--override-ini=junit_family=xunit1"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        subprocess.run(command, cwd=ROOT, env={**os.environ, **TRIES}, check=False)
        found = tally(report.read_text()) if report.is_file() else {}
    records = []
    for name in names:
        test = FAULTS[name].test
        tries, losses, note = found.get(test, (0, 0, ""))
        if tries:
            facts = {"tries": str(tries), "losses": str(losses), "note": note}
            records.append({"fault": name, **facts, "test": test, **machine("cpu")})
    return records


def read(path: Path) -> dict[str, dict[str, str]]:
    """The records in a file, by fault; empty if there is no such file."""
    return {record["fault"]: record for record in read_records(path)}


def write(records: Iterable[dict[str, str]], path: Path) -> None:
    """Write the records in the order of the table."""
    write_records(sorted(records, key=lambda record: list(FAULTS).index(record["fault"])), path)


def page(text: str, records: dict[str, dict[str, str]]) -> str:
    """The text of a page with the table of the records between its marks."""
    rows = []
    for name, fault in FAULTS.items():
        if name not in records:
            rows.append([fault.what, "not tried yet", "", "", ""])
            continue
        record = records[name]
        tries = f"{int(record['tries']):,}" + (f", {record['note']}" if record["note"] else "")
        rows.append([fault.what, fault.then, tries, record["losses"], f"`make faults ARGS={name}`"])
    facts = ("hardware", "system", "python", "torch", "date")
    columns = [dict.fromkeys(record[fact] for record in records.values()) for fact in facts]
    hardware, system, python, torch, date = (" and ".join(sorted(column)) for column in columns)
    lines = [
        table(["what is done", "what happens", "tries", "lost", "again"], rows, numbers_right=True),
        "",
        f"*{hardware}, {system}, Python {python}, PyTorch {torch}, {date}.*",
    ]
    return replace_between(text, BEGIN, END, "\n".join(lines))


def main(arguments: list[str] | None = None) -> None:
    """Inject the faults, all or those named; write benchmarks/results/faults.csv and docs/reliability.md."""
    known = list(FAULTS)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=main.__doc__)
    parser.add_argument("faults", nargs="*", metavar="FAULT", help=f"one of {', '.join(known)}; all if none")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.faults if name not in known]
    if unknown:
        parser.error(f"{unknown[0]}: no such fault; one of {', '.join(known)}")
    names = args.faults or known
    new = {record["fault"]: record for record in run(names)}
    try:
        records = read(RECORDS) | new
        write(records.values(), RECORDS)
        write_text(PAGE, page(PAGE.read_text(), records))
    except OutputError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(f"wrote {RECORDS} and {PAGE}")
    wrong = [f"{name}: not tried, see above" for name in names if name not in new]
    wrong += [f"{name}: {r['losses']} of {r['tries']} lost" for name, r in new.items() if r["losses"] != "0"]
    if wrong:
        parser.exit(1, "".join(f"{parser.prog}: error: {line}\n" for line in wrong))


if __name__ == "__main__":
    main()
