"""Keys: who is let in, what an eavesdropper sees, and what is refused before training starts. Real sockets."""

import contextlib
import os
import socket
import stat
import sys
import threading
from pathlib import Path

import pytest
import zmq
from helpers import free_ports
from test_zmq_transport import pass_over, stranger, until

from fairseq_codistill.config import CodistillationConfig, ConfigError
from fairseq_codistill.coordinator.coordinator import Coordinator
from fairseq_codistill.coordinator.mailbox import Mailbox
from fairseq_codistill.coordinator.meter import TrafficMeter
from fairseq_codistill.coordinator.transports import curve_keys
from fairseq_codistill.coordinator.transports.choice import make_transport
from fairseq_codistill.coordinator.transports.curve_keys import load_keys, make_keys
from fairseq_codistill.coordinator.transports.relay_keys import public_key, secret_key
from fairseq_codistill.coordinator.transports.zeromq import ZeroMqTransport
from fairseq_codistill.coordinator.wire import Kind, Message

SECRET = b"predictions that nobody else must read" * 10


@pytest.fixture
def folder(tmp_path):
    make_keys(str(tmp_path / "keys"), 2)
    return str(tmp_path / "keys")


def transport(model, ports, folder, peer_port=None):
    return ZeroMqTransport(
        ("127.0.0.1", ports[model]),
        {1 - model: ("127.0.0.1", peer_port or ports[1 - model])},
        model=model,
        keys=load_keys(folder, model, 2),
    )


@contextlib.contextmanager
def wiretap(port):
    """Relays a connection to ``port`` and keeps what passes; gives the port to connect to, and the bytes."""
    heard = bytearray()
    listener = socket.create_server(("127.0.0.1", 0))

    def relay(source, sink):
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                heard.extend(data)
                sink.sendall(data)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", port))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=relay, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    yield listener.getsockname()[1], heard
    listener.close()


def test_models_of_one_key_set_talk_and_a_wiretap_hears_nothing(folder):
    ports = free_ports(2)
    with wiretap(ports[1]) as (tapped, heard):
        one = transport(1, ports, folder)  # before the relay gets its first connection
        zero = transport(0, ports, folder, peer_port=tapped)
        try:
            assert pass_over(zero, one, SECRET) == SECRET
            assert len(heard) > len(SECRET)
            assert SECRET[:38] not in heard
        finally:
            zero.close(0)
            one.close(0)


def test_the_wiretap_of_these_tests_would_hear_what_is_sent_in_the_clear():
    ports = free_ports(2)
    with wiretap(ports[1]) as (tapped, heard):
        one = ZeroMqTransport(("127.0.0.1", ports[1]), {0: ("127.0.0.1", ports[0])})
        zero = ZeroMqTransport(("127.0.0.1", ports[0]), {1: ("127.0.0.1", tapped)})
        try:
            pass_over(zero, one, SECRET)
            assert SECRET in heard
        finally:
            zero.close(0)
            one.close(0)


def test_jobs_with_other_keys_are_refused_and_counted(folder, tmp_path):
    make_keys(str(tmp_path / "others"), 2)
    ports = free_ports(2)
    intruder, one = transport(0, ports, str(tmp_path / "others")), transport(1, ports, folder)
    try:
        until(lambda: one.receive(0.1) is None and one.num_refused_connections)
        assert not intruder.send(1, b"header", b"payload")
    finally:
        intruder.close(0)
        one.close(0)


def test_a_key_that_knows_ours_but_is_not_of_the_set_is_refused(folder):
    """The server's public key may be known; what lets in is the private key of a model of the set."""
    ports = free_ports(2)
    one = transport(1, ports, folder)
    context = zmq.Context()
    push = context.socket(zmq.PUSH)
    push.setsockopt(zmq.IMMEDIATE, 1)
    push.curve_publickey, push.curve_secretkey = zmq.curve_keypair()
    push.curve_serverkey = load_keys(folder, 1, 2).public[1]
    push.connect(f"tcp://127.0.0.1:{ports[1]}")
    try:
        until(lambda: one.receive(0.1) is None and one.num_refused_connections)
        assert not push.getsockopt(zmq.EVENTS) & zmq.POLLOUT
    finally:
        context.destroy(linger=0)
        one.close(0)


