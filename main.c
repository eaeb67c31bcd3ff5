// main.c - the chat's front end. It starts an engine as a child process, passes the user's prompts
// to it, sets its scheduling policy, and logs its CPU use while it works.
//
// It knows nothing of models. common.h has the picture of the two processes and their protocol.
// All events (a line is typed, the reply is finished, the child dies, an interrupt, a log line is
// due) are awaited in one place, the ppoll(2) of wait_for_event(), and handled in another,
// handle_events(). Nothing else in the chat blocks, so that no signal has to wait; only an error
// message may, for REPORT_LIMIT.
#define _GNU_SOURCE
#include "common.h"
#include <dirent.h>
#include <math.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#define SAMPLE_INTERVAL 0.3 // seconds between two log lines
#define GRACE_PERIOD 2.0    // seconds that an engine has to exit before it is killed
#define NEVER INFINITY      // a time that does not come

// ------------------------------------------------------------------------------------------------
// Options

#define SETTINGS_COUNT ((sizeof(SETTINGS_OPTIONS) - 1) / 2) // each is a letter and a colon

typedef struct {
    Settings settings;
    SchedulingAttributes attributes;
    bool policy_given, nice_given, times_given;
    char *threads;                         // of -j, or NULL
    char *setting_values[SETTINGS_COUNT];  // as they were typed; NULL: not given
    char setting_names[SETTINGS_COUNT][3]; // "-d" ...
    char seed[24];
    // For execv(3): the program's name, settings, threads, seed, NULL
    char *engine_arguments[2 * SETTINGS_COUNT + 4];
} Options;

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

// Returns the number of a policy by its name, in any case and with or without SCHED_; or -1.
static int find_policy(const char *name) {
    if (strncasecmp(name, "SCHED_", 6) == 0) name += 6;
    if (strcasecmp(name, "NORMAL") == 0) return SCHED_OTHER;
    for (int policy = 0; policy < POLICY_COUNT; policy++)
        if (policy_names[policy] && strcasecmp(name, policy_names[policy] + 6) == 0) return policy;
    return -1;
}

// Parses one time of -D, which ends at the character `end`, and moves *text behind that. Returns
// false if it is no time.
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

// Parses one of them. Returns false after reporting a bad value.
static bool parse_policy_option(Options *options, int option, char *value) {
    SchedulingAttributes *attributes = &options->attributes;
    long number = 0;
    bool valid = true;
    const char *expected = "";
    switch (option) {
    case 's':
        expected = "OTHER, BATCH, IDLE, FIFO, RR or DEADLINE, with or without SCHED_";
        options->policy_given = true;
        number = find_policy(value);
        valid = number >= 0;
        attributes->policy = (uint32_t)number;
        break;
    case 'n':
        expected = "an integer from -20 to 19";
        options->nice_given = true;
        valid = parse_integer(value, -20, 19, &number);
        attributes->nice = (int32_t)number;
        break;
    case 'r':
        expected = "an integer from 1 to 99";
        valid = parse_integer(value, 1, 99, &number);
        attributes->priority = (uint32_t)number;
        break;
    case 'D': {
        expected = "runtime:deadline:period in nanoseconds, or with us or ms, like 10ms:20ms:20ms";
        options->times_given = true;
        const char *text = value;
        valid = parse_time(&text, ':', &attributes->runtime) &&
                parse_time(&text, ':', &attributes->deadline) &&
                parse_time(&text, '\0', &attributes->period);
        break;
    }
    case 'j':
        expected = "an integer from 1 to 64";
        options->threads = value;
        valid = parse_integer(value, 1, MAX_THREADS, &number);
        break;
    }
    if (!valid) report_error(BAD_VALUE, option, value, expected);
    return valid;
}

static bool is_real_time(const SchedulingAttributes *attributes) {
    return attributes->policy == SCHED_FIFO || attributes->policy == SCHED_RR;
}

// Every policy has parameters of its own. Returns what is wrong with those that were given, or
// NULL.
static const char *find_policy_mistake(const Options *options) {
    const SchedulingAttributes *attributes = &options->attributes;
    bool real_time = is_real_time(attributes), deadline = attributes->policy == SCHED_DEADLINE;
    if (options->nice_given && (real_time || deadline)) return "takes no nice value (-n)";
    if (attributes->priority != 0 && !real_time) return "takes no priority (-r)";
    if (options->times_given && !deadline) return "takes no times (-D)";
    if (deadline && !options->times_given) return "needs -D runtime:deadline:period";
    if (attributes->runtime > attributes->deadline || attributes->deadline > attributes->period)
        return "needs -D with runtime <= deadline <= period";
    return NULL;
}

