"""Leaves the files that register a device type to `test_files`, unless one of them is asked for."""

from pathlib import Path

import pytest


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path.parent != Path(__file__).parent or collection_path.name == "test_files.py":
        return None
    asked = any(Path(argument.partition("::")[0]).name.startswith("on_") for argument in config.args)
    return None if asked else True
