"""Small JSON files that are either whole or known to be torn, published in one atomic step."""

from __future__ import annotations

import json
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..scheduler.storage import Backend, flush_fully, read_fully, write_fully
from .errors import StoreCorrupt

FORMAT = "offload-store"
VERSION = 1
STORE_NAME = "store.json"
MANIFEST_NAME = "manifest.json"
TEMPORARY_SUFFIX = ".tmp"


def _canonical(body: dict[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"))


def publish(backend: Backend, name: str, body: dict[str, Any]) -> int:
    """Durably replace the document `name`; returns its bytes. Blocks.

    Write to a temporary name, flush, rename, flush the directory: at every moment, power cut included, `name` is the
    old document or the new one. Raises: OffloadIOError or OSError; the old document is then still in place, unless
    only the last flush failed, when it may be either.
    """
    text = _canonical(body)
    data = f'{{"checksum":"{xxh3_64_hexdigest(text.encode())}","body":{text}}}\n'.encode()
    temporary = name + TEMPORARY_SUFFIX
    file = backend.open(temporary, create=True)
    try:
        write_fully(file, memoryview(data), 0)
        flush_fully(file)
    finally:
        file.close()
    backend.rename(temporary, name)
    backend.sync_directory()
    return len(data)


def load(backend: Backend, name: str) -> dict[str, Any] | None:
    """The body of a document, None if there is no such file. Blocks.

    Raises: StoreCorrupt if it is torn, altered, or of an unknown format or version.
    """
    path = backend.root / name
    size_nbytes = backend.size_nbytes(name)
    if size_nbytes is None:
        return None
    data = bytearray(size_nbytes)
    file = backend.open(name)
    try:
        read_fully(file, memoryview(data), 0)
    finally:
        file.close()
    try:
        outer = json.loads(data)
        body, expected = outer["body"], outer["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreCorrupt(
            f"{path} is torn or not a store's document ({size_nbytes} bytes, {error}); restore it from a copy, or "
            f"remove the store with `offload store gc`"
        ) from error
    found = xxh3_64_hexdigest(_canonical(body).encode())
    if found != expected:
        raise StoreCorrupt(
            f"{path} was altered: its checksum is {found}, it says {expected}; restore it from a copy, or remove the "
            f"store with `offload store gc`"
        )
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise StoreCorrupt(
            f"{path} has format {body.get('format')!r} version {body.get('version')!r}, this program reads "
            f"{FORMAT!r} version {VERSION}; use the version that wrote it"
        )
    return dict(body)
