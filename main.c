// main.c - the chat's front end. It starts an engine as a child process, passes the user's prompts
// to it, sets its scheduling policy, and logs its CPU use while it works.
//
// It knows nothing of models. common.h has the picture of the two processes and their protocol.
// Every event is a file descriptor that becomes ready. run_chat() waits for all of them in one
// poll(2); what handles them does not wait for long, so Ctrl-C ends the chat at any moment.
#define _GNU_SOURCE
#include "common.h"
#include <dirent.h>
#include <sched.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <termios.h>

#define SAMPLE_INTERVAL 300 // milliseconds between two log lines
#define GRACE_PERIOD 2000   // milliseconds that an engine has to exit before it is killed

// ------------------------------------------------------------------------------------------------
// Scheduling policies, sched(7)

// The argument of SYS_sched_setattr, sched_setattr(2). It has a name of its own because <sched.h>
// defines struct sched_attr since glibc 2.41, but not before.
typedef struct {
    uint32_t size;                      // of this structure: the kernel derives its version from it
    uint32_t policy;                    // SCHED_...
    uint64_t flags;                     // 0
    int32_t nice;                       // SCHED_OTHER, SCHED_BATCH: -20..19
    int32_t priority;                   // SCHED_FIFO, SCHED_RR: 1..99
    uint64_t runtime, deadline, period; // SCHED_DEADLINE: nanoseconds
} SchedulingAttributes;

// The policies by the kernel's numbers (4 is not in use), and the option that each takes
static const struct {
    const char *name;
    char option;
} policies[] = {
    [SCHED_OTHER] = {"SCHED_OTHER", 'n'}, [SCHED_BATCH] = {"SCHED_BATCH", 'n'},
    [SCHED_IDLE] = {"SCHED_IDLE", 'n'},   [SCHED_FIFO] = {"SCHED_FIFO", 'r'},
    [SCHED_RR] = {"SCHED_RR", 'r'},       [SCHED_DEADLINE] = {"SCHED_DEADLINE", 'D'},
};
enum { POLICY_COUNT = sizeof(policies) / sizeof(policies[0]) };

// Finds a policy by its name, in any case and with or without SCHED_. Returns false if none has it.
static bool find_policy(const char *name, uint32_t *policy) {
    if (strncasecmp(name, "SCHED_", 6) == 0) name += 6;
    if (strcasecmp(name, "NORMAL") == 0) name = "OTHER";
    for (*policy = 0; *policy < POLICY_COUNT; ++*policy)
        if (policies[*policy].name && strcasecmp(name, policies[*policy].name + 6) == 0) break;
    return *policy < POLICY_COUNT;
}

// Sets the policy of one thread, if it has not just ended. Returns 0 or an errno. With SCHED_IDLE,
// sched_setattr(2) ignores the nice value, so setpriority(2) sets it.
static int set_policy(pid_t thread, const SchedulingAttributes *attributes) {
    bool idle = attributes->policy == SCHED_IDLE;
    bool refused = (idle && setpriority(PRIO_PROCESS, (id_t)thread, attributes->nice) < 0) ||
                   syscall(SYS_sched_setattr, thread, attributes, 0u) < 0;
    return refused && errno != ESRCH ? errno : 0;
}

// Sets the policy of all threads of an engine, which creates no more of them. Returns 0 or an
// errno. Without /proc only an engine of one thread can be set.
static int set_policies(pid_t pid, bool threaded, const SchedulingAttributes *attributes) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    if (tasks == NULL) return threaded ? errno : set_policy(pid, attributes);
    int error = 0;
    for (struct dirent *entry; error == 0 && (entry = readdir(tasks)) != NULL;)
        if (isdigit((unsigned char)entry->d_name[0])) // neither "." nor ".."
            error = set_policy((pid_t)atoi(entry->d_name), attributes);
    closedir(tasks);
    return error;
}

