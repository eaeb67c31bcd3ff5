#!/usr/bin/env python3
"""make policies, make threads: the experiments of the coursework.

    python3 tests/experiments.py policies    speed, CPU use, switches for each scheduling policy
    python3 tests/experiments.py threads     speed and times for 1 to 16 threads

The model is the one in the top folder, or else one of SmolLM's shape with random weights, which is
written once. The result is printed, and saved in a folder of its own below tests/results: a report
in Markdown, each run's figures as CSV, a chart, and for the policies the log of each run.
"""
import argparse
import contextlib
import csv
import ctypes
import os
import platform
import re
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

from chart import bar_chart
from models import BUILD, model_file

TESTS = Path(__file__).resolve().parent
TOP = TESTS.parent
sys.path.insert(0, str(TOP))
from avg_cpu_use import LOG_LINE, TICK, average, parse  # noqa: E402

SEED = "42"
CPUS = sorted(os.sched_getaffinity(0))
INFO_LINE = re.compile(rb"\n\[INFO\] SEQ LEN: (\d+), Speed: (\d+\.\d+) tok/s\n")
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1

POLICIES = [(f"SCHED_{name}, nice {nice}", ("-s", name, "-n", str(nice)))
            for name in ("OTHER", "BATCH") for nice in (0, 2, 10, 19)]
POLICIES += [("SCHED_IDLE", ("-s", "IDLE")), ("SCHED_FIFO", ("-s", "FIFO")),
             ("SCHED_RR", ("-s", "RR"))]
POLICIES += [(f"SCHED_DEADLINE, {share}%", ("-s", "DEADLINE", "-D", f"{share}ms:100ms:100ms"))
             for share in (10, 50)]
LOADS = ("alone", "beside the load")
SHORT_PROMPT = "Hello!"

THREADS = (1, 2, 4, 6, 8, 10, 12, 16)
PARTS = ("prompt", "decoding")
LONG_PROMPT = "A process has an address space; a thread shares it with others. " * 20


# ------------------------------------------------------------------------------------------------
# Processes

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
    """What the kernel has counted for a process: CPU times in seconds, involuntary context
    switches, and migrations (None if the kernel does not report them)."""
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
    """The text that came for a prompt, the moments of its begin and end, the counters then."""
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
        return whole.tokens * len(self.text) / len(whole.text) / (self.end - self.first or 1)


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
        lines = self.log.read_bytes().splitlines()
        return b" ".join(line for line in lines if not LOG_LINE.match(line)).decode()

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


# ------------------------------------------------------------------------------------------------
# The plan: model, prompt, steps

class Plan:
    """What all runs of an experiment have in common."""
    def __init__(self, options, prompt):
        self.prompt, self.runs, self.limit = prompt, options.runs, options.limit
        self.model, self.model_name = find_model(options.model)
        self.settings = ("-d", self.model, "-m", str(options.tokens))
        self.folder = options.results / time.strftime(f"{options.experiment}-%Y-%m-%d-%H%M%S")
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)

        log = self.folder / "logs" / "first.log"
        with Session("main", "-d", self.model, "-m", "1", log=log) as session:
            short = session.ask(prompt)
        begin = time.monotonic()
        with Session("main", *self.settings, log=log) as session:
            self.whole = session.ask(prompt)
        self.seconds = time.monotonic() - begin
        self.prompt_tokens = short.length - 3  # without a token of the reply and two that close it
        self.whole.tokens = self.whole.length - short.length  # without the first one
        log.unlink()

    def log(self, *words):
        """A log's path for a run."""
        name = re.sub(r"[^A-Za-z0-9]+", "-", " ".join(map(str, words)))
        return self.folder / "logs" / f"{name}.log"


def find_model(folder):
    """The folder of the model, and what it is."""
    if folder is None and (TOP / "model.bin").exists() and (TOP / "tokenizer.bin").exists():
        folder = TOP
    if folder is not None:
        return folder, f"{folder}/model.bin ({(folder / 'model.bin').stat().st_size} bytes)"
    folder = Path(BUILD) / "experiment-model"
    folder.mkdir(parents=True, exist_ok=True)
    model = Path(model_file("--vocab 1024"))
    for name, target in (("model.bin", f"../{model.name}"),
                         ("tokenizer.bin", "../../tiny/tokenizer.bin")):
        with contextlib.suppress(FileExistsError):
            (folder / name).symlink_to(target)
    return folder, "SmolLM-135M's shape, random weights, a vocabulary of 1024"


