// main.c - the chat's front end: it starts an engine as a child process, hands it the user's
// prompts, sets its scheduling policy, and logs what it does to the CPU while it works.
//
// It knows nothing of models. common.h has the picture of the two processes and their protocol.
// Whatever can happen (a line is typed, the reply is finished, the child dies, somebody interrupts,
// a line of the log is due) is waited for in one place, the ppoll(2) of wait_for_event().
#define _GNU_SOURCE
#include "common.h"
#include <ctype.h>
#include <dirent.h>
#include <limits.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define SAMPLE_INTERVAL 0.3 // seconds between two lines of the log
#define GRACE_PERIOD 2.0    // seconds that an interrupted engine is given to end

// ------------------------------------------------------------------------------------------------
// Options

typedef struct {
    Settings settings;
    SchedulingAttributes attributes;
    bool policy_given, nice_given, priority_given, times_given;
    const char *threads;     // of -j, or NULL
    char **engine_arguments; // for execv(3): name, options, threads, seed, NULL
} Options;

_Noreturn static void usage(const char *program) {
    report_error(
        "Usage: %s [-s policy] [-n nice] [-r priority] [-D runtime:deadline:period] [-j threads]\n"
        "       " SETTINGS_USAGE " [seed]\n"
        "  -s policy           SCHED_OTHER (the default), SCHED_BATCH or SCHED_IDLE, with -n;\n"
        "                      SCHED_FIFO or SCHED_RR, with -r; SCHED_DEADLINE, with -D\n"
        "  -n nice             -20 (most CPU time) to 19 (least); default: that of this program\n"
        "  -r priority         1 (the default) to 99 (most urgent)\n"
        "  -D runtime:deadline:period   in nanoseconds, or with us or ms: 10ms:20ms:20ms\n"
        "  -j threads          1 to %d: run ./parallel instead of ./inference\n" SETTINGS_HELP
        "\nThe log goes to stderr: %s 42 2>log",
        program, MAX_THREADS, program);
    exit(2);
}

// A policy's number for its name in any case, with or without SCHED_; or -1.
static int find_policy(const char *name) {
    if (strncasecmp(name, "SCHED_", 6) == 0) name += 6;
    if (strcasecmp(name, "NORMAL") == 0) return SCHED_OTHER;
    for (int policy = 0; policy < POLICY_COUNT; policy++)
        if (policy_names[policy] && strcasecmp(name, policy_names[policy] + 6) == 0) return policy;
    return -1;
}

// Reads one time of -D, which ends at the character `end`, and moves *text behind it.
static bool parse_time(const char **text, char end, uint64_t *nanoseconds) {
    char *rest;
    if (!isdigit((unsigned char)**text)) return false;
    errno = 0;
    unsigned long long value = strtoull(*text, &rest, 10), unit = 1;
    if (strncmp(rest, "us", 2) == 0) unit = 1000, rest += 2;
    else if (strncmp(rest, "ms", 2) == 0) unit = 1000000, rest += 2;
    if (errno != 0 || *rest != end || value > UINT64_MAX / unit) return false;
    *nanoseconds = value * unit;
    *text = rest + 1;
    return true;
}

#define POLICY_OPTIONS "s:n:r:D:j:" // main's own, for getopt(3)

// Takes one of them. False, after a complaint, if its value will not do.
static bool parse_policy_option(Options *options, int option, const char *value) {
    SchedulingAttributes *attributes = &options->attributes;
    long number = 0;
    bool valid = true;
    switch (option) {
    case 's':
        options->policy_given = true;
        number = find_policy(value);
        if ((valid = number >= 0)) attributes->policy = (uint32_t)number;
        break;
    case 'n':
        options->nice_given = true;
        if ((valid = parse_integer(value, -20, 19, &number))) attributes->nice = (int32_t)number;
        break;
    case 'r':
        options->priority_given = true;
        if ((valid = parse_integer(value, 1, 99, &number))) attributes->priority = (uint32_t)number;
        break;
    case 'D': {
        options->times_given = true;
        const char *text = value;
        valid = parse_time(&text, ':', &attributes->runtime) &&
                parse_time(&text, ':', &attributes->deadline) &&
                parse_time(&text, '\0', &attributes->period);
        break;
    }
    case 'j':
        options->threads = value;
        valid = parse_integer(value, 1, MAX_THREADS, &number);
        break;
    }
    if (!valid) report_error("-%c %s: this value is not in the option's range.", option, value);
    return valid;
}

