"""What the commands share: Hydra in front, one-line errors and exit statuses behind."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastalex.config import schema
from fastalex.config.meanings import with_meanings
from fastalex.config.plain import as_argument, flat, one_line, quoted, to_dataclass
from fastalex.distributed.launcher import is_main
from fastalex.errors import FastalexError, ReportedError, ShortageError, StoppedError
from fastalex.files import remove_empty
from fastalex.shortage import described, shortage

T = TypeVar("T")
SPARE = "free some, or raise the limit (ulimit -a shows the limits)"
_FOLDERS = ("hydra.run.dir", "hydra.sweep.dir")


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        number: of the run in the sweep, from 0.
        overrides: the values that it was given, by their keys.
        folder: of the run.
        error: what ended it before its end; empty if nothing did.
    """

    number: int
    overrides: Mapping[str, str]
    folder: Path
    error: str = ""


def command(
    config_name: str,
    config_class: type[T],
    after_job: Callable[[Path, Sequence[Job]], None] = lambda folder, jobs: None,
) -> Callable[[Callable[[T, Path], Path | None]], Callable[[], None]]:
    """Turn ``function(config, run_dir)`` into a command line of ``key=value`` overrides.

    The function returns the folder that its files are in, which may be another than ``run_dir``, or None.

    An error that the user can correct ends as ``fastalex: error: ...`` on one line of standard error and with
    exit status 2, without a run folder; any other exception is a bug and keeps its traceback. In a sweep, the
    other jobs still run; a signal ends the sweep.

    Args:
        config_name: of the YAML file in ``configs/`` to compose.
        config_class: the dataclass that the function gets the configuration as.
        after_job: called in a sweep after each job, finished or not, with the sweep's folder and the jobs so
            far.
    """

    def decorate(function: Callable[[T, Path], Path | None]) -> Callable[[], None]:
        @functools.wraps(function)
        def main() -> None:
            statuses: list[int] = []
            jobs: list[Job] = []
            started = False
            sys.argv[1:] = [_expanded(_renamed(argument)) for argument in sys.argv[1:]]
            _check_arguments(sys.argv[1:], config_class)
            before = _folders_before(sys.argv[1:])

            def task(composed: DictConfig) -> None:
                nonlocal started
                started = True
                run_dir = Path(HydraConfig.get().runtime.output_dir)
                joint = True  # an error that every process has
                folder: Path | None = None
                outcome = "was stopped"
                try:
                    config = to_dataclass(composed, config_class)
                    joint = False
                    folder = function(config, run_dir)
                    outcome = ""
                except ReportedError as error:
                    sys.exit(error.exit_status)
                except StoppedError as error:
                    _fail(str(error), error.exit_status, anywhere=True)
                except FastalexError as error:
                    # Not handed to Hydra, which would print a line of its own about it.
                    statuses.append(error.exit_status)
                    outcome = str(error)
                    if isinstance(error, ShortageError):
                        sys.unraisablehook = _ignored
                    _report(f"{_job()}{error}", anywhere=not joint)
                except PermissionError as error:
                    statuses.append(FastalexError.exit_status)
                    outcome = f"{error.filename}: cannot be used ({error.strerror})"
                    _report(f"{_job()}{outcome}", anywhere=True)
                except Exception as error:
                    kind = shortage(error)
                    if kind is None:
                        raise
                    statuses.append(ShortageError.exit_status)
                    sys.unraisablehook = _ignored
                    outcome = f"{described(kind, error)} -- {SPARE}"
                    _report(f"{_job()}{outcome}", anywhere=True)
                finally:
                    remove_empty(run_dir, before)
                    if HydraConfig.get().mode is RunMode.MULTIRUN and is_main():
                        jobs.append(_described(folder or run_dir, outcome))
                        _call_after_job(after_job, jobs)

            schema.register()
            # Hydra would reduce an exception to a line of its own and exit with 1; this lets it through.
            os.environ["HYDRA_FULL_ERROR"] = "1"
            try:
                with _help_explained(config_class):
                    hydra.main(
                        version_base="1.3", config_path="pkg://fastalex.configs", config_name=config_name
                    )(task)()
            except KeyboardInterrupt:
                _fail("stopped by SIGINT", 128 + signal.SIGINT)
            except (HydraException, OmegaConfBaseException) as error:
                _fail(_one_line(error))
            except (TypeError, ValueError) as error:
                if started:
                    raise
                # Hydra's, of a group that is given something else than a name; it does not say which.
                _fail(f"a group takes the name of one choice, as in data=digits ({_one_line(error)})")
            except OSError as error:
                if started:
                    raise
                if isinstance(error, BrokenPipeError):  # whoever read --help has seen enough
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    sys.exit(1)
                _fail(f"hydra.run.dir={error.filename}: the run folder cannot be made ({error.strerror})")
            if statuses:
                sys.exit(statuses[0])

        return main

    return decorate


