"""A text's ids are those of SmolLM's own tokenizer, whatever its bytes, and quickly; and no
tokenizer.bin, however odd, does more harm than one line.
"""
import json
import math
import os
import random
import resource
import shutil
import struct
import unicodedata
import unittest
from pathlib import Path

from artifacts import TESTS, TOP, write_tokenizer
from make_unicode import WHITE_SPACE, is_letter, is_number, is_space
from probes import BadFileTestCase, probe_lines
from reference_tokenizer import Tokenizer
from support import TINY, SessionTestCase

TINY_TOKENIZER = TINY / "tokenizer.bin"
SMOLLM_DIR = os.environ.get("SMOLLM_DIR")
REAL_TOKENIZER = Path(SMOLLM_DIR or TOP, "tokenizer.bin")
HAS_REAL = SMOLLM_DIR or REAL_TOKENIZER.exists()
TABLES_VERSION = (15, 1, 0)  # of Unicode, in model.h
PYTHONS_VERSION = tuple(int(part) for part in unicodedata.unidata_version.split("."))


def is_known(code):
    """Whether the character is assigned both in model.h's version of Unicode and in python's."""
    if PYTHONS_VERSION == TABLES_VERSION:
        return True
    oldest = unicodedata if PYTHONS_VERSION < TABLES_VERSION else unicodedata.ucd_3_2_0
    return oldest.category(chr(code)) != "Cn"


def class_of(code):
    return ("S" if is_space(code) else "L" if is_letter(code) else "N" if is_number(code)
            else "O")


def encode(path, count, texts):
    """The ids of each of the texts, given as bytes, with a tokenizer of `count` tokens."""
    stream = b"".join(struct.pack("<i", len(text)) + text for text in texts)
    lines = probe_lines("encode", path, count, input=stream)
    return [[int(token) for token in line.split()] for line in lines]


class RandomTexts:
    """Texts of everything that is treated in a way of its own, and of what resembles it."""
    SPECIAL = [
        b"'s", b"'t", b"'re", b"'ve", b"'m", b"'ll", b"'d", b"'S", b"'", b"<|im_start|>",
        b"<|im_end|>", b"<|endoftext|>", b"<|", b"|>", b"user\n", b"assistant\n", b"\n", b"\n\n",
        b"\r\n", b"\t", b" ", b"  ", b"   ", b"\x0b", b"\x0c", b"\x1c", b"\x1f", b"\x7f", b"\0",
        b"0", b"42", b"3.14", b"1,000", b"\xff", b"\xc0\x80", b"\xc3", b"\xe2\x82", b"\xed\xa0\x80",
        b"\xe0\x81\xa1", b"\xf0\x80\x81\xa1", b"\xf0\x9f\x98", b"\xf4\x90\x80\x80",
        b"\xf4\xbf\xbf\xbf", b"\xf8", b"\x80",
        "e\u0301 \U0001F468\u200D\U0001F469 \u0661\u0662 \u2167 \u00BD \u200B \uFEFF".encode()]

    def __init__(self, seed, vocabulary):
        self.random = random.Random(seed)
        self.vocabulary = vocabulary
        self.by_class = {"L": [], "N": [], "S": [], "O": []}
        for code in range(0x80, 0x110000):
            if is_known(code) and not 0xD800 <= code < 0xE000:
                self.by_class[class_of(code)].append(chr(code).encode())

    def part(self):
        choice = self.random.choice
        kind = self.random.randrange(8)
        if kind == 0:
            return choice(self.vocabulary)
        if kind == 1:
            return choice(self.by_class[choice("LNSO")]) * choice((1, 1, 1, 2, 9))
        if kind == 2:
            return self.random.randbytes(self.random.randrange(6))
        if kind == 3:
            return bytes(self.random.choices(b"eothanisr", k=self.random.randrange(1, 20)))
        if kind == 4:
            return bytes([self.random.randrange(128)]) * choice((1, 2, 3, 70))
        return choice(self.SPECIAL)

    def text(self):
        return b"".join(self.part() for _ in range(self.random.randrange(1, 25)))


