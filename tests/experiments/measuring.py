"""Drives ./main and ./parallel as a user would, and reads what the kernel counts meanwhile."""
import contextlib
import os
import re
import select
import signal
import subprocess
import time
from pathlib import Path

from support import INFO_LINE, LOG_LINE, TOP, Process, Session, end_with, processes, threads_of

SEED = 42
CPUS = sorted(os.sched_getaffinity(0))


class Refused(Exception):
    """A program ended before its reply did; the text is its own message."""


@contextlib.contextmanager
def busy_processes(cpus):
    """A process that computes all the time, on each of the CPUs. They stay in our session, as the
    kernel's autogroups would give another one CPU time of its own."""
    parent = os.getpid()

    def prepare(cpu):
        end_with(parent)
        os.sched_setaffinity(0, [cpu])
    load = [subprocess.Popen(["sh", "-c", "while :; do :; done"], preexec_fn=lambda: prepare(cpu))
            for cpu in cpus]
    try:
        yield
    finally:
        for process in load:
            process.kill()
            process.wait()


def counters(pid):
    """What the kernel has counted: CPU times of a process in seconds, and the involuntary context
    switches of its first thread."""
    process, status = Process(pid), Path(f"/proc/{pid}/status").read_text(errors="replace")
    return {"user": process.user, "system": process.system,
            "switches": int(re.search(r"\nnonvoluntary_ctxt_switches:\s*(\d+)", status)[1])}


class Reply:
    """The reply to a prompt, the times of its start and end, and the counters at these times."""
    def __init__(self, engine):
        self.text, self.info = "", None  # info: SEQ LEN and Speed, if it was finished in time
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


class MeasuredSession(Session):
    """./main or ./parallel in our session, for the reason above, with its stderr in a log."""
    def __init__(self, program, *options, log):
        super().__init__(TOP / program, *options, SEED, log=log, own_session=False)
        self.unfinished = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.unfinished:
            self.signal(signal.SIGINT)
        self.end_input()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.close()

    def family(self):
        return [each for each in processes() if self.pid in (each.pid, each.parent)]

    def refuse(self):
        """It has ended: what it wrote to stderr, in addition to the log, is the reason."""
        self.process.wait(10)
        lines = self.errors.splitlines()
        raise Refused(" ".join(line for line in lines if not LOG_LINE.match(line)))

    def ready_engine(self):
        """The engine's pid, once all its threads sleep, as they do when the model is loaded."""
        while self.process.poll() is None:
            for each in self.family():
                if each.name in ("inference", "parallel"):
                    with contextlib.suppress(OSError):
                        states = {Process(f"{each.pid}/task/{thread}").state
                                  for thread in threads_of(each.pid)}
                        if states == {"S"}:
                            return each.pid
            time.sleep(0.005)
        return self.refuse()

    def measure(self, prompt, limit=600.0, cpus=()):
        """The reply to a prompt, beside a load on these CPUs; if it is not finished within the
        limit in seconds, the part that came."""
        engine = self.ready_engine()
        while select.select([self.reply], [], [], 0)[0]:
            if not self.read_more():  # all but the end is the prompt mark
                self.refuse()
        begin = len(self.output)
        try:
            with busy_processes(cpus):
                reply = Reply(engine)
                self.send(prompt + "\n")
                while not reply.info and select.select(
                        [self.reply], [], [], max(0, reply.asked + limit - time.monotonic()))[0]:
                    if not self.read_more():
                        self.refuse()
                    if not reply.text:
                        reply.first, reply.at_first = time.monotonic(), counters(engine)
                    reply.text = self.output[begin:].decode(errors="replace")
                    reply.info = INFO_LINE.search(reply.text)
                reply.end, reply.at_end = time.monotonic(), counters(engine)
        except (FileNotFoundError, ProcessLookupError):  # the engine has ended
            self.refuse()
        reply.text, self.unfinished = INFO_LINE.split(reply.text)[0], not reply.info
        return reply