// Builds the engine's command line, with the settings as the user typed them.
static void set_engine_arguments(Options *options) {
    char **argument = options->engine_arguments;
    *argument++ = options->threads ? "parallel" : "inference";
    for (size_t i = 0; i < SETTINGS_COUNT; i++) {
        if (options->setting_values[i] == NULL) continue;
        snprintf(options->setting_names[i], 3, "-%c", SETTINGS_OPTIONS[2 * i]);
        *argument++ = options->setting_names[i];
        *argument++ = options->setting_values[i];
    }
    if (options->threads) *argument++ = options->threads;
    snprintf(options->seed, sizeof(options->seed), "%llu", options->settings.seed);
    *argument = options->seed;
}

// Parses the command line into *options, which must be zero. Ends the program for -h and after
// reporting mistakes, before anything is started.
static void parse_options(Options *options, int argc, char **argv) {
    CommandLine line = {.argc = argc, .argv = argv, .usage = USAGE, .wanted = 1};
    SchedulingAttributes *attributes = &options->attributes;
    bool valid = true;
    options->settings = DEFAULT_SETTINGS;
    attributes->size = sizeof(SchedulingAttributes);
    for (int option; (option = next_option(&line, "+:h" POLICY_OPTIONS SETTINGS_OPTIONS)) != -1;) {
        const char *setting = strchr(SETTINGS_OPTIONS, option);
        if (option == 'h') exit_with_usage(&line, valid ? 0 : 2);
        if (setting) options->setting_values[(setting - SETTINGS_OPTIONS) / 2] = optarg;
        valid &= strchr(POLICY_OPTIONS, option) ? parse_policy_option(options, option, optarg)
                                                : parse_setting(&options->settings, option, optarg);
    }
    if (line.count == 1 && !parse_seed(line.operands[0], &options->settings.seed)) {
        report_error("%s is not a seed.", line.operands[0]);
        valid = false;
    }
    if (optind < argc) {
        report_error("%s: nothing but options may follow the seed.", argv[optind]);
        valid = false;
    }
    const char *mistake = valid ? find_policy_mistake(options) : NULL;
    if (mistake) report_error("%s %s.", policy_names[attributes->policy], mistake);
    if (!valid || mistake) exit_with_usage(&line, 2);

    // sched_setattr(2) sets the nice value along with the policy: by default to main's own.
    if (!options->nice_given) attributes->nice = getpriority(PRIO_PROCESS, 0);
    if (is_real_time(attributes) && attributes->priority == 0) attributes->priority = 1;
    choose_seed(&options->settings);
    set_engine_arguments(options);
}

// ------------------------------------------------------------------------------------------------
// Scheduling policy, with the raw system call

// Calls sched_setattr(2). Returns 0, or -1 with errno.
static int set_attributes(pid_t thread, const SchedulingAttributes *attributes) {
    return (int)syscall(SYS_sched_setattr, thread, attributes, 0u);
}

// Sets the policy of one thread. Returns 0, or -1 with errno. With SCHED_IDLE the kernel ignores
// the nice value in this call, so a new one is set before, with SCHED_OTHER.
static int set_policy(pid_t thread, const SchedulingAttributes *attributes) {
    if (attributes->policy == SCHED_IDLE &&
        getpriority(PRIO_PROCESS, (id_t)thread) != attributes->nice) {
        SchedulingAttributes nice_only = *attributes;
        nice_only.policy = SCHED_OTHER;
        if (set_attributes(thread, &nice_only) < 0) return -1;
    }
    return set_attributes(thread, attributes);
}

// Sets the policy of all threads of a process, but not of those that it creates later. Returns 0,
// or -1 with errno. A thread that has just ended is no error.
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

// Reports why the kernel refused a policy, and what it needs; the causes are those of
// sched_setattr(2) and sched(7).
static void report_policy_error(const SchedulingAttributes *attributes, int cause) {
    bool deadline = attributes->policy == SCHED_DEADLINE;
    const char *advice = "see sched_setattr(2)";
    if (cause == EPERM && deadline)
        advice = "it needs root or CAP_SYS_NICE, and an affinity to all CPUs of the machine";
    else if (cause == EPERM)
        advice = "it needs root or CAP_SYS_NICE (or a resource limit that allows it, ulimit -e and "
                 "-r)";
    else if (cause == EBUSY)
        advice = "the CPUs do not have that much time left for the deadlines of all threads; "
                 "request less runtime per period";
    else if (cause == EINVAL && deadline)
        advice = "it needs 1024 ns <= runtime <= deadline <= period, and a period that the "
                 "kernel's sched_deadline_period_min_us and _max_us allow";
    else if (cause == ENOENT) advice = "it needs /proc to find the threads of the engine";
    char nice[40] = "";
    if (!deadline && !is_real_time(attributes))
        snprintf(nice, sizeof(nice), " with the nice value %d", (int)attributes->nice);
    report_error("Cannot set %s%s (%s): %s.", policy_names[attributes->policy], nice,
                 strerror(cause), advice);
}

