"""The reproduction: its rows, the whole path on tiny runs, and its arithmetic on runs made up here."""

from __future__ import annotations

import csv
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_module
from omegaconf import OmegaConf
from PIL import Image

from fastalex import reproduce, train
from fastalex.commands import reproduce as reproducing
from fastalex.config import (
    AlexNetConfig,
    Config,
    DataConfig,
    LoaderConfig,
    ModelConfig,
    Optimizer,
    ReproduceConfig,
    TrainConfig,
    schema,
)
from fastalex.config.checks import validate
from fastalex.config.plain import plain, to_dataclass
from fastalex.errors import ConfigError, DivergedError, OutputError
from fastalex.files import write_text
from fastalex.models import check_crop
from fastalex.study import claims, committed, comparison, report
from fastalex.study.estimate import Estimator
from fastalex.study.intervals import Sample
from fastalex.study.intervals import difference as interval
from fastalex.study.report import BEGIN, END
from fastalex.study.results import load_run
from fastalex.study.rows import BASE, CLAIMS, ROWS, run_folder, select
from tests.commands import outcome

pytestmark = pytest.mark.usefixtures("tiny_network")

# Every row becomes a network that takes no time.
TINY = (
    "data=digits",
    "data.resize=36",
    "data.crop=32",
    "data.flip=none",
    "model=resnet18",  # a group without options
    "model.name=tiny",
    "train.epochs=1",
    "train.stages=[]",
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Run the command in an empty folder; return its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproducing, "QUICK", TINY)

    def run(*arguments: str, main: Any = reproduce.main) -> tuple[int, str, str]:
        return outcome(main, arguments, monkeypatch, capsys)

    return run


# The rows


@pytest.fixture(scope="module")
def rows() -> dict[str, Config]:
    schema.register()
    with initialize_config_module("fastalex.configs", version_base="1.3"):
        return {name: to_dataclass(hydra.compose(f"row/{name}"), Config) for name in ROWS}


def test_each_row_is_a_file_that_composes(rows: dict[str, Config]) -> None:
    files = (Path(reproduce.__file__).parents[1] / "configs" / "row").glob("*.yaml")
    assert {file.stem for file in files} == set(ROWS)
    for name, config in rows.items():
        validate(config)
        check_crop(config.model.name, "data.crop", config.data.crop)
        assert config.data.name == ("tiny_imagenet" if name == "alexnet_tiny" else "cifar10")
        if config.model.name != "four_layer":  # which has no augmentation
            assert (config.data.resize / config.data.crop) == pytest.approx(256 / 224, rel=0.01)


def changed(one: Config, other: Config) -> dict[str, Any]:
    first, second = plain(one), plain(other)
    return {
        f"{section}.{key}": second[section][key]
        for section in ("model", "data", "loader", "train", "runtime")
        for key in first[section]
        if first[section][key] != second[section][key]
    }


def test_pooling_makes_no_difference_in_size(rows: dict[str, Config]) -> None:
    """Max pooling leaves floor((n - k) / 2) + 1 pixels, three times."""
    size = (rows[BASE].data.crop + 2 * 2 - 11) // 4 + 1
    for _ in range(3):
        assert (size - 3) // 2 == (size - 2) // 2
        size = (size - 3) // 2 + 1


def test_comparisons_change_one_thing(rows: dict[str, Config]) -> None:
    base = rows[BASE]
    assert changed(base, rows["ablation_no_lrn"]) == {"model.norm": "none"}
    assert changed(base, rows["ablation_non_overlapping_pool"]) == {"model.overlapping_pool": False}
    assert changed(base, rows["ablation_no_dropout"]) == {"model.dropout": 0.0}
    assert all(len(row.seeds) >= 2 for name, row in ROWS.items() if name == BASE or row.base)
    assert changed(rows["alexnet_112"], rows["alexnet_bn"]) == {"model.norm": "batch"}
    failing, mended = rows["alexnet_paper_init"], rows["alexnet_paper_init_mended"]
    assert failing.train.epochs >= 3
    assert changed(failing, mended) == {"data.std": [1 / 255] * 3, "train.lr": 0.001}


