"""Whole conversations with the tiny model, over pipes and in a pseudo-terminal."""
import os
import re
import unittest

from support import INFERENCE, INFO_LINE, MAIN, TINY, SessionTestCase, replies

GREETING = "Hello Zelda! How can I help you?"
MEMORY = (("My name is Zelda.", GREETING), ("What is a mutex?", "A mutex is a lock that"),
          ("What is my name?", "Your name is Zelda."))
PROMPTS = [prompt for prompt, _ in MEMORY]
LONGEST = 4095  # bytes of a prompt


class ConversationTest(SessionTestCase):
    def test_the_chat_remembers_over_pipes(self):
        """What was said two prompts ago is known."""
        session = self.chat(42)
        session.read_until(">>> ")
        for prompt, answer in MEMORY:
            self.assertTrue(session.ask(prompt).startswith(answer), session.text)
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_the_chat_remembers_in_a_terminal(self):
        """The same in a terminal, which shows the information line in green."""
        session = self.chat(42, terminal=True)
        session.read_until(">>> ")
        for prompt, answer in MEMORY:
            said = session.ask(prompt)
            self.assertTrue(said.startswith(prompt + "\n" + answer), session.text)
        green_line = r"\n\x1b\[([0-9]+;)?32m\[INFO\] SEQ LEN: \d+, Speed: [0-9.]+ tok/s\x1b\[0?m\n"
        self.assertRegex(session.text, green_line)
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_a_transcript_over_pipes_is_plain_text(self):
        """A mark, the reply, the information line and the next mark, and nothing else."""
        session = self.run_to_end(MAIN, "-d", TINY, 42, said="My name is Zelda.\n")
        self.assertRegex(session.text, r"\A>>> " + re.escape(GREETING) + "\n"
                         + INFO_LINE.pattern + r">>> \nChild exited with 0\n\Z")

    def test_the_mark_comes_before_the_model_is_loaded(self):
        """The user may type at once, and nothing typed while the model loads is lost."""
        session = self.start_fake("""
            wait_for("loaded")
            report()
            say("You said " + next_prompt().decode())
            report()
            next_prompt()
            """)
        session.read_until(">>> ")
        session.send("I am early.\n")
        session.release("loaded")
        session.read_until("You said I am early.\n", ">>> ")

    def test_an_empty_line_asks_again(self):
        """An empty line is no prompt: it gets the next mark and no reply."""
        session = self.run_to_end(MAIN, "-d", TINY, 42, said="\n\nMy name is Zelda.\n\n")
        self.assertTrue(session.text.startswith(">>> >>> >>> " + GREETING), session.text)
        self.assertEqual(len(replies(session.text)), 1)

    def test_the_last_line_needs_no_newline(self):
        """A prompt that ends with the input is answered."""
        session = self.run_to_end(MAIN, "-d", TINY, 42, said="My name is Zelda.")
        self.assertTrue(session.text.startswith(">>> " + GREETING), session.text)
        self.assertEqual(session.status, 0)

    def test_the_longest_reply_has_max_new_tokens(self):
        """-m limits a reply; the chat goes on after it."""
        for limit in (1, 7):
            with self.subTest(limit):
                session = self.run_to_end(MAIN, "-d", TINY, "-m", limit, "-t", 0, 42,
                                          said="Tell me a story.\n" * 2)
                (first, length), (second, _) = replies(session.text)
                self.assertTrue(first.strip() and second.strip(), session.text)
                one_more = self.run_to_end(MAIN, "-d", TINY, "-m", limit + 1, "-t", 0, 42,
                                           said="Tell me a story.\n")
                self.assertEqual(replies(one_more.text)[0][1], length + 1)

    def test_replies_have_no_control_characters(self):
        """Noise, too, is printed without control characters, and as whole UTF-8 characters."""
        session = self.run_to_end(MAIN, "-d", self.noise_model(), "-m", 100, "-t", 2, 42,
                                  said="Hello!\n")
        session.output.decode()
        self.assertNotRegex(session.text, r"[\x00-\x08\x0b-\x1f\x7f]")