// ------------------------------------------------------------------------------------------------
// stdin, stdout and stderr without blocking

// Opens a terminal or a pipe a second time, without blocking. O_NONBLOCK belongs to the open file
// description, which main shares with the shell and the engine: fcntl(2) would set it for them,
// too. Returns -1 for anything else (reads and writes of a file never block), and if the file
// cannot be opened again, without /proc or the permission. Then poll(2) has to suffice.
static int reopen_nonblocking(int fd, int access_mode) {
    struct stat status;
    char path[32];
    bool pipe = fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode);
    if (!pipe && !isatty(fd)) return -1;
    snprintf(path, sizeof(path), "/proc/self/fd/%d", fd);
    return open(path, access_mode | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
}

// Makes stdout or stderr non-blocking for main alone. Returns a duplicate of what it was, for the
// engine; or -1 with errno.
static int make_nonblocking(int fd) {
    int original = fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
    int own = reopen_nonblocking(fd, O_WRONLY);
    if (original >= 0 && own >= 0) dup2(own, fd);
    if (own >= 0) close(own);
    return original;
}

// Returns whether a write would not block (it may fail), after at most so many milliseconds.
static bool can_write(int fd, int milliseconds) {
    return poll(&(struct pollfd){.fd = fd, .events = POLLOUT}, 1, milliseconds) == 1;
}

// ------------------------------------------------------------------------------------------------
// The log: samples of the engine's /proc/<pid>/stat, proc(5)

typedef struct {
    pid_t pid;
    clockid_t cpu_clock; // the engine's CPU time, of all its threads: clock_getcpuclockid(3)
    double cpu_time;     // on that clock when the last sample was taken, in seconds
    double time;         // likewise on CLOCK_MONOTONIC
    bool logged;         // a line has been written since the prompt
    bool shares_screen;  // the log and the replies go to the same terminal
    const char *failure; // the file that first made a line fail, or NULL
    int failure_errno;   // why; 0 when that has been reported
} CpuMeter;

enum { STATE = 3, UTIME = 14, STIME, NICE = 19, VSIZE = 23, CPU = 39, POLICY = 41, FIELDS_END };

// Splits the text of /proc/<pid>/stat: name[0..length) is field 2 with its parentheses, fields[i]
// is field i from STATE on. Returns false if fields are missing. The name may hold spaces and
// parentheses, so the fields behind it begin after the last ')'.
static bool split_stat(char *stat, char **name, int *length, char *fields[FIELDS_END]) {
    char *name_end = strrchr(stat, ')'), *position;
    *name = strchr(stat, '(');
    if (*name == NULL || name_end == NULL) return false;
    *length = (int)(name_end + 1 - *name);
    for (int i = STATE; i < FIELDS_END; i++) {
        fields[i] = strtok_r(i == STATE ? name_end + 1 : NULL, " \n", &position);
        if (fields[i] == NULL) return false;
    }
    return true;
}

static void start_sampling(CpuMeter *meter) {
    meter->cpu_time = seconds(meter->cpu_clock);
    meter->time = seconds(CLOCK_MONOTONIC);
    meter->logged = false;
}

// Remembers the first failure of the log. It is reported when the reply is finished.
static void note_failure(CpuMeter *meter, const char *file) {
    if (meter->failure) return;
    meter->failure = file;
    meter->failure_errno = errno;
}

