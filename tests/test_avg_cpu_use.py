"""avg_cpu_use.py: the average, the plot and the CSV of a log."""
import csv
import os
import pty
import random
import resource
import signal
import subprocess
import sys
import time

from support import MAIN, PATIENCE, TOP, SessionTestCase, wait_until

LINE = ("[pid] {pid} [tcomm] (inference) [state] R [policy] SCHED_OTHER [nice] 0 "
        "[vsize] 358088704 [task_cpu] {task_cpu} [utime] {utime} [stime] 3 [cpu%] {cpu}%\n")
BLOCKS = " ▁▂▃▄▅▆▇█"


def line(cpu, utime=10, task_cpu=4, pid=647017):
    """A line of a log."""
    return LINE.format(cpu=cpu, utime=utime, task_cpu=task_cpu, pid=pid)


def steady(uses, utime=0, **fields):
    """Lines of one reply: a sample per 300 ms, whose CPU time grows as its CPU use demands."""
    lines = []
    for use in uses:
        utime += round(0.3 * use)
        lines.append(line(f"{use:.2f}", utime, **fields))
    return "".join(lines)


class LogReaderTestCase(SessionTestCase):
    def average(self, *arguments, stdout=subprocess.PIPE, **options):
        return subprocess.run([sys.executable, TOP / "avg_cpu_use.py", *arguments], stdout=stdout,
                              stderr=subprocess.PIPE, encoding="utf-8", errors="surrogateescape",
                              timeout=PATIENCE, **options)

    def log(self, content):
        log = self.folder() / "log"
        log.write_bytes(content if isinstance(content, bytes) else content.encode())
        return log

    def average_of(self, content, *options, **keywords):
        return self.average(*options, self.log(content), **keywords)

    def lines_of(self, content, *options):
        result = self.average_of(content, *options)
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        return result.stdout.splitlines()

    def assert_average(self, result, average):
        self.assertEqual(result.stdout, f"average cpu usage: {average}%\n")
        self.assertEqual((result.returncode, result.stderr), (0, ""))

    def assert_refused(self, result, *words):
        self.assertEqual((result.returncode, result.stdout), (1, ""))
        self.assertRegex(result.stderr, r"\A[^\n]+\n\Z")
        for word in words:
            self.assertIn(word, result.stderr)


