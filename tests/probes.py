"""The engines opened up: builds tests/probe.c over one of them and runs its commands."""
import functools
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

from models import BUILD
from support import AT_ONCE, INFERENCE, TESTS, TOP, SessionTestCase

PROBE_LIMIT = 90  # seconds; a golden run of the full size under a sanitizer is the longest
PARALLEL = ("-DENGINE=\"../parallel.c\"", "-DPARALLEL")


@functools.lru_cache(maxsize=None)
def probe_program(engine):
    """The path of the probe over this engine, compiled anew if a source is younger.

    CC names the compiler, PROBE_CFLAGS more flags, a sanitizer's for example.
    """
    flags = os.environ.get("PROBE_CFLAGS", "")
    compiler = os.environ.get("CC", "gcc")
    name = re.sub(r"[^\w.]+", "-", f"probe {engine} {compiler} {flags}").strip("-")
    path = Path(BUILD, name)
    sources = [*TOP.glob("*.[ch]"), TESTS / "probe.c", TESTS / "oracle.h"]
    if path.exists() and path.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        return path
    path.parent.mkdir(exist_ok=True)
    unfinished = f"{path}.{os.getpid()}"  # renamed when whole: tests may run side by side
    build = subprocess.run(
        [*shlex.split(compiler), "-O2", *shlex.split(flags),
         *(PARALLEL if engine == "parallel" else ()), "-o", unfinished, TESTS / "probe.c",
         "-lm", "-lpthread"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if build.returncode != 0:
        raise AssertionError(f"the probe does not compile:\n{build.stdout.decode()}")
    os.replace(unfinished, path)
    return path


def probe(*arguments, engine="inference", input=None, environment=None):
    """A command of the probe, run to its end."""
    return subprocess.run(
        [probe_program(engine), *map(str, arguments)], input=input or b"", stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, timeout=PROBE_LIMIT, env={**os.environ, **(environment or {})})


def probe_lines(*arguments, **options):
    """The lines that a command of the probe prints; it must succeed and complain of nothing."""
    result = probe(*arguments, **options)
    if result.returncode != 0 or result.stderr:
        raise AssertionError(f"probe {arguments[0]} ended with {result.returncode}:\n"
                             f"{result.stderr.decode(errors='replace')}")
    return result.stdout.decode().splitlines()


def kernel_tables():
    """The names of the kernel tables that this machine can run, the best first."""
    return probe_lines("tables")


class RefusalTestCase(SessionTestCase):
    """For files that an engine must refuse."""

    def assert_refusal(self, line, path):
        """The line names the file and what to do."""
        for part in (str(path), "make prepare", "-d tests/tiny"):
            self.assertIn(part, line)

    def assert_refused(self, path):
        """With this file in its folder, the engine says one line and ends with 1, at once."""
        started = time.monotonic()
        session = self.run_to_end(INFERENCE, "-d", path.parent, 1, "x")
        self.assertLess(time.monotonic() - started, AT_ONCE)
        self.assertEqual((session.status, session.text), (1, ""), session.errors)
        self.assertEqual(session.errors.count("\n"), 1, session.errors)
        self.assert_refusal(session.errors, path)

    def assert_only_regular_files(self, path):
        """Nothing, a folder, a device and a pipe at this path are refused."""
        self.assert_refused(path)
        path.mkdir()
        self.assert_refused(path)
        path.rmdir()
        path.symlink_to("/dev/zero")
        self.assert_refused(path)
        path.unlink()
        os.mkfifo(path)
        self.assert_refused(path)
