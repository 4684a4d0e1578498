"""Ways for a process to end without a row."""

import os
import time


def dies(library, name, to):
    os.abort()


def leaves(library, name, to):
    os._exit(3)


def sleeps(library, name, to):
    time.sleep(60)