// Writes one log line. utime and stime are in clock ticks, vsize is in bytes. A line that stderr
// cannot take at once is lost, as main must not block. `in_reply`: the cursor may be in a line of
// the reply.
static void log_sample(CpuMeter *meter, bool in_reply) {
    char path[64], stat[4096], line[1024], *name, *fields[FIELDS_END];
    int name_length;
    if (!can_write(STDERR_FILENO, 0)) return;
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)meter->pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t length = fd < 0 ? -1 : read(fd, stat, sizeof(stat) - 1);
    if (length < 0) note_failure(meter, "/proc/<pid>/stat");
    if (fd >= 0) close(fd);
    stat[length > 0 ? length : 0] = '\0';
    if (!split_stat(stat, &name, &name_length, fields)) return;

    double cpu_time = seconds(meter->cpu_clock), time = seconds(CLOCK_MONOTONIC);
    double percent = 100 * (cpu_time - meter->cpu_time) / (time - meter->time);
    unsigned policy = (unsigned)atoi(fields[POLICY]);
    const char *policy_name = policy < POLICY_COUNT ? policy_names[policy] : NULL;
    length = snprintf(line, sizeof(line),
                      "%s[pid] %d [tcomm] %.*s [state] %s [policy] %s [nice] %s [vsize] %s "
                      "[task_cpu] %s [utime] %s [stime] %s [cpu%%] %.2f%%\n",
                      in_reply && meter->shares_screen ? "\n" : "", (int)meter->pid, name_length,
                      name, fields[STATE], policy_name ? policy_name : fields[POLICY], fields[NICE],
                      fields[VSIZE], fields[CPU], fields[UTIME], fields[STIME], percent);
    // EBADF: stderr was closed from the beginning, so no log is wanted.
    if (write(STDERR_FILENO, line, (size_t)length) < 0 && errno != EAGAIN && errno != EBADF)
        note_failure(meter, "stderr");
    meter->cpu_time = cpu_time;
    meter->time = time;
    meter->logged = true;
}

// Reports once why the log is not complete.
static void report_log_failure(CpuMeter *meter) {
    int cause = meter->failure_errno;
    if (cause) report_error("The log is not complete: %s: %s.", meter->failure, strerror(cause));
    meter->failure_errno = 0;
}

// ------------------------------------------------------------------------------------------------
// The child

// What main inherited and has changed for itself; the child restores it between fork and exec. The
// mask also holds SIGUSR1 and SIGUSR2: an early SIGUSR1 stays pending until the engine waits for
// it, and a stray SIGUSR2 must not kill the engine.
typedef struct {
    sigset_t mask;
    sighandler_t sigchld, sigpipe, sigxfsz;
    int stdout_fd, stderr_fd; // duplicates
} Inherited;

typedef struct {
    pid_t pid;
    int prompts; // write end of the pipe that is the engine's stdin, non-blocking
    int returns; // read end of the return pipe, non-blocking; -1 when the engine has closed it
} Child;

// Finds the engine's binary in the folder of main's own, which need not be the current one; without
// /proc by what getauxval(3) knows of execve(2).
static void engine_path(char path[PATH_MAX], const char *name) {
    ssize_t length = readlink("/proc/self/exe", path, PATH_MAX - 1);
    if (length > 0) path[length] = '\0';
    else if (realpath((const char *)getauxval(AT_EXECFN), path) == NULL) path[0] = '\0';
    char *slash = strrchr(path, '/');
    size_t folder = slash ? (size_t)(slash + 1 - path) : 0;
    snprintf(path + folder, PATH_MAX - folder, "%s", name);
}

// Undoes in the child what main has changed for itself, and puts the pipes where the engine finds
// them. Returns 0, or -1 with errno. RETURN_FD may be the number of a duplicate in *before, so the
// duplicates are used first. No pipe end has that number: it was in use before the pipes were
// opened, at least by such a duplicate.
static int restore_inherited(const Inherited *before, pid_t front_end, int prompts, int returns) {
    char pid[24];
    snprintf(pid, sizeof(pid), "%d", (int)front_end);
    if (dup2(before->stdout_fd, STDOUT_FILENO) < 0 || dup2(before->stderr_fd, STDERR_FILENO) < 0 ||
        dup2(prompts, STDIN_FILENO) < 0 || dup2(returns, RETURN_FD) < 0 ||
        setenv(FRONT_END_ENV, pid, 1) < 0)
        return -1;
    signal(SIGCHLD, before->sigchld);
    signal(SIGPIPE, before->sigpipe);
    signal(SIGXFSZ, before->sigxfsz);
    return sigprocmask(SIG_SETMASK, &before->mask, NULL);
}

// The child's side of fork(2): waits for the start byte, which main writes into the prompt pipe
// when it has set the policy, and then becomes the engine.
_Noreturn static void exec_engine(const char *path, const Options *options, pid_t front_end,
                                  int prompts, int returns, const Inherited *before) {
    char byte;
    // The engine must not outlive main, even if main is killed, or was before prctl(2).
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != front_end) _exit(1);
    ssize_t count = read(prompts, &byte, 1);
    if (count == 0) _exit(1); // main has reported why, or is gone
    if (count < 0 || restore_inherited(before, front_end, prompts, returns) < 0) {
        report_error("Cannot prepare the engine's process: %s.", strerror(errno));
        _exit(1);
    }
    execv(path, options->engine_arguments);
    report_error("Cannot execute %s (%s). Build it with: make", path, strerror(errno));
    _exit(1);
}