class EncodingTest(unittest.TestCase):
    def test_the_real_tokenizer(self):
        """The collected texts have the ids that SmolLM's own tokenizer gives."""
        if not HAS_REAL:
            self.skipTest("needs SmolLM's tokenizer.bin: make prepare, or its folder in SMOLLM_DIR")
        cases = json.loads((TESTS / "golden" / "tokenizer_cases.json").read_text())
        texts = [text.encode() for text, _ in cases]
        for (text, expected), ids in zip(cases, encode(REAL_TOKENIZER, 49152, texts)):
            self.assertEqual(ids, expected, text)

    def test_random_texts(self):
        """All kinds of characters, and bytes that are none, have the reference's ids."""
        for path in (TINY_TOKENIZER, *([REAL_TOKENIZER] if HAS_REAL else [])):
            reference = Tokenizer(path)
            source = RandomTexts(5, reference.texts)
            texts = [b"", *(source.text() for _ in range(2000))]
            results = encode(path, len(reference.texts), texts)
            self.assertEqual(len(results), len(texts))
            for text, ids in zip(texts, results):
                self.assertEqual(ids, reference.encode(text), text)

    def test_character_classes(self):
        """Each code point is a letter, a number, a space or none of them, as in Unicode."""
        classes, = probe_lines("classes", TINY_TOKENIZER, 1024)
        self.assertEqual(len(classes), 0x110000)
        self.assertEqual({code for code, each in enumerate(classes) if each == "S"}, WHITE_SPACE)
        wrong = [f"U+{code:04X}" for code, each in enumerate(classes)
                 if each != class_of(code) and is_known(code)]
        self.assertEqual(wrong, [])

    def cpu_time(self, text):
        """Seconds of the processor that encoding takes."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        encode(TINY_TOKENIZER, 1024, [text])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def test_long_texts(self):
        """Eight times the text takes about eight times as long: nothing is quadratic in it."""
        encode(TINY_TOKENIZER, 1024, [b""])  # builds the probe
        for unit in (b"'s", b" the quick fox", b"a1", b"\n-"):
            with self.subTest(unit):
                short = unit * (50_000 // len(unit))
                time = max(self.cpu_time(short) for _ in range(3))
                self.assertLess(self.cpu_time(8 * short), 24 * time)

    def test_long_pieces(self):
        """A prompt that is a single piece of the greatest length takes some ms."""
        nothing = max(self.cpu_time(b"") for _ in range(3))
        for unit in (b"a", b"theinand", b" ", b"\n", b"-=", "\u3000 ".encode(), b"\xff"):
            with self.subTest(unit):
                text = (unit * 4095)[:4095]
                self.assertLess(min(self.cpu_time(text) for _ in range(3)), nothing + 0.25)


class SyntheticTest(SessionTestCase):
    """Small vocabularies in which a rule decides."""

    RULES = (  # pairs of token and score, a text, its ids
        # Every number stands alone: no token of several is used, nor one with the space before.
        ([(b"4", 0), (b"2", 0), (b"42", 9), (b" ", 0), (b" 4", 9), (b"  ", 1)],
         b"42  42", [0, 1, 5, 0, 1]),
        # The highest score is merged first, not the leftmost pair; scores may be negative.
        ([(b"a", 0), (b"b", 0), (b"c", 0), (b"ab", -2), (b"bc", -1)], b"abcab", [0, 4, 3]),
        # Of equal scores the leftmost, also where merging from the right gives as few tokens.
        ([(b"a", 0), (b"aa", 1)], b"aaaaa", [1, 1, 0]),
        ([(b"a", 0), (b"b", 0), (b"ab", 1), (b"ba", 1)], b"babab", [3, 3, 1]),
        # No zero byte ends a token or a text.
        ([(b"\0", 0), (b"\x01", 0), (b"\x01\0", 1), (b"\x01\0\0", 2), (b"\0\0", 0.5)],
         b"\x01\0\0\0\0\x01\0", [3, 4, 2]),
        # Of equal tokens the first counts, its id and its score.
        ([(b"a", 0), (b"b", 0), (b"c", 0), (b"ab", 1), (b"bc", 2), (b"ab", 3), (b"a", 9)],
         b"abc ab", [0, 4, 3]),
        # Bytes that are not a token are dropped; their neighbours become neighbours within a piece.
        ([(b"a", 0), (b"b", 0), (b"ab", 1), (b"", 5), (b"-", 0)],
         "axb-x\u00ffa\0b-a\u00E9b".encode(), [2, 4, 0, 1, 4, 2]),
        ([(b"a", 0)], b"x\0\xff", []))

    def test_rules(self):
        """Each has the ids that follow from it."""
        path = self.folder() / "tokenizer.bin"
        for tokens, text, expected in self.RULES:
            write_tokenizer(path, tokens)
            self.assertEqual(encode(path, len(tokens), [text]), [expected], tokens)

    def test_random_vocabularies(self):
        """Tokens across all kinds of cuts, many of equal score, have the reference's ids."""
        rng = random.Random(6)
        path = self.folder() / "tokenizer.bin"
        alphabet = [bytes([byte]) for byte in b"as12 \n'.\0\xc3\xa9\xe3\x80"]

        def words(count, most):
            return [b"".join(rng.choices(alphabet, k=rng.randrange(1, most))) for _ in range(count)]
        for _ in range(60):
            tokens = rng.sample(alphabet, 11) + words(150, 6)
            write_tokenizer(path, [(token, rng.randrange(-4, 4)) for token in tokens])
            reference = Tokenizer(path)
            texts = words(40, 60)
            for text, ids in zip(texts, encode(path, len(tokens), texts)):
                self.assertEqual(ids, reference.encode(text), (text, tokens))


