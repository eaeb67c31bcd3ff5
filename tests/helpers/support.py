"""What the tests share: sessions with a program on pipes or in a pseudo-terminal, fake engines,
the log's format. Every wait is bounded, and whatever a session started ends with it.
"""
import array
import contextlib
import ctypes
import errno
import fcntl
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import textwrap
import time
import unittest
from pathlib import Path

from artifacts import EMULATOR, TESTS, TOP, smollm_shape

TINY = TESTS / "tiny"
MAIN = TOP / "main"
INFERENCE = TOP / "inference"
PARALLEL = TOP / "parallel"

PATIENCE = 30  # seconds until a wait has failed; only a broken program ever waits that long
AT_ONCE = 2    # seconds; what a loaded machine may need for what takes no time
F_SETPIPE_SZ = 1031  # not in fcntl before python 3.10

LOG_LINE = re.compile(
    r"\[pid\] (?P<pid>\d+) \[tcomm\] \((?P<tcomm>.*)\) \[state\] (?P<state>[A-Za-z]) "
    r"\[policy\] (?P<policy>SCHED_[A-Z]+) \[nice\] (?P<nice>-?\d+) \[vsize\] (?P<vsize>\d+) "
    r"\[task_cpu\] (?P<task_cpu>\d+) \[utime\] (?P<utime>\d+) \[stime\] (?P<stime>\d+) "
    r"\[cpu%\] (?P<cpu>\d+\.\d\d)%")
INFO_LINE = re.compile(r"\[INFO\] SEQ LEN: (\d+), Speed: (\d+\.\d{4}) tok/s\n")

LIBC = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Processes that a program leaves running become children of the tests, not of init.
LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
signal.signal(signal.SIGUSR2, lambda *_: None)  # an orphan's signal must not kill the tests


def threads_of(pid):
    """The thread ids of a process."""
    return [int(name) for name in os.listdir(f"/proc/{pid}/task")]


def is_allowed(action="os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))"):
    """Whether this python statement, by default a real-time policy, works in a new process."""
    return subprocess.run([sys.executable, "-c", f"import os; {action}"], timeout=PATIENCE,
                          stderr=subprocess.DEVNULL).returncode == 0


def wait_until(condition, what):
    """Wait until condition() is true and return it."""
    deadline = time.monotonic() + PATIENCE
    while True:
        result = condition()
        if result:
            return result
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {PATIENCE} s in vain: {what}")
        time.sleep(0.01)


class Process:
    """What /proc/<path>/stat holds; path is a pid, or "pid/task/tid" for one of its threads."""

    def __init__(self, path):
        stat = Path(f"/proc/{path}/stat").read_text(errors="replace")
        self.pid = int(stat[:stat.index(" ")])
        self.name = stat[stat.index("(") + 1:stat.rindex(")")]
        fields = stat[stat.rindex(")") + 2:].split()
        self.state, self.parent, self.session = fields[0], int(fields[1]), int(fields[3])
        self.user, self.system = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in fields[11:13])
        self.cpu_time = self.user + self.system


def processes():
    """All processes of the machine, zombies too."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended just now
            yield Process(pid)


def end_with(parent):
    """Called in a new process: it ends with its parent, even if that is killed."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


