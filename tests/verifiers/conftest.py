"""Every way to keep a program in that works on this machine; the others are skipped with the reason."""

from collections.abc import Iterator

import pytest

from whorl.verifiers import bubblewrap, program, sandbox
from whorl.verifiers.sandbox import Backend


def use(monkeypatch: pytest.MonkeyPatch, backend: Backend) -> None:
    monkeypatch.setattr(sandbox, "backend", lambda: backend)
    for function in (sandbox.protections, program._warn_of_missing_protections):
        function.cache_clear()


@pytest.fixture(params=["bubblewrap", "alone"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """What programs run in: the best that there is, and what is left where bubblewrap is not installed."""
    best = sandbox.backend()
    if request.param == "bubblewrap" and best.wrapper is None:
        pytest.skip(best.why_alone)
    chosen = best if request.param == "bubblewrap" else Backend(None, "a test asked for it")
    with monkeypatch.context() as patch:
        use(patch, chosen)
        yield chosen
    for function in (sandbox.protections, program._warn_of_missing_protections):
        function.cache_clear()


@pytest.fixture
def same_user(monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """Bubblewrap as it is for who is not root, or whose Python others may not read."""
    best = sandbox.backend()
    if best.wrapper is None:
        pytest.skip(best.why_alone)
    chosen = Backend(bubblewrap.Bubblewrap(best.wrapper.path, other_user=False), "")
    if reason := bubblewrap._fault(chosen.wrapper, sandbox._python(), sandbox.readable_paths()):
        pytest.skip(reason)
    with monkeypatch.context() as patch:
        use(patch, chosen)
        yield chosen
    for function in (sandbox.protections, program._warn_of_missing_protections):
        function.cache_clear()
