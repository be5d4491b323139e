"""How results differ from committed ones: `python -m benchmarks.compare [REV]`.

Compares each measurement in `benchmarks/results/*.csv` with that of REV. It has moved if the medians differ
by more than 5% and the intervals from the 20th to the 80th percentile do not overlap.
"""

from __future__ import annotations

import argparse
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import RESULTS, Measurement, measurement_files, read_measurements

LEAST_CHANGE = 0.05


class CompareError(Exception):
    """There are no results, or no committed ones to compare them with."""


@dataclass(frozen=True)
class Change:
    """A measurement before and now."""

    before: Measurement
    now: Measurement

    @property
    def change(self) -> float:
        """The change of the median, as a fraction of the median before."""
        return self.now.median / self.before.median - 1

    @property
    def mark(self) -> str:
        """ "better" or "worse" if it is beyond noise, or empty."""
        apart = self.now.p20 > self.before.p80 or self.now.p80 < self.before.p20
        if not apart or abs(self.change) <= LEAST_CHANGE:
            return ""
        return "better" if (self.change < 0) == self.now.less_is_better else "worse"

    def __str__(self) -> str:
        what = ", ".join(filter(None, self.now.subject.values()))
        figures = f"{self.before.median:10,.4g} -> {self.now.median:10,.4g} {self.now.unit:9}"
        return f"  {figures} {self.change:+7.1%}  {self.mark:6}  {what}".rstrip()


def measurements(path: Path, text: str) -> dict[tuple[str, ...], Measurement]:
    """The measurements of a file, by subject and unit."""
    try:
        return {(*m.subject.values(), m.unit): m for m in read_measurements(text)}
    except ValueError as error:
        raise CompareError(f"{path} is not a file of results: {error}") from error


def git(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise CompareError("git is not installed") from error


def compare(results: Path, revision: str) -> str:
    """The report.

    Raises:
        CompareError: no results, no git checkout, no such revision, or a file of another format.
    """
    paths = measurement_files(results)
    if not paths:
        raise CompareError(f"no {results}/*.csv; make bench writes them")
    if git(results, "rev-parse").returncode:
        raise CompareError(f"{results} is not in a git checkout: there is nothing to compare with")
    if git(results, "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}").returncode:
        raise CompareError(f"git knows no revision {revision}")
    lines = []
    for path in paths:
        shown = git(results, "show", f"{revision}:./{path.name}")
        if shown.returncode:
            lines.append(f"{path.name}: not in {revision}")
        elif shown.stdout == path.read_text():
            lines.append(f"{path.name}: as in {revision}")
        else:
            lines += changes(path, measurements(path, shown.stdout), measurements(path, path.read_text()))
    return "\n".join(lines)


def changes(
    path: Path, before: dict[tuple[str, ...], Measurement], now: dict[tuple[str, ...], Measurement]
) -> list[str]:
    """The lines about one file."""
    both = [Change(before[key], now[key]) for key in now if key in before]
    moved = [change.mark for change in both if change.mark]
    lines = [
        f"{path.name}: of {len(both)} measurements {moved.count('better')} better and "
        f"{moved.count('worse')} worse beyond noise; {len(now) - len(both)} new, "
        f"{len(before) - len(both)} gone"
    ]
    machines = [{m["hardware"] for m in side.values()} for side in (before, now)]
    if machines[0] != machines[1]:
        names = [" and ".join(sorted(machine)) for machine in machines]
        lines.append(f"  not the same machine: {names[0]}, now {names[1]}")
    return lines + [str(change) for change in both]


def main(arguments: list[str] | None = None) -> None:
    """Compare benchmarks/results/*.csv with those of a commit, and mark what has moved beyond noise."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=main.__doc__)
    parser.add_argument("revision", nargs="?", default="HEAD", metavar="REV", help="a commit (HEAD)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder of results")
    args = parser.parse_args(arguments)
    try:
        print(compare(args.results, args.revision))
    except CompareError as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