class Session:
    """A program on pipes or in a pseudo-terminal of its own, with its stderr in a file. It ends
    with the tests. `output` holds all bytes that came so far.
    """

    def __init__(self, *command, terminal=False, errors_to_terminal=False, prepare=None,
                 cwd=TOP, env=None, log=None, own_session=True):
        emulator = EMULATOR if Path(command[0]).name in ("inference", "parallel") else []
        self.command = [str(word) for word in (*emulator, *command)]
        self.terminal = terminal
        self.output = b""
        self.mark = 0
        self.log = open(log, "w+b") if log else tempfile.TemporaryFile()
        if terminal:
            self.input, theirs = pty.openpty()
            self.reply, stdin, stdout = os.dup(self.input), theirs, theirs
        else:
            stdin, self.input = os.pipe()
            self.reply, stdout = os.pipe()
            os.set_blocking(self.input, False)

        parent = os.getpid()

        def before_exec():
            end_with(parent)
            for number in (signal.SIGINT, signal.SIGHUP):  # which nohup(1), for one, ignores
                signal.signal(number, signal.SIG_DFL)
            if terminal:
                fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            if prepare:
                prepare()

        self.process = subprocess.Popen(
            self.command, stdin=stdin, stdout=stdout, cwd=cwd, start_new_session=own_session,
            stderr=stdout if errors_to_terminal else self.log,
            env={**os.environ, **(env or {})}, preexec_fn=before_exec)
        self.pid = self.process.pid
        for theirs in {stdin, stdout}:
            os.close(theirs)

    # its output

    @property
    def text(self):
        """All output so far, as a reader sees it."""
        return self.output.decode(errors="replace").replace("\r\n", "\n")

    @property
    def errors(self):
        """What it wrote to stderr so far."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), size, 0).decode(errors="replace")

    @property
    def log_lines(self):
        """The log so far, a match per line; any other line fails the test."""
        complete = self.errors[:self.errors.rfind("\n") + 1]
        matches = [(line, LOG_LINE.fullmatch(line)) for line in complete.splitlines()]
        bad = [line for line, match in matches if not match]
        if bad:
            self.fail(f"no log line: {bad[0]!r}")
        return [match for _, match in matches]

    def read_until(self, *texts):
        """Wait for the texts, one after the other; returns what came up to the last one's end."""
        start = self.mark
        deadline = time.monotonic() + PATIENCE
        for text in texts:
            wanted = text.encode()
            while self.output.find(wanted, self.mark) < 0:
                if not self._receive(deadline):
                    self.fail(f"ended without {text!r}")
            self.mark = self.output.find(wanted, self.mark) + len(wanted)
        return self.output[start:self.mark].decode(errors="replace").replace("\r\n", "\n")

    def read_more(self):
        """Wait for more output; false at its end."""
        return self._receive(time.monotonic() + PATIENCE)

    def wait_for_log_lines(self, more):
        """Wait until the log has `more` more lines."""
        count = self.errors.count("\n") + more
        wait_until(lambda: self.errors.count("\n") >= count, f"{more} more lines in the log")

    # its input

    def send(self, text):
        """Send text or bytes. A program that has ended reads nothing; finish() checks that."""
        data = text if isinstance(text, bytes) else text.encode()
        deadline = time.monotonic() + PATIENCE
        while data:
            poll = select.poll()
            poll.register(self.input, select.POLLOUT)
            if not poll.poll(1000 * max(0, deadline - time.monotonic())):
                self.fail("does not take its input")
            try:
                data = data[os.write(self.input, data):]
            except BrokenPipeError:
                return

    def ask(self, prompt):
        """Send a prompt, and return the reply's text once the next prompt mark is printed."""
        self.send(prompt + "\n")
        output = self.read_until("[INFO] SEQ LEN: ", "tok/s", ">>> ")
        return output[:output.rindex("[INFO]")]

    def end_input(self):
        if self.terminal:
            self.send("\x04")
        else:
            os.close(self.input)
            self.input = None

    def hang_up(self):
        """Close the reading end of its output, and the terminal if it has one."""
        os.close(self.reply)
        self.reply = None
        if self.terminal:
            os.close(self.input)
            self.input = None

    def signal(self, number):
        os.kill(self.pid, number)

    def untaken_input(self, fd=None):
        """The number of bytes in the pipe to its stdin, or in another file."""
        waiting = array.array("i", [0])
        fcntl.ioctl(fd or self.input, termios.FIONREAD, waiting)
        return waiting[0]

    # its processes and its end

    def family(self):
        """The processes of its session, zombies too."""
        return [process for process in processes() if process.session == self.pid]

    @property
    def engine(self):
        """The pid of the engine, main's child."""
        return wait_until(lambda: [process.pid for process in self.family()
                                   if process.parent == self.pid], "main starts an engine")[0]

    def finish(self):
        """Its exit status, once it has ended; a process of its session must not outlive it."""
        deadline = time.monotonic() + PATIENCE
        while self.reply is not None and self._receive(deadline):
            pass
        try:
            self.status = self.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.fail("did not end")
        left = self.family()
        if left:
            self.fail(f"ended before its process {left[0].pid} in state {left[0].state}")
        return self.status

    def wait_for_orphans(self):
        """Wait until it and all processes of its session have died by themselves."""
        self.process.wait(PATIENCE)

        def all_gone():
            left = self.family()
            for process in left:
                if process.state == "Z":
                    os.waitpid(process.pid, 0)
            return not left
        wait_until(all_gone, f"all processes of {' '.join(self.command)} end")

    def close(self):
        """Kill what still runs, and free everything."""
        for process in self.family():
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                os.kill(process.pid, signal.SIGKILL)
        self.wait_for_orphans()
        for descriptor in (self.input, self.reply):
            if descriptor is not None:
                os.close(descriptor)
        self.log.close()

    def fail(self, message):
        raise AssertionError(f"{' '.join(self.command)}: {message}\n--- its output:\n{self.text}\n"
                             f"--- its errors:\n{self.errors}\n---")

    def _receive(self, deadline):
        """Wait for more output; false at its end."""
        poll = select.poll()
        poll.register(self.reply, select.POLLIN)
        if not poll.poll(1000 * max(0, deadline - time.monotonic())):
            self.fail("nothing more came in time")
        try:
            data = os.read(self.reply, 1 << 16)
        except OSError as error:  # the end of file of a pseudo-terminal
            if error.errno != errno.EIO:
                raise
            data = b""
        self.output += data
        return bool(data)


