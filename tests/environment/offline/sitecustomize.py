"""Put this folder on PYTHONPATH: the interpreter then reaches this machine alone.

Every attempt to go further fails as it does without a network, and is noted with the call that made
it in the file that ``OFFLINE_LOG`` names.
"""

import os
import socket
import traceback

LOCAL = ("127.0.0.1", "localhost", "::1", "0.0.0.0", "", None)


def _note(host: object) -> OSError:
    with open(os.environ["OFFLINE_LOG"], "a", encoding="utf-8") as log:
        log.write(f"{host!r}\n{''.join(traceback.format_stack())}\n")
    return socket.gaierror(socket.EAI_NONAME, "no network in this test")


class _Socket(socket.socket):
    def connect(self, address):
        if self.family != socket.AF_UNIX and address[0] not in LOCAL:
            raise _note(address)
        return super().connect(address)


_getaddrinfo = socket.getaddrinfo


def _resolve(host, *args, **kwargs):
    if (host.decode() if isinstance(host, bytes) else host) not in LOCAL:
        raise _note(host)
    return _getaddrinfo(host, *args, **kwargs)


socket.socket = _Socket
socket.getaddrinfo = _resolve
