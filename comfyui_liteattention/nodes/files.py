"""Where profiles lie: below ComfyUI's output folder, where they are saved, or its input folder.

Graphs come from anywhere, so a name never leads out of these folders.
"""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths

from ..profile import Profile
from ..profile_file import COMMIT, EXTENSION, load, parse_hub

DEFAULT_NAME = "liteattention/profile"


def output_path(name: str) -> Path:
    """The file of this name below the output folder; ValueError says what is wrong with it."""
    return _inside(folder_paths.get_output_directory(), name)


def source_path(name: str) -> Path | None:
    """The file of this name, in the output or in the input folder; None: it is on the hub."""
    if parse_hub(name) is not None:
        return None
    folders = (folder_paths.get_output_directory(), folder_paths.get_input_directory())
    paths = [_inside(folder, name) for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def check_name(name: str | None, may_be_hub: bool) -> bool | str:
    """True, or what is wrong with a name; for ``validate_inputs``. None: it is not known yet."""
    reference = parse_hub(name) if name is not None and may_be_hub else None
    if reference is not None and not COMMIT.fullmatch(reference[1]):
        return f"{name!r} has no pinned revision; write the 40 digits of a commit after the @."
    try:
        if name is not None and reference is None:
            output_path(name)
    except ValueError as error:
        return str(error)
    return True


def check_replaceable(path: Path) -> None:
    """ValueError if another file than a profile has this name already."""
    if path.exists():
        try:
            load(path)
        except ValueError as error:
            raise ValueError(
                f"LiteAttention: {path.name!r} is there already, and not a profile; choose another "
                "file name."
            ) from error


def load_named(name: str) -> Profile:
    path = source_path(name)
    return load(name if path is None else path)


def _inside(folder: str, name: str) -> Path:
    # Links inside the folder are their owner's own and may lead elsewhere, as in ComfyUI itself.
    base = Path(os.path.abspath(folder))
    path = Path(os.path.abspath(base / (name.removesuffix(EXTENSION) + EXTENSION)))
    if not path.is_relative_to(base) or path.name == EXTENSION or not name.isprintable():
        raise ValueError(
            f"LiteAttention: {name!r} is not a file name inside ComfyUI's output or input folder; "
            f"try {DEFAULT_NAME}"
        )
    return path
