"""The sandbox: programs that want out stay in, score nothing, cost little, and leave the next one alone."""

import functools
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanorl.tasks import sandbox
from nanorl.tasks.sandbox import ALLOWED, Sandbox, outputs_of, seccomp_filter, shared_sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are confined by Linux only")
GOOD = "def f(x): return [v+1 for v in x]"


@functools.cache
def box():
    """One server, so that each program comes after the one before."""
    return Sandbox(workers=1)


def outputs(code, *inputs):
    return box().run([(code, list(inputs))])[0]


def test_a_program_gives_its_outputs_in_order():
    assert outputs(GOOD, [1, 2], []) == [[2, 3], []]
    assert outputs("import math, itertools, collections\ndef f(x): return math.prod(x)", [2, 3]) == [6]
    assert shared_sandbox().run([(f"def f(x): return {i}", [None]) for i in range(50)]) == [[i] for i in range(50)]


# What is refused, or ends by a limit: the program comes to nothing. Payloads are bounded all the same.
ESCAPES = {
    "a fork bomb": "import os\ndef f(x):\n    for _ in range(50): os.fork()",
    "a process": "import os\ndef f(x): os.posix_spawn('/bin/sh', ['sh', '-c', 'touch owned'], {})",
    "another program": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "a thread": "import _thread\ndef f(x): _thread.start_new_thread(f, (x,)); return 1",
    "an endless loop": "def f(x):\n    while True: pass",
    "an endless loop at import": "while True: pass",
    "a deadlock": "import _thread\ndef f(x):\n    lock = _thread.allocate_lock()\n    lock.acquire()\n    lock.acquire()",
    "sleep": "import time\ndef f(x): time.sleep(60)",
    "a memory bomb": "def f(x): return len(bytearray(1 << 33))",
    "a little more than its share": "block = bytearray(300 << 20)\ndef f(x): return 1",
    "a growing list": "def f(x):\n    x = []\n    while True: x.append(bytearray(1 << 20))",
    "a huge power": "def f(x): return 9**9**9",
    "a regular expression": "import re\ndef f(x): return bool(re.match('(a+)+b', 'a' * 64))",
    "a file": "def f(x): open('owned', 'w').write('x')",
    "a file elsewhere": "def f(x): open('/tmp/owned', 'w').write('x')",
    "a directory": "import os\ndef f(x): os.mkdir('/tmp/owned')",
    "reading the password file": "def f(x): return open('/etc/passwd').read()",
    "reading the tests": "import os\ndef f(x): return [open(p).read() for p in os.listdir('.')]",
    "a socket": "import _socket\ndef f(x): _socket.socket()",
    "killing the server": "import os\ndef f(x): os.kill(os.getppid(), 9)",
    "killing everybody": "import os\ndef f(x): os.kill(-1, 9)",
    "tracing the server": "import ctypes, os\n"
                          "def f(x):\n    if ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0): raise OSError",
    "no exit": "import os\nos._exit(0)",
    "a polite exit": "raise SystemExit(0)",
    "an exit inside": "def f(x): raise SystemExit(0)",
    "an interrupt": "def f(x): raise KeyboardInterrupt",
    "a signal handler": "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\ndef f(x):\n    while True: pass",
    "a longer timer": "import signal\nsignal.setitimer(signal.ITIMER_PROF, 0)\ndef f(x):\n    while True: pass",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\ndef f(x): return 1",
    "deep recursion": "def f(x): return f(x)",
    "bottomless recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(x): return f(x)",
    "a crash": "import ctypes\ndef f(x): ctypes.string_at(0)",
    "a flood": "import os\ndef f(x):\n    for fd in list(range(20)) * 1000:\n        try: os.write(fd, b'[' * 9999)\n"
               "        except OSError: 0",
    "a huge answer": "def f(x): return 'x' * 10**6",
    "no function": "g = 1",
    "a function that is none": "f = 3",
    "half a program": "def f(x): return (",
    "an answer that cannot be sent": "def f(x): return lambda: 0",
    "a NUL": "def f(x): return 1\0", "half a character": "def f(x): return '\ud800'", "a million parentheses": "(" * 10**6,
    "a megabyte of sums": "def f(x): return " + "1+" * 500_000 + "1",
    "more rights": "import os\ndef f(x): os.setuid(0)",
}
# What may be tried in peace, because it does not help: it runs, and is wrong.
LIES = {
    "a million prints": "def f(x):\n    for _ in range(10**6): print([2, 3])",
    "a printed answer": "print('[[2, 3], []]')\nprint('[[2, 3], []]', flush=True)",
    "a rather deep answer": "def f(x):\n    for _ in range(950): x = [x]\n    return x",
    "a deep answer": "def f(x):\n    for _ in range(10**5): x = [x]\n    return x",
    "not a number": "def f(x): return float('nan')",
    "an object equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "a patched judge": "import builtins, json\njson.dumps = lambda *_: '1'\nbuiltins.repr = lambda *_: ''\ndef f(x): return 0",
    "a patched pipe": "import os\nreal = os.write\nos.write = lambda fd, data: real(fd, b'[[9], [9]]')\ndef f(x): return 0",
    "what the caller knows": "import sys\ndef f(x): return repr([sys._getframe(i).f_locals for i in range(3)])",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_what_wants_out_comes_to_nothing(name):
    """In at most a few seconds, without a trace, and the same server answers the next program."""
    start = time.monotonic()
    assert outputs(ESCAPES[name], [1, 2], []) is None
    assert time.monotonic() - start < 10
    assert outputs(GOOD, [1, 2], []) == [[2, 3], []]
    assert not os.path.exists("owned") and not os.path.exists("/tmp/owned")


@pytest.mark.parametrize("name", LIES)
def test_what_lies_is_wrong(name):
    """The right outputs are not in the child, and what it says is read as JSON, to the type."""
    said, right = outputs(LIES[name], [1, 2], []), [[2, 3], []]
    assert said != right or repr(said) != repr(right)
    assert outputs(GOOD, [1, 2], []) == [[2, 3], []]


def test_every_call_of_the_kernel_but_ten_is_refused_for_each_program():
    """Tried from inside, by number: whatever is not in ALLOWED fails with EPERM. (335 and 336, which only the kernel's own
    probes may use, kill whoever calls them.)"""
    allowed = ALLOWED[sandbox.platform.machine()]
    code = ("import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
            "def f(n):\n    ctypes.set_errno(0)\n    return [libc.syscall(n, -1, 0, 0, 0, 0, 0), ctypes.get_errno()]")
    numbers = [n for n in range(450) if n not in (*allowed, 335, 336)]
    said = outputs(code, *numbers)
    assert said == [[-1, 1]] * len(numbers)


def test_programs_do_not_see_what_others_left_behind():
    assert outputs("import builtins, math\nbuiltins.len = math.pi = 3\ndef f(x): return 1", 1) == [1]
    assert outputs("import math\ndef f(x): return [len(x), math.pi > 3]", [1, 2]) == [[2, True]]


def test_a_program_sees_no_environment():
    """But for LC_CTYPE, which Python sets itself."""
    assert outputs("import os\ndef f(x): return set(os.environ) <= {'LC_CTYPE'}", 1) == [True]


def test_a_server_that_dies_is_replaced():
    box = Sandbox(workers=1)
    server = box._idle.get()
    server.kill()
    server.wait()
    box._idle.put(server)
    assert box.run([(GOOD, [[1]])]) == [[[2]]]


def test_a_kernel_that_confines_nothing_is_noticed(monkeypatch):
    """The servers are not believed but tried: without the filter there is no sandbox."""
    code = Path(sandbox.__file__).read_text().replace("_prctl(set_seccomp,", "(lambda *_: 0)(set_seccomp,")
    assert code.count("(lambda *_: 0)") == 1
    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda argv, **how: real([*argv[:-1], "-c", code], **how))
    with pytest.raises(ValueError, match="the kernel does not"):
        Sandbox(workers=1)


