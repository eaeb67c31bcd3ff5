// common.h - the contract of the chat front end (main.c) and the engines (inference.c, parallel.c):
// limits, command lines, lines of input, the pipe-and-signal protocol, scheduling policies, and how
// errors are reported.
//
//                       main -- pipe: one byte, to start ---------> child before exec
//     user -- stdin --> main -- pipe: one prompt and a newline ---> engine's stdin
//                       main -- SIGUSR1: a prompt is in the pipe -> engine
//     user <-- stdout (inherited from main) ----------------------- engine
//                       main <-- return pipe: one byte ------------ engine is ready, reply finished
//                       main <-- SIGUSR2: a byte is in the pipe --- engine
//
// A signal only notifies; the data are in a pipe. Pending signals of one kind coalesce and any
// process may send one, so a receiver reads its pipe after a signal and ignores a signal without
// data. The writer writes before it raises the signal, so that the receiver finds the data.
#ifndef COMMON_H
#define COMMON_H

#ifndef _GNU_SOURCE
#error "define _GNU_SOURCE before the first #include"
#endif
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
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

// Bytes of a prompt. With its newline it is the longest line of a terminal (4096 bytes, termios(3))
// and the most that write(2) puts into a pipe in one piece (PIPE_BUF, pipe(7)).
#define MAX_PROMPT_LEN 4095

#define MAX_THREADS 64 // of the parallel engine
#define MAX_DRAFT 16   // tokens of a draft, see Settings
_Static_assert(MAX_THREADS == 64 && MAX_DRAFT == 16, "change the usage and error texts, too");

// ------------------------------------------------------------------------------------------------
// Errors and the clock

#define REPORT_LIMIT 500 // milliseconds that report_error() waits for a reader that is not reading

// Prints one line on stderr. In normal use stderr is the log, where the user would miss it: if
// stderr is redirected and stdout is a terminal, the line appears on stdout, too. A stream that
// cannot take the line within REPORT_LIMIT loses it, so that no program hangs in an error message.
// For the same reason the line is cut off at PIPE_BUF bytes, for which a writable pipe has room.
// Returns -1, for callers that return that.
__attribute__((format(printf, 1, 2))) static inline int report_error(const char *format, ...) {
    char line[PIPE_BUF];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    bool on_stdout = isatty(STDOUT_FILENO) && !isatty(STDERR_FILENO);
    for (int i = 0; i <= on_stdout; i++) {
        FILE *stream = i ? stdout : stderr;
        struct pollfd writable = {.fd = fileno(stream), .events = POLLOUT};
        if (poll(&writable, 1, REPORT_LIMIT) == 0) continue;
        fprintf(stream, "%s\n", line);
        fflush(stream);
    }
    return -1;
}

// Flushes stdout. Returns 0; or -1 if it cannot be written, which is reported unless its reader is
// gone (EPIPE) or it was closed before the program started (EBADF).
static inline int flush_output(void) {
    if (fflush(stdout) != EOF) return 0;
    if (errno != EPIPE && errno != EBADF)
        report_error("Cannot write the output: %s.", strerror(errno));
    return -1;
}

// Occupies those of the descriptors 0, 1 and 2 that are closed or open for the wrong direction;
// must be called before any other descriptor is opened. Then no file or pipe ever gets one of these
// numbers, and output for stdout or stderr cannot end up in it. /dev/null is opened for the wrong
// direction, so that using the descriptor fails at once, with EBADF.
static inline void reserve_standard_fds(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        int wrong = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY, flags = fcntl(fd, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != wrong) continue;
        close(fd);
        open("/dev/null", wrong);
    }
}

// Returns whether stdout shows colours and the user wants them (https://no-color.org).
static inline bool has_colors(void) {
    const char *refusal = getenv("NO_COLOR"), *terminal = getenv("TERM");
    if (refusal && *refusal) return false;
    return isatty(STDOUT_FILENO) && !(terminal && strcmp(terminal, "dumb") == 0);
}

