"""How often a body's bytes are copied, and where: `.venv/bin/python benchmarks/copies.py [--megabytes 50] ...`.

Counts what `memcpy` and `memmove` are asked to copy, at least 512 bytes at a time, in a server and a client that carry
one body down and one up; each is real, with real sockets. A few lines of C, compiled here and loaded before everything
else (LD_PRELOAD), count it by the line of Python that is executed. So the plain source is measured: compiled modules
have no lines.

What the kernel copies is not in it, nor what `realloc` moves. A copy within native code counts for the line that called
it: those below `(library)` are lines that hand bytes to the QUIC library, and its own. Lines of the event loop's own
code, which is native, are `(event loop)`: it copies what it has read from a TCP socket into an object.

What the same ends copy for a body of one byte, which is their start, is taken off. Needs a C compiler and Python's
headers; Linux.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bulk import MEGABYTE, backend, transfer
from ends import tunnel

LEAST = 512
"bytes: a piece of a body has more, a head less"

SOURCE = """
#define _GNU_SOURCE
#include <Python.h>
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>

#define PLACES 4096
#define LEAST %(least)d

typedef void *(*copier)(void *, const void *, size_t);
static copier real_memcpy, real_memmove;
static __thread int inside;
static struct { PyCodeObject *code; int line; size_t bytes; } places[PLACES];
static size_t unlocked;

static void count(size_t size) {
    PyThreadState *(*current)(void) = (PyThreadState *(*)(void))dlsym(RTLD_DEFAULT, "_PyThreadState_UncheckedGet");
    if (inside || !current) return;
    PyThreadState *state = current();
    if (!state) {
        unlocked += size;
        return;
    }
    inside = 1;
    PyFrameObject *frame = PyThreadState_GetFrame(state);
    if (frame) {
        PyCodeObject *code = PyFrame_GetCode(frame);
        int line = PyFrame_GetLineNumber(frame);
        size_t slot = ((size_t)code / 16 + line) %% PLACES;
        while (places[slot].code && (places[slot].code != code || places[slot].line != line))
            slot = (slot + 1) %% PLACES;
        if (!places[slot].code) {
            Py_INCREF(code);
            places[slot].code = code;
            places[slot].line = line;
        }
        places[slot].bytes += size;
        Py_DECREF(code);
        Py_DECREF(frame);
    }
    inside = 0;
}

void *memcpy(void *to, const void *from, size_t size) {
    if (!real_memcpy) real_memcpy = (copier)dlsym(RTLD_NEXT, "memcpy");
    if (size >= LEAST) count(size);
    return real_memcpy(to, from, size);
}

void *memmove(void *to, const void *from, size_t size) {
    if (!real_memmove) real_memmove = (copier)dlsym(RTLD_NEXT, "memmove");
    if (size >= LEAST) count(size);
    return real_memmove(to, from, size);
}

__attribute__((destructor)) static void tell(void) {
    const char *name = getenv("COPIES_TO");
    inside = 1;
    FILE *out = name ? fopen(name, "w") : NULL;
    if (!out) return;
    for (size_t slot = 0; slot < PLACES; slot++)
        if (places[slot].code)
            fprintf(out, "%%zu\\t%%s\\t%%d\\t%%s\\n", places[slot].bytes,
                    PyUnicode_AsUTF8(places[slot].code->co_filename), places[slot].line,
                    PyUnicode_AsUTF8(places[slot].code->co_qualname));
    fprintf(out, "%%zu\\t-\\t0\\t-\\n", unlocked);
    fclose(out);
}

void *__memcpy_chk(void *to, const void *from, size_t size, size_t room) { return memcpy(to, from, size); }
void *__memmove_chk(void *to, const void *from, size_t size, size_t room) { return memmove(to, from, size); }
"""


def compiled(directory: Path) -> Path:
    """What counts, as a shared library in ``directory``."""
    source, library = directory / "copies.c", directory / "copies.so"
    source.write_text(SOURCE % {"least": LEAST})
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit("there is no C compiler here")
    include = sysconfig.get_path("include")
    subprocess.run(
        (compiler, "-O1", "-shared", "-fPIC", "-fno-builtin", f"-I{include}", "-o", library, source, "-ldl"), check=True
    )
    return library


def counted(directory: Path, library: Path, engine: str, way: str, size: int) -> list[Counter[str]]:
    """Bytes copied by each line of a server's and a client's."""
    directory.mkdir()
    files = [directory / "server.copies", directory / "client.copies"]
    envs = [{"LD_PRELOAD": str(library), "COPIES_TO": str(each)} for each in files]
    with tunnel(directory, engine, backend(), (envs[0], envs[1])) as place:
        transfer(place.address, size, way == "up")
    found = []
    for each in files:
        lines: Counter[str] = Counter()
        for line in each.read_text().splitlines():
            count, name, number, what = line.split("\t")
            lines[where(name, number, what)] += int(count)
        found.append(lines)
    return found


def where(name: str, number: str, what: str) -> str:
    """A line of the package or of a library, in few words."""
    package = str(Path(__file__).parents[1] / "quictunnel") + "/"
    if name.startswith(package):
        return f"{name.removeprefix(package)}:{number} {what}"
    if name == "-":
        return "(without the interpreter's lock: a join of more than 1 MiB)"
    if what == "Runner.run":
        return "(event loop)"
    for library in ("aioquic", "qh3"):
        if f"/{library}/" in name:
            return f"(library) {library}/{name.rpartition(f'/{library}/')[2]}:{number} {what}"
    return f"{Path(name).name}:{number} {what}"


def main() -> None:
    """Count, and print a table for each engine and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="aioquic,qh3")
    parser.add_argument("--ways", default="down,up")
    parser.add_argument("--megabytes", type=int, default=50)
    arguments = parser.parse_args()
    size = arguments.megabytes * MEGABYTE
    with tempfile.TemporaryDirectory() as name:
        library = compiled(Path(name))
        for engine in arguments.engine.split(","):
            for way in arguments.ways.split(","):
                idle = counted(Path(name) / f"{engine}-{way}-0", library, engine, way, 1)
                both = counted(Path(name) / f"{engine}-{way}", library, engine, way, size)
                for end, lines, before in zip(("server", "client"), both, idle, strict=True):
                    lines.subtract(before)
                    print(f"\n{engine}, {way}, {end}: {lines.total() / size:.2f} copies of each byte\n")
                    for line, count in lines.most_common():
                        if count > 0.02 * size:
                            print(f"    {count / size:5.2f} {line}")


if __name__ == "__main__":
    main()