def test_claims_change_one_thing(rows: dict[str, Config]) -> None:
    bases = {
        "claim_relu": "claim_relu",
        "claim_tanh": "claim_relu",
        "claim_high_rate_no_lrn": "claim_high_rate",
        "ablation_no_weight_decay": BASE,
        "ablation_high_rate": BASE,
        "ablation_high_rate_no_lrn": "ablation_high_rate",
    }
    changes = {
        name: changed(rows[bases.get(name, "claim_base")], rows[name])
        for name, row in ROWS.items()
        if row.group == CLAIMS and name != "claim_resnet18"
    }
    assert changes.pop("claim_base") == changes.pop("claim_relu") == {}
    tanh = changes.pop("claim_tanh")
    assert tanh.pop("model.activation") == "tanh"
    assert set(tanh) <= {"train.lr"}
    assert changes.pop("claim_no_augmentation") == {"data.flip": "none", "data.random_crop": False}
    assert all(len(change) == 1 for change in changes.values()), changes
    base, other = (plain(rows[name]) for name in ("claim_base", "claim_resnet18"))
    assert {section for section in base if base[section] != other[section]} == {"model"}
    assert {name for claim in claims.CLAIMED for name in (claim.row, claim.base)} == {
        name for name, row in ROWS.items() if row.group == CLAIMS or BASE in (name, row.base)
    }


def test_a_group_selects_its_rows() -> None:
    assert select(["claim_base", "claims", "alexnet"])[:2] == ["claim_base", "claim_no_lrn"]
    assert select(["claims", "alexnet"])[-1] == "alexnet"
    assert select([]) == [name for name, row in ROWS.items() if not row.group]
    for name in ("vgg", "claim"):
        with pytest.raises(ConfigError, match=f"rows={name}: there is no such row"):
            select([name])


# The whole path


def test_quick_runs_skip_resume_and_say_that_they_are_quick(command: Any) -> None:
    status, out, _ = command("budget=quick", "rows=resnet18,alexnet_paper_init")
    assert status == 0
    assert len(re.findall(r"^(?:resnet18|alexnet_paper_init) .* nothing to compare with$", out, re.M)) == 2
    assert [str(path) for path in Path().iterdir()] == ["outputs"]
    results = Path("outputs/reproduction/quick")
    assert [path.name for path in results.parent.iterdir()] == ["quick"]
    assert "Nothing is compared." in (results / "comparison.md").read_text()
    text = (results / "reproduction.md").read_text()
    assert "quick budget" in text.splitlines()[0]
    assert "No figure here says anything about CIFAR-10" in text
    content = json.loads((results / "reproduction.json").read_text())
    assert content["budget"] == "quick"
    assert {n for n, row in content["rows"].items() if row["status"] == "complete"} == {
        "resnet18",
        "alexnet_paper_init",
    }
    for name in ("resnet18", "alexnet_paper_init"):
        summary = json.loads((results / name / "summary.json").read_text())
        record = content["rows"][name]["runs"][0]
        assert record["ten_crop_top1_error"] == summary["ten_crop"]["top1_error"]
        assert record["images_seen"] == summary["steps"] * 128
        assert f"{summary['single_crop']['top1_error']:.4f} / " in text
        with Image.open(results / ROWS[name].figure) as image:
            assert image.width > 400
    for name in set(select([])) - {"resnet18", "alexnet_paper_init"}:
        (line,) = (line for line in text.splitlines() if f"(`{name}`)" in line)
        assert "not run" in line

    # One is complete and left alone; the other was stopped before its end and is run again.
    kept = (results / "resnet18" / "summary.json").stat().st_mtime_ns
    (results / "alexnet_paper_init" / "summary.json").unlink()
    status, out, _ = command("budget=quick", "rows=resnet18,alexnet_paper_init")
    assert status == 0
    assert "resnet18, seed 0: complete" in out
    assert "alexnet_paper_init, seed 0: interrupted" in out
    assert (results / "resnet18" / "summary.json").stat().st_mtime_ns == kept
    again = json.loads((results / "reproduction.json").read_text())["rows"]["alexnet_paper_init"]["runs"][0]
    before = content["rows"]["alexnet_paper_init"]["runs"][0]
    assert again["ten_crop_top1_error"] == before["ten_crop_top1_error"]


