"""The oracle is right: it matches golden data of an independent engine to the last bit."""
import ctypes
import json
import math
import os
import platform
import random
import shutil
import struct
import subprocess
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
from models import BUILD, model_file  # noqa: E402
from reference_tokenizer import Tokenizer, cut, mismatches  # noqa: E402

with open(os.path.join(HERE, "golden", "logits.json"), encoding="utf-8") as golden:
    CASES = json.load(golden)
OPTIMIZED = ("-O2",)
NATIVE = "-march=native" if platform.machine() in ("x86_64", "i686") else "-mcpu=native"
TINY_TOKENIZER = os.path.join(HERE, "tiny", "tokenizer.bin")
SMOLLM_DIR = os.environ.get("SMOLLM_DIR")


def compile_check(compiler, flags):
    """Path of oracle_check as this compiler makes it with these flags."""
    os.makedirs(BUILD, exist_ok=True)
    path = os.path.join(BUILD, "-".join(["oracle_check", os.path.basename(compiler),
                                         *(flag.strip("-") for flag in flags)]))
    unfinished = f"{path}.{os.getpid()}"
    subprocess.run([compiler, *flags, "-o", unfinished, os.path.join(HERE, "oracle_check.c"),
                    "-lm"], check=True)
    os.replace(unfinished, path)
    return path


def output_lines(program, *args, stdin=None):
    result = subprocess.run([program, *map(str, args)], check=True, input=stdin,
                            stdout=subprocess.PIPE, text=True)
    return result.stdout.splitlines()


def to_float32(x):
    return ctypes.c_float(x).value


def next_float32(x, steps=1):
    """The float32 that many steps further from zero than x."""
    bits, = struct.unpack("<I", struct.pack("<f", x))
    return struct.unpack("<f", struct.pack("<I", bits + steps))[0]


def rounded_root_bits(i):
    """The bits of 2^(i/32) as the nearest double, by whole numbers alone."""
    power = 1 << (i + 53 * 32)           # (2^(i/32) * 2^53)^32
    for _ in range(5):
        power = math.isqrt(power)
    mantissa = (power + 1) >> 1          # of 53 bits; a tie cannot be, 2^(i/32) is irrational or 1
    return (1022 << 52) + mantissa       # the leading bit adds the missing 1 to the exponent


