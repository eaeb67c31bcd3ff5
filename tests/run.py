#!/usr/bin/env python3
"""Run the tests and end with one line: "N passed, N failed".

    python3 tests/run.py                 all of them
    python3 tests/run.py policies log    those whose name contains one of the words
"""
import os
import signal
import sys
import threading
import time
import unittest
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path += [str(TESTS / "helpers"), str(TESTS / "experiments")]
import probes  # noqa: E402

MANY = 50         # tests, some of which need the probe: it is built while the first ones run
TEST_LIMIT = 300  # seconds; to compile with sanitizers takes longest


class Result(unittest.TextTestResult):
    """Limits the time of a test, and prints it."""
    def startTest(self, test):
        super().startTest(test)
        self.started = time.monotonic()
        signal.alarm(TEST_LIMIT)

    def addSuccess(self, test):
        self.stream.write(f"{time.monotonic() - self.started:.2f} s, ")
        super().addSuccess(test)

    def stopTest(self, test):
        signal.alarm(0)
        super().stopTest(test)


def out_of_time(*_):
    raise AssertionError(f"not done after {TEST_LIMIT} seconds")


def names(results):
    """The names of the tests in a list of failures or skips; a test with subtests counts once."""
    return {getattr(test, "test_case", test).id() for test, _ in results}


def main():
    """Run the tests that the command line names; returns the exit status."""
    signal.signal(signal.SIGALRM, out_of_time)
    loader = unittest.TestLoader()
    loader.testNamePatterns = [f"*{word}*" for word in sys.argv[1:]] or None
    tests = loader.discover(str(TESTS))
    if tests.countTestCases() > MANY:
        threading.Thread(target=probes.probe_program, daemon=True).start()
    result = unittest.TextTestRunner(sys.stdout, False, 2, resultclass=Result).run(tests)
    failed = names(result.failures + result.errors)
    skipped = names(result.skipped) - failed
    passed = result.testsRun - len(failed | skipped)
    print(f"{passed} passed, {len(failed)} failed{f', {len(skipped)} skipped' if skipped else ''}")
    return 1 if failed or not passed else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, BrokenPipeError) as end:  # Ctrl-C, run.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for python's last flush
        sys.exit(130 if isinstance(end, KeyboardInterrupt) else 1)
