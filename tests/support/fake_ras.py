"""A stand-in for the RAS service of one NCCL process: `python fake_ras.py HOST PORT HOW`, ready when it prints a line.

It shares its port as NCCL does, and speaks as NCCL 2.30 (src/ras/client_support.cc): commands are lines in any case, and the
connection is closed after a status. HOW: "answers", "late" sends the rest of a status never, "mute" accepts and says nothing,
"stranger" speaks HTTP, "leaves" goes away when it is asked.
"""

from __future__ import annotations

import socket
import sys
import threading
import time

HEAD = "NCCL version 2.30.7 compiled with CUDA 13.0\n\nJob summary\n===========\n\nCommunicators..."
REST = " (0.000s)\n\n#0-0 (0000000000abc123) MISMATCH\n  Rank 1 has launched up to operation 4\n"


def serve(client: socket.socket, how: str) -> None:
    with client, client.makefile("rb") as lines:
        if how == "stranger":
            client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            return
        for line in lines:
            command = line.decode().strip().lower()
            if how == "mute":
                continue
            if command.startswith("client protocol "):
                client.sendall(b"SERVER PROTOCOL 2\n")
            elif command.startswith("timeout "):
                if how != "leaves":
                    client.sendall(b"OK\n")
            elif command == "verbose status":
                if how == "leaves":
                    return
                client.sendall(HEAD.encode())
                if how == "late":
                    time.sleep(600)
                client.sendall(REST.encode())
                return
            else:
                client.sendall(b"ERROR: Unknown command\n")


def main() -> None:
    host, port, how = sys.argv[1:]
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind((host, int(port)))
        listening.listen(64)
        print("ready", flush=True)
        while True:
            client, _ = listening.accept()
            threading.Thread(target=serve, args=(client, how), daemon=True).start()


if __name__ == "__main__":
    main()
