"""Settings for all tests."""

import importlib
import re
from pathlib import Path

import torch
from hypothesis import settings

settings.register_profile("mfx", deadline=None)  # on a busy machine any example may take long
settings.load_profile("mfx")

# Tensors here are small: a second thread would wait more than work, and on a busy machine wait for ever.
torch.set_num_threads(1)

_LIBRARIES = ("torchvision", "timm", "vit_pytorch", "momentumnet", "sklearn", "transformers")


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except (ImportError, RuntimeError):  # torchvision beside another torch than its own raises the latter
        return False
    return True


_MISSING = [name for name in _LIBRARIES if not _imports(name)]


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out files that use a library of models which this version of torch has none of."""
    if collection_path.suffix != ".py" or not _MISSING:
        return None
    if collection_path.parent.name == "examples":
        return True  # the examples use them
    pattern = rf"^\s*(from|import) ({'|'.join(_MISSING)})\b|import_module\(f?\"({'|'.join(_MISSING)})\b"
    return bool(re.search(pattern, collection_path.read_text(), re.MULTILINE)) or None