// Reports why the kernel refused a policy, and what it needs: see sched_setattr(2) and sched(7).
static void report_policy_error(const SchedulingAttributes *attributes, int error) {
    const char *advice = "see sched_setattr(2)";
    char nice[40] = "";
    if (policies[attributes->policy].option == 'n')
        snprintf(nice, sizeof(nice), " with the nice value %d", attributes->nice);
    if ((error == EPERM || error == EACCES) && attributes->policy == SCHED_DEADLINE)
        advice = "it needs an affinity to all CPUs of the machine, and CAP_SYS_NICE: sudo gives it "
                 "unless a container or a cgroup forbids it";
    else if (error == EPERM || error == EACCES)
        advice = "it needs a resource limit that allows it (ulimit -e, -r) or CAP_SYS_NICE: sudo "
                 "gives it unless a container or a cgroup forbids it";
    else if (error == EBUSY) advice = "the CPUs cannot guarantee that to all threads of the engine";
    else if (error == EINVAL) advice = "it needs runtime >= 1024 ns, period 100 us to 4 s";
    else if (error == ENOENT) advice = "it needs /proc to find the threads of the engine";
    report_error("Cannot set %s%s (%s): %s.", policies[attributes->policy].name, nice,
                 strerror(error), advice);
}

// ------------------------------------------------------------------------------------------------
// Options

typedef struct {
    Settings settings; // main checks them, and passes on all but the seed as they were typed
    SchedulingAttributes attributes;
    char *values[128];       // of the options that were given: values['j']
    char names[128][3];      // of the same options: names['t'] is "-t"
    char seed[24];           // as text
    char **engine_arguments; // for execv(3): the program's name, settings, threads, seed, NULL
    int argument_count;
} Options;

#define OPTIONS SETTINGS_OPTIONS "s:n:r:D:j:"
#define USAGE                                                                                      \
    "[-s policy] [-n nice] [-r priority] [-D runtime:deadline:period] [-j threads]\n"              \
    "       " SETTINGS_USAGE " [seed]\n"                                                           \
    "  -s policy           SCHED_OTHER (the default), SCHED_BATCH or SCHED_IDLE, with -n;\n"       \
    "                      SCHED_FIFO or SCHED_RR, with -r; SCHED_DEADLINE, with -D\n"             \
    "  -n nice             -20 (most CPU time) to 19 (least); default: that of this program\n"     \
    "  -r priority         1 (the default) to 99 (most urgent)\n"                                  \
    "  -D runtime:deadline:period   in nanoseconds, or with us or ms: 10ms:20ms:20ms\n"            \
    "  -j threads          1 to 64: run ./parallel instead of ./inference\n" SETTINGS_HELP         \
    " (default: 42)\n\nThe log goes to stderr: ./main 42 2>log"

// Parses runtime:deadline:period. Returns false for any other text, or if their order is wrong.
static bool parse_times(const char *text, SchedulingAttributes *attributes) {
    uint64_t *const times[] = {&attributes->runtime, &attributes->deadline, &attributes->period};
    for (int i = 0; i < 3; i++) {
        char *rest, end = i < 2 ? ':' : '\0';
        if (!isdigit((unsigned char)*text)) return false;
        errno = 0;
        unsigned long long value = strtoull(text, &rest, 10), unit = 1;
        if (strncmp(rest, "us", 2) == 0) unit = 1000, rest += 2;
        else if (strncmp(rest, "ms", 2) == 0) unit = 1000000, rest += 2;
        if (errno != 0 || *rest != end || value > UINT64_MAX / unit) return false;
        *times[i] = value * unit;
        text = rest + 1;
    }
    return *times[0] <= *times[1] && *times[1] <= *times[2];
}

