#!/usr/bin/env python3
"""make trace: how a prompt is answered, as a sequence diagram of user, main, engine and kernel.

    python3 tests/experiments/trace.py [-j THREADS]

Runs a chat of one prompt with the small model under strace(1), which slows it down. Each arrow is a
system call of that run; successive writes of a reply are one. The diagram is printed, and saved as
text and as SVG below tests/results, with the output of strace.
"""
import argparse
import os
import re
import shutil
import sys
import time
from collections import namedtuple
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from chart import STYLE, text  # noqa: E402
from support import MAIN, TESTS, TINY, Session  # noqa: E402

LANES = ("user", "main", "engine", "kernel")
Event = namedtuple("Event", "time source target label")

# A system call as strace -y prints it (a file descriptor with its file; STDIN is that of the user's
# input), and its arrow: from, to, label. The first match counts. "self" makes the call, "other" is
# the other one of main and engine.
RULES = [(re.compile(pattern), *arrow) for pattern, *arrow in (
    (r'execve\("[^"]*/main"', "user", "main", "execve main"),
    (r'execve\("[^"]*/(\w+)"', "self", "kernel", "execve {}"),
    (r"clone3?\(.*CLONE_THREAD.* = (\d+)$", "engine", "kernel", "create thread {}"),
    (r"(?:clone3?|v?fork)\(.* = (\d+)$", "main", "engine", "fork: process {}"),
    (r"sched_setattr\((\d+), .*policy=(\w+)", "self", "kernel", "sched_setattr: {1} for {0}"),
    (r'openat\(.*?"[^"]*/((?:model|tokenizer)\.bin)"', "self", "kernel", "load {}"),
    (r'openat\(.*?"(/proc/\d+/(?:stat|task))"', "self", "kernel", "read {}"),
    (r'read\(\d+<STDIN>, ""', "user", "main", "end of input"),
    (r'read\(\d+<STDIN>, "(.*)", \d', "user", "main", 'input "{}"'),
    (r'read\(0<pipe:\S+>, "", ', "main", "engine", "end of file in the pipe"),
    (r'write\(1<.*?>, "(.*)", \d', "self", "user", 'output "{}"'),
    (r'write\(2<.*\[cpu%\] ([0-9.]+%)', "self", "user", "log line, cpu% {}"),
    (r'write\(\d+<pipe:\S+>, "(.*)", \d', "self", "other", 'pipe "{}"'),
    (r"kill\(\d+, (SIG\w+)", "self", "other", "{}"),
    (r"timerfd_settime\(.*it_value=\{tv_sec=0, tv_nsec=0\}", "self", "kernel", "stop the timer"),
    (r"timerfd_settime\(", "self", "kernel", "start the timer"),
    (r"futex\(.*FUTEX_WAIT", "self", "kernel", "futex: thread {pid} sleeps"),
    (r"futex\(.*FUTEX_WAKE.* = [1-9]", "self", "kernel", "futex: thread {pid} wakes another"),
    (r"exit_group\((\d+)", "self", "kernel", "exit with {}"),
    (r"wait(?:4|id)\((?:P_PID, )?(\d+).*= \d", "kernel", "main", "wait: {} has ended"))]


def calls(lines):
    """Process, start, end and text of each system call, which strace may print in two parts."""
    begun = {}
    for line in lines:
        pid, now, call = line.split(None, 2)
        start, beginning = begun.pop(pid, (float(now), ""))
        call = beginning + re.sub(r"^<\.\.\. \w+ resumed>\s*", "", call)
        if call.endswith("<unfinished ...>"):
            begun[pid] = start, call[:-len("<unfinished ...>")].rstrip() + " "
        elif " = -1 " not in call:
            yield pid, start, float(now), call