// Every policy has parameters of its own. One that belongs to another policy is a mistake to tell,
// and one that was not given has a default.
static bool check_policy(Options *options) {
    SchedulingAttributes *attributes = &options->attributes;
    const char *name = policy_names[attributes->policy];
    bool real_time = attributes->policy == SCHED_FIFO || attributes->policy == SCHED_RR;
    bool deadline = attributes->policy == SCHED_DEADLINE;
    const char *mistake = options->nice_given && (real_time || deadline)
                              ? "takes no nice value (-n)"
                          : options->priority_given && !real_time ? "takes no priority (-r)"
                          : options->times_given && !deadline     ? "takes no times (-D)"
                          : deadline && !options->times_given ? "needs -D runtime:deadline:period"
                                                              : NULL;
    if (mistake) {
        report_error("%s %s.", name, mistake);
        return false;
    }
    // sched_setattr(2) sets the nice value along with the policy: "unchanged" is main's own.
    if (!options->nice_given) attributes->nice = getpriority(PRIO_PROCESS, 0);
    if (real_time && !options->priority_given) attributes->priority = 1;
    return true;
}

// All mistakes are told here, before anything is started. The strings that the engine gets live as
// long as main does.
static Options parse_options(int argc, char **argv) {
    Options options = {.settings = DEFAULT_SETTINGS,
                       .attributes.size = sizeof(SchedulingAttributes)};
    bool valid = true;
    char **argument = options.engine_arguments = calloc((size_t)argc + 4, sizeof(char *));
    if (argument == NULL) exit(1);
    argument++; // the engine's own name is filled in last, when it is known
    for (int option; (option = getopt(argc, argv, ":" POLICY_OPTIONS SETTINGS_OPTIONS)) != -1;) {
        if (strchr(POLICY_OPTIONS, option) && option != ':')
            valid = parse_policy_option(&options, option, optarg) && valid;
        else
            valid = parse_setting(&options.settings, option, optarg) &&
                    asprintf(argument++, "-%c%s", option, optarg) > 0 && valid;
    }
    if (optind < argc && !parse_seed(argv[optind], &options.settings.seed)) {
        report_error("%s is not a seed.", argv[optind]);
        valid = false;
    }
    if (argc - optind > 1) {
        report_error("Only one seed is taken, and nothing behind it.");
        valid = false;
    }
    if (!valid || !check_policy(&options)) usage(argv[0]);

    choose_seed(&options.settings);
    options.engine_arguments[0] = options.threads ? "parallel" : "inference";
    if (options.threads) *argument++ = (char *)options.threads;
    if (asprintf(argument, "%llu", options.settings.seed) < 0) exit(1);
    return options;
}

// ------------------------------------------------------------------------------------------------
// Scheduling policy, with the raw system call

static int set_attributes(pid_t thread, const SchedulingAttributes *attributes) {
    return (int)syscall(SYS_sched_setattr, thread, attributes, 0u);
}

// Sets the policy of one thread. SCHED_IDLE's call ignores the nice value, so another one is set
// before, as SCHED_OTHER's. Returns 0 or -1 with errno.
static int set_policy(pid_t thread, const SchedulingAttributes *attributes) {
    if (attributes->policy == SCHED_IDLE &&
        getpriority(PRIO_PROCESS, (id_t)thread) != attributes->nice) {
        SchedulingAttributes nice_only = *attributes;
        nice_only.policy = SCHED_OTHER;
        if (set_attributes(thread, &nice_only) < 0) return -1;
    }
    return set_attributes(thread, attributes);
}

