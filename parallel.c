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
// at 3.7 GHz, some times what it takes to sleep and be woken. 0 leaves all waiting to the mutex,
// which helgrind understands.
#ifndef SPIN
#define SPIN 10000
#endif

// ------------------------------------------------------------------------------------------------
// The pool
//
// One group of threads for everything. The thread that created it is thread 0: it hands out a pass
// and takes part in it, so that nobody has to be woken between a token and the next. The others,
// but no more than there are CPUs, walk through the pass with it and meet a handful of times per
// layer. If there are more, these take turns instead of pushing each other off the CPUs; a turn is
// some passes long, as the scheduler needs a while to give each thread a CPU of its own.

#define TURN 4 // passes
#define NOTHING (-1)

// What a worker of a pass tells the others. It has a cache line of its own, so that a meeting of
// two takes one line each way; a lock and a count for all would be four.
typedef struct {
    _Alignas(64) atomic_uint meetings; // how many it has come to
    atomic_int cpu;                    // where it was last seen, or NOTHING
} Seat;

static struct {
    pthread_t threads[MAX_THREADS];   // but for thread 0
    struct rusage usage[MAX_THREADS]; // of thread 0 in all passes, of the others when they end
    int size;                         // threads of the pool
    int places;                       // threads that take part in a pass: no more than CPUs
    Seat seats[MAX_THREADS]; // of the workers of a pass; between passes all counts are equal
    atomic_uint passes;      // how many there have been
    atomic_int asleep;       // threads that sleep in wait_for()

    pthread_mutex_t lock;              // guards all that follows
    pthread_cond_t given[MAX_THREADS]; // each thread sleeps here until it has work,
    pthread_cond_t arrived;            // and here until others have done theirs
    const Pass *pass;                  // what is being computed
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
    pthread_mutex_lock(&pool.lock);
    for (int i = 0; i < workers; i++)
        if (pool.seats[i].cpu != NOTHING) CPU_CLR((size_t)pool.seats[i].cpu, &others);
    pthread_mutex_unlock(&pool.lock);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0)
        sched_setaffinity(0, sizeof(usable), &usable);
}

// The counts go round, so they are compared by their distance.
static bool has_come(const Seat *seat, unsigned meeting) {
    return (int)(seat->meetings - meeting) >= 0;
}

// Waits for a worker to come to a meeting, at first with open eyes.
static void wait_for(const Seat *seat, unsigned meeting, int spins) {
    for (int i = 0; i < spins; i++) {
        if (has_come(seat, meeting)) return;
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    pool.asleep++;
    while (!has_come(seat, meeting)) pthread_cond_wait(&pool.arrived, &pool.lock);
    pool.asleep--;
    pthread_mutex_unlock(&pool.lock);
}

// Counts a worker in, then looks whether somebody sleeps. Who goes to sleep does it the other way
// round, so one of the two sees the other. (Helgrind sees an order in the lock only, so without
// spinning all of this happens under the lock.)
static void arrive(Seat *seat, unsigned meeting) {
    if (SPIN == 0) pthread_mutex_lock(&pool.lock);
    seat->meetings = meeting;
    if (SPIN == 0) pthread_mutex_unlock(&pool.lock);
    if (SPIN > 0 && pool.asleep == 0) return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.arrived);
    pthread_mutex_unlock(&pool.lock);
}

static void meet(int worker, int workers) {
    unsigned meeting = pool.seats[worker].meetings + 1;
    int spins = patience(worker, workers);
    arrive(&pool.seats[worker], meeting);
    for (int i = 0; i < workers; i++)
        if (i != worker) wait_for(&pool.seats[i], meeting, spins);
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
        if (crowded) step_aside(workers);
        pass->work(pass, worker, workers);
        meet(worker, workers);
        // while a reply is computed, the next pass follows soon
        for (int spins = patience(worker, workers); spins > 0 && pool.passes == passes; spins--)
            relax();
        pthread_mutex_lock(&pool.lock);
    }
    pthread_mutex_unlock(&pool.lock);
    getrusage(RUSAGE_THREAD, &pool.usage[thread]);
    return NULL;
}

