"""A port for a server that binds it many seconds later."""

from __future__ import annotations

import random
import socket

# By `free_port`.
HELD: list[socket.socket] = []


def free_port() -> int:
    """Return a port below those that the system hands out: SGLang takes one of them without a look.

    While this process lives, no other call gets it, of any process: the same UDP port, of which SGLang has no
    use, is held for that. An engine binds its own many seconds after this.
    """
    for port in random.sample(range(20000, 32000), 100):
        held = socket.socket(type=socket.SOCK_DGRAM)
        try:
            held.bind(("127.0.0.1", port))
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        HELD.append(held)
        return port
    raise RuntimeError("no free port from 20000 to 32000")
