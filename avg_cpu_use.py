#!/usr/bin/env python3
"""Average, plot or convert the CPU use of the inference process.

    ./main 42 2>log
    python3 avg_cpu_use.py log              the average, in one line
    python3 avg_cpu_use.py --plot log       the CPU use over time, in the terminal
    python3 avg_cpu_use.py --csv log        all samples, for a spreadsheet

The last field of a log line, "[cpu%] 98.76%", is the share of one CPU that the process used since
the line before. Text before and after a log line is skipped, and so are all other lines.
"""
import argparse
import csv
import math
import os
import re
import shutil
import signal
import statistics
import sys
from collections import namedtuple

# N is a number of at most 64 bits. The name may hold anything but the start of another log line.
LOG_LINE = re.compile(
    r"\[pid\] (N) \[tcomm\] \(((?:(?!\[pid\]).)*?)\) \[state\] (\S) \[policy\] (\S+) "
    r"\[nice\] (-?N) \[vsize\] (N) \[task_cpu\] (N) \[utime\] (N) \[stime\] (N) \[cpu%\] (N\.N)%"
    .replace("N", r"\d{1,20}"), re.ASCII)
NOISE = re.compile(r"\0|\x1b\[[\d;]*[A-Za-z]")  # colour codes; UTF-16 without NUL bytes is ASCII
LONGEST = 4096  # characters; a log line is shorter
# The fields of a line, and by how many seconds utime + stime have grown since the line before.
Sample = namedtuple("Sample", "pid tcomm state policy nice vsize task_cpu utime stime cpu growth")
INTERVAL, SLACK = 0.3, 0.03  # seconds between two samples, and by which one may be late
TICK = 1 / os.sysconf("SC_CLK_TCK")  # seconds, the unit of utime and stime
HEIGHT, BLOCKS = 8, " ▁▂▃▄▅▆▇█"  # lines of a plot; indexed by eighths of a line


def parse(file):
    """The samples in a file. A log line may begin in one block of it and end in the next."""
    samples, totals, text = [], {}, ""
    while block := file.read(1 << 16):
        text, end = NOISE.sub("", text + block), 0
        for match in LOG_LINE.finditer(text):
            end = match.end()
            pid, *texts, utime, stime, cpu = match.groups()
            before, totals[pid] = totals.get(pid, 0), int(utime) + int(stime)
            growth = round(TICK * max(0, totals[pid] - before), 2)
            samples.append(Sample(pid, *texts, utime, stime, float(cpu), growth))
        text = text[max(end, len(text) - LONGEST):]
    return samples


def read_log(path):
    """The samples of a log; "-" is stdin. Without any, the program ends."""
    try:
        with open(0 if path == "-" else path, encoding="utf-8", errors="replace") as log:
            samples = parse(log)
    except OSError as error:
        sys.exit(f"avg_cpu_use.py: cannot read {path}: {error.strerror}")
    return samples or sys.exit(f"avg_cpu_use.py: {path} has no log line with a [cpu%] field; write "
                               "a log with ./main 42 2>log and give the model a prompt")


def average(samples, weighted=False):
    """The average CPU use. If weighted, a sample counts by its duration. The log does not have it,
    but an upper bound: the growth of the CPU time, to the next tick, by the CPU use."""
    weights = [min(INTERVAL, (sample.growth + TICK) / max(0.0001, sample.cpu / 100))
               if weighted else 1 for sample in samples]
    return sum(sample.cpu * weight for sample, weight in zip(samples, weights)) / sum(weights)


def split_prompts(samples):
    """A list of samples per prompt. The log does not mark prompts: a new one begins after a sample
    shorter than the interval, and where the process has used CPU time that is in no sample."""
    prompts, pid, was_short = [], None, False
    for sample in samples:
        surplus = sample.growth - INTERVAL * sample.cpu / 100
        slack = SLACK * max(1, sample.cpu / 100)
        if sample.pid != pid or was_short or abs(surplus) > slack:
            prompts.append([])
        prompts[-1].append(sample)
        pid, was_short = sample.pid, surplus < -slack
    return prompts


def plot_columns(prompts, width):
    """The columns of a plot: lists of successive samples, an empty one between two prompts."""
    if 2 * len(prompts) >= width:
        prompts = [[one for prompt in prompts for one in prompt]]  # no room to set them apart
    size = -(-sum(map(len, prompts)) // (width - 2 * len(prompts)))
    columns = []
    for prompt in prompts:
        columns += [prompt[i:i + size] for i in range(0, len(prompt), size)] + [[]]
    return columns[:-1]


def plot(name, samples, weighted):
    """The lines of a plot as wide as the terminal, or 100 columns wide without one."""
    uses, prompts = [sample.cpu for sample in samples], split_prompts(samples)
    top = 100 * max(1, round(max(uses) / 100 + 0.4))  # 109% is drawn as 100%, 110% is not
    width = max(3, (shutil.get_terminal_size().columns if os.isatty(1) else 100) - 6)
    columns = plot_columns(prompts, width)
    stretch = width // len(columns)
    yield f"{name}: {samples[0].tcomm}, {samples[0].policy}, nice {samples[0].nice}"
    heights = [HEIGHT / top * average(column) if column else 0 for column in columns]
    for row in reversed(range(HEIGHT)):
        label = {HEIGHT - 1: f"{top:.0f}%", 0: "0%"}.get(row, "")
        levels = (math.ceil(8 * min(1, max(0, height - row))) for height in heights)
        yield f"{label:>5} " + "".join(BLOCKS[level] * stretch for level in levels)
    cpus = [column[-1].task_cpu if column else "" for column in columns]
    for row in zip(*(cpu.rjust(max(map(len, cpus))) for cpu in cpus)):  # a line per digit
        yield "  CPU " + "".join(digit * stretch for digit in row)
    migrations = sum(old.pid == new.pid and old.task_cpu != new.task_cpu
                     for old, new in zip(samples, samples[1:]))
    yield (f"average {average(samples, weighted):.2f}%, minimum {min(uses):.2f}%, "
           f"median {statistics.median(uses):.2f}%, maximum {max(uses):.2f}%\n"
           f"samples: {len(samples)}, prompts: {len(prompts)}, migrations seen: {migrations}")


def write(out, logs, options):
    if options.csv:
        csv.writer(out).writerow(["log", "prompt", *Sample._fields])
    for path, samples in logs:
        if options.csv:
            for number, prompt in enumerate(split_prompts(samples), 1):
                csv.writer(out).writerows([path, number, *sample] for sample in prompt)
        elif options.plot:
            out.writelines(line.rstrip() + "\n" for line in plot(path, samples, options.weighted))
        else:
            prefix = f"{path}: " if len(logs) > 1 else ""
            out.write(f"{prefix}average cpu usage: {average(samples, options.weighted):.2f}%\n")


def main():
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C and a closed pipe end the program
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a traceback
    parser = argparse.ArgumentParser(description="Average or show the CPU use in logs of ./main.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--plot", action="store_true", help="draw the CPU use over time")
    form.add_argument("--csv", action="store_true", help="print all samples as CSV")
    parser.add_argument("--weighted", action="store_true", help="weight the average by time")
    parser.add_argument("log", nargs="+", help='what ./main wrote to stderr; "-" is stdin')
    options = parser.parse_args()

    logs = [(path, read_log(path)) for path in options.log]
    try:
        # UTF-8 for the blocks in any locale; a file name is printed as the bytes that it has.
        with open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False) as out:
            write(out, logs, options)
    except OSError as error:
        sys.exit(f"avg_cpu_use.py: cannot write the result: {error.strerror}")


if __name__ == "__main__":
    main()
