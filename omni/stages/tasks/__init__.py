"""The tasks of stage E. Each is a class with ``@sft_task``; every module of this folder is imported, so that a new
task is one new file.

``TASKS``: the classes by name, in the order of a mixture's slots. New modules come after the built-in ones, whose
samples therefore stay where they are.
"""

from importlib import import_module
from pkgutil import iter_modules

from omni.stages.tasks.base import TASKS

_BUILT_IN = ("dialogue", "recordings", "pictures", "signs", "spoken_answers", "conversations")


def import_tasks() -> None:
    """Import every module of this folder, and so register its tasks."""
    found = {module.name for module in iter_modules(__path__)}
    for name in (*_BUILT_IN, *sorted(found - {*_BUILT_IN})):
        import_module(f"{__name__}.{name}")


import_tasks()

__all__ = ["TASKS", "import_tasks"]
