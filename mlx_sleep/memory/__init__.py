"""Durable memory: what a sleeping model keeps between processes, by name.

store.py     an open memory, and what is written when
location.py  which files a name stands for; reading and making a memory
manage.py    list, show, fork, export, import, remove
database.py  the SQLite database of a memory; rows.py, wal.py: its rows, and its log
format.py    a memory in one safetensors file, for export; format_1.py: as older versions kept it
"""

from .format import Contents, Header, Message
from .location import data_dir
from .manage import (
    Listing,
    export_memory,
    fork,
    import_memory,
    list_memories,
    remove,
    search,
    show_memory,
    transcript,
)
from .store import Memory

__all__ = [
    "Contents",
    "Header",
    "Listing",
    "Memory",
    "Message",
    "data_dir",
    "export_memory",
    "fork",
    "import_memory",
    "list_memories",
    "remove",
    "search",
    "show_memory",
    "transcript",
]