def test_a_model_of_the_set_cannot_speak_in_the_name_of_another(tmp_path):
    make_keys(str(tmp_path / "three"), 3)
    ports = free_ports(3)
    everyone = [
        ZeroMqTransport(
            ("127.0.0.1", ports[model]),
            {peer: ("127.0.0.1", ports[peer]) for peer in range(3) if peer != model},
            model=model,
            keys=load_keys(str(tmp_path / "three"), model, 3),
        )
        for model in range(3)
    ]
    mailbox = Mailbox(everyone[0], 0, 0, 3, b"the-run!", TrafficMeter())
    try:
        for sender, named in ((1, 1), (2, 1), (2, 2)):
            taken = mailbox._meter.received_messages
            message = Message(Kind.HELLO, named, 0, b"the-run!", b'{"incarnation": "a", "seen": []}')
            until(lambda sender=sender, message=message: everyone[sender].send(0, message.header(), message.payload))
            until(lambda taken=taken: mailbox.poll() or mailbox._meter.received_messages > taken)
        assert mailbox._meter.rejected_messages == 1
        assert mailbox._meter.control_messages == 2
    finally:
        for one in everyone:
            one.close(0)


def test_who_has_no_key_at_all_is_refused_and_counted(folder):
    one = transport(1, free_ports(2), folder)
    try:
        with stranger(one) as push:
            push.send_multipart([b"header", b"payload"])
            until(lambda: one.receive(0.1) is None and one.num_refused_connections)
    finally:
        one.close(0)


def coordinator(addresses, keys):
    config = CodistillationConfig(codistill_num_models=2, codistill_addresses=addresses, codistill_keys=keys)
    return Coordinator(config)


def test_between_hosts_keys_are_needed_unless_one_says_no(folder):
    port = free_ports(1)[0]
    addresses = f"0.0.0.0:{port},192.0.2.1:{port}"
    with pytest.raises(ConfigError, match="--codistill-keys is not set"):
        coordinator(addresses, "")
    for keys in ("none", folder):
        opened = coordinator(addresses, keys)
        opened._mailbox._transport.close(0)


@pytest.mark.parametrize("name", ["zmq", "gloo"])
def test_a_port_that_others_can_reach_needs_them_whatever_the_addresses_say(name):
    for bind in ("", "127.0.0.1", "lo", "0.0.0.0", "eth7"):
        addresses = ",".join(f"127.0.0.1:{port}" for port in free_ports(2))
        config = CodistillationConfig(
            codistill_num_models=2, codistill_addresses=addresses, codistill_bind=bind, codistill_transport=name
        )
        if bind in ("0.0.0.0", "eth7"):
            with pytest.raises(ConfigError, match=f"--codistill-bind '{bind}'|neither encrypted"):
                make_transport(config, 0, 1)
        else:
            make_transport(config, 0, 1).close(0)


