"""The pool of threads: the text of one thread, the front end's rules, nothing left running."""
import os
import re
import resource
import time

from support import (INFERENCE, PARALLEL, PATIENCE, TINY, Process, SessionTestCase,
                     is_allowed, replies, threads_of, wait_until)

PROMPTS = ("My name is Zelda.", "Tell me a story.", "What is my name?")
USAGE = re.compile(r"(?:Thread (\d+) has completed|main thread|Whole process)"
                   r" - user: \d+\.\d{4} s, system: \d+\.\d{4} s")


class TextTest(SessionTestCase):
    def test_every_number_of_threads_gives_the_text_of_one(self):
        """Also for a prompt of several passes, whose tokens the threads share."""
        for threads, prompts in ((range(1, 17), PROMPTS), ((64,), PROMPTS),
                                 ((2, 3, 8), ["What is a pipe? " * 60])):
            expected = replies(self.run_to_end(INFERENCE, "-d", TINY, 42, *prompts).text)
            self.assertEqual(len(expected), len(prompts))
            for count in threads:
                with self.subTest(threads=count):
                    session = self.run_to_end(PARALLEL, "-d", TINY, count, 42, *prompts)
                    self.assertEqual(replies(session.text), expected)
                    self.assertEqual((session.status, session.errors), (0, ""))

    def test_prompts_from_stdin_and_a_seed_from_the_clock(self):
        """The text is that of the same prompts on the command line, with the seed that is printed
        first.
        """
        session = self.run_to_end(PARALLEL, "-d", TINY, 2, 0, typed="\n".join(PROMPTS))
        seed = re.match(r"The seed is (\d{15,}), from the clock\.\n", session.text)
        expected = self.run_to_end(INFERENCE, "-d", TINY, seed[1], *PROMPTS)
        self.assertEqual(replies(session.text[seed.end():]), replies(expected.text))


class UsageTest(SessionTestCase):
    @staticmethod
    def times(text):
        """The seconds of CPU time in each line of the usage."""
        return [float(user) + float(system)
                for user, system in re.findall("user: (.*) s, system: (.*) s", text)]

    def test_the_time_of_each_thread_is_printed(self):
        """A line per thread, then the main thread and the whole process."""
        for threads in (1, 2, 5):
            text = self.run_to_end(PARALLEL, "-d", TINY, threads, 42, "Hello!").text
            lines = text.splitlines()[-threads - 2:]
            self.assertEqual([match and match[1] for match in map(USAGE.fullmatch, lines)],
                             [*map(str, range(threads)), None, None])
            self.assertTrue(lines[-2].startswith("main thread"), text)
            self.assertTrue(lines[-1].startswith("Whole process"), text)
            self.assertEqual(text.count(" - user: "), threads + 2)

    def test_the_times_add_up(self):
        """The whole process is the sum of the lines above it, and what the kernel accounts."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        text = self.run_to_end(PARALLEL, "-d", self.noise_model(), "-m", 100, 2, 42, "Go on.").text
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        *parts, whole = self.times(text)
        self.assertAlmostEqual(sum(parts), whole, delta=1e-3)
        used = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
        self.assertAlmostEqual(whole, used, delta=used / 10)

    def test_threads_beyond_the_cpus_sleep(self):
        """There are no more workers than CPUs: the other threads use no CPU time."""
        cpus = len(os.sched_getaffinity(0))
        if cpus >= 64:
            self.skipTest("no more than 64 threads are allowed, and there are as many CPUs")
        text = self.run_to_end(PARALLEL, "-d", TINY, cpus + 3, 42, "Tell me a story.").text
        self.assertLess(max(self.times(text)[cpus:cpus + 3]), 0.005, text)

    def test_a_pool_that_cannot_be_created_is_reported(self):
        """With no memory left for the stacks a line reports which thread failed; exit status 1."""
        if "sanitize" in os.environ.get("PROBE_CFLAGS", ""):
            self.skipTest("a sanitizer needs more addresses than the limit that makes it fail")

        def limit_memory():
            resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
        session = self.run_to_end(PARALLEL, "-d", TINY, 64, 42, "x", prepare=limit_memory)
        self.assertEqual(session.status, 1)
        self.assertRegex(session.errors, r"\AThread \d+ of 64 cannot be created: .+\.\n\Z")


class FrontEndTest(SessionTestCase):
    def test_the_chat_remembers(self):
        """main -j holds a conversation, and the CPU times of the engine follow at its end. No
        thread is bound to a CPU.
        """
        session = self.chat("-j", 3)
        self.assertEqual(session.ask("My name is Zelda."), "Hello Zelda! How can I help you?\n")
        session.ask("What is a pipe?")
        self.assertEqual(session.ask("What is my name?"), "Your name is Zelda.\n")
        for thread in threads_of(session.engine):
            self.assertEqual(os.sched_getaffinity(thread), os.sched_getaffinity(0))
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(len(USAGE.findall(session.text)), 5)
        self.assertEqual({line["tcomm"] for line in session.log_lines}, {"parallel"})

    def test_the_log_passes_100_percent(self):
        """cpu% is that of all threads."""
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("there is one CPU only")
        # Real-time threads get two CPUs even on a busy machine, others need idle ones.
        policy = ("-s", "FIFO") if is_allowed() else ()
        session = self.chat("-j", 3, "-m", 50, *policy, folder=self.noise_model())
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            session.ask("Go on.")
            if any(float(line["cpu"]) > 110 for line in session.log_lines):
                return
        if not policy:
            self.skipTest("needs two idle CPUs, or CAP_SYS_NICE on a busy machine")
        self.fail(session.errors)

    def test_an_idle_chat_uses_no_cpu(self):
        """Between prompts all threads sleep."""
        session = self.chat("-j", 3, "-m", 20, folder=self.noise_model())
        session.ask("Hello!")
        engine = session.engine
        wait_until(lambda: all(Process(f"{engine}/task/{thread}").state == "S"
                               for thread in threads_of(engine)), "all threads sleep")
        before = Process(engine).cpu_time
        time.sleep(0.5)  # long enough for a busy loop to show
        self.assertLessEqual(Process(engine).cpu_time - before, 0.02)
