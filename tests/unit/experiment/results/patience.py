from experiment.results.report.followed_pages import Waits
from waiting import LIMIT

PATIENT = Waits(runs=LIMIT, page=LIMIT)
"""Followed pages wait until everything is read, however busy the machine is."""
