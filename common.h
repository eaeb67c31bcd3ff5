// common.h - the contract of the chat front end (main.c) and the engines (inference.c, parallel.c):
// limits, settings, lines of input, the pipe-and-signal protocol, and how errors are reported.
//
//     user -- stdin --> main -- pipe: one prompt and a newline ---> engine's stdin
//                       main -- SIGUSR1: a prompt is in the pipe -> engine
//     user <-- stdout (inherited from main) ----------------------- engine
//                       main <-- return pipe: one byte ------------ engine is ready, reply finished
//                       main <-- SIGUSR2: a byte is in the pipe --- engine
//
// Why signals? The pipes alone would do, as a process can wait for data in read(2) or poll(2). In
// this coursework signals notify, for what that teaches: pending signals of one kind coalesce, any
// process may send one, and a wake-up can get lost. So the data are in the pipes, written before
// the signal is raised. Both sides keep their signal blocked: it stays pending until signalfd(2) in
// main or sigwaitinfo(2) in the engine takes it, and is ignored if there are no data.
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
// Output, errors and the clock

#define REPORT_LIMIT 500 // milliseconds that an error or a last line waits for a slow reader

// Returns whether write(2) would not block (it may fail), after waiting up to `milliseconds` for
// that. A pipe then has room for PIPE_BUF bytes.
static inline bool is_writable(int fd, int milliseconds) {
    return poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, milliseconds) == 1;
}

// Prints one line on stderr. In normal use stderr is the log, where the user would miss it: if
// stderr is redirected and stdout is a terminal, the line appears on stdout, too. A stream that
// cannot take it within REPORT_LIMIT loses it, and it is cut off at PIPE_BUF bytes, so that no
// program hangs in an error message. Returns -1, for callers that return that.
__attribute__((format(printf, 1, 2))) static inline int report_error(const char *format, ...) {
    char line[PIPE_BUF];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    bool on_stdout = isatty(STDOUT_FILENO) && !isatty(STDERR_FILENO);
    for (int i = 0; i <= on_stdout; i++) {
        FILE *stream = i ? stdout : stderr;
        if (!is_writable(fileno(stream), REPORT_LIMIT)) continue;
        fprintf(stream, "%s\n", line);
        fflush(stream);
    }
    return -1;
}

