"""Run as a rank: exchanges until something breaks, except that the rank whose number is given waits for nothing.

Prints "imported", joins the others when it reads a line, and prints "ready" after the first exchange: where the timeout is
short, it must not be spent on importing torch.
"""

import sys
import time

import torch
import torch.distributed as dist

from baton.launcher.environment import process_group
from baton.launcher.errors import user_errors


def say(word):
    sys.stdout.write(f"{word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    say("imported")
    sys.stdin.readline()
    with user_errors(), process_group() as environment:
        received, sent = (torch.ones(environment.world, 1000) for _ in range(2))
        dist.all_to_all_single(received, sent)
        say("ready")
        # As a main thread that waits inside CUDA: no error reaches it.
        while sys.argv[1:] == [str(environment.rank)]:
            time.sleep(1)
        while True:
            dist.all_to_all_single(received, sent)
