"""A place to run Python that nobody has read: the programs that a model writes.

    trainer  -- code, inputs -->  server  -- fork -->  child: limits, seccomp, then the code and f(input) for each input
             <-- outputs --------          <-- pipe --

The server is a bare Python: isolated mode, an empty environment, an empty directory, another user where we are root. It
forks a child for every program, so that none sees what another has done, and a fork takes a millisecond. What holds a child:

    seccomp     the kernel refuses every system call but those for memory, for its own end, and for writing to its pipe:
                no file, no process, no signal, no network, no timer
    limits      of memory, CPU time, files (none) and processes (none)
    the clock   the server kills what has not answered in time, and reads no more than 64 KB

What a child knows is the code and the inputs. The expected outputs stay with the trainer, which reads what comes back as
JSON: a program that prints, exits, patches its judge or looks around for the tests finds nothing to fake an answer with.

This is a fence around a toy's programs, not a vault. It trusts the kernel, and it does not hide how long things take.
Where the kernel has no seccomp (macOS, Windows), nothing is run at all.
"""

import contextlib
import ctypes
import functools
import json
import os
import platform
import queue
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MEMORY_BYTES = 256 << 20
CPU_SECONDS = 0.2
WALL_SECONDS = 2.0      # for a program that waits without computing; generous, for the machine may be busy
OUTPUT_BYTES = 1 << 16

# The system calls that remain: write, exit, exit_group, mmap, munmap, mremap, brk, madvise, futex, rt_sigreturn.
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOWED = {"x86_64": (1, 60, 231, 9, 11, 25, 12, 28, 202, 15), "aarch64": (64, 93, 94, 222, 215, 216, 214, 233, 98, 139)}


# ---------------------------------------------------------------------------------------------------------------------
# The child and its server: this part runs as `python -I -S sandbox.py` and imports the standard library alone
# ---------------------------------------------------------------------------------------------------------------------