// Sets the policy of all threads that a process has now. A thread that has just ended is no error.
static int set_policy_of_threads(pid_t pid, const SchedulingAttributes *attributes) {
    char path[64];
    snprintf(path, sizeof(path), "/proc/%d/task", (int)pid);
    DIR *tasks = opendir(path);
    if (tasks == NULL) return -1;
    int result = 0;
    for (struct dirent *entry; result == 0 && (entry = readdir(tasks)) != NULL;) {
        if (!isdigit((unsigned char)entry->d_name[0])) continue;
        if (set_policy((pid_t)atoi(entry->d_name), attributes) < 0 && errno != ESRCH) result = -1;
    }
    int cause = errno;
    closedir(tasks);
    errno = cause;
    return result;
}

// Would a line written there now be taken at once, or fail at once?
static bool can_write(int fd) {
    return poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, 0) == 1;
}

// The causes are those of sched_setattr(2) and sched(7).
static void report_policy_error(const SchedulingAttributes *attributes, int cause) {
    if (!can_write(STDERR_FILENO)) return; // nobody reads: rather lose the line than hang
    bool deadline = attributes->policy == SCHED_DEADLINE;
    const char *advice = "see sched_setattr(2)";
    if (cause == EPERM && deadline)
        advice = "it takes root or CAP_SYS_NICE, and an affinity of all CPUs of the machine";
    else if (cause == EPERM)
        advice =
            "it takes root or CAP_SYS_NICE (or a resource limit that allows it, ulimit -e and -r)";
    else if (cause == EBUSY)
        advice =
            "the CPUs have not that much time left for the deadlines of all threads; ask for less "
            "runtime per period";
    else if (cause == EINVAL && deadline)
        advice =
            "it takes 1024 ns <= runtime <= deadline <= period, and a period that the kernel's "
            "sched_deadline_period_min_us and _max_us allow";
    bool real_time = attributes->policy == SCHED_FIFO || attributes->policy == SCHED_RR;
    char nice[40] = "";
    if (!deadline && !real_time)
        snprintf(nice, sizeof(nice), " with the nice value %d", (int)attributes->nice);
    report_error("The kernel refuses %s%s (%s): %s.", policy_names[attributes->policy], nice,
                 strerror(cause), advice);
}

// ------------------------------------------------------------------------------------------------
// The log: what /proc/<pid>/stat says of the engine, proc(5)

typedef struct {
    clockid_t cpu_clock; // the engine's CPU time, of all its threads: clock_getcpuclockid(3)
    double cpu_time;     // seconds on that clock ...
    double time;         // ... and on everybody's, when the last sample was taken
    bool logged;         // a line has been written since the prompt
} CpuMeter;

static void start_sampling(CpuMeter *meter) {
    meter->cpu_time = seconds(meter->cpu_clock);
    meter->time = seconds(CLOCK_MONOTONIC);
    meter->logged = false;
}