def announce(plan, text, steps, seconds_per_step):
    """Print beforehand what the experiment does and how long it takes."""
    seconds = sum(map(seconds_per_step, steps))
    time_text = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    print(f"{text}, {plan.runs} runs each. It should take at most {time_text}.\n"
          f"The model: {plan.model_name}.", flush=True)


def take(steps, seconds_per_step):
    """The steps one by one, (run, *what), with the time left on stderr if that is a terminal."""
    known = {}  # seconds of each step, as far as it was taken in an earlier run
    for i, step in enumerate(steps):
        if sys.stderr.isatty():
            left = sum(known.get(later[1:]) or seconds_per_step(later) for later in steps[i:])
            what = ", ".join(map(str, step[1:]))
            print(f"\r{i} of {len(steps)} done, at most {left:.0f} s left: {what}\033[K", end="",
                  file=sys.stderr, flush=True)
        begin = time.monotonic()
        yield step
        known[step[1:]] = time.monotonic() - begin
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------
# The report

def spread(values, form="{:.1f}"):
    """Median (least-most)."""
    texts = [form.format(value) for value in
             (statistics.median(values), min(values), max(values))]
    return texts[0] if len(values) == 1 else "{} ({}-{})".format(*texts)


def table(head, rows):
    """A table in Markdown whose columns are aligned in a terminal, too."""
    rows = [[str(cell) for cell in row] for row in [head, ["---"] * len(head), *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "".join("| " + " | ".join(map(str.ljust, row, widths)) + " |\n" for row in rows)


def machine():
    """What a reader of a report has to know of the machine and the code."""
    cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
    cpu = re.search(r"model name\s*:\s*(.+)", cpuinfo)
    try:
        commit = subprocess.run(["git", "-C", TOP, "describe", "--always", "--dirty"], check=True,
                                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {"machine": f"{platform.machine()}, {len(CPUS)} usable CPUs of {os.cpu_count()}",
            "CPU": cpu[1] if cpu else "unknown", "kernel": f"Linux {platform.release()}",
            "commit": commit.strip()}


def save(plan, title, tables, conclusions, runs, chart):
    """Print the report and save it, with each run's figures and a chart."""
    facts = {**machine(), "model": plan.model_name, "seed": SEED,
             "prompt": f"{plan.prompt_tokens} tokens", "reply": f"{plan.whole.tokens + 1} tokens",
             "runs": f"{plan.runs}; each cell is median (least-most)"}
    text = "\n".join([f"# {title}\n", *(f"- {name}: {value}" for name, value in facts.items()),
                      "", *tables, conclusions, ""])
    print("\n" + text)
    (plan.folder / "report.md").write_text(text + "\n![chart](chart.svg)\n", encoding="utf-8")
    (plan.folder / "chart.svg").write_text(chart, encoding="utf-8")
    with open(plan.folder / "runs.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for run in runs for name in run)))
        writer.writeheader()
        writer.writerows(runs)
    print(f"Saved in {plan.folder}: report.md, runs.csv, chart.svg, logs.")


def column(runs, name, form="{:.1f}"):
    """The cell for a figure of several runs."""
    values = [run[name] for run in runs if run.get(name) is not None]
    return spread(values, form) if values else ""


def overlap(values, others):
    return min(values) <= max(others) and min(others) <= max(values)


def triple(values):
    return statistics.median(values), min(values), max(values)


# ------------------------------------------------------------------------------------------------
# make policies

def measure_policy(plan, options, load, log):
    """The figures of one run."""
    with Session("main", *plan.settings, *options, log=log) as session:
        reply = session.ask(plan.prompt, plan.limit, CPUS if load == LOADS[1] else ())
    samples = parse(log.read_bytes().splitlines())
    migrations = sum(old.task_cpu != new.task_cpu for old, new in zip(samples, samples[1:]))
    if reply.at_end["migrations"] is not None:
        migrations = reply.at_end["migrations"] - reply.at_prompt["migrations"]
    return {"speed": reply.tokens_per_second(plan.whole), "cpu": average(samples) if samples else 0,
            "switches": reply.at_end["switches"] - reply.at_prompt["switches"],
            "migrations": migrations, "finished": bool(reply.info), "log": log.name}


def policy_rows(runs):
    """For each policy its runs alone, its runs beside the load, and why it was refused, or ""."""
    for policy, _ in POLICIES:
        mine = [run for run in runs if run["policy"] == policy]
        good = [[run for run in mine if run["load"] == load and "speed" in run] for load in LOADS]
        yield policy, *good, next((run["refused"] for run in mine if "refused" in run), "")


def policy_table(runs, load):
    head = [f"policy, {load}", "tok/s", "CPU use, %", "involuntary switches", "migrations"]
    rows = []
    for policy, *good, refused in policy_rows(runs):
        chosen = good[LOADS.index(load)]
        name = policy if all(run["finished"] for run in chosen) else policy + " *"
        rows.append([name, *(column(chosen, *figure) for figure in (
            ("speed", "{:.2f}"), ("cpu",), ("switches", "{:.0f}"), ("migrations", "{:.0f}")))]
            if chosen else [policy, "refused", "", "", ""])
    return table(head, rows)


def policy_conclusions(rows):
    """What the figures show: medians, and whether the ranges of two policies overlap."""
    rows = [(policy, *([run["speed"] for run in runs] for runs in good))
            for policy, *good, _ in rows if all(good)]
    if not rows:
        return "No policy could be measured."
    median = statistics.median
    parts = []
    for i, load in enumerate(LOADS, 1):
        ordered = sorted(rows, key=lambda row: median(row[i]))
        low, high = ordered[0], ordered[-1]
        parts.append(f"{load.capitalize()}, {high[0]} has the highest median speed "
                     f"({median(high[i]):.2f} tok/s) and {low[0]} the lowest "
                     f"({median(low[i]):.2f} tok/s).")
    parts.append("Of its speed alone, each keeps beside the load: " + "; ".join(
        f"{policy} {100 * median(beside) / median(alone):.1f}%" for policy, alone, beside in rows
        if median(alone)) + ".")
    speeds = {policy: beside for policy, _, beside in rows}
    alike = [name for name, speed in speeds.items() if name.startswith("SCHED_OTHER")
             for other in [speeds.get(name.replace("OTHER", "BATCH"))]
             if other and overlap(speed, other)]
    if alike:
        parts.append("Beside the load, the ranges of SCHED_BATCH and SCHED_OTHER overlap at "
                     + ", ".join(name.split(", ")[1] for name in alike) + ".")
    return " ".join(parts)


def policies(options):
    plan = Plan(options, SHORT_PROMPT)
    steps = [(run, policy, load) for run in range(1, plan.runs + 1) for policy, _ in POLICIES
             for load in LOADS]

    def expected(step):
        return plan.seconds + (plan.limit if step[2] == LOADS[1] else 0)
    announce(plan, f"{len(POLICIES)} policies, alone and beside {len(CPUS)} busy processes", steps,
             expected)
    runs = []
    for run, policy, load in take(steps, expected):
        figures = {"policy": policy, "load": load, "run": run}
        try:
            figures.update(measure_policy(plan, dict(POLICIES)[policy], load,
                                          plan.log(policy, load, run)))
        except Refused as reason:
            figures["refused"] = str(reason)
        runs.append(figures)

    rows = list(policy_rows(runs))
    notes = [f"{policy}: {refused}\n" for policy, _, _, refused in rows if refused]
    if any(run.get("finished") is False for run in runs):
        notes.append(f"\\* Not finished after {plan.limit:g} s and interrupted; the speed is that "
                     "of the part of the reply that came.\n")
    if not Path("/proc/self/sched").exists():
        notes.append("This kernel does not count migrations; they are changes of task_cpu in the "
                     "log.\n")
    title = f"Scheduling policies beside {len(CPUS)} busy processes"
    chart = bar_chart(f"{title}: decoding speed", "tok/s", LOADS, [
        (policy, [triple([run["speed"] for run in chosen]) if chosen else "refused"
                  for chosen in good]) for policy, *good, _ in rows])
    save(plan, title, [policy_table(runs, load) for load in LOADS] + notes,
         policy_conclusions(rows), runs, chart)


# ------------------------------------------------------------------------------------------------
# make threads

def measure_threads(plan, count, log):
    """The figures of the prompt and of decoding."""
    with Session("parallel", *plan.settings, str(count), log=log) as session:
        reply = session.ask(plan.prompt)

    def times(before, after):
        return {name: after[name] - before[name] for name in ("user", "system")}
    return [{"part": "prompt", "speed": plan.prompt_tokens / (reply.first - reply.asked),
             **times(reply.at_prompt, reply.at_first)},
            {"part": "decoding", "speed": float(reply.info[2]),
             **times(reply.at_first, reply.at_end)}]


def speed_ups(runs, part):
    """For each thread count the speed of each run by the median with one thread."""
    one = statistics.median(speeds(runs, part, 1))
    return {count: [speed / one for speed in speeds(runs, part, count)] for count in THREADS}


def speeds(runs, part, count):
    return [run["speed"] for run in runs if (run["part"], run["threads"]) == (part, count)]


def thread_table(runs, part):
    rows = []
    for count, ups in speed_ups(runs, part).items():
        chosen = [run for run in runs if (run["part"], run["threads"]) == (part, count)]
        rows.append([count, column(chosen, "speed"), column(chosen, "user", "{:.2f}"),
                     column(chosen, "system", "{:.2f}"), f"{statistics.median(ups):.2f}",
                     f"{100 * statistics.median(ups) / count:.0f}%"])
    return table([f"threads, {part}", "tok/s", "user, s", "system, s", "speed-up", "efficiency"],
                 rows)


def thread_conclusions(runs):
    parts = []
    for part, name in zip(PARTS, ("Prompts are read", "Decoding is")):
        ups = speed_ups(runs, part)
        best = max(ups, key=lambda count: statistics.median(ups[count]))
        parts.append(f"{name} fastest with {best} thread{'s' * (best > 1)}: "
                     f"{statistics.median(ups[best]):.2f} times the speed of one (medians).")
        similar = [str(count) for count in ups if count != best and overlap(ups[count], ups[best])]
        if similar:
            parts.append(f"The range of speeds overlaps with that of {', '.join(similar)} threads.")
    parts.append(f"{len(CPUS)} CPUs were usable. Speed-up and efficiency are medians; efficiency "
                 "is the speed-up divided by the number of threads.")
    return " ".join(parts)


def threads(options):
    plan = Plan(options, LONG_PROMPT)
    steps = [(run, count) for run in range(1, plan.runs + 1) for count in THREADS]

    def expected(_):
        return 2 * plan.seconds
    announce(plan, f"{len(THREADS)} numbers of threads", steps, expected)
    runs = []
    for run, count in take(steps, expected):
        for figures in measure_threads(plan, count, plan.log(count, "threads", run)):
            runs.append({"threads": count, "run": run, **figures})
    title = f"Threads on {len(CPUS)} CPUs"
    ups = [speed_ups(runs, part) for part in PARTS]
    chart = bar_chart(f"{title}: speed-up over one thread", "times", PARTS, [
        (f"{count} threads", [triple(up[count]) for up in ups]) for count in THREADS])
    save(plan, title, [thread_table(runs, part) for part in PARTS], thread_conclusions(runs), runs,
         chart)


def main():
    parser = argparse.ArgumentParser(description="The experiments of the coursework.")
    parser.add_argument("experiment", choices=("policies", "threads"))
    parser.add_argument("--runs", type=int, default=3, help="runs of each measurement (default: 3)")
    parser.add_argument("--model", type=Path, help="folder of model.bin and tokenizer.bin")
    parser.add_argument("--tokens", type=int, default=128, help="longest reply (default: 128)")
    parser.add_argument("--limit", type=float, default=20.0,
                        help="seconds until a reply beside the load is interrupted (default: 20)")
    parser.add_argument("--results", type=Path, default=TESTS / "results",
                        help="where the folder of the result is created (default: tests/results)")
    options = parser.parse_args()
    try:
        {"policies": policies, "threads": threads}[options.experiment](options)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except Refused as message:
        sys.exit(f"The model cannot be run: {message}")


if __name__ == "__main__":
    main()
