// parallel.c - the engine on a pool of threads: the front end's child (main -j), or run by hand.
//
//     ./parallel [options] <threads> <seed> ["prompt" ...]
//
// model.h has what is computed, the same to the last bit for any number of threads. This file has
// the thread pool that divides each step of the forward pass among its workers.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <sys/resource.h>

// How long a thread spins before it sleeps: most waits are shorter, and to sleep and wake up takes
// longer. A longer spin would keep the CPU from a worker that the others wait for.
#define SPIN_SECONDS 13e-6

// ------------------------------------------------------------------------------------------------
// The pool
//
// Fork-join: the thread that creates the pool is worker 0 and runs forward(). Its
// parallel_for() publishes a step, takes part in it like the other workers, and waits until the
// last piece is done. There are at most as many workers as CPUs; the remaining threads sleep.

typedef struct {
    double user, system; // seconds
} CpuTime;

typedef struct {
    pthread_t threads[MAX_THREADS]; // without thread 0, which is the caller
    CpuTime cpu_times[MAX_THREADS]; // of each thread, when it has ended
    int size, workers;              // threads, and how many of them are workers

    // The current step: the arguments of parallel_for(), and into how many pieces it is divided.
    // A late worker is harmless: it reads these only between claiming pieces and counting them as
    // done, and worker 0 writes them only when all pieces are done. So it takes part in the step
    // that is current when it claims, or finds nothing to claim.
    Step *step;
    const void *args;
    size_t count, piece_size, pieces;
    _Alignas(64) atomic_size_t unclaimed;  // pieces that no worker has claimed yet
    _Alignas(64) atomic_size_t unfinished; // pieces that no worker has done yet

    _Alignas(64) atomic_bool closing;
    pthread_mutex_t lock;      // of the conditions
    pthread_cond_t work_ready; // wakes the workers
    pthread_cond_t step_done;  // wakes worker 0
    pthread_cond_t closed;     // wakes the remaining threads
} Pool;
static Pool pool = {.lock = PTHREAD_MUTEX_INITIALIZER,
                    .work_ready = PTHREAD_COND_INITIALIZER,
                    .step_done = PTHREAD_COND_INITIALIZER,
                    .closed = PTHREAD_COND_INITIALIZER};

static bool is_closing(void) { return pool.closing; }
static bool is_work_ready(void) { return pool.unclaimed > 0 || pool.closing; }
static bool is_step_done(void) { return pool.unfinished == 0; }

