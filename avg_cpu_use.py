#!/usr/bin/env python3
"""Print the average CPU use of the inference process.

    ./main 42 2>log
    python3 avg_cpu_use.py log

The log has one line per sample; its last field, "[cpu%] 98.76%", is the share of one CPU that
the process used since the sample before. Whatever else stands in the file is skipped.
"""
import argparse
import re
import sys

# The file is read as bytes, so that no garbage in it can be a decoding error.
LOG_LINE = re.compile(rb"\[pid\] \d+ .*\[cpu%\] (\d+\.\d+)%\s*$")


def cpu_uses(path):
    """The [cpu%] of every log line in the file."""
    with open(path, "rb") as log:
        matches = (LOG_LINE.match(line) for line in log)
        return [float(match.group(1)) for match in matches if match]


def main():
    parser = argparse.ArgumentParser(description="Average the CPU use in a log of ./main.")
    parser.add_argument("log", help="what ./main wrote to stderr: ./main 42 2>log")
    path = parser.parse_args().log

    try:
        uses = cpu_uses(path)
    except OSError as error:
        sys.exit(f"avg_cpu_use.py: cannot read {path}: {error.strerror}")
    if not uses:
        sys.exit(f"avg_cpu_use.py: {path} has no line with a [cpu%] field; "
                 "write a log with ./main 42 2>log and ask the model something")
    print(f"average cpu usage: {sum(uses) / len(uses):.2f}%")


if __name__ == "__main__":
    main()