// Starts the engine with the policy of the options. Returns 0, or -1 after reporting the error.
static int start_engine(Child *child, const Options *options, const Inherited *before) {
    char path[PATH_MAX];
    engine_path(path, options->engine_arguments[0]);
    if (access(path, X_OK) < 0)
        return report_error("Cannot execute %s (%s). Build it with: make", path, strerror(errno));
    int prompts[2], returns[2];
    if (pipe2(prompts, O_CLOEXEC) < 0 || pipe2(returns, O_CLOEXEC) < 0 ||
        fcntl(prompts[1], F_SETFL, O_NONBLOCK) < 0 || fcntl(returns[0], F_SETFL, O_NONBLOCK) < 0)
        return report_error("Cannot make a pipe: %s.", strerror(errno));
    pid_t front_end = getpid();
    child->pid = fork();
    if (child->pid < 0)
        return report_error("Cannot start the engine's process: %s.", strerror(errno));
    if (child->pid == 0) {
        close(prompts[1]); // or else its read would never find the end of the pipe
        exec_engine(path, options, front_end, prompts[0], returns[1], before);
    }
    close(prompts[0]);
    close(returns[1]);
    child->prompts = prompts[1];
    child->returns = returns[0];

    // All threads that the engine creates inherit a policy that is set now. SCHED_DEADLINE is not
    // inherited and forbids new threads, so it is set when the engine is ready.
    bool wanted = options->policy_given || options->nice_given; // or else a refusal is no error
    bool refused = options->attributes.policy != SCHED_DEADLINE &&
                   set_policy(child->pid, &options->attributes) < 0 && wanted;
    if (refused) report_policy_error(&options->attributes, errno);
    else if (write(child->prompts, "", 1) == 1 || errno == EPIPE) return 0; // EPIPE: see SIGCHLD
    else report_error("Cannot start the engine: %s.", strerror(errno));
    close(child->prompts); // so the child exits
    waitpid(child->pid, NULL, 0);
    return -1;
}

// ------------------------------------------------------------------------------------------------
// The chat

typedef enum {
    LOADING,    // until the engine is ready, no input is taken: if it fails, no prompt is lost
    PROMPTING,  // waiting for the user
    GENERATING, // waiting for the engine's reply
    EXITING     // waiting for the engine's exit
} Phase;

typedef struct {
    const Options *options;
    Child child;
    int signals; // signalfd(2): signals are read like input, no handler runs
    Phase phase;
    LineReader input;
    CpuMeter meter;
    char output[512];     // text that stdout has not taken yet
    size_t output_length; // no input is taken before it is 0
    double wake_time;     // CLOCK_MONOTONIC: when to call on_timeout()
    int interrupt;        // the SIGINT or SIGTERM that ends the chat, or 0
    bool line_ended;      // dismiss_engine() has printed a newline
    int wait_status;      // waitpid(2)'s when the engine is gone
    bool output_failed;   // an error of stdout has been reported, perhaps by the engine
    bool failed;          // an error that has been reported ends the chat
} Chat;

// Appends text to the output. handle_events() writes it as soon as stdout takes it.
__attribute__((format(printf, 2, 3))) static void print(Chat *chat, const char *format, ...) {
    size_t room = sizeof(chat->output) - chat->output_length;
    va_list arguments;
    va_start(arguments, format);
    size_t length = (size_t)vsnprintf(chat->output + chat->output_length, room, format, arguments);
    va_end(arguments);
    chat->output_length += length < room ? length : room - 1;
}

// Makes the engine exit: closes its pipe, and raises SIGUSR1 as for a prompt, so that the engine
// reads the end of file. What it may still print begins on a line of its own.
static void dismiss_engine(Chat *chat) {
    if (chat->phase == EXITING) return;
    chat->phase = EXITING;
    chat->line_ended = true;
    print(chat, "\n");
    close(chat->child.prompts);
    bool notified = kill(chat->child.pid, SIGUSR1) == 0;
    chat->wake_time = chat->failed || !notified ? seconds(CLOCK_MONOTONIC) + GRACE_PERIOD : NEVER;
}

// Ends the chat after an error. An engine that does not exit in time is killed.
static void fail(Chat *chat) {
    chat->failed = true;
    dismiss_engine(chat);
}

