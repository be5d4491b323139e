"""Predictions of a trained network: those of its evaluation, in a file that is whole or absent."""

from __future__ import annotations

import csv
import importlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from fastalex import predict
from fastalex.commands import evaluate as evaluating
from fastalex.commands import predict as predicting
from fastalex.config import (
    Config,
    DataConfig,
    EvaluateConfig,
    LoaderConfig,
    ModelConfig,
    OnError,
    Precision,
    RuntimeConfig,
    TrainConfig,
)
from fastalex.config.plain import plain
from fastalex.data import windows
from fastalex.data.paths import ImagePaths
from fastalex.errors import DataError
from fastalex.models import MODELS
from fastalex.runs.checkpoint import save_weights
from fastalex.runs.prediction import predict_images
from fastalex.runs.weights import open_weights
from tests import tiny
from tests.commands import outcome
from tests.tolerances import SAFETY, usual_sum_error

CLASSES = ["ant", "bee", "cat"]
MEAN, STD = [0.4, 0.5, 0.6], [0.3, 0.2, 0.1]
RESIZE, CROP, BATCH = 20, 16, 40

Command = Callable[..., tuple[int, str, str]]

# For what does not depend on how images are read.
one_kind_of_images = pytest.mark.parametrize("trained", ["resident"], indirect=True)