// Writes one line of the log. utime and stime are in clock ticks, vsize is in bytes. The name,
// field 2, may hold spaces and parentheses, so what follows it is found behind the last ')'.
static void log_sample(CpuMeter *meter, pid_t pid) {
    if (!can_write(STDERR_FILENO)) return; // nobody reads the log: rather lose a line than hang
    char path[64], stat[4096];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t length = read(fd, stat, sizeof(stat) - 1);
    close(fd);
    stat[length > 0 ? length : 0] = '\0';
    char *name = strchr(stat, '('), *name_end = strrchr(stat, ')');
    if (name == NULL || name_end == NULL) return;

    enum { STATE = 3, UTIME = 14, STIME, NICE = 19, VSIZE = 23, CPU = 39, POLICY = 41, END };
    char *field[END] = {NULL}, *rest = name_end + 1, *space;
    for (int i = STATE; i < END; i++)
        if ((field[i] = strtok_r(rest, " \n", &space)) == NULL) return;
        else rest = NULL;

    double cpu_time = seconds(meter->cpu_clock), time = seconds(CLOCK_MONOTONIC);
    double percent = 100 * (cpu_time - meter->cpu_time) / (time - meter->time);
    unsigned policy = (unsigned)atoi(field[POLICY]);
    const char *policy_name = policy < POLICY_COUNT ? policy_names[policy] : NULL;
    fprintf(stderr,
            "[pid] %d [tcomm] %.*s [state] %s [policy] %s [nice] %s [vsize] %s [task_cpu] %s "
            "[utime] %s [stime] %s [cpu%%] %.2f%%\n",
            (int)pid, (int)(name_end + 1 - name), name, field[STATE],
            policy_name ? policy_name : field[POLICY], field[NICE], field[VSIZE], field[CPU],
            field[UTIME], field[STIME], percent);
    meter->cpu_time = cpu_time;
    meter->time = time;
    meter->logged = true;
}

// ------------------------------------------------------------------------------------------------
// The child

// What main changes for itself and gives back to the child between fork and exec.
typedef struct {
    sigset_t mask;
    struct sigaction child_action, pipe_action;
} SignalState;

typedef struct {
    pid_t pid;
    int prompts; // write end of the pipe that is the engine's stdin
    int returns; // read end of the return pipe, which never waits
} Child;

// The engine's binary stands beside main's own, wherever the user called it from.
static void engine_path(char path[PATH_MAX], const char *name) {
    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX - 1);
    path[length > 0 ? length : 0] = '\0';
    char *slash = strrchr(path, '/');
    size_t folder = slash ? (size_t)(slash + 1 - path) : 0;
    snprintf(path + folder, PATH_MAX - folder, "%s", name);
}

// The child's side of fork(2). Between fork and exec it is still main: it takes the pipes' ends,
// gives up main's signal settings, and waits at the gate until main has set its policy.
_Noreturn static void exec_engine(const char *path, const Options *options, pid_t front_end,
                                  int gate, int prompts, int returns, const SignalState *before) {
    // The engine must not outlive main, not even if main is killed, or was before this call.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != front_end) _exit(1);

    char byte;
    if (read(gate, &byte, 1) != 1) _exit(1); // main gave up
    dup2(prompts, STDIN_FILENO);
    if (returns == RETURN_FD) fcntl(returns, F_SETFD, 0); // dup2(2) would leave close-on-exec set
    else dup2(returns, RETURN_FD);

    char pid[24];
    snprintf(pid, sizeof(pid), "%d", (int)front_end);
    setenv(FRONT_END_ENV, pid, 1);
    sigaction(SIGCHLD, &before->child_action, NULL);
    sigaction(SIGPIPE, &before->pipe_action, NULL);
    sigset_t mask = before->mask;
    sigaddset(&mask, SIGUSR1); // a bell that comes before the engine listens has to wait
    sigprocmask(SIG_SETMASK, &mask, NULL);

    execv(path, options->engine_arguments);
    report_error("Cannot execute %s (%s). Build it with: make", path, strerror(errno));
    _exit(1);
}

