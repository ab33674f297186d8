"""Exit codes of the commands, beside 0 (done), 1 (error) and 2 (bad configuration or usage)."""

EXIT_PREEMPTED = 3
"""A signal or its time limit stopped the run, which is saved; the next start resumes from there."""
EXIT_LOST_RANK = 4
"""Another rank is gone or hangs, and none has told of an error of its own: a new start may well go on."""
EXIT_SAVE_FAILED = 75
"""Checkpoints cannot be saved: EX_TEMPFAIL of sysexits.h."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells have it; `train` saves instead."""
FIRST_OF_SIGNALS = 128
"""A shell's exit code of a process that signal n has killed is this and n."""
