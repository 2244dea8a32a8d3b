"""Durable memory: what a sleeping model keeps between processes, by name.

store.py     an open memory, and the order of its writes
location.py  which files a name stands for; reading and creating them
manage.py    list, show, fork, export, import, remove
format.py, journal.py, lock.py  one kind of file each
"""

from .format import Header
from .location import data_dir
from .manage import (
    Listing,
    export_memory,
    fork,
    import_memory,
    list_memories,
    remove,
    show_memory,
)
from .store import Memory

__all__ = [
    "Header",
    "Listing",
    "Memory",
    "data_dir",
    "export_memory",
    "fork",
    "import_memory",
    "list_memories",
    "remove",
    "show_memory",
]