def events(lines, stdin):
    """What happened, in order, times in milliseconds; stdin is the file that RULES call STDIN."""
    found, main = [], None
    for pid, start, end, call in calls(line.replace(f"<{stdin}>", "<STDIN>") for line in lines):
        main = main or pid
        self, other = ("main", "engine") if pid == main else ("engine", "main")
        for pattern, *lanes, label in RULES:
            match = pattern.match(call)
            if match:
                lanes = [{"self": self, "other": other}.get(lane, lane) for lane in lanes]
                waited = call.startswith(("read", "wait"))  # for what the source has done
                found.append(Event(end if waited else start, *lanes,
                                   label.format(*match.groups(), pid=pid)))
                break
    result = []
    for event in sorted(found):
        last = result[-1] if result else event
        if event.source == last.source and event.label[:8] == last.label[:8] == 'output "':
            result[-1] = last._replace(label=last.label[:-1] + event.label[8:])
        else:
            result.append(event._replace(time=1000 * (event.time - min(found).time)))
    return result


def as_text(all_events):
    """The lines of the diagram, of at most 80 columns."""
    yield f"{'ms':>7}  " + " ".join(f"{lane:^7}" for lane in LANES)
    for event in all_events:
        row = [*f"{event.time:7.1f}  ", *"   |    " * len(LANES)]
        source, target = (12 + 8 * LANES.index(lane) for lane in event[1:3])
        first, last = min(source, target) + 1, max(source, target)
        row[first:last] = "-" * (last - first)
        row[target - 1 if source < target else target + 1] = ">" if source < target else "<"
        yield "".join(row) + f"{event.label:.39}"


def as_svg(all_events):
    """The diagram as a picture for light and dark backgrounds."""
    width, height = 700, 50 + 22 * len(all_events)  # pixels
    places = {lane: 100 + 90 * i for i, lane in enumerate(LANES)}
    yield (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
           f'width="{width}" height="{height}" role="img">')
    yield f"<title>How a prompt is answered</title><style>{STYLE}</style>"
    yield text(56, 24, "ms", 'class="note" text-anchor="end"')
    for lane, x in places.items():
        yield text(x, 24, lane, 'class="title" text-anchor="middle"')
        yield f'<path class="axis" d="M{x} 32V{height - 4}"/>'
    for y, event in zip(range(48, height, 22), all_events):
        x, end = places[event.source], places[event.target]
        back = end + (6 if end < x else -6)
        yield text(56, y + 4, f"{event.time:.1f}", 'class="note" text-anchor="end"')
        yield (f'<path class="{event.source}" fill="none" '
               f'd="M{x} {y}H{end}M{back} {y - 4}L{end} {y}L{back} {y + 4}"/>')
        yield text(places["kernel"] + 14, y + 4, f"{event.label:.45}")
    yield "</svg>"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-j", metavar="THREADS", help="trace ./parallel instead of ./inference")
    parser.add_argument("--results", type=Path, default=TESTS / "results")
    options = parser.parse_args()
    if not shutil.which("strace"):
        sys.exit("make trace needs strace(1): apt-get install strace, or your system's package")
    folder = options.results / time.strftime("trace-%Y-%m-%d-%H%M%S")
    folder.mkdir(parents=True)
    trace, engine = folder / "strace.txt", ("-j", options.j) if options.j else ()
    with closing(Session("strace", "-f", "-ttt", "-y", "-s", "200", "-o", trace, MAIN, "-d", TINY,
                         *engine, "42")) as session:
        stdin = os.readlink(f"/proc/self/fd/{session.input}")
        session.read_until(">>> ")
        time.sleep(0.2)  # while the user types
        session.ask("My name is Zelda.")
        session.end_input()
        session.finish()
    all_events = events(trace.read_text(errors="replace").splitlines(), stdin)
    diagram = "\n".join(as_text(all_events)) + "\n"
    (folder / "trace.txt").write_text(diagram)
    (folder / "trace.svg").write_text("\n".join(as_svg(all_events)) + "\n")
    print(f"{diagram}\nSaved in {folder}: trace.txt, trace.svg, strace.txt.")


if __name__ == "__main__":
    main()
