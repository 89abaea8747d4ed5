"""`deepcloze serve`: check the options, load the model, serve."""

import logging
import os
import signal
from collections.abc import Mapping
from functools import partial
from ipaddress import ip_address
from pathlib import Path

from experiment.allocator import keep_freed_memory
from experiment.errors import UserError, reason
from finetune.options import ServeOptions
from finetune.serve.app import make_app
from finetune.serve.limits import Limits
from finetune.serve.logs import log_as_json, log_event
from finetune.serve.served_model import load_served_model
from finetune.serve.server import bind, run_server
from finetune.serve.serving import Serving

TOKEN_VARIABLE = "DEEPCLOZE_SERVE_TOKEN"


def serve_command(options: ServeOptions) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises UserError."""
    token = read_token(options.token_file, os.environ)
    if options.max_queue < options.max_texts:
        raise UserError(f"--max_queue: {options.max_queue} is less than the texts of one request, {options.max_texts}")
    wanted: list[int] = []  # signals that came before the server could reload; the default is to end the process
    signal.signal(signal.SIGHUP, lambda number, _: wanted.append(number))
    with bind(options.host, options.port) as listener:
        load = partial(load_served_model, Path(options.model), options.precision)
        keep_freed_memory()
        first = load()
        log_as_json()
        limits = Limits(options.max_texts, options.max_request_kib * 1024, options.max_queue, options.timeout)
        serving = Serving(first, load, limits, options.batch_delay_ms / 1000, options.batch_tokens)
        del first  # it is freed when it is replaced
        address, port = listener.getsockname()[:2]
        url = f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
        if token is None and not ip_address(address).is_loopback:
            log_event("any client that reaches this address may send requests: there is no token", logging.WARNING)

        def announce() -> None:
            info = serving.served.info
            print(f"{url}  {info.model} ({info.kind}, {info.precision})", flush=True)
            if wanted:
                serving.reload()

        run_server(make_app(serving, token), listener, options.timeout, announce, serving.reload)


def read_token(path: str | None, environment: Mapping[str, str]) -> str | None:
    """The token of a file, or else of the environment. Raises UserError for one that clients cannot send."""
    if path is None:
        token, origin = environment.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if token is None:
            return None
    else:
        try:
            token, origin = Path(path).read_text(encoding="utf-8").strip(), path
        except (OSError, ValueError) as error:
            raise UserError(f"--token_file: cannot read {path}: {reason(error)}") from None
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UserError(f"{origin}: expected a token of printable ASCII characters without spaces")
    return token
