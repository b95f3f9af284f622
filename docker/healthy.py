"""Exit 0 when a server answers 200 to GET: `python -S healthy.py URL`, for health checks in an image without curl."""

import sys
import urllib.error
import urllib.request

try:
    with urllib.request.urlopen(sys.argv[1], timeout=5) as answer:  # noqa: S310 - the compose file's own address
        sys.exit(0 if answer.status == 200 else f"{sys.argv[1]}: status {answer.status}")
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error}")