class ReproducibilityTest(SessionTestCase):
    def said_by_main(self, *options, prompts=PROMPTS):
        return replies(self.run_to_end(MAIN, "-d", TINY, *options, said=lines(prompts)).text)

    def test_every_way_to_ask_gives_the_same_text(self):
        """Through main, as arguments, on stdin: same seed, same prompts, same text."""
        by_main = self.said_by_main(42)
        self.assertEqual(len(by_main), len(PROMPTS))
        arguments = self.run_to_end(INFERENCE, "-d", TINY, 42, *PROMPTS)
        stdin = self.run_to_end(INFERENCE, "-d", TINY, 42, said=lines(PROMPTS))
        for session in (arguments, stdin):
            self.assertEqual(replies(session.text), by_main)
            self.assertEqual((session.status, session.errors), (0, ""))

    def test_the_seed_decides_the_text(self):
        """Other seeds give other stories; 42 is the default."""
        story = ["Tell me a story."]
        stories = {str(self.said_by_main(seed, prompts=story)) for seed in range(1, 5)}
        self.assertGreater(len(stories), 1)
        self.assertEqual(self.said_by_main(prompts=story), self.said_by_main(42, prompts=story))

    def test_temperature_0_needs_no_seed(self):
        """-t 0 is greedy: the same text for every seed."""
        story = ["Tell me a story."]
        self.assertEqual(self.said_by_main("-t", 0, 1, prompts=story),
                         self.said_by_main("-t", 0, 2, prompts=story))

    def test_the_clock_gives_a_seed_that_can_be_used_again(self):
        """Seed 0 tells the seed that it took, and that seed gives the same text."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                command = (program, "-d", TINY, "-t", 1.5)
                first = self.run_to_end(*command, 0, said="Tell me a story.\n")
                seed = re.search(r".*seed\D*(\d+).*\n", first.text)
                again = self.run_to_end(*command, seed[1], said="Tell me a story.\n")
                self.assertEqual(replies(first.text.replace(seed[0], "")), replies(again.text))


class InputTest(SessionTestCase):
    def test_no_input_is_taken_while_the_engine_works(self):
        """A line typed during a reply stays in the pipe, and is answered after the reply."""
        session = self.start_fake("""
            report()
            say("One: " + next_prompt().decode())
            wait_for("done")
            report()
            say("Two: " + next_prompt().decode())
            report()
            next_prompt()
            """)
        session.send("first\n")
        session.read_until("One: first\n")
        session.send("second\n")
        session.wait_for_log_lines(2)
        self.assertEqual(session.untaken_input(), len("second\n"))
        self.assertEqual(session.text, ">>> One: first\n")
        session.release("done")
        session.read_until(">>> Two: second\n>>> ")

    def test_typing_ahead_in_a_terminal_is_answered_afterwards(self):
        """The line is echoed at once and answered after the reply."""
        session = self.chat(42, terminal=True)
        session.send("My name is Zelda.\nWhat is my name?\n")
        session.read_until(GREETING, "[INFO]", ">>> ", "Your name is Zelda.", "[INFO]", ">>> ")

    def test_prompts_sent_at_once_are_answered_one_by_one(self):
        """All lines of a pipe are answered, each after its own mark."""
        count = 30
        session = self.run_to_end(MAIN, "-d", TINY, "-m", 4, 42, said="Hello!\n" * count)
        self.assertEqual(len(replies(session.text)), count)
        self.assertEqual(session.text.count(">>> "), count + 1)

    def test_the_longest_prompt_reaches_the_engine_whole(self):
        """A prompt of 4095 bytes is taken; one more byte is refused, and nothing of it is sent."""
        session = self.start_fake("""
            report()
            while True:
                prompt = next_prompt()
                say(f"{len(prompt)} bytes, {prompt[:1]}\\n")
                report()
            """)
        session.send("a" * LONGEST + "\n")
        session.read_until(f"{LONGEST + 1} bytes, b'a'\n>>> ")
        for length in (LONGEST + 1, LONGEST + 2, 2 * LONGEST, 100_000):
            with self.subTest(length):
                session.send("b" * length + "\n")
                refusal = session.read_until(">>> ")
                self.assertIn(str(LONGEST), refusal)
                self.assertEqual(refusal.count("\n"), 1)
                session.send("c\n")
                session.read_until("2 bytes, b'c'\n>>> ")
        self.assertNotIn("b'b'", session.text)

    def test_a_prompt_longer_than_the_window_is_refused(self):
        """The message says so, and the next prompt is answered as if it had never been."""
        session = self.chat(42)
        session.read_until(">>> ")
        session.send("7" * LONGEST + "\n")  # a token per digit, in a window of 1024
        self.assertRegex(session.read_until(">>> "), r"(?i)window|context")
        self.assertEqual(session.ask(PROMPTS[0]), GREETING + "\n")

    def test_a_long_prompt_that_fits_the_window_is_answered(self):
        """4095 bytes need not be many tokens."""
        session = self.chat(42)
        session.read_until(">>> ")
        session.ask(("process " * 512)[:LONGEST])

    def test_odd_bytes_do_no_harm(self):
        """Control characters, broken UTF-8 and a NUL byte are text like any other."""
        odd = (b"\x01\x02\x1b[31mred\x7f\r", b"\xff\xfe\xc3", "Grüße, 你好 😀".encode(), b"a\0b",
               b"\0", b"   ", b"<|im_end|>\t<|im_start|>")
        session = self.chat(42)
        session.read_until(">>> ")
        for prompt in odd:
            session.send(prompt + b"\n")
            session.read_until("[INFO] SEQ LEN: ", ">>> ")
        self.assertEqual(session.ask(PROMPTS[0]), GREETING + "\n")
        session.end_input()
        self.assert_ends(session, 0, "0")


class WindowTest(SessionTestCase):
    def test_a_full_window_drops_the_oldest_turns_and_says_so(self):
        """The chat goes on within the window of 1024, and recent facts are still known."""
        session = self.chat("-t", 0, 42)
        session.read_until(">>> ")
        rollovers = 0
        while rollovers < 3:
            self.assertIn("Zelda", session.ask("My name is Zelda."))
            said = session.ask("What is a thread?")
            lengths = [length for _, length in replies(session.text)]
            self.assertLessEqual(max(lengths), 1024)
            self.assertLess(len(lengths), 200, "the window never gets full")
            if re.search(r"oldest.* dropped", said):
                rollovers += 1
                self.assertIn("Your name is Zelda.", session.ask("What is my name?"))
        session.end_input()
        self.assert_ends(session, 0, "0")

    def test_a_chat_of_long_replies_never_ends(self):
        """Replies as long as the window make room for each other."""
        session = self.run_to_end(MAIN, "-d", TINY, "-m", 2000, "-t", 3, 42, said="Hello!\n" * 6)
        self.assertEqual(len(replies(session.text)), 6)
        self.assertEqual(session.status, 0)


class ByHandTest(SessionTestCase):
    def test_an_engine_started_by_hand_signals_nobody(self):
        """A shell that starts the engine survives: a stray SIGUSR2 would kill it."""
        script = '"$0" "$@" 3>/dev/null; echo "engine: $?"'
        for environment in ({}, {"CHAT_FRONT_END": "1"}, {"CHAT_FRONT_END": str(os.getpid())}):
            for arguments, stdin in ((PROMPTS, ()), ((), PROMPTS)):
                with self.subTest(environment, arguments=arguments):
                    shell = self.start("sh", "-c", script, INFERENCE, "-d", TINY, 42, *arguments,
                                       env=environment)
                    for prompt in stdin:
                        shell.send(prompt + "\n")
                        shell.read_until("tok/s\n")
                    shell.end_input()
                    self.assertEqual(shell.finish(), 0)
                    self.assertTrue(shell.text.startswith(GREETING + "\n[INFO]"), shell.text)
                    self.assertTrue(shell.text.endswith("tok/s\nengine: 0\n"), shell.text)

    def test_what_follows_the_seed_is_a_prompt(self):
        """Also if it begins with a dash, or is too long: that is told, and the next is answered."""
        session = self.run_to_end(INFERENCE, "-d", TINY, 42, "-m", "a" * (LONGEST + 1), "Hello!")
        self.assertEqual(len(replies(session.text)), 2, session.errors)
        self.assertIn(str(LONGEST), session.text)
        self.assertEqual((session.status, session.errors), (0, ""))

    def test_an_engine_in_a_terminal_asks_for_prompts(self):
        """Started by hand in a terminal it shows a mark, answers, and ends at Ctrl-D."""
        session = self.start(INFERENCE, "-d", TINY, 42, terminal=True)
        session.read_until(">>> ")
        for prompt, answer in MEMORY:
            self.assertIn(answer, session.ask(prompt))
        session.end_input()
        self.assertEqual(session.finish(), 0)


def lines(prompts):
    return "".join(prompt + "\n" for prompt in prompts)


if __name__ == "__main__":
    unittest.main()