def test_a_row_is_also_a_training_command(command: Any) -> None:
    overrides = ("data=digits", "data.resize=36", "data.crop=32", "train.epochs=1", "hydra.run.dir=run")
    status, _, err = command("--config-name=row/mobilenet_v3_small", *overrides, main=train.main)
    assert status == 0, err
    assert json.loads(Path("run/summary.json").read_text())["parameters"] == 1_528_106


@pytest.mark.parametrize("dry_run", ["--dry-run", "dry_run=true"])
def test_dry_run_estimates_and_writes_nothing(command: Any, tmp_path: Path, dry_run: str) -> None:
    status, out, _ = command("budget=quick", "rows=alexnet_paper_init,resnet18", dry_run)
    assert status == 0
    lines = out.splitlines()
    times = [line.split()[5] for line in lines if line.startswith(("alexnet_paper_init", "resnet18"))]
    assert len(times) == 2
    assert all(re.fullmatch(r"\d+:[0-5]\d", time) and time != "0:00" for time in times)
    assert re.search(r"^together +\d+:[0-5]\d$", out, re.M)
    assert "- measured: the median of 4 steps of each network" in out
    assert "still to be downloaded" not in out
    assert not list(tmp_path.iterdir())


def test_estimate_counts_images_views_and_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    schema.register()
    with initialize_config_module("fastalex.configs", version_base="1.3"):
        overrides = ["data=digits", "data.flip=both", "train.epochs=5"]
        overrides.append("train.stages=[{epochs: 2, resize: 64, crop: 63}]")
        config = to_dataclass(hydra.compose("config", overrides), Config)
    monkeypatch.setattr(Estimator, "_rate", lambda self, config, crop: {63: 100.0, 64: 10.0}[crop])
    training = 2 * 1149 * (2 / 100 + 3 / 10)
    evaluation = (5 * 288 + 2 * 11 * 360) / 3 / 10
    assert Estimator().seconds(config) == pytest.approx(training + evaluation)


def test_estimate_measures_each_optimizer() -> None:
    """A step of Muon takes longer than one of SGD."""
    data = DataConfig("synthetic", resize=32, crop=32)
    estimator = Estimator()
    for optimizer in (Optimizer.sgd, Optimizer.muon, Optimizer.sgd):
        recipe = TrainConfig(batch_size=4, optimizer=optimizer)
        rate = estimator._rate(Config(ModelConfig("tiny"), data, LoaderConfig("auto"), recipe), 32)
        assert rate > 0
    assert len(estimator._rates) == 2


def test_estimate_without_the_images_counts_cifar10s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Config(AlexNetConfig("alexnet"), DataConfig("cifar10", root="nowhere"), LoaderConfig("auto"))
    monkeypatch.setattr(Estimator, "_rate", lambda self, config, crop: 10.0)
    training = config.train.epochs * 40_000 / 10
    evaluation = (config.train.epochs * 10_000 + 2 * 11 * 10_000) / 3 / 10
    estimator = Estimator()
    assert estimator.seconds(config) == pytest.approx(training + evaluation)
    config.data.train_fraction = 0.1
    assert estimator.seconds(config) == pytest.approx(training / 10 + evaluation)
    assert "still to be downloaded" in estimator.assumptions()


