"""The JSON files of checkpoint folders."""

import json
import os
from pathlib import Path
from typing import Any


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """The object in a JSON file, with or without a byte order mark.

    Args:
        path: Of the file.
        optional: Whether a file that does not exist is an empty object.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it holds no JSON object, or is no file; names it.
    """
    if not path.is_file():
        if optional and not os.path.lexists(path):
            return {}
        if os.path.lexists(path):
            raise ValueError(f"{path} is not a file: a folder, or a link to what is not there")
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value
