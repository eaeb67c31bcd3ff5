"""Every scheduling policy, set by main, or refused by the kernel and reported with the cause."""
import ctypes
import os
import platform
import resource
import struct
import unittest
from pathlib import Path

from support import LIBC, MAIN, TINY, SessionTestCase, is_allowed, threads_of

SCHED_DEADLINE = 6  # not in the os module
SYS_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
PR_CAPBSET_DROP, CAP_SYS_NICE = 24, 23
TIMES = ("-D", "10ms:20ms:20ms")


def drop_privilege():
    """Between fork and exec: drop CAP_SYS_NICE, also if root runs the tests."""
    LIBC.prctl(PR_CAPBSET_DROP, CAP_SYS_NICE, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
    resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))


class PolicyTestCase(SessionTestCase):
    def need_real_time(self):
        if not is_allowed():
            self.skipTest("real-time policies need CAP_SYS_NICE")

    def need_all_cpus(self):
        self.need_real_time()
        if len(os.sched_getaffinity(0)) < os.cpu_count():
            self.skipTest("SCHED_DEADLINE needs an affinity of all CPUs")


class PolicyTest(PolicyTestCase):
    def assert_policy(self, options, name, number, nice=None, priority=0):
        """A chat with these options runs, and the log and the kernel show the policy."""
        with self.subTest(options):
            session = self.chat(*options)
            session.ask("Hello!")
            line = session.log_lines[-1]
            self.assertEqual(line["policy"], name)
            own = os.getpriority(os.PRIO_PROCESS, 0)
            self.assertEqual(int(line["nice"]), own if nice is None else nice)
            self.assertEqual(os.sched_getscheduler(session.engine), number)
            self.assertEqual(os.sched_getparam(session.engine).sched_priority, priority)
            self.assertEqual(os.sched_getscheduler(session.pid), os.sched_getscheduler(0))
            session.end_input()
            self.assert_ends(session, 0, "0")

    def test_other_batch_and_idle_take_a_nice_value(self):
        """SCHED_NORMAL is SCHED_OTHER. Names are taken in any case, with and without SCHED_."""
        self.assert_policy((), "SCHED_OTHER", os.SCHED_OTHER)
        self.assert_policy(("-n", 19), "SCHED_OTHER", os.SCHED_OTHER, nice=19)
        for name, number in (("OTHER", os.SCHED_OTHER), ("BATCH", os.SCHED_BATCH),
                             ("IDLE", os.SCHED_IDLE)):
            for given in (name, f"Sched_{name.lower()}"):
                self.assert_policy(("-s", given), f"SCHED_{name}", number)
            self.assert_policy(("-s", name, "-n", 19), f"SCHED_{name}", number, nice=19)
        self.assert_policy(("-s", "NORMAL", "-n", 19), "SCHED_OTHER", os.SCHED_OTHER, nice=19)

    def test_a_negative_nice_value_is_set(self):
        """-n -20 is the lower end of the range."""
        if not is_allowed("os.setpriority(os.PRIO_PROCESS, 0, -20)"):
            self.skipTest("a negative nice value needs CAP_SYS_NICE")
        self.assert_policy(("-n", -20), "SCHED_OTHER", os.SCHED_OTHER, nice=-20)
        self.assert_policy(("-s", "BATCH", "-n", -1), "SCHED_BATCH", os.SCHED_BATCH, nice=-1)

    def test_fifo_and_rr_take_a_priority(self):
        """-r 1 to 99, 1 if it is not given."""
        self.need_real_time()
        for name, number in (("FIFO", os.SCHED_FIFO), ("RR", os.SCHED_RR)):
            self.assert_policy(("-s", name), f"SCHED_{name}", number, priority=1)
            self.assert_policy(("-s", name, "-r", 99), f"SCHED_{name}", number, priority=99)

    def test_deadline_takes_three_times(self):
        """Each in its unit, and none in the place of another."""
        self.need_all_cpus()
        if platform.machine() not in SYS_SCHED_GETATTR:
            self.skipTest("the number of the system call is not known")
        session = self.chat("-s", "DEADLINE", "-D", "2000us:20ms:30000000")
        session.ask("Hello!")
        self.assertEqual(session.log_lines[-1]["policy"], "SCHED_DEADLINE")
        # struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period
        attributes = ctypes.create_string_buffer(48)
        self.assertEqual(LIBC.syscall(SYS_SCHED_GETATTR[platform.machine()], session.engine,
                                      attributes, len(attributes), 0), 0)
        _, policy, _, _, _, *times = struct.unpack("<IIQiIQQQ", attributes)
        self.assertEqual((policy, *times), (SCHED_DEADLINE, 2_000_000, 20_000_000, 30_000_000))

    def test_policy_and_nice_reach_every_thread(self):
        """Both belong to each thread by itself. DEADLINE forbids new threads, so the engine must
        have created them; three may have a tenth of a CPU each.
        """
        for options, number, nice in ((("-s", "BATCH", "-n", 7), os.SCHED_BATCH, 7),
                                      (("-s", "DEADLINE", "-D", "1ms:10ms:10ms"), SCHED_DEADLINE,
                                       os.getpriority(os.PRIO_PROCESS, 0))):
            if number == SCHED_DEADLINE:
                self.need_all_cpus()
            session = self.chat("-j", 3, *options)
            session.ask("Hello!")
            self.assertEqual([(os.sched_getscheduler(thread),
                               os.getpriority(os.PRIO_PROCESS, thread))
                              for thread in threads_of(session.engine)], [(number, nice)] * 3)

    def test_the_policy_is_set_when_the_model_is_loaded(self):
        """Every policy in the same way: before the first prompt, not before the engine is ready."""
        session = self.start_fake("""
            put(f"loading: {os.sched_getscheduler(0)}\\n")
            wait_for("loaded")
            next_prompt()
            put(f"prompt: {os.sched_getscheduler(0)}\\n")
            next_prompt()
            """, "-s", "BATCH")
        session.read_until(f"loading: {os.sched_getscheduler(0)}\n")
        session.release("loaded")
        session.send("Hello!\n")
        session.read_until(f"prompt: {os.SCHED_BATCH}\n")

    def test_the_nice_value_is_main_s_own_by_default(self):
        """An unprivileged user may start main with nice."""
        def be_nice():
            drop_privilege()
            os.nice(5)
        for options in ((), ("-s", "BATCH"), ("-s", "IDLE")):
            session = self.chat(*options, prepare=be_nice)
            session.ask("Hello!")
            nice = int(session.log_lines[0]["nice"])
            self.assertEqual(nice, os.getpriority(os.PRIO_PROCESS, 0) + 5)


