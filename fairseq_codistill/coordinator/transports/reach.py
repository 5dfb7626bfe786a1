"""Owns the look at an address from outside: whether its name resolves, and whether anything answers there."""

import socket
import threading

LOOK_S = 2.0


def look_at(host: str, port: int) -> str:
    """What is seen at ``host:port``, in words for an error. Takes a few seconds at the most."""
    failure = _resolve(host)
    if failure is not None:
        return f"the name {host!r} does not resolve ({failure})"
    try:
        socket.create_connection((host, port), timeout=LOOK_S).close()
    except ConnectionRefusedError:
        return f"nobody listens at {host}:{port} (connection refused): not started, ended, or on another port"
    except TimeoutError:
        return f"no answer from {host}:{port} in {LOOK_S:g} s: the host is down, or a firewall is in between"
    except OSError as error:
        return f"{host}:{port} cannot be reached ({error})"
    return f"something listens at {host}:{port}, and has not answered as a model does"


def _resolve(host: str) -> str | None:
    """Why a name does not resolve, None if it does. In a thread: a resolver may take minutes to give up."""
    found: list[str | None] = []

    def ask() -> None:
        try:
            socket.getaddrinfo(host, None)
            found.append(None)
        except (OSError, UnicodeError) as error:
            found.append(str(error))

    thread = threading.Thread(target=ask, name="codistill-resolve", daemon=True)
    thread.start()
    thread.join(LOOK_S)
    return found[0] if found else f"no answer in {LOOK_S:g} s"
