"""Objects of the user's own, named on the command line: ``package.module:NAME``, or ``path/to/file.py:NAME``."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from sacflow_robot.errors import SacflowError, UsageError, one_line


def is_file_name(module: str) -> bool:
    """True if the part before the colon names a Python file and not a module."""
    return module.endswith(".py")


def has_module(module: str) -> bool:
    """True if there is such a Python file or, installed or in the working folder, such a module."""
    if is_file_name(module):
        return True
    if not all(part.isidentifier() for part in module.split(".")):
        return False
    _add_working_folder()
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a parent that is not a package, or a module without a spec
        return False


def load_object(name: str, what: str) -> Any:
    """The object that ``MODULE:NAME`` or ``FILE.py:NAME`` names.

    A module is looked for among what is installed first, then in the working folder.

    Args:
        what: What it is to be, for messages, e.g. ``"environment"``.

    Raises:
        UsageError: There is no such module, file or object, or it cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute.isidentifier():
        raise UsageError(f"{what} {name!r}: expected MODULE:NAME or FILE.py:NAME")
    try:
        if is_file_name(module):
            found = _load_file(Path(module))
        else:
            _add_working_folder()
            found = importlib.import_module(module)
    except (SacflowError, KeyboardInterrupt):
        raise
    except Exception as error:  # whatever the user's module raises
        why = one_line(error)
        if not isinstance(error, ImportError | OSError):
            why = f"{type(error).__name__}: {why}"
        raise UsageError(f"{what} {name!r} cannot be loaded: {why}") from None
    if not hasattr(found, attribute):
        public = sorted(key for key, value in vars(found).items() if callable(value) and not key.startswith("_"))
        raise UsageError(
            f"{what} {name!r}: {module} has no {attribute!r}; it has {', '.join(public[:20]) or 'nothing'}"
        )
    return getattr(found, attribute)


def _load_file(path: Path) -> Any:
    """The module in a file, the same object however often it is asked for."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    whole = path.resolve()
    name = f"sacflow_robot_user_{whole.stem}_{abs(hash(str(whole))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made
    # What lies beside it can be imported, after everything that is installed.
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[name]
        raise
    return made


def _add_working_folder() -> None:
    """Let modules of the working folder be found, after everything that is installed, so that none of these is hidden."""
    folder = str(Path.cwd())
    if folder not in sys.path and "" not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()