// Parses one option, whose value is optarg. Ends the program for -h and after reporting a mistake.
static void parse_option(Options *options, int option, char **argv) {
    static const char *const expected[] = {
        ['s'] = "OTHER, BATCH, IDLE, FIFO, RR or DEADLINE, with or without SCHED_",
        ['n'] = "an integer from -20 to 19",
        ['r'] = "an integer from 1 to 99",
        ['D'] = "runtime <= deadline <= period, in nanoseconds, or with us or ms: 10ms:20ms:20ms",
        ['j'] = "an integer from 1 to 64",
    };
    bool valid = false;
    options->values[option] = optarg;
    switch (option) {
    case 's': valid = find_policy(optarg, &options->attributes.policy); break;
    case 'n': valid = parse_integer(optarg, -20, 19, &options->attributes.nice); break;
    case 'r': valid = parse_integer(optarg, 1, 99, &options->attributes.priority); break;
    case 'D': valid = parse_times(optarg, &options->attributes); break;
    case 'j': valid = parse_integer(optarg, 1, MAX_THREADS, &(int){0}); break; // stays a text
    default:
        parse_setting(&options->settings, option, argv, USAGE);
        snprintf(options->names[option], sizeof(options->names[option]), "-%c", option);
        options->engine_arguments[options->argument_count++] = options->names[option];
        options->engine_arguments[options->argument_count++] = optarg;
        return;
    }
    check_value(option, valid, expected[option], USAGE);
}

// Parses the command line into *options; arguments has room for 2 * argc + 4 pointers. Ends the
// program for -h and after reporting a mistake.
static void parse_options(Options *options, char **arguments, int argc, char **argv) {
    *options = (Options){.settings = DEFAULT_SETTINGS,
                         .attributes.size = sizeof(SchedulingAttributes),
                         .engine_arguments = arguments,
                         .argument_count = 1}; // the first is the program's name
    SchedulingAttributes *attributes = &options->attributes;
    char **values = options->values;
    int option;
    while ((option = getopt_long(argc, argv, OPTIONS, long_options, NULL)) != -1)
        parse_option(options, option, argv);
    char allowed = policies[attributes->policy].option;
    bool second_seed = optind + 1 < argc;
    bool mismatch = (values['n'] && allowed != 'n') || (values['r'] && allowed != 'r') ||
                    (values['D'] != NULL) != (allowed == 'D');
    if (second_seed) report_error("%s: expected only one seed.", argv[optind + 1]);
    if (mismatch)
        report_error("Of -n, -r and -D, %s %s -%c.", policies[attributes->policy].name,
                     allowed == 'D' && !values['D'] ? "needs" : "takes only", allowed);
    if (second_seed || mismatch) exit_with_usage(USAGE, 2);
    if (optind < argc) options->settings.seed = parse_seed(argv[optind], USAGE);

    // sched_setattr(2) sets the nice value along with the policy: by default to main's own.
    errno = 0;
    if (!values['n']) attributes->nice = getpriority(PRIO_PROCESS, 0);
    if (errno != 0) die("getpriority"); // -1 is a nice value as well
    if (allowed == 'r' && !values['r']) attributes->priority = 1;

    arguments[0] = values['j'] ? "parallel" : "inference";
    if (values['j']) arguments[options->argument_count++] = values['j'];
    snprintf(options->seed, sizeof(options->seed), "%llu", options->settings.seed);
    arguments[options->argument_count++] = options->seed;
    arguments[options->argument_count] = NULL;
}

// ------------------------------------------------------------------------------------------------
// The log: samples of the engine's /proc/<pid>/stat, proc(5)

typedef struct {
    pid_t pid;
    clockid_t cpu_clock; // the engine's CPU time, of all its threads: clock_getcpuclockid(3)
    double cpu_time;     // on that clock when it was last measured, in seconds
    double wall_time;    // the same moment on CLOCK_MONOTONIC
    bool logged;         // a line has been written since the prompt
    bool has_reported;   // why a line could not be written
    bool shares_output;  // stdout is the same terminal, pipe or file
    char text[4096];     // of /proc/<pid>/stat
} Log;

enum { TCOMM = 2, STATE, UTIME = 14, STIME, NICE = 19, VSIZE = 23, CPU = 39, POLICY = 41, FIELDS };

