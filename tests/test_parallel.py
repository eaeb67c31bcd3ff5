"""The pool of threads: the text of one thread, the front end's rules, nothing left running."""
import os
import re
import resource
import signal
import time

from support import (INFERENCE, MAIN, PARALLEL, PATIENCE, TINY, Process, SessionTestCase, processes,
                     real_time_works, replies, threads_of, wait_until)

PROMPTS = ("My name is Zelda.", "Tell me a story.", "What is my name?")
USAGE = re.compile(r"(?:Thread (\d+) has completed|main thread|Whole process)"
                   r" - user: \d+\.\d{4} s, system: \d+\.\d{4} s")


class TextTest(SessionTestCase):
    def test_every_number_of_threads_gives_the_text_of_one(self):
        """parallel prints the text of inference, for 1 to 16 threads and for the largest number."""
        expected = replies(self.run_to_end(INFERENCE, "-d", TINY, 42, *PROMPTS).text)
        self.assertEqual(len(expected), 3)
        for threads in (*range(1, 17), 64):
            with self.subTest(threads=threads):
                session = self.run_to_end(PARALLEL, "-d", TINY, threads, 42, *PROMPTS)
                self.assertEqual(replies(session.text), expected)
                self.assertEqual((session.status, session.errors), (0, ""))

    def test_a_long_prompt_gives_the_same_text(self):
        """So does a prompt of several passes, whose tokens the threads share."""
        prompt = "What is a pipe? " * 60
        expected = replies(self.run_to_end(INFERENCE, "-d", TINY, 7, prompt).text)
        for threads in (2, 3, 8):
            session = self.run_to_end(PARALLEL, "-d", TINY, threads, 7, prompt)
            self.assertEqual(replies(session.text), expected)

    def test_prompts_from_stdin(self):
        """Without prompts on the command line they are read, one per line."""
        expected = replies(self.run_to_end(INFERENCE, "-d", TINY, 42, *PROMPTS).text)
        session = self.run_to_end(PARALLEL, "-d", TINY, 2, 42, typed="\n".join(PROMPTS))
        self.assertEqual(replies(session.text), expected)


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

    def test_usage_that_cannot_be_printed_is_an_error(self):
        """The last flush fails: a line reports it, exit status 1."""
        def full_disk():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        session = self.run_to_end(PARALLEL, "-d", TINY, 2, 42, "x" * 4096, prepare=full_disk)
        self.assertEqual(session.status, 1)
        self.assertRegex(session.errors, r"\ACannot write the output: No space left[^\n]*\n\Z")

    def test_a_seed_of_0_is_taken_from_the_clock(self):
        """It is printed first."""
        text = self.run_to_end(PARALLEL, "-d", TINY, 2, 0, "Hello!").text
        self.assertRegex(text, r"\AThe seed is \d{15,}, from the clock\.\n")

    def test_bad_thread_counts_are_refused(self):
        """0, negative, no number, beyond the limit: an error and the usage, exit status 2."""
        for count in ("0", "-1", "two", "2x", "", "65", "99999999999999999999"):
            with self.subTest(count):
                session = self.run_to_end(PARALLEL, "-d", TINY, count, 42, "x")
                self.assertEqual((session.status, session.text), (2, ""))
                self.assertIn("Usage: ", session.errors)
                session = self.run_to_end(MAIN, "-d", TINY, "-j", count, 42)
                self.assertEqual((session.status, session.text), (2, ""))
        for arguments in ((), (2,), (2, "x")):
            self.assertEqual(self.run_to_end(PARALLEL, *arguments).status, 2)

    def test_a_pool_that_cannot_be_created_is_reported(self):
        """With no memory left for the threads' stacks it reports which one failed; exit status 1."""
        if "sanitize" in os.environ.get("PROBE_CFLAGS", ""):
            self.skipTest("a sanitizer needs more addresses than the limit that makes it fail")

        def limit_memory():
            resource.setrlimit(resource.RLIMIT_AS, (256 << 20, 256 << 20))
        session = self.run_to_end(PARALLEL, "-d", TINY, 64, 42, "x", prepare=limit_memory)
        self.assertEqual(session.status, 1)
        self.assertRegex(session.errors, r"\AThread \d+ of 64 cannot be created: .+\.\n\Z")


class FrontEndTest(SessionTestCase):
    def start_pool(self, *options, directory=TINY):
        session = self.start(MAIN, "-d", directory, "-j", 3, *options)
        session.read_until(">>> ")
        return session

    def test_the_chat_remembers(self):
        """main -j holds a conversation, and the CPU times of the engine follow at its end."""
        session = self.start_pool(42)
        self.assertEqual(session.ask("My name is Zelda."), "Hello Zelda! How can I help you?\n")
        session.ask("What is a pipe?")
        self.assertEqual(session.ask("What is my name?"), "Your name is Zelda.\n")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertEqual(len(USAGE.findall(session.text)), 5)
        self.assertEqual({line["tcomm"] for line in session.log_lines}, {"parallel"})

    def test_threads_may_use_every_cpu(self):
        """No thread is bound to a CPU."""
        session = self.start_pool(42)
        session.ask("Tell me a story.")
        for thread in threads_of(session.engine):
            self.assertEqual(os.sched_getaffinity(thread), os.sched_getaffinity(0))

    def test_the_log_passes_100_percent(self):
        """cpu% is that of all threads."""
        if len(os.sched_getaffinity(0)) < 2:
            self.skipTest("there is one CPU only")
        # Real-time threads get two CPUs even on a busy machine, others need idle ones.
        policy = ("-s", "FIFO") if real_time_works() else ()
        session = self.start_pool("-m", 50, *policy, 42, directory=self.noise_model())
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
        session = self.start_pool("-m", 50, 42, directory=self.noise_model())
        session.ask("Hello!")

        def ticks():
            return next(process.cpu_time for process in processes()
                        if process.pid == session.engine)
        wait_until(lambda: all(self.state(session.engine, thread) == "S"
                               for thread in threads_of(session.engine)), "all threads sleep")
        before = ticks()
        time.sleep(0.5)  # long enough for a busy loop to show
        self.assertLessEqual(ticks() - before, 0.02)

    @staticmethod
    def state(pid, thread):
        return Process(f"{pid}/task/{thread}").state

    def test_interrupts_and_death_while_generating(self):
        """As with one thread: passed on and reported; a killed engine is noticed at once."""
        for number, status, ending in ((signal.SIGINT, 130, "130 (Interrupt)"),
                                     (signal.SIGTERM, 143, "143 (Terminated)")):
            session = self.start_pool("-m", 900, 42, directory=self.noise_model())
            session.send("Go on.\n")
            session.wait_for_log_lines(1)
            session.signal(number)
            self.assert_ends(session, status, ending)
        session = self.start_pool("-m", 900, 42, directory=self.noise_model())
        session.send("Go on.\n")
        session.wait_for_log_lines(1)
        os.kill(session.engine, signal.SIGKILL)
        self.assert_ends(session, 1, "137 (Killed)")

    def test_the_end_of_the_input_lets_the_reply_finish(self):
        """The prompt before the end of the input is answered."""
        session = self.start_pool(42)
        session.send("What is a pipe?")
        session.end_input()
        self.assert_ends(session, 0, "0")
        self.assertIn("one-way channel", session.text)