@contextlib.contextmanager
def _help_explained(config_class: type) -> Iterator[None]:
    """Context in which the text of ``--help`` gets the meanings of the keys, and appears at the end."""
    if not {"--help", "-h"} & set(sys.argv[1:]):
        yield
        return
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        sys.stdout.write(with_meanings(printed.getvalue(), config_class))
        sys.stdout.flush()


def _renamed(argument: str) -> str:
    """Replace old names in an argument, with a warning; they are accepted for one version."""
    renamed = argument
    if re.match(r"rows=|row/|(--config-name|-cn)=row/", argument):
        renamed = re.sub(r"\balexnet_seed_recipe\b", "alexnet_study_recipe", argument)
    if renamed.startswith("recipe="):
        renamed = re.sub(r"\bseed\b", "study", renamed)
    if renamed != argument and is_main():
        print(f"fastalex: warning: {argument} is now called {renamed}", file=sys.stderr)
    return renamed


def _expanded(argument: str) -> str:
    """Replace the ``~`` that bash leaves in ``data.root=~/images``, and Hydra cannot read."""
    key, _, value = argument.partition("=")
    path = value.strip("'\"")
    return f"{key}={quoted(str(Path(path).expanduser()))}" if path.startswith("~/") else argument


def explicit_overrides() -> dict[str, Any]:
    """Return the explicit overrides of this command line, expanded to dotted keys.

    ``model=`` gives every key of the network. ``recipe=`` gives every key in which recipes differ but the
    number of epochs, by which a resumed run would become longer. Any other group gives its choice, and
    ``--config-name`` the network, and what that configuration changes of the default.
    """
    job = HydraConfig.get()
    overrides = [override.lstrip("+~") for override in job.overrides.task]
    given = _composed(job.job.config_name, overrides)
    asked = {}
    if job.job.config_name != "config":
        asked = {"model.name": given["model.name"]} | _changes(given, _composed("config", []))
    for override in overrides:
        key = override.partition("=")[0]
        if key in given:
            asked[key] = given[key]
        elif key == "recipe":
            others = [other for other in overrides if other != override]
            for recipe in _choices("recipe"):
                instead = _composed(job.job.config_name, [*others, f"recipe={recipe}"])
                changes = _changes(given, instead)
                asked |= {name: value for name, value in changes.items() if name != "train.epochs"}
        elif "=" in override and isinstance(value := _parsed(override), dict):
            asked |= {name: given[name] for name in flat({key: value})}
        else:
            whole = key == "model"
            asked |= {
                name: value
                for name, value in given.items()
                if name == f"{key}.name" or (whole and name.startswith("model."))
            }
    return asked


def _parsed(override: str) -> Any:
    """Return the value of an override as Hydra reads it."""
    return OverridesParser.create().parse_override(override).value()


def _choices(group: str) -> list[str]:
    """Return the names of the configurations in a folder of ``configs/``."""
    files = resources.files("fastalex.configs").joinpath(group).iterdir()
    return sorted(file.name.removesuffix(".yaml") for file in files if file.name.endswith(".yaml"))


