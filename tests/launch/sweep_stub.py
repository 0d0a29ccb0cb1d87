"""A program for the tests of sweeps: a module with the flags and the end of train.main.

$STUB_PLAN is JSON: by the name of a job, or "*", what its attempts do, one after the
other, the last one for all that follow: "done", a status, "kill" or "wait". It counts
its attempts in its workdir.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
workdir = Path(flags["workdir"])
workdir.mkdir(exist_ok=True)
with (workdir / "attempts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\n")
attempt = len((workdir / "attempts").read_text().splitlines()) - 1
plans = json.loads(os.environ.get("STUB_PLAN", "{}"))
plan = plans.get(workdir.parent.name, plans.get("*", ["done"]))
word = plan[min(attempt, len(plan) - 1)]
if word == "wait":
    time.sleep(60)
if word == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
if word.isdigit():
    print(f"error: place: must be so, got {word}. Mend it.", file=sys.stderr)
    sys.exit(int(word))
seed = int(flags.get("config.seed", 0))
rows = [
    {"rank_fraction": f, "accuracy": f - seed / 10, "params": 100 * f, "macs": 90 * f}
    for f in (1.0, 0.5)
]
print("not the last line")
print(json.dumps({"workdir": str(workdir), "step": 7, "frontier": rows}))