class AverageTest(LogReaderTestCase):
    def test_the_log_of_a_session_is_averaged(self):
        """What main wrote is what avg_cpu_use.py reads."""
        session = self.run_to_end(MAIN, "-d", "tests/tiny", 42, typed="Hello!\nHow are you?\n")
        uses = [float(line["cpu"]) for line in session.log_lines]
        self.assertGreaterEqual(len(uses), 2)
        self.assert_average(self.average_of(session.errors), f"{sum(uses) / len(uses):.2f}")

    def test_the_average_is_printed_with_two_digits(self):
        """average cpu usage: 98.76%"""
        self.assert_average(self.average_of(line("98.76")), "98.76")
        three = line("100.00") + line("0.00") + line("300.01")
        self.assert_average(self.average_of(three), "133.34")

    def test_other_lines_are_skipped(self):
        """Messages, garbage and a line that is cut short do not count."""
        mixed = (b"main: something happened, 50%\n\xff\0\x80 [cpu%] 7.00%\n"
                 + line("40.00").encode() + b"\n[pid] 12 [tcomm] (inf"
                 + b"\n" + line("60.00").encode() + b"[cpu%] 1.00%\n")
        self.assert_average(self.average_of(mixed), "50.00")

    def test_log_lines_are_found_anywhere_in_a_line(self):
        """After half a reply line, a time stamp, colour codes, docker compose's prefix or a log
        line that was cut off; two in one line; with colours inside; where a block ends.
        """
        sample = line("50.00").strip()
        coloured = sample.replace("[pid]", "\x1b[01;31m\x1b[K[pid]\x1b[m\x1b[K")  # grep --color
        text = "\n".join(["A mutex is a lo" + sample, "2026-11-28T10:43:04.123Z " + sample + "\r",
                          f"\x1b[36mchat-1  | \x1b[0m{sample}\x1b[0m", "\ufeff" + sample, coloured,
                          "[pid] 12 [tcomm] (inf" + sample, sample + "more" + sample, ""])
        rows = list(csv.DictReader(self.lines_of(text, "--csv")))
        self.assertEqual([row["pid"] + row["tcomm"] for row in rows], ["647017inference"] * 8)
        self.assert_average(self.average_of(text), "50.00")
        self.assertEqual(len(self.lines_of(("x" * 200 + sample) * 3000, "--csv")), 1 + 3000)

    def test_utf_16_and_nul_bytes(self):
        """PowerShell writes UTF-16 with a BOM; NUL bytes, of a log that was cut while main wrote it
        for example, drop no sample.
        """
        text = "wsl : Grüße, 你好\r\n" + line("60.00") + line("20.00").replace("\n", "\r\n")
        for content in (text.encode("utf-16"), text.encode("utf-16-be"),
                        b"\0" * 5000 + text.encode(), text.replace("utime", "ut\0ime").encode()):
            self.assert_average(self.average_of(content), "40.00")

    def test_garbage_takes_little_time_and_memory(self):
        """It is not kept, even if it looks like the start of a log line."""
        for unit in (b"[pid] 1 [tcomm] (", b"[pid] 1 [tcomm] (" + b") [state] R " * 5000):
            garbage = unit * ((24 << 20) // len(unit)) + line("50.00").encode()
            self.assert_average(self.average_of(garbage, preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_DATA, (32 << 20, 32 << 20))), "50.00")

    def test_a_file_without_a_log_line_is_refused(self):
        """One line on stderr names the file and explains what a log is; exit status 1."""
        noise = bytes(random.Random(1).getrandbits(8) for _ in range(100_000))
        for name, content in (("empty", b""), ("foreign", b"Dear diary,\n50%\n"),
                              ("binary", noise)):
            with self.subTest(name):
                self.assert_refused(self.average_of(content), "/log", "2>log")

    def test_numbers_that_cannot_be_are_no_samples(self):
        """Digits without end are garbage, in any field and for any output."""
        text = "".join(line("50.00").replace(name, name + digits * "9")
                       for digits in (21, 400, 5000) for name in ("[utime] ", "[cpu%] "))
        for option in ((), ("--plot",), ("--csv",), ("--weighted",)):
            self.assert_refused(self.average_of(text, *option), "no log line")

    def test_a_log_of_many_prompts_takes_little_time(self):
        """100,000 of them: seconds, not a minute."""
        text = "".join(line("50.00", utime=20 * i) for i in range(100_000))
        started = time.monotonic()
        self.lines_of(text, "--plot")
        self.assertLess(time.monotonic() - started, 20)

    def test_a_file_that_cannot_be_read_is_refused(self):
        """One line on stderr names the file and the cause; exit status 1."""
        folder = self.folder()
        self.assert_refused(self.average(folder / "none"), "none", "No such file")
        self.assert_refused(self.average(folder), str(folder), "directory")

    def test_wrong_usage_is_reported(self):
        """Usage on stderr, exit status 2."""
        for arguments in ((), ("--bad", "log"), ("--plot", "--csv", "log")):
            with self.subTest(arguments):
                result = self.average(*arguments)
                self.assertEqual((result.returncode, result.stdout), (2, ""))
                self.assertIn("usage:", result.stderr)

    def test_several_logs_get_a_line_each(self):
        """Each line begins with the log's name; "-" is stdin."""
        first, second = self.log(line("10.00")), self.log(line("30.00") + line("50.00"))
        result = self.average(first, "-", second, input=line("20.00"))
        self.assertEqual(result.stdout, f"{first}: average cpu usage: 10.00%\n"
                         "-: average cpu usage: 20.00%\n"
                         f"{second}: average cpu usage: 40.00%\n")
        self.assert_average(self.average("-", input=line("20.00")), "20.00")

    def test_a_weighted_average_counts_a_sample_by_its_duration(self):
        """A reply of a few ms does not count as one of 300 ms; a sample of a low CPU use does."""
        short_reply = steady([100, 100]) + line("40.00", 60)
        # 60 ticks, then none: at most 1 tick of 10 ms at 40%, 25 ms
        expected = (100 * 0.3 + 100 * 0.3 + 40 * 0.025) / 0.625
        self.assertEqual(os.sysconf("SC_CLK_TCK"), 100)
        self.assert_average(self.average_of(short_reply, "--weighted"), f"{expected:.2f}")
        self.assert_average(self.average_of(short_reply), "80.00")
        starved = line("0.00") + line("1.30") + line("0.00")
        self.assert_average(self.average_of(starved, "--weighted"), "0.43")


class CsvTest(LogReaderTestCase):
    def test_each_sample_is_a_row(self):
        """A header, then every field of the log, with the log's name and the prompt's number."""
        content = steady([100, 50]) + "noise\n" + line("20.00", 45)
        log = self.log(content)
        header, *rows = csv.reader(self.average("--csv", log).stdout.splitlines())
        self.assertEqual(header, ["log", "prompt", "pid", "tcomm", "state", "policy", "nice",
                                  "vsize", "task_cpu", "utime", "stime", "cpu", "growth"])
        same = ["647017", "inference", "R", "SCHED_OTHER", "0", "358088704", "4"]
        self.assertEqual(rows, [[str(log), "1", *same, "30", "3", "100.0", "0.33"],
                                [str(log), "1", *same, "45", "3", "50.0", "0.15"],
                                [str(log), "2", *same, "45", "3", "20.0", "0.0"]])


