"""The report of an experiment: a table in Markdown, each run's figures as CSV, a chart."""
import csv
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

from artifacts import TOP
from measuring import CPUS, SEED


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


def triple(values):
    return statistics.median(values), min(values), max(values)