# Prepended to the body of a fake engine.
ENGINE_HEAD = f"""\
#!{sys.executable} -SE
import os, signal, sys, time

signal.signal(signal.SIGINT, signal.SIG_DFL)


def put(text):
    sys.stdout.write(text)
    sys.stdout.flush()


def report():
    os.write(3, b"x")
    os.kill(os.getppid(), signal.SIGUSR2)


def next_prompt():
    report()
    signal.sigwait([signal.SIGUSR1])
    prompt = sys.stdin.buffer.readline()
    if not prompt:
        sys.exit(0)
    return prompt


def wait_for(name):
    while not os.path.exists(os.path.join(os.path.dirname(__file__), name)):
        time.sleep(0.01)


"""


class SessionTestCase(unittest.TestCase):
    """Starts sessions that end with the test."""

    def start(self, *command, **options):
        session = Session(*command, **options)
        self.addCleanup(session.close)
        return session

    def chat(self, *options, folder=TINY, **keywords):
        """main at its first prompt mark, by default with the tiny model and the seed 42."""
        session = self.start(MAIN, "-d", folder, *options, **keywords)
        session.read_until(">>> ")
        return session

    def run_to_end(self, *command, typed="", **options):
        """The session, with its exit status, after all of its input was sent at once."""
        session = self.start(*command, **options)
        session.send(typed)
        session.end_input()
        session.finish()
        return session

    def full_pipe(self):
        """The write end of a full pipe that nothing reads."""
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        self.addCleanup(os.close, writer)
        fcntl.fcntl(reader, F_SETPIPE_SZ, 4096)
        os.write(writer, b"x" * 4096)
        return writer

    def folder(self):
        """A temporary directory."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return Path(folder.name)

    def noise_model(self):
        """The folder of a model of the full size, whose replies are random and slow."""
        return smollm_shape()

    def main_with_engine(self, body):
        """A copy of main beside a fake engine: main runs the engine beside its own binary."""
        folder = self.folder()
        engine = folder / "inference"
        engine.write_text(ENGINE_HEAD + textwrap.dedent(body))
        engine.chmod(0o755)
        return Path(shutil.copy(MAIN, folder))

    def start_fake(self, body, *options, **keywords):
        """main with a fake engine; `release` lets the engine's wait_for(name) go on."""
        main = self.main_with_engine(body)
        session = self.start(main, *options, **keywords)
        session.release = lambda name: (main.parent / name).touch()
        return session

    def assert_error_line(self, session, status, *words):
        """The session has ended with this exit status and printed one line of errors, apart from
        the log, which contains these words.
        """
        self.assertEqual(session.status, status, session.text + session.errors)
        errors = re.sub(r"(?m)^\[pid\].*\n", "", session.errors)
        self.assertRegex(errors, r"\A[^\n]+\n\Z")
        for word in words:
            self.assertIn(word, errors)

    def assert_ends(self, session, status, ending):
        """It ends with this exit status, its last line "Child exited with <ending>"."""
        session.finish()
        self.assertEqual(session.status, status, session.text + session.errors)
        last_line = session.text[session.text.rfind("\n", 0, -1) + 1:]
        self.assertEqual(last_line, f"Child exited with {ending}\n", session.text)
        self.assertEqual(session.text.count("Child exited"), 1)


def replies(text):
    """The pairs of reply and SEQ LEN in a session's output: all of it that a seed determines."""
    texts = INFO_LINE.split(text)
    return [(reply.replace(">>> ", ""), int(length))
            for reply, length in zip(texts[0::3], texts[1::3])]
