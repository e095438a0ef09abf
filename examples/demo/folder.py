"""The folder that the demo writes to."""

import shutil
from pathlib import Path

RECIPES = Path(__file__).with_name("recipes")
MARK = "made-by-the-smelt-demo"


def open_folder(folder: Path, fresh: bool) -> None:
    """Makes the output folder ready: recipes are copied and old merges removed, trained models stay.

    Raises FileExistsError for a folder with anything in it that the demo did not make.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARK).exists():
        raise FileExistsError(f"{folder} has other contents: name another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    for old in ("merges", "recipes", *(["models"] if fresh else [])):
        shutil.rmtree(folder / old, ignore_errors=True)
    for new in ("merges", "models"):
        (folder / new).mkdir(exist_ok=True)
    shutil.copytree(RECIPES, folder / "recipes")
