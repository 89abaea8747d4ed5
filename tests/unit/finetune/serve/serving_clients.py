"""What tests of a server in this process share."""

from collections.abc import Callable

from starlette.testclient import TestClient

from finetune.serve.admission import Limits

LIMITS = Limits(max_texts=64, max_bytes=64 * 1024, max_queue=256, timeout=60.0)
WORDS = [f"word{number}" for number in range(40)]  # of the fixture `encoder`
Connect = Callable[..., TestClient]
