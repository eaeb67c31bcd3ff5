"""Options, operands and prompts on the command lines, and where their mistakes are reported."""
import unittest

from support import INFERENCE, MAIN, PARALLEL, TINY, SessionTestCase, replies


class UsageTest(SessionTestCase):
    BAD_SEEDS = ("abc", "-1", "1x", "", " ", "1 ", "0x10", "1.5", "18446744073709551616", "9" * 40)
    BAD_OPTIONS = (("-z",), ("-t", "hot"), ("-t", "-1"), ("-t", "nan"), ("-t", "inf"), ("-t", ""),
                   ("-p", "1.1"), ("-p", "-0.1"), ("-p", "nan"), ("-p", "x"), ("-m", "0"),
                   ("-m", "-5"), ("-m", "1x"), ("-m", "99999999999999999999"), ("-m", ""),
                   ("-m", " 5"), ("-m", "+5"), ("-m", "5 "), ("-m", "-"), ("-m", "0x5"))
    BAD_POLICY_OPTIONS = (
        ("-s", "SCHED_"), ("-s", ""), ("-s", "SCHED_SOON"), ("-s", "SCHED_4"), ("-s", "99"),
        ("-n", "20"), ("-n", "-21"), ("-n", "x"), ("-n", ""), ("-n", "1.5"),
        ("-s", "FIFO", "-n", "5"), ("-s", "RR", "-n", "5"), ("-s", "DEADLINE", "-n", "5"),
        ("-s", "FIFO", "-r", "0"), ("-s", "FIFO", "-r", "100"), ("-s", "RR", "-r", "-1"),
        ("-s", "RR", "-r", "x"), ("-r", "5"), ("-s", "OTHER", "-r", "5"), ("-s", "IDLE", "-r", "5"),
        ("-s", "DEADLINE"), ("-D", "10ms:20ms:20ms"), ("-s", "FIFO", "-D", "10ms:20ms:20ms"),
        ("-s", "DEADLINE", "-r", "5", "-D", "10ms:20ms:20ms"),
        ("-j", "0"), ("-j", "-1"), ("-j", "x"),
        *(("-s", "DEADLINE", "-D", times) for times in (
            "10ms", "10ms:20ms", "10ms:20ms:20ms:20ms", "a:b:c", "10ms:20ms:20s", "-1:2:3", "::",
            "10ms:20ms:", "10ms 20ms 20ms", "21ms:20ms:20ms", "10ms:20ms:19ms", "10ms:20ms:0",
            "18446744073709551616:1:1", "99999999999999999ms:1:1")))

    def assert_usage(self, program, *arguments):
        with self.subTest(program=program.name, arguments=arguments):
            session = self.run_to_end(program, *arguments)
            self.assertEqual((session.status, session.text), (2, ""))
            self.assertRegex(session.errors, r"(?im)^usage: .*" + program.name)
            self.assertNotRegex(session.errors, r"(?i)\Ausage", "before it, what is wrong")

    def test_bad_arguments_of_main_get_its_usage(self):
        """Usage on stderr, exit status 2, and no engine is started."""
        for seed in self.BAD_SEEDS:
            self.assert_usage(MAIN, "--", seed)
        for options in self.BAD_OPTIONS + self.BAD_POLICY_OPTIONS:
            self.assert_usage(MAIN, "-d", TINY, *options, 42)
        self.assert_usage(MAIN, "-d", TINY, 42, 43)
        self.assert_usage(MAIN, "-d")

    def test_bad_arguments_of_the_engines_get_their_usage(self):
        """They need a seed, parallel a number of threads, and check options by themselves."""
        for seed in self.BAD_SEEDS:
            self.assert_usage(INFERENCE, "-d", TINY, "--", seed, "Hello!")
        for options in self.BAD_OPTIONS:
            self.assert_usage(INFERENCE, "-d", TINY, *options, 42, "Hello!")
        for count in ("0", "-1", "two", "2x", "", "65", "99999999999999999999"):
            self.assert_usage(PARALLEL, "--", count, 42, "Hello!")
        for program, *operands in ((INFERENCE,), (PARALLEL,), (PARALLEL, 2), (PARALLEL, 2, "x")):
            self.assert_usage(program, *operands)

    def test_help_is_printed_on_stdout(self):
        """-h and --help, among whatever else: the usage alone, status 0."""
        for program, operands in ((MAIN, (42,)), (INFERENCE, (42,)), (PARALLEL, (2, 42))):
            for arguments in (("-h",), ("--help",), ("-t", 1, "--help"), (*operands, "-h")):
                with self.subTest(program=program.name, arguments=arguments):
                    session = self.run_to_end(program, *arguments)
                    self.assertEqual((session.status, session.errors), (0, ""))
                    self.assertRegex(session.text, r"\AUsage: .*" + program.name)

    def test_help_after_a_mistake_is_no_success(self):
        """The mistake is reported, and the exit status is 2."""
        for program in (MAIN, INFERENCE, PARALLEL):
            self.assert_usage(program, "-k", -1, "-h")

    def test_options_may_stand_anywhere(self):
        """Before and after the seed, the thread count and the prompts; a value may be attached."""
        for program, operands in ((MAIN, (42,)), (INFERENCE, (42, "Go on.")),
                                  (PARALLEL, (2, 42, "Go on."))):
            texts = set()
            for i in range(len(operands) + 1):
                arguments = (*operands[:i], "-d", TINY, "-t0", *operands[i:])
                session = self.run_to_end(program, *arguments, typed="Go on.\n")
                self.assertEqual((session.status, len(replies(session.text))), (0, 1),
                                 (program.name, arguments, session.errors))
                texts.add(str(replies(session.text)))
            self.assertEqual(len(texts), 1)

    def test_two_dashes_end_the_options(self):
        """Prompts that begin with a dash stand after them; one that is too long is rejected."""
        for program, operands in ((INFERENCE, (42,)), (PARALLEL, (2, 42))):
            for arguments, prompts in (((*operands, "Hello!", "--", "-h"), 2),
                                       (("--", *operands, "-t", "x"), 2),
                                       ((*operands, "--", "-m", "a" * 4096, "Hello!"), 2),
                                       ((*operands, "--", "--"), 1)):
                with self.subTest(program=program.name, arguments=arguments):
                    session = self.run_to_end(program, "-d", TINY, *arguments)
                    self.assertEqual((session.status, session.errors), (0, ""))
                    self.assertEqual(len(replies(session.text)), prompts)
                    self.assertEqual("4095" in session.text, "-m" in arguments)

    def test_an_unknown_option_is_named(self):
        """A short one, a long one, and one among the prompts; so is an option without a value."""
        for arguments, message in ((("-z",), "-z is not an option."),
                                   (("--zoom", 42), "--zoom is not an option."),
                                   (("--help=x",), "--help=x is not an option."),
                                   ((42, "Hello!", "-z"), "-z is not an option."),
                                   ((42, "-t"), "-t needs a value.")):
            for program in (MAIN, INFERENCE, PARALLEL):
                first_line = self.run_to_end(program, *arguments).errors.splitlines()[0]
                self.assertEqual(first_line, message)

    def test_a_bad_value_names_what_is_allowed(self):
        """In the first line, and nothing else is wrong."""
        for allowed, *options in (("0.01 to 100", "-t", "abc"), ("0 to 1", "-p", 2),
                                  ("1 to 1000000", "-m", 0), ("0 to 16", "-k", -1),
                                  ("DEADLINE", "-s", "foo"), ("-20 to 19", "-n", 99),
                                  ("1 to 99", "-r", 0), ("1 to 64", "-j", 65),
                                  ("10ms:20ms:20ms", "-D", "10ms"),
                                  ("SCHED_RR takes only -r", "-s", "RR", "-n", 1),
                                  ("SCHED_DEADLINE needs -D", "-s", "DEADLINE")):
            first, second = self.run_to_end(MAIN, *options).errors.splitlines()[:2]
            self.assertIn(allowed, first)
            self.assertIn("Usage", second)

    def test_the_last_of_equal_options_counts(self):
        """For the engine as for main."""
        session = self.run_to_end(MAIN, "-d", "/none", "-m", 1, "-d", TINY, "-m", 2, 42,
                                  typed="Tell me a story.\n")
        alone = self.run_to_end(MAIN, "-d", TINY, "-m", 2, 42, typed="Tell me a story.\n")
        self.assertEqual(replies(session.text), replies(alone.text))

    def test_the_largest_values_are_taken(self):
        """The limits of the ranges belong to them."""
        session = self.run_to_end(MAIN, "-d", TINY, "-p", 1, "-n", 19, 18446744073709551615)
        self.assertEqual(session.status, 0, session.errors)
        session = self.run_to_end(INFERENCE, "-d", TINY, "-p", 0, 18446744073709551615, "Hello!")
        self.assertEqual(session.status, 0, session.errors)


class ErrorChannelTest(SessionTestCase):
    def test_errors_appear_where_the_user_looks(self):
        """With the log in a file, an error goes to the terminal as well; without one, only once."""
        folder = self.folder()
        for program in (MAIN, INFERENCE):
            for arguments in (("-d", folder, 42), ("abc",), ("-z",), ("-m", 0, 42)):
                with self.subTest(program=program.name, arguments=arguments):
                    session = self.start(program, *arguments, terminal=True)
                    session.finish()
                    self.assertTrue(session.errors)
                    self.assertIn(session.errors, session.text)
        session = self.start(MAIN, "-d", folder, terminal=True, errors_to_terminal=True)
        session.finish()
        self.assertEqual(session.text.count("make prepare"), 1, session.text)


if __name__ == "__main__":
    unittest.main()
