"""make policies, threads and trace: their figures, their reports, their end."""
import csv
import platform
import re
import shutil
import signal
import statistics
import sys
import xml.etree.ElementTree
from types import SimpleNamespace

import experiments
from measuring import Reply
from support import LOG_LINE, TESTS, TINY, SessionTestCase, wait_until
from test_policies import drop_privilege

SCRIPT = (sys.executable, TESTS / "experiments" / "experiments.py")
SVG = "{http://www.w3.org/2000/svg}"


class ExperimentTestCase(SessionTestCase):
    def experiment(self, name, *options, **keywords):
        """Run it with the tiny model. Its output, its folder, the rows of its CSV, its report."""
        results = self.folder()
        session = self.run_to_end(*SCRIPT, name, "--model", TINY, "--results", results, *options,
                                  **keywords)
        self.assertEqual((session.status, session.errors), (0, ""))
        folder, = results.iterdir()
        self.assertTrue(folder.name.startswith(name))
        with open(folder / "runs.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return session.text, folder, rows, (folder / "report.md").read_text(encoding="utf-8")

    def cells(self, report):
        """The rows of all tables, each a list of cells."""
        lines = [line.split("|")[1:-1] for line in report.splitlines() if line[:1] == "|"]
        return [[cell.strip() for cell in line] for line in lines]

    def assert_cell(self, cell, values, form):
        """A cell is the median of the values, with the least and the most."""
        texts = [form.format(value) for value in
                 (statistics.median(values), min(values), max(values))]
        self.assertEqual(cell, "{} ({}-{})".format(*texts))


class PolicyExperimentTest(ExperimentTestCase):
    def test_the_figures_are_those_of_the_logs(self):
        """Each run's log shows the policy and the CPU use; the report has medians of the runs."""
        output, folder, rows, report = self.experiment("policies", "--runs", 2, "--tokens", 40,
                                                     "--limit", 0.5)
        self.assertEqual(len(rows), 2 * 2 * len(experiments.POLICIES))
        tables = self.cells(report)
        for row in rows:
            if row.get("refused"):
                continue
            with self.subTest(policy=row["policy"], load=row["load"], run=row["run"]):
                lines = (folder / "logs" / row["log"]).read_text().splitlines()
                samples = [LOG_LINE.fullmatch(line) for line in lines]
                uses = [float(sample["cpu"]) for sample in samples]
                self.assertAlmostEqual(float(row["cpu"]), sum(uses) / len(uses))
                name, _, detail = row["policy"].partition(", ")
                self.assertEqual({sample["policy"] for sample in samples}, {name})
                if detail.startswith("nice"):
                    self.assertEqual({sample["nice"] for sample in samples}, {detail[5:]})
        for i, load in enumerate(experiments.LOADS):
            mine = [row for row in rows if (row["policy"], row["load"])
                    == ("SCHED_OTHER, nice 0", load)]
            cells = [cells for cells in tables if cells[0].startswith("SCHED_OTHER, nice 0")][i]
            self.assert_cell(cells[1], [float(row["speed"]) for row in mine], "{:.2f}")
            self.assert_cell(cells[2], [float(row["cpu"]) for row in mine], "{:.1f}")
            self.assert_cell(cells[3], [int(row["switches"]) for row in mine], "{:.0f}")
            self.assert_cell(cells[4], [int(row["migrations"]) for row in mine], "{:.0f}")
        for fact in (platform.release(), "commit: ", "seed: 42", "model: " + str(TINY)):
            self.assertIn(fact, report)
        self.assertIn(report[:report.index("![")].strip(), output)
        self.assertRegex(output, r"\A.* It should take at most \d+ (seconds|minutes)\.\n"
                                f"The model: {TINY}")

    def test_a_refused_policy_is_a_row_with_the_reason(self):
        """Without privilege the real-time policies are refused, and all others measured."""
        _, folder, rows, report = self.experiment("policies", "--runs", 1, "--tokens", 5,
                                                  "--limit", 0.5, prepare=drop_privilege)
        refused = {row["policy"] for row in rows if row["refused"]}
        self.assertEqual(refused, {"SCHED_FIFO", "SCHED_RR", "SCHED_DEADLINE, 10%",
                                   "SCHED_DEADLINE, 50%"})
        for policy in refused:
            self.assertIn([policy, "refused", "", "", ""], self.cells(report))
            self.assertRegex(report, f"\n{policy}: .*(EPERM|not permitted).*CAP_SYS_NICE")
        chart = xml.etree.ElementTree.parse(folder / "chart.svg").getroot()
        bars = [rect for rect in chart.iter(SVG + "rect") if rect.get("height") == "13"]
        self.assertEqual(len(bars), 2 * (len(experiments.POLICIES) - len(refused)))

    def test_an_interrupted_reply_has_the_speed_of_what_came(self):
        """A quarter of the text of 101 tokens in 5 s after the first byte: 5 tok/s."""
        whole = SimpleNamespace(tokens=100, text="x" * 400)
        part = SimpleNamespace(info=None, text="x" * 100, first=7.0, end=12.0)
        speed = Reply.tokens_per_second
        self.assertEqual(speed(part, whole), 5)
        nothing = SimpleNamespace(info=None, text="", first=0.0, end=20.0)
        self.assertEqual(speed(nothing, whole), 0)

    def test_the_conclusions_follow_from_the_figures(self):
        """Shares, highest and lowest medians of made-up figures."""
        def runs(*speeds):
            return [{"speed": speed} for speed in speeds]
        conclusions = experiments.policy_conclusions([
            ("SCHED_OTHER, nice 0", runs(100, 100, 90), runs(50, 52, 48), ""),
            ("SCHED_BATCH, nice 0", runs(98, 99, 97), runs(52, 56, 57), ""),
            ("SCHED_OTHER, nice 19", runs(80), runs(2), ""),
            ("SCHED_BATCH, nice 19", runs(80), runs(3), ""),
            ("SCHED_FIFO", [], [], "refused")])
        self.assertEqual(conclusions, (
            "Alone, SCHED_OTHER, nice 0 has the highest median speed (100.00 tok/s) and "
            "SCHED_OTHER, nice 19 the lowest (80.00 tok/s). "
            "Beside the load, SCHED_BATCH, nice 0 has the highest median speed (56.00 tok/s) and "
            "SCHED_OTHER, nice 19 the lowest (2.00 tok/s). "
            "Of its speed alone, each keeps beside the load: SCHED_OTHER, nice 0 50.0%; "
            "SCHED_BATCH, nice 0 57.1%; SCHED_OTHER, nice 19 2.5%; SCHED_BATCH, nice 19 3.8%."))


class ThreadExperimentTest(ExperimentTestCase):
    def test_speed_up_and_efficiency_follow_from_the_runs(self):
        """Medians of the CSV's speeds, divided by those of one thread and by the threads."""
        _, folder, rows, report = self.experiment("threads", "--runs", 2, "--tokens", 20)
        self.assertEqual(len(rows), 2 * 2 * len(experiments.THREADS))
        tables = self.cells(report)
        for part in experiments.PARTS:
            speeds = {count: [float(row["speed"]) for row in rows
                              if (row["part"], row["threads"]) == (part, str(count))]
                      for count in experiments.THREADS}
            start = tables.index(next(cells for cells in tables if cells[0] == f"threads, {part}"))
            for cells in tables[start + 2:start + 2 + len(speeds)]:
                count = int(cells[0])
                self.assert_cell(cells[1], speeds[count], "{:.1f}")
                ratio = statistics.median(speeds[count]) / statistics.median(speeds[1])
                self.assertAlmostEqual(float(cells[4]), ratio, delta=0.006)
                self.assertAlmostEqual(float(cells[5][:-1]), 100 * ratio / count, delta=0.6)
        for row in rows:  # clock ticks of CPU time
            self.assertLess(float(row["user"]) + float(row["system"]), 10)
        self.assertIn("prefers-color-scheme: dark", (folder / "chart.svg").read_text())


class TraceTest(SessionTestCase):
    """make trace"""
    SCRIPT = (sys.executable, TESTS / "experiments" / "trace.py")

    def assert_trace(self, options, *steps):
        """The diagram has these steps in this order, fits 80 columns, and is saved as a picture."""
        if not shutil.which("strace"):
            self.skipTest("strace is not installed")
        results = self.folder()
        session = self.run_to_end(*self.SCRIPT, *options, "--results", results)
        self.assertEqual((session.status, session.errors), (0, ""))
        folder, = results.iterdir()
        diagram = (folder / "trace.txt").read_text()
        self.assertTrue(session.text.startswith(diagram))
        self.assertRegex(diagram, "(?s)" + ".*".join(map(re.escape, steps)))
        self.assertLessEqual(max(map(len, diagram.splitlines())), 80)
        times = [float(line.split()[0]) for line in diagram.splitlines()[1:]]
        self.assertEqual(times, sorted(times))
        picture = xml.etree.ElementTree.parse(folder / "trace.svg")
        arrows = [path for path in picture.iter(SVG + "path") if path.get("class") != "axis"]
        self.assertEqual(len(arrows), len(times))

    def test_the_path_of_a_prompt(self):
        """From the prompt to the log line and the end, each step with its direction."""
        self.assert_trace(
            (), "|------>|       |       |    execve main", "|------>|       |    fork",
            "|------>|    execve inference", "|    load model.bin", "<------|       |    pipe",
            "|------>|       |       |    input \"My name is Zelda.\\n\"",
            "|------>|       |    pipe \"My name", "|------>|       |    SIGUSR1",
            "|<--------------|       |    output \"Hello Zelda! How can",
            "<------|       |    pipe", "<------|       |    SIGUSR2", "|-------------->|    read /proc/", "log line, cpu%",
            "output \">>> \"", "end of input", "SIGUSR1", "exit with 0",
            "|       |<--------------|    wait: ", "output \"Child exited with 0", "exit with 0")

    def test_threads(self):
        """They are created, sleep in futex(2) and are woken."""
        self.assert_trace(("-j", 2), "execve parallel", "create thread", "sleeps", "input", "wakes")

    def test_without_strace(self):
        """A line says how to get it."""
        session = self.run_to_end(*self.SCRIPT, env={"PATH": ""})
        self.assert_error_line(session, 1, "strace(1)", "install")


class EndTest(ExperimentTestCase):
    def beside_the_load(self, **options):
        """A session of make policies at the moment when a load runs."""
        session = self.start(*SCRIPT, "policies", "--model", self.noise_model(), "--results",
                             self.folder(), "--tokens", 32, **options)
        session.read_until("It should take")
        everything = 3 + len(experiments.CPUS)  # the script, main, the engine and the load
        wait_until(lambda: len(session.family()) == everything, "a load runs")
        return session

    def test_an_interrupt_ends_everything(self):
        """Ctrl-C: no traceback, nothing left running. The progress was shown until then."""
        session = self.beside_the_load(terminal=True, errors_to_terminal=True)
        session.read_until("2 of 78: SCHED_OTHER, nice 0 beside the load")
        session.send("\x03")
        session.read_until("Interrupted.")
        session.wait_for_orphans()  # one may have been started just then, and nobody waits for it
        self.assertEqual(session.process.returncode, 1)
        self.assertNotIn("Traceback", session.text)

    def test_a_kill_ends_everything(self):
        """The load and the engine end with a script that is killed."""
        session = self.beside_the_load()
        session.signal(signal.SIGKILL)
        session.wait_for_orphans()