class HostileTest(BadFileTestCase):
    """./inference with a foreign tokenizer.bin beside the tiny model's model.bin."""

    def setUp(self):
        self.path = self.folder() / "tokenizer.bin"
        (self.path.parent / "model.bin").symlink_to(TINY / "model.bin")
        self.good = TINY_TOKENIZER.read_bytes()
        self.texts = Tokenizer(TINY_TOKENIZER).texts

    def assert_bytes_rejected(self, data):
        with self.subTest(data[:40], size=len(data)):
            self.path.write_bytes(data)
            self.assert_rejected(self.path)

    def test_what_is_no_regular_file(self):
        """A tokenizer that is missing, a folder, a device or a pipe is rejected."""
        self.assert_only_regular_files(self.path)

    def test_another_length(self):
        """A file that ends too early is rejected, wherever it ends, and one that goes on after the
        model's tokens, be it by a byte, a token or many gigabytes, which are not read.
        """
        size = len(self.good)
        for end in (*range(14), *range(14, size, 797), size - 1):
            self.assert_bytes_rejected(self.good[:end])
        self.assert_bytes_rejected(self.good + struct.pack("<fi", 0, 1) + b"x")
        shutil.copy(TINY_TOKENIZER, self.path)
        for end in (size + 1, 1 << 32, 1 << 33, 1 << 40):
            with self.subTest(end):
                os.truncate(self.path, end)
                self.assert_rejected(self.path)

    def test_damaged_fields(self):
        """So are a negative length, one that leads out of the file, a score that is not finite."""
        *_, previous, last = self.texts
        final = len(self.good) - len(last) - 4  # where the length of the last token is
        one_beyond = len(previous) + 8 + len(last) + 1  # where a last token of length -1 would fit
        damages = [("<i", length, at) for at in (8, final) for length in
                   (-1, -2 ** 31, 2 ** 31 - 1, len(self.good), 0x01000000)]
        damages += [("<i", one_beyond, final - len(previous) - 8)]
        damages += [("<f", score, 4) for score in (math.nan, math.inf, -math.inf)]
        for form, value, at in damages:
            self.assert_bytes_rejected(
                self.good[:at] + struct.pack(form, value) + self.good[at + 4:])

    def test_the_tokenizer_of_another_model(self):
        """So is a tokenizer with more or fewer tokens than the model."""
        for count in (1, 1023, 1025, 49152):
            texts = [b"<|im_start|>", b"<|im_end|>", *(b"%d" % each for each in range(count))]
            with self.subTest(count):
                write_tokenizer(self.path, [(text, 0) for text in texts[:count]])
                self.assert_rejected(self.path)

    def test_no_control_tokens(self):
        """So is one without the two tokens that a chat needs."""
        for name in (b"<|im_start|>", b"<|im_end|>"):
            self.assertIn(name, self.good)
            self.assert_bytes_rejected(self.good.replace(name, b"?" * len(name)))