def test_a_dry_run_estimates_what_the_user_has_not_run(
    command: Any, rows: dict[str, Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever lies in ``results/``: this is done beside the committed runs, all of which are complete."""
    monkeypatch.setattr(Estimator, "_rate", lambda self, config, crop: 100.0)
    complete(Path("outputs/reproduction"), rows, "alexnet_112", 0.1)
    complete(Path("outputs/reproduction"), rows, "resnet18", 0.1)
    Path("outputs/reproduction/resnet18/summary.json").unlink()  # as of a run that was stopped before its end
    status, out, err = command("--dry-run")
    assert status == 0, err
    lines = {line.partition(",")[0]: line.split() for line in out.splitlines() if ", seed 0" in line}
    assert set(lines) == {name for name, row in ROWS.items() if not row.group}
    assert lines.pop("alexnet_112")[-1] == "complete"
    assert lines.pop("resnet18")[-1] == "interrupted"
    for line in lines.values():
        assert line[-2:] == ["not", "run"]
    # Training images, and a third of those of three validations and of two tests of eleven views, at 100/s.
    seconds = 3 * 40_000 / 100 + (3 * 10_000 + 2 * 11 * 10_000) / 3 / 100
    assert lines["alexnet_paper_init"][5] == f"0:{math.ceil(seconds / 60)}"


def test_the_committed_runs_are_the_rows() -> None:
    """The ones that a user's are compared with have the settings that a user's have."""
    results = committed.find(None)
    assert results is not None
    schema.register()
    with initialize_config_module("fastalex.configs", version_base="1.3"):
        jobs = reproducing.plan(ReproduceConfig(), results)
        claims_jobs = reproducing.plan(ReproduceConfig(rows=[CLAIMS]), results)
    assert {job.status for job in jobs} == {"complete"}
    assert {job.status for job in claims_jobs} <= {"complete", "not run"}
    assert json.loads((results / "reproduction.json").read_text()) == report.collect(results, False)


def test_a_row_named_twice_is_run_once() -> None:
    schema.register()
    asked = ReproduceConfig(rows=["resnet18", "alexnet", "resnet18"])
    with initialize_config_module("fastalex.configs", version_base="1.3"):
        jobs = reproducing.plan(asked, Path("nowhere"))
    assert [job.row for job in jobs] == ["resnet18", "alexnet"]


def test_bad_input_is_one_line(command: Any, tmp_path: Path) -> None:
    status, _, err = command("rows=alexnet,vgg")
    assert status == 2
    (line,) = err.splitlines()
    assert "rows=vgg: there is no such row; choose from alexnet," in line
    status, _, err = command("budget=huge")
    assert status == 2
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_run_of_other_settings_is_neither_skipped_nor_lost(command: Any) -> None:
    folder = Path("outputs/reproduction/quick/alexnet_paper_init")
    made_up_run(folder.parent, "alexnet_paper_init", 0, 0.1)
    before = sorted(folder.iterdir())
    status, _, err = command("budget=quick", "rows=alexnet_paper_init")
    assert status == 2
    (line,) = err.splitlines()
    assert "data.crop=96, and the row alexnet_paper_init has 32" in line
    assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("cutmix", None),
        ("clip_norm", "train.clip_norm=0.0, and the row alexnet_112 has 5.0"),
        ("invented", "holds a run of another version of fastalex (Key 'invented' not in 'TrainConfig')"),
    ],
)
def test_a_run_from_before_a_key_had_its_default(
    command: Any, rows: dict[str, Config], key: str, message: str | None
) -> None:
    folder = Path("outputs/reproduction")
    made_up_run(folder, "alexnet_112", 0, 0.1)
    written = plain(rows["alexnet_112"])
    if key in written["train"]:
        del written["train"][key]
    else:
        written["train"][key] = 1
    OmegaConf.save(written, folder / "alexnet_112" / "config.yaml")
    status, out, err = command("rows=alexnet_112", "dry_run=true")
    if message is None:
        assert status == 0
        assert re.search(r"alexnet_112.* complete", out)
    else:
        assert status == 2
        assert message in err


def test_an_interrupted_row_finds_its_images_where_they_are_now(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(reproducing, "QUICK", ("data=imagefolder", *TINY[1:]))
    for split, count in (("train", 100), ("test", 10)):
        for number, name in enumerate(("a", "b")):
            folder = tmp_path / "before" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (36, 36), (99 * number, i, 0)).save(folder / f"{i}.png")
    row = ("budget=quick", "rows=mobilenet_v3_small")
    assert command(*row, "data.root=before")[0] == 0
    run = Path("outputs/reproduction/quick/mobilenet_v3_small")
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()  # as of a run that was stopped before its end
    Path("before").rename("after")

    status, _, err = command(*row, "data.root=after", "runtime.device=cpu")
    assert status == 2
    assert f"runtime.device=cpu: the run in {run} has runtime.device=auto" in err
    status, _, err = command(*row, "data.root=after")
    assert status == 0, err
    after = json.loads((run / "summary.json").read_text())
    assert after["ten_crop"] == before["ten_crop"]


def test_a_run_without_its_best_weights_is_refused(tmp_path: Path) -> None:
    made_up_run(tmp_path, "alexnet", 0, 0.1)
    path = tmp_path / "alexnet" / "summary.json"
    summary = json.loads(path.read_text())
    del summary["best_on_validation"]
    path.write_text(json.dumps(summary))
    with pytest.raises(OutputError, match=r"alexnet: summary.json has no best_on_validation"):
        report.write(tmp_path, False, None)


def test_a_diverged_row_does_not_stop_the_others(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def diverges(config: Config, folder: Path, overrides: dict[str, str]) -> None:
        ran.append(folder.name)
        if len(ran) == 1:
            raise DivergedError("the loss became nan at step 3 with learning rate 0.1; lower train.lr")

    monkeypatch.setattr(reproducing, "train", diverges)
    status, _, err = command("budget=quick", "rows=alexnet_paper_init,resnet18")
    assert status == 1
    assert ran == ["alexnet_paper_init", "resnet18"]
    assert "alexnet_paper_init, seed 0: the loss became nan at step 3" in err.splitlines()[-1]
    assert "not run" in Path("outputs/reproduction/quick/reproduction.md").read_text()
    with Path("outputs/reproduction/quick/comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["row"]: line["verdict"] for line in lines} == dict.fromkeys(ran, "not run")


# Beside the committed runs


def complete(
    folder: Path, rows: dict[str, Config], name: str, error: float, seed: int = 0, source: str = "CIFAR-10"
) -> None:
    """Make a finished run up that has the row's settings."""
    summary = made_up_run(folder, name, seed, error) | {"data": source}
    run = run_folder(folder, name, seed)
    write_text(run / "summary.json", json.dumps(summary))
    config = plain(rows[name]) | {"seed": seed}
    config["data"]["root"] = "/home/maintainer/cifar10"
    OmegaConf.save(config, run / "config.yaml")
    write_text(run / "losses.png", "a plot")
    write_text(run / "checkpoint.pt", "weights")


@pytest.fixture
def checkout(command: Any, rows: dict[str, Config]) -> Path:
    """A git checkout with committed runs, as the current folder."""
    Path(".git").mkdir()
    Path("README.md").write_text(f"# Title\n{BEGIN}\nold\n{END}\n")
    for name, error in (("alexnet", 0.12), ("resnet18", 0.09)):
        complete(Path("results"), rows, name, error, source="CIFAR-10 (JPEG copy)")
        Path("results", name, "checkpoint.pt").unlink()
    return Path.cwd()


def contents(*paths: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for path in paths for file in [path, *path.rglob("*")] if file.is_file()}


def test_a_users_runs_are_set_beside_ours_which_stay(
    command: Any, checkout: Path, rows: dict[str, Config]
) -> None:
    complete(Path("outputs/reproduction"), rows, "alexnet", 0.1225)
    before = contents(checkout / "results", checkout / "README.md")
    status, out, err = command("rows=alexnet", "results=results")
    assert status == 0, err
    assert contents(checkout / "results", checkout / "README.md") == before
    (line,) = re.findall(r"^alexnet  +(.*)", out, re.M)
    study, ours, yours, value, low, high, verdict = line.split()
    assert (study, ours, yours, value, verdict) == ("0.1397", "0.1200", "0.1225", "+0.0025", "reproduced")
    # Wald's interval: at 10,000 images it is Newcombe's to three digits.
    bound = 1.96 * math.sqrt((0.12 * 0.88 + 0.1225 * 0.8775) / 10_000)
    assert [float(limit.strip("[],")) for limit in (low, high)] == pytest.approx(
        [0.0025 - bound, 0.0025 + bound], abs=1e-4
    )
    text = Path("outputs/reproduction/comparison.md").read_text()
    assert (
        f"| AlexNet (`alexnet`) | 0.1397 / 0.0072 | 0.1200 / 0.0120 | 0.1225 / 0.0123 | 1 of 1 | {value} "
        in text
    )
    assert "Yours were tested on CIFAR-10, ours on CIFAR-10 (JPEG copy)." in text
    with Path("outputs/reproduction/comparison.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["row"], line["error"]) for line in lines] == [("alexnet", key) for key in comparison.KEYS]
    assert lines[0]["study"] == "0.1397"
    assert (lines[1]["ours_mean"], lines[1]["yours_mean"]) == ("0.012000", "0.012250")
    assert float(lines[0]["low"]) == pytest.approx(float(low.strip("[],")), abs=1e-4)


def test_publishing_replaces_a_row_and_the_table(
    command: Any, checkout: Path, rows: dict[str, Config]
) -> None:
    complete(Path("outputs/reproduction"), rows, "alexnet", 0.1225)
    kept = contents(checkout / "results" / "resnet18")
    status, out, err = command("rows=alexnet", "results=results", "publish=true")
    assert status == 0, err
    assert "published in results: alexnet, seed 0" in out
    mine, published = Path("outputs/reproduction/alexnet"), Path("results/alexnet")
    for name in ("losses.png", "metrics.jsonl", "summary.json"):
        assert (published / name).read_bytes() == (mine / name).read_bytes()
    config, trained = (OmegaConf.load(folder / "config.yaml") for folder in (published, mine))
    assert config.data.root == "data"
    trained.data.root = "data"
    assert config == trained
    assert len(list(published.iterdir())) == 4
    assert contents(checkout / "results" / "resnet18") == kept
    content = json.loads(Path("results/reproduction.json").read_text())
    assert content["rows"]["alexnet"]["runs"][0]["ten_crop_top1_error"] == 0.1225
    assert content["rows"]["resnet18"]["runs"][0]["ten_crop_top1_error"] == 0.09
    assert "| AlexNet | 0.1397 / 0.0072 | 0.1225 / 0.0123 |" in Path("README.md").read_text()


def test_nothing_is_published_without_a_runs_plot(
    command: Any, checkout: Path, rows: dict[str, Config]
) -> None:
    for name in ("alexnet", "resnet18"):
        complete(Path("outputs/reproduction"), rows, name, 0.1)
    Path("outputs/reproduction/resnet18/losses.png").unlink()
    before = contents(checkout / "results", checkout / "README.md")
    status, _, err = command("rows=alexnet,resnet18", "results=results", "publish=true")
    assert status == 2
    assert "resnet18/losses.png: is missing, so nothing is published" in err
    assert contents(checkout / "results", checkout / "README.md") == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish=true", "budget=quick"], "publish=true: runs of budget=quick are not the rows"),
        (["publish=true", "results=here"], "publish=true: here is in no git checkout"),
        (["publish=true"], "publish=true: there is no results/ beside "),
        (["results=nowhere"], "results=nowhere: is not a folder"),
        (["results=here", "folder=./here"], "folder=here: holds the committed runs"),
        (["folder=file"], "folder=file: is not a folder"),
        (["folder=file/deeper"], "folder=file/deeper: is not a folder"),
    ],
)
def test_folders_that_cannot_be_used_are_one_line(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr(committed, "CHECKOUT", tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    status, _, err = command("rows=alexnet", *arguments)
    assert status == 2
    (line,) = err.splitlines()
    assert message in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "here"]


# The arithmetic


def made_up_run(
    results: Path, name: str, seed: int, error: float, single: float | None = None
) -> dict[str, Any]:
    """Write the files of a run with this ten-crop error."""
    folder = run_folder(results, name, seed)
    folder.mkdir(parents=True)
    single = error + 0.01 if single is None else single
    crops = {"ten_crop": error, "single_crop": single}
    errors = {crop: {"top1_error": value, "top5_error": value / 10} for crop, value in crops.items()}
    best = {key: {k: v + 0.001 for k, v in value.items()} for key, value in errors.items()}
    summary = {
        **{crop: {**values, "images": 10_000} for crop, values in errors.items()},
        "best_on_validation": {"epoch": 2, "validation_top1_error": 0.12, **best},
        "data": "a data set",
        "epochs": 3,
        "steps": 936,
        "wall_seconds": 3723.4,
        "images_per_second": 61.7,
        "parameters": 58_322_314,
        "hardware": "a processor",
        "runtime": "a processor (cpu), bfloat16",
        "versions": {"torch": "2"},
    }
    validation = [0.3, 0.12, 0.13]
    lines = [
        json.dumps(
            {
                "epoch": i + 1,
                "train_loss": 1.0,
                "train_top1_error": 0.5,
                "validation_loss": 1.1,
                "validation_top1_error": value,
            }
        )
        for i, value in enumerate(validation)
    ]
    write_text(folder / "summary.json", json.dumps(summary))
    write_text(folder / "metrics.jsonl", "\n".join(lines))
    write_text(
        folder / "config.yaml",
        "model: {name: tiny}\nloader: {name: auto}\n"
        "data: {name: digits, resize: 36, crop: 96}\n"
        "train: {epochs: 3, batch_size: 128, stages: [{epochs: 1, resize: 24, crop: 64}]}\n"
        f"seed: {seed}\n",
    )
    return summary


def test_a_row_of_one_run(tmp_path: Path) -> None:
    made_up_run(tmp_path, "alexnet", 0, 0.125)
    content = report.write(tmp_path, False, None)
    text = (tmp_path / "reproduction.md").read_text()
    (line,) = (line for line in text.splitlines() if "(`alexnet`)" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "0.1397 / 0.0072",
        "0.1250 / 0.0125",
        "0.1350 / 0.0135",
        "2",
        "0.1260 / 0.0135",
        "0.1360 / 0.0145",
    ]
    (line,) = (line for line in text.splitlines() if line.startswith("| `alexnet` |"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    hardware = "a processor (cpu), bfloat16"
    assert cells[1:] == ["64, 96", "3", "119,808", "2", "1:02:03", "61.7", "58,322,314", "0", hardware]
    assert "Errors on a data set are shares of the test images, top-1 / top-5, of" in text
    assert "quick" not in text
    assert content["budget"] == "full"
    assert "claims.md" not in text


def test_rows_of_several_seeds_and_what_is_visible(tmp_path: Path) -> None:
    made = {
        BASE: (0.200, 0.204),
        "ablation_no_lrn": (0.203, 0.207),
        "ablation_non_overlapping_pool": (0.199, 0.205),
        "ablation_no_dropout": (0.240, 0.242),
    }
    for name, errors in made.items():
        for seed, error in enumerate(errors):
            made_up_run(tmp_path, name, seed, error, error + 0.010 + 0.002 * seed)
    content = report.collect(tmp_path, False)
    figures = content["rows"][BASE]["statistics"]["ten_crop_top1_error"]
    assert figures["mean"] == pytest.approx(0.202)
    assert figures["standard_deviation"] == pytest.approx(math.sqrt(2) * 0.002)
    found = {finding.claim.text: finding for finding in claims.examine(content["rows"])}
    # Four rows of two seeds: four degrees of freedom, for which Student's t at 95% is 2.776.
    pooled = math.sqrt(statistics.fmean((b - a) ** 2 / 2 for a, b in made.values()))
    for text, difference, verdict in (
        ("LRN lowers the error, in a short run", 0.003, "not visible"),
        ("Overlapping pooling lowers the error, in a short run", 0.0, "not visible"),
        ("Dropout lowers the error, in a short run", 0.039, "holds"),
    ):
        assert found[text].value == pytest.approx(difference)
        assert found[text].bound == pytest.approx(2.776 * pooled, rel=1e-3)
        assert found[text].verdict == verdict
    # Here the readings differ by 0.010 and 0.012 in each row: a deviation of sqrt(2) * 0.001.
    single = found["Ten crops lower the error, in a short run"]
    assert single.value == pytest.approx(0.011)
    assert single.bound == pytest.approx(2.776 * 0.001 * math.sqrt(2) / math.sqrt(2), rel=1e-3)
    text = report.markdown(content)
    assert "0.2020 ± 0.0028" in text
    assert "[claims.md](claims.md)" in text
    assert "| AlexNet at a smaller crop, without dropout (`ablation_no_dropout`) |" in text


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    made_up_run(tmp_path, BASE, 0, 0.2)
    made_up_run(tmp_path, "ablation_no_lrn", 0, 0.3)
    content = report.collect(tmp_path, False)
    assert "(1 seed only)" in report.markdown(content)


def test_the_readme_table_is_between_its_markers(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold\n{END}\n\nThe end.\n")
    made_up_run(tmp_path, "alexnet", 0, 0.125)
    report.write(tmp_path, False, readme)
    text = readme.read_text()
    assert text.startswith(f"# Title\n\n{BEGIN}\n| network |")
    caption = "*Top-1 / top-5 test error of the final weights on a data set.*"
    assert text.endswith(f"|\n\n{caption}\n{END}\n\nThe end.\n")
    assert "| AlexNet | 0.1397 / 0.0072 | 0.1250 / 0.0125 | 0.1350 / 0.0135 | 64, 96 | 3 |" in text
    assert "| ResNet-18 | 0.0970 / 0.0044 | not run | not run |  |  |" in text
    assert "old" not in text
    report.write(tmp_path, False, readme)
    assert readme.read_text() == text
    readme.write_text("no markers")
    report.write(tmp_path, False, readme)
    assert readme.read_text() == "no markers"


def test_epochs_to_an_error(tmp_path: Path) -> None:
    made_up_run(tmp_path, "alexnet", 0, 0.1)
    run = load_run(tmp_path, "alexnet", 0)
    assert run is not None
    assert run.epochs_to(0.3) == 1
    assert run.epochs_to(0.12) == 2
    assert run.epochs_to(0.1199) is None


def test_an_interval_without_seeds_is_newcombes() -> None:
    """His example (1998, table II, method 10): 56/70 less 48/80 is 0.2 with limits 0.0524 and 0.3339."""
    found = interval(Sample([56 / 70], 70), Sample([48 / 80], 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_an_interval_with_seeds_is_wider_by_their_spread() -> None:
    theirs, ours = Sample([0.250, 0.256], 10_000), Sample([0.270, 0.274], 10_000)
    found = interval(theirs, ours)
    alone = interval(Sample([0.253], 10_000), Sample([0.272], 10_000))
    # Student's t at 95% and two degrees of freedom is 4.303.
    variance = (0.006**2 / 2 + 0.004**2 / 2) / 2
    seeds = 4.303 * math.sqrt(variance * (1 / 2 + 1 / 2))
    assert found.value == pytest.approx(-0.019)
    assert found.value - found.low == pytest.approx(math.hypot(alone.value - alone.low, seeds), rel=1e-3)
    assert found.high - found.value == pytest.approx(math.hypot(alone.high - alone.value, seeds), rel=1e-3)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [(0.13, "error higher than ours"), (0.1225, "reproduced"), (0.11, "error lower than ours")],
)
def test_the_verdict_is_where_the_interval_lies(tmp_path: Path, error: float, verdict: str) -> None:
    made_up_run(tmp_path / "ours", "alexnet", 0, 0.12)
    made_up_run(tmp_path / "theirs", "alexnet", 0, error)
    theirs, ours = (report.collect(tmp_path / name, False) for name in ("theirs", "ours"))
    (found,) = comparison.compare(theirs, ours, set())
    assert found.verdict == verdict
    (alone,) = comparison.compare(theirs, None, set())
    assert alone.verdict == "nothing to compare with"
