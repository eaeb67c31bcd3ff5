"""Drives ./main and ./parallel as a user would, and reads what the kernel counts meanwhile.

Whatever is started here ends with this process, even if that is killed.
"""
import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from artifacts import TOP

sys.path.insert(0, str(TOP))
from avg_cpu_use import LOG_LINE, TICK  # noqa: E402

SEED = "42"
CPUS = sorted(os.sched_getaffinity(0))
INFO_LINE = re.compile(rb"\n\[INFO\] SEQ LEN: (\d+), Speed: (\d+\.\d+) tok/s\n")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class Refused(Exception):
    """A program ended before its reply did; the text is its own message."""


def start(command, cpu=None, **options):
    """A process that ends with this one, on one CPU if that is given."""
    parent = os.getpid()

    def before_exec():
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)
        if cpu is not None:
            os.sched_setaffinity(0, [cpu])
    return subprocess.Popen(command, preexec_fn=before_exec, **options)


@contextlib.contextmanager
def busy_processes(cpus):
    """A process that computes all the time, on each of the CPUs. They stay in our session, as the
    kernel's autogroups would give another one CPU time of its own."""
    processes = [start(["sh", "-c", "while :; do :; done"], cpu) for cpu in cpus]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def counters(pid):
    """What the kernel has counted: CPU times of a process in seconds, and of its first thread the
    involuntary context switches and the migrations (None if the kernel does not report them)."""
    fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    status = Path(f"/proc/{pid}/status").read_text(errors="replace")
    switches = re.search(r"\nnonvoluntary_ctxt_switches:\s*(\d+)", status)[1]
    migrations = None
    with contextlib.suppress(OSError):
        sched = Path(f"/proc/{pid}/sched").read_text()
        migrations = int(re.search(r"nr_migrations\s*:\s*(\d+)", sched)[1])
    return {"user": int(fields[11]) * TICK, "system": int(fields[12]) * TICK,
            "switches": int(switches), "migrations": migrations}


class Reply:
    """The reply to a prompt, the times of its start and end, and the counters at these times."""
    def __init__(self, engine):
        self.engine = engine
        self.text, self.info = b"", None  # info: SEQ LEN and Speed, if it was finished in time
        self.at_prompt = self.at_first = counters(engine)
        self.asked = self.first = time.monotonic()

    @property
    def length(self):
        return int(self.info[1])

    def tokens_per_second(self, whole):
        """Speed, as the engine measured it. Of an unfinished reply, that of the part of the whole
        text that came: same seed, same text."""
        if self.info:
            return float(self.info[2])
        return whole.tokens * len(self.text) / (len(whole.text) or 1) / (self.end - self.first or 1)


class Session:
    """./main or ./parallel on pipes, its stderr in a file."""
    def __init__(self, program, *options, log):
        self.name, self.log, self.interrupted = program, log, False
        with open(log, "wb") as errors:
            self.process = start([TOP / program, *options, SEED], stdin=subprocess.PIPE,
                                 stdout=subprocess.PIPE, stderr=errors, bufsize=0)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.interrupted:
            self.process.send_signal(signal.SIGINT)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.communicate(timeout=10)  # the end of its input
        finally:
            self.process.kill()  # its engine ends with it
            self.process.wait()

    def engine(self):
        """The engine's pid, once all its threads sleep, as they do when the model is loaded."""
        while self.process.poll() is None:
            own = self.process.pid
            for pid in [own] if self.name == "parallel" else children(own):
                with contextlib.suppress(OSError):
                    stats = [(task / "stat").read_text(errors="replace")
                             for task in Path(f"/proc/{pid}/task").iterdir()]
                    if all(re.match(r"\d+ \((inference|parallel)\) S", stat) for stat in stats):
                        return pid
            time.sleep(0.005)
        raise Refused(self.message())

    def message(self):
        """What it wrote to stderr besides the log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return " ".join(line for line in lines if not LOG_LINE.match(line))

    def ask(self, prompt, limit=600.0, cpus=()):
        """The reply to a prompt, beside a load on these CPUs, as far as it comes within the limit
        in seconds."""
        output = self.process.stdout.fileno()
        engine = self.engine()
        while select.select([output], [], [], 0)[0]:
            if not os.read(output, 65536):  # all but the end is the prompt mark
                raise Refused(self.message())
        try:
            with busy_processes(cpus):
                reply = Reply(engine)
                self.process.stdin.write(prompt.encode() + b"\n")
                self.receive(reply, output, reply.asked + limit)
                reply.end, reply.at_end = time.monotonic(), counters(engine)
        except (BrokenPipeError, FileNotFoundError, ProcessLookupError):  # the engine has ended
            self.process.wait(10)
            raise Refused(self.message()) from None
        self.interrupted = not reply.info
        return reply

    def receive(self, reply, output, deadline):
        while not reply.info:
            left = max(0, deadline - time.monotonic())
            if not select.select([output], [], [], left)[0]:
                return
            data = os.read(output, 65536)
            if not data:
                raise BrokenPipeError
            if not reply.text:
                reply.first, reply.at_first = time.monotonic(), counters(reply.engine)
            reply.text += data
            reply.info = INFO_LINE.search(reply.text)
        reply.text = reply.text[:reply.info.start()]


def children(pid):
    """The child processes of a process."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text(errors="replace").rpartition(")")[2].split()[1]) == pid:
                yield int(stat.parent.name)