// Returns when an event has happened: spins, then sleeps. No lost wake-up: a sleeper checks for the
// event under the lock before it waits, and wake() takes the lock after the event has happened.
static void wait_for(bool (*has_happened)(void), pthread_cond_t *condition) {
    for (double end = seconds(CLOCK_MONOTONIC) + SPIN_SECONDS; seconds(CLOCK_MONOTONIC) < end;)
        if (has_happened()) return;
    pthread_mutex_lock(&pool.lock);
    while (!has_happened()) pthread_cond_wait(condition, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

// Wakes the threads that wait for an event, which has happened.
static void wake(pthread_cond_t *condition) {
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(condition);
    pthread_mutex_unlock(&pool.lock);
}

// Claims pieces of the current step and does them, until none is left. A claim takes an equal share
// of the pieces that are left (guided self-scheduling): first long runs of items, then single
// pieces, so that all workers finish together. With single pieces only, a token takes 1.1 times as
// long.
static void take_part(int worker) {
    for (size_t left = pool.unclaimed; left > 0; left = pool.unclaimed) {
        size_t claimed = (left + pool.workers - 1) / pool.workers;
        if (!atomic_compare_exchange_strong(&pool.unclaimed, &left, left - claimed)) continue;
        size_t first = (pool.pieces - left) * pool.piece_size;
        size_t end = min_size(first + claimed * pool.piece_size, pool.count);
        pool.step(pool.args, (Range){first, end, worker});
        if (atomic_fetch_sub(&pool.unfinished, claimed) == claimed) wake(&pool.step_done);
    }
}

static void parallel_for(Step *step, const void *args, size_t count, size_t piece_size) {
    if (piece_size == 0) piece_size = (count + pool.workers - 1) / pool.workers;
    size_t pieces = (count + piece_size - 1) / piece_size;
    if (pieces == 1 || pool.workers == 1) {
        step(args, (Range){0, count, 0});
        return;
    }
    pool.step = step;
    pool.args = args;
    pool.count = count;
    pool.piece_size = piece_size;
    pool.pieces = pieces;
    pool.unfinished = pieces;
    pool.unclaimed = pieces; // publishes the step
    wake(&pool.work_ready);
    take_part(0);
    wait_for(is_step_done, &pool.step_done);
}

// Returns the CPU time of the calling thread. getrusage(2) has it as of the kernel's last tick;
// reading the thread's CPU clock brings it up to date.
static CpuTime thread_cpu_time(void) {
    struct rusage usage;
    seconds(CLOCK_THREAD_CPUTIME_ID);
    if (getrusage(RUSAGE_THREAD, &usage) < 0) die("getrusage");
    return (CpuTime){(double)usage.ru_utime.tv_sec + (double)usage.ru_utime.tv_usec / 1e6,
                     (double)usage.ru_stime.tv_sec + (double)usage.ru_stime.tv_usec / 1e6};
}

static void *thr_func(void *argument) {
    int thread = (int)(intptr_t)argument;
    if (thread >= pool.workers) wait_for(is_closing, &pool.closed);
    while (!pool.closing) {
        wait_for(is_work_ready, &pool.work_ready);
        take_part(thread);
    }
    pool.cpu_times[thread] = thread_cpu_time();
    return NULL;
}

// Ends and joins all threads but the caller.
static void close_thr_pool(void) {
    pool.closing = true;
    wake(&pool.work_ready);
    wake(&pool.closed);
    for (int i = 1; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
}

// Makes the caller and threads - 1 new ones a pool, the first `workers` of which take part in
// steps. Returns 0, or -1 after reporting which thread cannot be created, with none of them left.
static int start_threads(int threads, int workers) {
    pool.workers = workers;
    for (pool.size = 1; pool.size < threads; pool.size++) {
        int error =
            pthread_create(&pool.threads[pool.size], NULL, thr_func, (void *)(intptr_t)pool.size);
        if (error == 0) continue;
        report_error("Thread %d of %d cannot be created: %s.", pool.size + 1, threads,
                     strerror(error));
        close_thr_pool();
        return -1;
    }
    return 0;
}

// The same, with at most one worker per CPU.
static int init_thr_pool(int threads) {
    cpu_set_t cpus;
    int usable = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? CPU_COUNT(&cpus) : threads;
    return start_threads(threads, threads < usable ? threads : usable);
}

// ------------------------------------------------------------------------------------------------
// The program

static void print_cpu_time(CpuTime used) {
    printf(" - user: %.4f s, system: %.4f s\n", used.user, used.system);
}

// Prints the CPU time of each thread. Thread 0 is the main thread, which has a line of its own for
// `loading`, what it had used before it created the pool.
static void print_cpu_times(CpuTime loading) {
    CpuTime whole = thread_cpu_time();
    pool.cpu_times[0] = (CpuTime){whole.user - loading.user, whole.system - loading.system};
    for (int i = 0; i < pool.size; i++) {
        if (i > 0) whole.user += pool.cpu_times[i].user, whole.system += pool.cpu_times[i].system;
        printf("Thread %d has completed", i);
        print_cpu_time(pool.cpu_times[i]);
    }
    printf("main thread");
    print_cpu_time(loading);
    printf("Whole process");
    print_cpu_time(whole);
}

#define USAGE                                                                                      \
    SETTINGS_USAGE                                                                                 \
    " <threads> <seed> [\"prompt\" ...]\n" SETTINGS_HELP "\n  threads             1 to 64\n"       \
    "  prompt              answered one after the other; without one, prompts are read from "      \
    "stdin;\n                      \"--\" before the first that begins with -"

int main(int argc, char **argv) {
    reserve_standard_fds();
    Settings settings = DEFAULT_SETTINGS;
    parse_settings(&settings, argc, argv, USAGE);
    const char *text = optind < argc ? argv[optind++] : "";
    int threads;
    if (!parse_integer(text, 1, MAX_THREADS, &threads)) {
        report_error("Expected the number of threads, from 1 to 64, not \"%s\".", text);
        exit_with_usage(USAGE, 2);
    }
    settings.seed = parse_seed(argv[optind], USAGE);

    Session session;
    int result = build_session(&session, &settings);
    CpuTime loading = thread_cpu_time();
    if (result == 0) result = init_thr_pool(threads);
    if (result == 0) {
        result = serve(generate, &session, argv + optind + 1, argc - optind - 1);
        close_thr_pool();
        print_cpu_times(loading);
    }
    free_session(&session);
    return result < 0 || flush_output() < 0 ? 1 : 0;
}