def seccomp_filter(machine: str) -> bytes:
    """A BPF program over struct seccomp_data {nr, arch, ...}: calls in ALLOWED pass, others fail with EPERM.

    Each instruction is (code, jump if true, jump if false, constant), as in linux/filter.h.
    """
    load, equal, answer = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000 | 1, 0x80000000
    calls = ALLOWED[machine]
    program = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (answer, 0, 0, kill), (load, 0, 0, 0)]
    program += [(equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    program += [(answer, 0, 0, refuse), (answer, 0, 0, allow)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)


def _prctl(*arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(*map(ctypes.c_ulong, arguments)):
        raise OSError(ctypes.get_errno(), "prctl")


def confine(pipe: int) -> None:
    """In the child: give up everything but memory, time and one pipe. There is no way back."""
    import resource
    set_pdeathsig, set_dumpable, set_no_new_privs, set_seccomp, filter_mode = 1, 4, 38, 22, 2
    _prctl(set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    _prctl(set_dumpable, 0, 0, 0, 0)                        # a core dump may be piped to a program of root's
    os.closerange(0, pipe)
    os.closerange(pipe + 1, 1 << 16)
    sys.stdin = sys.stdout = sys.stderr = sys.__stdin__ = sys.__stdout__ = sys.__stderr__ = None    # print() says nothing
    limits = {"AS": MEMORY_BYTES, "CPU": 1 + int(CPU_SECONDS), "FSIZE": 0, "NPROC": 0, "NOFILE": 0, "CORE": 0}
    for kind, bound in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{kind}"), (bound, bound))
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)       # its signal kills, and no handler can be installed any more
    instructions = seccomp_filter(platform.machine())
    kept = ctypes.create_string_buffer(instructions)
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions) // 8, ctypes.addressof(kept)))   # a sock_fprog
    _prctl(set_no_new_privs, 1, 0, 0, 0)
    _prctl(set_seccomp, filter_mode, ctypes.addressof(program), 0, 0)


def child(code: str, inputs: list, pipe: int) -> None:
    """Run one program; write the list of its outputs to the pipe, as JSON, or the name of what it raised."""
    confine(pipe)
    try:
        names: dict[str, Any] = {"__name__": "program"}
        exec(compile(code, "program", "exec"), names)
        answer = json.dumps([names["f"](x) for x in inputs])
    except BaseException as e:      # also SystemExit and KeyboardInterrupt: whatever it is, it ends here
        answer = json.dumps(type(e).__name__)
    os.write(pipe, answer.encode())


def serve() -> None:
    """Answer each line [code, inputs] on stdin by a line on stdout: the text that the child wrote, as a JSON string."""
    for module in ("collections", "itertools", "math", "resource"):
        __import__(module)                                  # what a program may import, for a child can read no file
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")                                     # when memory runs out, rather this than the trainer
    if os.getuid() == 0:
        with contextlib.suppress(OSError):                  # in a container, root may not be allowed to
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
    for line in sys.stdin.buffer:
        code, inputs = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                child(code, inputs, writing)
            finally:
                os._exit(0)
        os.close(writing)
        written, deadline = b"", time.monotonic() + WALL_SECONDS
        while (len(written) <= OUTPUT_BYTES and select.select([reading], [], [], max(0.0, deadline - time.monotonic()))[0]
               and (part := os.read(reading, OUTPUT_BYTES))):
            written += part
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reading)
        print(json.dumps(written[:OUTPUT_BYTES].decode("ascii", "replace")), flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's side
# ---------------------------------------------------------------------------------------------------------------------

# The first programs of every server try these; all of them must be refused.
PROBES = ("open('/', 0)", "fork()", "kill(0, 0)", "pipe()")
UNCONFINED = f"a model's programs run only where Linux can confine them, by seccomp, on {' or '.join(ALLOWED)}; here "


class Sandbox:
    """Servers that run programs, as many at a time as there are `workers`: by default one for each processor, at most 8."""

    def __init__(self, workers: int | None = None):
        if sys.platform != "linux" or platform.machine() not in ALLOWED:
            raise ValueError(f"{UNCONFINED}are {sys.platform} and {platform.machine()}")
        workers = workers or min(len(os.sched_getaffinity(0)), 8)
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(self._start())
        self._threads = ThreadPoolExecutor(workers)

    def run(self, programs: list[tuple[str, list]]) -> list[list | None]:
        """f(input) for each input of each (code, inputs); None where a program raised, ran out of time, or wrote no such list.

        Inputs and outputs are what JSON can say; those of a program may have 64 KB. Nothing here says that they are right.
        """
        return list(self._threads.map(self._run, programs))

    def _run(self, program: tuple[str, list]) -> list | None:
        server = self._idle.get()
        try:
            for _ in range(2):
                if (line := self._ask(server, program)).endswith("\n"):
                    return outputs_of(json.loads(line), len(program[1]))
                server.kill()
                server = self._start()
        finally:
            self._idle.put(server)
        raise OSError("the server of the sandbox died twice on the same program")

    @staticmethod
    def _ask(server: subprocess.Popen, program: tuple[str, list]) -> str:
        """The server's line, or as much of it as there is if it has died."""
        try:
            server.stdin.write(json.dumps(program) + "\n")
            server.stdin.flush()
            return server.stdout.readline()
        except BrokenPipeError:
            return ""

    def _start(self) -> subprocess.Popen:
        with tempfile.TemporaryDirectory() as empty:        # it is gone as soon as the server is there
            server = subprocess.Popen([sys.executable, "-I", "-S", __file__], cwd=empty, env={}, text=True,
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                      start_new_session=True)       # Ctrl-C is for the trainer
            lines = [self._ask(server, (f"import os; os.{call}", [])) for call in PROBES]
        if not all(lines):
            raise OSError(f"the sandbox: {sys.executable} -I -S did not start in an empty environment")
        if {json.loads(line) for line in lines} != {'"PermissionError"'}:
            server.kill()
            raise ValueError(f"{UNCONFINED}the kernel does not (is it switched off in this container?)")
        return server


def outputs_of(text: str, count: int) -> list | None:
    """What a child wrote, if it is a list of `count` outputs. The text is untrusted."""
    try:
        outputs = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return outputs if isinstance(outputs, list) and len(outputs) == count else None


shared_sandbox = functools.cache(Sandbox)       # one for this process


if __name__ == "__main__":
    serve()