// Reads /proc/<pid>/stat into log->text and splits it: fields[i] is field i from TCOMM on. Returns
// false with errno if it cannot be read. The name in field 2 may hold spaces and parentheses, so
// the fields after it begin after the last ')'.
static bool read_stat(Log *log, char *fields[FIELDS]) {
    char *text = log->text;
    snprintf(text, sizeof(log->text), "/proc/%d/stat", (int)log->pid);
    int fd = open(text, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(log->text) - 1);
    if (fd >= 0) close(fd);
    text[length < 0 ? 0 : length] = '\0';
    char *name_end = strrchr(text, ')'), *position;
    if (name_end == NULL) return false;
    fields[TCOMM] = strchr(text, '(');
    name_end[1] = '\0';
    for (int i = STATE; i < FIELDS; i++) {
        fields[i] = strtok_r(i == STATE ? name_end + 2 : NULL, " \n", &position);
        if (fields[i] == NULL) return false;
    }
    return true;
}

// Reports once why the log is not complete, on a line of its own in a terminal.
static void report_log_failure(Log *log, const char *file) {
    if (!log->has_reported)
        report_error("%sThe log is not complete: %s: %s.", isatty(STDOUT_FILENO) ? "\n" : "", file,
                     strerror(errno));
    log->has_reported = true;
}

// Returns the engine's CPU use since the last call, in percent.
static double measure_cpu_use(Log *log) {
    double cpu_time = seconds(log->cpu_clock), wall_time = seconds(CLOCK_MONOTONIC);
    double percent = 100 * (cpu_time - log->cpu_time) / (wall_time - log->wall_time);
    log->cpu_time = cpu_time;
    log->wall_time = wall_time;
    return percent;
}

// Writes one log line: utime and stime in clock ticks, vsize in bytes. A line that stderr cannot
// take at once is lost. `in_reply`: stdout may be in the middle of a line of the reply.
static void log_sample(Log *log, bool in_reply) {
    char line[1024], *fields[FIELDS];
    if (!is_writable(STDERR_FILENO, 0)) return;
    if (!read_stat(log, fields)) return report_log_failure(log, "/proc/<pid>/stat");
    int policy = atoi(fields[POLICY]);
    bool known = policy >= 0 && policy < POLICY_COUNT && policies[policy].name;
    int length =
        snprintf(line, sizeof(line),
                 "%s[pid] %d [tcomm] %s [state] %s [policy] %s [nice] %s [vsize] %s [task_cpu] %s "
                 "[utime] %s [stime] %s [cpu%%] %.2f%%\n",
                 in_reply && log->shares_output ? "\n" : "", (int)log->pid, fields[TCOMM],
                 fields[STATE], known ? policies[policy].name : fields[POLICY], fields[NICE],
                 fields[VSIZE], fields[CPU], fields[UTIME], fields[STIME], measure_cpu_use(log));
    // EBADF: stderr was closed from the beginning, so no log is wanted.
    if (write(STDERR_FILENO, line, (size_t)length) < 0 && errno != EAGAIN && errno != EBADF)
        report_log_failure(log, "stderr");
    log->logged = true;
}

// ------------------------------------------------------------------------------------------------
// The chat's state, and its child

typedef enum {
    LOADING,    // until the engine is ready, no input is taken: if it fails, no prompt is lost
    PROMPTING,  // waiting for the user
    GENERATING, // waiting for the engine's reply
    FLUSHING,   // waiting for stdout to take a newline; dismiss_engine() follows
    EXITING     // waiting for the engine's exit
} Phase;

// Why the chat ends: ERROR means that main cannot go on, INTERRUPTED is by SIGINT or SIGTERM. Of
// two reasons the later one in this list counts.
typedef enum { NO_REASON, INPUT_ENDED, ENGINE_DIED, ERROR, INTERRUPTED } Reason;

typedef struct {
    const Options *options;
    Phase phase;
    Reason reason;
    int interrupt;        // the first SIGINT or SIGTERM, or 0
    pid_t pid;            // of the engine
    int prompts_fd;       // write end of the pipe that is its stdin, non-blocking
    int returns_fd;       // read end of the return pipe; -1 after the engine has closed it
    int signals_fd;       // signalfd(2): signals are read like input, no handler runs
    int timer_fd;         // timerfd_create(2): a log line or a kill is due
    sigset_t engine_mask; // the signal mask that main inherited, and SIGUSR1 and SIGUSR2
    struct sigaction inherited_sigchld;
    LineReader input;
    Log log;
    char output[512];     // text that stdout has not taken yet
    size_t output_length; // no input is taken before it is 0
} Chat;