class PlotTest(LogReaderTestCase):
    def plot_of(self, content):
        """Its title, its rows of blocks without the labels, its rows of CPUs, its last lines."""
        title, *rows, figures, counts = self.lines_of(content, "--plot")
        bars = [row[6:] for row in rows if not row.startswith("  CPU")]
        cpus = [row[6:] for row in rows if row.startswith("  CPU")]
        return title, bars, cpus, [figures, counts]

    def heights(self, bars):
        """The height of each column in eighths of a line."""
        width = max(map(len, bars))
        columns = zip(*(bar.ljust(width) for bar in bars))
        return [sum(map(BLOCKS.index, column)) for column in columns]

    def test_the_bars_are_the_cpu_use(self):
        """64 eighths are 100%; each sample has a bar of the same width; the figures stand below."""
        title, bars, cpus, figures = self.plot_of(steady([100, 50, 25, 0.4]))
        self.assertTrue(title.endswith("/log: inference, SCHED_OTHER, nice 0"), title)
        self.assertEqual(self.heights(bars), [64] * 23 + [32] * 23 + [16] * 23 + [1] * 23)
        self.assertEqual(cpus, ["4" * 92])
        self.assertEqual(figures, ["average 43.85%, minimum 0.40%, median 37.50%, maximum 100.00%",
                                   "samples: 4, prompts: 1, migrations seen: 0"])

    def test_threads_get_a_scale_above_100(self):
        """The topmost label is the next multiple of 100%."""
        lines = self.lines_of(steady([250, 150]), "--plot")
        self.assertEqual(lines[1], " 300%")
        self.assertEqual(self.heights(self.plot_of(steady([300, 150]))[1]), [64] * 47 + [32] * 47)

    def test_prompts_are_set_apart_and_migrations_counted(self):
        """An empty column between two prompts: CPU time outside of all samples shows the border, a
        sample shorter than the interval, or another process, whose CPU is no migration.
        """
        content = steady([100, 100]) + steady([100, 100], utime=70, task_cpu=12)
        _, bars, cpus, figures = self.plot_of(content)
        self.assertEqual(self.heights(bars), [64] * 36 + [0] * 18 + [64] * 36)
        self.assertEqual(cpus, [" " * 54 + "1" * 36, "4" * 36 + " " * 18 + "2" * 36])
        for content, counts in (
                (content, (4, 2, 1)),
                (2 * line("90.00", 40) + steady([100, 100], utime=40), (4, 3, 0)),
                (steady([50] * 3) + steady([50] * 3, pid=5, task_cpu=0), (6, 2, 0))):
            self.assertEqual(self.plot_of(content)[3][1],
                             "samples: %d, prompts: %d, migrations seen: %d" % counts)

    def test_a_long_log_fits(self):
        """More samples than columns: a bar is the average of several; so with more prompts."""
        for content in (steady([100, 0] * 500), line("50.00") * 1000):
            _, bars, cpus, _ = self.plot_of(content)
            self.assertLessEqual(max(map(len, bars)), 94)
            self.assertGreater(max(map(len, bars)), 47)
            self.assertLessEqual(set(self.heights(bars)), set(range(29, 36)))

    def test_it_is_as_wide_as_the_terminal(self):
        """80 columns, or 132."""
        log = self.log(steady([100] * 3))
        for width in (80, 132):
            terminal, theirs = pty.openpty()
            self.addCleanup(os.close, terminal)
            subprocess.run(["stty", "cols", str(width)], stdin=theirs, check=True)
            environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
            result = self.average("--plot", log, stdout=theirs, env=environment)
            os.close(theirs)
            self.assertEqual(result.stderr, "")
            widest = max(map(len, os.read(terminal, 65536).decode().splitlines()[1:10]))
            self.assertEqual(widest, 6 + (width - 6) // 3 * 3)

    def test_any_locale_will_do(self):
        """The blocks come as UTF-8, and a file's name as the bytes that it has."""
        log = self.log(line("50.00"))
        name = os.fsencode(log.parent) + b"/\xff"
        os.rename(log, name)
        output = self.average("--plot", name, env={"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0",
                                                   "PYTHONUTF8": "0"}).stdout
        self.assertTrue(output.startswith(os.fsdecode(name)), output)
        self.assertIn("█", output)


class EndTest(LogReaderTestCase):
    def test_a_full_disk_and_a_closed_pipe(self):
        """One line on stderr; nothing when the reader is gone."""
        for form in ("--weighted", "--plot", "--csv"):
            with self.subTest(form), open("/dev/full", "w") as full:
                result = self.average_of(line("50.00"), form, stdout=full)
                self.assertEqual((result.returncode, result.stderr),
                                 (1, "avg_cpu_use.py: cannot write the result: "
                                     "No space left on device\n"))
                reader, writer = os.pipe()
                os.close(reader)
                result = self.average_of(line("50.00"), form, stdout=writer)
                os.close(writer)
                self.assertEqual(result.stderr, "")
                self.assertNotEqual(result.returncode, 0)

    def test_an_interrupt_ends_it_quietly(self):
        """Ctrl-C while stdin is read: no traceback."""
        session = self.start(sys.executable, TOP / "avg_cpu_use.py", "--plot", "-")
        session.send(line("50.00"))
        wait_until(lambda: not session.untaken_input(), "it reads its input")
        session.signal(signal.SIGINT)
        self.assertEqual((session.finish(), session.errors), (-signal.SIGINT, ""))
