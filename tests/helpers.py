"""What several test files share."""

import importlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("tools/*.py")])  # of the project, without its tests


def module(name: str):
    """The module of a command, at the top or in tools/."""
    return importlib.import_module(
        f"tools.{name}" if (ROOT / "tools" / f"{name}.py").exists() else name
    )
