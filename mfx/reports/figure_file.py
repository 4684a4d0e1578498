"""Files that figures of matplotlib are saved in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mfx_passes import MfxError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")


def check_figure_file(path: str | Path, what: str) -> Path:
    """Return the path of the file to save.

    Args:
        path: the file.
        what: saves it, for the message.

    Raises:
        MfxError: its suffix is not that of a picture.
    """
    file = Path(path)
    if file.suffix.lower() not in _SUFFIXES:
        raise MfxError(f"{what} saves .png, .svg and .pdf files; call the file {file.stem or what}.png, not {path}.")
    return file


def save_figure(figure: Figure, path: str | Path, what: str) -> None:
    """Save a figure.

    Raises:
        MfxError: the file is not a picture's, or cannot be written.
    """
    file = check_figure_file(path, what)
    try:
        figure.savefig(file)
    except OSError as error:
        raise MfxError(f"{what}: {file} cannot be written: {error.strerror}.") from error