// Writes as much of the output as stdout takes now.
static void write_output(Chat *chat) {
    ssize_t count = write(STDOUT_FILENO, chat->output, chat->output_length);
    if (count >= 0) {
        chat->output_length -= (size_t)count;
        memmove(chat->output, chat->output + count, chat->output_length);
    } else if (errno != EAGAIN && errno != EINTR) {
        if (errno != EPIPE && errno != EBADF && !chat->output_failed)
            report_error("Cannot write the output: %s.", strerror(errno));
        chat->output_failed = true;
        chat->output_length = 0;
        fail(chat);
    }
}

static void ask_for_prompt(Chat *chat) {
    chat->phase = PROMPTING;
    chat->wake_time = NEVER;
    print(chat, PROMPT_MARK);
}

// Passes an interrupt on. SIGCONT continues a stopped engine, which would not see it otherwise.
static void interrupt_engine(Chat *chat, int signal) {
    chat->phase = EXITING;
    chat->interrupt = signal;
    chat->wake_time = seconds(CLOCK_MONOTONIC) + GRACE_PERIOD;
    kill(chat->child.pid, signal);
    kill(chat->child.pid, SIGCONT);
}

// Sends one prompt; line has room for its newline. The engine has emptied the pipe before, so the
// pipe takes the line in one piece and without blocking.
static void send_prompt(Chat *chat, char *line, size_t length) {
    line[length++] = '\n';
    chat->phase = GENERATING;
    start_sampling(&chat->meter);
    chat->wake_time = chat->meter.time + SAMPLE_INTERVAL;
    if (write(chat->child.prompts, line, length) == (ssize_t)length &&
        kill(chat->child.pid, SIGUSR1) == 0)
        return;
    // EPIPE: the engine has died, which SIGCHLD reports.
    if (errno != EPIPE) report_error("Cannot send the prompt: %s.", strerror(errno));
    fail(chat);
}

// Takes lines of input until one is a prompt or no more can be taken for now.
static void read_prompts(Chat *chat) {
    char line[MAX_PROMPT_LEN + 1];
    while (chat->phase == PROMPTING && chat->output_length == 0) {
        int length = next_line(&chat->input, line);
        if (length == NO_LINE_YET) return;
        if (length > 0) {
            send_prompt(chat, line, (size_t)length);
        } else if (length == END_OF_INPUT) {
            if (report_read_error(&chat->input) < 0) fail(chat);
            else dismiss_engine(chat);
        } else {
            if (length == LINE_TOO_LONG) print(chat, TOO_LONG_MESSAGE, MAX_PROMPT_LEN);
            ask_for_prompt(chat);
        }
    }
}

// The engine is ready. The prompt mark has been printed while the model was loading.
static void finish_loading(Chat *chat) {
    const SchedulingAttributes *attributes = &chat->options->attributes;
    chat->phase = PROMPTING;
    if (attributes->policy != SCHED_DEADLINE) return;
    if (set_policy_of_threads(chat->child.pid, attributes) == 0) return;
    report_policy_error(attributes, errno);
    fail(chat);
}

// A reply shorter than the interval gets one log line.
static void finish_reply(Chat *chat) {
    if (!chat->meter.logged) log_sample(&chat->meter, false);
    report_log_failure(&chat->meter);
    ask_for_prompt(chat);
}

// Reads the return pipe until it is empty, after SIGUSR2 or when ppoll(2) finds it readable. Only
// its bytes count.
static void read_engine_bytes(Chat *chat) {
    char byte;
    ssize_t count;
    if (chat->child.returns < 0) return;
    while ((count = read(chat->child.returns, &byte, 1)) == 1) {
        if (chat->phase == LOADING) finish_loading(chat);
        else if (chat->phase == GENERATING) finish_reply(chat);
    }
    if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
    if (count < 0) {
        report_error("Cannot read the return pipe: %s.", strerror(errno));
        fail(chat);
    }
    close(chat->child.returns); // its end would wake ppoll(2) again and again
    chat->child.returns = -1;
}

// Reads all pending signals, so that an interrupt and the death that it causes are seen together.
// Returns 1 if the engine has died or stopped (SIGCHLD), 0 if not, or -1 with errno.
static int read_signals(Chat *chat) {
    struct signalfd_siginfo signal;
    int child_changed = 0;
    while (read(chat->signals, &signal, sizeof(signal)) == sizeof(signal)) {
        switch (signal.ssi_signo) {
        case SIGCHLD: child_changed = 1; break;
        case SIGUSR2: read_engine_bytes(chat); break;
        case SIGCONT: // the shell has printed something since the prompt mark
            if (chat->phase <= PROMPTING && chat->output_length == 0) print(chat, PROMPT_MARK);
            break;
        case SIGINT:
        case SIGTERM:
            if (chat->interrupt == 0) interrupt_engine(chat, (int)signal.ssi_signo);
            break;
        }
    }
    return errno == EAGAIN || errno == EINTR ? child_changed : -1;
}

