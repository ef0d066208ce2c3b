"""Faults of the file system, injected before any operation in a process of its own: kills, full disks, lost folders.

An operation is what changes something below a folder: the opening of a file to write, its contents, fsync, mkdir,
rename, unlink, rmdir. Python reports most of them by audit events, which hold for every library that is written in
Python; safetensors writes by itself, and is replaced by a writer that can end after half a file.
"""

import errno
import os
import shutil
import signal
import sys
import tempfile
import traceback
from pathlib import Path

from implicit_diffusion.files import states, tensors

EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
FREE = {"os.remove", "os.rmdir", "os.rename", "os.truncate"}  # what a full disk still allows


class Operations:
    """The operations below a folder; `before(number, event, path)` is called before each."""

    def __init__(self, folder, before):
        self.folder, self.before, self.count, self.busy = os.path.abspath(folder), before, 0, False
        fsync, save_file, write_bytes = os.fsync, states.save_file, Path.write_bytes

        def synced(descriptor):
            self.tick("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def saved(tensors, path, metadata=None):
            self.tick("open", path)
            save_file(tensors, path, metadata=metadata)
            self.halved("write", path, path.read_bytes(), write_bytes)

        def bytes_written(path, contents):
            self.halved("write", path, contents, write_bytes)

        def text_written(path, text, encoding=None, **options):
            self.halved("write", path, text.encode(), write_bytes)

        os.fsync, Path.write_bytes, Path.write_text = synced, bytes_written, text_written
        states.save_file = tensors.save_file = saved
        sys.addaudithook(self.hear)

    def halved(self, event, path, contents, write):
        """Half a file is there when it is asked."""
        write(path, contents[: len(contents) // 2])
        self.tick(event, path)
        self.busy = True
        write(path, contents)
        self.busy = False

    def hear(self, event, arguments):
        if event not in EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        self.tick(event, arguments[0])

    def tick(self, event, path):
        path = os.path.abspath(os.fsdecode(path))
        if self.busy or not path.startswith(self.folder):
            return
        self.busy = True
        try:
            self.before(self.count, event, path)
        finally:
            self.busy = False
            self.count += 1


def kill_at(number):
    def before(count, event, path):
        if count == number:
            signal.raise_signal(signal.SIGKILL)

    return before


def refuse_from(number, code=errno.ENOSPC, allowed=FREE, where=""):
    """From that operation on the system refuses all that the fault does not allow, on paths that hold `where`."""

    def before(count, event, path):
        if count >= number and event not in allowed and where in path:
            raise OSError(code, os.strerror(code), path)

    return before


def vanish_at(number, folder):
    def before(count, event, path):
        if count == number:
            shutil.rmtree(folder)

    return before


def in_child(job):
    """Run a job in a fork of this process; returns its exit status, minus the signal, and what it returned or raised.

    The status is 0 for a result, 1 for an error.
    """
    with tempfile.TemporaryDirectory() as place:
        answer = os.open(os.path.join(place, "answer"), os.O_WRONLY | os.O_CREAT)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.write(answer, str(job()).encode())
                status = 0
            except Exception as error:
                os.write(answer, f"{type(error).__name__}: {error}".encode())
            except BaseException:
                os.write(answer, traceback.format_exc().encode())
            finally:
                os._exit(status)
        os.close(answer)
        _, waited = os.waitpid(child, 0)
        with open(os.path.join(place, "answer"), encoding="utf-8") as file:
            return os.waitstatus_to_exitcode(waited), file.read()