// Finds the engine in the folder of main's own binary, the file that execve(2) was called with.
static void engine_path(char path[PATH_MAX], const char *name) {
    if (realpath((const char *)getauxval(AT_EXECFN), path) == NULL) path[0] = '\0';
    char *slash = strrchr(path, '/');
    size_t folder = slash ? (size_t)(slash + 1 - path) : 0;
    snprintf(path + folder, PATH_MAX - folder, "%s", name);
}

// Starts the engine. Returns 0, or -1 after reporting the error.
static int start_engine(Chat *chat) {
    char path[PATH_MAX], front_end[24];
    int prompts[2], returns[2]; // read end, write end
    pid_t own_pid = getpid();
    engine_path(path, chat->options->engine_arguments[0]);
    snprintf(front_end, sizeof(front_end), "%d", (int)own_pid);
    if (setenv(FRONT_END_ENV, front_end, 1) < 0) die("setenv");
    if (pipe2(prompts, O_CLOEXEC) < 0 || pipe2(returns, O_CLOEXEC) < 0 ||
        fcntl(prompts[1], F_SETFL, O_NONBLOCK) < 0 || (chat->pid = fork()) < 0)
        return report_error("Cannot start the engine: %s. Close other programs, or raise the limit "
                            "on processes or open files with ulimit -u or -n.",
                            strerror(errno));
    if (chat->pid == 0) {
        // The engine must not outlive main, even if main is killed, or died before prctl(2).
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        if (getppid() != own_pid) _exit(1);
        // exec closes all pipe ends (O_CLOEXEC) but these copies: with a write end of its own stdin
        // the engine would never see the end of file. (RETURN_FD is in use: no pipe end has it.)
        if (dup2(prompts[0], STDIN_FILENO) < 0 || dup2(returns[1], RETURN_FD) < 0) die("dup2");
        sigaction(SIGCHLD, &chat->inherited_sigchld, NULL);
        sigprocmask(SIG_SETMASK, &chat->engine_mask, NULL);
        execv(path, chat->options->engine_arguments);
        report_error("Cannot execute %s (%s). Build it with: make", path, strerror(errno));
        _exit(1);
    }
    close(prompts[0]);
    close(returns[1]);
    chat->prompts_fd = prompts[1];
    chat->returns_fd = returns[0];
    return 0;
}

// ------------------------------------------------------------------------------------------------
// The chat's events, and its end

// Appends text to the output. run_chat() writes it when stdout takes it.
__attribute__((format(printf, 2, 3))) static void queue_text(Chat *chat, const char *format, ...) {
    size_t room = sizeof(chat->output) - chat->output_length;
    va_list arguments;
    va_start(arguments, format);
    size_t length = (size_t)vsnprintf(chat->output + chat->output_length, room, format, arguments);
    va_end(arguments);
    chat->output_length += length < room ? length : room - 1;
}

// Lets the timer expire every `milliseconds`; 0 stops it.
static void set_timer(const Chat *chat, int milliseconds) {
    struct timespec period = {milliseconds / 1000, milliseconds % 1000 * 1000000L};
    struct itimerspec setting = {.it_value = period, .it_interval = period};
    if (timerfd_settime(chat->timer_fd, 0, &setting, NULL) < 0) die("timerfd_settime");
}

// Called before the engine is reaped: its pid cannot be another process's.
static void signal_engine(const Chat *chat, int signal_number) {
    if (kill(chat->pid, signal_number) < 0) die("kill");
}

