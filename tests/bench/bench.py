#!/usr/bin/env python3
"""make bench: how near the engine comes to the machine's limits, as two tables.

    python3 tests/bench/bench.py [RUNS]      medians of so many runs (default: 5)

The model has SmolLM-135M's shape and random weights; tests/helpers/make_model.py writes it once. Decoding has to
read all of the weights and of the key and value caches for each token, so its limit is the memory:
"of limit" is bytes per token * tokens per second / the read bandwidth measured in the same run.
"""
import os
import select
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))
from artifacts import BUILD, TESTS, TOP, smollm_shape  # noqa: E402

POSITIONS, PROMPTS, THREADS = (100, 1000, 2000), (16, 128, 512), (1, 2, 4, 8, 16)
HEAD = [*(f"decoding near {p}, of limit" for p in POSITIONS), *(f"prompt of {p}" for p in PROMPTS)]
VOCAB_SIZE = 49152
MINUTES_PER_RUN = 1


def build(name, *flags):
    """bench.c with the options of the one-line builds."""
    program = Path(BUILD) / name
    subprocess.run(["gcc", "-Wall", "-Wextra", "-o", program, TESTS / "bench" / "bench.c", *flags,
                    "-lm", "-lpthread"], check=True)
    return program


def figures(program, *arguments, **environment):
    """The lines of figures that a program prints, as columns."""
    result = subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.PIPE,
                            env={**os.environ, **environment}, universal_newlines=True)
    return list(zip(*(map(float, line.split()) for line in result.stdout.splitlines())))


def spread(values, form="{:.0f}"):
    """Median (least to most)."""
    least, median, most = min(values), statistics.median(values), max(values)
    return f"{form} ({form}-{form})".format(median, least, most)


def print_table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print(flush=True)


def start_up(folder, **environment):
    """Seconds from exec to the ready byte, from a prompt to the reply's first bytes; peak memory, MB.

    The part of main is played here: see the protocol in common.h.
    """
    returns, engine_end = os.pipe()
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def become_engine():
        os.dup2(engine_end, 3)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

    start = time.monotonic()
    engine = subprocess.Popen(
        [TOP / "inference", "-d", folder, "-m", "8", "42"], stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, preexec_fn=become_engine, pass_fds=(3,),
        env={**os.environ, "CHAT_FRONT_END": str(os.getpid()), **environment})
    os.close(engine_end)
    os.read(returns, 1)
    ready = time.monotonic()
    engine.stdin.write(b"Is this all?\n")
    engine.stdin.flush()
    engine.send_signal(signal.SIGUSR1)
    select.select([engine.stdout], [], [])
    first = time.monotonic()
    os.read(returns, 1)
    status = Path(f"/proc/{engine.pid}/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    engine.stdin.close()
    engine.send_signal(signal.SIGUSR1)
    engine.stdout.read()
    engine.wait()
    os.close(returns)
    return ready - start, first - ready, peak


def decoding(bandwidth, seconds, size):
    """Tokens per second and how much of the bandwidth they use, medians over the runs."""
    percent = statistics.median(100 * s / t / b for b, t, s in zip(bandwidth, seconds, size))
    return f"{spread([1 / s for s in seconds])}, {percent:.0f}%"


def decoding_and_prompts(columns):
    """The cells below HEAD."""
    near = [decoding(*columns[3 * i:3 * i + 3]) for i in range(len(POSITIONS))]
    return near + [spread(rate) for rate in columns[3 * len(POSITIONS):][:len(PROMPTS)]]


def single_thread(runs, model, folder):
    rows = []
    bench = build("bench", "-O3")
    for kernels in kernel_names(bench):
        columns = figures(bench, model, runs, KERNELS=kernels)
        row = [kernels, spread([b / 1e9 for b in columns[0]], "{:.1f}"), *decoding_and_prompts(columns)]
        ready, first, peak = zip(*(start_up(folder, KERNELS=kernels) for _ in range(runs)))
        row += [spread([1000 * t for t in ready], "{:.1f}"), spread([1000 * t for t in first], "{:.1f}"),
                f"{statistics.median(peak):.0f}"]
        rows.append(row)
    plain = figures(bench, "--plain", model, runs)[0]
    rows.append(["plain loops", "", spread([1 / s for s in plain], "{:.1f}")] + [""] * 8)
    print("One thread. Decoding and prompts in tokens per second, median (least-most).\n")
    print_table(["kernels", "read GB/s", *HEAD, "ready, ms", "first token, ms", "memory, MB"], rows)


def kernel_names(bench):
    """The names of the kernel tables that this machine has, the best first."""
    result = subprocess.run([bench, "--tables"], check=True, stdout=subprocess.PIPE,
                            universal_newlines=True)
    return result.stdout.split()


def thread_counts(runs, model):
    rows = []
    bench = build("bench-parallel", "-O2", "-DPARALLEL")
    for threads in THREADS:
        columns = figures(bench, model, runs, THREADS=str(threads))
        user, system = columns[-2:]
        rows.append([str(threads), spread([b / 1e9 for b in columns[0]], "{:.1f}"),
                     *decoding_and_prompts(columns),
                     f"{statistics.median(user):.3f}", f"{statistics.median(system):.3f}"])
    print(f"Threads, on {os.cpu_count()} CPUs. User and system seconds are those of 28 tokens near 100.\n")
    print_table(["threads", "read GB/s", *HEAD, "user, s", "system, s"], rows)


def drafts(runs, folder):
    """Speculative decoding: tokens per pass, and the speed against that without drafts."""
    rows = []
    bench = build("bench", "-O3")
    for name, option, model in (("small model, the same prompt three times", "--drafts", TESTS / "tiny"),
                                ("SmolLM's shape, one token repeated", "--repeating", folder)):
        plain, _, drafted, per_pass = figures(bench, option, model, runs)
        gain = statistics.median(b / a for a, b in zip(plain, drafted))
        rows.append([name, spread(plain), spread(drafted), f"{statistics.median(per_pass):.1f}",
                     f"{gain:.2f}"])
    print("Drafts, on one thread. Tokens per second.\n")
    print_table(["text", "without drafts", "with drafts", "tokens per pass", "gain"], rows)


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
