"""Whole conversations with the tiny model, over pipes and in a pseudo-terminal."""
import fcntl
import os
import re
import time
import unittest
from itertools import cycle, islice

from artifacts import model_file, write_tokenizer
from support import F_SETPIPE_SZ, INFERENCE, INFO_LINE, MAIN, TINY, SessionTestCase, replies

GREETING = "Hello Zelda! How can I help you?"
MEMORY = (("My name is Zelda.", GREETING), ("What is a mutex?", "A mutex is a lock that"),
          ("What is my name?", "Your name is Zelda."))
PROMPTS = [prompt for prompt, _ in MEMORY]
LONGEST = 4095  # bytes of a prompt


class ChatTestCase(SessionTestCase):
    def said_by_main(self, *options, prompts=PROMPTS):
        return replies(self.run_to_end(MAIN, "-d", TINY, *options, typed=lines(prompts)).text)


class ConversationTest(ChatTestCase):
    def test_the_chat_remembers(self):
        """A reply uses a fact from two prompts before: over pipes, and in a terminal, which shows
        the information line in green.
        """
        green_line = r"\n\x1b\[([0-9]+;)?32m\[INFO\] SEQ LEN: \d+, Speed: [0-9.]+ tok/s\x1b\[0?m\n"
        for terminal in (False, True):
            with self.subTest(terminal=terminal):
                session = self.chat(terminal=terminal)
                for prompt, answer in MEMORY:
                    reply = session.ask(prompt)
                    echo = prompt + "\n" if terminal else ""
                    self.assertTrue(reply.startswith(echo + answer), session.text)
                self.assertEqual(len(re.findall(green_line, session.text)),
                                 len(MEMORY) if terminal else 0)
                session.end_input()
                self.assert_ends(session, 0, "0")

    def test_a_transcript_over_pipes_is_plain_text(self):
        """A mark, the reply, the information line and the next mark, and nothing else. Empty lines
        get another mark, and the last line needs no newline.
        """
        session = self.run_to_end(MAIN, "-d", TINY, typed="\n\nMy name is Zelda.")
        self.assertRegex(session.text, r"\A>>> >>> >>> " + re.escape(GREETING) + "\n"
                         + INFO_LINE.pattern + r">>> \nChild exited with 0\n\Z")

    def test_the_mark_comes_before_the_model_is_loaded(self):
        """The user may type at once, and nothing typed while the model loads is lost."""
        session = self.start_fake("""
            wait_for("loaded")
            put("Prompt: " + next_prompt().decode())
            next_prompt()
            """)
        session.read_until(">>> ")
        session.send("I am early.\n")
        session.release("loaded")
        session.read_until("Prompt: I am early.\n", ">>> ")

    def test_the_longest_reply_has_max_new_tokens(self):
        """-m limits a reply; the chat goes on after it."""
        for limit in (1, 7):
            (first, length), (second, _), (_, longer) = (
                *self.said_by_main("-t", 0, "-m", limit, prompts=2 * ["Tell me a story."]),
                *self.said_by_main("-t", 0, "-m", limit + 1, prompts=["Tell me a story."]))
            self.assertTrue(first.strip() and second.strip())
            self.assertEqual(longer, length + 1)


