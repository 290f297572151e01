"""A real OpenSSH server on the loopback, with keys and settings of its own."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SSHD = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")

_CONFIG = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
StrictModes no
UsePAM no
"""


@dataclass(frozen=True)
class Server:
    """Where it listens, and the folder of its keys, which is also the device's /tmp."""

    folder: Path
    port: int

    def host(self, python: Path | None = None) -> str:
        """Return what stands behind ``ssh:``; ``python`` is the device's interpreter."""
        options = f"-p {self.port} -i {self.folder}/user -o UserKnownHostsFile={self.folder}/known"
        path = f"PATH={(python or Path(sys.executable)).parent}:$PATH"
        there = shlex.quote(f"{path} TMPDIR={self.folder}")
        return f"{options} -o StrictHostKeyChecking=accept-new -o LogLevel=ERROR 127.0.0.1 {there}"


@contextlib.contextmanager
def sshd(folder: Path) -> Iterator[Server]:
    """Start a server as this user, on a free port, and end it."""
    assert SSHD
    for key in ("host", "user"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config").write_text(_CONFIG.format(port=port, folder=folder))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd asks for it where it runs as root
    server = subprocess.Popen(
        [SSHD, "-D", "-f", folder / "config", "-E", folder / "log"],
        stdin=subprocess.DEVNULL,
    )
    try:
        _wait(port, folder)
        yield Server(folder, port)
    finally:
        server.terminate()
        server.wait()


def _wait(port: int, folder: Path) -> None:
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError(f"sshd does not start: {(folder / 'log').read_text()}")