class RefusalTest(PolicyTestCase):
    def assert_refused(self, options, *words, prepare=None):
        with self.subTest(options):
            session = self.chat(*options, prepare=prepare)
            session.finish()
            self.assert_error_line(session, 1, *words)
            self.assertNotIn("needs root", session.errors)  # which root has, and may not suffice

    def test_a_missing_privilege_is_reported(self):
        """EPERM names the policy and CAP_SYS_NICE; exit status 1 with stdin still open."""
        lower = os.getpriority(os.PRIO_PROCESS, 0) - 1
        for options in (("-s", "FIFO"), ("-s", "RR", "-r", 50), ("-s", "DEADLINE", *TIMES)):
            self.assert_refused(options, f"SCHED_{options[1]}", "CAP_SYS_NICE", "container",
                                prepare=drop_privilege)
        for policy in ("OTHER", "BATCH", "IDLE"):
            self.assert_refused(("-s", policy, "-n", lower), f"SCHED_{policy}", "CAP_SYS_NICE",
                                f"the nice value {lower}", prepare=drop_privilege)

    def test_after_a_refusal_no_prompt_is_answered(self):
        """The engine is told to exit, and gets no prompt."""
        session = self.start_fake("put('Prompt: ' + next_prompt().decode())\n",
                                  "-s", "FIFO", prepare=drop_privilege)
        session.send("Hello!\n")
        self.assert_ends(session, 1, "0")
        self.assertNotIn("Prompt: ", session.text)

    def test_an_affinity_too_narrow_for_deadline_is_reported(self):
        """EPERM in spite of the privilege: the message mentions the affinity."""
        self.need_all_cpus()
        if os.cpu_count() == 1:
            self.skipTest("one CPU is all there is")
        cpu = min(os.sched_getaffinity(0))
        self.assert_refused(("-s", "DEADLINE", *TIMES), "SCHED_DEADLINE", "affinity",
                            prepare=lambda: os.sched_setaffinity(0, {cpu}))

    def test_impossible_deadlines_are_reported(self):
        """EINVAL: times that are too short."""
        for times in ("500:20ms:20ms", "0:0:0"):
            self.assert_refused(("-s", "DEADLINE", "-D", times), "SCHED_DEADLINE",
                                "runtime >= 1024 ns")

    def test_more_deadlines_than_cpus_are_reported(self):
        """EBUSY: each thread needs a whole CPU; the message mentions all threads."""
        self.need_all_cpus()
        if Path("/proc/sys/kernel/sched_rt_runtime_us").read_text().strip() == "-1":
            self.skipTest("this kernel is set to grant any deadline")
        if os.cpu_count() > 64:
            self.skipTest("there are CPUs for as many threads as there may be")
        options = ("-j", min(os.cpu_count() + 1, 64), "-s", "DEADLINE", "-D", "20ms:20ms:20ms")
        self.assert_refused(options, "SCHED_DEADLINE", "to all threads")

    def test_a_refusal_ends_the_chat_also_if_it_cannot_be_printed(self):
        """stderr or stdout is a full pipe: the line is lost."""
        full = self.full_pipe()
        chats = [self.start(MAIN, "-d", TINY, "-s", "FIFO",
                            prepare=lambda fd=fd: (drop_privilege(), os.dup2(full, fd)))
                 for fd in (1, 2)]
        self.assertEqual([session.finish() for session in chats], [1, 1])

    def test_a_refused_default_is_no_reason_to_end(self):
        """Without -s and -n the engine keeps a policy of main's that it may not leave; nor is
        asking for just that one refused.
        """
        def be_idle():
            drop_privilege()
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        for options in ((), ("-s", "IDLE")):
            with self.subTest(options):
                session = self.run_to_end(MAIN, "-d", TINY, *options, typed="Hello!\n",
                                          prepare=be_idle)
                self.assertEqual(session.status, 0, session.errors)
                self.assertEqual({line["policy"] for line in session.log_lines}, {"SCHED_IDLE"})


if __name__ == "__main__":
    unittest.main()