@pytest.mark.parametrize("text", ["", "null", "3", "[1]", "[1, 2, 3]", '"ZeroDivisionError"', "[" * 60_000, "[1, 2", "[1] [2]",
                                  "[NaN", "9" * 10_000, '{"0": 1, "1": 2}', "\ufffd"])
def test_what_a_child_wrote_is_two_outputs_or_nothing(text):
    assert outputs_of(text, 2) is None


@pytest.mark.parametrize("machine", ALLOWED)
def test_the_filter_lets_pass_what_is_allowed_and_nothing_else(machine):
    """Interpreted here, for both processors: a wrong architecture kills, other calls get EPERM, x32 twins of calls, too."""
    program = list(struct.iter_unpack("HBBI", seccomp_filter(machine)))

    def verdict(number, arch):
        at = value = 0
        while True:
            code, if_true, if_false, k = program[at]
            if code == 0x06:
                return k
            if code == 0x20:
                value = {0: number, 4: arch}[k]
                at += 1
            else:
                at += 1 + (if_true if value == k else if_false)

    for number in range(600):
        allowed = number in ALLOWED[machine]
        assert verdict(number, sandbox.AUDIT_ARCH[machine]) == (0x7FFF0000 if allowed else 0x00050001)
        assert verdict(number | 0x40000000, sandbox.AUDIT_ARCH[machine]) == 0x00050001
        assert verdict(number, 0x40000003) == 0x80000000