class ReplyTest(SessionTestCase):
    """Replies of a small model with random weights, whose tokens have the texts of a test."""
    MODEL = "--dim 64 --hidden 64 --layers 1 --heads 1 --kv-heads 1 --vocab 1024 --seq-len 256 " \
            "--own-classifier"

    def start_model(self, texts, *options):
        folder = self.folder()
        (folder / "model.bin").symlink_to(model_file(self.MODEL))
        tokens = [b"<|im_start|>", b"<|im_end|>", *islice(cycle(texts), 1022)]
        write_tokenizer(folder / "tokenizer.bin", [(text, 0) for text in tokens])
        return self.start(INFERENCE, "-d", folder, *options, 42)

    def replies(self, texts, *options, prompts=1):
        session = self.start_model(texts, *options)
        session.send("Hello!\n" * prompts)
        session.end_input()
        self.assertEqual((session.finish(), session.errors), (0, ""))
        return replies(session.output.decode())

    def test_control_characters_are_left_out(self):
        """A terminal would execute them, also U+0080 to U+009F. Newline and tab stay."""
        controls = [chr(code).encode() for code in (0, 7, 13, 27, 127, *range(0x80, 0xA0))]
        parts_of_one = [b"\xc2", b"\x9b"]
        good = [text.encode() for text in ("a", "\t", "\n", "\u00a0", "\u00e9", "\U0001F600")]
        reply, _ = self.replies(controls + parts_of_one + good, "-t", 100, "-m", 200)[0]
        self.assertNotRegex(reply, r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
        for text in good:
            self.assertIn(text.decode(), reply)

    def test_what_is_not_utf_8_is_left_out(self):
        """Stray bytes, overlong forms, surrogates and what is beyond U+10FFFF; characters whose
        bytes come from several tokens are whole.
        """
        bad = [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe0\x80\x80"]
        texts = [*bad, b"\xe2\x82", b"\xac", b"a"]
        reply, _ = self.replies(texts, "-t", 100, "-m", 250)[0]
        self.assertEqual(set(reply) - {"\n"}, {"a", "\u20ac"})

    def test_every_control_token_ends_a_reply(self):
        """An empty reply is an empty line. A token without letters between its angle brackets only
        resembles a control token, and is printed.
        """
        self.assertEqual(self.replies([b"<|stop|>", b"<eos>"])[0][0], "\n")
        self.assertRegex(self.replies([b"<3>", b"<>"], "-m", 20)[0][0], r"\A(<3>|<>)+\n\Z")

    def test_long_replies_fill_the_window(self):
        """Each one makes room for the next, to the last position, and the chat never ends."""
        lengths = [length for _, length in self.replies([b"a", b"\n"], "-t", 0, "-m", 2000,
                                                        prompts=6)]
        self.assertEqual((len(lengths), max(lengths)), (6, 256))

    def test_a_reply_is_streamed(self):
        """Its first bytes arrive while the rest is computed."""
        session = self.start(INFERENCE, "-d", self.noise_model(), "-t", 2, "-m", 500, 42, "Hello!")
        session.read_more()
        self.assertNotIn("[INFO]", session.text)

    def test_the_speed(self):
        """It is 1 token in the time between the two tokens of this reply. The engine computes the
        second one after it has written all of the first one, which is longer than the pipe.
        """
        session = self.start_model([b"x" * 10_000], "-t", 0, "-m", 2)
        fcntl.fcntl(session.reply, F_SETPIPE_SZ, 4096)
        started = time.monotonic()
        session.send("Hello!\n")
        session.read_more()
        after_first_token = time.monotonic()
        time.sleep(1)
        before_second_token = time.monotonic()
        session.read_until("tok/s\n")
        ended = time.monotonic()
        self.assertEqual(session.text.count("x"), 20_000)
        speed = float(INFO_LINE.search(session.text)[2])
        self.assertLessEqual(speed, 1 / (before_second_token - after_first_token))
        self.assertGreaterEqual(speed, 1 / (ended - started))

    def test_the_speed_does_not_count_the_prompt(self):
        """A prompt of 200 tokens takes most of the time; its reply of two is not slow for that."""
        session = self.chat("-m", 2, folder=self.noise_model())
        session.ask("Hello!")  # the model is loaded now
        started = time.monotonic()
        session.send("7" * 200 + "\n")
        speed = float(re.search(r"Speed: ([\d.]+)", session.read_until("tok/s"))[1])
        self.assertLess(1 / speed, (time.monotonic() - started) / 2)


class ReproducibilityTest(ChatTestCase):
    def test_prompts_from_any_source_give_the_same_text(self):
        """Through main, as arguments, on stdin: same seed, same prompts, same text."""
        by_main = self.said_by_main(42)
        self.assertEqual(len(by_main), len(PROMPTS))
        arguments = self.run_to_end(INFERENCE, "-d", TINY, 42, *PROMPTS)
        stdin = self.run_to_end(INFERENCE, "-d", TINY, 42, typed=lines(PROMPTS))
        for session in (arguments, stdin):
            self.assertEqual(replies(session.text), by_main)
            self.assertEqual((session.status, session.errors), (0, ""))

    def test_the_seed_decides_the_text(self):
        """Other seeds give other stories, but not with -t 0, which is greedy; 42 is the default."""
        def stories(*options, seeds):
            return {str(self.said_by_main(*options, *seed, prompts=["Tell me a story."]))
                    for seed in seeds}
        self.assertGreater(len(stories(seeds=[(1,), (2,), (3,), (4,)])), 1)
        self.assertEqual(len(stories("-t", 0, seeds=[(1,), (2,)])), 1)
        self.assertEqual(len(stories(seeds=[(), (42,)])), 1)

    def test_the_clock_gives_a_seed_that_can_be_used_again(self):
        """With seed 0 the seed from the clock is printed, and it gives the same text again."""
        for program in (MAIN, INFERENCE):
            with self.subTest(program.name):
                command = (program, "-d", TINY, "-t", 1.5)
                first = self.run_to_end(*command, 0, typed="Tell me a story.\n")
                seed = re.search(r".*seed\D*(\d+).*\n", first.text)
                again = self.run_to_end(*command, seed[1], typed="Tell me a story.\n")
                self.assertEqual(replies(first.text.replace(seed[0], "")), replies(again.text))


class InputTest(SessionTestCase):
    def test_no_input_is_taken_while_the_engine_works(self):
        """A line typed during a reply stays in the pipe, and is answered after the reply."""
        session = self.start_fake("""
            put("One: " + next_prompt().decode())
            wait_for("done")
            put("Two: " + next_prompt().decode())
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
        session = self.chat(terminal=True)
        session.send("My name is Zelda.\nWhat is my name?\n")
        session.read_until(GREETING, "[INFO]", ">>> ", "Your name is Zelda.", "[INFO]", ">>> ")

    def test_prompts_sent_at_once_are_answered_one_by_one(self):
        """All lines of a pipe are answered, each after its own mark."""
        count = 30
        session = self.run_to_end(MAIN, "-d", TINY, "-m", 4, 42, typed="Hello!\n" * count)
        self.assertEqual(len(replies(session.text)), count)
        self.assertEqual(session.text.count(">>> "), count + 1)

    def test_the_longest_prompt_reaches_the_engine_whole(self):
        """A prompt of 4095 bytes is taken; one more byte is refused, and nothing of it is sent."""
        session = self.start_fake("""
            while True:
                prompt = next_prompt()
                put(f"{len(prompt)} bytes, {prompt[:1]}\\n")
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
        """A message reports it, and the next reply is as if that prompt had not been typed. 4095
        bytes need not be too many tokens.
        """
        session = self.chat()
        session.send("7" * LONGEST + "\n")  # a token per digit, in a window of 1024
        refusal = session.read_until(">>> ")
        tokens, window = re.search(r"(\d+) tokens.*window\D*(\d+)", refusal).groups()
        self.assertEqual(int(window), 1024)
        template = int(tokens) - LONGEST
        self.assertEqual(session.ask(PROMPTS[0]), GREETING + "\n")
        # The longest prompt leaves room for a token of the reply, <|im_end|> and a newline.
        longest = 1024 - template - 3
        session.send("7" * (longest + 1) + "\n")
        self.assertIn(f" {longest + 1 + template} tokens", session.read_until(">>> "))
        session.ask("7" * longest)
        self.assertIn(replies(session.text)[-1][1], (1023, 1024))
        session.ask(("process " * 512)[:LONGEST])

    def test_odd_bytes_do_no_harm(self):
        """Control characters, broken UTF-8 and a NUL byte are text like any other."""
        odd = (b"\x01\x02\x1b[31mred\x7f\r", b"\xff\xfe\xc3", "Grüße, 你好 😀".encode(), b"a\0b",
               b"\0", b"<|im_end|>\t<|im_start|>")
        session = self.chat()
        for prompt in odd:
            session.send(prompt + b"\n")
            session.read_until("[INFO] SEQ LEN: ", ">>> ")
        self.assertIn("Zelda", session.ask(PROMPTS[0]))


class WindowTest(SessionTestCase):
    def test_a_full_window_drops_the_oldest_turns_and_reports_it(self):
        """The chat goes on within the window of 1024, and recent facts are still known."""
        prompts = cycle(("My name is Zelda.", "What is a thread?", "What is my name?"))
        session = self.chat("-t", 0)
        turns = rollovers = 0  # turns in the window
        while rollovers < 3:
            prompt = next(prompts)
            reply = session.ask(prompt)
            rollover = re.search(r"oldest (\d+) of (\d+) turns", reply)
            if rollover:
                dropped, before = map(int, rollover.groups())
                self.assertEqual(before, turns)
                self.assertIn(dropped, range(1, turns))
                turns -= dropped
                rollovers += 1
            turns += 1
            if prompt == "What is my name?":
                self.assertIn("Your name is Zelda.", reply)
            lengths = [length for _, length in replies(session.text)]
            self.assertLessEqual(max(lengths), 1024)
            self.assertLess(len(lengths), 200, "the window never gets full")


class ByHandTest(SessionTestCase):
    def test_an_engine_started_by_hand_sends_no_signal(self):
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

    def test_an_engine_in_a_terminal_prints_prompt_marks(self):
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
