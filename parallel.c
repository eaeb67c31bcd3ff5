// parallel.c - the engine on a pool of threads: the front end's child (main -j), or run by hand.
//
//     ./parallel [options] <threads> <seed> ["prompt" ...]
//
// To accelerate GPT and get a faster response, it is critical to have faster matrix-vector
// multiplication and faster multi-head attention: the rows of the matrices and the heads (for a
// prompt, the tokens) are shared out among the threads. What is computed is model.h's, the same to
// the last bit for any number of threads. Here is only who computes, and how they wait for each
// other.
#define _GNU_SOURCE
#include "common.h"
#include "model.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <sys/time.h>

// Looks at the others' progress before a waiting thread goes to sleep: 250 microseconds on a Zen 4
// at 3.7 GHz, several times what it takes to sleep and be woken. 0 leaves all waiting to the mutex,
// which helgrind understands.
#ifndef SPIN
#define SPIN 10000
#endif

// ------------------------------------------------------------------------------------------------
// The pool
//
// One group of threads for everything. The thread that created it is thread 0: it hands out a pass
// and takes part in it, so that nobody has to be woken between a token and the next. Who takes part
// is a worker of the pass and has a number there; there are no more workers than CPUs. They walk
// through the pass together and meet a handful of times per layer. If the pool has more threads,
// all but thread 0 take turns instead of pushing each other off the CPUs (so with a single CPU,
// thread 0 does everything). A turn is some passes long, as the scheduler needs a while to give
// each thread a CPU of its own.

#define TURN 4 // passes
#define NOTHING (-1)

// What a worker tells the others, in a cache line that during a pass only it writes. (The line of a
// mutex or of a common count has to travel to each CPU in turn, as everybody writes it.)
typedef struct {
    _Alignas(64) atomic_uint meetings; // how many it has come to
    atomic_int cpu;                    // where it was last seen, or NOTHING
} Seat;

static struct {
    pthread_t threads[MAX_THREADS];   // but for thread 0
    struct rusage usage[MAX_THREADS]; // times of thread 0 in all passes, of the others at their end
    int size;                         // threads of the pool
    int places;                       // workers of a pass
    Seat seats[MAX_THREADS];          // one for each place
    atomic_uint passes;               // how many have been handed out
    atomic_int asleep;                // workers that sleep in meet()

    pthread_mutex_t lock;              // guards all that follows
    pthread_cond_t given[MAX_THREADS]; // each thread sleeps here until it has work,
    pthread_cond_t all_met;            // and here until the other workers have done theirs
    const Pass *pass;                  // the one that was handed out last
    int worker[MAX_THREADS];           // a thread's number in the pass until it begins, or NOTHING
    bool closing;
} pool;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Notes where a worker is, and tells whether another one was last seen on the same CPU.
static bool shares_cpu(int worker, int workers) {
    int cpu = sched_getcpu();
    pool.seats[worker].cpu = cpu;
    for (int i = 0; i < workers; i++)
        if (i != worker && pool.seats[i].cpu == cpu) return true;
    return false;
}

// How often a worker may look before it sleeps: not at all where it would keep another one, for
// which it may be waiting, off the CPU.
static int patience(int worker, int workers) {
    return SPIN == 0 || shares_cpu(worker, workers) ? 0 : SPIN;
}

// Moves the calling thread away from the CPUs of all workers, if there is another one. The
// scheduler often puts two threads that are woken together on one CPU, and may leave them there: as
// each sleeps while the other works, it sees no need for a second one. To forbid a thread its CPU
// moves it at once; then it may go everywhere again. (Under SCHED_DEADLINE the kernel refuses,
// and the thread stays where it is.)
static void step_aside(int workers) {
    cpu_set_t usable, others;
    if (sched_getaffinity(0, sizeof(usable), &usable) < 0) return;
    others = usable;
    pthread_mutex_lock(&pool.lock); // which only helgrind needs here
    for (int i = 0; i < workers; i++)
        if (pool.seats[i].cpu != NOTHING) CPU_CLR((size_t)pool.seats[i].cpu, &others);
    pthread_mutex_unlock(&pool.lock);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0)
        sched_setaffinity(0, sizeof(usable), &usable);
}