// Starts the engine with the policy of the options. Returns 0, or -1 with the reason told.
static int start_engine(Child *child, const Options *options, const SignalState *before) {
    char path[PATH_MAX];
    engine_path(path, options->engine_arguments[0]);
    if (access(path, X_OK) < 0) {
        report_error("Cannot execute %s (%s). Build it with: make", path, strerror(errno));
        return -1;
    }
    int prompts[2], returns[2], gate[2];
    if (pipe2(prompts, O_CLOEXEC) < 0 || pipe2(returns, O_CLOEXEC) < 0 ||
        pipe2(gate, O_CLOEXEC) < 0) {
        report_error("Cannot make a pipe: %s.", strerror(errno));
        return -1;
    }
    fcntl(returns[0], F_SETFL, O_NONBLOCK);
    pid_t front_end = getpid();
    child->pid = fork();
    if (child->pid < 0) {
        report_error("Cannot start the engine's process: %s.", strerror(errno));
        return -1;
    }
    if (child->pid == 0) {
        close(gate[1]); // or else the child would wait for itself when main dies
        exec_engine(path, options, front_end, gate[0], prompts[0], returns[1], before);
    }
    close(prompts[0]);
    close(returns[1]);
    close(gate[0]);
    child->prompts = prompts[1];
    child->returns = returns[0];

    // A policy that is set now is inherited by all threads that the engine creates. Not so
    // SCHED_DEADLINE, under which it could create none: that has to wait for the ready byte.
    bool wanted = options->policy_given || options->nice_given;
    if (options->attributes.policy != SCHED_DEADLINE &&
        set_policy(child->pid, &options->attributes) < 0 && wanted) {
        report_policy_error(&options->attributes, errno);
        close(gate[1]); // the child sees the end of the pipe and exits
        waitpid(child->pid, NULL, 0);
        return -1;
    }
    if (write(gate[1], "", 1) < 0) report_error("Cannot wake the engine: %s.", strerror(errno));
    close(gate[1]);
    return 0;
}

// ------------------------------------------------------------------------------------------------
// The chat

typedef enum {
    LOADING,   // no input is taken before the engine is ready: if it can't start, no prompt is lost
    PROMPTING, // waiting for the user
    GENERATING, // waiting for the engine
    EXITING     // waiting for the engine's end
} Phase;

typedef struct {
    const Options *options;
    Child child;
    int signals; // signalfd(2): signals are read like any other input, never handled
    Phase phase;
    LineReader input;
    CpuMeter meter;
    double wake_time;     // when the wait must end: next line of the log, or the end of patience
    int interrupt;        // the SIGINT or SIGTERM that ends the chat, or 0
    bool prompt_mark_due; // the prompt mark is not printed yet
    bool line_ended;      // the prompt mark is not the last thing on the screen
    bool output_closed;   // nobody reads our stdout any more
    bool failed;          // the chat must end with an error, which has been told
} Chat;

// Closing the pipe says goodbye to the engine; it is told by the same bell as a prompt. Its last
// words, if it has any, begin on a new line behind the prompt mark.
static void dismiss_engine(Chat *chat) {
    chat->phase = EXITING;
    chat->prompt_mark_due = false;
    chat->line_ended = true;
    putchar('\n');
    fflush(stdout);
    close(chat->child.prompts);
    kill(chat->child.pid, SIGUSR1);
}

// Asks for a prompt, as soon as stdout takes the mark: main must not wait in write(2), where no
// signal would reach it.
static void request_prompt(Chat *chat, Phase phase) {
    chat->phase = phase;
    chat->prompt_mark_due = true;
}

static void print_prompt_mark(Chat *chat) {
    chat->prompt_mark_due = false;
    fputs(PROMPT_MARK, stdout);
    if (flush_output() == 0) return;
    chat->output_closed = true;
    dismiss_engine(chat);
}

// Passes an interrupt on. SIGCONT wakes a stopped engine, which would not notice it.
static void interrupt_engine(Chat *chat, int signal) {
    chat->phase = EXITING;
    chat->prompt_mark_due = false;
    chat->interrupt = signal;
    chat->wake_time = seconds(CLOCK_MONOTONIC) + GRACE_PERIOD;
    kill(chat->child.pid, signal);
    kill(chat->child.pid, SIGCONT);
}

// Sends one prompt. The engine has emptied the pipe before, so that it takes the line in one piece.
// If the engine has died meanwhile, the write fails and SIGCHLD tells the rest.
static void send_prompt(Chat *chat, char *line, size_t length) {
    line[length] = '\n';
    chat->phase = GENERATING;
    start_sampling(&chat->meter);
    chat->wake_time = chat->meter.time + SAMPLE_INTERVAL;
    if (write(chat->child.prompts, line, length + 1) > 0) kill(chat->child.pid, SIGUSR1);
}

