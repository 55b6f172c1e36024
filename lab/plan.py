"""How long notebooks take: what a run prints before it starts, and how it keeps to its limit."""

import json
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MINUTES = {"quick": 2.5, "full": 12.0, "smoke": 0.5}  # of a notebook that says nothing else
START_MINUTES = 0.15  # until a notebook's kernel is up and has imported what it needs
QUICK_LIMIT = 38.0  # minutes for all notebooks in quick mode: with what is around them, 40
LEAST_SHARE = 0.1  # of a comparison's usual SECONDS; below that it would rarely say anything


class Cost(NamedTuple):
    """What a notebook is expected to take, in minutes: its timing comparisons at their usual SECONDS, and all the rest."""

    timing: float
    rest: float

    def at(self, share):
        """Minutes if comparisons take only a share of their usual SECONDS."""
        return self.timing * share + self.rest


@cache
def this_device():
    """(device, threads, whether it is a GPU), as the notebooks will name it; in a process of its own, which takes no GPU
    memory from them. Where torch does not work (None, None, False): the notebooks say why."""
    code = ("import json, torch; from effarch.bench.run import cpu_name; gpu = torch.cuda.is_available(); "
            "print(json.dumps([torch.cuda.get_device_name() if gpu else cpu_name(), torch.get_num_threads(), gpu]))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else (None, None, False)


def cost(path, mode, roots):
    """The Cost of one process of a notebook: of its last whole run in this mode on this device, else what it says itself."""
    latest = {}
    for file in (file for root in roots for file in root.glob(f"results/{path.parent.name}/**/{path.stem}.env.json")):
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            continue
        whole = facts.get("mode") == mode and facts.get("process_seconds") and not facts.get("continued")
        if whole and facts["utc_time"] > latest.get("utc_time", "") and (
                mode == "smoke" or [facts["device"], facts["num_threads"]] == list(this_device()[:2])):
            latest = facts
    if latest:
        timing = min(latest["comparing_seconds"], latest["process_seconds"][0])
        return Cost(timing / 60 / latest["seconds_share"], (latest["process_seconds"][0] - timing) / 60 + START_MINUTES)
    own = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("effarch", {})
    minutes = own.get("minutes", {}).get(mode, MINUTES[mode])
    return Cost(minutes / 2, minutes / 2)


def share_of_seconds(costs, minutes):
    """The share of their usual SECONDS that comparisons may take, for notebooks of these costs to end within `minutes`."""
    timing, rest = sum(c.timing for c in costs), sum(c.rest for c in costs)
    if timing + rest <= minutes:
        return 1.0
    return max(LEAST_SHARE, int(100 * (minutes - rest) / timing) / 100) if timing else 1.0


class Plan:
    """Which notebook takes how long, and how much of the time is left.

    limit: minutes in which all of them must end, or None. A machine that is slower than expected shortens the
    comparisons of the notebooks that are still to come."""

    def __init__(self, costs, limit, clock=time.monotonic):
        self.left, self.limit, self.clock, self.begin, self.expected = list(costs), limit, clock, clock(), 0.0
        self.share = share_of_seconds(costs, limit) if limit else 1.0

    def minutes(self):
        """Minutes since the beginning."""
        return (self.clock() - self.begin) / 60

    def next(self):
        """(share of SECONDS, expected minutes, expected minutes of this and all later ones) of the next notebook."""
        pace = max(1.0, self.minutes() / self.expected) if self.expected else 1.0
        left = [Cost(c.timing, c.rest * pace) for c in self.left]
        if self.limit:
            self.share = share_of_seconds(left, self.limit - self.minutes())
        mine = self.left.pop(0).at(self.share)
        self.expected += mine
        return self.share, mine, sum(c.at(self.share) for c in left)


def told(minutes):
    """Minutes in words."""
    return f"{minutes:.0f} min" if minutes >= 10 else f"{minutes:.1f} min" if minutes >= 1 else f"{60 * minutes:.0f} s"
