"""Ports for SGLang: one that was given out is not given out again, though nothing listens on it yet."""

from __future__ import annotations

import random
import socket
import subprocess
import sys

import pytest

from fse_patch.lab import free_port as module

IN_TURN = """
import random
random.sample = lambda *_: {ports}
from fse_patch.lab.free_port import free_port
print(free_port())
"""


def test_a_port_is_given_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HELD", [])
    first = module.free_port()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        taken = listening.getsockname()[1]
        ports = [taken, first, module.free_port(), *random.sample(range(20000, 32000), 20)]

        def elsewhere() -> int:
            code = IN_TURN.format(ports=ports)
            return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)

        # Another process passes over what listens, and over both that this one holds.
        assert elsewhere() in ports[3:]
        # The control: no longer held, the first is given out again.
        module.HELD[0].close()
        assert elsewhere() == first
        module.HELD[1].close()
