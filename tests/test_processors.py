"""Which processors the numeric tests imitate."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import processors


@pytest.mark.parametrize(
    ("flags", "imitated"),
    [
        ({"avx2"}, []),
        ({"avx2", "avx512f"}, ["AVX2"]),
        ({"avx2", "avx512f", "avx512_bf16"}, ["AVX2", "AVX-512 without bf16"]),
        ({"avx2", "avx512f", "avx512_bf16", "amx_bf16"}, ["AVX2", "AVX-512 without bf16"]),
    ],
)
def test_those_with_fewer_instructions_are_imitated(flags: set[str], imitated: list[str]) -> None:
    assert list(processors.choose(flags)) == imitated


def test_each_is_run_until_one_fails(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(processors, "processor_flags", lambda: {"avx512f", "avx512_bf16"})
    commands: list[list[str]] = []
    variables: list[str] = []
    statuses = [0, 5]

    def run(command: list[str], env: dict[str, str], check: bool) -> subprocess.CompletedProcess[bytes]:
        commands.append(command)
        variables.append(env["ONEDNN_MAX_CPU_ISA"])
        return subprocess.CompletedProcess(command, statuses.pop(0))

    monkeypatch.setattr(subprocess, "run", run)
    assert processors.main(["-q"]) == 5
    assert commands == 2 * [[sys.executable, "-m", "pytest", "-q", *processors.TESTS]]
    assert variables == ["AVX2", "AVX512_CORE"]
    statuses.append(3)
    assert processors.main(["tests/test_optim.py"]) == 3  # and not the second
    assert commands[2:] == [[sys.executable, "-m", "pytest", "tests/test_optim.py"]]
    monkeypatch.setattr(processors, "processor_flags", set)
    capfd.readouterr()
    assert processors.main([]) == 0
    assert "not imitated: a processor with AVX2, as this one has no avx512f" in capfd.readouterr().out
