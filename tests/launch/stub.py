"""A program for the tests of launchers: it takes the flags of several processes.

Its first argument is JSON: by process id, or "*", the words of what to do, in order.
"""

import json
import os
import signal
import subprocess
import sys
import time

flags = dict(word[2:].split("=", 1) for word in sys.argv[2:] if "=" in word)
index = int(flags.get("process_id", 0))
plans = json.loads(sys.argv[1])

asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
for word in plans.get(str(index), plans.get("*", [])):
    name, _, value = word.partition("=")
    if name == "say":
        print(value.format(**flags, **os.environ), file=sys.stderr, flush=True)
    elif name == "print":
        print(value.format(**flags, **os.environ), flush=True)
    elif name == "exit":
        sys.exit(int(value))
    elif name == "sleep":
        time.sleep(float(value))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "save":  # waits to be asked to stop, then stops as a run does
        while not asked:
            time.sleep(0.02)
        sys.exit(75)
    elif name == "hang":  # in C, as a collective does: SIGTERM changes nothing
        while True:
            time.sleep(60)
    elif name == "once":  # the first attempt ends with 75
        try:
            os.close(os.open(value, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        sys.exit(75)
    elif name == "pid":
        with open(f"{value}{index}", "w") as file:
            file.write(str(os.getpid()))
    elif name == "child":
        with open(value, "w") as file:
            file.write(str(subprocess.Popen(["sleep", "60"]).pid))
    else:
        raise ValueError(word)
