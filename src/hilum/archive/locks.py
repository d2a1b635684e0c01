"""One run at a time: a lock on a file that ends with the process that holds it, however that ends."""

import contextlib
import errno
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from hilum.errors import StoreError


def take(path: Path) -> int | None:
    """Lock a file, made when absent. FileNotFoundError without its folder, StoreError where locks are unknown.

    returns  a descriptor: closing it lets go; None when another process holds the lock
    """
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = os.stat(path).st_ino == os.fstat(handle).st_ino
        except FileNotFoundError:
            held = False  # the holder before has removed the file: begin again with a new one
        except OSError as error:
            os.close(handle)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return None
            raise StoreError(
                f"the file system of {path.parent} knows no locks ({error.strerror}), so that two runs could destroy "
                "each other's work. Mount it with locks (Lustre: -o flock), or choose another place"
            ) from None
        if held:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
            return handle
        os.close(handle)


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Hold a lock for a while; the file is removed at the end, and its folder when nothing else is in it.

    what  is being locked, for the StoreError that says who holds it
    """
    lock = None
    while lock is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # the holder before has just removed the folder
            lock = take(path)
            if lock is None:
                holder = path.read_text().strip() or "another process"
                raise StoreError(f"{what} is being written by {holder}. Wait for its end, or choose a new folder")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something else is in it
            path.parent.rmdir()
        os.close(lock)
