"""Both sides of an `Assertion`: the program, and the test that calls it, in two sandboxes joined by two pipes.

Started by `program.py` as a script, standard library only: `program_talk.py serve READ WRITE` loads program.py
and does what it is asked; `program_talk.py test READ WRITE` runs the snippet from its standard input.

What travels is data: JSON, in which anything but null, booleans, numbers and text is [kind, contents]. Whatever
the program does to its own process, all it can send is a value, and it does not know which one is expected.
Objects without such a form stay with the program and travel as a number, ["object", 3].
"""

import builtins
import itertools
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

VERDICT = "\x1e"
"""What the last record of the test's output begins with."""
_MAX_LINE = 4 << 20
_MAX_ITEMS = 100_000
_MAX_DIGITS = 100_000
"""Of a whole number. Reading one takes time with the square of its length, and the reader is the judge."""


class Unsupported(Exception):
    """The snippet wants something that messages of plain data cannot do."""


def pack(value: Any, refer: Callable[[object], list]) -> Any:
    """The value as JSON; `refer` says what to send for an object that has no form of its own."""
    if value is None or isinstance(value, bool):
        return value
    # Subclasses are sent as what they extend, so that no method of theirs takes part in a comparison.
    for scalar in (int, float, str):
        if isinstance(value, scalar):
            return scalar(value)
    if isinstance(value, bytes):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, dict):
        return ["dict", [[pack(k, refer), pack(v, refer)] for k, v in value.items()]]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [pack(item, refer) for item in value]]
    return refer(value)


def unpack(data: Any, find: Callable[[int], object]) -> Any:
    """The inverse; `find` gives the object of a number."""
    if not isinstance(data, list):
        return data
    kind, contents = data
    if kind == "object":
        return find(contents)
    if kind == "bytes":
        return bytes.fromhex(contents)
    if kind == "complex":
        return complex(*contents)
    if kind == "dict":
        return {unpack(k, find): unpack(v, find) for k, v in contents}
    make = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return make(unpack(item, find) for item in contents)


def serve(requests: Any, replies: Any) -> None:
    """The program's side."""
    objects: list[Any] = []
    namespace: dict[str, Any] = {"__name__": "program"}

    def refer(value: object) -> list:
        objects.append(value)
        return ["object", len(objects) - 1]

    def load() -> Any:
        with open("program.py", encoding="utf-8", errors="surrogatepass") as file:
            exec(compile(file.read(), "program.py", "exec"), namespace)
        return {name: pack(value, refer) for name, value in namespace.items() if not name.startswith("__")}

    def perform(request: dict) -> Any:
        target = objects[request["object"]]
        if request["do"] == "get":
            return pack(getattr(target, request["name"]), refer)
        if request["do"] == "iterate":
            return pack(list(itertools.islice(target, _MAX_ITEMS)), refer)
        positional = [unpack(value, objects.__getitem__) for value in request["positional"]]
        named = {name: unpack(value, objects.__getitem__) for name, value in request["named"].items()}
        return pack(target(*positional, **named), refer)

    def answer(make: Callable[..., Any], *arguments: object) -> None:
        try:
            reply = {"value": make(*arguments)}
        except BaseException as error:  # sys.exit too: the snippet hears of it, and is not impressed
            reply = {"error": type(error).__name__, "text": str(error)[:200]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    answer(load)
    for line in requests:
        answer(perform, json.loads(line))


class Program:
    """The program, as the test sees it."""

    def __init__(self, replies: Any, requests: Any) -> None:
        self._replies, self._requests = replies, requests

    def receive(self) -> Any:
        """The value of the next reply; raises what the program raised."""
        line = self._replies.readline(_MAX_LINE)
        if not line:
            raise RuntimeError("the program ended")
        try:
            reply = json.loads(line)
            error, text = reply.get("error"), f"{reply.get('error')}: {reply.get('text')}"[:200]
            if error is None:
                return reply["value"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise RuntimeError("the program's answer cannot be read") from None
        kind = getattr(builtins, str(error), None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(text)
        raise RuntimeError(text)

    def decode(self, data: Any) -> Any:
        try:
            return unpack(data, lambda number: Remote(self, int(number)))
        except (ValueError, LookupError, TypeError, RecursionError, OverflowError):
            raise RuntimeError("the program's answer cannot be read") from None

    def ask(self, **request: object) -> Any:
        try:
            self._requests.write(json.dumps(request) + "\n")
            self._requests.flush()
        except OSError:
            raise RuntimeError("the program ended") from None
        return self.decode(self.receive())


class Remote:
    """An object that lives in the program. It is neither true nor false, and equal only to itself."""

    def __init__(self, program: Program, number: int) -> None:
        self._program, self._number = program, number

    def __call__(self, *positional: object, **named: object) -> Any:
        return self._program.ask(
            do="call",
            object=self._number,
            positional=[pack(value, refer_back) for value in positional],
            named={name: pack(value, refer_back) for name, value in named.items()},
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask(do="get", object=self._number, name=name)

    def __iter__(self) -> Any:
        return iter(self._program.ask(do="iterate", object=self._number))

    def __bool__(self) -> bool:
        raise RuntimeError("expected plain data, got an object of the program's own")


def refer_back(value: object) -> list:
    if isinstance(value, Remote):
        return ["object", value._number]
    raise Unsupported(f"an argument of type {type(value).__name__} cannot be sent to the program")


def test(replies: Any, requests: Any) -> tuple[str, str]:
    """The snippet's side. The verdict (passed, failed, or broken if the snippet cannot judge) and why."""
    try:
        code = compile(sys.stdin.read(), "test", "exec")
    except (SyntaxError, ValueError) as error:
        return "broken", f"the snippet is not Python: {error}"
    program = Program(replies, requests)
    try:
        offered = {name: program.decode(data) for name, data in program.receive().items() if is_free(name)}
    except Exception as error:
        return "failed", f"the program does not load: {type(error).__name__}: {error}"
    try:
        exec(code, {**offered, "__name__": "test", "math": math})
    except Unsupported as error:
        return "broken", str(error)
    except AssertionError as error:
        return "failed", f"assertion failed: {error}" if str(error) else "assertion failed"
    except Exception as error:
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def is_free(name: str) -> bool:
    """Whether the program may define the name for the snippet: nothing of Python's own."""
    return name.isidentifier() and not name.startswith("__") and not hasattr(builtins, name)


def main() -> None:
    side, read, write = sys.argv[1:]
    sys.set_int_max_str_digits(_MAX_DIGITS)
    incoming = os.fdopen(int(read), encoding="utf-8", errors="replace")
    outgoing = os.fdopen(int(write), "w", encoding="utf-8")
    if side == "serve":
        serve(incoming, outgoing)
    else:
        verdict, why = test(incoming, outgoing)
        # As JSON, in which no text of the program can end the record and begin another.
        sys.stdout.write(f"{VERDICT}{json.dumps([verdict, why])}")


if __name__ == "__main__":
    main()