def expf_by_the_recipe(x):
    """e^x as the recipe defines it, in python's doubles: never a fused multiply-add."""
    c0 = float.fromhex("0x1.c6af84b912394p-5") / 32768
    c1 = float.fromhex("0x1.ebfce50fac4f3p-3") / 1024
    c2 = float.fromhex("0x1.62e42ff0c52d6p-1") / 32
    shift = 1.5 * 2.0 ** 52
    if math.isnan(x):
        return x
    if x > float.fromhex("0x1.62e42ep6"):
        return math.inf
    if x < float.fromhex("-0x1.9fe368p6"):
        return 0.0
    z = x * float.fromhex("0x1.71547652b82fep+5")
    k = z + shift
    r = z - (k - shift)
    k = int(k - shift)
    s = struct.unpack("<d", struct.pack("<Q", rounded_root_bits(k % 32) + (k // 32 << 52)))[0]
    return to_float32(((c0 * r + c1) * (r * r) + (c2 * r + 1)) * s)


def coins(seed):
    """The numbers in [0, 1) that xorshift64* gives for this seed, 24 bits each."""
    state, mask = seed, (1 << 64) - 1
    while True:
        state ^= state >> 12
        state ^= state << 25 & mask
        state ^= state >> 27
        yield ((state * 0x2545F4914F6CDD1D & mask) >> 40) / 2 ** 24


class OracleTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.check = compile_check(os.environ.get("CC", "cc"), OPTIMIZED)

    def assert_matches_golden(self, program, case):
        tokens, samples = case["tokens"], case["samples"]
        lines = output_lines(program, "model", model_file(case["make_model"]), case["seed"],
                             case["temperature"], case["top_p"], len(samples), *tokens)
        first4 = lines[len(tokens)].split()
        self.assertEqual(lines[:len(tokens)], case["logits_fnv1a64"])
        self.assertEqual([float.fromhex(x) for x in first4],
                         [float.fromhex(x) for x in case["last_prompt_logits_first4"]])
        self.assertEqual([int(x) for x in lines[len(tokens) + 1:-1]], samples)
        self.assertEqual(lines[-1], case["final_logits_fnv1a64"])

    def test_golden_logits_and_samples_are_matched_to_the_last_bit(self):
        for case in CASES:
            with self.subTest(case["make_model"]):
                self.assert_matches_golden(self.check, case)

    def test_neither_compiler_nor_instruction_set_changes_a_bit(self):
        for compiler in filter(shutil.which, ("gcc", "clang")):
            for flags in (("-O0",), ("-O3", NATIVE)):
                with self.subTest(compiler=compiler, flags=flags):
                    program = compile_check(compiler, flags)
                    for case in CASES[:2]:
                        self.assert_matches_golden(program, case)

    def test_rope_table_has_the_pinned_hashes(self):
        self.assertEqual(output_lines(self.check, "rope", 64), ["bc7abfcedbd264a0"])
        self.assertEqual(output_lines(self.check, "rope", 32), ["e498eb4a61118be9"])

    def test_table_of_expf_is_correctly_rounded(self):
        expected = [f"{rounded_root_bits(i) - (i << 47):016x}" for i in range(32)]
        self.assertEqual(output_lines(self.check, "table"), expected)

    def assert_expf(self, inputs, expected):
        lines = output_lines(self.check, "expf", *(x.hex() for x in inputs))
        self.assertEqual(len(lines), len(inputs))
        for x, line, wanted in zip(inputs, lines, expected):
            got = float.fromhex(line)
            same = got == wanted or (math.isnan(got) and math.isnan(wanted))
            self.assertTrue(same, f"expf({x.hex()}) is {line}, not {wanted.hex()}")

    def test_expf_at_special_values(self):
        highest = float.fromhex("0x1.62e42ep6")
        lowest = float.fromhex("-0x1.9fe368p6")
        values = {0.0: 1.0, -0.0: 1.0, 2.0 ** -149: 1.0, -(2.0 ** -149): 1.0,
                  math.inf: math.inf, -math.inf: 0.0,
                  highest: float.fromhex("0x1.ffff08p+127"), next_float32(highest): math.inf,
                  lowest: 2.0 ** -149, next_float32(lowest): 0.0}
        self.assert_expf([*values, math.nan], [*values.values(), math.nan])

    def test_expf_follows_the_recipe(self):
        rng = random.Random(1)
        inputs = [to_float32(rng.uniform(-104, 89)) for _ in range(4000)]
        inputs += [to_float32(rng.gauss(0, 1)) for _ in range(1000)]
        self.assert_expf(inputs, map(expf_by_the_recipe, inputs))

    def test_expf_agrees_with_libm(self):
        differing, largest = map(int, output_lines(self.check, "libm", 2000000)[0].split())
        self.assertLessEqual(differing, 5)
        self.assertLessEqual(largest, 1)

    def test_quantize_rounds_halves_away_from_zero_and_nothing_below(self):
        below_half = float.fromhex("0x1.fffffep-2")  # 0.49999997: plus 0.5 it rounds to 1
        group = [127.0, below_half, -below_half, 0.5, -0.5, 1.5, -2.5, -127.0] + [0.0] * 56
        expected = [127, 0, 0, 1, -1, 2, -3, -127] + [0] * 56
        zeros = [-0.0] * 64
        values, scales = output_lines(self.check, "quantize", *(x.hex() for x in group + zeros))
        self.assertEqual([int(x) for x in values.split()], expected + [0] * 64)
        self.assertEqual([float.fromhex(x) for x in scales.split()], [1.0, 0.0])

    def sampled(self, top_p, logits, temperature=0.6):
        lines = output_lines(self.check, "sample", 42, temperature, top_p, 100, *logits)
        return [int(line) for line in lines]

    def test_temperature_0_takes_the_first_maximum(self):
        self.assertEqual(self.sampled(0.9, [1, 3, 2, 3], temperature=0), [1] * 100)

    def test_equal_probabilities_are_taken_by_rising_id(self):
        flat = [0, 0, -1000, 0, 0]       # four probabilities of exactly 1/4
        kept = [0, 1, 3, 4]
        all_four = [kept[int(coin * 4)] for coin, _ in zip(coins(42), range(100))]
        three = [kept[int(coin * 3)] for coin, _ in zip(coins(42), range(100))]
        self.assertEqual(self.sampled(1.0, flat), all_four)
        self.assertEqual(self.sampled(0.5, flat), three)  # a sum of exactly 0.5 does not exceed it

    def test_top_p_0_takes_the_likeliest_even_if_none_reaches_the_cutoff(self):
        self.assertEqual(self.sampled(0.0, [0, 1, 5, 1]), [2] * 100)
        self.assertEqual(self.sampled(0.0, [0, 0, 0, 0]), [0] * 100)


class TokenizerTest(unittest.TestCase):
    @unittest.skipUnless(SMOLLM_DIR, "needs SMOLLM_DIR, the folder of SmolLM's tokenizer.bin")
    def test_reference_gives_the_ids_of_smollms_own_tokenizer(self):
        with open(os.path.join(HERE, "golden", "tokenizer_cases.json"), encoding="utf-8") as file:
            cases = json.load(file)
        tokenizer = Tokenizer(os.path.join(SMOLLM_DIR, "tokenizer.bin"))
        self.assertEqual(list(mismatches(tokenizer, cases)), [])

    def test_pieces_joined_are_the_text_whatever_the_bytes(self):
        rng = random.Random(3)
        alphabet = (b"a", b"'s", b"1", b" ", b"\n", b"\x1c", b".", "é½日\u0301\u0085\u3000".encode(),
                    b"\xc3", b"\xe2\x82", b"\xed\xa0\x80", b"\xf4\x90", b"\xff", b"\0")
        for _ in range(5000):
            text = b"".join(rng.choices(alphabet, k=rng.randrange(12)))
            self.assertEqual(b"".join(cut(text)), text)

    def assert_merges_agree(self, path):
        tokenizer = Tokenizer(path)
        rng = random.Random(4)
        pieces = [bytes(rng.choices(b"aeinorst", k=rng.randrange(1, 40))) for _ in range(300)]
        pieces += [rng.randbytes(rng.randrange(1, 40)) for _ in range(300)]
        pieces += [b"".join(rng.choices(tokenizer.texts, k=6)) for _ in range(300)]
        pieces += [b"a" * 1000, b" " * 1000]
        lines = output_lines(compile_check(os.environ.get("CC", "cc"), OPTIMIZED), "bpe", path,
                             len(tokenizer.texts), stdin="".join(p.hex() + "\n" for p in pieces))
        self.assertEqual(len(lines), len(pieces))
        for piece, line in zip(pieces, lines):
            self.assertEqual([int(x) for x in line.split()], tokenizer.merge(piece), piece)

    def test_oracle_and_reference_merge_alike(self):
        self.assert_merges_agree(TINY_TOKENIZER)
        if SMOLLM_DIR:
            self.assert_merges_agree(os.path.join(SMOLLM_DIR, "tokenizer.bin"))


if __name__ == "__main__":
    unittest.main()