// Ends the program after a failure that does not happen in practice, only in tests that inject it.
// If the front end dies, the kernel kills the engine (PR_SET_PDEATHSIG).
_Noreturn static inline void die(const char *call) {
    report_error("%s failed: %s.", call, strerror(errno));
    exit(1);
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
// must be called before any other descriptor is opened. Otherwise another file would get such a
// number and, with it, the output for stdout or stderr. /dev/null is opened for the wrong
// direction, so that using the descriptor fails with EBADF.
static inline void reserve_standard_fds(void) {
    for (int fd = STDIN_FILENO; fd <= STDERR_FILENO; fd++) {
        int wrong = fd == STDIN_FILENO ? O_WRONLY : O_RDONLY, flags = fcntl(fd, F_GETFL);
        if (flags >= 0 && (flags & O_ACCMODE) != wrong) continue;
        close(fd);
        open("/dev/null", wrong);
    }
}

// Returns whether stdout is a terminal with colors and the user wants them (https://no-color.org).
static inline bool has_colors(void) {
    const char *no_color = getenv("NO_COLOR"), *terminal = getenv("TERM");
    if (no_color && *no_color) return false;
    return isatty(STDOUT_FILENO) && !(terminal && strcmp(terminal, "dumb") == 0);
}

// Returns the time of a clock in seconds. (CLOCK_MONOTONIC is never set back.)
static inline double seconds(clockid_t clock) {
    struct timespec now;
    if (clock_gettime(clock, &now) < 0) die("clock_gettime");
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

// ------------------------------------------------------------------------------------------------
// Settings: the options that all programs share, and the seed

typedef struct {
    const char *dir;         // holds model.bin and tokenizer.bin
    float temperature;       // 0 is greedy
    float top_p;             // 0..1, the share of the probability that sampling chooses from
    int max_new_tokens;      // tokens of a reply at most
    int draft_tokens;        // tokens of a draft at most, 0..MAX_DRAFT
    unsigned long long seed; // of the sampler; 0 takes one from the clock
} Settings;

#define DEFAULT_SETTINGS ((Settings){".", 0.6f, 0.9f, 256, 16, 42})

// For getopt_long(3). The first colon makes it leave the report of a mistake to parse_setting().
#define SETTINGS_OPTIONS ":hd:t:p:m:k:"
static const struct option long_options[] = {{"help", no_argument, NULL, 'h'}, {0}};
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

// Parses an integer in [least, most]: decimal digits, perhaps after a minus (strtol(3) alone
// accepts " 5" and "+5"). Returns false if the text is anything else.
static inline bool parse_integer(const char *text, int least, int most, int *value) {
    const char *digits = text + (*text == '-');
    errno = 0;
    long number = strtol(text, NULL, 10);
    *value = (int)number;
    return *digits != '\0' && digits[strspn(digits, "0123456789")] == '\0' && errno == 0 &&
           number >= least && number <= most;
}

// Parses a number in [least, most] that is all of the text. Returns false if it is anything else.
static inline bool parse_float(const char *text, float least, float most, float *value) {
    char *end;
    *value = strtof(text, &end);
    return end != text && *end == '\0' && *value >= least && *value <= most;
}

// Ends the program with its usage: on stdout if it was asked for (status 0), else as an error (2).
_Noreturn static inline void exit_with_usage(const char *usage, int status) {
    char text[PIPE_BUF];
    snprintf(text, sizeof(text), "Usage: %s %s", program_invocation_name, usage);
    if (status == 0) puts(text);
    else report_error("%s", text);
    exit(flush_output() < 0 ? 1 : status);
}

// Parses a seed: decimal digits and nothing else. 0 is replaced by a seed from the clock, which is
// printed so that the chat can be repeated. Ends the program if the text is anything else, or NULL.
static inline unsigned long long parse_seed(const char *text, const char *usage) {
    errno = 0;
    unsigned long long seed = text ? strtoull(text, NULL, 10) : 0;
    bool valid = text && *text && text[strspn(text, "0123456789")] == '\0' && errno == 0;
    if (text == NULL) report_error("The seed is missing.");
    else if (!valid) report_error("%s is not a seed.", text);
    if (!valid) exit_with_usage(usage, 2);
    if (seed == 0) {
        seed = (unsigned long long)(1e9 * seconds(CLOCK_REALTIME));
        printf("The seed is %llu, from the clock.\n", seed);
    }
    return seed;
}

// Ends the program unless the value of an option, optarg, is valid.
static inline void check_value(int option, bool valid, const char *expected, const char *usage) {
    if (valid) return;
    report_error("-%c %s: expected %s.", option, optarg, expected);
    exit_with_usage(usage, 2);
}

// Parses an option of SETTINGS_OPTIONS, whose value is optarg. Ends the program for -h, and after
// reporting a bad value, a missing one (option ':') or an unknown option ('?').
static inline void parse_setting(Settings *settings, int option, char **argv, const char *usage) {
    static const char *const expected[] = {
        ['t'] = "0, or a number from 0.01 to 100",
        ['p'] = "a number from 0 to 1",
        ['m'] = "an integer from 1 to 1000000",
        ['k'] = "an integer from 0 to 16",
    };
    bool valid = true;
    switch (option) {
    case 'd': settings->dir = optarg; break;
    case 't':
        valid = parse_float(optarg, 0, 100, &settings->temperature) &&
                (settings->temperature == 0 || settings->temperature >= 0.01f);
        break;
    case 'p': valid = parse_float(optarg, 0, 1, &settings->top_p); break;
    case 'm': valid = parse_integer(optarg, 1, 1000000, &settings->max_new_tokens); break;
    case 'k': valid = parse_integer(optarg, 0, MAX_DRAFT, &settings->draft_tokens); break;
    case 'h': exit_with_usage(usage, 0);
    default:
        if (option == ':') report_error("-%c needs a value.", optopt);
        else if (optopt && optopt != 'h') report_error("-%c is not an option.", optopt);
        else report_error("%s is not an option.", argv[optind - 1]);
        exit_with_usage(usage, 2);
    }
    check_value(option, valid, expected[option], usage);
}

// Parses the options of an engine, see parse_setting(); then optind is that of the first operand.
static inline void parse_settings(Settings *settings, int argc, char **argv, const char *usage) {
    int option;
    while ((option = getopt_long(argc, argv, SETTINGS_OPTIONS, long_options, NULL)) != -1)
        parse_setting(settings, option, argv, usage);
}

// ------------------------------------------------------------------------------------------------
// Lines of input, from a terminal, a file or a pipe

typedef struct {
    int fd;
    bool ended, failed;              // no more input is to come; that is because of an error
    bool skipping;                   // in the middle of a line that is too long
    size_t length;                   // bytes in the buffer
    char buffer[MAX_PROMPT_LEN + 2]; // what next_line() has not returned yet: a line and "\r\n"
} LineReader;

enum { NO_LINE_YET = -1, LINE_TOO_LONG = -2, END_OF_INPUT = -3 };

// Reads input once with read(2); an error is reported and ends the input. Call it after next_line()
// has returned NO_LINE_YET: then the buffer has room. (With no room, read(2) would return 0, which
// means the end of file.)
static inline void read_more(LineReader *reader) {
    ssize_t count =
        read(reader->fd, reader->buffer + reader->length, sizeof(reader->buffer) - reader->length);
    if (count > 0) {
        reader->length += (size_t)count;
    } else if (count == 0 || (errno != EINTR && errno != EAGAIN)) {
        reader->ended = true;
        reader->failed = count < 0 && errno != EBADF; // EBADF: closed from the beginning
        if (reader->failed) report_error("Cannot read the input: %s.", strerror(errno));
    }
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
    size_t blanks = 0;
    while (blanks < length && isspace((unsigned char)line[blanks])) blanks++;
    return blanks == length ? 0 : (int)length;
}

// For printf(3) with MAX_PROMPT_LEN. It is part of the conversation, so it goes to stdout.
#define TOO_LONG_MESSAGE "The prompt is longer than %d bytes and was not used. Please shorten it.\n"

// ------------------------------------------------------------------------------------------------
// The engine's end of the protocol

#define PROMPT_MARK ">>> "
#define RETURN_FD 3                    // where the engine finds the return pipe
#define FRONT_END_ENV "CHAT_FRONT_END" // the front end's pid, in the engine's environment

typedef struct Session Session; // defined by the engine
// Answers one prompt on stdout, or prints there why it cannot be used, and flushes that. Returns 0;
// or -1 if the session cannot go on, after reporting the reason unless the reader of stdout is
// gone.
typedef int Answer(Session *session, const char *prompt, size_t length);

// Returns whether the engine is main's child: whether its parent is the process that the
// environment names. The variable alone proves nothing, since every descendant of the engine
// inherits it.
static inline bool is_child_of_front_end(void) {
    const char *text = getenv(FRONT_END_ENV);
    int pid;
    return text && parse_integer(text, 1, INT_MAX, &pid) && pid == getppid();
}

// Reports to main that the engine is ready or a reply is finished.
static inline void notify_front_end(void) {
    if (write(RETURN_FD, "", 1) != 1) die("write to the return pipe"); // main would wait forever
    kill(getppid(), SIGUSR2);
}

// Answers main's prompts until the end of the pipe. Returns 0, or -1 if the session ended before.
// No lost wake-up: SIGUSR1 has been blocked since before exec, so the signal of a prompt that was
// written after poll(2) found the pipe empty is pending, and ends the wait.
static inline int serve_front_end(Answer *answer, Session *session) {
    LineReader reader = {.fd = STDIN_FILENO};
    struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
    char prompt[MAX_PROMPT_LEN];
    sigset_t notification;
    sigemptyset(&notification);
    sigaddset(&notification, SIGUSR1);
    notify_front_end();
    for (;;) {
        int length = next_line(&reader, prompt);
        if (length == END_OF_INPUT) return reader.failed ? -1 : 0;
        if (length >= 0) {
            // This flushes the reply before main is notified, so that the next prompt mark cannot
            // overtake it.
            if (answer(session, prompt, (size_t)length) < 0) return -1;
            notify_front_end();
        } else if (poll(&input, 1, 0) != 0) {
            read_more(&reader);
        } else if (sigwaitinfo(&notification, NULL) < 0 && errno != EINTR) {
            die("sigwaitinfo");
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
    return reader.failed ? -1 : 0;
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

#endif // COMMON_H