// Records why the chat ends, and starts its end, which lasts until the engine's exit. A normal end
// has no time limit, as an engine under SCHED_IDLE may wait long for a CPU. After an error or an
// interrupt, an engine that has not exited after the grace period is killed.
static void end_chat(Chat *chat, Reason reason) {
    if (reason <= chat->reason) return;
    set_timer(chat, reason == INPUT_ENDED ? 0 : GRACE_PERIOD);
    if (reason == INTERRUPTED) {
        chat->phase = EXITING;
        signal_engine(chat, chat->interrupt);
        signal_engine(chat, SIGCONT); // a stopped engine would not see it otherwise
    } else if (chat->reason == NO_REASON) {
        chat->phase = FLUSHING;
        queue_text(chat, "\n"); // only once, even if another reason follows
    }
    chat->reason = reason;
}

// Makes the engine exit: closes its pipe, and raises SIGUSR1 as for a prompt, so that it reads the
// end of file. What it still prints, like the CPU times of its threads, follows the newline.
static void dismiss_engine(Chat *chat) {
    chat->phase = EXITING;
    close(chat->prompts_fd);
    signal_engine(chat, SIGUSR1);
}

// Writes the output after poll(2) has reported room for it, in a pipe for PIPE_BUF bytes. As the
// engine prints no reply now, write(2) does not block, even without O_NONBLOCK.
static void write_output(Chat *chat) {
    ssize_t count = write(STDOUT_FILENO, chat->output, chat->output_length);
    if (count >= 0) {
        chat->output_length -= (size_t)count;
        memmove(chat->output, chat->output + count, chat->output_length);
    } else if (errno != EAGAIN && errno != EINTR) {
        // Not reported if the reader has closed the pipe, or after another error
        if (errno != EPIPE && errno != EBADF && chat->reason <= INPUT_ENDED)
            report_error("Cannot write the output: %s.", strerror(errno));
        end_chat(chat, ERROR);
        chat->output_length = 0;
    }
}

static void queue_prompt_mark(Chat *chat) {
    chat->phase = PROMPTING;
    queue_text(chat, PROMPT_MARK);
}

// Sends one prompt; line has room for its newline. The engine has emptied the pipe before, so the
// pipe takes the line in one piece and without blocking.
static void send_prompt(Chat *chat, char *line, size_t length) {
    line[length++] = '\n';
    chat->phase = GENERATING;
    chat->log.logged = false;
    measure_cpu_use(&chat->log); // the first line begins here
    set_timer(chat, SAMPLE_INTERVAL);
    if (write(chat->prompts_fd, line, length) < 0) {
        // EPIPE: the engine has died, which SIGCHLD reports.
        if (errno != EPIPE) report_error("Cannot send the prompt: %s.", strerror(errno));
        end_chat(chat, ERROR);
    } else {
        signal_engine(chat, SIGUSR1);
    }
}

// Takes a line of input, if stdout has taken the prompt mark and there is a line.
static void take_prompt(Chat *chat) {
    char line[MAX_PROMPT_LEN + 1];
    if (chat->phase != PROMPTING || chat->output_length > 0) return;
    int length = next_line(&chat->input, line);
    if (length == NO_LINE_YET) return;
    if (length == LINE_TOO_LONG) queue_text(chat, TOO_LONG_MESSAGE, MAX_PROMPT_LEN);
    if (length > 0) send_prompt(chat, line, (size_t)length);
    else if (length == END_OF_INPUT) end_chat(chat, chat->input.failed ? ERROR : INPUT_ENDED);
    else queue_prompt_mark(chat);
}

// The engine is ready, with all its threads, so they get their policy. If the kernel refuses, the
// chat ends, unless neither -s nor -n was given. main() has queued the prompt mark already.
static void finish_loading(Chat *chat) {
    const Options *options = chat->options;
    chat->phase = PROMPTING;
    int error = set_policies(chat->pid, options->values['j'], &options->attributes);
    if (error == 0 || (!options->values['s'] && !options->values['n'])) return;
    report_policy_error(&options->attributes, error);
    end_chat(chat, ERROR);
}

// A reply shorter than the interval gets one log line.
static void finish_reply(Chat *chat) {
    set_timer(chat, 0);
    if (!chat->log.logged) log_sample(&chat->log, false);
    queue_prompt_mark(chat);
}