// Takes lines of input until one is a prompt, or there are no more for now, or for good.
static void read_prompts(Chat *chat) {
    char line[MAX_PROMPT_LEN + 1];
    while (chat->phase == PROMPTING && !chat->prompt_mark_due) {
        int length = next_line(&chat->input, line);
        if (length > 0) send_prompt(chat, line, (size_t)length);
        else if (length == END_OF_INPUT) dismiss_engine(chat);
        else if (length == NO_LINE_YET) return;
        else {
            if (length == LINE_TOO_LONG) reject_long_prompt();
            request_prompt(chat, PROMPTING);
        }
    }
}

// SIGUSR2 may come from anybody; what counts is what the engine has put into the return pipe.
static void read_engine_bytes(Chat *chat) {
    char byte;
    while (read(chat->child.returns, &byte, 1) == 1) {
        if (chat->phase == LOADING) {
            const SchedulingAttributes *attributes = &chat->options->attributes;
            if (attributes->policy == SCHED_DEADLINE &&
                set_policy_of_threads(chat->child.pid, attributes) < 0) {
                report_policy_error(attributes, errno);
                chat->failed = true;
                dismiss_engine(chat);
                return;
            }
            chat->phase = PROMPTING; // the prompt mark came while the model loaded
        } else if (chat->phase == GENERATING) {
            if (!chat->meter.logged) log_sample(&chat->meter, chat->child.pid);
            request_prompt(chat, PROMPTING);
        }
    }
}

// Takes all signals that are pending, so that an interrupt and the death that it causes are seen
// together. Returns true if one of them said that the child has died.
static bool read_signals(Chat *chat) {
    struct signalfd_siginfo signal;
    bool child_died = false;
    while (read(chat->signals, &signal, sizeof(signal)) == sizeof(signal)) {
        int number = (int)signal.ssi_signo;
        if (number == SIGCHLD) child_died = true;
        else if (number == SIGUSR2) read_engine_bytes(chat);
        else if (number != SIGUSR1 && chat->interrupt == 0) interrupt_engine(chat, number);
    }
    return child_died;
}

// A deadline has passed.
static void on_timeout(Chat *chat) {
    if (chat->phase == GENERATING) {
        log_sample(&chat->meter, chat->child.pid);
        chat->wake_time += SAMPLE_INTERVAL;
        // After a pause (the machine slept, the user typed Ctrl-Z) no lines are made up for.
        if (chat->wake_time < seconds(CLOCK_MONOTONIC))
            chat->wake_time = seconds(CLOCK_MONOTONIC) + SAMPLE_INTERVAL;
    } else {
        kill(chat->child.pid, SIGKILL);
        chat->wake_time += GRACE_PERIOD;
    }
}

// Waits for the next thing to happen. Returns false when the child is gone, with its status.
static bool wait_for_event(Chat *chat, int *status) {
    struct pollfd events[] = {
        {.fd = chat->signals, .events = POLLIN},
        {.fd = chat->phase == PROMPTING && !chat->prompt_mark_due ? chat->input.fd : -1,
         .events = POLLIN},
        {.fd = chat->prompt_mark_due ? STDOUT_FILENO : -1, .events = POLLOUT},
    };
    bool timed = chat->phase == GENERATING || chat->interrupt != 0;
    double left = chat->wake_time - seconds(CLOCK_MONOTONIC);
    if (left < 0) left = 0;
    struct timespec timeout = {(time_t)left, (long)(1e9 * (left - (double)(time_t)left))};
    int ready = ppoll(events, 3, timed ? &timeout : NULL, NULL);
    if (ready == 0) on_timeout(chat);
    if (events[1].revents) read_more(&chat->input);
    if (events[2].revents) print_prompt_mark(chat);
    return !(read_signals(chat) && waitpid(chat->child.pid, status, WNOHANG) == chat->child.pid);
}