// Whether all workers have come to a meeting. Some may be at the next one already; and as the
// counts wrap around, they are compared by their distance.
static bool have_met(unsigned meeting, int workers) {
    for (int i = 0; i < workers; i++)
        if ((int)(pool.seats[i].meetings - meeting) < 0) return false;
    return true;
}

// Everybody counts himself in and then looks whether somebody sleeps, whom the last to come wakes.
// Who goes to sleep tells it and then looks whether all have come. So one of the two sees the
// other: plain operations on atomics have one order for all threads. (Helgrind knows only the order
// of a lock, so without spinning everything happens under it.)
static void meet(int worker, int workers) {
    unsigned meeting = pool.seats[worker].meetings + 1;
    int spins = patience(worker, workers);
    if (SPIN == 0) pthread_mutex_lock(&pool.lock);
    pool.seats[worker].meetings = meeting;
    if (SPIN == 0) pthread_mutex_unlock(&pool.lock);

    if (SPIN == 0 || pool.asleep > 0) {
        pthread_mutex_lock(&pool.lock);
        if (have_met(meeting, workers)) pthread_cond_broadcast(&pool.all_met);
        pthread_mutex_unlock(&pool.lock);
    }
    for (int i = 0; i < spins; i++) {
        if (have_met(meeting, workers)) return;
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    pool.asleep++;
    while (!have_met(meeting, workers)) pthread_cond_wait(&pool.all_met, &pool.lock);
    pool.asleep--;
    pthread_mutex_unlock(&pool.lock);
}

// The CPU times of the calling thread. getrusage(2) tells them as of the last tick of the kernel;
// reading the thread's CPU clock brings them up to date.
static struct rusage thread_usage(void) {
    struct timespec clock;
    struct rusage usage;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &clock);
    getrusage(RUSAGE_THREAD, &usage);
    return usage;
}

// Adds the times from `before` to now to *sum.
static void add_usage_since(struct rusage *sum, const struct rusage *before) {
    struct rusage now = thread_usage();
    struct timeval used;
    timersub(&now.ru_utime, &before->ru_utime, &used);
    timeradd(&sum->ru_utime, &used, &sum->ru_utime);
    timersub(&now.ru_stime, &before->ru_stime, &used);
    timeradd(&sum->ru_stime, &used, &sum->ru_stime);
}