// The return pipe has a byte (the engine is ready, or a reply is finished), or has ended.
static void handle_return_pipe(Chat *chat) {
    char byte;
    if (read(chat->returns_fd, &byte, 1) != 1) {
        close(chat->returns_fd); // its end would wake poll(2) again and again
        chat->returns_fd = -1;
    } else if (chat->phase == LOADING) {
        finish_loading(chat);
    } else if (chat->phase == GENERATING) {
        finish_reply(chat);
    }
}

// The timer has expired: writes a log line, or kills the engine. Expirations that were missed in a
// pause (Ctrl-Z, the machine sleeps) count as one.
static void handle_timer(Chat *chat) {
    uint64_t expirations;
    if (read(chat->timer_fd, &expirations, sizeof(expirations)) < 0) die("read");
    if (chat->phase == GENERATING) log_sample(&chat->log, true);
    else signal_engine(chat, SIGKILL);
}

// Handles all pending signals. Returns whether the engine has died (SIGCHLD). If it died of Ctrl-C,
// main's own SIGINT is pending by then. SIGUSR2 needs no action: its byte is in the return pipe.
static bool handle_signals(Chat *chat) {
    struct signalfd_siginfo info;
    bool died = false;
    while (read(chat->signals_fd, &info, sizeof(info)) == sizeof(info)) {
        bool at_prompt = chat->phase == LOADING || chat->phase == PROMPTING;
        switch (info.ssi_signo) {
        case SIGINT:
        case SIGTERM:
            if (chat->interrupt == 0) chat->interrupt = (int)info.ssi_signo;
            end_chat(chat, INTERRUPTED);
            break;
        case SIGCHLD: died = true; break;
        case SIGCONT: // the shell has printed something since the prompt mark
            if (at_prompt && chat->output_length == 0) queue_text(chat, PROMPT_MARK);
            break;
        }
    }
    if (errno != EAGAIN) die("read");
    return died;
}

// Runs the chat until the engine has exited. Returns its status by waitpid(2). poll(2) watches
// stdin, not input.fd: it would not report the end of a named pipe there, if the writers had gone
// before open_input() opened it again.
static int run_chat(Chat *chat) {
    enum { TIMER, RETURNS, SIGNALS, INPUT, OUTPUT, EVENTS };
    for (;;) {
        bool has_output = chat->output_length > 0;
        struct pollfd events[EVENTS] = {
            [TIMER] = {chat->timer_fd, POLLIN, 0},
            [RETURNS] = {chat->returns_fd, POLLIN, 0},
            [SIGNALS] = {chat->signals_fd, POLLIN, 0},
            [INPUT] = {chat->phase == PROMPTING && !has_output ? STDIN_FILENO : -1, POLLIN, 0},
            [OUTPUT] = {has_output ? STDOUT_FILENO : -1, POLLOUT, 0},
        };
        int status;
        if (poll(events, EVENTS, -1) < 0 && errno != EINTR) die("poll");
        if (events[TIMER].revents) handle_timer(chat); // first: set again, it would block read(2)
        if (events[RETURNS].revents) handle_return_pipe(chat);
        if (events[INPUT].revents) read_more(&chat->input); // take_prompt() has left room
        if (events[OUTPUT].revents) write_output(chat);
        if (events[SIGNALS].revents && handle_signals(chat)) {
            pid_t pid = waitpid(chat->pid, &status, WNOHANG);
            if (pid < 0) die("waitpid");
            if (pid > 0) return status;
        }
        take_prompt(chat);
        if (chat->phase == FLUSHING && chat->output_length == 0) dismiss_engine(chat);
    }
}