def _composed(name: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    return flat(OmegaConf.to_container(hydra.compose(name, list(overrides)), enum_to_str=True))


def _changes(values: dict[str, Any], default: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value != default.get(key)}


def _check_arguments(arguments: Sequence[str], config_class: type) -> None:
    """End the process with a line about arguments that Hydra would take wrongly, or answer with its usage."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            _, unknown = get_args_parser().parse_known_args(arguments)
    except SystemExit as end:
        if not end.code:  # --version
            raise
        _fail(printed.getvalue().strip().partition(": error: ")[2])
    if unknown:
        _fail(_unknown(unknown[0], config_class))
    for key, equals, value in (argument.partition("=") for argument in arguments):
        if key in _FOLDERS and equals and not value.strip("'\" "):
            _fail(f"{key}: is empty; name a folder")


def _unknown(argument: str, config_class: type) -> str:
    """Return the message about an argument that Hydra's parser does not know."""
    if not argument.startswith("-"):
        return f"{argument}: has a flag between it and other settings; put flags in front of all settings"
    flag, _, value = argument.lstrip("-").partition("=")
    name = flag.replace("-", "_")
    keys = flat(OmegaConf.to_container(OmegaConf.structured(config_class)))
    meant = [key for key in keys if f".{key}".endswith(f".{name}")]
    key = meant[0] if len(meant) == 1 else name
    return f"{argument}: settings have no dashes in front: {key}={value or '...'} (--help lists every key)"


def _folders_before(arguments: Sequence[str]) -> set[Path]:
    """Return the folders that exist already, among those that Hydra creates where they do not."""
    named = [value for key, _, value in (each.partition("=") for each in arguments) if key in _FOLDERS]
    folders = [Path(value.strip("'\"")) for value in named] + [Path("outputs"), Path("multirun")]
    return {each.resolve() for folder in folders for each in (folder, *folder.parents) if each.is_dir()}


def _described(folder: Path, error: str) -> Job:
    """Return the job of the sweep that has just ended."""
    job = HydraConfig.get()
    pairs = (override.lstrip("+~").partition("=") for override in job.overrides.task)
    return Job(int(job.job.num), {key: value for key, _, value in pairs}, folder, error)


def _ignored(raised: sys.UnraisableHookArgs) -> None:
    """Print nothing about an error in freeing an object: a library that lacks memory fails in that too."""


def _call_after_job(after_job: Callable[[Path, Sequence[Job]], None], jobs: Sequence[Job]) -> None:
    """Call it; what cannot be written ends neither the job nor the sweep."""
    try:
        after_job(Path(HydraConfig.get().sweep.dir), jobs)
    except FastalexError as error:
        print(f"fastalex: warning: {error}", file=sys.stderr)


def _job() -> str:
    """Return the prefix that names a job of a sweep in a message; empty outside a sweep."""
    job = HydraConfig.get()
    return f"job {job.job.num}: " if job.mode is RunMode.MULTIRUN else ""


def _fail(message: str, status: int = FastalexError.exit_status, *, anywhere: bool = False) -> NoReturn:
    """End the process with a line, as :func:`_report` prints it, and this status."""
    _report(message, anywhere=anywhere)
    sys.exit(status)


def _report(message: str, *, anywhere: bool) -> None:
    """Print an error on one line; where every rank has the same error, only rank 0 prints it.

    Args:
        message: the text of the line.
        anywhere: whether the error is this process's own, which no other prints.
    """
    line = "\\n".join(message.splitlines())  # a value that was given may have line breaks
    if is_main() or anywhere:
        print(f"fastalex: error: {line}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    """Reduce a library's message to the line that names the key, the value and the remedy."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = str(error.missing_cfg_file).rpartition("/")
        options = sorted(option for option in error.options if not option.startswith("schema"))
        return f"{group}={choice}: there is no such choice; choose from {', '.join(options)}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        rows = ", ".join(f"row/{row}" for row in _choices("row"))
        return f"--config-name={error.missing_cfg_file}: there is no such configuration; choose from {rows}"
    if isinstance(error, OverrideParseException):
        key, _, value = str(error.override).partition("=")
        if value.strip("'\"") and re.fullmatch(r"[\w./@+~-]+", key):
            return f"{error.override}: Hydra reads this value otherwise; quote it: {as_argument(key, value)}"
        return f"{error.override}: is not of the form key=value; --help lists every key"
    return one_line(error)
