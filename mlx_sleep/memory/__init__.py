"""Durable memory: what a sleeping model keeps between processes, by name (store.py)."""

from .format import Header
from .store import (
    Listing,
    Memory,
    data_dir,
    export_memory,
    fork,
    import_memory,
    list_memories,
    remove,
    show_memory,
)

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
