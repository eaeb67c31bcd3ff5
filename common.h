// common.h - what the chat front end (main.c) and the engines (inference.c, parallel.c) agree on:
// the limits, the command-line settings, the pipe-and-signal protocol, the scheduling policies,
// and how errors are told.
//
//     user -- stdin --> main -- pipe: one prompt and a newline --> engine's stdin
//                       main -- SIGUSR1: look into the pipe -----> engine
//     user <-- stdout (inherited from main) ---------------------- engine
//                       main <-- return pipe: one byte ----------- engine is ready, reply finished
//                       main <-- SIGUSR2: look into it ----------- engine
//
// A signal is only a bell. Signals of one kind coalesce and anybody may send one, so whoever hears
// a bell looks into his pipe, and what he finds there is the fact. A bell without a fact is
// ignored.
#ifndef COMMON_H
#define COMMON_H

#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before the first #include"
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

// ------------------------------------------------------------------------------------------------
// Limits

// Bytes of a prompt. With its newline it is what a terminal's line editing holds (4096 bytes,
// termios(3)) and what a pipe takes in one piece (PIPE_BUF, pipe(7)).
#define MAX_PROMPT_LEN 4095

#define MAX_THREADS 64 // of the parallel engine

// ------------------------------------------------------------------------------------------------
// Errors and the clock

// Prints one line on stderr. In normal use stderr is the log, so when the user would miss it there
// (stderr redirected, stdout a terminal) the line appears on stdout, too.
__attribute__((format(printf, 1, 2))) static inline void report_error(const char *format, ...) {
    va_list arguments;
    bool on_stdout = isatty(STDOUT_FILENO) && !isatty(STDERR_FILENO);
    for (int i = 0; i <= on_stdout; i++) {
        FILE *stream = i ? stdout : stderr;
        va_start(arguments, format);
        vfprintf(stream, format, arguments);
        va_end(arguments);
        fputc('\n', stream);
        fflush(stream);
    }
}

// Flushes stdout. Returns 0, or -1: quietly if nobody reads it any more or it was closed from the
// beginning, and after a complaint otherwise.
static inline int flush_output(void) {
    if (fflush(stdout) != EOF) return 0;
    if (errno != EPIPE && errno != EBADF)
        report_error("Cannot write the output: %s.", strerror(errno));
    return -1;
}

// Opens whatever of stdin, stdout and stderr the caller's parent has closed, so that no pipe or
// file opened later gets its number. Each is opened for the wrong direction: using it still fails.
static inline void reserve_standard_fds(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++)
        if (fcntl(fd, F_GETFD) < 0) open("/dev/null", fd == STDIN_FILENO ? O_WRONLY : O_RDONLY);
}