// Prints how the engine ended. Returns main's exit status.
static int report_end(Chat *chat, int wait_status) {
    int signal_number = chat->interrupt;
    if (signal_number == 0 && WIFSIGNALED(wait_status)) signal_number = WTERMSIG(wait_status);
    int code = signal_number ? 128 + signal_number : WEXITSTATUS(wait_status);
    if (code != 0 || chat->reason == NO_REASON) end_chat(chat, ENGINE_DIED);
    // After an interrupt the engine may have printed half a line.
    queue_text(chat, "%sChild exited with %d", chat->interrupt ? "\n" : "", code);
    if (signal_number) queue_text(chat, " (%s)", strsignal(signal_number));
    queue_text(chat, "\n");
    while (chat->output_length > 0 && is_writable(STDOUT_FILENO, REPORT_LIMIT)) write_output(chat);
    if (chat->reason == INPUT_ENDED) return code;
    // Lines that were typed or pasted ahead must not reach the shell, which would run them.
    if (tcgetpgrp(STDIN_FILENO) == getpgrp()) tcflush(STDIN_FILENO, TCIFLUSH);
    return chat->interrupt ? code : 1;
}

// ------------------------------------------------------------------------------------------------
// The program

// Opens a terminal or pipe on stdin a second time, with O_NONBLOCK: another process may read first
// what poll(2) has reported. fcntl(2) would set O_NONBLOCK for the shell as well, which shares the
// open file description. Returns stdin itself if that fails, and for a file.
static int open_input(void) {
    bool is_file = lseek(STDIN_FILENO, 0, SEEK_CUR) >= 0;
    int fd = is_file ? -1 : open("/proc/self/fd/0", O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    return fd < 0 ? STDIN_FILENO : fd;
}

// Blocks the signals that the chat handles: they stay pending until signals_fd is read.
static void open_signals(Chat *chat) {
    // SIGUSR1 is the engine's. For SIGPIPE and SIGXFSZ the error of write(2) suffices.
    const int numbers[] = {SIGUSR1, SIGUSR2, SIGTERM, SIGCHLD, SIGCONT, SIGPIPE, SIGXFSZ};
    struct sigaction sigint, sigchld = {.sa_handler = SIG_DFL, .sa_flags = SA_NOCLDSTOP};
    sigset_t blocked;
    sigemptyset(&blocked);
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++)
        sigaddset(&blocked, numbers[i]);
    // In a script, the shell makes `command &` ignore SIGINT, so that Ctrl-C does not end it.
    sigaction(SIGINT, NULL, &sigint);
    if (sigint.sa_handler != SIG_IGN) sigaddset(&blocked, SIGINT);
    // If SIGCHLD stayed ignored, the engine's exit status would be lost.
    sigaction(SIGCHLD, &sigchld, &chat->inherited_sigchld);
    if (sigprocmask(SIG_BLOCK, &blocked, &chat->engine_mask) < 0) die("sigprocmask");
    // In the engine an early SIGUSR1 must stay pending, and a stray SIGUSR2 must not kill it.
    sigaddset(&chat->engine_mask, SIGUSR1);
    sigaddset(&chat->engine_mask, SIGUSR2);
    if ((chat->signals_fd = signalfd(-1, &blocked, SFD_NONBLOCK | SFD_CLOEXEC)) < 0)
        die("signalfd");
}

int main(int argc, char **argv) {
    reserve_standard_fds();
    char *engine_arguments[2 * argc + 4];
    Options options;
    parse_options(&options, engine_arguments, argc, argv);
    if (flush_output() < 0) return 1;
    Chat chat = {.options = &options, .phase = LOADING};
    open_signals(&chat);
    if (start_engine(&chat) < 0) return 1;
    if ((chat.timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC)) < 0) die("timerfd_create");
    if ((errno = clock_getcpuclockid(chat.pid, &chat.log.cpu_clock)) != 0)
        die("clock_getcpuclockid");
    chat.log.pid = chat.pid;
    chat.input.fd = open_input();
    struct stat out, err;
    chat.log.shares_output = fstat(STDOUT_FILENO, &out) == 0 && fstat(STDERR_FILENO, &err) == 0 &&
                             out.st_dev == err.st_dev && out.st_ino == err.st_ino;
    if (chat.log.shares_output && isatty(STDOUT_FILENO))
        queue_text(&chat, "The log appears here, among the replies. To keep it apart: 2>log\n");
    queue_text(&chat, PROMPT_MARK);
    return report_end(&chat, run_chat(&chat));
}
