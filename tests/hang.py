"""Two ranks of which one hangs; test_scripts.py starts it."""
import time

import torch

import ddp


def main():
    ddp.init()
    if ddp.rank() == 1:
        time.sleep(8)
    ddp.gather(torch.zeros(2))
