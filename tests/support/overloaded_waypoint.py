"""`waypoint run`, in which each request that is taken costs a fixed time: `python -m ... SECONDS OPTION...`.

It sleeps, so that the time is the same on a machine that others use, too.
"""

from __future__ import annotations

import sys
import time

from waypoint import exchange
from waypoint.__main__ import main
from waypoint.messages import RequestHead
from waypoint.request import Request

if __name__ == "__main__":
    each_s, judged = float(sys.argv[1]), exchange._judged

    def slow(head: RequestHead) -> Request:
        time.sleep(each_s)
        return judged(head)

    exchange._judged = slow
    sys.exit(main(["run", *sys.argv[2:]]))