// Returns the time of a clock in seconds: CLOCK_MONOTONIC, which is never set back, or a process's
// CPU time; 0 if there is no such clock.
static inline double seconds(clockid_t clock) {
    struct timespec time = {0};
    clock_gettime(clock, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// ------------------------------------------------------------------------------------------------
// Command lines: the options and operands that all programs share

typedef struct {
    const char *dir;         // holds model.bin and tokenizer.bin
    float temperature;       // 0 is greedy
    float top_p;             // 0..1, the share of the probability that sampling chooses from
    int max_new_tokens;      // tokens of a reply at most
    int draft_tokens;        // tokens of a draft at most, 0..MAX_DRAFT
    unsigned long long seed; // of the sampler; 0 takes one from the clock
} Settings;

#define DEFAULT_SETTINGS                                                                           \
    (Settings) {                                                                                   \
        .dir = ".", .temperature = 0.6f, .top_p = 0.9f, .max_new_tokens = 256, .draft_tokens = 16, \
        .seed = 42                                                                                 \
    }

#define SETTINGS_OPTIONS "d:t:p:m:k:" // for getopt(3)
#define SETTINGS_USAGE "[-d dir] [-t temperature] [-p top_p] [-m max_new_tokens] [-k draft_tokens]"
#define SETTINGS_HELP                                                                              \
    "  -d dir              folder of model.bin and tokenizer.bin (default: .)\n"                   \
    "  -t temperature      0: always the likeliest token; 0.01 to 100: sample (default: 0.6)\n"    \
    "  -p top_p            sample from the likeliest tokens that together just exceed this\n"      \
    "                      probability, 0 to 1 (default: 0.9)\n"                                   \
    "  -m max_new_tokens   the longest reply, 1 to 1000000 tokens (default: 256)\n"                \
    "  -k draft_tokens     the longest draft of speculative decoding, 0 to 16 (default: 16)\n"     \
    "  -h, --help          print this text\n"                                                      \
    "  seed                of the sampler, 0 to 18446744073709551615; 0: one from the clock"

// Parses an integer in [least, most] that is all of the text. Returns false if it is anything else.
static inline bool parse_integer(const char *text, long least, long most, long *value) {
    char *end;
    errno = 0;
    *value = strtol(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && *value >= least && *value <= most;
}

// Parses a number in [least, most] that is all of the text. Returns false if it is anything else.
static inline bool parse_float(const char *text, float least, float most, float *value) {
    char *end;
    *value = strtof(text, &end);
    return end != text && *end == '\0' && *value >= least && *value <= most;
}

// Parses a seed: decimal digits and nothing else (strtoull(3) alone accepts "-1"). Returns false if
// it is anything else or too large.
static inline bool parse_seed(const char *text, unsigned long long *seed) {
    errno = 0;
    *seed = strtoull(text, NULL, 10);
    return errno == 0 && *text != '\0' && text[strspn(text, "0123456789")] == '\0';
}

#define BAD_VALUE "-%c %s: expected %s." // for report_error(): option, value, what is allowed

// Parses one option of SETTINGS_OPTIONS into *settings. Returns false after reporting a bad value,
// and for a mistake that next_option() has reported.
static inline bool parse_setting(Settings *settings, int option, const char *value) {
    long tokens;
    bool valid = false;
    const char *expected = "";
    switch (option) {
    case 'd':
        expected = "a folder";
        settings->dir = value;
        valid = *value != '\0';
        break;
    case 't':
        expected = "0, or a number from 0.01 to 100";
        valid = parse_float(value, 0, 100, &settings->temperature) &&
                (settings->temperature == 0 || settings->temperature >= 0.01f);
        break;
    case 'p':
        expected = "a number from 0 to 1";
        valid = parse_float(value, 0, 1, &settings->top_p);
        break;
    case 'm':
        expected = "an integer from 1 to 1000000";
        valid = parse_integer(value, 1, 1000000, &tokens);
        settings->max_new_tokens = (int)tokens;
        break;
    case 'k':
        expected = "an integer from 0 to 16";
        valid = parse_integer(value, 0, MAX_DRAFT, &tokens);
        settings->draft_tokens = (int)tokens;
        break;
    default: return false;
    }
    if (!valid) report_error(BAD_VALUE, option, value, expected);
    return valid;
}

// A command line: options may stand before, between and right behind the operands (POSIX's word for
// a thread count or a seed), and "--" ends them. What stands behind, an engine's prompts, is never
// parsed as an option. getopt(3) alone does not do that: glibc's moves options that stand behind
// the prompts to the front, and musl's stops at the first operand.
typedef struct {
    int argc;
    char **argv;
    const char *usage; // what follows "Usage: " and the program's name
    int wanted, count; // operands that the program takes at most, and that were found
    char *operands[2];
    bool options_ended; // by "--"
} CommandLine;

// Returns the next option like getopt(3), with its value in optarg: '?' after reporting an unknown
// option or a missing value, 'h' for --help, and -1 when there are no more. Then the operands are
// in the CommandLine and optind is the first argument behind them. `options` begins with "+:".
static inline int next_option(CommandLine *line, const char *options) {
    static const struct option long_options[] = {{"help", no_argument, NULL, 'h'}, {0}};
    for (;;) {
        int before = optind, option = -1;
        if (!line->options_ended)
            option = getopt_long(line->argc, line->argv, options, long_options, NULL);
        if (option == ':') report_error("-%c needs a value.", optopt);
        else if (option == '?' && optopt) report_error("-%c is not an option.", optopt);
        else if (option == '?') report_error("%s is not an option.", line->argv[optind - 1]);
        if (option != -1) return option == ':' ? '?' : option;
        if (optind > before) line->options_ended = true; // getopt(3) has skipped "--"
        if (optind == line->argc || line->count == line->wanted) return -1;
        line->operands[line->count++] = line->argv[optind++];
    }
}

// Ends the program with its usage: printed on stdout if the user asked for it (status 0), else
// reported as an error.
_Noreturn static inline void exit_with_usage(const CommandLine *line, int status) {
    char text[PIPE_BUF];
    snprintf(text, sizeof(text), "Usage: %s %s", line->argv[0], line->usage);
    if (status == 0) puts(text);
    else report_error("%s", text);
    exit(flush_output() < 0 ? 1 : status);
}

// Parses an engine's command line into *settings and line->operands; see next_option(). Ends the
// program for -h and after reporting a mistake.
static inline void parse_settings(Settings *settings, CommandLine *line) {
    bool valid = true;
    for (int option; (option = next_option(line, "+:h" SETTINGS_OPTIONS)) != -1;) {
        if (option == 'h') exit_with_usage(line, valid ? 0 : 2);
        valid &= parse_setting(settings, option, optarg);
    }
    if (!valid) exit_with_usage(line, 2);
}

// Replaces a seed of 0 by one from the clock, and prints it so that the chat can be repeated.
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
    bool ended;                      // end of file or a read error
    int error;                       // errno of the read error, or 0
    bool skipping;                   // in the middle of a line that is too long
    size_t length;                   // bytes in the buffer
    char buffer[MAX_PROMPT_LEN + 2]; // input that next_line() has not returned yet; with "\r\n"
} LineReader;

enum { NO_LINE_YET = -1, LINE_TOO_LONG = -2, END_OF_INPUT = -3 };

// Reads input once with read(2); sets reader->ended at the end of file and at an error. Call it
// after next_line() has returned NO_LINE_YET: then the buffer has room. (With no room, read(2)
// would return 0, which means the end of file.)
static inline void read_more(LineReader *reader) {
    ssize_t count =
        read(reader->fd, reader->buffer + reader->length, sizeof(reader->buffer) - reader->length);
    if (count > 0) {
        reader->length += (size_t)count;
    } else if (count == 0 || (errno != EINTR && errno != EAGAIN)) {
        reader->ended = true;
        if (count < 0 && errno != EBADF) reader->error = errno; // EBADF: closed from the beginning
    }
}

// Returns whether a text is empty or only white space.
static inline bool is_blank(const char *text, size_t length) {
    while (length > 0 && isspace((unsigned char)text[length - 1])) length--;
    return length == 0;
}

// Moves the next line from the buffer to line[MAX_PROMPT_LEN], without its newline and carriage
// returns before that, and without a terminator. Returns its length, 0 for a blank line; or
// NO_LINE_YET; or END_OF_INPUT, after an error, too; or LINE_TOO_LONG, once, after skipping a line
// longer than MAX_PROMPT_LEN. The last line of the input needs no newline.
static inline int next_line(LineReader *reader, char *line) {
    char *newline = memchr(reader->buffer, '\n', reader->length);
    // A full buffer without a newline holds the beginning of a line that is too long. Emptying it
    // keeps the promise of room that read_more() relies on.
    if (newline == NULL && reader->length == sizeof(reader->buffer)) {
        reader->skipping = true;
        reader->length = 0;
    }
    if (newline == NULL && !reader->ended) return NO_LINE_YET;
    if (newline == NULL && reader->length == 0 && !reader->skipping) return END_OF_INPUT;

    size_t length = newline ? (size_t)(newline - reader->buffer) : reader->length;
    size_t used = length + (newline != NULL);
    // Removes all carriage returns, also at the end of the input: main adds a newline, and the
    // engine must not find any more to remove.
    while (length > 0 && reader->buffer[length - 1] == '\r') length--;
    bool too_long = reader->skipping || length > MAX_PROMPT_LEN;
    if (!too_long) memcpy(line, reader->buffer, length);
    reader->skipping = false;
    reader->length -= used;
    memmove(reader->buffer, reader->buffer + used, reader->length);
    if (too_long) return LINE_TOO_LONG;
    return is_blank(line, length) ? 0 : (int)length;
}

// For printf(3) with MAX_PROMPT_LEN. It is part of the conversation, so it goes to stdout.
#define TOO_LONG_MESSAGE "The prompt is longer than %d bytes and was not used. Please shorten it.\n"

// Reports the error that ended the input, if one did. Returns 0, or -1 after an error.
static inline int report_read_error(const LineReader *reader) {
    if (reader->error == 0) return 0;
    return report_error("Cannot read the input: %s.", strerror(reader->error));
}

// ------------------------------------------------------------------------------------------------
// The engine's end of the protocol

#define PROMPT_MARK ">>> "
#define RETURN_FD 3                    // where the engine finds the return pipe
#define FRONT_END_ENV "CHAT_FRONT_END" // the front end's pid, in the engine's environment

// Answers one prompt on stdout, or prints there why it cannot be used, and flushes that. Returns 0;
// or -1 if the session cannot go on, after reporting the reason unless the reader of stdout is
// gone.
typedef struct Session Session; // defined by the engine
typedef int Answer(Session *session, const char *prompt, size_t length);

// Returns whether the engine is main's child: whether its parent is the process that the
// environment names. The variable alone proves nothing, since every descendant of the engine
// inherits it.
static inline bool is_child_of_front_end(void) {
    const char *text = getenv(FRONT_END_ENV);
    long pid;
    return text && parse_integer(text, 1, INT32_MAX, &pid) && pid == getppid();
}

// Returns 0, or -1 after reporting the error: without its byte main would wait forever.
static inline int notify_front_end(void) {
    if (write(RETURN_FD, "", 1) != 1)
        return report_error("Cannot write to the return pipe: %s.", strerror(errno));
    kill(getppid(), SIGUSR2);
    return 0;
}

// Answers main's prompts until the end of the pipe. Returns 0, or -1 if the session ended before.
// No lost wake-up: SIGUSR1 has been blocked since before exec and stays pending until
// sigwaitinfo(2) takes it, so a prompt written after poll(2) found the pipe empty ends the wait.
static inline int serve_front_end(Answer *answer, Session *session) {
    LineReader reader = {.fd = STDIN_FILENO};
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char prompt[MAX_PROMPT_LEN];
    sigset_t notification;
    sigemptyset(&notification);
    sigaddset(&notification, SIGUSR1);
    if (notify_front_end() < 0) return -1;
    for (;;) {
        int length = next_line(&reader, prompt);
        if (length == END_OF_INPUT) return report_read_error(&reader);
        if (length >= 0) {
            // The reply is flushed before main is notified, so that the next prompt mark cannot
            // overtake it.
            if (answer(session, prompt, (size_t)length) < 0 || notify_front_end() < 0) return -1;
        } else if (poll(&input, 1, 0) != 0) {
            read_more(&reader);
        } else if (sigwaitinfo(&notification, NULL) < 0 && errno != EINTR) {
            return report_error("Cannot wait for a prompt: %s.", strerror(errno));
        }
    }
}

// Answers the prompts of an engine that was started by hand: the lines of stdin. Returns 0, or -1
// if the session ended before the end of the input.
static inline int serve_stdin(Answer *answer, Session *session) {
    LineReader reader = {.fd = STDIN_FILENO};
    char prompt[MAX_PROMPT_LEN];
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    bool marks = isatty(STDIN_FILENO);
    for (;;) {
        if (marks) fputs(PROMPT_MARK, stdout);
        if (flush_output() < 0) return -1;
        int length;
        while ((length = next_line(&reader, prompt)) == NO_LINE_YET) {
            poll(&input, 1, -1); // stdin may be non-blocking, and must not be read in a busy loop
            read_more(&reader);
        }
        if (length == END_OF_INPUT) break;
        if (length == LINE_TOO_LONG) printf(TOO_LONG_MESSAGE, MAX_PROMPT_LEN);
        else if (length > 0 && answer(session, prompt, (size_t)length) < 0) return -1;
    }
    if (marks) fputc('\n', stdout);
    return report_read_error(&reader);
}

// Answers the prompts of the command line; if there are none, those of main or else of stdin.
// Returns 0, or -1 if the session ended before all were answered.
static inline int serve(Answer *answer, Session *session, char **prompts, int count) {
    signal(SIGXFSZ, SIG_IGN); // output at its size limit is an error of write(2), which is reported
    if (count == 0 && is_child_of_front_end()) return serve_front_end(answer, session);
    if (count == 0) return serve_stdin(answer, session);
    for (int i = 0; i < count; i++) {
        size_t length = strlen(prompts[i]);
        if (length > MAX_PROMPT_LEN) printf(TOO_LONG_MESSAGE, MAX_PROMPT_LEN);
        else if (answer(session, prompts[i], length) < 0) return -1;
    }
    return 0;
}

// ------------------------------------------------------------------------------------------------
// Scheduling policies, sched(7)

// The argument of SYS_sched_setattr, sched_setattr(2). It has a name of its own because <sched.h>
// defines struct sched_attr since glibc 2.41, but not before.
typedef struct {
    uint32_t size;     // of this structure, by which the kernel knows its version
    uint32_t policy;   // SCHED_...
    uint64_t flags;    // 0
    int32_t nice;      // SCHED_OTHER, SCHED_BATCH: -20..19; SCHED_IDLE: see set_policy()
    uint32_t priority; // SCHED_FIFO, SCHED_RR: 1..99
    uint64_t runtime;  // SCHED_DEADLINE: nanoseconds
    uint64_t deadline; // likewise
    uint64_t period;   // likewise
} SchedulingAttributes;

// The names of the policies by the kernel's numbers. Number 4 is not in use: NULL.
static const char *const policy_names[] = {
    [SCHED_OTHER] = "SCHED_OTHER", [SCHED_FIFO] = "SCHED_FIFO", [SCHED_RR] = "SCHED_RR",
    [SCHED_BATCH] = "SCHED_BATCH", [SCHED_IDLE] = "SCHED_IDLE", [SCHED_DEADLINE] = "SCHED_DEADLINE",
};
enum { POLICY_COUNT = sizeof(policy_names) / sizeof(policy_names[0]) };

#endif // COMMON_H
