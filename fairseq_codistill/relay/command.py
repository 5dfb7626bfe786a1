"""Owns the command line of ``codistill-relay``."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from fairseq_codistill import __version__
from fairseq_codistill.config import ConfigError

DESCRIPTION = """\
Forward what the models of a run exchange, on a host that all of them reach, when they cannot reach each other. Each
job then gets --codistill-relay HOST:PORT in place of --codistill-addresses, and opens one connection to here.

  codistill-keys keys --num-models 2                  # once; each job gets the folder, but for relay.key_secret
  codistill-relay --port 29700 --keys keys            # here: *.key and relay.key_secret are enough

Several runs can share a relay: make their keys with codistill-keys --relay keys/relay.key, and name every folder, or
put them into one.
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="codistill-relay",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--port", type=int, required=True, metavar="PORT", help="to listen on")
    parser.add_argument(
        "--keys", nargs="+", required=True, metavar="FOLDER", help="key sets of the runs, or folders of key sets"
    )
    parser.add_argument("--bind", default="0.0.0.0", metavar="HOST", help="address to listen on; 0.0.0.0, all of them")
    parser.add_argument(
        "--memory-mb",
        type=int,
        default=1024,
        metavar="MIB",
        help="what may wait for all ranks together, in MiB; each has an equal share; 1024",
    )
    parser.add_argument(
        "--max-message-mb", type=int, default=512, metavar="MIB", help="largest message taken, in MiB; 512"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Console script ``codistill-relay``.

    Returns:
        128 + the number of the signal that ended it; 2 (by exit) for a wrong setting.
    """
    parser = make_parser()
    options = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="[relay] %(asctime)s %(message)s", stream=sys.stderr)
    try:
        for name in ("memory_mb", "max_message_mb"):
            if getattr(options, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
        if not 0 < options.port < 65536:
            raise ConfigError(f"--port is {options.port}; it must lie between 1 and 65535")
        from fairseq_codistill.relay.keyrings import Keyrings  # loads ZeroMQ
        from fairseq_codistill.relay.server import Relay

        keyrings = Keyrings(options.keys)
        relay = Relay(options.bind, options.port, keyrings, options.memory_mb * 2**20, options.max_message_mb * 2**20)
    except ConfigError as error:
        parser.error(str(error))
    logging.info("listening on %s:%d for %s", options.bind, options.port, ", ".join(keyrings.runs()))
    try:
        number = relay.run()
    finally:
        relay.close()
    logging.info("ended: %s", json.dumps(relay.counts))
    return 128 + number


if __name__ == "__main__":
    sys.exit(main())
