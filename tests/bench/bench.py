#!/usr/bin/env python3
"""make bench: how near the engine comes to the machine's limits, as three tables.

    python3 tests/bench/bench.py [RUNS]      RUNS: of which medians are taken (default: 5)

The model has SmolLM-135M's shape and random weights. Decoding has to read all of the weights and of
the KV cache for each token, so its limit is the memory: "of limit" is bytes per token * tokens per
second / the read bandwidth measured in the same run.
"""
import os
import signal
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "experiments")]
from artifacts import compiled_program, smollm_shape  # noqa: E402
from probes import kernel_tables  # noqa: E402
from report import spread, table  # noqa: E402
from support import MAIN, Session  # noqa: E402

POSITIONS, PROMPTS, THREADS = (100, 1000, 2000), (16, 128, 512), (1, 2, 4, 8, 16)
HEAD = [*(f"decoding near {p}, of limit" for p in POSITIONS), *(f"prompt of {p}" for p in PROMPTS)]
BENCH, VOCAB_SIZE = "bench/bench.c", 49152
MINUTES_PER_RUN = 1


def figures(program, *arguments, **environment):
    """The lines of figures that a program prints, as columns."""
    result = subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE,
                            env={**os.environ, **environment}, universal_newlines=True)
    return list(zip(*(map(float, line.split()) for line in result.stdout.splitlines())))


def start_up(folder, kernels):
    """Milliseconds from the start of ./main to the first bytes of a reply, and from the next prompt
    to those of its reply; the engine's peak memory in MB."""
    start, times = time.monotonic(), []
    with closing(Session(MAIN, "-d", folder, "-m", "8", "42", env={"KERNELS": kernels})) as session:
        for _ in range(2):
            session.send("Is this all?\n")
            session.read_until(">>> ")
            while session.mark == len(session.output):
                session.read_more()
            times.append(1000 * (time.monotonic() - start))
            session.read_until("tok/s")
            start = time.monotonic()
        status = Path(f"/proc/{session.engine}/status").read_text()
    return *times, int(status.split("VmHWM:")[1].split()[0]) / 1024


def decoding(bandwidth, seconds, size):
    """Tokens per second, bytes per second and how much of the bandwidth this is, medians."""
    rate = statistics.median(s / t for t, s in zip(seconds, size)) / 1e9
    percent = statistics.median(100 * s / t / b for b, t, s in zip(bandwidth, seconds, size))
    return f"{spread([1 / s for s in seconds])}, {rate:.1f} GB/s, {percent:.0f}%"


def decoding_and_prompts(columns):
    """The cells below HEAD."""
    near = [decoding(*columns[3 * i:3 * i + 3]) for i in range(len(POSITIONS))]
    return near + [spread(rate) for rate in columns[3 * len(POSITIONS):][:len(PROMPTS)]]


def single_thread(runs, model, folder):
    rows = []
    bench = compiled_program(BENCH, "-O3")
    for kernels in kernel_tables():
        columns = figures(bench, model, runs, KERNELS=kernels)
        row = [kernels, spread([b / 1e9 for b in columns[0]]), *decoding_and_prompts(columns)]
        *times, peak = zip(*(start_up(folder, kernels) for _ in range(runs)))
        rows.append([*row, *(spread(t) for t in times), f"{statistics.median(peak):.0f}"])
    megabytes = " and ".join(f"{size / 1e6:.0f} (near {position})"
                             for (size, *_), position in zip(columns[2::3], POSITIONS))
    print(f"One thread. A token reads {megabytes} MB: weights and KV cache. Tokens per second, "
          "median (least-most).\n")
    print(table(["kernels", "read GB/s", *HEAD, "start to first token, ms",
                 "prompt to first token, ms", "memory, MB"], rows), flush=True)


def thread_counts(runs, model):
    rows = []
    bench = compiled_program(BENCH, "-O2", "-DPARALLEL")
    for threads in THREADS:
        columns = figures(bench, model, runs, THREADS=str(threads))
        user, system = columns[-2:]
        rows.append([str(threads), spread([b / 1e9 for b in columns[0]]),
                     *decoding_and_prompts(columns),
                     f"{statistics.median(user):.3f}", f"{statistics.median(system):.3f}"])
    print(f"On {os.cpu_count()} CPUs. User and system seconds are those of 28 tokens near 100.\n")
    print(table(["threads", "read GB/s", *HEAD, "user, s", "system, s"], rows), flush=True)


def drafts(runs, folder):
    """Speculative decoding: tokens per pass, and the speed against that without drafts."""
    rows = []
    bench = compiled_program(BENCH, "-O3")
    for name, option, model in (
            ("small model, the same prompt three times", "--drafts", TESTS / "tiny"),
            ("SmolLM's shape, one token repeated", "--repeating", folder)):
        plain, _, drafted, per_pass = figures(bench, option, model, runs)
        gain = statistics.median(b / a for a, b in zip(plain, drafted))
        rows.append([name, spread(plain), spread(drafted), f"{statistics.median(per_pass):.1f}",
                     f"{gain:.2f}"])
    print("Drafts, on one thread. Tokens per second.\n")
    print(table(["text", "without drafts", "with drafts", "tokens per pass", "gain"], rows))


def main():
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    minutes = round(MINUTES_PER_RUN * runs)
    print(f"Measuring {runs} times on one thread and on several: about {minutes} minutes on two "
          "CPUs.\nThe tables come when they are complete.\n", flush=True)
    folder = smollm_shape(VOCAB_SIZE)
    model = folder / "model.bin"
    single_thread(runs, model, folder)
    thread_counts(runs, model)
    drafts(runs, folder)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)   # Ctrl-C and a closed pipe end the program
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # without a traceback
    main()