// Hands a pass out to the threads whose turn it is.
static void hand_out(const Pass *pass) {
    pthread_mutex_lock(&pool.lock);
    unsigned turn = pool.passes++ / TURN, helpers = (unsigned)pool.places - 1;
    pool.pass = pass;
    pool.seats[0].cpu = sched_getcpu();
    for (unsigned i = 0; i < helpers; i++) {
        unsigned thread = 1 + (turn * helpers + i) % ((unsigned)pool.size - 1);
        pool.worker[thread] = (int)i + 1;
        pool.seats[i + 1].cpu = NOTHING;
        pthread_cond_signal(&pool.given[thread]);
    }
    pthread_mutex_unlock(&pool.lock);
}

// sum = sum + after - before
static void add_usage(struct rusage *sum, const struct rusage *after, const struct rusage *before) {
    struct timeval used;
    timersub(&after->ru_utime, &before->ru_utime, &used);
    timeradd(&sum->ru_utime, &used, &sum->ru_utime);
    timersub(&after->ru_stime, &before->ru_stime, &used);
    timeradd(&sum->ru_stime, &used, &sum->ru_stime);
}

static void run_pass(const Pass *pass) {
    struct rusage before, after;
    getrusage(RUSAGE_THREAD, &before);
    hand_out(pass);
    pass->work(pass, 0, pool.places);
    meet(0, pool.places);
    getrusage(RUSAGE_THREAD, &after);
    add_usage(&pool.usage[0], &after, &before);
}

// Ends and joins all threads but the caller. pool.usage tells then what they have used.
static void close_thr_pool(void) {
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    for (int i = 1; i < pool.size; i++) pthread_cond_signal(&pool.given[i]);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 1; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
    for (int i = 0; i < MAX_THREADS; i++) pthread_cond_destroy(&pool.given[i]);
    pthread_cond_destroy(&pool.arrived);
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
    pthread_cond_init(&pool.arrived, NULL);
    for (int i = 0; i < MAX_THREADS; i++) {
        pthread_cond_init(&pool.given[i], NULL);
        pool.worker[i] = NOTHING;
    }
    for (pool.size = 1; pool.size < threads; pool.size++) {
        int error =
            pthread_create(&pool.threads[pool.size], NULL, thr_func, (void *)(intptr_t)pool.size);
        if (error == 0) continue;
        complain("Thread %d of %d cannot be created: %s.", pool.size + 1, threads, strerror(error));
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
    getrusage(RUSAGE_THREAD, &usage);
    add_usage(&besides, &usage, &pool.usage[0]);
    print_usage_of("main thread", &besides);
    getrusage(RUSAGE_SELF, &usage);
    print_usage_of("Whole process", &usage);
}

_Noreturn static void usage(const char *program) {
    complain("Usage: %s " SETTINGS_USAGE " <threads> <seed> [\"prompt\" ...]\n" SETTINGS_HELP
             "\n  threads             1 to %d\n"
             "  prompt              answered in turn; without one, prompts are read from stdin",
             program, MAX_THREADS);
    exit(2);
}

int main(int argc, char **argv) {
    hold_standard_files();
    Settings settings = DEFAULT_SETTINGS;
    long threads;
    if (!parse_settings(&settings, argc, argv)) usage(argv[0]);
    if (argc - optind < 2) {
        complain("The number of threads and the seed are needed.");
        usage(argv[0]);
    }
    if (!parse_integer(argv[optind], 1, MAX_THREADS, &threads)) {
        complain("%s is not a number of threads from 1 to %d.", argv[optind], MAX_THREADS);
        usage(argv[0]);
    }
    if (!parse_seed(argv[optind + 1], &settings.seed)) {
        complain("%s is not a seed.", argv[optind + 1]);
        usage(argv[0]);
    }
    settle_seed(&settings);

    Session session;
    if (build_session(&session, &settings) < 0) return 1;
    int result = 1;
    if (init_thr_pool((int)threads) == 0) {
        result =
            serve(generate, prepare, &session, argv + optind + 2, argc - optind - 2) < 0 ? 1 : 0;
        close_thr_pool();
        print_usage();
    }
    free_session(&session);
    return fflush(stdout) == EOF ? 1 : result;
}
