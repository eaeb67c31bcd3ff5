// parallel.c - the engine on a pool of threads: the front end's child (main -j), or run by hand.
//
//     ./parallel [options] <threads> <seed> ["prompt" ...]
//
// model.h has what is computed, the same to the last bit for any number of threads. This file
// decides which thread computes which piece of a step, and how the threads wait for each other.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>

// How long a worker spins before it sleeps: most waits are shorter, and to sleep and wake up takes
// longer. A longer spin would keep the CPU from a worker that the others wait for.
#define SPIN_SECONDS 13e-6

// ------------------------------------------------------------------------------------------------
// The pool
//
// The thread that creates the pool is worker 0: it publishes a pass, and the other workers wake up
// and take part. There are at most as many workers as CPUs; the threads beyond sleep all along.
//
// The pieces of a step are divided among the workers. A worker claims the pieces of its own share
// in order, which lie one after another in memory, and then those that are left of the others'
// shares. So a worker that loses its CPU delays the others by one piece, and one that wakes late
// finds the pieces done and goes on to the next step.

// The lower bits of WorkerSlot.claims are a piece's number: a step has at most MAX_VOCAB / 32, as
// rows_per_piece() is at least 32. The other 44 bits count the steps: enough for a year at 500,000
// steps per second.
#define PIECE_BITS 20

typedef struct {
    // Which pieces of this worker's share are claimed: step << PIECE_BITS | the next piece. While
    // that is an earlier step, no piece of the current step has been claimed, so nothing has to be
    // reset between steps.
    _Alignas(64) atomic_ullong claims;
    atomic_ullong done; // pieces that this worker has computed, in all steps
    // Only the worker itself uses these, in a cache line of their own.
    _Alignas(64) unsigned long long step; // number of its current step
    unsigned long long total;             // pieces of all steps up to this one, included
    unsigned long long claimed;           // pieces that this worker has claimed, in all steps
} WorkerSlot;

typedef struct {
    double user, system; // seconds of CPU time
} Usage;

typedef struct {
    pthread_t threads[MAX_THREADS]; // without thread 0, which is the caller
    Usage usage[MAX_THREADS];       // of each thread, when it has ended
    int size, workers;              // threads, and how many of them take part in passes
    WorkerSlot slots[MAX_THREADS];  // one for each worker
    atomic_int asleep;              // workers that sleep in barrier_wait()

    pthread_mutex_t lock;           // guards all that follows
    pthread_cond_t step_done;       // wakes the sleepers in barrier_wait()
    pthread_cond_t work_ready;      // wakes the workers between two passes
    pthread_cond_t closed;          // wakes the other threads
    Pass pass;                      // the last one that was published
    unsigned long long passes;      // how many were published
    unsigned long long step, total; // worker 0's when that pass was published
    bool closing;
} Pool;
static Pool pool;

// Returns whether a step is done, where `total` is the number of pieces of all steps up to it. No
// piece of a later step is computed before, so the sum of all finished pieces shows it.
static bool are_done(unsigned long long total) {
    unsigned long long sum = 0;
    for (int i = 0; i < pool.workers; i++) sum += pool.slots[i].done;
    return sum >= total;
}

// Returns when all pieces of the worker's step are done. No lost wake-up: an arriving worker stores
// its count and then loads `asleep`; a sleeper increments `asleep` and then loads the counts. Both
// are sequentially consistent, so at least one sees the other.
static void barrier_wait(WorkerSlot *slot) {
    slot->done = slot->claimed;
    if (pool.asleep > 0 && are_done(slot->total)) {
        pthread_mutex_lock(&pool.lock);
        pthread_cond_broadcast(&pool.step_done);
        pthread_mutex_unlock(&pool.lock);
    }
    for (double end = seconds(CLOCK_MONOTONIC) + SPIN_SECONDS; seconds(CLOCK_MONOTONIC) < end;)
        if (are_done(slot->total)) return;
    pthread_mutex_lock(&pool.lock);
    pool.asleep++;
    while (!are_done(slot->total)) pthread_cond_wait(&pool.step_done, &pool.lock);
    pool.asleep--;
    pthread_mutex_unlock(&pool.lock);
}

// Claims the next piece of the owner's share, in the step of `slot`, the claiming worker. Returns
// false if none is left, else its number in *next.
static bool claim_from(const WorkerSlot *slot, int owner, size_t pieces, size_t *next) {
    size_t first = pieces * owner / pool.workers, end = pieces * (owner + 1) / pool.workers;
    unsigned long long seen = pool.slots[owner].claims;
    do {
        unsigned long long step = seen >> PIECE_BITS;
        *next = step == slot->step ? seen & ((1 << PIECE_BITS) - 1) : first;
        if (step > slot->step || *next == end) return false; // the step or the share is used up
    } while (!atomic_compare_exchange_weak(&pool.slots[owner].claims, &seen,
                                           slot->step << PIECE_BITS | (*next + 1)));
    return true;
}

