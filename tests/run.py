#!/usr/bin/env python3
"""Run the tests and end with one line: "N passed, N failed".

    python3 tests/run.py                 all of them
    python3 tests/run.py policies log    those whose name contains one of the words
"""
import signal
import sys
import time
import traceback
import unittest
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path += [str(TESTS / "helpers"), str(TESTS / "experiments")]
import script  # noqa: E402

TEST_LIMIT = 300  # seconds; the tests bound their own waits. To compile with sanitizers takes longest


class Report(unittest.TestResult):
    """Prints a line per test as it ends. A test whose subtests fail counts once."""

    def __init__(self):
        super().__init__()
        self.passed = 0
        self.failed = set()
        self.left_out = set()

    def startTest(self, test):
        super().startTest(test)
        print(f"{test.id()} ... ", end="", flush=True)
        self.started = time.monotonic()
        signal.alarm(TEST_LIMIT)

    def stopTest(self, test):
        signal.alarm(0)
        super().stopTest(test)

    def addSuccess(self, test):
        self.passed += 1
        print(f"ok ({time.monotonic() - self.started:.2f} s)", flush=True)

    def addSkip(self, test, reason):
        self.left_out.add(self.whole(test))
        print(f"skipped: {reason}", flush=True)

    def addFailure(self, test, error):
        self.failed.add(self.whole(test))
        trace = "".join(traceback.format_exception(*error))
        print(f"FAILED\n{test}\n{trace}", flush=True)

    addError = addFailure

    def addSubTest(self, test, subtest, error):
        if error:
            self.addFailure(subtest, error)

    @staticmethod
    def whole(test):
        """The name of the test that a subtest is a part of."""
        return getattr(test, "test_case", test).id()


def out_of_time(*_):
    raise AssertionError(f"not done after {TEST_LIMIT} seconds")


def main():
    """Run the tests that the command line names; returns the exit status."""
    signal.signal(signal.SIGALRM, out_of_time)
    loader = unittest.TestLoader()
    if len(sys.argv) > 1:
        loader.testNamePatterns = [f"*{word}*" for word in sys.argv[1:]]
    report = Report()
    loader.discover(str(TESTS)).run(report)

    skipped = len(report.left_out - report.failed)
    print(f"{report.passed} passed, {len(report.failed)} failed"
          + (f", {skipped} skipped" if skipped else ""))
    return 1 if report.failed or not report.passed else 0


if __name__ == "__main__":
    script.run(main)
