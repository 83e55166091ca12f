"""Every test runs on one torch thread, with the shapes and types of annotations checked."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import jaxtyping
import torch

import tests.typecheck  # noqa: F401  (the hook below imports only `tests` and looks the rest up)

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell's background job starts with Ctrl-C ignored, and every process that a test starts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before Triton is imported
jaxtyping.install_import_hook("whorl", "tests.typecheck.check")