// sigabbrev_np(3) would know them all, but is younger than many systems.
static const char *signal_name(int signal) {
    static const struct {
        int number;
        const char *name;
    } names[] = {
        {SIGHUP, "SIGHUP"},   {SIGINT, "SIGINT"},   {SIGQUIT, "SIGQUIT"}, {SIGILL, "SIGILL"},
        {SIGTRAP, "SIGTRAP"}, {SIGABRT, "SIGABRT"}, {SIGBUS, "SIGBUS"},   {SIGFPE, "SIGFPE"},
        {SIGKILL, "SIGKILL"}, {SIGUSR1, "SIGUSR1"}, {SIGSEGV, "SIGSEGV"}, {SIGUSR2, "SIGUSR2"},
        {SIGPIPE, "SIGPIPE"}, {SIGALRM, "SIGALRM"}, {SIGTERM, "SIGTERM"}, {SIGXCPU, "SIGXCPU"},
        {SIGSYS, "SIGSYS"},
    };
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
        if (names[i].number == signal) return names[i].name;
    return "another signal";
}

// Tells how the engine ended, and returns main's exit status: an interrupt's, whoever died first of
// it; or 0 if the engine left as it was logged; or 1.
static int report_exit(const Chat *chat, int status) {
    int signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    if (chat->interrupt) signal = chat->interrupt;
    int code = signal ? 128 + signal : WEXITSTATUS(status);
    struct pollfd output = {.fd = STDOUT_FILENO, .events = POLLOUT};
    bool writable = poll(&output, 1, 0) == 1 && !(output.revents & (POLLERR | POLLNVAL));
    if (!chat->output_closed && writable) { // there is somebody to tell
        printf("%sChild exited with %d", chat->line_ended ? "" : "\n", code);
        if (signal) printf(" (%s)", signal_name(signal));
        putchar('\n');
        fflush(stdout);
    }
    if (chat->interrupt) return code;
    return chat->phase == EXITING && code == 0 && !chat->failed && !chat->output_closed ? 0 : 1;
}

// Starts the engine, holds the conversation, and returns main's exit status when the engine is
// gone.
static int run_chat(const Options *options, int signals, const SignalState *before) {
    Chat chat = {.options = options, .signals = signals, .input.fd = STDIN_FILENO};
    if (start_engine(&chat.child, options, before) < 0) return 1;
    clock_getcpuclockid(chat.child.pid, &chat.meter.cpu_clock);
    request_prompt(&chat, LOADING);
    int status;
    while (wait_for_event(&chat, &status)) read_prompts(&chat);
    return report_exit(&chat, status);
}

int main(int argc, char **argv) {
    reserve_standard_fds();
    static Options options; // as long as the program: so are the strings that it points to
    options = parse_options(argc, argv);

    // Blocked signals stay pending until they are read from the signalfd: none is lost and none
    // interrupts anything. SIGUSR1 is not for us, but the child has to find it blocked from its
    // first moment. A SIGCHLD that our parent had ignored would take the child's status away.
    SignalState before;
    sigset_t taken;
    sigemptyset(&taken);
    const int numbers[] = {SIGUSR1, SIGUSR2, SIGINT, SIGTERM, SIGCHLD};
    for (size_t i = 0; i < sizeof(numbers) / sizeof(numbers[0]); i++) sigaddset(&taken, numbers[i]);
    sigprocmask(SIG_BLOCK, &taken, &before.mask);
    sigaction(SIGCHLD, &(struct sigaction){.sa_handler = SIG_DFL}, &before.child_action);
    sigaction(SIGPIPE, &(struct sigaction){.sa_handler = SIG_IGN}, &before.pipe_action);
    int signals = signalfd(-1, &taken, SFD_NONBLOCK | SFD_CLOEXEC);
    if (signals < 0) {
        report_error("Cannot make a signalfd: %s.", strerror(errno));
        return 1;
    }
    return run_chat(&options, signals, &before);
}