static bool claim(int worker, size_t count, size_t piece_size, Range *piece) {
    WorkerSlot *slot = &pool.slots[worker];
    size_t pieces = (count + piece_size - 1) / piece_size, next;
    if (piece->end == 0) slot->step++, slot->total += pieces; // the first call of a step
    for (int i = 0; i < pool.workers; i++)
        if (claim_from(slot, (worker + i) % pool.workers, pieces, &next)) {
            slot->claimed++;
            *piece = (Range){next * piece_size, min_size((next + 1) * piece_size, count)};
            return true;
        }
    barrier_wait(slot);
    return false;
}

// Returns the CPU time of the calling thread. getrusage(2) has it as of the kernel's last tick;
// reading the thread's CPU clock brings it up to date.
static Usage thread_usage(void) {
    struct rusage usage;
    seconds(CLOCK_THREAD_CPUTIME_ID);
    getrusage(RUSAGE_THREAD, &usage);
    return (Usage){(double)usage.ru_utime.tv_sec + 1e-6 * (double)usage.ru_utime.tv_usec,
                   (double)usage.ru_stime.tv_sec + 1e-6 * (double)usage.ru_stime.tv_usec};
}

// A thread of the pool: waits for a pass, takes part in it, and repeats that.
static void *thr_func(void *argument) {
    int thread = (int)(intptr_t)argument;
    bool is_worker = thread < pool.workers;
    unsigned long long seen = 0;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (!pool.closing && (!is_worker || pool.passes == seen))
            pthread_cond_wait(is_worker ? &pool.work_ready : &pool.closed, &pool.lock);
        if (pool.closing) break;
        seen = pool.passes;
        // A copy: worker 0 may publish the next pass while a late worker still goes through this.
        Pass pass = pool.pass;
        pool.slots[thread].step = pool.step;
        pool.slots[thread].total = pool.total;
        pthread_mutex_unlock(&pool.lock);
        forward_steps(&pass, thread);
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    pool.usage[thread] = thread_usage();
    return NULL;
}

static void run_pass(Pass *pass) {
    pass->workers = pool.workers;
    pthread_mutex_lock(&pool.lock);
    pool.pass = *pass;
    pool.passes++;
    pool.step = pool.slots[0].step;
    pool.total = pool.slots[0].total;
    pthread_cond_broadcast(&pool.work_ready);
    pthread_mutex_unlock(&pool.lock);
    forward_steps(pass, 0);
}

// Ends and joins all threads but the caller.
static void close_thr_pool(void) {
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    pthread_cond_broadcast(&pool.work_ready);
    pthread_cond_broadcast(&pool.closed);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 1; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
}

// Makes the caller and threads - 1 new ones a pool, the first `workers` of which take part in
// passes. Returns 0, or -1 after reporting which thread cannot be created, with none of them left.
static int start_threads(int threads, int workers) {
    pool = (Pool){.workers = workers,
                  .lock = PTHREAD_MUTEX_INITIALIZER,
                  .step_done = PTHREAD_COND_INITIALIZER,
                  .work_ready = PTHREAD_COND_INITIALIZER,
                  .closed = PTHREAD_COND_INITIALIZER};
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

// Prints the CPU time of each thread. Thread 0 is the main thread, which has a line of its own for
// what it had used before it created the pool.
static void print_usage(Usage before) {
    Usage whole = {0}, now = thread_usage();
    pool.usage[0] = (Usage){now.user - before.user, now.system - before.system};
    for (int i = 0; i <= pool.size; i++) {
        Usage usage = i < pool.size ? pool.usage[i] : before;
        whole.user += usage.user;
        whole.system += usage.system;
        if (i < pool.size) printf("Thread %d has completed", i);
        else printf("main thread");
        printf(" - user: %.4f s, system: %.4f s\n", usage.user, usage.system);
    }
    printf("Whole process - user: %.4f s, system: %.4f s\n", whole.user, whole.system);
}

#define USAGE                                                                                      \
    SETTINGS_USAGE                                                                                 \
    " <threads> <seed> [\"prompt\" ...]\n" SETTINGS_HELP "\n  threads             1 to 64\n"       \
    "  prompt              answered in turn; without one, prompts are read from stdin"

int main(int argc, char **argv) {
    reserve_standard_fds();
    Settings settings = DEFAULT_SETTINGS;
    long threads;
    CommandLine line = {.argc = argc, .argv = argv, .usage = USAGE, .wanted = 2};
    parse_settings(&settings, &line);
    bool valid = false;
    if (line.count < 2) report_error("The number of threads and the seed are needed.");
    else if (!parse_integer(line.operands[0], 1, MAX_THREADS, &threads))
        report_error("%s is not a number of threads.", line.operands[0]);
    else if (!parse_seed(line.operands[1], &settings.seed))
        report_error("%s is not a seed.", line.operands[1]);
    else valid = true;
    if (!valid) exit_with_usage(&line, 2);
    choose_seed(&settings);

    Session session;
    int result = build_session(&session, &settings);
    Usage before = thread_usage();
    if (result == 0) result = init_thr_pool((int)threads);
    if (result == 0) {
        result = serve(generate, &session, argv + optind, argc - optind);
        close_thr_pool();
        print_usage(before);
    }
    free_session(&session);
    return result < 0 || flush_output() < 0 ? 1 : 0;
}
