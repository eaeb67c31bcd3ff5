"""How the scripts of this folder end: a closed pipe, a full disk and Ctrl-C cause no traceback."""
import os
import subprocess
import sys


def run(main):
    """Run main() and exit with its status, without a traceback for a system error or Ctrl-C."""
    try:
        status = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        status = end("interrupted", 130)
    except BrokenPipeError:
        status = end(None, 1)
    except OSError as error:
        status = end(error, 1)
    except subprocess.CalledProcessError as error:
        status = end(error, 1)
    sys.exit(status)


def end(reason, status):
    """Report the reason, and let python's last flush of stdout go nowhere; returns the status."""
    if reason:
        print(f"{os.path.basename(sys.argv[0])}: {reason}", file=sys.stderr)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status