@pytest.fixture(scope="module", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tiny network, and a cache of this module's own."""
    tiny.register()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    del MODELS["tiny"]


@pytest.fixture(scope="module", params=["resident", "torchvision"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with weights, and ``images`` of one small size, or of several, beside it."""
    root = tmp_path_factory.mktemp(request.param)
    rng = np.random.default_rng(0)
    for split, images in (("train", 5), ("test", 8)):
        for name in CLASSES:
            folder = root / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(images):
                size = (24, 30) if request.param == "resident" else (24 + i, 30)
                color, noise = rng.integers(0, 192, 3), rng.integers(0, 64, (*size, 3))
                Image.fromarray((color + noise).astype(np.uint8)).save(folder / f"{i}.png")
    config = Config(
        model=ModelConfig("tiny"),
        data=DataConfig("imagefolder", str(root / "images"), resize=RESIZE, crop=CROP, mean=MEAN, std=STD),
        loader=LoaderConfig(request.param, workers=1),
        train=TrainConfig(batch_size=BATCH),
        runtime=RuntimeConfig(device="cpu", precision=Precision.fp32),
    )
    torch.manual_seed(0)
    weights = tiny.Tiny(len(CLASSES)).state_dict()
    weights["6.weight"] *= 20  # so that images differ in their most probable class
    (root / "run").mkdir()
    save_weights(weights, root / "run" / "model.safetensors", plain(config), CLASSES)
    return root / "run"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run predict in an empty folder; return its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> tuple[int, str, str]:
        return outcome(predict.main, overrides, monkeypatch, capsys)

    return run


def test_images(run: Path) -> Path:
    return run.parent / "images" / "test"


test_images.__test__ = False  # type: ignore[attr-defined]


# A probability errs by no more than its logit: about ten, a sum of some hundred terms in fp32.
PROBABILITY_ERROR = 10 * SAFETY * usual_sum_error(torch.float32, 300)


def probabilities(run: Path, views: int) -> tuple[list[Path], Tensor]:
    batches = list(predict_images(open_weights(run), ImagePaths(test_images(run)), views=views))
    return [path for paths, _ in batches for path in paths], torch.cat([found for _, found in batches])


def test_probabilities_are_those_of_the_evaluation(trained: Path) -> None:
    expected = evaluating.run(EvaluateConfig(weights=str(trained)))
    paths, found = probabilities(trained, views=10)
    assert paths == sorted(test_images(trained).rglob("*.png"))
    assert torch.equal(found, expected.probabilities)
    assert len(found.argmax(dim=1).unique()) > 1


def test_preprocessing_is_that_of_the_run(trained: Path) -> None:
    """Against torchvision's resize and a network in float64."""
    network = open_weights(trained).model().double().eval()
    paths, found = probabilities(trained, views=1)
    as_float = open_weights(trained).config.loader.name == "resident"
    for path, ours in zip(paths, found, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        pixels = F.resize(pixels.double() if as_float else pixels, [RESIZE, RESIZE], antialias=True).double()
        image = F.normalize(F.center_crop(pixels / 255, [CROP, CROP]), MEAN, STD)
        theirs = network(image[None])[0].softmax(dim=0)
        torch.testing.assert_close(ours.double(), theirs.detach(), atol=PROBABILITY_ERROR, rtol=0)


def test_windows_of_a_few_images_give_the_same(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, expected = probabilities(trained, views=10)
    monkeypatch.setattr(windows, "WINDOW", 12)
    monkeypatch.setattr(windows, "DECODED", 8 * 24 * 30 * 3)
    again, found = probabilities(trained, views=10)
    assert again == paths
    assert torch.equal(found, expected)


def test_no_more_paths_are_read_than_a_window_has(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(windows, "WINDOW", 4)
    taken = 0

    def endless() -> Iterator[Path]:
        nonlocal taken
        while True:
            taken += 1
            yield test_images(trained) / "ant" / "0.png"

    batches = predict_images(open_weights(trained), endless(), views=10)
    for number in range(1, 4):
        next(batches)
        assert taken <= 4 * number


@one_kind_of_images
@pytest.mark.parametrize("name", ["predictions.csv", "out.jsonl", "out.parquet"])
def test_a_file_has_a_row_of_each_image(name: str, trained: Path, command: Command) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow", reason="Parquet needs pyarrow, which is optional")
    status, out, err = command(f"weights={trained}", f"images={test_images(trained)}", f"output={name}")
    assert (status, err.count("error")) == (0, 0)
    assert re.search(rf"^24 images in \S+ s; {name}$", out, re.MULTILINE)
    if name.endswith(".csv"):
        with Path(name).open(newline="") as file:
            rows = list(csv.DictReader(file))
    elif name.endswith(".jsonl"):
        rows = [json.loads(line) for line in Path(name).read_text().splitlines()]
    else:
        rows = importlib.import_module("pyarrow.parquet").read_table(name).to_pylist()
    columns = [f"{kind}_{rank}" for rank in (1, 2, 3) for kind in ("class", "probability")]
    assert list(rows[0]) == ["path", *columns]  # there are three classes
    paths, expected = probabilities(trained, views=1)
    assert [row["path"] for row in rows] == list(map(str, paths))
    for row, theirs in zip(rows, expected.numpy(), strict=True):
        order = np.argsort(-theirs)
        assert [row[f"class_{rank}"] for rank in (1, 2, 3)] == [CLASSES[i] for i in order]
        assert [np.float32(row[f"probability_{rank}"]) for rank in (1, 2, 3)] == theirs[order].tolist()


def test_a_few_images_are_a_table_and_many_a_file(trained: Path, command: Command) -> None:
    image = test_images(trained) / "bee" / "3.png"
    status, out, _ = command(f"weights={trained / 'model.safetensors'}", f"images={image}")
    assert status == 0
    assert re.search(r"bee/3.png +(ant|bee|cat) \S+% +(ant|bee|cat) \S+% +(ant|bee|cat) \S+%$", out, re.M)
    assert not list(Path.cwd().iterdir())
    assert command(f"weights={trained}", f"images={test_images(trained)}")[0] == 0
    assert [path.name for path in Path.cwd().iterdir()] == ["predictions.csv"]


def test_a_folder_means_its_images_whatever_their_names(tmp_path: Path) -> None:
    for name in ("b/x.jpg", "b/noext", "a.png", "b/.hidden.png", "z.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name, "PNG")
    (tmp_path / "notes.txt").write_text("a.png")
    (tmp_path / "b" / "damaged.jpeg").touch()
    paths = ImagePaths(tmp_path)
    names = ["a.png", "z.PNG", "b/damaged.jpeg", "b/noext", "b/x.jpg"]
    assert [str(path.relative_to(tmp_path)) for path in paths] == names
    assert len(paths) == 5
    assert list(ImagePaths(tmp_path / "b" / "noext")) == [tmp_path / "b" / "noext"]
    assert list(ImagePaths(tmp_path / "notes.txt", missing_ok=True)) == [Path("a.png")]


@one_kind_of_images
def test_a_list_keeps_its_order_and_its_names(trained: Path, command: Command) -> None:
    command("weights=none", "images=none")  # which changes the folder
    os.symlink(test_images(trained), "here")  # noqa: PTH211
    names = ["here/cat/1.png", "here/ant/0.png", str(test_images(trained) / "bee" / "2.png")]
    Path("list").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(names).encode())
    assert command(f"weights={trained}", "images=list", "output=out.csv")[0] == 0
    with Path("out.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names


@one_kind_of_images
def test_a_pipe_is_a_list(trained: Path, command: Command) -> None:
    command("weights=none", "images=none")  # which changes the folder
    names = [str(test_images(trained) / name) for name in ("cat/1.png", "ant/0.png")]
    assert piped(command, "\n".join(names).encode(), f"weights={trained}", "output=out.csv")[0] == 0
    with Path("out.csv").open(newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == names
    _, _, err = piped(command, (test_images(trained) / "cat/1.png").read_bytes(), f"weights={trained}")
    assert re.fullmatch(
        r"fastalex: error: images=\S+: is neither an image nor a text file of paths", err.splitlines()[-1]
    )


def piped(command: Command, data: bytes, *overrides: str) -> tuple[int, str, str]:
    """Run predict on a pipe that holds some bytes, which the system's buffer takes."""
    out, into = os.pipe()
    os.write(into, data)
    os.close(into)
    try:
        return command(*overrides, f"images=/dev/fd/{out}")
    finally:
        os.close(out)


@one_kind_of_images
def test_a_line_that_names_no_file_is_named(trained: Path, command: Command, tmp_path: Path) -> None:
    there = test_images(trained) / "cat" / "1.png"
    for line, problem in {
        "A1.jpg": "A1.jpg does not exist; paths are relative to the current folder",
        f"{tmp_path}/A1.jpg": f"{tmp_path}/A1.jpg does not exist",
        f"{there}/A1.jpg": f"{there}/A1.jpg cannot be read: Not a directory",
        "a" * 300: f"{'a' * 300} cannot be read: File name too long",
    }.items():
        (tmp_path / "list.txt").write_text(f"{there}\n\n{line}\n{there}\n")
        status, _, err = command(f"weights={trained}", "images=list.txt")
        assert (status, err) == (2, f"fastalex: error: images=list.txt, line 3: {problem}\n")


@pytest.fixture
def damaged(trained: Path, tmp_path: Path) -> Path:
    """A list of the run's images, with one that is cut short and one that is missing in the middle."""
    whole = sorted(test_images(trained).rglob("*.png"))
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole[0].read_bytes()[:200])
    names = [*whole[:13], cut, tmp_path / "gone.png", *whole[13:]]
    (tmp_path / "list.txt").write_text("\n".join(map(str, names)))
    return tmp_path / "list.txt"


def test_a_damaged_image_is_named_and_the_old_file_stays(
    trained: Path, command: Command, damaged: Path
) -> None:
    damaged.write_text(damaged.read_text().replace("gone.png", "cut.png"))
    old = "path,class_1,probability_1\nold.png,a,1\n"
    Path("predictions.csv").write_text(old)
    before = sorted(Path.cwd().iterdir())
    status, _, err = command(f"weights={trained}", f"images={damaged}", "output=predictions.csv")
    assert status == 2
    line = err.splitlines()[-1]
    assert re.match(
        r"fastalex: error: \S+cut.png is not a whole image \(.*leave it out with on_error=skip", line
    )
    assert Path("predictions.csv").read_text() == old
    assert sorted(Path.cwd().iterdir()) == before


@pytest.mark.parametrize(
    ("name", "content", "output", "message"),
    [
        ("predictions.csv", "path,class_1,probability_1\n", [], "exists; name another file with output="),
        ("predictions.csv", "{list}", ["output=predictions.csv"], "exists and holds no predictions"),
        ("metrics.jsonl", '{{"epoch": 1}}\n', ["output=metrics.jsonl"], "exists and holds no predictions"),
        ("a.parquet", "text", ["output=a.parquet"], "exists and holds no predictions"),
    ],
)
def test_no_file_is_replaced_but_one_of_predictions_that_was_named(
    name: str, content: str, output: list[str], message: str, trained: Path, command: Command, damaged: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    text = content.format(list=damaged.read_text())
    Path(name).write_text(text)
    images = name if "{list}" in content else damaged  # the list of images itself
    status, _, err = command(f"weights={trained}", f"images={images}", "on_error=skip", *output)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
    assert Path(name).read_text() == text


@pytest.mark.parametrize("name", ["found.csv", "found.jsonl", "found.parquet"])
def test_predictions_that_were_named_are_replaced(
    name: str, trained: Path, command: Command, damaged: Path
) -> None:
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    arguments = [f"weights={trained}", f"images={damaged}", "on_error=skip", f"output={name}"]
    found = []
    for _ in range(2):
        status, _, err = command(*arguments)
        assert status == 0, err
        found.append(Path(name).stat().st_ino)
    assert found[0] != found[1]


def test_damaged_images_are_left_out_and_counted(trained: Path, command: Command, damaged: Path) -> None:
    status, out, err = command(f"weights={trained}", f"images={damaged}", "on_error=skip", "views=10")
    assert status == 0, err
    assert "24 images" in out
    assert re.search(r" s, 2 left out; predictions.csv$", out, re.MULTILINE)
    assert "cut.png is left out" in err
    assert re.search(r"gone.png is left out: cannot be read: No such file", err)
    with Path("predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    paths, expected = probabilities(trained, views=10)
    assert [row["path"] for row in rows] == list(map(str, paths))
    # Batches have other images in them, so sums may be rounded in another order.
    best = [float(row["probability_1"]) for row in rows]
    torch.testing.assert_close(torch.tensor(best), expected.max(dim=1).values, atol=PROBABILITY_ERROR, rtol=0)


@one_kind_of_images
def test_nothing_but_damaged_images_is_an_error(trained: Path, command: Command, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_text("no image")
    (tmp_path / "images" / "b.png").touch()
    status, _, err = command(f"weights={trained}", "images=images", "on_error=skip", "output=out.csv")
    assert status == 2
    assert "images=images: no image is left: 2 damaged or missing" in err.splitlines()[-1]
    assert not Path("out.csv").exists()


@one_kind_of_images
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_leaves_no_half_file(
    number: signal.Signals, trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **kwargs: object) -> Iterator[tuple[list[Path], Tensor]]:
        yield [Path("a.png")], torch.tensor([[0.5, 0.25, 0.25]])
        os.kill(os.getpid(), number)
        yield [Path("b.png")], torch.tensor([[0.5, 0.25, 0.25]])

    monkeypatch.setattr(predicting, "predict_images", stopped)
    status, _, err = command(f"weights={trained}", f"images={test_images(trained)}")
    assert status == 128 + number
    assert err.splitlines()[-1] == f"fastalex: error: stopped by {number.name}"
    assert not list(Path.cwd().iterdir())


@one_kind_of_images
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["weights=RUN"], r"images: has no value; give it as images="),
        (["images=IMAGES"], r"weights: has no value; give it as weights="),
        (["weights=none", "images=IMAGES"], r"weights=none: there is no such file"),
        (["weights=RUN", "images=none"], r"images=none: there is no such image, folder or text file"),
        (["weights=RUN", "images=."], r"images=.: the folder holds no image"),
        (["weights=RUN", "images=WEIGHTS"], r"images=\S+: is neither an image nor a text file of paths"),
        (["weights=RUN", "images=IMAGES", "views=5"], r"views=5: choose 1, the centre crop, or 10"),
        (["weights=RUN", "images=IMAGES", "batch_size=0"], r"batch_size=0: must be at least 1"),
        (["weights=RUN", "images=IMAGES", "loader.workers=-2"], r"loader.workers=-2: must be at least -1"),
        (["weights=RUN", "images=IMAGES", "output=a.xlsx"], r"output=a.xlsx: ends with none of .csv, .jsonl"),
        (["weights=RUN", "images=IMAGES", "output=no/a.csv"], r"no/a.csv: cannot be written \(No such file"),
        (["weights=RUN", "images=IMAGES", "data.crop=8"], r"data: key 'data' not in"),
        (["weights=RUN", "images=IMAGES", "runtime.precision=fp16"], r"runtime.precision=fp16: is for GPUs"),
    ],
)
def test_bad_input_is_one_line(overrides: list[str], message: str, trained: Path, command: Command) -> None:
    names = {"WEIGHTS": trained / "model.safetensors", "RUN": trained, "IMAGES": test_images(trained)}
    for name, path in names.items():
        overrides = [override.replace(name, str(path)) for override in overrides]
    status, _, err = command(*overrides)
    assert status == 2
    assert err.startswith("fastalex: error: ")
    assert len(err.splitlines()) == 1
    assert re.search(message, err), err
    assert not list(Path.cwd().iterdir())


@one_kind_of_images
def test_parquet_without_its_package_is_one_line(
    trained: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    status, _, err = command(f"weights={trained}", f"images={test_images(trained)}", "output=a.parquet")
    assert status == 2
    assert err.startswith("fastalex: error: output=a.parquet: Parquet needs pyarrow: pip install pyarrow")
    assert not list(Path.cwd().iterdir())


def test_a_missing_image_is_an_error_unless_it_is_skipped(trained: Path) -> None:
    gone = [trained / "gone.png"]
    with pytest.raises(DataError, match=r"gone.png cannot be read: No such file"):
        list(predict_images(open_weights(trained), gone))
    skipped: list[Path] = []
    batches = predict_images(
        open_weights(trained), gone, on_error=OnError.skip, on_skip=lambda path, _: skipped.append(path)
    )
    assert [paths for paths, _ in batches] == [[]]
    assert skipped == gone