// An engine that cannot even be killed is killed by the kernel when main exits: PR_SET_PDEATHSIG.
static void kill_engine(const Chat *chat) {
    if (kill(chat->child.pid, SIGKILL) == 0) return;
    report_error("Cannot kill the engine: %s.", strerror(errno));
    exit(1);
}

// Handles the wake time: writes a log line, or kills an engine that has not exited in time.
static void on_timeout(Chat *chat) {
    double now = seconds(CLOCK_MONOTONIC);
    if (chat->phase == GENERATING) {
        log_sample(&chat->meter, true);
        // After a pause (the machine slept, the user typed Ctrl-Z) the missed lines are left out.
        chat->wake_time += SAMPLE_INTERVAL;
        if (chat->wake_time < now) chat->wake_time = now + SAMPLE_INTERVAL;
    } else {
        kill_engine(chat);
        chat->wake_time = now + GRACE_PERIOD;
    }
}

enum { SIGNALS, RETURNS, INPUT, OUTPUT, EVENT_COUNT };

// Waits for an event or the wake time. Returns what ppoll(2) returns. It polls STDIN_FILENO, not
// the description that main opened again: on one opened after the last writer of a named pipe has
// closed it, ppoll(2) never reports the end of file.
static int wait_for_event(const Chat *chat, struct pollfd events[EVENT_COUNT]) {
    bool takes_input = chat->phase == PROMPTING && chat->output_length == 0;
    events[SIGNALS] = (struct pollfd){.fd = chat->signals, .events = POLLIN};
    events[RETURNS] = (struct pollfd){.fd = chat->child.returns, .events = POLLIN};
    events[INPUT] = (struct pollfd){.fd = takes_input ? STDIN_FILENO : -1, .events = POLLIN};
    events[OUTPUT] =
        (struct pollfd){.fd = chat->output_length > 0 ? STDOUT_FILENO : -1, .events = POLLOUT};
    if (chat->wake_time == NEVER) return ppoll(events, EVENT_COUNT, NULL, NULL);
    double left = chat->wake_time - seconds(CLOCK_MONOTONIC);
    if (left < 0) left = 0;
    struct timespec timeout = {(time_t)left, (long)(1e9 * (left - (double)(time_t)left))};
    return ppoll(events, EVENT_COUNT, &timeout, NULL);
}

// Calls waitpid(2) with these flags. Returns whether the engine is gone. An error of waitpid(2) is
// reported and ends the chat, too: no other event would end it.
static bool reap_engine(Chat *chat, int flags) {
    pid_t pid = waitpid(chat->child.pid, &chat->wait_status, flags);
    if (pid >= 0) return pid > 0;
    report_error("Cannot get the engine's exit status: %s.", strerror(errno));
    chat->failed = true;
    return true;
}

// Ends the chat when no event can be awaited or read any more. Returns false; see handle_events().
static bool stop_waiting(Chat *chat) {
    report_error("Cannot wait for the engine: %s.", strerror(errno));
    chat->failed = true;
    kill_engine(chat);
    reap_engine(chat, 0);
    return false;
}

// Handles what ppoll(2) has returned. Returns false when the engine is gone.
static bool handle_events(Chat *chat, const struct pollfd events[EVENT_COUNT], int ready) {
    if (ready < 0 && errno != EINTR) return stop_waiting(chat);
    if (ready == 0) on_timeout(chat);
    if (events[RETURNS].revents) read_engine_bytes(chat);
    if (events[INPUT].revents) read_more(&chat->input);
    if (events[OUTPUT].revents) write_output(chat);
    int child_changed = read_signals(chat);
    if (child_changed < 0) return stop_waiting(chat);
    if (child_changed && reap_engine(chat, WNOHANG)) return false;
    read_prompts(chat);
    return true;
}