// A thread of the pool: wait for a share of a pass, do it, and again.
static void *thr_func(void *argument) {
    int thread = (int)(intptr_t)argument;
    pthread_mutex_lock(&pool.lock);
    for (;;) {
        while (pool.worker[thread] == NOTHING && !pool.closing)
            pthread_cond_wait(&pool.given[thread], &pool.lock);
        if (pool.closing) break;
        const Pass *pass = pool.pass;
        int worker = pool.worker[thread], workers = pool.places;
        unsigned passes = pool.passes;
        pool.worker[thread] = NOTHING;
        bool crowded = shares_cpu(worker, workers);
        pthread_mutex_unlock(&pool.lock);

        // Not in the first pass, which packs the weights and meets at its end only: the front end
        // may be giving the threads SCHED_DEADLINE just then, which takes an affinity of all CPUs.
        if (crowded && passes > 1) step_aside(workers);
        pass->work(pass, worker, workers);
        int spins = patience(worker, workers); // asked while the seat is still its own
        meet(worker, workers);
        // While a reply is computed the next pass follows soon: look for it before sleeping.
        for (int i = 0; i < spins && pool.passes == passes; i++) relax();
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    pool.usage[thread] = thread_usage();
    return NULL;
}

// Hands a pass out to the threads whose turn it is.
static void hand_out(const Pass *pass) {
    pthread_mutex_lock(&pool.lock);
    unsigned helpers = (unsigned)pool.places - 1, others = (unsigned)pool.size - 1;
    pool.pass = pass;
    pool.seats[0].cpu = sched_getcpu();
    for (unsigned i = 0; i < helpers; i++) { // where there are helpers, there are others
        unsigned turn = pool.passes / TURN % others, thread = 1 + (turn * helpers + i) % others;
        pool.worker[thread] = (int)i + 1;
        pool.seats[i + 1].cpu = NOTHING;
        pthread_cond_signal(&pool.given[thread]);
    }
    pool.passes++; // at the end, as who sees it will want the lock
    pthread_mutex_unlock(&pool.lock);
}

static void run_pass(const Pass *pass) {
    struct rusage before = thread_usage();
    hand_out(pass);
    pass->work(pass, 0, pool.places);
    meet(0, pool.places);
    add_usage_since(&pool.usage[0], &before);
}

// Ends and joins all threads but the caller. pool.usage tells then what they have used.
static void close_thr_pool(void) {
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    for (int i = 1; i < pool.size; i++) pthread_cond_signal(&pool.given[i]);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 1; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
    for (int i = 0; i < MAX_THREADS; i++) pthread_cond_destroy(&pool.given[i]);
    pthread_cond_destroy(&pool.all_met);
    pthread_mutex_destroy(&pool.lock);
}

// Makes the caller and threads - 1 new ones, which sleep until there is work, a pool of
// 1..MAX_THREADS threads. Returns 0, or -1 after a complaint, with none of them left.
static int init_thr_pool(int threads) {
    cpu_set_t cpus;
    int usable = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? CPU_COUNT(&cpus) : threads;
    memset(&pool, 0, sizeof(pool));
    pool.places = threads < usable ? threads : usable;
    pthread_mutex_init(&pool.lock, NULL);
    pthread_cond_init(&pool.all_met, NULL);
    for (int i = 0; i < MAX_THREADS; i++) {
        pthread_cond_init(&pool.given[i], NULL);
        pool.worker[i] = NOTHING;
    }
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

// ------------------------------------------------------------------------------------------------
// The program

static void print_usage_of(const char *who, const struct rusage *usage) {
    printf("%s - user: %.4f s, system: %.4f s\n", who,
           (double)usage->ru_utime.tv_sec + 1e-6 * (double)usage->ru_utime.tv_usec,
           (double)usage->ru_stime.tv_sec + 1e-6 * (double)usage->ru_stime.tv_usec);
}

// The main thread's line is what it has used besides its part in the passes, which is thread 0's.
static void print_usage(void) {
    struct rusage usage, besides = {0};
    char who[40];
    for (int i = 0; i < pool.size; i++) {
        snprintf(who, sizeof(who), "Thread %d has completed", i);
        print_usage_of(who, &pool.usage[i]);
    }
    add_usage_since(&besides, &pool.usage[0]);
    print_usage_of("main thread", &besides);
    getrusage(RUSAGE_SELF, &usage);
    print_usage_of("Whole process", &usage);
}

#define USAGE                                                                                      \
    "Usage: %s " SETTINGS_USAGE " <threads> <seed> [\"prompt\" ...]\n" SETTINGS_HELP               \
    "\n  threads             1 to %d\n"                                                            \
    "  prompt              answered in turn; without one, prompts are read from stdin"

static void usage(const char *program, int status) {
    exit_with_usage(status, USAGE, program, MAX_THREADS);
}

int main(int argc, char **argv) {
    reserve_standard_fds();
    Settings settings = DEFAULT_SETTINGS;
    long threads;
    CommandLine line = {.argc = argc, .argv = argv, .wanted = 2};
    parse_settings(&settings, &line, usage);
    if (line.count < 2) {
        report_error("The number of threads and the seed are needed.");
        usage(argv[0], 2);
    }
    if (!parse_integer(line.operands[0], 1, MAX_THREADS, &threads)) {
        report_error("%s is not a number of threads from 1 to %d.", line.operands[0], MAX_THREADS);
        usage(argv[0], 2);
    }
    if (!parse_seed(line.operands[1], &settings.seed)) {
        report_error("%s is not a seed.", line.operands[1]);
        usage(argv[0], 2);
    }
    choose_seed(&settings);

    Session session;
    if (build_session(&session, &settings) < 0) return 1;
    int result = 1;
    if (init_thr_pool((int)threads) == 0) {
        result = serve(generate, prepare, &session, argv + optind, argc - optind) < 0 ? 1 : 0;
        close_thr_pool();
        print_usage();
    }
    free_session(&session);
    return fflush(stdout) == EOF ? 1 : result;
}