// Returns the time of a clock in seconds: CLOCK_MONOTONIC, which nobody sets back, or a process's
// CPU time; 0 if there is no such clock.
static inline double seconds(clockid_t clock) {
    struct timespec time = {0};
    clock_gettime(clock, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// ------------------------------------------------------------------------------------------------
// Settings: what the command lines of all programs share

typedef struct {
    const char *dir;         // holds model.bin and tokenizer.bin
    float temperature;       // 0 is greedy
    float top_p;             // 0..1, the share of the probability that sampling chooses from
    int max_new_tokens;      // tokens of a reply at most
    unsigned long long seed; // of the sampler; 0 takes one from the clock
} Settings;

#define DEFAULT_SETTINGS                                                                           \
    (Settings) { .dir = ".", .temperature = 0.6f, .top_p = 0.9f, .max_new_tokens = 256, .seed = 42 }

#define SETTINGS_OPTIONS "d:t:p:m:" // for getopt(3), which is to leave the complaints to us: ":"
#define SETTINGS_USAGE "[-d dir] [-t temperature] [-p top_p] [-m max_new_tokens]"
#define SETTINGS_HELP                                                                              \
    "  -d dir              folder of model.bin and tokenizer.bin (default: .)\n"                   \
    "  -t temperature      0 for the likeliest token always, or 0.01 to 100 (default: 0.6)\n"      \
    "  -p top_p            choose among the likeliest tokens of this share, 0 to 1 (default: "     \
    "0.9)\n"                                                                                       \
    "  -m max_new_tokens   the longest reply, 1 to 1000000 (default: 256)\n"                       \
    "  seed                0 to 18446744073709551615; 0 takes one from the clock"

// Reads a whole number in [least, most] that is all of the text. False if it is something else.
static inline bool parse_integer(const char *text, long least, long most, long *value) {
    char *end;
    errno = 0;
    *value = strtol(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && *value >= least && *value <= most;
}

static inline bool parse_float(const char *text, float least, float most, float *value) {
    char *end;
    *value = strtof(text, &end);
    return end != text && *end == '\0' && *value >= least && *value <= most;
}

// Reads a seed: decimal digits and nothing else (strtoull(3) alone would take "-1").
static inline bool parse_seed(const char *text, unsigned long long *seed) {
    errno = 0;
    *seed = strtoull(text, NULL, 10);
    return errno == 0 && *text != '\0' && text[strspn(text, "0123456789")] == '\0';
}

// Takes one option of SETTINGS_OPTIONS. False, after a complaint, if its value will not do.
static inline bool parse_setting(Settings *settings, int option, const char *value) {
    long tokens = settings->max_new_tokens;
    bool valid = true;
    switch (option) {
    case 'd': settings->dir = value, valid = *value != '\0'; break;
    case 't':
        valid = parse_float(value, 0, 100, &settings->temperature) &&
                (settings->temperature == 0 || settings->temperature >= 0.01f);
        break;
    case 'p': valid = parse_float(value, 0, 1, &settings->top_p); break;
    case 'm': valid = parse_integer(value, 1, 1000000, &tokens); break;
    default:
        report_error(option == ':' ? "-%c needs a value." : "-%c is not an option.", optopt);
        return false;
    }
    settings->max_new_tokens = (int)tokens;
    if (!valid) report_error("-%c %s: this value is not in the option's range.", option, value);
    return valid;
}

// Reads an engine's options; getopt(3) leaves optind at the first argument that is none ("+": what
// comes behind it, a prompt perhaps, is none either). False, after a complaint, at a mistake.
static inline bool parse_settings(Settings *settings, int argc, char **argv) {
    bool valid = true;
    for (int option; (option = getopt(argc, argv, "+:" SETTINGS_OPTIONS)) != -1;)
        valid = parse_setting(settings, option, optarg) && valid;
    return valid;
}

// A seed of 0 becomes one from the clock, which is told so that the reply can be had again.
static inline void choose_seed(Settings *settings) {
    if (settings->seed != 0) return;
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    settings->seed =
        (unsigned long long)time.tv_sec * 1000000000 + (unsigned long long)time.tv_nsec;
    printf("The seed is %llu, from the clock.\n", settings->seed);
}

// ------------------------------------------------------------------------------------------------
// Lines of input, from a terminal, a file or a pipe

typedef struct {
    int fd;
    bool ended;                      // end of file, or an error that is as good as one
    bool skipping;                   // in the middle of a line that is too long
    size_t length;                   // bytes in the buffer
    char buffer[MAX_PROMPT_LEN + 1]; // what was read and not yet taken
} LineReader;

enum { NO_LINE_YET = -1, LINE_TOO_LONG = -2, END_OF_INPUT = -3 };

// Calls read(2) once; call it when poll(2) says that it would not wait, or to wait.
static inline void read_more(LineReader *reader) {
    ssize_t count =
        read(reader->fd, reader->buffer + reader->length, sizeof(reader->buffer) - reader->length);
    if (count > 0) reader->length += (size_t)count;
    else if (count == 0 || (errno != EINTR && errno != EAGAIN)) reader->ended = true;
}

// Takes the next line out of the buffer into line[MAX_PROMPT_LEN], without its newline and without
// a terminator. Returns its length or one of the three values above. The last line of the input
// needs no newline. A line that is too long is skipped, and reported once.
static inline int next_line(LineReader *reader, char *line) {
    char *newline = memchr(reader->buffer, '\n', reader->length);
    if (newline == NULL && reader->length == sizeof(reader->buffer)) {
        reader->skipping = true;
        reader->length = 0;
    }
    if (newline == NULL && !reader->ended) return NO_LINE_YET;
    if (newline == NULL && reader->length == 0 && !reader->skipping) return END_OF_INPUT;

    size_t length = newline ? (size_t)(newline - reader->buffer) : reader->length;
    size_t taken = newline ? length + 1 : length;
    bool too_long = reader->skipping;
    if (!too_long) memcpy(line, reader->buffer, length);
    reader->skipping = false;
    reader->length -= taken;
    memmove(reader->buffer, reader->buffer + taken, reader->length);
    return too_long ? LINE_TOO_LONG : (int)length;
}

// Part of the conversation, so it goes to stdout.
static inline void reject_long_prompt(void) {
    printf("The prompt is longer than %d bytes and was not used. Please shorten it.\n",
           MAX_PROMPT_LEN);
}

// ------------------------------------------------------------------------------------------------
// The protocol's end in the engine

#define PROMPT_MARK ">>> "
#define RETURN_FD 3                    // where the engine finds the return pipe
#define FRONT_END_ENV "CHAT_FRONT_END" // the front end's pid, in the engine's environment

// Answers one prompt on stdout. Returns 0, or -1 if the session can't go on; the reason is told,
// but for a stdout that nobody reads.
typedef struct Session Session; // the engine's own
typedef int Answer(Session *session, const char *prompt, size_t length);
// What can be prepared while the user types, and else is done for the first prompt.
typedef void Prepare(Session *session);

// An engine is main's child exactly if its parent is the one that the environment names: the
// variable alone may be inherited by anybody whom main's child starts.
static inline bool is_child_of_front_end(void) {
    const char *text = getenv(FRONT_END_ENV);
    long pid;
    return text && parse_integer(text, 1, INT32_MAX, &pid) && pid == getppid();
}

// First the fact, then the bell.
static inline void notify_front_end(void) {
    if (write(RETURN_FD, "", 1) == 1) kill(getppid(), SIGUSR2);
}

// Serves the front end: takes what is in the pipe, and when nothing is, waits for SIGUSR1, which
// main has blocked for us so that an early bell waits, too. A line is a prompt; the end of the pipe
// means goodbye.
static inline int serve_front_end(Answer *answer, Prepare *prepare, Session *session) {
    LineReader reader = {.fd = STDIN_FILENO};
    struct pollfd look = {.fd = STDIN_FILENO, .events = POLLIN};
    char prompt[MAX_PROMPT_LEN];
    sigset_t bell;
    sigemptyset(&bell);
    sigaddset(&bell, SIGUSR1);
    notify_front_end(); // ready
    prepare(session);
    for (;;) {
        int length = next_line(&reader, prompt);
        if (length == END_OF_INPUT) return 0;
        if (length >= 0) {
            if (answer(session, prompt, (size_t)length) < 0) return -1;
            // The reply is complete and flushed before main hears of it, so that the next prompt
            // mark can't overtake the text.
            notify_front_end();
        } else if (poll(&look, 1, 0) == 1) {
            read_more(&reader);
        } else {
            sigwaitinfo(&bell, NULL);
        }
    }
}

// Serves whoever started the engine by hand: prompts from stdin, one per line.
static inline int serve_stdin(Answer *answer, Prepare *prepare, Session *session) {
    LineReader reader = {.fd = STDIN_FILENO};
    char prompt[MAX_PROMPT_LEN];
    bool marks = isatty(STDIN_FILENO);
    for (;;) {
        if (marks) fputs(PROMPT_MARK, stdout);
        if (flush_output() < 0) return -1;
        prepare(session);
        int length;
        while ((length = next_line(&reader, prompt)) == NO_LINE_YET) read_more(&reader);
        if (length == END_OF_INPUT) break;
        if (length == LINE_TOO_LONG) reject_long_prompt();
        else if (length > 0 && answer(session, prompt, (size_t)length) < 0) return -1;
    }
    if (marks) fputc('\n', stdout);
    return 0;
}

// Answers the prompts of the command line, or else those of the front end, or else those of stdin,
// until there are no more. Returns 0, or -1 if the session ended before that.
static inline int serve(Answer *answer, Prepare *prepare, Session *session, char **prompts,
                        int count) {
    if (count == 0 && is_child_of_front_end()) return serve_front_end(answer, prepare, session);
    if (count == 0) return serve_stdin(answer, prepare, session);
    for (int i = 0; i < count; i++) {
        size_t length = strlen(prompts[i]);
        if (length > MAX_PROMPT_LEN) reject_long_prompt();
        else if (answer(session, prompts[i], length) < 0) return -1;
    }
    return 0;
}

// ------------------------------------------------------------------------------------------------
// Scheduling policies, sched(7)

// The argument of SYS_sched_setattr, sched_setattr(2). <sched.h> has it as struct sched_attr since
// glibc 2.41, and not before, hence a name of our own.
typedef struct {
    uint32_t size;     // of this structure, for the kernel to know its version
    uint32_t policy;   // SCHED_...
    uint64_t flags;    // 0
    int32_t nice;      // SCHED_OTHER, SCHED_BATCH, SCHED_IDLE: -20..19
    uint32_t priority; // SCHED_FIFO, SCHED_RR: 1..99
    uint64_t runtime;  // SCHED_DEADLINE: nanoseconds
    uint64_t deadline; // likewise
    uint64_t period;   // likewise
} SchedulingAttributes;

#ifndef SCHED_DEADLINE
#define SCHED_DEADLINE 6 // musl's <sched.h> does not have it
#endif

// Indexed by the kernel's numbers; 4 was never used.
static const char *const policy_names[] = {
    [SCHED_OTHER] = "SCHED_OTHER", [SCHED_FIFO] = "SCHED_FIFO", [SCHED_RR] = "SCHED_RR",
    [SCHED_BATCH] = "SCHED_BATCH", [SCHED_IDLE] = "SCHED_IDLE", [SCHED_DEADLINE] = "SCHED_DEADLINE",
};
enum { POLICY_COUNT = sizeof(policy_names) / sizeof(policy_names[0]) };

#endif // COMMON_H
