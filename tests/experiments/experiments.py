#!/usr/bin/env python3
"""make policies, make threads: the experiments of the coursework.

    python3 tests/experiments/experiments.py policies    speed and CPU use for each policy
    python3 tests/experiments/experiments.py threads     speed and times for 1 to 16 threads

The model is the one in the top folder, or else one of SmolLM's shape with random weights, which is
written once. The result is printed, and saved in a folder of its own below tests/results: a report
in Markdown, each run's figures as CSV, a chart, and for the policies the log of each run.
"""
import argparse
import re
import statistics
import sys
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS.parent)]
from artifacts import TOP, smollm_shape  # noqa: E402
from chart import bar_chart  # noqa: E402
from measuring import CPUS, MeasuredSession, Refused  # noqa: E402
from report import column, save, table, triple  # noqa: E402

from avg_cpu_use import average, parse  # noqa: E402

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
        with MeasuredSession("main", "-d", self.model, "-m", "1", log=log) as session:
            short = session.measure(prompt)
        begin = time.monotonic()
        with MeasuredSession("main", *self.settings, log=log) as session:
            self.whole = session.measure(prompt)
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
    if folder is None and not (TOP / "model.bin").exists():
        return smollm_shape(), "SmolLM-135M's shape, random weights, a vocabulary of 1024"
    model = (folder or TOP) / "model.bin"
    return model.parent, f"{model}, {model.stat().st_size} bytes"


def take(plan, text, steps, seconds_per_step):
    """Print what the experiment does and how long it takes, then give the steps one by one; which
    one it is goes to stderr if that is a terminal.
    """
    seconds = sum(map(seconds_per_step, steps))
    time_text = f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
    print(f"{text}, {plan.runs} runs each. It should take at most {time_text}.\n"
          f"The model: {plan.model_name}.", flush=True)
    for i, step in enumerate(steps, 1):
        if sys.stderr.isatty():
            print(f"{i} of {len(steps)}:", *step[1:], file=sys.stderr, flush=True)
        yield step


# ------------------------------------------------------------------------------------------------
# make policies

def measure_policy(plan, options, load, log):
    """The figures of one run."""
    with MeasuredSession("main", *plan.settings, *options, log=log) as session:
        reply = session.measure(plan.prompt, plan.limit, CPUS if load == LOADS[1] else ())
    with open(log, encoding="utf-8") as lines:
        samples = parse(lines)
    return {"speed": reply.tokens_per_second(plan.whole), "cpu": average(samples) if samples else 0,
            "switches": reply.at_end["switches"] - reply.at_prompt["switches"],
            "migrations": sum(a.task_cpu != b.task_cpu for a, b in zip(samples, samples[1:])),
            "finished": bool(reply.info), "log": log.name}


def policy_rows(runs):
    """For each policy its runs alone, its runs beside the load, and why it was refused, or ""."""
    for policy, _ in POLICIES:
        mine = [run for run in runs if run["policy"] == policy]
        good = [[run for run in mine if run["load"] == load and "speed" in run] for load in LOADS]
        yield policy, *good, next((run["refused"] for run in mine if "refused" in run), "")


def policy_table(runs, load):
    head = [f"policy, {load}", "tok/s", "CPU use, %", "involuntary switches", "migrations seen"]
    rows = []
    for policy, *good, refused in policy_rows(runs):
        chosen = good[LOADS.index(load)]
        name = policy if all(run["finished"] for run in chosen) else policy + " *"
        rows.append([name, *(column(chosen, *figure) for figure in (
            ("speed", "{:.2f}"), ("cpu",), ("switches", "{:.0f}"), ("migrations", "{:.0f}")))]
            if chosen else [policy, "refused", "", "", ""])
    return table(head, rows)


def policy_conclusions(rows):
    """What the figures show, in medians."""
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
    return " ".join(parts)


def policies(options):
    plan = Plan(options, SHORT_PROMPT)
    steps = [(run, policy, load) for run in range(1, plan.runs + 1) for policy, _ in POLICIES
             for load in LOADS]

    def expected(step):
        return plan.seconds + (plan.limit if step[2] == LOADS[1] else 0)
    runs = []
    text = f"{len(POLICIES)} policies, alone and beside {len(CPUS)} busy processes"
    for run, policy, load in take(plan, text, steps, expected):
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
    with MeasuredSession("parallel", *plan.settings, str(count), log=log) as session:
        reply = session.measure(plan.prompt)

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


def threads(options):
    plan = Plan(options, LONG_PROMPT)
    steps = [(run, count) for run in range(1, plan.runs + 1) for count in THREADS]

    runs = []
    text = f"{len(THREADS)} numbers of threads"
    for run, count in take(plan, text, steps, lambda _: 2 * plan.seconds):
        for figures in measure_threads(plan, count, plan.log(count, "threads", run)):
            runs.append({"threads": count, "run": run, **figures})
    title = f"Threads on {len(CPUS)} CPUs"
    ups = [speed_ups(runs, part) for part in PARTS]
    chart = bar_chart(f"{title}: speed-up over one thread", "times", PARTS, [
        (f"threads: {count}", [triple(up[count]) for up in ups]) for count in THREADS])
    save(plan, title, [thread_table(runs, part) for part in PARTS],
         "Speed-up and efficiency are medians; efficiency is the speed-up divided by the number of "
         "threads.", runs, chart)


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
    if options.runs < 1 or options.tokens < 2:
        parser.error("at least 1 run and 2 tokens are needed")
    try:
        {"policies": policies, "threads": threads}[options.experiment](options)
    except KeyboardInterrupt:
        sys.exit("\nInterrupted.")
    except Refused as message:
        sys.exit(f"The model cannot be run: {message}")
    except OSError as error:
        sys.exit(f"The experiment cannot go on: {error}")


if __name__ == "__main__":
    main()