// Returns the name of a signal. (sigabbrev_np(3) does the same, but many systems lack it.)
static const char *signal_name(int signal) {
    static const char *const names[NSIG] = {
        [SIGHUP] = "SIGHUP",   [SIGINT] = "SIGINT",   [SIGQUIT] = "SIGQUIT", [SIGILL] = "SIGILL",
        [SIGTRAP] = "SIGTRAP", [SIGABRT] = "SIGABRT", [SIGBUS] = "SIGBUS",   [SIGFPE] = "SIGFPE",
        [SIGKILL] = "SIGKILL", [SIGUSR1] = "SIGUSR1", [SIGSEGV] = "SIGSEGV", [SIGUSR2] = "SIGUSR2",
        [SIGPIPE] = "SIGPIPE", [SIGALRM] = "SIGALRM", [SIGTERM] = "SIGTERM", [SIGXCPU] = "SIGXCPU",
        [SIGXFSZ] = "SIGXFSZ", [SIGSYS] = "SIGSYS",
    };
    return names[signal] ? names[signal] : "another signal";
}

// Reports how the engine ended. Returns main's exit status: that of the interrupt, if there was
// one, whichever process died first; 0 if the engine exited after the end of input; else 1.
static int report_exit(Chat *chat) {
    int signal = chat->interrupt;
    if (signal == 0 && WIFSIGNALED(chat->wait_status)) signal = WTERMSIG(chat->wait_status);
    int code = signal ? 128 + signal : WEXITSTATUS(chat->wait_status);
    bool complete = chat->phase == EXITING && code == 0 && !chat->failed;
    chat->phase = EXITING;            // an error of stdout must not raise a signal: the pid is free
    chat->output_failed |= code == 1; // the engine has reported why it failed

    print(chat, "%sChild exited with %d", chat->line_ended ? "" : "\n", code);
    if (signal) print(chat, " (%s)", signal_name(signal));
    print(chat, "\n");
    while (chat->output_length > 0 && can_write(STDOUT_FILENO, chat->interrupt ? 0 : REPORT_LIMIT))
        write_output(chat);
    return chat->interrupt || complete ? code : 1;
}

// Starts the engine and holds the chat. Returns main's exit status when the engine is gone.
static int run_chat(const Options *options, int signals, const Inherited *before) {
    Chat chat = {.options = options, .signals = signals, .wake_time = NEVER};
    struct pollfd events[EVENT_COUNT];
    int ready;
    if (start_engine(&chat.child, options, before) < 0) return 1;
    int input = reopen_nonblocking(STDIN_FILENO, O_RDONLY);
    chat.input.fd = input < 0 ? STDIN_FILENO : input;
    chat.meter.pid = chat.child.pid;
    chat.meter.shares_screen = isatty(STDOUT_FILENO) && isatty(STDERR_FILENO);
    clock_getcpuclockid(chat.child.pid, &chat.meter.cpu_clock);
    if (chat.meter.shares_screen)
        print(&chat, "The log appears here, among the replies. To keep it apart: 2>log\n");
    print(&chat, PROMPT_MARK);
    do ready = wait_for_event(&chat, events);
    while (handle_events(&chat, events, ready));
    return report_exit(&chat);
}

static int report_signal_error(void) {
    report_error("Cannot block signals: %s.", strerror(errno));
    return 1;
}

int main(int argc, char **argv) {
    // From here on no stray SIGUSR1 or SIGUSR2 kills main. SIGUSR1 is not for main, but the child
    // must find it blocked from its first moment.
    Inherited before;
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGUSR2);
    if (sigprocmask(SIG_BLOCK, &blocked, NULL) < 0) return report_signal_error();
    reserve_standard_fds();
    Options options = {0};
    parse_options(&options, argc, argv);
    if (flush_output() < 0) return 1;

    // Blocked signals stay pending until they are read from the signalfd: none interrupts a call.
    const int more[] = {SIGINT, SIGTERM, SIGCHLD, SIGCONT};
    for (size_t i = 0; i < sizeof(more) / sizeof(more[0]); i++) sigaddset(&blocked, more[i]);
    if (sigprocmask(SIG_BLOCK, &blocked, &before.mask) < 0) return report_signal_error();
    before.sigchld = signal(SIGCHLD, SIG_DFL); // if ignored, the child's status would be lost
    before.sigpipe = signal(SIGPIPE, SIG_IGN);
    before.sigxfsz = signal(SIGXFSZ, SIG_IGN);
    before.stdout_fd = make_nonblocking(STDOUT_FILENO);
    before.stderr_fd = make_nonblocking(STDERR_FILENO);
    int signals = signalfd(-1, &blocked, SFD_NONBLOCK | SFD_CLOEXEC);
    if (before.stdout_fd < 0 || before.stderr_fd < 0 || signals < 0) {
        report_error("Cannot open a descriptor: %s.", strerror(errno));
        return 1;
    }
    return run_chat(&options, signals, &before);
}
