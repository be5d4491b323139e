"""Fine-tuning beside training anew, on the two halves of CIFAR-10's classes; writes results/fine_tune.json.

python examples/fine_tune.py DATA [RUNS]

DATA is a folder with {train,test}/CLASS/*, RUNS one for the images' links and the runs, fine_tune by default.
AlexNet is trained on five classes. Then it is trained on a few images of the other five: anew, from those
weights, and from those weights with its convolutions frozen, for as many epochs each. Every training is a
command line, which is printed.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

CLASSES = {
    "first": ["airplane", "automobile", "bird", "cat", "deer"],
    "second": ["dog", "frog", "horse", "ship", "truck"],
}
IMAGES = {"first": {"train": 1200, "test": 200}, "second": {"train": 300, "test": 200}}  # of each class
CROP = ["data.resize=73", "data.crop=64"]
EPOCHS = 6
SEEDS = [0, 1]


def link_images(data: Path, half: Path) -> None:
    """Make a folder with links to the first images of each class, by name."""
    for split, count in IMAGES[half.name].items():
        for name in CLASSES[half.name]:
            folder = half / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for image in sorted((data / split / name).iterdir())[:count]:
                link = folder / image.name
                if not link.exists():
                    link.symlink_to(image.resolve())


def train(half: Path, run: Path, *settings: str) -> dict:
    """Train on one half, unless the run is there; return its summary."""
    command = ["data=imagefolder", f"data.root={half}", *CROP, f"train.epochs={EPOCHS}", *settings]
    if not (run / "summary.json").exists():
        print("python -m fastalex.train", *command, flush=True)
        subprocess.run([sys.executable, "-m", "fastalex.train", *command, f"hydra.run.dir={run}"], check=True)
    return json.loads((run / "summary.json").read_text())


data, folder = Path(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else "fine_tune")
for name in CLASSES:
    link_images(data, folder / name)
first = folder / "run_first"
before = train(folder / "first", first)
ways = {
    "anew": [],
    "fine-tuned": [f"init_from={first}"],
    "fine-tuned, convolutions frozen": [f"init_from={first}", "train.freeze=[conv]"],
}
runs_of: dict[str, list[dict]] = {way: [] for way in ways}
for seed in SEEDS:
    for number, (way, settings) in enumerate(ways.items()):
        run = folder / f"run_{number}_{seed}"
        runs_of[way].append(train(folder / "second", run, f"seed={seed}", *settings))
errors = {}
for way, runs in runs_of.items():
    errors[way] = {}
    for views in ("single_crop", "ten_crop"):
        top1 = [round(run[views]["top1_error"], 4) for run in runs]
        errors[way][views] = {"top1_error": top1, "mean": round(mean(top1), 4)}
result = {
    "data": "CIFAR-10 (JPEG copy)",
    "images_of_each_class": IMAGES,
    "classes": CLASSES,
    "epochs": EPOCHS,
    "seeds": SEEDS,
    "test_images": 5 * IMAGES["second"]["test"],
    "first_half_single_crop_top1_error": round(before["single_crop"]["top1_error"], 4),
    "errors": errors,
    "hardware": before["hardware"],
    "runtimes": sorted({run["runtime"] for runs in (*runs_of.values(), [before]) for run in runs}),
    "versions": before["versions"],
}
path = Path(__file__).parents[1] / "results" / "fine_tune.json"
path.write_text(json.dumps(result, indent=2) + "\n")
print(json.dumps(errors, indent=2))
