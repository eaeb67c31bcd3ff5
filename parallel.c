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

// Looks at the other threads' progress before a waiting thread goes to sleep: 250 microseconds on a
// Zen 4 at 3.7 GHz, some times what it takes to sleep and be woken. 0 leaves all waiting to the
// mutex, which helgrind understands.
#ifndef SPIN
#define SPIN 10000
#endif

// ------------------------------------------------------------------------------------------------
// The pool
//
// One group of threads for everything. The calling thread hands out a pass and sleeps; the threads,
// but no more than there are CPUs, take part in it, walk through it together, and meet a handful of
// times per layer. If there are more, they take turns instead of pushing each other off the CPUs; a
// turn is some passes long, as the scheduler needs a while to give each thread a CPU of its own.

#define TURN 4 // passes
#define NOTHING (-1)

static struct {
    pthread_t threads[MAX_THREADS];
    struct rusage usage[MAX_THREADS]; // of the threads that have ended
    int size;                         // threads of the pool
    int places;                       // threads that take part in a pass: no more than CPUs

    pthread_mutex_t lock;              // guards all that follows
    pthread_cond_t given[MAX_THREADS]; // each thread waits here for work,
    pthread_cond_t all_met;            // here for the others,
    pthread_cond_t pass_done;          // and the caller here for them
    const Pass *pass;                  // what is being computed, or NULL
    unsigned passes;                   // how many there have been
    int worker[MAX_THREADS];           // a thread's number in the pass until it begins, or NOTHING
    int cpu[MAX_THREADS];              // where each worker of the pass was last seen, or NOTHING
    int arrived;                       // threads that wait in meet()
    atomic_uint meetings;              // how many there have been; also looked at without the lock
    bool closing;
} pool;

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Notes where a worker is, and tells whether another one was last seen on the same CPU. The lock
// must be held.
static bool shares_cpu(int worker, int workers) {
    pool.cpu[worker] = sched_getcpu();
    for (int i = 0; i < workers; i++)
        if (i != worker && pool.cpu[i] == pool.cpu[worker]) return true;
    return false;
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
        if (pool.cpu[i] != NOTHING) CPU_CLR((size_t)pool.cpu[i], &others);
    pthread_mutex_unlock(&pool.lock);
    if (CPU_COUNT(&others) > 0 && sched_setaffinity(0, sizeof(others), &others) == 0)
        sched_setaffinity(0, sizeof(usable), &usable);
}

// The last one to arrive opens the door: everybody else waits for the number of meetings to change,
// at first with his eyes open, unless that would keep somebody from coming.
static void meet(int worker, int workers) {
    pthread_mutex_lock(&pool.lock);
    unsigned before = pool.meetings;
    int spins = shares_cpu(worker, workers) ? 0 : SPIN;
    if (++pool.arrived == workers) {
        pool.arrived = 0;
        pool.meetings = before + 1;
        pthread_cond_broadcast(&pool.all_met);
        pthread_mutex_unlock(&pool.lock);
        return;
    }
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < spins; i++) {
        if (pool.meetings != before) return;
        relax();
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.meetings == before) pthread_cond_wait(&pool.all_met, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
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
        pool.worker[thread] = NOTHING;
        bool crowded = shares_cpu(worker, workers);
        pthread_mutex_unlock(&pool.lock);
        if (crowded) step_aside(workers);
        pass->work(pass, worker, workers);
        meet(worker, workers);
        pthread_mutex_lock(&pool.lock);
        if (worker == 0) {
            pool.pass = NULL;
            pthread_cond_signal(&pool.pass_done);
        }
    }
    pthread_mutex_unlock(&pool.lock);
    getrusage(RUSAGE_THREAD, &pool.usage[thread]);
    return NULL;
}

static void run_pass(const Pass *pass) {
    pthread_mutex_lock(&pool.lock);
    int turn = (int)(pool.passes++ / TURN % (unsigned)pool.size);
    pool.pass = pass;
    for (int worker = 0; worker < pool.places; worker++) {
        int thread = (turn * pool.places + worker) % pool.size;
        pool.worker[thread] = worker;
        pool.cpu[worker] = NOTHING;
        pthread_cond_signal(&pool.given[thread]);
    }
    while (pool.pass != NULL) pthread_cond_wait(&pool.pass_done, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

// Ends and joins all threads. pool.usage tells then what they have used.
static void close_thr_pool(void) {
    pthread_mutex_lock(&pool.lock);
    pool.closing = true;
    for (int i = 0; i < pool.size; i++) pthread_cond_signal(&pool.given[i]);
    pthread_mutex_unlock(&pool.lock);
    for (int i = 0; i < pool.size; i++) pthread_join(pool.threads[i], NULL);
    for (int i = 0; i < MAX_THREADS; i++) pthread_cond_destroy(&pool.given[i]);
    pthread_mutex_destroy(&pool.lock);
    pthread_cond_destroy(&pool.all_met);
    pthread_cond_destroy(&pool.pass_done);
}

// Creates the pool of 1..MAX_THREADS threads, which sleep until there is work. Returns 0, or -1
// after a complaint, with none of them left.
static int init_thr_pool(int threads) {
    cpu_set_t cpus;
    int usable = sched_getaffinity(0, sizeof(cpus), &cpus) == 0 ? CPU_COUNT(&cpus) : threads;
    memset(&pool, 0, sizeof(pool));
    pool.places = threads < usable ? threads : usable;
    // Nobody holds the lock for longer than it takes to count or to wake others, so a thread that
    // finds it taken looks again a few times before it sleeps.
    pthread_mutexattr_t adaptive;
    pthread_mutexattr_init(&adaptive);
    pthread_mutexattr_settype(&adaptive, PTHREAD_MUTEX_ADAPTIVE_NP);
    pthread_mutex_init(&pool.lock, &adaptive);
    pthread_mutexattr_destroy(&adaptive);
    for (int i = 0; i < MAX_THREADS; i++) {
        pthread_cond_init(&pool.given[i], NULL);
        pool.worker[i] = NOTHING;
    }
    pthread_cond_init(&pool.all_met, NULL);
    pthread_cond_init(&pool.pass_done, NULL);
    for (; pool.size < threads; pool.size++) {
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

static void print_usage(void) {
    struct rusage usage;
    char who[40];
    for (int i = 0; i < pool.size; i++) {
        snprintf(who, sizeof(who), "Thread %d has completed", i);
        print_usage_of(who, &pool.usage[i]);
    }
    getrusage(RUSAGE_THREAD, &usage);
    print_usage_of("main thread", &usage);
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