class TestKeyFiles:
    def test_private_keys_are_for_their_owner_only(self, folder):
        modes = {stat.S_IMODE(os.stat(os.path.join(folder, name)).st_mode) for name in os.listdir(folder)}
        assert all(mode & 0o077 == 0 for mode in modes)

    def test_one_that_others_can_read_is_refused(self, folder):
        os.chmod(os.path.join(folder, "model-0.key_secret"), 0o644)
        with pytest.raises(ConfigError, match="chmod 600"):
            load_keys(folder, 0, 2)

    def test_the_private_key_of_another_model_is_not_needed(self, folder):
        os.remove(os.path.join(folder, "model-1.key_secret"))
        assert load_keys(folder, 0, 2).public.keys() == {0, 1}

    def test_what_is_missing_is_named_with_the_command_that_makes_it(self, folder):
        with pytest.raises(ConfigError, match=r"model-2\.key .*codistill-keys --num-models 3"):
            load_keys(folder, 0, 3)

    def test_halves_of_two_sets_are_refused(self, folder, tmp_path):
        make_keys(str(tmp_path / "others"), 2)
        os.replace(tmp_path / "others" / "model-0.key_secret", os.path.join(folder, "model-0.key_secret"))
        with pytest.raises(ConfigError, match="does not belong"):
            load_keys(folder, 0, 2)

    @pytest.mark.parametrize("name", ["model-0.key", "model-0.key_secret", "model-1.key", "launcher.key"])
    def test_one_that_was_cut_off_is_named(self, folder, name):
        path = Path(folder) / name
        path.write_text(path.read_text()[:-9] + '"\n')
        with pytest.raises(ConfigError, match=f"{name}.*(damaged|does not belong)"):
            load_keys(str(folder), 0, 2)

    def test_one_that_is_no_key_though_as_long_is_named(self, folder):
        path = Path(folder) / "model-1.key"
        text = path.read_text()
        at = text.index('public-key = "') + 20
        path.write_text(text[:at] + "~" + text[at + 1 :])
        with pytest.raises(ConfigError, match=r"model-1.key.*not in the form of ZeroMQ"):
            load_keys(str(folder), 0, 2)

    @pytest.mark.parametrize("name", ["relay.key", "relay.key_secret"])
    def test_so_is_one_of_the_relay(self, folder, name):
        path = Path(folder) / name
        path.write_text(path.read_text()[:-9] + '"\n')
        with pytest.raises(ConfigError, match=f"{name}"):
            (public_key if name.endswith("key") else secret_key)(str(path))

    def test_the_private_key_of_a_relay_is_not_copied_into_a_set(self, folder, tmp_path):
        with pytest.raises(ConfigError, match="relay.key_secret holds the relay's private key; give its relay.key"):
            make_keys(str(tmp_path / "new"), 2, str(Path(folder) / "relay.key_secret"))
        assert not (tmp_path / "new").exists()

    def test_a_private_key_is_not_shown(self, folder):
        keys = load_keys(folder, 0, 2)
        assert keys.secret.decode() not in repr(keys)

    def test_keys_are_never_overwritten(self, folder, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["codistill-keys", folder, "--num-models", "2"])
        with pytest.raises(SystemExit):
            curve_keys.main()
        assert "already" in capsys.readouterr().err

    def test_the_command_makes_a_set_that_loads(self, tmp_path, monkeypatch):
        monkeypatch.setattr(sys, "argv", ["codistill-keys", str(tmp_path / "new"), "--num-models", "3"])
        curve_keys.main()
        assert len(load_keys(str(tmp_path / "new"), 2, 3).public) == 3


@contextlib.contextmanager
def web_server(port):
    """Answers everything as a web server does what it does not understand; gives an event that says it has."""
    listener, has_answered = socket.create_server(("127.0.0.1", port)), threading.Event()

    def serve():
        with contextlib.suppress(OSError):
            while True:
                with listener.accept()[0] as near:
                    near.recv(10)
                    near.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                has_answered.set()

    threading.Thread(target=serve, daemon=True).start()
    yield has_answered
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


@pytest.mark.parametrize("wrong", ["without keys", "with keys", "web server"])
def test_a_wrong_process_at_the_address_of_a_peer_does_not_keep_the_right_one_from_being_reached(folder, wrong):
    ports, has_keys = free_ports(2), wrong != "with keys"

    def end(model, has_keys):
        keys = load_keys(folder, model, 2) if has_keys else None
        return ZeroMqTransport(
            ("127.0.0.1", ports[model]), {1 - model: ("127.0.0.1", ports[1 - model])}, model=model, keys=keys
        )

    with contextlib.ExitStack() as opened:

        def until_it_closes(transport):
            opened.callback(transport.close, 0)
            return transport

        first = end(1, has_keys)
        zero = until_it_closes(end(0, has_keys))
        pass_over(zero, first, b"met")
        first.close(0)
        with contextlib.ExitStack() as meanwhile:
            if wrong == "web server":
                has_answered = meanwhile.enter_context(web_server(ports[1]))
                until(has_answered.is_set)
            else:
                wrong_one = end(1, not has_keys)
                meanwhile.callback(wrong_one.close, 0)
                until(lambda: wrong_one.receive(0.05) is None and wrong_one.num_refused_connections)
        one = until_it_closes(end(1, has_keys))
        until(lambda: zero.receive(0.05) is None and zero.send(1, b"header", b"here at last"))
        assert until(lambda: one.receive(1.0))[1] == b"here at last"
