"""Builds probe.c and runs its commands."""
import os
import shlex
import subprocess
import threading
import time

from artifacts import EMULATOR, TOP, compiled_program
from support import AT_ONCE, INFERENCE, SessionTestCase

PROBE_LIMIT = 90  # seconds; a golden run of the full size under a sanitizer is the longest
BUILDING = threading.Lock()
FLAGS = ("-O2", *shlex.split(os.environ.get("PROBE_CFLAGS", "")))  # those of a sanitizer


def probe_program():
    with BUILDING:  # run.py may have begun it
        return compiled_program("helpers/probe.c", *FLAGS)


def probe(*arguments, input=None, environment=None):
    """A command of the probe, run to its end."""
    return subprocess.run(
        [*EMULATOR, probe_program(), *map(str, arguments)], input=input or b"", cwd=TOP,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=PROBE_LIMIT,
        env={**os.environ, **(environment or {})})


def probe_lines(*arguments, **options):
    """The lines that a command of the probe prints; it must succeed without an error message."""
    result = probe(*arguments, **options)
    if result.returncode != 0 or result.stderr:
        raise AssertionError(f"probe {arguments[0]} ended with {result.returncode}:\n"
                             f"{result.stderr.decode(errors='replace')}")
    return result.stdout.decode().splitlines()


def kernel_tables():
    """The names of the kernel tables that this machine can run, the best first."""
    return probe_lines("tables")


class BadFileTestCase(SessionTestCase):
    """For files that an engine must reject."""
    ADVICE = ("make prepare", "-d tests/tiny")

    def assert_rejected(self, path):
        """With this file in its folder, the engine prints one line and ends with 1, at once."""
        started = time.monotonic()
        session = self.run_to_end(INFERENCE, "-d", path.parent, 1, "x")
        self.assertLess(time.monotonic() - started, AT_ONCE)
        self.assertEqual(session.text, "")
        self.assert_error_line(session, 1, str(path), *self.ADVICE)

    def assert_only_regular_files(self, path):
        """Nothing, a folder, a device and a pipe at this path are rejected."""
        self.assert_rejected(path)
        path.mkdir()
        self.assert_rejected(path)
        path.rmdir()
        path.symlink_to("/dev/zero")
        self.assert_rejected(path)
        path.unlink()
        os.mkfifo(path)
        self.assert_rejected(path)
